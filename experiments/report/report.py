"""One page for people: claims, figures, tables, choices of all experiments. A single file that needs nothing else."""

# ruff: noqa: RUF001 (what people read has true minus signs and apostrophes)

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from jaxvit.io import embedded
from jaxvit.io.checkpoint import replacing_file

from ..core.charts import COLOURS, inline_svg, listed, ordered, styled
from ..core.controls import NONE, in_order
from ..core.experiment import About, Experiment, Option, Table
from ..core.passes import Pass
from ..models.subjects import SCENES

TEMPLATE = Path(__file__).with_name("report.html")
REGISTERS = {"none": "none", "trained": "trained with it", "test-time": "test-time, appended", "random": "random"}
PLACES = {"last": "at the last block", "every": "after every block but the last"}
PASSES = {"clean": "", "controls": " under each control", "labelled": " with classes"}
LONG = 24  # rows of an experiment's table that is all shown; longer ones scroll
NARROWEST = 1.15  # pixels to a point of a figure: text of 9 points stays readable on phones, which scroll wide figures


def write_report(
    out: Path,
    results: Mapping[str, Any],
    experiments: Sequence[Experiment],
    figures: Mapping[str, Mapping[str, Figure]],
    explorer: str | None = None,
    passes: Sequence[Pass] = (),
) -> None:
    """Writes report.html into `out`: the same bytes for the same input.

    Args:
      results: as in results.json; numbers that are not defined are NaN or None.
      experiments: those whose results are told, if there are any; in the order A1 to A9, B1 to B7, others.
      figures: id of an experiment -> name -> figure, as `Experiment.figures` gives. What `charts.caption` said of a
        figure stands under it, else what `Experiment.shown` says of all.
      explorer: where the link to the explorer leads, from `out`; None is no link.
      passes: whose options are told beside those of the experiments that read them.
    """
    told = sorted((e for e in experiments if e.id in results["experiments"]), key=place)
    models = {key: about(entry) for key, entry in results["models"].items()}
    with styled():
        sections = [section(e, results, models, figures.get(e.id, {}), passes) for e in told]
    fragments = {
        "colours": "; ".join(f"--{name}: {colour}" for name, colour in COLOURS.items()),
        "run": escape(" · ".join(run_in_words(results, models, told))),
        "warnings": warnings(results, models),
        "headline": headline(results, models),
        "explorer": "" if explorer is None else EXPLORER.format(escape(explorer)),
        "contents": contents(told),
        "claims": claims_section(results, told),
        "models": models_table(results, models),
        "sources": sources(results, models),
        "sections": "".join(sections),
        "made": made(results),
        "of_models": of_models(results, models),
        "skipped": skipped(results, models),
        "command": escape(str(results.get("command", ""))),
    }
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(fragments)
    with replacing_file(out / "report.html") as temporary:
        temporary.write_text(text, encoding="utf-8")


EXPLORER = (
    '<p class="lead"><a class="button" href="{}">Open the explorer</a> Attention and contribution maps of single '
    "images: every layer, head and query.</p>"
)


def place(e: Experiment) -> tuple[Any, ...]:
    """A1 to A9, B1 to B7, and then others."""
    match = re.fullmatch(r"([A-Z])(\d+)", e.id)
    return (0, match[1], int(match[2])) if match else (1, e.id, 0)


def about(entry: Mapping[str, Any]) -> About:
    return About(**{field.name: entry[field.name] for field in fields(About)})


# Words


def count(n: int, what: str = "image") -> str:
    return f"1 {what}" if n == 1 else f"{n:,} {what}s"


