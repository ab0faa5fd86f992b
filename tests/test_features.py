"""`jaxvit features`: what is read, against the libraries whose readouts it equals; what is written, however it ends."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, TINY, random_images, random_model
from PIL import Image

import jaxvit
from jaxvit import FeaturesError, Take, ViTConfig, Windows, convert
from jaxvit.analysis import readouts
from jaxvit.analysis.readouts import Readout, axes_of, read_out
from jaxvit.cli import main
from jaxvit.io import image_sets
from jaxvit.io.checkpoint import CheckpointError
from jaxvit.io.images import ImageError

PREPARED = jaxvit.Preprocess(22, 20)
CONFIG = ViTConfig(**TINY, registers=2, preprocess=PREPARED)
FORMATS = (".zarr", ".npz", ".safetensors", ".parquet")


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Eleven images of three classes, two of which are damaged."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for i in range(11):
        place = folder / "abc"[i % 3]
        place.mkdir(exist_ok=True)
        picture(rng, (24 + i, 30)).save(place / f"{i:02}.png")
    for name in ("a/06.png", "c/08.png"):
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def picture(rng, shape):
    return Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))


NAMES = ["a/00.png", "a/03.png", "a/09.png", "b/01.png", "b/04.png", "b/07.png", "b/10.png", "c/02.png", "c/05.png"]
"""Those that can be used."""


# What is asked for ----------------------------------------------------------------------------------------------------


def test_the_grammar():
    assert Readout.parse("cls") == Readout("cls", "cls", tokens="cls")
    assert Readout.parse("patch_mean@2").mean and Readout.parse("patch_mean").tokens == "patches"
    several = Readout.parse("dense = tokens@[3, 6,-1]:normed")
    assert several.name == "dense" and several.layers == (3, 6, -1) and several.normed and several.site == "resid_post"
    assert Readout.parse("tokens@3,6").layers == (3, 6) and Readout.parse("tokens@[3]").layers == (3,)
    assert Readout.parse("cls@-1").layers == -1 and Readout.parse("cls@all").layers is None
    maps = Readout.parse("pattern@0:cls:head=1,3")
    assert maps.heads == (1, 3) and maps.tokens == "cls" and Readout.parse("z@0:head=2").heads == 2


WRONG = {
    "": "cannot read",
    "cls@x": "cannot read",
    "clss": "there is no 'clss'; there are cls, registers",
    "resid_post": "of which layers",
    "cls:normed": "normed already",
    "z@1:normed": "follows the residual stream",
    "logits@3": "takes no layers",
    "pooled:mean": "takes no layers",
    "tokens:grid": "only patches",
    "patches:mean:grid": "only patches",
    "patches:head=1": "have heads",
    "cls@0:mean": "one token",
    "patches@0:cls": "what is :cls",
    "patches@0:blurred": "what is :blurred",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_cannot_be_read_says_why(text):
    with pytest.raises(ValueError, match=WRONG[text].replace("[", r"\[")):
        Readout.parse(text)


def test_what_a_model_lacks(model):
    images = random_images(0, 1, 20)
    plain = random_model(ViTConfig(**TINY, cls=False, registers=0, pool="mean"))
    pooled = random_model(ViTConfig(**TINY, final_norm="pooled", pool="mean"))
    for of, take, expected in (
        (model, "logits", "no classifier"),
        (model, "projection", "no projection"),
        (plain, "cls", "no class token"),
        (plain, "registers@0", "no registers"),
        (plain, "pattern@0:prefix", "no class token and no registers"),
        (pooled, "patches@0:normed", "does not stand on tokens"),
        (model, "cls@3", "no layer 3; this model has 3, from 0 to 2"),
        (model, "z@0:head=4", "no head 4"),
        (model, [], "nothing is taken"),
        (model, ["cls", "cls"], "taken twice"),
    ):
        with pytest.raises(ValueError, match=expected):
            read_out(of, images, take)


# What is read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20, 20), (12, 28)])
@pytest.mark.parametrize("family", ["dinov2", "dinov2 giant with registers"])
def test_each_readout_is_what_it_says(family, size):
    model, images = random_model(FAMILIES[family]), random_images(1, 2, *size)
    sites = ("resid_post", "resid_mid", "pattern", "z", "mlp_post")
    out = model(images, record={site: Take(tokens="all") for site in sites})
    trace, P, grid = out.trace, model.prefix, model.config.layout(*size).grid
    stream = np.asarray(trace["resid_post"])
    normed = np.asarray(jax.vmap(model.norm)(trace["resid_post"]))
    by_head = np.asarray(trace["z"])
    expected = {
        "cls": out.cls,
        "registers": out.registers,
        "patches": out.patches,
        "patches:grid": np.reshape(out.patches, (2, *grid, -1)),
        "patch_mean": out.patches.mean(1),
        "tokens": jnp.concatenate([out.cls[:, None], out.registers, out.patches], 1),
        "pooled": out.pooled,
        "tokens@1": stream[1],
        "cls@all": stream[:, :, 0].swapaxes(0, 1),
        "patches@[2,0]:normed": normed[[2, 0], :, P:].swapaxes(0, 1),
        "patches@-1:normed:grid": normed[-1, :, P:].reshape(2, *grid, -1),
        "prefix@[1]": stream[[1], :, :P].swapaxes(0, 1),
        "resid_mid@1:patches:mean": np.asarray(trace["resid_mid"])[1, :, P:].mean(1),
        "z@[0,2]:cls:head=1": by_head[[0, 2], :, 0, 1].swapaxes(0, 1),
        "z@1:head=0,3": by_head[1][:, :, [0, 3]],
        "mlp_post@0:tokens": trace["mlp_post"][0],
        "pattern@1": trace["pattern"][1, :, :, :P],
        "pattern@1:patches:mean": trace["pattern"][1, :, :, P:].mean(2),
        "pattern@[-1,0]:cls:head=mean": trace["pattern"][np.array([2, 0]), :, :, 0].mean(2).swapaxes(0, 1),
    }
    if not model.config.registers:
        del expected["registers"]
    found = read_out(model, images, list(expected))
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape and len(axes_of(Readout.parse(name))) == value.ndim, name
        np.testing.assert_allclose(found[name], value, atol=3e-5, err_msg=name)


def test_layers_behind_the_last_that_is_read_do_not_run(model):
    blocks = jax.tree.map(lambda a: a.at[2:].set(jnp.nan), model.blocks)
    broken = random_model(CONFIG)
    broken.blocks = blocks
    images = random_images(2, 1, 20)
    found = read_out(broken, images, "tokens@[1,0]:normed")["tokens@[1,0]:normed"]
    np.testing.assert_allclose(found, read_out(model, images, "tokens@[1,0]:normed")["tokens@[1,0]:normed"], atol=1e-5)
    assert np.isnan(read_out(broken, images, "cls")["cls"]).all()


def test_it_is_part_of_a_program(model):
    images = random_images(3, 2, 20)
    loss = jax.jit(jax.grad(lambda images: read_out(model, images, "patch_mean@1")["patch_mean@1"].sum()))
    assert np.isfinite(loss(images)).all()


def test_the_readouts_of_timm_and_of_meta():
    """timm has the interface of Meta's code, `get_intermediate_layers`, beside its own `forward_intermediates`."""
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    sizes = dict(depth=4, embed_dim=48, num_heads=4, img_size=56, num_classes=0)
    module = timm.create_model("vit_small_patch14_reg4_dinov2", **sizes).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours, images = convert.load(module), random_images(4, 2, 56, 84)
    module.set_input_size(img_size=(56, 84))
    pixels = torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)
    with torch.no_grad():
        meta = module.get_intermediate_layers(pixels, n=3, reshape=True, return_prefix_tokens=True, norm=True)
        own = module.forward_intermediates(pixels, indices=[1, 3], norm=False, return_prefix_tokens=True)
        features = module.forward_features(pixels)
    names = ["patches@[1,2,3]:normed:grid", "cls@[1,2,3]:normed", "prefix@[1,3]", "patches@[1,3]:grid", "tokens"]
    found = read_out(ours, images, names)
    for i, (patches, prefix) in enumerate(meta):
        equal(found["patches@[1,2,3]:normed:grid"][:, i], patches.permute(0, 2, 3, 1))
        equal(found["cls@[1,2,3]:normed"][:, i], prefix[:, 0])
    final, layers = own
    equal(found["tokens"], final)
    equal(found["tokens"], features)
    for i, (patches, prefix) in enumerate(layers):
        equal(found["patches@[1,3]:grid"][:, i], patches.permute(0, 2, 3, 1))
        equal(found["prefix@[1,3]"][:, i], prefix)


