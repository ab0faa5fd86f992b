"""What README.md shows works, word for word."""

import functools
import json
import re
import subprocess
import sys
import types
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import scipy.linalg
from conftest import random_images
from matplotlib.figure import Figure
from PIL import Image

import convert
import jaxvit
from experiments import embedded
from jaxvit import cli
from jaxvit.convert.catalogue import known
from jaxvit.experiments.runner.registry import EXPERIMENTS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import docstrings
import figures
import generate

README = (ROOT / "README.md").read_text()


DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(DOCS).as_posix(): path.read_text()
    for folder in (DOCS, DOCS / "guides", DOCS / "experiments")
    for path in sorted(folder.glob("*.md"))
}


def run_examples(page, monkeypatch, tmp_path):
    """What the Python blocks of a page define, run as they stand in an empty folder, but for what is fetched.

    They get three crops of each photograph, of eight.
    """
    pytest.importorskip("onnx")
    data, few = ROOT / embedded.DATA, tmp_path / embedded.DATA / "photographs"
    few.mkdir(parents=True)
    (few.parent / embedded.model_file(data).name).symlink_to(embedded.model_file(data).absolute())
    for photograph in embedded.photographs(data).iterdir():
        (few / photograph.name).mkdir()
        for crop in ("0.png", "1.png", "2.png"):
            (few / photograph.name / crop).symlink_to((photograph / crop).absolute())
    monkeypatch.setattr(embedded, "photographs", lambda: few)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, "page", "exec"), names)
    return names


def test_examples_of_the_readme(monkeypatch, capsys, tmp_path):
    names = run_examples(README, monkeypatch, tmp_path)
    masses, heads = map(eval, capsys.readouterr().out.splitlines())
    assert len(heads) == 5 and all(set(where) == {"layer", "head"} for where, _ in heads)
    assert [cosine for _, cosine in heads] == sorted(cosine for _, cosine in heads)
    assert list(masses) == ["cls", "patches"] and sum(masses.values()) == pytest.approx(1, abs=1e-5)
    effect = names["effect"]
    assert list(effect.axes) == ["layer", "head", "image"] and effect.values.shape == (12, 6, 1)
    # Of every head: the cosine of the [CLS] without it with the clean one, in one run each.
    model, images = names["model"], names["images"]
    clean, run = model(images), jax.jit(lambda model, images, edits: model(images, edits).cls)
    # The gradient of the first channel of [CLS]: along it, the channel rises by its length.
    saliency, step = names["saliency"], 0.03
    length = np.linalg.norm(saliency)
    high, low = (model(images + sign * step * saliency / length).cls[0, 0] for sign in (1, -1))
    assert float(high - low) / (2 * step) == pytest.approx(length, rel=0.02)
    for layer, head in ((0, 0), (6, 5), (11, 2)):
        without = run(model, images, jaxvit.ablate(model, "z", layers=layer, heads=head))
        expected = (without * clean.cls).sum(-1) / np.linalg.norm(without, axis=-1) / np.linalg.norm(clean.cls, axis=-1)
        np.testing.assert_allclose(effect.values[layer, head], expected, atol=1e-5)
    assert effect.values.max() <= 1 + 1e-5 and len(np.unique(effect.values)) == 72
    np.testing.assert_allclose(names["again"].cls, clean.cls, rtol=0, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == [str(embedded.DATA)]  # no file is left


def test_examples_of_interventions(monkeypatch, tmp_path):
    figures, save = {}, Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **more: (figures.update({str(path): self}), save(self, path, **more))[1]
    )
    names = run_examples(PAGES["interventions.md"], monkeypatch, tmp_path)
    effect = names["effect"]
    (heat,) = figures["heads.png"].axes[0].images
    np.testing.assert_allclose(np.sort(heat.get_array(), axis=None), np.sort(effect.mean("image").values, axis=None))
    with Image.open(tmp_path / "heads.png") as picture:
        assert picture.format == "PNG"


def test_examples_of_features(monkeypatch, tmp_path):
    found = run_examples(PAGES["features.md"], monkeypatch, tmp_path)["found"]
    assert [found[name].shape for name in found] == [(51, 384), (51, 2, 8, 8, 384)]