def plain(value: Any) -> str:
    """A value as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return "–" if value is None else str(value)


def stopped(text: str) -> str:
    """With a full stop."""
    text = text.strip()
    return text + "." * (text[-1:] not in ("", ".", "!", "?"))


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return stopped(text)[:1].upper() + stopped(text)[1:]


def minus(text: str) -> str:
    """With true minus signs before numbers."""
    return re.sub(r"(?<![\w.)])-(?=\d)", "−", text)


def among(names: Iterable[str]) -> str:
    return escape(listed(names))


def names_of(keys: Iterable[str], models: Mapping[str, About]) -> str:
    return among(models[key].name for key in keys)


# HTML


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "", numeric: Iterable[int] = ()) -> str:
    """A table; cells are HTML, the first of each row is its heading, `numeric` columns are set to the right.

    A row of one cell is a heading of those that follow.
    """
    right = set(numeric)

    def cell(i: int, text: str, tag: str) -> str:
        return f"<{tag}{' class=right' * (i in right)}>{text}</{tag}>"

    top = "".join(cell(i, text, "th") for i, text in enumerate(head))

    def line(row: Sequence[str]) -> str:
        if len(row) == 1 < len(head):  # a heading of the rows that follow
            return f'<tr class="group"><th colspan="{len(head)}">{row[0]}</th></tr>'
        return "<tr>" + "".join(cell(i, text, "td" if i else "th") for i, text in enumerate(row)) + "</tr>"

    body = "".join(map(line, rows))
    top = f"<thead><tr>{top}</tr></thead>" if head else ""
    outer = "scroll long" if kind == "numbers" and body.count("<tr") > LONG else "scroll"
    return f'<div class="{outer}" tabindex="0"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


_NUMBER = r"[+−-]?[\d.,]+(e[+−-]?\d+)?(\s?[%×])?"
NUMERIC = re.compile(rf"{_NUMBER}(\s*(±|to|–|/)\s*{_NUMBER})*(\s*\(.*\))?|undefined|–|-|")


def numeric_columns(table: Table) -> list[int]:
    """Columns after the first with numbers alone."""
    return [
        i
        for i in range(1, len(table.head))
        if all(NUMERIC.fullmatch(row[i].strip()) for row in table.rows if i < len(row))
    ]


def told_table(t: Table) -> str:
    """A table of an experiment."""
    rows = [[escape(cell).replace("\n", " ") for cell in row] for row in t.rows]
    note = f'<p class="note">{escape(sentence(t.note))}</p>' if t.note else ""
    return table([escape(h).replace("\n", " ") for h in t.head], rows, "numbers", numeric_columns(t)) + note


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values as HTML, those of inner mappings behind the outer name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}: ")
        else:
            yield escape(f"{prefix}{name}"), escape(plain(value))


# The head of the page


def run_in_words(results: Mapping[str, Any], models: Mapping[str, About], told: Sequence[Experiment]) -> list[str]:
    size = results["request"].get("size")
    return [
        count(len(models), "model"),
        count(results["images"]["n"], "image file"),
        "each checkpoint’s own size" if size is None else f"{size} pixels",
        count(len(told), "experiment"),
        *([f"{results['labelled']['n']:,} images with classes"] if results.get("labelled") else []),
    ]


def warnings(results: Mapping[str, Any], models: Mapping[str, About]) -> str:
    """What must be known before anything else: random weights, images that depend on each other, images left out."""
    found = []
    random = [key for key, each in models.items() if each.weights == "random"]
    if random:
        whole = len(random) == len(models)
        who = "All models here have" if whole else f"{names_of(random, models)} ha{'s' if len(random) == 1 else 've'}"
        found.append(
            f"<b>Random weights; not evidence.</b> {who} random weights, marked as such"
            ' <span class="mark">random</span> wherever they are told apart. What they give shows that '
            "the code runs, and says nothing about trained Vision Transformers."
        )
    small = [key for key, each in models.items() if each.family == SCENES]
    if small:
        most = max(models[key].parameters for key in small)
        found.append(
            f"<b>Small models of synthetic scenes.</b> {names_of(small, models)} {'were' if len(small) > 1 else 'was'} "
            f"trained by this project, on generated pictures of ten shapes, with at most {most:,} parameters. What "
            "holds for them need not hold for a large model of photographs."
        )
    if Path(results["images"].get("folder", "")) in (
        embedded.DATA / "photographs",
        embedded.data_folder() / "photographs",
    ):
        photographs = sum(map(len, embedded.PHOTOGRAPHS.values()))
        found.append(
            f"<b>The images depend on each other.</b> They are overlapping crops, {len(embedded.CROPS)} of each of "
            f"{photographs} photographs: no spread, interval or CKA here is that of unrelated images."
        )
    narrow = [key for key, each in models.items() if 0 < results["models"][key]["images"]["n"] < each.width]
    if narrow:
        found.append(
            f"<b>Fewer images than numbers in a vector</b> ({names_of(narrow, models)}): the usual, biased CKA is "
            "inflated. Read the unbiased one, beside its null."
        )
    if any(pixels["skipped"] for _, _, pixels in all_images(results)):
        found.append('<b>Some images could not be used</b>: <a href="#skipped">which, and why</a>.')
    failing = [id for id, e in results["experiments"].items() if e.get("failed")]
    failing += [id for entry in results["models"].values() for id in entry.get("failed", {})]
    if failing:
        links = ", ".join(f'<a href="#{escape(id)}">{escape(id)}</a>' for id in dict.fromkeys(failing))
        found.append(f"<b>Some experiments failed</b>: {links}.")
    for failed in results.get("failed", {}).values():
        found.append(f"<b>{escape(failed['name'])} could not be run:</b> {escape(failed['reason'])}.")
    return "".join(f'<p class="warning" role="note">{text}</p>' for text in found)


def all_images(results: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Key of a model, name of a pass, and the images it used."""
    for key, entry in results["models"].items():
        yield key, "clean", entry["images"]
        for name, images in entry.get("other passes", {}).items():
            yield key, name, images


