"""A pass over images: what it sums up, what it leaves out, and going on where it was stopped, to the same bit."""

import errno
import gc
import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from PIL import Image

import jaxvit
from experiments.core.experiment import Measured, Pairs
from experiments.runner.store import KEPT, Store, run_pass
from jaxvit import ImageError, ViTConfig
from jaxvit.analysis.similarity import StreamingCKA
from jaxvit.model.config import Preprocess

CONFIG = ViTConfig(**TINY, preprocess=Preprocess(resize=20, crop=20))
COUNT, BATCH = 11, 3


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 22, 20, 3), dtype=np.uint8)
    for i in range(COUNT):
        Image.fromarray(pixels[i]).save(folder / f"{i:02}.png")
    return jaxvit.find_images(folder)


def measure(weights, images, position) -> Measured:
    """Something of each kind."""
    x = images.mean((1, 2))  # B 3
    y = jnp.tanh(x @ weights)  # B 4
    layers = jnp.stack([x, 2 * x + 1])  # 2 B 3
    return Measured(
        per_image={"mean": x.mean(1), "vector": y, "position": position},
        pairs={"one": Pairs(x, {"y": y}), "layers": Pairs(layers, {"x": layers**2})},
        sums={"y": y},
        keep={"x": x},
    )


WEIGHTS = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)


def run(folder, sources, **more):
    return run_pass(Store(folder, {"a": 1}), measure, WEIGHTS, sources, CONFIG, batch_size=BATCH, **more)


def content(store: Store) -> dict[str, bytes]:
    """All that a pass has found, to the bit."""
    found = store.found()
    arrays = {f"row {name}": found.per_image[name] for name in found.per_image}
    arrays |= {f"sum {name}": a for name, a in found.sums.items()} | {
        f"keep {name}": a for name, a in found.keep.items()
    }
    for name, cka in found.cka.items():
        arrays |= {f"cka {name} {key}": a for key, a in cka.state().items()}
    return {name: np.asarray(a).tobytes() for name, a in arrays.items()} | {
        "digest": store.digest.encode(),
        "skipped": json.dumps(store.skipped).encode(),
    }


