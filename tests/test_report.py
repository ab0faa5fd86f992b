"""The report: one well-formed file that needs nothing else, whose numbers are the results'."""

import base64
import copy
import dataclasses
import io
import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_model
from PIL import Image

from experiments import last_layer
from experiments.last_layer import Example
from experiments.report import COLOURS, header, mass, smoothed, verdict, write_report
from jaxvit import ViT, ViTConfig
from jaxvit.config import Preprocess

SECTIONS = ["maps", "mass", "cosine", "norms", "depth", "cka", "made"]
VOID = {"meta", "img", "br", "hr", "link", "input"}


def quick_model(config: ViTConfig) -> ViT:
    """A random model without compiling its initialisation, which takes seconds."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(partial(random_model, config))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.1, 0.2, leaf.shape), leaf.dtype), shapes)


def analysed(folder: Path, count: int = 6, registers: int = 0) -> tuple[dict, list[Example]]:
    """Results as the command line completes them, and examples, of a random model and images of noise."""
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 24, 24, 3), dtype=np.uint8)
    for i in range(count):
        Image.fromarray(pixels[i]).save(folder / f"image-{i}.png")
    preprocess = Preprocess(resize=20, crop=20)
    config = ViTConfig(**TINY | {"depth": 2}, registers=registers, preprocess=preprocess)
    sources = sorted(folder.glob("*.png"))
    results, examples = last_layer.analyse(quick_model(config), sources, batch_size=4, show={0, 1})
    results["images"]["folder"] = str(folder)
    model = {"name": "tiny", "source": {"kind": "random"}, "parameters": 1234, "config": dataclasses.asdict(config)}
    results |= {"command": "python -m experiments last-layer", "model": model, "versions": {"jax": "1.2.3"}}
    return results | {"device": "cpu", "seconds": {"loading": 0.1}}, examples


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return analysed(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def with_registers(tmp_path_factory):
    return analysed(tmp_path_factory.mktemp("registers"), registers=3)


@pytest.fixture(scope="module", params=["plain", "with_registers"])
def analysis(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def written(analysis, tmp_path_factory):
    return report(tmp_path_factory.mktemp("report"), *analysis)


class Page(HTMLParser):
    """A page's elements, in order; raises where they do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.stack, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if not self.stack or self.stack[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\N{MINUS SIGN}", "-").split())


