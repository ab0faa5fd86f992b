"""The report and the explorer in a real browser, opened as files: what is drawn, what it costs to read, what is told.

Chromium is looked for on the PATH and in the usual places; JAXVIT_CHROMIUM names another one.
"""

import os
import shutil
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import pytest
from conftest import FAMILIES
from test_paper_report import EXPERIMENTS, MODELS, REGISTERS, example, made

from experiments.report.explorer import ATTENTION, CONTRIBUTION, write_explorer
from experiments.report.report import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PLACES = ("/usr/bin", "/usr/lib/chromium", "/usr/local/bin", "/opt/google/chrome", "/snap/bin")
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDE = 10.5  # inches


def chromium() -> str | None:
    """Path of a browser, or None."""
    if given := os.environ.get("JAXVIT_CHROMIUM"):
        return given
    found = (shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), *PLACES))) for name in NAMES)
    return next(filter(None, found), None)


EXAMPLES = {
    "plain": [example(FAMILIES["dinov2"], 0)],
    "reg": [example(REGISTERS, 1), example(REGISTERS, 2, (3, 6), "images/two & more.png")],
    "dice": [example(REGISTERS, 3, name="images/other.png"), example(REGISTERS, 4)],
}


@pytest.fixture(scope="module")
def browser():
    path = chromium()
    if path is None:
        pytest.skip("no Chromium was found: install one, or set JAXVIT_CHROMIUM to its path")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    results, figures = made()
    for figure in figures["sensitivity"].values():
        figure.set_figwidth(WIDE)
    write_report(out, results, EXPERIMENTS, figures, "explorer.html")
    write_explorer(out, EXAMPLES, MODELS)
    return out


class Opened:
    """A page, and all that went wrong in it."""

    def __init__(self, browser, viewport, **more):
        self.context = browser.new_context(viewport=viewport, **more)
        self.page, self.errors = self.context.new_page(), []
        self.page.set_default_timeout(60_000)  # cores are shared in tests
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("requestfailed", lambda request: self.errors.append(request.url))


@pytest.fixture
def opened(browser, request):
    """A page of the size that the test asks for, a desk's otherwise; nothing may go wrong in it."""
    one = Opened(browser, getattr(request, "param", DESK))
    yield one.page
    one.context.close()
    assert not one.errors


both = pytest.mark.parametrize("opened", [DESK, PHONE], ids=["desk", "phone"], indirect=True)


