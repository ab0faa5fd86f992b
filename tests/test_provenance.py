"""Provenance: it speaks of the weights that were loaded, says what became of them, and is no part of a model."""

import copy
import hashlib
import json
import pickle
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import FAMILIES, TINY, random_model
from layouts import hub_state, numbers, tiny, write_safetensors

import convert
import jaxvit
from jaxvit import Preprocess, Provenance, ViTConfig
from jaxvit.io.checkpoint import checksum
from jaxvit.io.provenance import without_preparation
from jaxvit.model.params import from_params, to_params

SOURCE = {"kind": "file", "path": "some.pth", "sha256": {"some.pth": "0" * 64}}


@pytest.fixture(scope="module")
def tiny_model():
    return random_model(FAMILIES["dinov2 with registers"])


@pytest.fixture
def proven(tiny_model, tmp_path):
    """A folder with a certificate of parity."""
    folder = jaxvit.save(tiny_model, tmp_path / "proven", Provenance(SOURCE, assumptions=("heads: 4",)))
    parity = {
        "passed": True,
        "original": "timm 1.0 VisionTransformer",
        "sha256": {"model.safetensors": checksum(tiny_model)},
        "config": without_preparation(tiny_model.config),
        "sha256 of the original": {},
        "versions": {"torch": "2.9"},
        "sizes": {"20x20": {"worst float64": 1e-15, "worst float32 ratio": 1.0}},
    }
    (folder / "parity.json").write_text(json.dumps(parity))
    return folder