def report(folder: Path, results: dict, examples: list[Example]) -> tuple[str, Page]:
    write_report(folder / "report.html", results, examples)
    html = (folder / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


def test_every_section_is_there(written):
    _, page = written
    assert [attributes["id"] for tag, attributes in page.elements if tag == "section"] == SECTIONS
    assert sum(tag == "svg" for tag, _ in page.elements) == 9
    assert sum(attributes.get("class") == "example" for _, attributes in page.elements) == 2
    assert all(attributes.get("aria-label") for tag, attributes in page.elements if tag == "svg")


def test_nothing_is_fetched(written):
    html, page = written
    assert "http:" not in html and "https:" not in html and "@import" not in html
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    links = [attributes[key] for _, attributes in page.elements for key in ("src", "href") if key in attributes]
    assert {link for link in links if not link.startswith(("data:image/", "#"))} == {"results.json", "per_image.csv"}
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_ids_are_unique_and_references_resolve(written):
    html, page = written
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', html)) <= set(ids)


def test_numbers_are_those_of_the_results(analysis, written):
    (results, examples), (_, page) = analysis, written
    a1, a5, a7, a9 = results["A1"]["mass"], results["A5"]["cosine with the update"], results["A7"], results["A9"]
    thousandths = [value["mean"] for value in (*a1.values(), *a5.values(), *a7["share"].values())]
    thousandths += [a7["skip over patches"]["mean"], results["A8"]["raw"][-2]["mean"]]
    thousandths += [results["A8"]["after the final norm"][-2]["mean"]]
    thousandths += [value[key] for value in a9.values() for key in ("biased", "unbiased", "null")]
    thousandths += [float(example.scalars["cosine patches"]) for example in examples]
    expected = {f"{value:.3f}" for value in thousandths}
    expected |= {f"{a7['norm'][name]['mean']:.2f}" for name in a7["share"]}
    expected |= {f"{100 * float(example.scalars['mass patches']):.1f}" for example in examples}
    expected |= {f"{100 * example.maps['attention'].max():.2f}" for example in examples}
    expected |= {results["images"]["sha256 of the prepared pixels"], "1,234", "1.2.3", "n = 6, d₁ = 32, d₂ = 32"}
    missing = {text for text in expected if text not in page.text}
    assert missing <= {"-0.000"}
    assert ("registers" in a1) == ("(registers + patches)" in page.text)


def test_registers_over_registers_and_patches(with_registers):
    a1 = with_registers[0]["A1"]["mass"]
    ratio = np.divide(a1["registers"]["sample"], np.add(a1["registers"]["sample"], a1["patches"]["sample"]))
    assert f"figure, {ratio.mean():.3f} on average" in mass(with_registers[0])["mass_registers"]


def test_same_input_same_bytes(analysis, written, tmp_path):
    assert report(tmp_path, *copy.deepcopy(analysis))[0] == written[0]


def test_names_are_escaped(plain, tmp_path):
    results, examples = copy.deepcopy(plain)
    nasty = '<script>alert("1")</script>&\'$x${y}'
    results["model"]["name"] = results["command"] = results["device"] = nasty
    results["images"]["skipped"] = [{"image": nasty, "error": nasty}, {"image": "b.png", "error": "truncated"}]
    html, page = report(tmp_path, results, [example._replace(name=nasty) for example in examples])
    assert "<script" not in html
    assert (
        page.text.count(nasty) == 2 + 3 + 2 + 2
    )  # title, heading; table of the model, command, device; skipped; captions
    assert "2 of 8 images could not be used" in page.text and "truncated" in page.text


@pytest.mark.parametrize("count", [1, 3])
def test_few_images(count, tmp_path):
    _, page = report(tmp_path, *analysed(tmp_path / "images", count=count))
    assert "undefined" in page.text and "nan" not in page.text
    assert ("1 image ·" in page.text) == (count == 1)


def test_one_block(with_registers, tmp_path):
    results, examples = copy.deepcopy(with_registers)
    results["A8"] = {name: layers[-1:] for name, layers in results["A8"].items()}
    results["model"]["config"]["depth"] = 1
    assert "There is no block before the last." in report(tmp_path, results, examples)[1].text


def test_no_examples_and_many(plain, tmp_path):
    results, examples = plain
    assert "No image was chosen" in report(tmp_path, results, [])[1].text
    _, page = report(tmp_path, results, examples[:1] * 60)
    assert sum(attributes.get("class") == "example" for _, attributes in page.elements) == 60


def test_maps_that_are_not_square_cover_the_photograph(plain, tmp_path):
    results, examples = plain
    attention = np.zeros((2, 4), np.float32)
    attention[0, 3] = 0.5  # top right
    maps = {"attention": attention, "contribution": -attention}
    example = examples[0]._replace(pixels=np.zeros((400, 800, 3), np.uint8), maps=maps)
    html, _ = report(tmp_path, results, [example])
    found = re.findall(r"data:image/\w+;base64,([^\"]+)", html)
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]
    assert {picture.size for picture in pictures} == {(288, 144)}
    over, contribution = (np.asarray(picture.convert("RGBA")).astype(int) for picture in pictures[2:])
    assert over[0, -1, 3] == over[..., 3].max() > 200 and over[-1, 0, 3] == 0
    centre = contribution[-1, 0, :3]
    assert centre.min() > 230  # 0 is the pale middle of the scale
    assert contribution[0, -1, 0] > contribution[0, -1, 2]  # negative is brown


def test_a_thinned_sample_is_told(plain):
    results = copy.deepcopy(plain[0])
    results["A1"]["mass"]["patches"]["sampled_every"] = 4
    assert header(results)["sampled"] == "6 images (dots, densities and quantiles: one in 4; means: all)"


def test_verdict_needs_a_margin(plain):
    results = copy.deepcopy(plain[0])
    norm, a9 = results["A7"]["norm"], results["A9"]
    cases = {(0.9, 2): "both", (0.9, 0.5): "only the first", (0.52, 2): "only the second", (0.1, 0.5): "neither"}
    for (similar, long), shown in cases.items():
        a9["patches"]["unbiased"], a9["skip"]["unbiased"] = 0.5, similar
        norm["patches"]["mean"], norm["skip"]["mean"] = 1.0, long
        assert verdict(results).endswith(f"this run shows <b>{shown}</b>.")
    a9["patches"]["unbiased"] = float("nan")
    assert verdict(results).endswith("this run cannot tell the first, and <b>does not show the second</b>.")


def test_bundled_crops_are_not_called_independent(plain):
    results = copy.deepcopy(plain[0])
    assert "independent" not in header(results)["extent"]
    results["images"]["folder"] = ".data/photographs"
    assert "8 of each of 17 photographs: they are not independent" in header(results)["extent"]


def test_density_stays_between_the_extremes():
    sample = np.random.default_rng(0).normal(size=500)
    x, density = smoothed(sample)
    assert (x[0], x[-1], density.max()) == (sample.min(), sample.max(), 1)
    truth = np.exp(-0.5 * x**2)
    assert np.abs(density - truth).max() < 0.15
    assert all(len(smoothed(np.array(values))[0]) == 0 for values in ([1.0], [1.0, 2.0], [3.0] * 10, [0.0] * 10))


def test_every_source_has_its_own_colour():
    assert len(set(COLOURS.values())) == len(COLOURS) == 6
