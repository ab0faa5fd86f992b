"""Fine-tuning from labelled images: what is read, what is learned, and runs that are interrupted."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxvit
from experiments.models.subjects import random_weights
from jaxvit import Preprocess, ViTConfig, cli
from jaxvit.model.params import to_params
from jaxvit.training.finetune import Labelled, Recipe, finetune, parts_of
from jaxvit.training.images import Batches, Variation

CLASSES = ("blue", "green", "red")
STRETCHED = Preprocess(16, 16, fit="stretch")
CONFIG = ViTConfig(depth=2, width=16, heads=2, hidden=24, patch=4, grid=(4, 4), registers=1, preprocess=STRETCHED)


def picture(number):
    """Noise, brighter in the channel of its class."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 40, size=(18 + number % 5, 20, 3), dtype=np.uint8)
    pixels[..., 2 - number % 3] += 200
    return pixels


@pytest.fixture(scope="module")
def model():
    return random_weights(CONFIG)


@pytest.fixture(scope="module")
def images():
    return Labelled(picture, np.arange(60) % 3, CLASSES, np.arange(42), np.arange(42, 60))


def test_a_batch_is_always_the_same():
    batches = Batches(picture, np.arange(30) % 3, range(30), STRETCHED, 4, seed=3)
    pixels, labels = batches[9]
    assert pixels.shape == (4, 16, 16, 3) and pixels.dtype == np.float32 and labels.dtype == np.int32
    for each in (Batches(picture, np.arange(30) % 3, range(30), STRETCHED, 4, seed=3)[9], next(batches.since(9))):
        assert (each[0] == pixels).all() and (each[1] == labels).all()
    assert (batches[10][0] != pixels).any()
    assert (Batches(picture, np.arange(30) % 3, range(30), STRETCHED, 4, seed=4)[9][0] != pixels).any()


def test_an_epoch_holds_every_image_once():
    numbers = np.arange(100, 130)
    labels = np.arange(130)
    batches = Batches(picture, labels, numbers, STRETCHED, 10)
    assert batches.epoch == 3
    for epoch in range(2):
        seen = np.concatenate([batches[epoch * 3 + at][1] for at in range(3)])
        assert sorted(seen) == list(numbers)


def test_without_variation_images_are_as_prepared():
    still = Variation(area=1.0, ratio=1.0, mirror=0.0, colour=0.0)
    square = np.random.default_rng(0).integers(0, 256, size=(24, 24, 3), dtype=np.uint8)
    expected = jaxvit.prepare(square, CONFIG)[0]
    found = still(square, STRETCHED, np.random.default_rng(0))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_crops_keep_what_they_should():
    change = Variation(area=0.5, ratio=2.0)
    rng = np.random.default_rng(0)
    boxes = np.array([change.box(40, 30, rng) for _ in range(500)])
    left, top, right, bottom = boxes.T
    areas, ratios = (right - left) * (bottom - top) / 1200, (right - left) / (bottom - top)
    assert boxes.min() >= 0 and right.max() <= 40 and bottom.max() <= 30
    assert 0.5 <= areas.min() < 0.55 and 0.9 < areas.max() <= 1
    assert 0.5 <= ratios.min() < 0.75 and 1.6 < ratios.max() <= 2
    assert change.box(100, 2, rng) == (49, 0, 51, 2)  # no crop of these ratios has half of the area
    for name in ("area", "ratio", "mirror", "colour"):
        with pytest.raises(ValueError, match=f"{name} is -1.0; expected"):
            Variation(**{name: -1.0})