def sha256sum(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_checksum_of_a_model_is_that_of_its_file(model, dtype, tmp_path):
    model = jaxvit.cast(model, dtype)
    folder = jaxvit.save(model, tmp_path / "model")
    provenance = jaxvit.describe(folder)
    assert checksum(model) == provenance.weights == sha256sum(folder / "model.safetensors")
    assert (provenance.dtype, provenance.config, provenance.modified) == (dtype, model.config, False)


def test_all_that_is_known_is_told(proven):
    provenance = jaxvit.describe(proven)
    assert str(provenance).splitlines() == [
        "source: file some.pth",
        f"  some.pth: sha256 {'0' * 64}",
        f"  gave float32 weights of sha256 {sha256sum(proven / 'model.safetensors')}",
        "assumed: heads: 4",
        "parity: equal within the limits, compared with timm 1.0 VisionTransformer",
        "  20x20 px: float64 error 1.0e-15, float32 error 1.00 times the original's own",
        f"  model.safetensors: sha256 {provenance.weights}",
        "  with torch 2.9",
    ]
    assert str(Provenance()).startswith("source: not known\nparity: not verified")


def test_the_same_weights_keep_their_provenance_and_their_certificate(proven, tmp_path):
    model, provenance = jaxvit.load(proven, described=True)
    assert provenance == jaxvit.describe(proven) and provenance.parity is not None
    other_preparation = replace(model.config, preprocess=Preprocess(resize=40, crop=20))
    for name, same in {"same": model, "prepared": from_params(other_preparation, to_params(model))}.items():
        folder = jaxvit.save(same, tmp_path / name, provenance)
        assert jaxvit.describe(folder) == provenance
        assert json.loads((folder / "parity.json").read_text()) == provenance.parity
    content = json.loads((folder / "config.json").read_text())
    assert content["provenance"]["modified"] == []


def test_a_model_trained_here_may_have_a_provenance(tiny_model, tmp_path):
    jaxvit.save(tiny_model, tmp_path / "model", Provenance({"kind": "trained", "steps": 3}))
    provenance = jaxvit.describe(tmp_path / "model")
    assert provenance.source == {"kind": "trained", "steps": 3} and not provenance.modified


WEIGHTS = "the weights are not the ones this source gave"
CONFIG = "the config is not the one this source gave"


def with_config(**changes):
    return lambda model: from_params(replace(model.config, **changes), to_params(model))


@pytest.mark.parametrize(
    ("change", "changes"),
    [
        (lambda model: jax.tree.map(lambda a: a * 0, model), [WEIGHTS]),
        (
            lambda model: jax.jit(lambda a, b: jax.tree.map(lambda a, b: b, a, b))(
                model, random_model(model.config, 1)
            ),
            [WEIGHTS],
        ),
        (lambda model: jaxvit.cast(model, "bfloat16"), [f"{WEIGHTS}: they are bfloat16, those were float32"]),
        (lambda model: jaxvit.add_registers(model), [WEIGHTS, f"{CONFIG}: registers 4, was 3"]),
        (with_config(eps=1e-5), [f"{CONFIG}: eps 1e-05, was 1e-06"]),
        (
            with_config(resampling="bicubic", mlp="gelu_tanh"),
            [f"{CONFIG}: mlp gelu_tanh, was gelu, resampling bicubic, was bicubic_antialias"],
        ),
    ],
    ids=["zero", "others", "cast", "registers", "eps", "resampling"],
)
def test_a_modified_model_says_so_and_proves_nothing(proven, tmp_path, change, changes):
    model, provenance = jaxvit.load(proven, described=True)
    folder = jaxvit.save(change(model), tmp_path / "changed", provenance)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["provenance"]["modified"] == changes
    told = jaxvit.describe(folder)
    assert told.modified and told.changes == tuple(changes) and told.parity is None
    assert (told.source, told.weights, told.config) == (provenance.source, provenance.weights, provenance.config)
    assert f"\nmodified since: {'; '.join(changes)}\nparity: not verified" in str(told)
    # Saved once more, it is still modified; with the weights of the source, it is not.
    again, once_more = jaxvit.load(folder, described=True)
    assert jaxvit.describe(jaxvit.save(again, tmp_path / "again", once_more)) == told
    assert not jaxvit.describe(jaxvit.save(model, tmp_path / "restored", once_more)).modified


def test_a_file_that_was_swapped_is_not_the_one_that_is_described(proven, tmp_path):
    other = jaxvit.save(random_model(FAMILIES["dinov2 with registers"], 1), tmp_path / "other")
    (proven / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    told = jaxvit.describe(proven)
    assert told.changes == ("model.safetensors is not the file that was saved here", WEIGHTS) and told.parity is None
    _, loaded = jaxvit.load(proven, described=True)
    assert loaded == told


def test_a_modified_folder_whose_file_was_swapped(proven, tmp_path):
    model, provenance = jaxvit.load(proven, described=True)
    folder = jaxvit.save(jaxvit.cast(model, "bfloat16"), tmp_path / "half", provenance)
    jaxvit.save(jaxvit.cast(random_model(model.config, 1), "bfloat16"), tmp_path / "other")
    (folder / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    assert "model.safetensors is not the file that was saved here" in jaxvit.describe(folder).changes


def test_a_config_that_was_edited_is_not_the_one_that_is_described(proven):
    path = proven / "config.json"
    content = json.loads(path.read_text())
    content["config"]["eps"] = 1e-5
    path.write_text(json.dumps(content))
    told = jaxvit.describe(proven)
    assert told.changes == (f"{CONFIG}: eps 1e-05, was 1e-06",) and told.parity is None


def test_a_modified_model_can_be_verified(proven, tmp_path):
    """A certificate names its weights and its config: it holds for these, wherever they come from."""
    model, provenance = jaxvit.load(proven, described=True)
    changed = with_config(resampling="bicubic")(model)
    folder = jaxvit.save(changed, tmp_path / "changed", provenance)
    parity = provenance.parity | {"config": json.loads(json.dumps(without_preparation(changed.config)))}
    (folder / "parity.json").write_text(json.dumps(parity))
    told = jaxvit.describe(folder)
    assert told.modified and told.parity == parity
    assert jaxvit.describe(jaxvit.save(changed, tmp_path / "again", told)) == told


def test_certificates_without_a_config(proven):
    path = proven / "parity.json"
    parity = json.loads(path.read_text())
    del parity["config"]
    path.write_text(json.dumps(parity))
    assert jaxvit.describe(proven).parity == parity


def test_certificates_that_make_no_sense(proven):
    path = proven / "parity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": {"depth": 3}}))
    with pytest.raises(jaxvit.CheckpointError, match=r"parity.json is not a certificate of parity: .*missing names"):
        jaxvit.describe(proven)