def is_random(claim: Mapping[str, Any]) -> bool:
    """Whether a claim was tested on models of random weights, which prove nothing."""
    return claim["on"].startswith("random")


def headline(results: Mapping[str, Any], models: Mapping[str, About]) -> str:
    """How many of the paper's claims hold, of those that were tested on trained models."""
    paper = [c for c in results["claims"] if c["ordering"]]
    real = [c for c in paper if not is_random(c)]
    random = sum(is_random(c) and c["holds"] is not None for c in paper)
    trained = sum(each.weights == "trained" for each in models.values())
    tiles = [
        ("The paper’s claims that hold", sum(c["holds"] is True for c in real), "on trained weights"),
        ("that do not hold", sum(c["holds"] is False for c in real), "on trained weights"),
        ("not tested", sum(c["holds"] is None for c in real), "each claim says why"),
    ]
    if random:
        tiles.append(("run on random weights", random, "not evidence"))
    tiles.append(("Models", len(models), f"{trained} with trained weights"))
    cell = '<div><dt>{}</dt><dd class="value">{}</dd><dd class="range">{}</dd></div>'
    return "".join(cell.format(*tile) for tile in tiles)


def contents(told: Sequence[Experiment]) -> str:
    entries = [("claims", "Claims"), ("models", "Models"), *((e.id, f"{heading_of(e)}") for e in told)]
    entries.append(("made", "How this was made"))
    return "".join(f'<li><a href="#{escape(id)}">{escape(title)}</a></li>' for id, title in entries)


def heading_of(e: Experiment) -> str:
    return f"{e.id}. {e.title}" if place(e)[0] == 0 else e.title


# Claims


def verdict(claim: Mapping[str, Any]) -> str:
    kind, word = {True: ("yes", "holds"), False: ("no", "does not hold"), None: ("open", "not tested")}[claim["holds"]]
    random = is_random(claim) and claim["holds"] is not None
    mark = ' <span class="mark">random</span>' if random else ""
    return f'<span class="verdict {"pale" if random else kind}">{word}</span>{mark}'