def test_the_readouts_of_transformers():
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14)
    module = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**sizes)).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images = random_images(5, 2, 42, 28)
    with torch.no_grad():
        out = module(torch.tensor(np.asarray(images)).permute(0, 3, 1, 2), output_hidden_states=True)
    found = read_out(convert.load(module), images, ["resid_pre@0", "tokens@all", "tokens", "pooled"])
    equal(found["resid_pre@0"], out.hidden_states[0])
    for i in range(3):
        equal(found["tokens@all"][:, i], out.hidden_states[i + 1])
    equal(found["tokens"], out.last_hidden_state)
    equal(found["pooled"], out.pooler_output)


def equal(ours, theirs):
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


# What is written ------------------------------------------------------------------------------------------------------

TAKE = ["cls", "dense=patches@[0,-1]:normed:grid", "patch_mean"]


@pytest.fixture(scope="module")
def expected(model, photographs):
    """Image by image."""
    found = [read_out(model, jaxvit.prepare(photographs / name, CONFIG), TAKE) for name in NAMES]
    return {name: np.concatenate([each[name] for each in found]) for name in found[0]}


@pytest.mark.parametrize("suffix", ["", *FORMATS])
def test_rows_names_and_labels(suffix, model, photographs, expected, tmp_path):
    left_out = []
    images = image_sets.open_images(photographs, labelled=True)
    out = tmp_path / f"features{suffix}" if suffix else None
    found = jaxvit.features(
        model, images, TAKE, out=out, batch_size=4, on_error=lambda name, error: left_out.append(name)
    )
    assert left_out == ["a/06.png", "c/08.png"] and [name for name, _ in found.header["left out"]] == left_out
    assert found.names == NAMES and found.header["classes"] == ["a", "b", "c"] and found.header["rows"] == 9
    assert found.labels is not None and [found.header["classes"][i] for i in found.labels] == [n[0] for n in NAMES]
    assert list(found) == ["cls", "dense", "patch_mean"] and "9 images, with labels" in repr(found)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name][:], value, atol=2e-5)
    assert found.header["arrays"]["dense"] == {
        "readout": "patches@[0,-1]:normed:grid",
        "axes": ["image", "layer", "row", "column", "channel"],
        "layers": [0, 2],
    }
    assert ViTConfig.from_dict(found.header["model"]["config"]) == CONFIG
    if out:
        assert sorted(path.name for path in tmp_path.iterdir()) == [out.name]
        assert json.dumps(jaxvit.read_features(out).header) == json.dumps(found.header)
    with pytest.raises(KeyError, match="no array 'clss'; there are cls, dense, patch_mean"):
        found["clss"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_run_that_was_interrupted_gives_the_same_bytes(suffix, model, photographs, tmp_path, monkeypatch):
    """Wherever it stops: also behind rows that are written and not yet noted, and in the middle of a chunk."""
    words = dict(take=TAKE, batch_size=2, on_error=lambda name, error: None, size=20)
    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"features{suffix}"
    jaxvit.features(model, photographs, out=whole, **words)
    writer = jaxvit.io.rows.WRITERS[suffix]
    append, note, done = writer.append, writer.note, []

    class StopError(Exception):
        pass

    def stops(self, *more):
        done.append(0)
        if len(done) % 3 == 0:
            raise StopError
        return note(self, *more)

    monkeypatch.setattr(writer, "note", stops)
    for _ in range(2):
        with pytest.raises(StopError):
            jaxvit.features(model, photographs, out=out, resume=True, **words)
        assert not out.exists()
        with pytest.raises(FeaturesError, match="not complete: .* give --resume"):
            jaxvit.read_features(out)
    monkeypatch.setattr(writer, "note", note)
    (out.with_name(out.name + ".partial") / "0.bin.x.partial").write_bytes(b"torn")
    with pytest.raises(FeaturesError, match="--resume goes on"):
        jaxvit.features(model, photographs, out=out, **words)
    seen = []
    monkeypatch.setattr(writer, "append", lambda self, arrays: (seen.append(self.rows), append(self, arrays)))
    jaxvit.features(model, photographs, out=out, resume=True, **words)
    assert seen[0] >= 4, "it began anew"
    assert digests(out) == digests(whole)
    seen.clear()
    assert jaxvit.features(model, photographs, out=out, resume=True, **words).names == NAMES
    assert not seen and sorted(path.name for path in tmp_path.iterdir()) == [out.name, whole.name]


def digests(place):
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return {
        "" if path == place else path.relative_to(place).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_a_killed_command_goes_on(model, photographs, tmp_path):
    """Kill -9, in a process of its own."""
    jaxvit.save(model, tmp_path / "model")
    rng = np.random.default_rng(1)
    (tmp_path / "many").mkdir()
    for i in range(150):
        picture(rng, (24, 24)).save(tmp_path / "many" / f"{i}.png")
    words = ["features", tmp_path / "model", tmp_path / "many", "--batch-size", 1, "--take", "cls", "tokens@0"]
    words = [str(word) for word in words]
    assert main([*words, "--out", str(tmp_path / "whole.zarr")]) == 0
    out = tmp_path / "features.zarr"
    command = [sys.executable, "-m", "jaxvit", *words, "--out", str(out)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
    noted = tmp_path / "features.zarr.partial" / "progress.json"
    for _ in range(3000):
        if noted.exists() and json.loads(noted.read_text())["rows"] > 5:
            break
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert main([*words, "--out", str(out), "--resume"]) == 0
    assert digests(out) == digests(tmp_path / "whole.zarr")


def test_what_is_there_is_not_lost(model, photographs, tmp_path):
    out = tmp_path / "features.npz"
    words = dict(batch_size=4, on_error=lambda name, error: None)
    jaxvit.features(model, photographs, out=out, **words)
    with pytest.raises(FeaturesError, match="exists: choose another --out, or give --overwrite"):
        jaxvit.features(model, photographs, out=out, **words)
    for other, what in (({"take": "patch_mean"}, "arrays"), ({"dtype": "float16"}, "dtype"), ({"size": 24}, "images")):
        with pytest.raises(FeaturesError, match=f"features of another {what}"):
            jaxvit.features(model, photographs, out=out, resume=True, **{**words, **other})
    with pytest.raises(FeaturesError, match="features of another model"):
        jaxvit.features(random_model(CONFIG, seed=1), photographs, out=out, resume=True, **words)
    found = jaxvit.features(model, photographs, "patch_mean", out=out, overwrite=True, **words)
    assert list(found) == ["patch_mean"]
    (tmp_path / "mine.zarr").mkdir()
    (tmp_path / "mine.zarr" / "work").write_text("of years")
    with pytest.raises(FeaturesError, match="no file of jaxvit features"):
        jaxvit.read_features(tmp_path / "mine.zarr")
    with pytest.raises(FeaturesError, match="no file of jaxvit features"):
        jaxvit.features(model, photographs, out=tmp_path / "mine.zarr", overwrite=True, **words)
    assert (tmp_path / "mine.zarr" / "work").read_text() == "of years"
    out.write_bytes(out.read_bytes()[:200])
    with pytest.raises(FeaturesError, match="or is damaged"):
        jaxvit.read_features(out)


@pytest.mark.parametrize("suffix", FORMATS)
def test_arrays_stay_on_disk_until_they_are_indexed(suffix, model, photographs, tmp_path):
    paths = [photographs / name for name in NAMES]
    jaxvit.features(model, paths, TAKE, out=tmp_path / f"f{suffix}")
    for array in jaxvit.read_features(tmp_path / f"f{suffix}").values():
        assert not isinstance(array, np.ndarray) or isinstance(array, np.memmap)
        assert np.asarray(array).shape == array.shape and array[2:4].dtype == array.dtype == np.float32


@pytest.mark.skipif(os.name != "posix", reason="locks of folders are those of POSIX")
def test_two_runs_do_not_write_to_one_place(model, photographs, tmp_path):
    from jaxvit.io.checkpoint import claimed

    (tmp_path / "features.npz.partial").mkdir()
    with claimed(tmp_path / "features.npz.partial"), pytest.raises(FeaturesError, match="by another process"):
        jaxvit.features(model, photographs, out=tmp_path / "features.npz", resume=True)


def test_numbers_that_do_not_fit_are_refused(photographs):
    large = random_model(CONFIG)
    large.patch_embed.kernel[...] = large.patch_embed.kernel[...] * 1e6
    paths = [photographs / name for name in NAMES]
    with pytest.raises(FeaturesError, match=r"tokens@0 of .*00.png is not finite in float16: choose a wider dtype"):
        jaxvit.features(large, paths, "tokens@0", dtype="float16")
    assert jaxvit.features(large, paths, "tokens@0")["tokens@0"].dtype == np.float32


def test_types(model, photographs, tmp_path):
    paths = [photographs / name for name in NAMES]
    for dtype, suffix in (("float16", ".zarr"), ("float16", ".parquet"), ("bfloat16", ".safetensors")):
        found = jaxvit.features(model, paths, "cls", dtype=dtype, out=tmp_path / f"{dtype}{suffix}")
        assert found["cls"].dtype == dtype and found["cls"].shape == (9, 32)
    with pytest.raises(ValueError, match="only safetensors files hold bfloat16"):
        jaxvit.features(model, paths, dtype="bfloat16", out=tmp_path / "x.npz")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        jaxvit.features(model, paths, dtype="int8")
    with pytest.raises(ValueError, match="JAX has disabled float64"):
        jaxvit.features(model, paths, dtype="float64")
    with pytest.raises(FeaturesError, match=r"ends in none of .zarr, .npz"):
        jaxvit.features(model, paths, out=tmp_path / "x.h5")
    with pytest.raises(ValueError, match="may be called names"):
        jaxvit.features(model, paths, "names=cls")


def test_images_of_many_shapes(model, photographs):
    paths = [photographs / name for name in NAMES]
    found = jaxvit.features(model, paths, ["cls", "patch_mean"], crop=False, batch_size=3)
    for i in (0, 4, 8):
        alone = read_out(model, jaxvit.prepare(paths[i], CONFIG, crop=False), "patch_mean")["patch_mean"]
        np.testing.assert_allclose(found["patch_mean"][i], alone[0], atol=2e-5)
    assert found.names == [str(path) for path in paths]
    with pytest.raises(FeaturesError, match=r"gives patches of \[\d+, 32\], and the images before it .* size="):
        jaxvit.features(model, paths, "patches", crop=False)


def test_nothing_to_read(model, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken.png is not an image"):
        jaxvit.features(model, tmp_path)
    with pytest.raises(ImageError, match=r"none of the images of .* can be used; the first: .*broken.png"):
        jaxvit.features(model, tmp_path, on_error=lambda name, error: None)
    with pytest.raises(ImageError, match="there are none"):
        jaxvit.features(model, [])


# Where images come from -----------------------------------------------------------------------------------------------


def names_and_labels(images, first=0):
    return [(item.name, item.label) for item in images.start(first)]


def test_folders_and_lists(photographs, tmp_path):
    plain = image_sets.open_images(photographs)
    assert names_and_labels(plain, 9) == [("c/05.png", None), ("c/08.png", None)] and plain.length == 11
    labelled = image_sets.open_images(photographs, labelled=True)
    assert labelled.classes == ("a", "b", "c") and names_and_labels(labelled)[4] == ("b/01.png", 1)
    assert labelled.identity != plain.identity
    (photographs / "list.txt").write_text("a/00.png\n\nb/01.png\n")
    listed = image_sets.open_images(photographs / "list.txt")
    assert [item.source for item in listed.start(1)] == [photographs / "b/01.png"]
    (photographs / "list.txt").unlink()
    (tmp_path / "loose.png").write_bytes((photographs / "a/00.png").read_bytes())
    assert names_and_labels(image_sets.open_images(tmp_path / "loose.png")) == [(str(tmp_path / "loose.png"), None)]
    for place, more, reason in (
        (tmp_path, {"labelled": True}, "lies in no subfolder"),
        (tmp_path / "gone", {}, "is not there: expected a folder, a list"),
        (tmp_path / "loose.png", {"labelled": True}, "no folder"),
    ):
        with pytest.raises(ImageError, match=reason):
            image_sets.open_images(place, **more)


def shard(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_shards(model, photographs, tmp_path):
    """Samples are files of one name up to its first dot; labels are in .cls."""
    images = {name: (photographs / name).read_bytes() for name in NAMES}
    shard(tmp_path / "s-00.tar", {"x/1.png": images[NAMES[0]], "x/1.cls": b"7\n", "x/2.json": b"{}"})
    shard(tmp_path / "s-01.tar", {"y.cls": b"3", "y.seg.PNG": images[NAMES[1]], "._y.png": b"", "z.png": b"broken"})
    expected = [("s-00.tar/x/1.png", 7), ("s-01.tar/y.seg.PNG", 3), ("s-01.tar/z.png", None)]
    for spec in ("s-*.tar", "s-{00..01}.tar"):
        found = image_sets.open_images(str(tmp_path / spec))
        assert names_and_labels(found) == expected and names_and_labels(found, 2) == expected[2:]
    left = []
    read = jaxvit.features(model, str(tmp_path / "s-*.tar"), on_error=lambda name, error: left.append(name))
    assert (
        read.names == [name for name, _ in expected[:2]] and read.labels.tolist() == [7, 3] and left == [expected[2][0]]
    )
    alone = read_out(model, jaxvit.prepare([photographs / n for n in NAMES[:2]], CONFIG), "cls")["cls"]
    np.testing.assert_allclose(read["cls"], alone, atol=2e-5)
    shard(tmp_path / "two.tar", {"x.png": images[NAMES[0]], "x.mask.png": images[NAMES[1]]})
    shard(tmp_path / "none.tar", {"x.json": b"{}"})
    (tmp_path / "torn.tar").write_bytes((tmp_path / "two.tar").read_bytes()[:700])
    for name, reason in (
        ("two.tar", "x.png and x.mask.png are two images of one sample"),
        ("none.tar", "holds no image"),
        ("torn.tar", "cannot be read as a tar file"),
        ("s-{00..02}.tar", "s-02.tar is not there"),
    ):
        with pytest.raises(ImageError, match=reason):
            names_and_labels(image_sets.open_images(str(tmp_path / name)))


def test_samples_without_a_label_keep_their_place(model, photographs, tmp_path):
    png = (photographs / NAMES[0]).read_bytes()
    shard(tmp_path / "s.tar", {"a.png": png, "b.png": png, "b.cls": b"cat", "c.png": png})
    found = jaxvit.features(model, str(tmp_path / "s.tar"), out=tmp_path / "f.zarr", batch_size=2)
    assert found.labels.tolist() == ["", "cat", ""]


def test_datasets(model, photographs, tmp_path):
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"image": [str(photographs / name) for name in NAMES[:3]], "label": [1, 0, 1]}
    datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(tmp_path / "saved")
    datasets.Dataset.from_dict(rows, features=kinds).remove_columns("label").save_to_disk(tmp_path / "plain")
    found = jaxvit.features(model, f"datasets:{tmp_path / 'saved'}")
    assert found.labels.tolist() == [1, 0, 1] and found.header["classes"] == ["no", "yes"]
    assert found.names[2].endswith("row 2")
    assert jaxvit.features(model, f"datasets:{tmp_path / 'plain'}").labels is None


def test_images_and_labels_from_python(model, photographs):
    pixels = [np.full((24, 30, 3), 20 * i, np.uint8) for i in range(5)]
    found = jaxvit.features(model, iter(pixels), "cls", labels=iter("abcde"), batch_size=2)
    assert found.names == [f"image {i}" for i in range(5)] and found.labels.tolist() == list("abcde")
    with pytest.raises(ValueError, match="only images with names can be recognised"):
        jaxvit.features(model, pixels, out="features.npz", resume=True)
    for labels, reason in ("abc", "more images than labels"), ("abcdefg", "more labels than images"):
        with pytest.raises(ValueError, match=reason):
            jaxvit.features(model, pixels, labels=labels)
    with pytest.raises(ValueError, match="labels of their own"):
        jaxvit.features(model, photographs, labels=[1])
    with pytest.raises(ValueError, match="multiple of the number of devices"):
        jaxvit.features(model, pixels, batch_size=0)


# Windows --------------------------------------------------------------------------------------------------------------

DENSE = ["patches:grid", "patches@[1,0]:normed", "patch_mean", "resid_mid@1:patches:grid"]


@pytest.mark.parametrize("positions", ["window", "whole"])
def test_one_window_is_the_whole(model, positions):
    images = random_images(6, 2, 20, 28)
    found = jaxvit.read_windows(model, images, DENSE, Windows((20, 40), positions=positions))
    for name, value in read_out(model, images, DENSE).items():
        np.testing.assert_allclose(found[name], value, atol=2e-5)


@pytest.mark.parametrize("overlap", [0, 0.5, 0.8])
def test_windows_equal_the_whole_where_patches_exchange_nothing(overlap):
    """One block whose attention adds nothing; with attention they differ."""
    model = random_model(ViTConfig(**{**TINY, "depth": 1}, registers=1))
    images = random_images(7, 2, 44, 28)
    windows = Windows((16, 20), overlap, "whole")
    assert not np.allclose(*(each["patches"] for each in both(model, images, windows)), atol=1e-3)
    model.blocks.attn.proj.kernel[...] *= 0
    model.blocks.attn.proj.bias[...] *= 0
    whole, found = both(model, images, windows)
    for name in DENSE[:1] + ["patches"]:
        np.testing.assert_allclose(found[name], whole[name], atol=2e-5)
    # Positions of a window of its own are others.
    _, other = both(model, images, Windows((16, 20), overlap))
    assert not np.allclose(other["patches"], whole["patches"], atol=1e-3)


def both(model, images, windows):
    take = ["patches:grid", "patches"]
    return read_out(model, images, take), jaxvit.read_windows(model, images, take, windows)


def test_windows_are_blended_by_hand(model):
    """Two windows side by side that share a column of patches."""
    images = random_images(8, 1, 20, 28)
    windows = Windows(20, 0.5)
    assert windows.places((5, 7), 4) == ((5, 5), [(0, 0), (0, 2)])
    left, right = (
        np.asarray(read_out(model, images[:, :, a:b], "patches:grid")["patches:grid"]) for a, b in ((0, 20), (8, 28))
    )
    ramp = np.minimum(np.arange(1, 6), np.arange(5, 0, -1))
    weights, total = np.outer(ramp, ramp)[None, :, :, None], np.zeros((1, 5, 7, 1))
    blended = np.zeros((1, 5, 7, 32))
    for start, value in (0, left), (2, right):
        blended[:, :, start : start + 5] += weights * value
        total[:, :, start : start + 5] += weights
    found = jaxvit.read_windows(model, images, "patches:grid", windows)["patches:grid"]
    np.testing.assert_allclose(found, blended / total, atol=2e-5)


def test_windows_refuse_what_they_do_not_have(model, photographs):
    images = random_images(9, 1, 20)
    for take in ("cls", "pooled", "tokens@0", "pattern@0:patches"):
        with pytest.raises(ValueError, match="of patches alone"):
            jaxvit.read_windows(model, images, take, Windows(8))
    with pytest.raises(ValueError, match="multiples of the patch"):
        jaxvit.read_windows(model, images, "patches", Windows(10))
    for wrong in (dict(overlap=1.0), dict(positions="learned")):
        with pytest.raises(ValueError, match="expected"):
            Windows(8, **wrong)
    found = jaxvit.features(model, [photographs / NAMES[0]], "patches", size=40, windows=Windows(20))
    expected = jaxvit.read_windows(model, jaxvit.prepare(photographs / NAMES[0], CONFIG, 40), "patches", Windows(20))
    np.testing.assert_allclose(found["patches"], expected["patches"], atol=2e-5)
    assert found.header["images"]["windows"] == {"size": 20, "overlap": 0.5, "positions": "window"}


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command(model, photographs, tmp_path, capsys, monkeypatch):
    jaxvit.save(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    words = ["features", "model", str(photographs)]
    assert main([*words, "--take", "cls", "patches@-1:normed:grid", "--labelled", "--batch-size", "4"]) == 0
    told, err = capsys.readouterr()
    assert "cls: float32[9, 32]" in told and "patches@-1:normed:grid: float32[9, 5, 5, 32]" in told
    assert "wrote features.zarr: 9 images; 2 left out" in told and err.count("left out: ") == 2
    found = jaxvit.read_features("features.zarr")
    assert found.header["model"]["source"] == {} and found.labels is not None
    for more, reason in (
        ([], "--overwrite"),
        (["--take", "clss", "--overwrite"], "there is no 'clss'"),
        (["--devices", "99", "--overwrite"], "--devices 99: expected a number from 1 to"),
        (["--out", "x.h5"], "ends in none of"),
        (["--window", "18", "--take", "patches", "--overwrite"], "multiples of the patch"),
    ):
        assert main([*words, *more]) == 1
        assert reason in (err := capsys.readouterr().err) and err.startswith("error: ") and err.count("\n") == 1
    assert main(["features", "model", "gone"]) == 1 and "gone is not there" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*words, "--out", "file/features.npz"]) == 1
    assert (err := capsys.readouterr().err).startswith("error: Not a directory: ") and "--resume" not in err
    more = ["--window", "12x16", "--overlap", "0.25", "--take", "patches", "--size", "24", "--out", "dense.npz"]
    assert main([*words, *more]) == 0 and jaxvit.read_features("dense.npz")["patches"].shape == (9, 36, 32)


def test_a_full_disk_is_one_sentence_and_loses_nothing(model, photographs, tmp_path):
    """The system refuses to write more than so many kilobytes to one file."""
    jaxvit.save(model, tmp_path / "model")
    command = [sys.executable, "-m", "jaxvit", "features", tmp_path / "model", photographs, "--batch-size", "1"]
    command = [str(word) for word in [*command, "--take", "tokens@all", "--out", tmp_path / "f.npz"]]
    limited = ["bash", "-c", 'ulimit -f 60; exec "$@"', "bash", *command]
    root, plain = Path(__file__).parents[1], {k: v for k, v in os.environ.items() if "CACHE" not in k}
    done = subprocess.run(limited, cwd=root, capture_output=True, text=True, env=plain)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: File too large") and line.endswith("--resume goes on"), line
    assert main([*command[3:], "--resume"]) == 0
    found = jaxvit.read_features(tmp_path / "f.npz")
    assert found["tokens@all"].shape == (9, 3, 28, 32) and found.names == NAMES


def test_packages_that_are_missing_are_named(model, photographs, tmp_path, monkeypatch):
    for package, suffix in (("zarr", ".zarr"), ("pyarrow", ".parquet")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(FeaturesError, match=rf"needs {package}: pip install 'jaxvit\[features\]'"):
            jaxvit.features(model, photographs, out=tmp_path / f"f{suffix}")
    assert (
        not list(tmp_path.iterdir())
        and issubclass(FeaturesError, ValueError)
        and issubclass(CheckpointError, ValueError)
    )


def test_every_word_of_the_grammar_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["features", "--help"])
    told = capsys.readouterr().out
    for word in (*readouts.GROUPS, "patch_mean", *readouts.WHOLE, ":normed", ":mean", ":grid", ":head="):
        assert word in told