def test_sums_columns_and_cka_are_those_of_all_images(tmp_path, sources):
    found = run(tmp_path, sources).found()
    x = np.asarray(jaxvit.prepare(sources, CONFIG).mean((1, 2)))
    y = np.tanh(x @ WEIGHTS)
    assert found.n == COUNT
    np.testing.assert_allclose(found.per_image["mean"], x.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.per_image["position"], np.arange(COUNT))
    np.testing.assert_array_equal(found.per_image["image"], np.arange(COUNT))
    np.testing.assert_allclose(found.per_image["vector"], y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.sums["y"], y.sum(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.keep["x"], x[:KEPT], rtol=1e-5, atol=1e-6)
    direct = StreamingCKA()
    direct.update(x, {"y": y})
    np.testing.assert_allclose(found.cka["one"].results()["y"].biased, direct.results()["y"].biased, rtol=1e-5)
    assert found.cka["layers"].results()["x"].biased.shape == (2,)


def test_a_pass_that_is_done_is_not_made_again(tmp_path, sources):
    first = content(run(tmp_path, sources))

    def never(*arguments):
        raise AssertionError("measured again")

    again = run_pass(Store(tmp_path, {"a": 1}), never, WEIGHTS, sources, CONFIG, batch_size=BATCH)
    assert content(again) == first


def test_a_folder_of_other_settings_is_left_as_it_is(tmp_path, sources):
    whole = content(run(tmp_path, sources))
    with pytest.raises(ValueError, match="other settings"):
        Store(tmp_path, {"a": 2})
    assert content(Store(tmp_path, {"a": 1})) == whole


@pytest.mark.parametrize("damage", ["rows", "no rows", "state"])
def test_a_damaged_folder_is_measured_again_and_not_read_as_zeros(tmp_path, sources, damage, capsys):
    store = run(tmp_path, sources)
    whole = content(store)
    if damage == "rows":
        store.rows.write_bytes(store.rows.read_bytes()[:-1])
    elif damage == "no rows":
        store.rows.unlink()
    else:
        store.state.write_bytes(store.state.read_bytes()[:-100])
    (tmp_path / ".state.npz.123").write_bytes(b"half")
    again = Store(tmp_path, {"a": 1})
    assert again.n == 0 and not again.done and "measured again" in capsys.readouterr().err
    assert not (tmp_path / ".state.npz.123").exists()
    assert content(run(tmp_path, sources)) == whole


@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("place", ["rows", "state"])
def test_a_stopped_pass_goes_on_to_the_same_bits(tmp_path, sources, monkeypatch, at, place):
    """Stopped at its at-th batch, between appending rows and saving the state, or in the middle of appending."""
    whole = content(run(tmp_path / "whole", sources))
    store, calls = Store(tmp_path / "parts", {"a": 1}), []
    add, save = store.add, store.save

    def stopped_add(m, indices):
        add(m, indices)
        if place == "rows" and len(calls) == at:
            with open(store.rows, "ab") as file:
                file.write(b"half a row")
            raise KeyboardInterrupt
        calls.append(1)

    def stopped_save(done=False, every=0.0):
        if place == "state" and len(calls) == at + 1:
            raise KeyboardInterrupt
        save(done, every)

    monkeypatch.setattr(store, "add", stopped_add)
    monkeypatch.setattr(store, "save", stopped_save)
    batches = -(-COUNT // BATCH)
    try:
        run_pass(store, measure, WEIGHTS, sources, CONFIG, batch_size=BATCH, save_every=0)
    except KeyboardInterrupt:
        assert at < batches
    else:
        assert at >= batches
    again = Store(tmp_path / "parts", {"a": 1})
    assert again.done or again.n == BATCH * min(at, batches)
    run_pass(again, measure, WEIGHTS, sources, CONFIG, batch_size=BATCH)
    assert content(again) == whole
    assert content(Store(tmp_path / "parts", {"a": 1})) == whole


def test_what_cannot_be_decoded_is_named_left_out_and_counted_once(tmp_path, sources):
    bad = [tmp_path / f"bad{i}.png" for i in range(3)]
    for path in bad:
        path.write_bytes(b"no image")
    mixed = [bad[0], *sources[:4], bad[1], *sources[4:], bad[2]]
    store = run(tmp_path / "whole", mixed)
    assert [entry["image"] for entry in store.skipped] == list(map(str, bad))
    assert all("not an image" in entry["error"] for entry in store.skipped)
    np.testing.assert_array_equal(store.found().per_image["image"], [1, 2, 3, 4, *range(6, 13)])
    plain = content(run(tmp_path / "plain", sources))
    whole = content(store)
    numbered = ("row image", "skipped", "digest")  # which tell where images stand among all
    assert {k: v for k, v in whole.items() if k not in numbered} == {
        k: v for k, v in plain.items() if k not in numbered
    }

    parts = Store(tmp_path / "parts", {"a": 1})  # stopped after two batches, and gone on with
    real, calls = parts.add, []

    def stop(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        real(*arguments)

    parts.add = stop
    with pytest.raises(KeyboardInterrupt):
        run_pass(parts, measure, WEIGHTS, mixed, CONFIG, batch_size=BATCH, save_every=0)
    assert content(run(tmp_path / "parts", mixed)) == whole


def test_no_usable_image_is_an_error_that_names_the_first(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"none of the 1 images can be used; the first: .*a\.png is empty"):
        run(tmp_path / "out", [tmp_path / "a.png"])


def test_a_full_disk_keeps_what_was_finished(tmp_path, sources, monkeypatch):
    whole = content(run(tmp_path / "whole", sources))
    saves = []
    real = np.savez

    def full(file, **arrays):
        saves.append(1)
        if len(saves) == 3:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, **arrays)

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(jaxvit.CheckpointError, match="No space left on device"):
        run(tmp_path / "parts", sources, save_every=0)
    assert Store(tmp_path / "parts", {"a": 1}).n == 2 * BATCH
    assert content(run(tmp_path / "parts", sources)) == whole


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """Images are made as they are asked for, by a sequence that holds none of them."""

    class Endless(Sequence):
        def __init__(self, start, stop):
            self.range = range(start, stop)

        def __len__(self):
            return len(self.range)

        def __getitem__(self, at):
            if isinstance(at, slice):
                return Endless(self.range.start + (at.start or 0), self.range.stop)
            return np.full((20, 20, 3), self.range[at] % 256, np.uint8)

    def peak(count: int) -> int:
        # Python leaves cycles for later in proportion to all objects there are: only ours are to count.
        gc.collect(), gc.freeze()
        tracemalloc.start()
        run(tmp_path / str(count), Endless(0, count), save_every=0.2)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        gc.unfreeze()
        return most

    peak(40)  # what is made once
    few, many = peak(600), peak(2400)  # 1800 more, which take 2.2 MB, and prepared 8.6 MB
    assert many < few + 600_000, (few, many)