def claims_in_order(claims: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The paper's orderings 1 to 5, then others; within each trained models first, and what was not tested last."""
    return sorted(claims, key=lambda c: (c["ordering"] or 99, is_random(c), c["holds"] is None))


def claims_table(claims: Sequence[Mapping[str, Any]], linked: Iterable[str] = (), grouped: bool = False) -> str:
    """Claim, holds or not, by how much, on what.

    Args:
      linked: experiments that have a section.
      grouped: under the ordering each belongs to.
    """
    linked, rows, before = set(linked), [], None
    for c in claims:
        if grouped and c["ordering"] != before:
            before = c["ordering"]
            title = f"The paper’s ordering {before}" if before else "Other statements"
            rows.append([f"<b>{title}</b>"])
        id = escape(c["experiment"])
        where = f' <a href="#{id}">{id}</a>' if c["experiment"] in linked else ""
        on = escape(c["on"]) or "–"
        rows.append([escape(stopped(c["text"])) + where, verdict(c), escape(minus(c["by"])), on])
    return table(("claim", "holds or not", "by how much", "on what"), rows, "claims")


def claims_section(results: Mapping[str, Any], told: Sequence[Experiment]) -> str:
    claims = claims_in_order(results["claims"])
    if not claims:
        return "<p>The experiments that were run state nothing to test.</p>"
    return claims_table(claims, [e.id for e in told], grouped=True)


# Models


def models_table(results: Mapping[str, Any], models: Mapping[str, About]) -> str:
    rows = []
    for each in ordered(models):
        entry = results["models"][each.key]
        images, patches = entry["images"], " × ".join(map(str, entry["patches"]))
        random = ' <span class="mark">random</span>' if each.weights == "random" else ""
        registers = f"{each.registers}, {REGISTERS[each.registers_are]}" if each.registers else "none"
        rows.append(
            [
                escape(each.name) + random,
                escape(f"{each.family} {each.size}"),
                f"{each.depth} × {each.width}, {count(each.heads, 'head')}",
                f"{each.parameters / 1e6:,.1f} M" if each.parameters >= 1e6 else f"{each.parameters:,}",
                registers,
                each.weights,
                f"{entry['pixels']} px, {patches}",
                f"{images['n']:,}" + (f" ({len(images['skipped'])} skipped)" if images["skipped"] else ""),
            ]
        )
    head = (
        "model",
        "family, size",
        "blocks × width",
        "parameters",
        "registers",
        "weights",
        "pixels, patches",
        "images",
    )
    return table(head, rows, "models", (3, 7))


def sources(results: Mapping[str, Any], models: Mapping[str, About]) -> str:
    """Where the weights of each model come from, and which have registers of which kind."""
    words = []
    for kind, text in (("trained", "trained with registers"), ("test-time", "given test-time registers")):
        if keys := [key for key, each in models.items() if each.registers_are == kind]:
            words.append(f"{names_of(keys, models)} {'was' if len(keys) == 1 else 'were'} {text}.")
    rows = []
    for each in ordered(models):
        source = {name: value for name, value in each.source.items() if not isinstance(value, Mapping)}
        where = "; ".join(f"{name}: {plain(value)}" for name, value in source.items())
        rows.append([escape(each.name), escape(where) or "–"])
    words.append("Checksums are in the last section.")
    return (
        f"<h3>Where the weights come from</h3>{table(('model', 'source'), rows, 'sources')}"
        f'<p class="note">{" ".join(words)}</p>'
    )


# One experiment


def section(
    e: Experiment,
    results: Mapping[str, Any],
    models: Mapping[str, About],
    figures: Mapping[str, Figure],
    passes: Sequence[Pass],
) -> str:
    each = results["experiments"][e.id]["results"]
    tag = f' <span class="tag">paper’s {escape(e.figure)}</span>' if e.figure else ""
    shown, captions = sentence(e.shown), [sentence(str(f.get_label())) for f in figures.values()]
    parts = [f'<section id="{escape(e.id)}"><h2>{escape(heading_of(e))}{tag}</h2>']
    if shown and all(captions):  # it stands under no figure
        parts.append(f"<p>{escape(shown)}</p>")
    if figures:
        drawn = [
            figure_element(e, name, figure, caption or shown, in_short(e, results))
            for (name, figure), caption in zip(figures.items(), captions, strict=True)
        ]
        parts.append(f'<div class="figures">{"".join(drawn)}</div>')
    if broken(e, results):
        parts.append("<p>What failed is told below; the numbers are in results.json.</p>")
    elif not each:
        parts.append("<p>No model that was given has numbers for this experiment.</p>")
    elif (t := e.table(each, models)) is not None and t.rows:
        parts.append(told_table(t))
    if claims := claims_in_order(c for c in results["claims"] if c["experiment"] == e.id):
        parts.append(f'<h3 id="{claims_id(e)}">Claims</h3>{claims_table(claims)}')
    run = numbers_of_images(e, results, models) + left_out(e, results, models)
    parts.append(f'<div class="notes"><div>{run}</div>{choices(e, results, passes)}</div>')
    parts.append("" if broken(e, results) else controls(e, each, results, models))
    return "".join(parts) + "</section>"


def claims_id(e: Experiment) -> str:
    return f"{escape(e.id)}-claims"


def in_short(e: Experiment, results: Mapping[str, Any]) -> str:
    """Below each figure: of how many images it is, with which choices, and what became of the claims."""
    ns = images_of_passes(e, results)
    told = ["; ".join(f"n = {spread(found)}{PASSES.get(name, f' with {name}')}" for name, found in ns.items())]
    taken = results.get("options", {}).get(e.id, {})
    changed = [
        f"{option.name.replace('_', ' ')} {plain(taken[option.name])}"
        for option in e.options
        if option.name in taken and plain(taken[option.name]) != plain(option.default)
    ]
    told.append(", ".join(changed) or ("default readings" if e.options else ""))
    words = [escape(text) for text in told if text]
    if verdicts := verdicts_in_short([c for c in results["claims"] if c["experiment"] == e.id]):
        words.append(f'<a href="#{claims_id(e)}">{verdicts}</a>')
    return " · ".join(words)


def spread(found: Mapping[int, Any]) -> str:
    """How many images, over models."""
    low, high = min(found), max(found)
    return count(high) if low == high else f"{low:,} to {count(high)}"


def verdicts_in_short(claims: Sequence[Mapping[str, Any]]) -> str:
    """How many hold of those tested on trained weights, and how many were not."""
    real = [c["holds"] for c in claims if not is_random(c)]
    tested, missing = sum(holds is not None for holds in real), sum(holds is None for holds in real)
    random = sum(is_random(c) and c["holds"] is not None for c in claims)
    words = []
    if tested:
        verb = "holds" if tested == 1 and any(real) else "hold"
        words.append(f"{sum(holds is True for holds in real)} of {count(tested, 'claim')} {verb}")
    if missing:
        words.append(f"{missing} not tested" if tested else f"{count(missing, 'claim')} not tested")
    if random:
        words.append(f"{random} on random weights, no evidence")
    return ", ".join(words)


def figure_element(e: Experiment, name: str, figure: Figure, caption: str, facts: str) -> str:
    """A figure at its natural size, or smaller where the page is; never so small that it cannot be read."""
    width = figure.get_figwidth()
    id = "figure-" + re.sub(r"[^\w-]", "-", f"{e.id}-{name}")
    below = f'<figcaption>{escape(caption)}<span class="facts">{facts}</span></figcaption>'
    return (
        f'<figure id="{id}"><div class="chart" tabindex="0" style="--natural:{96 * width:.0f}px;'
        f'--least:{72 * NARROWEST * width:.0f}px">{inline_svg(figure, id, caption or e.title)}</div>{below}</figure>'
    )


def images_of_passes(e: Experiment, results: Mapping[str, Any]) -> dict[str, dict[int, list[str]]]:
    """n of every pass that was read -> the models that have numbers."""
    each = results["experiments"][e.id]["results"]
    told: dict[str, dict[int, list[str]]] = {}
    for name in e.passes:
        for key, of_pass, images in all_images(results):
            if of_pass == name and key in each and images["n"]:
                told.setdefault(name, {}).setdefault(images["n"], []).append(key)
    return told


def numbers_of_images(e: Experiment, results: Mapping[str, Any], models: Mapping[str, About]) -> str:
    """n of every pass that was read, for the models that have numbers."""
    each = results["experiments"][e.id]["results"]
    told = []
    for name, found in images_of_passes(e, results).items():
        many = len(found) > 1
        ns = "; ".join(f"{count(n)}{f' ({names_of(keys, models)})' if many else ''}" for n, keys in found.items())
        told.append(ns + PASSES.get(name, f" with {escape(name)}"))
    random = [key for key in each if key in models and models[key].weights == "random"]
    text = f'<p class="note"><b>Images.</b> n = {"; ".join(told)}.</p>' if told else ""
    if random:
        text += f'<p class="note"><b>Random weights, not evidence.</b> {names_of(random, models)}.</p>'
    return text


def choices(e: Experiment, results: Mapping[str, Any], passes: Sequence[Pass]) -> str:
    """Every choice the paper leaves open, as it was taken, and those of the passes it reads."""
    found = [(o, e.id) for o in e.options] + [(o, p.name) for p in passes if p.name in e.passes for o in p.options]
    if not found:
        return ""
    taken = results.get("options", {})
    items = "".join(f"<li>{choice(o, taken.get(of, {}).get(o.name, o.default))}</li>" for o, of in found)
    return f'<div class="note"><b>Choices.</b><ul>{items}</ul></div>'


def choice(option: Option, value: Any) -> str:
    same = plain(value) == plain(option.default)  # JSON turns tuples into lists
    mark = "" if same else f' <span class="mark">not the default, {escape(plain(option.default))}</span>'
    name = escape(option.name.replace("_", " "))
    return f"{name}: <b>{escape(plain(value))}</b>{mark} – {escape(option.help)}"


def left_out(e: Experiment, results: Mapping[str, Any], models: Mapping[str, About]) -> str:
    """Models without numbers, and why; and what failed."""
    notes = []
    for title, kind in (("Failed", "failed"), ("Left out", "not run")):
        reasons: dict[str, list[str]] = {}
        for key, entry in results["models"].items():
            if reason := entry.get(kind, {}).get(e.id):
                reasons.setdefault(reason, []).append(key)
        items = [f"{names_of(keys, models)}: {escape(reason)}" for reason, keys in reasons.items()]
        items += [escape(reason) for reason in broken(e, results)] if kind == "failed" else []
        if items:
            told = "".join(f"<li>{item}</li>" for item in items)
            notes.append(f'<div class="note"><b>{title}.</b><ul>{told}</ul></div>')
    return "".join(notes)


def broken(e: Experiment, results: Mapping[str, Any]) -> Sequence[str]:
    """What could not be made of all models."""
    return results["experiments"][e.id].get("failed", ())


def control_in_words(name: str) -> str:
    """ "registers zero last" -> "registers: zero, at the last block"; other names as they are."""
    if name == NONE:
        return "nothing replaced"
    words = name.rsplit(" ", 2)
    if len(words) < 3 or words[2] not in PLACES:
        return name
    tokens = "[CLS]" if words[0] == "cls" else words[0]
    return f"{tokens}: {words[1]}, {PLACES[words[2]]}"


def controls(
    e: Experiment, each: Mapping[str, Mapping[str, Any]], results: Mapping[str, Any], models: Mapping[str, About]
) -> str:
    """The experiment's own table under every control, row by row, and of the same images without."""
    names = in_order(dict.fromkeys(name for numbers in each.values() for name in numbers.get("controls", {})))
    head: Sequence[str] = ()
    rows: dict[str, list[list[str]]] = {}
    for name in names:
        under = {key: numbers["controls"][name] for key, numbers in each.items() if name in numbers.get("controls", {})}
        if (t := e.table(under, models)) is not None:
            head = t.head
            for row in t.rows:
                rows.setdefault(row[0], []).append([control_in_words(name), *row[1:]])
    tables = []
    for first, of_row in rows.items():
        t = Table(("", *head[1:]), of_row)
        title = escape(first).replace("\n", " ")
        tables.append(f"<h4>{title}</h4>{told_table(t)}")
    if not tables:
        return ""
    images = [i["n"] for key, name, i in all_images(results) if name == "controls" and key in each]
    n = f", n = {', '.join(f'{n:,}' for n in sorted(set(images)))}" if images else ""
    replaced = sum(name != NONE for name in names)
    return (
        f"<details><summary>Under {count(replaced, 'replacement control')}{n}</summary>"
        '<p class="note">The table above, measured again while registers or [CLS] are replaced: by zeros, by their '
        "mean over images, by Gaussian noise of their mean and variance, by another image’s for each image, or by "
        "those of one image for all. To be compared with the first row of each, which replaces nothing in the same "
        f"images.</p>{''.join(tables)}</details>"
    )


# How it was made


def made(results: Mapping[str, Any]) -> str:
    options = {
        name: "; ".join(f"{option.replace('_', ' ')}: {plain(value)}" for option, value in values.items())
        for name, values in results.get("options", {}).items()
        if values
    }
    groups = {
        "Run": {"device": results.get("device"), **results["request"], "schema of results.json": results["schema"]},
        "Images": results["images"],
        "Images with classes": results.get("labelled") or {},
        "Versions": results.get("versions", {}),
        "Options": options,
    }
    return "".join(
        f"<div><h3>{title}</h3>{table((), flat(values))}</div>" for title, values in groups.items() if values
    )


def of_models(results: Mapping[str, Any], models: Mapping[str, About]) -> str:
    """Source, checksums and config of every model."""
    shown = []
    for each in ordered(models):
        entry = results["models"][each.key]
        images = entry["images"]
        other = {
            f"{name}: {what}": of_pass[what]
            for name, of_pass in entry.get("other passes", {}).items()
            for what in ("n", "sha256 of the prepared pixels")
        }
        groups = {
            "Source of the weights": {"weights": each.weights, **each.source},
            "Images": {"used": images["n"], "skipped": len(images["skipped"])}
            | {"sha256 of the prepared pixels": images["sha256 of the prepared pixels"]}
            | other,
            "Config": each.config,
        }
        tables = "".join(f"<div><h3>{title}</h3>{table((), flat(values))}</div>" for title, values in groups.items())
        name = escape(each.name if each.name == each.key else f"{each.name} ({each.key})")
        shown.append(f'<details><summary>{name}</summary><div class="made">{tables}</div></details>')
    return "".join(shown)


def skipped(results: Mapping[str, Any], models: Mapping[str, About]) -> str:
    """Images that could not be used: each once, with the models and passes that left it out."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for key, _, images in all_images(results):
        for entry in images["skipped"]:
            found.setdefault((entry["image"], entry["error"]), {})[key] = None
    rows = [
        [escape(image), escape(error), "all models" if len(keys) == len(models) else names_of(keys, models)]
        for (image, error), keys in found.items()
    ]
    if not rows:
        return ""
    of_images = table(("image", "error", "left out of"), rows)
    return f'<h3 id="skipped">Skipped images</h3><div class="skipped">{of_images}</div>'