def test_loading_without_a_description_hashes_nothing(proven, monkeypatch):
    monkeypatch.setattr("jaxvit.io.checkpoint.hashlib", None)
    jaxvit.load(proven)
    convert.load(proven)
    state = hub_state(tiny(), numbers(tiny()))
    convert.load(state)
    with pytest.raises(AttributeError):
        convert.load_described(state)


# --- of what convert loads


def test_provenance_of_a_file(tmp_path):
    path = write_safetensors(tmp_path / "some.safetensors", hub_state(tiny(), numbers(tiny())))
    model, provenance = convert.load_described(path)
    assert provenance.weights == checksum(model) and provenance.config == replace(model.config, preprocess=Preprocess())
    assert provenance.source["versions"] == convert.versions("jaxvit", "jax", "flax")
    folder = tmp_path / "model"
    convert.convert_to_folder(path, folder)
    assert jaxvit.describe(folder) == provenance
    assert provenance == convert.load_described(folder)[1]


def test_options_that_change_a_converted_model_are_modifications(tmp_path):
    convert.convert_to_folder(hub_state(tiny(), numbers(tiny())), tmp_path / "model")
    _, provenance = convert.load_described(tmp_path / "model", dtype="bfloat16", resampling="bicubic")
    assert provenance.source["layout"] == "dinov2/hub"
    assert provenance.changes == (
        f"{WEIGHTS}: they are bfloat16, those were float32",
        f"{CONFIG}: resampling bicubic, was {convert.load(tmp_path / 'model').config.resampling}",
    )


def test_a_live_module_is_named_with_its_library():
    timm = pytest.importorskip("timm")
    sizes = dict(embed_dim=64, depth=1, num_heads=1, img_size=28, patch_size=14, num_classes=0)
    module = timm.models.vision_transformer.VisionTransformer(**sizes)
    model, provenance = convert.load_described(module)
    name = "timm.models.vision_transformer.VisionTransformer"
    assert f"source: module {name} of timm {timm.__version__}, in the layout timm" in str(provenance)
    assert provenance.weights == checksum(model)


# --- and of what a model is


def test_models_know_nothing_of_it(proven, tiny_model):
    """Models of one config share a structure, and so their programs, wherever their weights come from."""
    loaded = jaxvit.load(proven)
    assert jax.tree.structure(loaded) == jax.tree.structure(tiny_model)
    assert "some.pth" not in str(jax.tree.structure(loaded))


def test_it_is_a_value(proven):
    provenance = jaxvit.describe(proven)
    assert copy.deepcopy(provenance) == pickle.loads(pickle.dumps(provenance)) == provenance
    assert Provenance.from_dict(json.loads(json.dumps(provenance.to_dict())), provenance.parity) == provenance


def test_a_model_prints_as_one_line():
    config = ViTConfig(**TINY, registers=3)
    model = random_model(config)
    count = sum(np.size(leaf) for leaf in jax.tree.leaves(model))
    assert repr(model) == str(model) == f"ViT({config.in_words()}: {count:,} parameters of float32)"
    assert repr(jax.eval_shape(lambda: jaxvit.cast(model, "bfloat16"))).endswith("parameters of bfloat16)")
    printed = []
    jax.jit(lambda model: printed.append(repr(model)))(model)
    assert printed == [repr(model)]
