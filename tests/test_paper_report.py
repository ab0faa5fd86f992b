"""The report: one well-formed file that needs nothing else, which says of every experiment what was run and found."""

# ruff: noqa: RUF001 (what people read has true minus signs and apostrophes)

import base64
import copy
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import FAMILIES

from experiments.core import charts as draw
from experiments.core.examples import SUMMANDS, Example
from experiments.core.experiment import About, Claim, Experiment, Option, Table, View, summary
from experiments.report.explorer import ATTENTION, CONTRIBUTION, write_explorer
from experiments.report.report import control_in_words, minus, numeric_columns, write_report
from jaxvit import ViTConfig

VOID = {"meta", "img", "br", "hr", "link", "input"}
SHA = "0123abcd" * 8


class Fake(Experiment):
    """An experiment that only tells the numbers it is given: what a report is made of, without a model."""

    controlled = True
    passes = ("clean", "controls")
    options = (
        Option("stage", "layerscale", "where the part is read", ("heads", "layerscale")),
        Option("renormalise", False, "divide by the attention on the part"),
    )

    def __init__(self, id, title, figure="", shown="", captions=(), refused=()):
        self.id, self.title, self.figure, self.shown = id, title, figure, shown
        self.captions, self.refused = captions, refused

    def numbers(self, found, about, options):
        raise AssertionError("the report computes nothing")

    def claims(self, results, models):
        return [
            Claim(1, self.id, "Large models look at registers more", True, "g 0.300 against B 0.100", "DINOv2"),
            Claim(1, self.id, "Large models look at registers more", False, "0.1; gap -0.1", "random weights"),
            Claim(2, self.id, "Patches stop to follow [CLS]", None, "needs a small and a large model", "CLIP"),
        ]

    def table(self, results, models):
        rows = [[models[key].name, draw.number(each["mass"]["mean"])] for key, each in results.items()]
        return Table(("model", "mass on registers"), rows, "mean over images")

    def figures(self, view):
        found = {}
        for i, text in enumerate(self.captions):
            figure, axes = draw.canvas(width=4.2 if i else 6.4)
            names = [draw.short(view.models[key]) for key in view.results]
            draw.violins(axes, [np.linspace(0, 1, 9) ** (i + 1) for _ in names], names, draw.COLOURS["registers"])
            axes.set(title="Attention on registers", ylabel="share")
            found[f"{self.id.lower()} {i}"] = draw.caption(figure, text) if text else figure
        return found


def about(key, config=FAMILIES["dinov2"], **more):
    kind = "trained" if config.registers else "none"
    fields = dict(name=key.upper(), family="DINOv2", size="S", registers_are=kind, weights="trained")
    fields |= dict(parameters=1_234_567, source={"kind": "hub", "path": f"someone/{key}", "sha256": {"a.bin": SHA}})
    sizes = dict(depth=config.depth, width=config.width, heads=config.heads, registers=config.registers)
    return About(key=key, config=config.to_dict(), **sizes, **fields | more)


REGISTERS = FAMILIES["dinov2 with registers"]
MODELS = {
    "plain": about("plain"),
    "reg": about("reg", REGISTERS, size="B"),
    "later": about("later", REGISTERS, registers_are="test-time"),
    "dice": about("dice", REGISTERS, weights="random", registers_are="random", family="random", size="32"),
}
EXPERIMENTS = [
    Fake("B1", "Flow from token to token", captions=("Every layer.", "The last layer.")),
    Fake("A10", "A later one"),
    Fake("A1", "Attention of [CLS]", "figure 2a", "Mass on registers, image by image.", captions=("", "By head.")),
    Fake("sensitivity", "How far numbers depend on choices", captions=("Choices.",)),
]


