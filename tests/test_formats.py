"""Folders of every format load, and compute what they computed when they were written: see tests/data/README.md."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_model
from safetensors.numpy import load_file, save_file

import convert
import jaxvit
from jaxvit import CheckpointError, Preprocess, Provenance, ViTConfig
from jaxvit.io import checkpoint
from jaxvit.io.checkpoint import FORMAT, SafetensorsFile, checksum
from jaxvit.model.params import to_params

DATA = Path(__file__).parent / "data"
FORMATS = (2, 3)
CONFIG = ViTConfig(
    depth=2,
    width=8,
    heads=2,
    hidden=12,
    patch=4,
    grid=(3, 3),
    registers=2,
    classes=3,
    preprocess=Preprocess(resize=16, crop=12),
)
"""Small, and with registers, LayerScale, biases, and a head. The images have another grid than the positions."""


def write(folder: Path = DATA) -> None:
    """Writes `format-N/` and `format-N.npz` for the present format N.

    Use it once for each format, before that is released; from then on the files stay. From the root of the checkout:

        PYTHONPATH=.:tests python -c "import test_formats; test_formats.write()"
    """
    model = random_model(CONFIG)
    jaxvit.save(model, folder / f"format-{FORMAT}", Provenance({"kind": "random", "seed": 0}), overwrite=True)
    images = np.random.default_rng(1).normal(size=(2, 12, 16, 3)).astype(np.float32)
    cls, patches = computed(model, images)
    np.savez_compressed(folder / f"format-{FORMAT}.npz", images=images, cls=cls, patches=patches)


def computed(model, images):
    """[CLS] and patches, in float64: then nothing but rounding errors of 1e-15 depends on the machine."""
    with jax.enable_x64(True):
        out = jaxvit.cast(model, "float64")(jnp.asarray(images))
        return np.asarray(out.cls), np.asarray(out.patches)


@pytest.fixture
def copy(tmp_path):
    return lambda number: Path(shutil.copytree(DATA / f"format-{number}", tmp_path / f"format-{number}"))


def change(folder, **fields):
    """config.json with other fields of the config."""
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["config"] |= fields
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("number", FORMATS)
def test_a_folder_loads_and_computes_what_it_did(number):
    stored = np.load(DATA / f"format-{number}.npz")
    model, provenance = jaxvit.load(DATA / f"format-{number}", described=True)
    assert model.config == CONFIG
    assert provenance == jaxvit.describe(DATA / f"format-{number}")
    assert provenance.source == {"kind": "random", "seed": 0} and not provenance.modified
    assert provenance.weights == checksum(model) and provenance.config is not None
    for name, array in zip(("cls", "patches"), computed(model, stored["images"]), strict=True):
        np.testing.assert_allclose(array, stored[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("number", FORMATS)
def test_a_folder_saved_anew_is_of_the_present_format_and_is_not_modified(number, tmp_path):
    model, provenance = convert.load_described(DATA / f"format-{number}")
    again, told = jaxvit.load(jaxvit.save(model, tmp_path / "again", provenance), described=True)
    assert told == provenance and not told.modified
    content = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    assert (content["format"], content["readable from"]) == (FORMAT, checkpoint.READABLE_FROM)
    for name, array in to_params(again).items():
        np.testing.assert_array_equal(array, to_params(model)[name], err_msg=name)


def test_every_format_is_tested():
    assert sorted(path.name for path in DATA.glob("format-*/")) == [f"format-{number}" for number in FORMATS]
    assert FORMATS[-1] == FORMAT


def test_the_newest_folder_has_the_tensors_that_are_written_today(tmp_path):
    """If not, what is written today is another format."""
    write(tmp_path)
    files = [SafetensorsFile(place / f"format-{FORMAT}" / "model.safetensors") for place in (DATA, tmp_path)]
    assert files[0].entries == files[1].entries
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"format-{FORMAT}", f"format-{FORMAT}.npz"]


def reshape_qkv(folder):
    arrays = load_file(folder / "model.safetensors")
    arrays["blocks.attn.qkv.kernel"] = arrays["blocks.attn.qkv.kernel"].reshape(2, 3, 8, 8)
    save_file(arrays, folder / "model.safetensors")


def test_tensors_have_just_the_axes_of_their_format(copy):
    shapes = {2: "[2, 8, 24]", 3: "[2, 8, 3, 2, 4]"}
    for number, shape in shapes.items():
        assert load_file(DATA / f"format-{number}" / "model.safetensors")["blocks.attn.qkv.kernel"].shape == tuple(
            json.loads(shape)
        )
        folder = copy(number)
        reshape_qkv(folder)
        expected = re.escape(f"blocks.attn.qkv.kernel has shape [2, 3, 8, 8], expected {shape}")
        with pytest.raises(CheckpointError, match=expected):
            jaxvit.load(folder)


def test_the_projection_of_a_clip_was_a_classifier_without_a_bias_in_format_2(copy):
    folder = copy(2)
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    content["config"]["head_bias"] = False
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    arrays = load_file(folder / "model.safetensors")
    del arrays["head.linear.bias"]
    save_file(arrays, folder / "model.safetensors")
    config = jaxvit.load(folder).config
    assert (config.classes, config.projection) == (0, CONFIG.classes)


def test_fields_that_a_folder_does_not_have_take_their_defaults(copy):
    folder = copy(3)
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for fields in (content["config"], content["provenance"]["config"]):
        del fields["rope"], fields["qk_norm"]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert jaxvit.load(folder).config == CONFIG
    assert not jaxvit.describe(folder).modified


def newer(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def test_what_a_newer_release_wrote_names_the_release_that_reads_it(copy, monkeypatch):
    monkeypatch.setattr(checkpoint, "own_version", lambda: "0.1.0")
    folder = copy(3)
    change(folder, foo=1)
    newer(folder, **{"readable from": "0.2.0"})
    message = (
        f"{folder / 'config.json'} has the fields 'foo', which jaxvit 0.1.0 does not know: "
        f"it is of format 3, and jaxvit 0.2.0 or newer reads it"
    )
    readers = (jaxvit.load, jaxvit.read_config, jaxvit.describe, convert.load)
    readers += (lambda folder: jaxvit.save(random_model(CONFIG), folder, overwrite=True),)
    for read in readers:
        with pytest.raises(CheckpointError) as caught:
            read(folder)
        assert str(caught.value) == message
    newer(folder, format=4, **{"readable from": "0.10"})
    with pytest.raises(
        CheckpointError, match=r"is of format 4, which jaxvit 0.1.0 does not know: jaxvit 0.10 or newer reads it$"
    ):
        jaxvit.load(folder)


def test_fields_of_no_release(copy):
    folder = copy(3)
    change(folder, preprocess={"blur": 1})
    with pytest.raises(
        CheckpointError, match=r"the fields 'preprocess.blur', which .*: it is of format 3, which has no"
    ):
        jaxvit.load(folder)
    newer(folder, format=4)
    with pytest.raises(CheckpointError, match=r"of format 4, which jaxvit .* does not know: it reads formats 2 and 3$"):
        jaxvit.load(folder)


def test_a_folder_of_other_software_may_name_a_format(tmp_path):
    (tmp_path / "config.json").write_text('{"format": 7, "model_type": "dinov2"}')
    with pytest.raises(convert.ConversionError, match="holds none of"):
        convert.load(tmp_path)


def test_a_config_is_text_in_utf_8(tmp_path):
    folder = jaxvit.save(random_model(CONFIG), tmp_path / "model", Provenance({"kind": "file", "path": "größe.pth"}))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")), ensure_ascii=False), encoding="utf-8")
    assert "größe".encode() in path.read_bytes()
    assert jaxvit.describe(folder).source["path"] == "größe.pth"