def overflow(page) -> int:
    """By how many pixels the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


# The report


@both
def test_every_figure_is_seen_and_nothing_overflows(opened, folder):
    opened.goto((folder / "report.html").as_uri())
    assert overflow(opened) <= 0
    figures = opened.locator("figure svg").all()
    assert len(figures) == 5
    for figure in figures:
        figure.scroll_into_view_if_needed()
        assert figure.is_visible()
        box = figure.bounding_box()
        assert box["width"] > 250 and box["height"] > 130


@both
def test_text_in_figures_can_be_read(opened, folder):
    """In figures 9 pixels on a phone, where wide ones scroll, and 11 elsewhere; 12 in all other text."""
    opened.goto((folder / "report.html").as_uri())
    sizes = opened.evaluate(
        """[...document.querySelectorAll("figure")].map(figure => {
          const svg = figure.querySelector("svg");
          const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
          return Math.min(...[...svg.querySelectorAll("text")].map(
            text => scale * parseFloat(getComputedStyle(text).fontSize)));
        })"""
    )
    assert len(sizes) == 5 and min(sizes) > (11 if opened.viewport_size == DESK else 9)
    least = opened.evaluate(
        """Math.min(...[...document.querySelectorAll("main *")]
          .filter(each => !each.closest("svg") && each.checkVisibility())
          .filter(each => [...each.childNodes].some(node => node.nodeType === 3 && node.data.trim()))
          .map(each => parseFloat(getComputedStyle(each).fontSize)))"""
    )
    assert least >= 12


def test_text_in_figures_has_the_page_s_font_and_stays_inside(opened, folder):
    opened.goto((folder / "report.html").as_uri())
    families = opened.evaluate(
        """[...document.querySelectorAll("figure svg text, body")].map(each => getComputedStyle(each).fontFamily)"""
    )
    assert len(families) > 50 and len(set(families)) == 1
    outside = opened.evaluate(
        """[...document.querySelectorAll("figure svg text")].filter(text => {
          const inner = text.getBoundingClientRect(), outer = text.closest("svg").getBoundingClientRect();
          return inner.left < outer.left - 2 || inner.right > outer.right + 2 || inner.top < outer.top - 2
            || inner.bottom > outer.bottom + 2;
        }).map(text => text.textContent)"""
    )
    assert not outside


def test_wide_figures_scroll_by_themselves_on_phones(browser, folder):
    one = Opened(browser, PHONE)
    one.page.goto((folder / "report.html").as_uri())
    wide = one.page.locator("#sensitivity .chart")
    inner, outer = wide.evaluate("each => [each.scrollWidth, each.clientWidth]")
    assert inner > 1.5 * outer and overflow(one.page) <= 0
    one.context.close()


@both
def test_contents_lead_to_their_sections(opened, folder):
    opened.goto((folder / "report.html").as_uri())
    links = opened.locator("nav a").all()
    assert len(links) == 7
    for link in links:
        target = link.get_attribute("href").removeprefix("#")
        link.click()
        assert opened.evaluate("location.hash") == f"#{target}"
        heading = opened.locator(f"section#{target} h2")
        assert heading.is_visible() and 0 <= heading.bounding_box()["y"] < opened.viewport_size["height"]


def test_the_report_leads_to_the_explorer_and_back(opened, folder):
    opened.goto((folder / "report.html").as_uri())
    opened.get_by_role("link", name="Open the explorer").click()
    shown(opened, "plain-0")
    opened.get_by_role("link", name="back to the report").click()
    assert opened.get_by_role("heading", level=1).inner_text().startswith("What makes [CLS]")


def test_controls_open(opened, folder):
    opened.goto((folder / "report.html").as_uri())
    details = opened.locator("section#A1 details")
    assert not details.locator("table").first.is_visible()
    details.locator("summary").click()
    assert details.locator("table").first.is_visible() and overflow(opened) <= 0


# The explorer


def explore(page, folder, hash="") -> None:
    page.goto((folder / "explorer.html").as_uri() + hash)


def shown(page, file, *numbers) -> None:
    """Waits until that is drawn: layer and head from 0, head "all" for all; query 0 is [CLS], 1 is register 0."""
    text = " ".join(map(str, (file, *numbers)))
    page.wait_for_function("text => ((document.body.dataset.shown || '') + ' ').startsWith(text + ' ')", arg=text)


def pixels(page, id: str) -> np.ndarray:
    """What is on a canvas, [rows, columns, RGBA]."""
    width, height, values = page.evaluate(
        """id => {
          const canvas = document.getElementById(id), { width, height } = canvas;
          const copy = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
          copy.drawImage(canvas, 0, 0);
          return [width, height, [...copy.getImageData(0, 0, width, height).data]];
        }""",
        id,
    )
    return np.asarray(values).reshape(height, width, 4)


def one(e, field: str, layer: int, head: int | str, query: int) -> np.ndarray:
    """Numbers of an example, of a head or "all"."""
    values = getattr(e, field)[layer, :, query].astype(np.float64)
    if head != "all":
        return values[head]
    return values.mean(axis=0) if field in ("attention", "mass") else values.sum(axis=0)


def check_maps(page, e, layer: int, head: int | str, query: int) -> None:
    """Both canvases show the maps, each over its own range, in colours of the palette."""
    attention = one(e, "attention", layer, head, query).reshape(e.grid)
    place = 255 * attention / attention.max()
    drawn = pixels(page, "attention")
    assert drawn.shape == (*e.grid, 4)
    # Of one step up and down the palette, as the map has 8 bits.
    steps = (ATTENTION[np.clip(np.rint(place) + d, 0, 255).astype(int)].astype(int) for d in (-1, 0, 1))
    alpha = np.stack([each[..., 3] for each in steps])
    assert (drawn[..., 3] >= alpha.min(0)).all() and (drawn[..., 3] <= alpha.max(0)).all()
    assert drawn[..., 3].max() == ATTENTION[-1, 3] and len(np.unique(drawn[..., 3])) > 8
    dense = drawn[..., 3] > 100  # the canvas keeps few digits of the colours of what is nearly transparent
    expected = ATTENTION[np.rint(place).astype(int)]
    assert np.abs(drawn[dense].astype(int) - expected[dense])[:, :3].max() <= 5

    contribution = one(e, "contribution", layer, head, query).reshape(e.grid)
    place = np.rint(127 + 127 * contribution / np.abs(contribution).max()).astype(int)
    drawn, expected = pixels(page, "contribution"), CONTRIBUTION[place].astype(int)
    assert drawn.shape == (*e.grid, 4) and np.abs(drawn - expected).max() <= 6
    assert np.abs(drawn - expected).mean() < 1


def told(text: str) -> float:
    """A percentage as it is written."""
    return float(text.strip().removesuffix(" %").replace("\N{MINUS SIGN}", "-")) / 100


def close(written: str, value: float) -> bool:
    """Whether it is the number as it is rounded: 3 digits, or thousandths of a per cent."""
    return abs(told(written) - value) <= max(6e-6, 6e-3 * abs(value))


def check_numbers(page, e, layer: int, head: int | str, query: int) -> None:
    """The tables beside the maps."""
    mass, parts = (one(e, field, layer, head, query) for field in ("mass", "parts"))
    rows = [row.locator("td.value").all_inner_texts() for row in page.locator("#groups tbody tr").all()]
    assert len(rows) == len(mass) + (head == "all")
    for (m, p), *values in zip(rows, mass, parts, strict=False):
        assert close(m, values[0]) and close(p, values[1])
    if head == "all":  # the bias is what is missing
        assert rows[-1][0] == "" and close(rows[-1][1], 1 - parts.sum())
    shares = page.locator("#shares td.value").all_inner_texts()
    expected = [s for i, s in enumerate(e.shares[layer, query]) if len(shares) == 6 or i != 2]
    assert all(close(written, value) for written, value in zip(shares, expected, strict=True))


def test_maps_and_numbers_are_those_of_the_examples(opened, folder):
    explore(opened, folder)
    shown(opened, "plain-0", 2, "all", 0)  # the last layer, all heads, [CLS]
    check_maps(opened, EXAMPLES["plain"][0], 2, "all", 0)
    check_numbers(opened, EXAMPLES["plain"][0], 2, "all", 0)
    assert opened.locator("#queries button").count() == 1 and not opened.locator("#random").is_visible()


def test_choosing_changes_what_is_drawn(opened, folder):
    """Model, image, layer, head and query, each by its own control."""
    explore(opened, folder)
    opened.locator("#model").select_option(label="REG")
    shown(opened, "reg-0", 2, "all", 0)
    seen = [pixels(opened, "attention")]

    def check(file: int, layer: int, head: int | str, query: int) -> None:
        shown(opened, f"reg-{file}", layer, head, query)
        check_maps(opened, EXAMPLES["reg"][file], layer, head, query)
        check_numbers(opened, EXAMPLES["reg"][file], layer, head, query)
        now = pixels(opened, "attention")
        assert now.shape != seen[-1].shape or not np.array_equal(now, seen[-1])
        seen.append(now)

    opened.locator("#images button").nth(1).click()
    check(1, 2, "all", 0)
    assert opened.locator("#image-told").inner_text() == "images/two & more.png"
    opened.locator("#layer").fill("1")
    check(1, 1, "all", 0)
    assert opened.locator("#layer-told").inner_text() == "1 (0 to 2)"
    opened.locator("#head").fill("3")
    check(1, 1, 3, 0)
    assert opened.locator("#head-told").inner_text() == "3 (0 to 3)"
    opened.get_by_role("button", name="register 2").click()
    check(1, 1, 3, 3)
    assert "of register 2 to each patch, head 3" in opened.locator("#attention-what").inner_text()
    assert opened.locator("#queries [aria-pressed=true]").inner_text() == "register 2"


def test_another_model_keeps_the_image_and_the_last_layer(opened, folder):
    explore(opened, folder)
    shown(opened, "plain-0", 2)
    opened.locator("#model").select_option(label="DICE (random weights)")
    shown(opened, "dice-1", 2, "all", 0)  # its second image has the name of the first one's
    check_maps(opened, EXAMPLES["dice"][1], 2, "all", 0)
    assert opened.locator("#random").is_visible()


def test_the_scale_of_a_layer_is_that_of_its_heads(opened, folder):
    explore(opened, folder, "#model=reg&layer=0&head=1")
    shown(opened, "reg-0", 0, 1, 0)
    e = EXAMPLES["reg"][0]
    assert close(opened.locator("#attention-top").inner_text(), e.attention[0, 1, 0].max())
    opened.locator("#scale").select_option("layer")
    top = max(e.attention[0, h, 0].max() for h in range(4))
    assert close(opened.locator("#attention-top").inner_text(), top)
    largest = np.abs(e.contribution[0, :, 0]).max()
    assert close(opened.locator("#contribution-top").inner_text(), largest)
    assert close(opened.locator("#contribution-low").inner_text(), -largest)
    place = np.rint(127 + 127 * e.contribution[0, 1, 0].reshape(e.grid) / largest).astype(int)
    assert np.abs(pixels(opened, "contribution") - CONTRIBUTION[place].astype(int)).max() <= 6


def test_pointing_at_a_patch_reads_it(opened, folder):
    explore(opened, folder, "#model=reg&layer=1&head=2&query=0")
    shown(opened, "reg-0", 1, 2, 1)
    e = EXAMPLES["reg"][0]
    attention, contribution = (one(e, field, 1, 2, 1).reshape(e.grid) for field in ("attention", "contribution"))
    row, column = np.unravel_index(attention.argmax(), e.grid)
    assert f"Most attended: row {row}, column {column}: attention" in opened.locator("#readout").inner_text()
    for picture, (row, column) in zip(opened.locator(".stack").all(), ((0, 0), (3, 4), (2, 1)), strict=True):
        box = picture.bounding_box()
        x, y = ((at + 0.5) / n for at, n in zip((column, row), e.grid[::-1], strict=True))
        opened.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        assert opened.locator("#readout").inner_text().startswith(f"row {row}, column {column}: attention")
        values = [told(text) for text in opened.locator("#readout b").all_inner_texts()]
        for value, maps, steps in zip(values, (attention, contribution), (255, 127), strict=True):
            error = abs(value - maps[row, column])
            assert error <= 0.5 * np.abs(maps).max() / steps + 6e-3 * abs(value) + 6e-6
        for cursor in opened.locator(".stack .cursor").all():  # in all three pictures
            outer = cursor.locator("..").bounding_box()
            inner = cursor.bounding_box()
            assert abs(inner["x"] - outer["x"] - column * outer["width"] / e.grid[1]) < 2
            assert abs(inner["y"] - outer["y"] - row * outer["height"] / e.grid[0]) < 2
    opened.mouse.move(2, 2)
    assert opened.locator("#readout").inner_text().startswith("Most attended")


def test_the_keyboard(opened, folder):
    explore(opened, folder, "#model=reg")
    shown(opened, "reg-0", 2, "all", 0)
    keys = ["ArrowRight", "ArrowLeft", "ArrowDown", "ArrowDown", "ArrowUp", "ArrowLeft", "ArrowLeft", "q", "i"]
    then = [(0, 2, "all", 0), (0, 1, "all", 0), (0, 1, 0, 0), (0, 1, 1, 0), (0, 1, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)]
    then += [(0, 0, 0, 1), (1, 0, 0, 1)]
    for key, (file, *numbers) in zip(keys, then, strict=True):
        opened.keyboard.press(key)
        shown(opened, f"reg-{file}", *numbers)
    check_maps(opened, EXAMPLES["reg"][1], 0, 0, 1)
    opened.locator("#layer").focus()  # a slider moves by one, not by two
    opened.keyboard.press("ArrowRight")
    shown(opened, "reg-1", 1, 0, 1)
    opened.locator("#model").focus()  # in a list of choices arrows choose
    opened.keyboard.press("ArrowUp")
    shown(opened, "plain-0", 1, 0, 0)


def test_the_address_tells_the_state_and_brings_it_back(opened, folder):
    explore(opened, folder)
    shown(opened, "plain-0")
    opened.locator("#model").select_option(label="REG")
    opened.locator("#images button").nth(1).click()
    opened.locator("#layer").fill("0")
    opened.locator("#head").fill("1")
    opened.get_by_role("button", name="register 1").click()
    opened.locator("#quantity").select_option(label="contribution of registers")
    shown(opened, "reg-1", 0, 1, 2)
    state = parse_qs(opened.evaluate("location.hash").removeprefix("#"))
    expected = {"model": "reg", "image": "images/two & more.png", "layer": "0", "head": "1", "query": "1"}
    assert state == {k: [v] for k, v in (expected | {"scale": "map", "show": "contribution of registers"}).items()}
    opened.reload()
    shown(opened, "reg-1", 0, 1, 2)
    check_maps(opened, EXAMPLES["reg"][1], 0, 1, 2)
    assert opened.locator("#quantity option:checked").inner_text() == "contribution of registers"
    opened.evaluate("location.hash = '#model=dice&layer=1&head=all&query=cls'")  # a link that someone follows
    shown(opened, "dice-0", 1, "all", 0)


@pytest.mark.parametrize("hash", ["#model=none&layer=99&head=99&query=99&image=x", "#layer=-1&head=x&scale=5", "#%"])
def test_an_address_that_makes_no_sense(opened, folder, hash):
    explore(opened, folder, hash)
    shown(opened, "plain-0")
    check_numbers(opened, EXAMPLES["plain"][0], 2, 3 if "99" in hash else "all", 0)


def test_the_overview_of_layers_and_heads(opened, folder):
    """Its pixels are the numbers of all heads, and a click chooses a layer and a head."""
    explore(opened, folder, "#model=reg&query=0&show=attention+on+registers")
    shown(opened, "reg-0", 2, "all", 1)
    e = EXAMPLES["reg"][0]
    registers = e.mass[:, :, 1, 1:-1].sum(axis=-1).T  # [heads, layers]
    colour = np.array([0xD5, 0x5E, 0x00])
    expected = 255 + registers[..., None] * (colour - 255.0)
    assert np.abs(pixels(opened, "overview")[..., :3] - expected).max() <= 1
    box = opened.locator("#overview").bounding_box()
    opened.locator("#overview").click(position={"x": box["width"] * 1.5 / 3, "y": box["height"] * 2.5 / 4})
    shown(opened, "reg-0", 1, 2, 1)
    assert close(opened.locator("#overview-what").inner_text().split("Here: ")[1].removesuffix("."), registers[2, 1])
    opened.locator("#quantity").select_option(label="contribution of patches")
    parts = e.parts[:, :, 1, -1].T
    place = np.rint(127 + 127 * parts / np.abs(parts).max()).astype(int)
    assert np.abs(pixels(opened, "overview") - CONTRIBUTION[place].astype(int)).max() <= 6
    opened.locator("#depth").click(position={"x": 5, "y": 20})
    shown(opened, "reg-0", 0, 2, 1)


def test_shares_over_depth_are_stacked(opened, folder):
    """In the middle of each layer's bar, a colour is as high as its share."""
    explore(opened, folder, "#model=reg")
    shown(opened, "reg-0", 2)
    e = EXAMPLES["reg"][0]
    drawn = pixels(opened, "depth")
    shares = e.shares[:, 0]
    high = max(1.0, np.clip(shares, 0, None).sum(1).max())
    low = min(0.0, np.clip(shares, None, 0).sum(1).min())
    for layer, values in enumerate(shares):
        column = drawn[:, round(drawn.shape[1] * (layer + 0.5) / 3)]
        for value, colour in zip(values, ((0, 158, 115), (204, 121, 167), (213, 94, 0), (0, 114, 178)), strict=False):
            height = (np.abs(column[:, :3] - colour).max(axis=1) < 3).sum() / drawn.shape[0]
            assert abs(height - abs(value) / (high - low)) <= 3 / drawn.shape[0]