@pytest.mark.parametrize("train", [["head"], ["last=1"], ["lora=2"], ["all"]])
def test_accuracy_rises(train, model, images):
    found = finetune(model, images, train, Recipe(epochs=6, batch_size=14, rate=0.02, warmup=0.0))
    assert found.accuracy[found.best] >= 0.85 > 0.6 > found.accuracy[0]
    assert found.accuracy[found.best] == max(found.accuracy)
    assert len(found.loss) == 3 * (len(found.accuracy) - 1)
    held = jnp.concatenate([jaxvit.prepare(picture(int(n)), CONFIG) for n in images.held])
    right = (found.model(held).logits.argmax(-1) == images.labels[images.held]).mean()
    assert float(right) == pytest.approx(found.accuracy[found.best])
    old, new = to_params(model), to_params(found.model)
    same = {name for name in old if (old[name] == new[name]).all()}
    assert (
        same
        == {
            "head": set(old),
            "last=1": {name for name in old if not name.startswith("blocks.")},
            "lora=2": {name for name in old if name not in ("blocks.attn.qkv.kernel", "blocks.attn.proj.kernel")},
            "all": set(),
        }[train[0]]
    )
    if train == ["last=1"]:
        assert all((old[name][0] == new[name][0]).all() for name in old if name.startswith("blocks."))


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_to_the_same_numbers(model, images, tmp_path):
    recipe = Recipe(epochs=4, batch_size=20, rate=0.01, drop_path=0.2, average=0.8, accumulate=2, patience=9)
    whole = finetune(model, images, ["last=1"], recipe)

    def stop(epoch, loss, accuracy):
        if epoch == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        finetune(model, images, ["last=1"], recipe, checkpoints=tmp_path, on_epoch=stop)
    found = finetune(model, images, ["last=1"], recipe, checkpoints=tmp_path)
    assert found.loss == whole.loss and found.accuracy == whole.accuracy and found.best == whole.best
    jax.tree.map(np.testing.assert_array_equal, to_params(found.model), to_params(whole.model))


def test_it_stops_when_nothing_is_gained(model, images):
    found = finetune(model, images, ["head"], Recipe(epochs=9, batch_size=14, rate=1e-9, patience=2))
    assert len(found.accuracy) == 1 + 2 and found.best == 0


def test_what_cannot_be_done_is_told(model, images):
    key = jax.random.key(0)
    for words, told in (
        (["last=3"], "the model has 2 blocks"),
        (["lora=x"], "expected last=BLOCKS, lora=RANK"),
        (["lora=0"], "expected last=BLOCKS, lora=RANK"),
        (["tail"], "names no parameter"),
    ):
        with pytest.raises(ValueError, match=told):
            parts_of(model, words, key)
    with pytest.raises(ValueError, match="head has 0 classes, the images 3"):
        finetune(model, images, head=False)
    with pytest.raises(ValueError, match="a batch of 64 cannot be made of 42"):
        finetune(model, images, recipe=Recipe(batch_size=64))
    with pytest.raises(ValueError, match="no image is held out"):
        finetune(model, images._replace(held=np.arange(0)))
    for name, value in (("epochs", 0), ("average", 1.0), ("drop_path", -0.1)):
        with pytest.raises(ValueError, match=f"{name} is"):
            Recipe(**{name: value})


def test_the_command(model, tmp_path, capsys, monkeypatch):
    folder, saved, out = tmp_path / "images", tmp_path / "model", tmp_path / "tuned"
    jaxvit.save(model, saved)
    for number in range(60):
        place = folder / CLASSES[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number)).save(place / f"{number}.png")
    command = ["finetune", str(saved), "--labelled", str(folder), "--out", str(out), "--train", "last=1"]
    command += ["--epochs", "6", "--batch-size", "12", "--rate", "0.02"]

    from jaxvit.training import finetune as module

    kept = module.resumed

    def stopping(place, state, best):
        keep, found = kept(place, state, best)

        def keep_and_stop(epoch, *what):
            keep(epoch, *what)
            if epoch == 2:
                raise KeyboardInterrupt

        return keep_and_stop, found

    with monkeypatch.context() as patched:
        patched.setattr(module, "resumed", stopping)
        assert cli.main(command) == 130
    assert cli.main(command) == 1
    assert "--resume goes on" in capsys.readouterr().err
    assert cli.main([*command, "--resume", "--rate", "0.1"]) == 1
    assert "with other options" in capsys.readouterr().err
    assert cli.main([*command, "--resume"]) == 0
    told = capsys.readouterr().out
    assert "48 to learn from, 12 held out" in told
    assert f"wrote {out}" in told and "epoch 1:" not in told and "epoch 3:" in told
    assert not out.with_name("tuned.partial").exists()
    record = json.loads((out / "training.json").read_text())
    assert record["accuracy"][record["best epoch"]] >= 0.8 and record["classes"] == list(CLASSES)
    tuned, provenance = jaxvit.load(out, described=True)
    assert tuned.config.classes == 3 and provenance.modified
    assert cli.main(["export", str(out), str(tmp_path / "timm.safetensors"), "--layout", "timm"]) == 0
    assert cli.main(command) == 1
    assert "already holds a model" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite", "--epochs", "1"]) == 0
    assert len(json.loads((out / "training.json").read_text())["accuracy"]) == 2