def test_examples_of_many_devices(monkeypatch, tmp_path):
    names = run_examples(PAGES["parallel.md"], monkeypatch, tmp_path)
    assert names["effect"].values.shape == (12, 6, 2)
    np.testing.assert_allclose(names["masses"].sum(1), 1, atol=1e-5)
    model, images = names["model"], names["images"]
    np.testing.assert_allclose(names["cls"], model(images[:1]).cls, rtol=0, atol=1e-4)


def test_no_page_has_examples_that_are_not_run():
    """Here, in test_docs.py, and in test_run.py."""
    run = {"features.md", "interventions.md", "which-registers.md", "experiments.md"}
    run |= {"recipes.md", "from-flax-dinov2.md", "parallel.md", "training.md", "start.md"}
    run |= set(GUIDES)
    assert {name for name, page in PAGES.items() if "```python" in page} == run


def test_examples_of_the_start(monkeypatch, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(
        tmp_path / "photo.jpg"
    )
    names = run_examples(PAGES["start.md"], monkeypatch, tmp_path)
    assert names["out"].trace["pattern"].shape == (1, 1, 6, 1, 257)
    assert names["out"].cls.shape == (1, 384) and names["out"].patches.shape == (1, 256, 384)
    assert jaxvit.cls_cosine(names["changed"], names["out"]) < 1 - 1e-4


GUIDES = [name for name, page in PAGES.items() if name.startswith("guides/") and "```python" in page]


@pytest.mark.parametrize("name", GUIDES)
def test_examples_of_guides(name, monkeypatch, tmp_path, capsys):
    """They assert what they say."""
    pytest.importorskip("timm")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        run_examples(PAGES[name], monkeypatch, tmp_path)
    if name.endswith("numbers-differ.md"):
        pixels, model = re.findall(r"^(?:pixels|model) (\S+)$", capsys.readouterr().out, re.MULTILINE)
        assert float(pixels) < 1e-6 and float(model) < 1e-5
    if name.endswith("your-checkpoint.md"):
        assert convert.load("finetuned.pth").config.classes == 10
    if name.endswith("security.md"):
        assert "posix.mkdir, which is not trusted" in capsys.readouterr().out


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_examples_of_training(monkeypatch, tmp_path):
    with jax.numpy_dtype_promotion("standard"):  # for optax's own arithmetic; the tests ask for strict
        names = run_examples(PAGES["training.md"], monkeypatch, tmp_path)
    assert names["losses"][-1] < 0.7 * names["losses"][0]
    before, after = (jaxvit.functional(names[each])[1] for each in ("model", "tuned"))
    same = {name for name in before if (before[name] == after[name]).all()}
    assert same >= {"patch_embed.kernel", "cls", "registers", "norm.scale"} and "head.linear.kernel" not in same
    qkv, fc1 = (
        [(before[f"blocks.{n}.kernel"][l] != after[f"blocks.{n}.kernel"][l]).any() for l in range(4)]
        for n in ("attn.qkv", "mlp.fc1")
    )
    assert all(qkv) and fc1 == [False, False, True, True]


def test_links_lead_somewhere():
    for folder, page in [(ROOT, README), *(((DOCS / name).parent, page) for name, page in PAGES.items())]:
        for link in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", page):
            neighbour = folder.name == "experiments" and link.removesuffix(".md").upper() in EXPERIMENTS  # generated
            assert link.startswith("http") or neighbour or (folder / link).exists(), link


def test_every_public_name_is_listed():
    """On the page of names; and every name there exists."""
    page = "\n".join(line for line in PAGES["names.md"].splitlines() if line.startswith("|"))
    listed = [word for name in re.findall(r"`(.*?)`", page) for word in [name.split("(")[0]]]
    plain = {name for name in listed if "." not in name}
    modules = {"decompose", "grids", "parallel", "similarity"}
    assert plain | modules >= set(jaxvit.__all__), set(jaxvit.__all__) - plain - modules
    assert plain - {"model"} <= set(jaxvit.__all__), plain - set(jaxvit.__all__)
    last = jaxvit.NamedArray
    for name in listed:
        start, _, rest = name.partition(".")
        if rest and start == "model":
            assert hasattr(jaxvit.ViT, rest), name
        elif rest:
            last = import_module(generate.MODULES[start]) if start else last
            assert hasattr(last, rest), name
        elif name == "NamedArray":
            last = jaxvit.NamedArray


def test_every_listed_name_has_a_page_of_the_reference():
    pages = dict(generate.api_pages(PAGES["names.md"]))
    text = "\n".join(pages.values())
    for name in jaxvit.__all__:
        assert isinstance(getattr(jaxvit, name), types.ModuleType) or f":: jaxvit.{name}\n" in text, name
    for module in generate.MODULES.values():
        assert f":: {module}." in text
    names = re.findall(r":: (jaxvit[\w.]+)", text)
    assert len(names) == len(set(names)) > 110
    for name in names:
        assert (generate.resolved(name).__doc__ or "").strip(), f"{name} has no docstring"


def test_the_picture_of_a_block_has_every_site(monkeypatch):
    svg = generate.sites_svg()
    for site, axes in jaxvit.SITES.items():
        assert f">{site}</text>" in svg and f">{axes}</text>" in svg
    monkeypatch.setattr(generate, "SITES", jaxvit.SITES | {"new": "B T D"})
    with pytest.raises(ValueError, match="the sites are"):
        generate.sites_svg()


def test_all_models_are_on_their_page():
    page = generate.models_page()
    for checkpoint in known():
        assert all(f"`{source}`" in page for source in checkpoint.sources)
    assert "| `vit_small_patch14_reg4_dinov2` | 12 x 384 | 6 |" in page and page.count("| refused |") == 10


def test_every_experiment_has_a_page_made_by_its_present_code():
    """Figures, tables and verdicts of pages are older than the code where this fails: `make docs-data`."""
    told = json.loads(figures.TOLD.read_text(encoding="utf-8"))
    assert told["code"] == figures.code()
    assert set(figures.SHOWN) == set(EXPERIMENTS)
    shown = {name for names in figures.SHOWN.values() for name in names}
    assert shown == {path.stem for path in figures.FIGURES.glob("*.png")}
    for id, e in EXPERIMENTS.items():
        written = PAGES[f"experiments/{id.lower()}.md"]
        assert set(re.findall(r"figures/([\w-]+)\.png", written)) <= shown
        assert all(f"--{id.lower()}-{option.name}".replace("_", "-") in written for option in e.options)
        page = generate.experiment_page(e, told, written)
        assert all(claim["text"] in page.replace("\\|", "|") for claim in told["claims"][id])


def test_docstrings_become_restructuredtext():
    """Code after an empty line is code, and no word is taken for markup."""
    text = [
        "Adds |x| to *args_, as `a_ *b*`.",
        "",
        "Example:",
        "",
        "    f(*x)",
        "",
        "    g(x_)",
        "",
        "Args:",
        "  x: one.",
    ]
    assert docstrings.converted(text) == [
        *("Adds \\|x\\| to \\*args\\_, as `a_ *b*`.", "", "Example:", "", "    .. code-block:: python", ""),
        *("        f(*x)", "", "        g(x_)", "", "Args:", "  x: one."),
    ]


def test_every_site_is_described():
    page = PAGES["interventions.md"]
    described = re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`.*?) \| B ", page, re.MULTILINE)))
    assert described == list(jaxvit.SITES)


@pytest.mark.parametrize("target", ["demo", "test"])
def test_targets_exist(target):
    """As make itself finds them, which only says here what it would do."""
    assert f"    make {target} " in README
    told = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0 and ".venv/bin/python -m " in told.stdout, told.stderr


COMMANDS = re.findall(
    r"(?:^    |`)((?:jaxvit (?=[a-zA-Z])|python -m benchmarks(?![.\w]))[^`\n]*)(?:`|$)",
    "\n".join([README, *PAGES.values()]),
    re.MULTILINE,
)
"""As they are written, which words about them may follow, two spaces away."""