def made(models=MODELS, experiments=EXPERIMENTS):
    """Results as the session composes them, and figures."""
    rng = np.random.default_rng(0)
    images = {"n": 6, "skipped": [{"image": "bad.png", "error": "truncated"}], "sha256 of the prepared pixels": SHA}
    results = {
        "schema": 1,
        "command": "jaxvit run --models a b",
        "images": {"folder": "/data/photos", "n": 7, "sha256": SHA},
        "labelled": None,
        "request": {"size": None, "batch_size": 16, "control_images": 5},
        "options": {e.id: {"stage": "heads", "renormalise": False} for e in experiments} | {"controls": {"seed": 3}},
        "models": {
            key: each.to_dict()
            | {
                "pixels": 224,
                "patches": [16, 16],
                "images": {**images},
                "other passes": {"controls": images | {"n": 5}},
            }
            | {"not run": {"A1": "the model has no registers"} if key == "plain" else {}}
            for key, each in models.items()
        },
        "experiments": {},
        "claims": [],
        "versions": {"jax": "1.2.3"},
        "device": "a machine (cpu)",
    }
    figures = {}
    with draw.styled():
        for e in experiments:
            kept = [key for key in models if not (e.id == "A1" and key == "plain")]
            each = {key: {"mass": summary(rng.uniform(size=6))} for key in kept}
            for numbers in each.values():
                numbers["controls"] = {
                    n: {"mass": summary(rng.uniform(size=5))} for n in ("registers zero last", "odd", "none")
                }
            results["experiments"][e.id] = {"title": e.title, "figure": e.figure, "results": each}
            results["claims"] += [claim._asdict() for claim in e.claims(each, models)]
            figures[e.id] = e.figures(View(each, models, {}, {}))
    return results, figures