def test_a_phone_stacks_it(browser, folder):
    one = Opened(browser, PHONE, has_touch=True, is_mobile=True)
    page = one.page
    explore(page, folder, "#model=reg")
    shown(page, "reg-0", 2)
    assert overflow(page) <= 0
    boxes = {id: page.locator(f"#{id}").bounding_box() for id in ("photograph", "attention", "contribution", "groups")}
    assert boxes["photograph"]["y"] < boxes["attention"]["y"] == boxes["contribution"]["y"] < boxes["groups"]["y"]
    assert boxes["attention"]["x"] < boxes["contribution"]["x"] and boxes["attention"]["width"] > 150
    sections = [section.bounding_box() for section in page.locator(".panels section").all()]
    assert len({round(box["x"]) for box in sections}) == 1  # one below the other
    assert all(box["x"] + box["width"] <= PHONE["width"] for box in sections)
    page.locator("#attention").tap(position={"x": 3, "y": 3})
    assert page.locator("#readout").inner_text().startswith("row 0, column 0:")
    assert not one.errors
    one.context.close()


def test_data_that_is_missing_is_said(browser, folder, tmp_path):
    shutil.copy(folder / "explorer.html", tmp_path / "explorer.html")
    one = Opened(browser, DESK)
    explore(one.page, tmp_path)
    one.page.get_by_role("alert").wait_for()
    assert "Cannot read explorer/plain-0.js" in one.page.get_by_role("alert").inner_text()
    one.context.close()


def test_no_images(opened, tmp_path):
    write_explorer(tmp_path, {}, MODELS)
    explore(opened, tmp_path)
    assert opened.get_by_text("No image was chosen to be shown.").is_visible()
    assert not opened.locator("#page").is_visible()


def test_names_are_only_text(opened, tmp_path):
    nasty = "<img src=x onerror=alert(1)></script>.png"
    write_explorer(tmp_path, {"reg": [example(REGISTERS, 1, name=nasty)]}, MODELS)
    explore(opened, tmp_path)
    shown(opened, "reg-0")
    assert opened.locator("#image-told").inner_text() == nasty


def test_a_browser_is_found_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXVIT_CHROMIUM", "/some/where/chrome")
    assert chromium() == "/some/where/chrome"
    monkeypatch.delenv("JAXVIT_CHROMIUM")
    program = tmp_path / "chromium-headless-shell"
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Path(chromium()) == program