def test_commands_exist(capsys):
    """Each command has a parser that knows its options."""
    programs = {"jaxvit": cli.main, "python -m benchmarks": import_module("benchmarks.__main__").main}
    ours = [command.split()[1] for command in COMMANDS if command.startswith("jaxvit")]
    single = {name for name in ours if re.fullmatch(r"[AB]\d", name)}
    assert {*cli.COMMANDS, *cli.CONVERTER, *cli.EXPERIMENTS} == set(ours) - single and single
    assert len(ours) < len(COMMANDS)
    for command in COMMANDS:
        (program,) = [program for program in programs if command.startswith(program)]
        words = re.split(r"  +", command.removeprefix(program).strip())[0].split()
        with pytest.raises(SystemExit) as end:
            programs[program]([*words[:1], "--help"])
        told = capsys.readouterr().out
        assert end.value.code == 0, command
        options = set(re.findall(r"--[a-z-]+", " ".join(words)))
        known = set(re.findall(r"--[a-z-]+", told))
        assert options <= known, (command, options - known)


def test_examples_of_recipes(monkeypatch, tmp_path):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as users have it; optax needs it
        names = run_examples(PAGES["recipes.md"], monkeypatch, tmp_path)
    encoder, images = names["encoder"], names["images"]
    for library in ("nnx", "linen", "equinox"):
        losses = names[f"{library}_losses"]
        assert len(losses) == 5 and losses[-1] < losses[0], library
    cls = encoder(images).cls  # which no step has changed
    np.testing.assert_allclose(encoder(images, outputs="cls").cls, cls, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(names["eqx"].combine(names["trained"], names["frozen"]).encoder.cls[...], encoder.cls)
    assert not np.allclose(names["trained"].head.weight, names["classifier"].head.weight)

    patches = encoder(images).patches
    assert names["alignment_loss"](2 * patches, encoder, images) == pytest.approx(-1, abs=1e-5)

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 6)), 0.5 + rng.normal(size=(40, 6)) * rng.uniform(0.5, 2, 6)
    A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(A @ B).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B - 2 * root)
    assert names["frechet_distance"](a, b) == pytest.approx(expected, rel=1e-9)
    assert names["frechet_distance"](a, a) == pytest.approx(0, abs=1e-9) and names["distance"] > 0

    loss, slope, step = names["loss"], names["slope"], 0.03
    length = np.linalg.norm(slope)
    nearer = names["perceptual_loss"](encoder, images[:1] - step * slope / length, images[1:2])
    assert float(loss - nearer) / step == pytest.approx(length, rel=0.05)
    assert names["perceptual_loss"](encoder, images, images) == 0