def example(config: ViTConfig, seed: int, grid=(4, 5), name="images/one.png") -> Example:
    """Numbers that are no maps of anything, but of the shapes and signs of an example."""
    rng, n, p = np.random.default_rng(seed), grid[0] * grid[1], config.registers + 1
    maps, sums = (config.depth, config.heads, p, n), (config.depth, config.heads, p, p + 1)
    attention, mass = rng.uniform(size=maps), rng.uniform(size=sums)
    signed = [rng.normal(size=shape) / 50 for shape in (maps, sums, (config.depth, p, len(SUMMANDS)))]
    pixels = rng.integers(0, 256, (8 * grid[0], 8 * grid[1], 3), dtype=np.uint8)
    attention, mass = attention / 40, mass / mass.sum(-1, keepdims=True)
    contribution, parts, shares = signed
    arrays = (attention, contribution, mass, parts, shares, attention[-1, :, 0].mean(0))
    return Example(name, pixels, grid, *(a.astype(np.float32) for a in arrays))


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
        if not {"style", "script"} & set(self.stack[-1:]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return squeezed(" ".join(self.words))


def squeezed(text: str) -> str:
    return " ".join(text.split())


def page(folder, results, figures, experiments=EXPERIMENTS, explorer="explorer.html"):
    write_report(folder, results, experiments, figures, explorer)
    html = (folder / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


def part(html: str, id: str) -> str:
    """The text of one section."""
    match = re.search(rf'<section id="{id}">.*?</section>', html, flags=re.DOTALL)
    assert match
    return Page(match[0]).text


@pytest.fixture(scope="module")
def results():
    return made()


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    return page(tmp_path_factory.mktemp("report"), *results)


def test_sections_come_in_the_paper_s_order(written):
    html, page = written
    ids = [attributes["id"] for tag, attributes in page.elements if tag == "section"]
    assert ids == ["claims", "models", "A1", "A10", "B1", "sensitivity", "made"]
    linked = re.findall(r'<li><a href="#([^"]+)">', html)
    assert linked == ids


def test_every_figure_is_drawn_with_what_it_shows(written, results):
    html, page = written
    figures = [figure for each in results[1].values() for figure in each.values()]
    assert sum(tag == "svg" for tag, _ in page.elements) == len(figures) == 5
    assert all(attributes.get("aria-label") for tag, attributes in page.elements if tag == "svg")
    captions = [Page(text).text for text in re.findall(r"<figcaption>(.*?)<span", html, flags=re.DOTALL)]
    assert captions == ["Mass on registers, image by image.", "By head.", "Every layer.", "The last layer.", "Choices."]
    assert html.count("Attention on registers</text>") == 5  # text is text
    assert html.count("Mass on registers, image by image.") == 2  # below the figure, and to those who do not see it


def test_nothing_is_fetched(written):
    html, page = written
    assert "http:" not in html and "https:" not in html and "@import" not in html
    assert not {"script", "iframe", "object"} & {tag for tag, _ in page.elements}
    links = [attributes[key] for _, attributes in page.elements for key in ("src", "href") if key in attributes]
    assert {link for link in links if not link.startswith(("data:", "#"))} == {"explorer.html"}
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_without_an_explorer_there_is_no_link(results, tmp_path):
    assert "explorer" not in page(tmp_path, *results, explorer=None)[0]


def test_ids_are_unique_and_references_resolve(written):
    html, page = written
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', html)) <= set(ids)


def test_same_input_same_bytes(written, tmp_path):
    assert page(tmp_path, *made())[0] == written[0]


def test_numbers_are_those_of_the_table(written, results):
    html, _ = written
    for e in EXPERIMENTS:
        text = part(html, e.id)
        for key, numbers in results[0]["experiments"][e.id]["results"].items():
            assert f"{MODELS[key].name} {numbers['mass']['mean']:.3f}" in text
            under = numbers["controls"]
            zero, odd, none = (under[name]["mass"]["mean"] for name in ("registers zero last", "odd", "none"))
            without = f"{MODELS[key].name} mass on registers nothing replaced {none:.3f}"  # in the same images
            assert f"{without} registers: zero, at the last block {zero:.3f} odd {odd:.3f}" in text
        assert "Under 2 replacement controls, n = 5" in text


def test_choices_are_told_and_others_than_the_default_marked(written, results, tmp_path):
    text = part(written[0], "B1")
    assert "stage: heads not the default, layerscale – where the part is read" in text
    assert "renormalise: no – divide by the attention on the part" in text
    changed = copy.deepcopy(results[0])
    changed["options"]["B1"] = {"stage": "layerscale", "renormalise": True}
    text = part(page(tmp_path, changed, results[1])[0], "B1")
    assert "stage: layerscale – where" in text and "renormalise: yes not the default, no –" in text


def test_images_models_and_reasons(written):
    html, _ = written
    assert "n = 6 images; 5 images under each control." in part(html, "A1")
    assert "Left out. PLAIN: the model has no registers" in part(html, "A1")
    assert "Left out" not in part(html, "B1")
    models = part(html, "models")
    assert "REG DINOv2 B 3 × 32, 4 heads 1.2 M 3, trained with it trained 224 px, 16 × 16 6 (1 skipped)" in models
    assert "LATER was given test-time registers" in models and "REG was trained with registers" in models
    assert "kind: hub; path: someone/reg" in models
    last = part(html, "made")
    for text in (
        "a machine (cpu)",
        "1.2.3",
        SHA,
        "/data/photos",
        "controls seed: 3",
        "A1 stage: heads; renormalise: no",
        "jaxvit run",
    ):
        assert text in last
    assert "bad.png truncated all models" in last


def test_numbers_of_images_that_differ(results, tmp_path):
    changed = copy.deepcopy(results[0])
    changed["models"]["reg"]["images"] |= {"n": 5}
    text = part(page(tmp_path, changed, results[1])[0], "A10")
    assert "n = 6 images (PLAIN, LATER and DICE); 5 images (REG); 5 images under each control" in text


def test_random_weights_are_no_evidence(written, results, tmp_path):
    html, whole = written
    assert "Random weights; not evidence. DICE has random weights" in whole.text
    assert "Random weights, not evidence. DICE" in part(html, "B1")
    tiles = re.findall(r'<dt>([^<]*)</dt><dd class="value">(\d+)</dd>', html)
    n = len(EXPERIMENTS)
    held = {
        "The paper’s claims that hold": n,
        "that do not hold": 0,
        "not tested": n,
        "run on random weights": n,
        "Models": 4,
    }
    assert dict(tiles) == {name: str(number) for name, number in held.items()}
    trained = {key: each for key, each in MODELS.items() if each.weights == "trained"}
    html, whole = page(tmp_path, *made(trained))
    assert "Random weights" not in whole.text
    only = {"dice": MODELS["dice"]}
    assert "All models here have random weights" in page(tmp_path, *made(only))[1].text


def test_only_the_paper_s_orderings_are_counted(results, tmp_path):
    changed = copy.deepcopy(results[0])
    for c in changed["claims"]:
        if c["ordering"] == 2:
            c["ordering"] = 0
    changed["claims"] += [Claim(0, "B1", "Something else holds", True, "1", "DINOv2")._asdict()] * 3
    html, _ = page(tmp_path, changed, results[1])
    tiles = dict(re.findall(r'<dt>([^<]*)</dt><dd class="value">(\d+)</dd>', html))
    n = str(len(EXPERIMENTS))
    assert (tiles["The paper’s claims that hold"], tiles["not tested"]) == (n, "0")
    text = part(html, "claims")
    assert text.index("Other statements") < text.index("Something else holds")


def test_figures_say_n_choices_and_verdicts(written, results, tmp_path):
    html, _ = written
    facts = [Page(text).text for text in re.findall(r'<span class="facts">.*?</span>', html, flags=re.DOTALL)]
    verdicts = "1 of 1 claim holds, 1 not tested, 1 on random weights, no evidence"
    assert facts == [f"n = 6 images; n = 5 images under each control · stage heads · {verdicts}"] * 5
    assert html.count('href="#A1-claims"') == 2 and html.count('<h3 id="A1-claims">') == 1
    changed = copy.deepcopy(results[0])
    changed["models"]["reg"]["images"]["n"] = 4000
    changed["options"]["B1"]["stage"] = "layerscale"
    changed["claims"] = [c | {"holds": False} for c in changed["claims"] if c["experiment"] != "A1"]
    html, _ = page(tmp_path, changed, results[1])
    text = part(html, "B1")
    verdicts = "0 of 2 claims hold, 1 on random weights, no evidence"
    assert f"n = 6 to 4,000 images; n = 5 images under each control · default readings · {verdicts}" in text
    assert 'href="#A1-claims"' not in html


def test_claims_by_ordering_trained_first_and_linked(written):
    html, _ = written
    text = part(html, "claims")
    first = text.index("The paper’s ordering 1")
    assert first < text.index("The paper’s ordering 2") and "Other statements" not in text
    held = text.index("Large models look at registers more. A1 holds g 0.300 against B 0.100 DINOv2")
    random = text.index("Large models look at registers more. A1 does not hold random 0.1; gap −0.1 random weights")
    assert first < held < random
    assert "Patches stop to follow [CLS]. A1 not tested needs a small and a large model CLIP" in text


def test_no_models_no_claims_no_experiments(tmp_path):
    results, figures = made({}, [])
    assert "state nothing to test" in page(tmp_path, results, figures, [], None)[1].text
    lonely = EXPERIMENTS[0]
    results, figures = made({}, [lonely])
    assert "No model that was given has numbers" in page(tmp_path, results, {}, [lonely])[1].text


def test_an_experiment_without_an_entry_is_left_out(results, tmp_path):
    changed = copy.deepcopy(results[0])
    del changed["experiments"]["B1"]
    html, _ = page(tmp_path, changed, results[1])
    assert 'id="B1"' not in html and 'href="#B1"' not in html


def test_numbers_that_are_not_defined(results, tmp_path):
    changed = copy.deepcopy(results[0])
    for value, key in zip((None, float("nan")), ("reg", "later"), strict=True):
        changed["experiments"]["A1"]["results"][key]["mass"]["mean"] = value
    text = part(page(tmp_path, changed, results[1])[0], "A1")
    assert "REG undefined" in text and "LATER undefined" in text and "nan" not in text and "None" not in text


def test_names_are_escaped(tmp_path):
    nasty = '<script>alert("1")</script>&\'$x${y}'
    models = {"a": about("a", name=nasty, family=nasty, source={"path": nasty})}
    fake = Fake("A1", nasty, nasty, nasty, captions=(nasty,), refused=())
    results, figures = made(models, [fake])
    results["command"] = results["device"] = results["images"]["folder"] = nasty
    results["claims"] = [Claim(0, "A1", nasty, True, nasty, nasty)._asdict()]
    results["models"]["a"]["images"]["skipped"][0] = {"image": nasty, "error": nasty}
    results["models"]["a"]["not run"] = {"A1": nasty}
    html, read = page(tmp_path, results, figures, [fake])
    assert "<script" not in html
    assert read.text.count(nasty) > 15


def test_warnings_about_images(results, tmp_path):
    text = page(tmp_path, *results)[1].text
    assert "Fewer images than numbers in a vector (PLAIN, REG, LATER and DICE)" in text
    assert "depend on each other" not in text and "Some images could not be used" in text
    changed = copy.deepcopy(results[0])
    changed["images"]["folder"] = ".data/photographs"
    for entry in changed["models"].values():
        for images in (entry["images"], entry["other passes"]["controls"]):
            images |= {"n": 32, "skipped": []}
    html, read = page(tmp_path, changed, results[1])
    assert "8 of each of 17 photographs" in read.text and "Fewer images" not in read.text
    assert "Some images" not in read.text and 'id="skipped"' not in html
    assert "could not be run" not in read.text
    changed["failed"] = {"gone": {"name": "gone <x>", "reason": "no such place"}}
    assert "gone <x> could not be run: no such place" in page(tmp_path, changed, results[1])[1].text


def test_minus_signs_before_numbers_alone():
    assert minus("gap -0.1, (-2) A-1, ViT-S/14 +0.1-3 1-2") == "gap −0.1, (−2) A-1, ViT-S/14 +0.1-3 1-2"


def test_controls_in_words():
    assert control_in_words("cls mean every") == "[CLS]: mean, after every block but the last"
    assert control_in_words("none") == "nothing replaced"
    assert control_in_words("registers donor last") == "registers: donor, at the last block"
    assert control_in_words("something else") == "something else"


def test_numeric_columns():
    rows = [["a", "−0.1", "1.2 ± 0.1", "S 0.1", "3.1\N{NO-BREAK SPACE}%"], ["b", "undefined", "–", "0.2", "1,024"]]
    assert numeric_columns(Table(("", "", "", "", ""), rows)) == [1, 2, 4]


# The explorer's files


def read(folder, name):
    """What a data file hands to the page."""
    text = (folder / "explorer" / f"{name}.js").read_text()
    match = re.fullmatch(r"explorerTake\((.*?), (\{.*\})\);\n", text)
    assert match and json.loads(match[1]) == name
    raw = json.loads(match[2])
    shape = raw["shape"]

    def array(text, dtype, shape):
        return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)

    found = {
        kind: array(raw[kind]["levels"], dtype, shape).astype(float) * array(raw[kind]["scale"], "<f4", [*shape[:3], 1])
        for kind, dtype in (("attention", np.uint8), ("contribution", np.int8))
    }
    found |= {kind: array(raw[kind], "<f4", [*shape[:3], shape[2] + 1]) for kind in ("mass", "parts")}
    return found | {"shares": array(raw["shares"], "<f4", [shape[0], shape[2], len(SUMMANDS)]), "grid": raw["grid"]}


def test_data_files_hold_the_examples(tmp_path):
    examples = {"plain": [example(FAMILIES["dinov2"], 0)], "reg": [example(REGISTERS, i, name=f"{i}") for i in (1, 2)]}
    write_explorer(tmp_path, examples, MODELS)
    assert {path.name for path in (tmp_path / "explorer").iterdir()} == {"plain-0.js", "reg-0.js", "reg-1.js"}
    for key, each in examples.items():
        for i, e in enumerate(each):
            found = read(tmp_path, f"{key}-{i}")
            assert found["grid"] == list(e.grid)
            for kind, steps, together in (("attention", 255, "mean"), ("contribution", 127, "sum")):
                maps = getattr(e, kind)
                expected = np.concatenate([getattr(maps, together)(axis=1, keepdims=True), maps], axis=1)
                largest = np.abs(expected).max(-1, keepdims=True)
                assert (np.abs(found[kind] - expected) <= largest * (0.5 / steps + 1e-5)).all()
                np.testing.assert_allclose(np.abs(found[kind]).max(-1, keepdims=True), largest, rtol=1e-5)
            np.testing.assert_array_equal(found["mass"][:, 1:], e.mass)
            np.testing.assert_allclose(found["mass"][:, 0], e.mass.mean(1), rtol=1e-5)
            np.testing.assert_array_equal(found["parts"][:, 1:], e.parts)
            np.testing.assert_allclose(found["parts"][:, 0], e.parts.sum(1), rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(found["shares"], e.shares)


def test_the_explorer_is_well_formed_and_repeatable(tmp_path):
    nasty = "</script><b>$x & \u2028.png"
    examples = {"reg": [example(REGISTERS, 0, name=nasty)], "plain": []}
    write_explorer(tmp_path / "a", examples, MODELS)
    write_explorer(tmp_path / "b", copy.deepcopy(examples), MODELS)
    html = (tmp_path / "a/explorer.html").read_text()
    assert html == (tmp_path / "b/explorer.html").read_text()
    assert (tmp_path / "a/explorer/reg-0.js").read_bytes() == (tmp_path / "b/explorer/reg-0.js").read_bytes()
    Page(html)
    index = json.loads(re.search(r'id="index">(.*?)</script>', html, flags=re.DOTALL)[1])
    assert [each["key"] for each in index["models"]] == ["reg"]  # plain has no examples
    assert index["models"][0]["images"][0]["name"] == nasty
    assert "http:" not in html and "https:" not in html


def test_maps_of_zeros(tmp_path):
    e = example(FAMILIES["dinov2"], 0)
    e = e._replace(attention=np.zeros_like(e.attention), contribution=np.zeros_like(e.contribution))
    write_explorer(tmp_path, {"plain": [e]}, MODELS)
    found = read(tmp_path, "plain-0")
    assert not found["attention"].any() and not found["contribution"].any()


def test_palettes():
    """The middle of the signed one is pale, its ends are dark, red and blue; attention grows brighter, denser."""
    assert CONTRIBUTION[127, :3].min() > 230 and CONTRIBUTION[[0, -1], :3].max() < 130
    assert CONTRIBUTION[0, 0] > CONTRIBUTION[0, 2] and CONTRIBUTION[-1, 2] > CONTRIBUTION[-1, 0]
    assert (np.diff(ATTENTION[:, 3].astype(int)) >= 0).all() and ATTENTION[0, 3] == 0
    assert (np.diff(ATTENTION[:, :3].astype(int).sum(axis=1)) >= -6).all()


# What figures share


def test_names_are_slanted_only_where_they_would_touch():
    with draw.styled():
        few, many = (draw.canvas(width=6.4) for _ in range(2))
        draw.name_models(few[1], ["DINOv2\nS", "DINOv2\nB+reg"])
        draw.name_models(many[1], [f"DINOv2\n{size}+test-time reg" for size in "SBLgSBLg"])
        _, halves = draw.canvas(columns=2, width=6.4)
        draw.name_models(halves[0], ["DINOv2\nS+reg"] * 6)
        draw.name_models(few[1], ["DINOv2\nS+reg"] * 4)
    assert {label.get_rotation() for label in few[1].get_xticklabels()} == {0}
    assert {label.get_rotation() for label in many[1].get_xticklabels()} == {40}
    assert {label.get_rotation() for label in halves[0].get_xticklabels()} == {40}
    assert many[1].get_xticklabels()[0].get_text() == "DINOv2 S+test-time reg"


def test_words():
    assert draw.number(-0.0001) == "0.000" and draw.number(-1.5, 1) == "−1.5"
    assert {draw.number(None), draw.number(float("nan")), draw.percent(None), draw.percent(float("nan"))} == {
        "undefined"
    }
    assert draw.percent(0.1234) == "12.3\N{NO-BREAK SPACE}%"
    assert [draw.listed(x) for x in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]


def test_files_of_figures_are_the_same_for_the_same_figure(tmp_path):
    for folder in ("a", "b"):
        with draw.styled():
            figure, axes = draw.canvas()
            draw.bars(axes, {"x": [1.0, float("nan")]}, ["one", "two"], {"x": "#000000"}, {"x": [0.1, 0.1]})
            draw.write_figure(figure, tmp_path / folder, "f")
    for kind in ("png", "svg"):
        assert (tmp_path / f"a/f.{kind}").read_bytes() == (tmp_path / f"b/f.{kind}").read_bytes()


def test_a_figure_is_drawn_once_as_svg(tmp_path):
    """File and page have the same drawing, the file on white; it is laid out as if each had been drawn by itself."""

    def made(count):
        figure, axes = draw.canvas(2)
        for chart in axes:
            draw.bars(chart, {"x": [1.0] * count}, ["a name of some length"] * count, {"x": "#000000"})
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right")
        return figure

    with draw.styled():
        figure, alone = made(3), made(3)
        draw.write_figure(figure, tmp_path, "f")
        drawn = draw.svg(figure)
        figure.axes[0].set_title("later")
        inline = draw.inline_svg(figure, "f", "what it shows")
        alone.savefig(tmp_path / "alone.svg", transparent=True)
    file, other = ((tmp_path / f"{name}.svg").read_text() for name in ("f", "alone"))
    assert draw.svg(figure) is drawn and "later" not in inline
    assert '<rect width="100%" height="100%" fill="#ffffff"/>' in file and "<rect width=" not in inline
    paths = [re.findall(r' d="([^"]+)"', text) for text in (file, inline, other)]
    assert paths[0] == paths[1] == paths[2] and len(paths[0]) > 10


def test_every_source_has_its_own_colour():
    assert len(set(draw.COLOURS.values())) == len(draw.COLOURS) == len(SUMMANDS)
    assert set(draw.COLOURS) == set(draw.LABELS) == set(SUMMANDS)


def test_long_tables_scroll(tmp_path):
    class Long(Fake):
        def table(self, results, models):
            return Table(("model", "x"), [[f"row {i}", "0"] for i in range(40)])

    results, figures = made(MODELS, [Long("A1", "Long")])
    html, _ = page(tmp_path, results, figures, [Long("A1", "Long")])
    assert "row 39" in html and html.count('"scroll long"') == 1