def test_what_flax_dinov2_returned_is_where_the_page_says(monkeypatch, tmp_path):
    """Beside transformers' PyTorch model, whose results had the same names."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    page = PAGES["from-flax-dinov2.md"]
    assert run_examples(page, monkeypatch, tmp_path)["last_hidden_state"].shape == (2, 65, 384)

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, patch_size=4, image_size=20)
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**sizes, num_labels=3, attn_implementation="eager")
    original = transformers.Dinov2ForImageClassification(config).eval()
    names = {"model": convert.load(original), "images": random_images(0, 2, 24, 20)}
    with torch.no_grad():
        pixels = torch.tensor(np.asarray(names["images"])).permute(0, 3, 1, 2)
        theirs = original.dinov2(pixels, output_hidden_states=True, output_attentions=True)
        logits = original(pixels).logits
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    body = code[code.index("out = model") :]
    exec("import jax.numpy as jnp\nfrom jaxvit import Take\n" + body, names)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    close(names["last_hidden_state"], theirs.last_hidden_state)
    close(names["pooler_output"], theirs.pooler_output)
    close(names["out"].logits, logits)
    for name in ("hidden_states", "attentions"):
        assert len(names[name]) == len(getattr(theirs, name))
        for ours, each in zip(names[name], getattr(theirs, name), strict=True):
            close(ours, each, err_msg=name)
