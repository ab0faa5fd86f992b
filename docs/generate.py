"""Pages and pictures of the documentation that follow from the code: models, names, sites, experiments.

They are made anew at each build, into docs/generated, so that they cannot drift from what they describe.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import figures

import jaxvit
from jaxvit import SITES, convert
from jaxvit.convert.catalogue import known
from jaxvit.convert.published import architectures
from jaxvit.experiments.core.experiment import Experiment
from jaxvit.experiments.runner.registry import EXPERIMENTS

NOTEBOOKS = "notebooks"


def everything(docs: Path) -> None:
    """Writes all generated pages, and removes those of before that are no more.

    A file that would be the same is left alone, so that Sphinx does not read it anew.
    """
    place = docs / "generated"
    before = {path for path in place.rglob("*") if path.is_file()}
    WRITTEN.clear()
    write(place / "sites.svg", sites_svg())
    write(place / "models.md", models_page())
    told = json.loads(figures.TOLD.read_text(encoding="utf-8"))
    for e in EXPERIMENTS.values():
        name = f"{e.id.lower()}.md"
        written = (docs / "experiments" / name).read_text(encoding="utf-8")
        write(place / "experiments" / name, experiment_page(e, told, written))
    write(place / "experiments" / "index.md", experiment_index())
    pages = dict(api_pages((docs / "names.md").read_text(encoding="utf-8")))
    for name, page in pages.items():
        write(place / "api" / f"{name}.md", page)
    write(place / "api" / "index.md", api_index(pages))
    notebooks(docs, place / "download" / NOTEBOOKS)
    data_of_notebooks(docs)
    for path in before - WRITTEN:
        path.unlink()


WRITTEN: set[Path] = set()


def write(path: Path, text: str) -> None:
    WRITTEN.add(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def notebooks(docs: Path, out: Path) -> None:
    """Each notebook also as .ipynb, to be downloaded and run elsewhere."""
    import jupytext

    for path in sorted((docs / NOTEBOOKS).glob("*.md")):
        if path.stem != "index":
            write(out / f"{path.stem}.ipynb", jupytext.writes(jupytext.read(path), fmt="ipynb"))


def data_of_notebooks(docs: Path) -> None:
    """Notebooks run in their own folder, and find the checkout's weights and photographs there."""
    link = docs / NOTEBOOKS / ".data"
    if not link.is_symlink():
        (docs.parent / ".data").mkdir(exist_ok=True)
        link.symlink_to(Path("..", "..", ".data"))


# Models ---------------------------------------------------------------------------------------------------------------


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """A table that readers can search, by search-tables.js."""
    lines = [row(*head), "|" + "---|" * len(head), *(row(*cells) for cells in rows)]
    return "\n".join([":::{div} searchable", *lines, ":::"])


def models_page() -> str:
    """Every known checkpoint, and every architecture of timm."""
    published = [
        (
            *(each.family, each.name, "<br>".join(f"`{source}`" for source in each.sources)),
            *(f"{each.parameters / 1e6:.0f} M", f"{each.config.depth} x {each.config.width}", each.config.heads),
            *(each.config.registers, each.config.patch, " x ".join(map(str, native(each.config))), each.licence),
        )
        for each in known()
    ]
    timm = [(f"`{name}`", *of_timm(facts)) for name, facts in architectures().items()]
    refused = sum("refused" in facts for facts in architectures().values())
    return f"""# Models

`jaxvit convert SOURCE DEST` and `jaxvit.convert.load(SOURCE)` take a hub id, a file or a folder. `jaxvit list` prints
the first table. How equal each is to its original: [families](../families.md), [timm's names](../architectures.md).

## Published checkpoints

Type to search. Pixels are those of the grid that the weights were trained at; other multiples of the patch work too.
Licences are as published; check them at the source.

{
        table(
            (
                *("family", "model", "sources", "parameters", "depth x width", "heads", "registers", "patch"),
                *("pixels", "licence"),
            ),
            published,
        )
    }

## Architectures of timm

{len(timm) - refused} names of timm's plain Vision Transformers convert, and {
        refused
    } are refused, with the reason. Weights
that timm publishes under a tag of such a name have the preparation of that tag.

{table(("name", "depth x width", "heads", "MLP", "pooled", "tags with a preparation"), timm)}
"""


def native(config: jaxvit.ViTConfig) -> tuple[int, ...]:
    return tuple(side * config.patch for side in config.grid)


def of_timm(facts: dict[str, object]) -> tuple[object, ...]:
    if "refused" in facts:
        return ("", "", "", "refused", facts["refused"])
    depth, width, cls = facts["shape"]  # pyright: ignore[reportGeneralTypeIssues]
    prepared: list[dict[str, list[str]]] = facts.get("prepared", [])  # pyright: ignore[reportAssignmentType]
    tags = ", ".join(tag for each in prepared for tag in each["tags"] if tag)
    pool = facts.get("pool", "cls" if cls else "mean")
    return (f"{depth} x {width}", facts["heads"], facts.get("mlp", "gelu"), pool, tags)


# Experiments ----------------------------------------------------------------------------------------------------------


def experiment_page(e: Experiment, told: dict[str, Any], written: str) -> str:
    """What an experiment computes, its options, its command, and what the demo's models show.

    Args:
      told: what docs/figures.py took from a run.
      written: the page of docs/experiments, which says how to read the figures; the numbers of the run go behind it.
    """
    # At home in docs/generated/experiments: links go up, but those to its neighbours.
    text = [re.sub(r"\]\(\.\./", "](../../", written.strip()), *numbers_of(e, told)]
    return "\n\n".join([*text, "## What its command says", f"```text\n{e.help.strip()}\n```"]) + "\n"


def numbers_of(e: Experiment, told: dict[str, Any]) -> list[str]:
    """The table of a run, and the statements that it tests."""
    text = []
    if (table := told["tables"].get(e.id)) is not None:
        lines = [row(*table["head"]), "|" + "---|" * len(table["head"]), *(row(*each) for each in table["rows"])]
        text += ["## The numbers", "\n".join(lines), *filter(None, [table["note"]])]
    if claims := told["claims"].get(e.id):
        verdicts = {True: "holds", False: "does not hold", None: "not decided"}
        rows = [(verdicts[claim["holds"]], claim["text"], claim["on"], claim["by"]) for claim in claims]
        head = [row("", "statement", "on", "by"), "|---|---|---|---|"]
        text += ["## Statements that are tested", "\n".join([*head, *(row(*map(cell, each)) for each in rows)])]
    return [*text, "`make docs-data` makes these numbers, and the figures."]


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def experiment_index() -> str:
    pages = "\n".join(id.lower() for id in EXPERIMENTS)
    return (
        "# One page for each experiment\n\nA1 to A9 are figures and equations of the paper, B1 to B7 go beyond it.\n\n"
        f"```{{toctree}}\n:maxdepth: 1\n\n{pages}\n```\n"
    )


# Names ----------------------------------------------------------------------------------------------------------------

MODULES = {"decompose": "jaxvit.analysis.decompose", "similarity": "jaxvit.analysis.similarity"}
MODULES |= {"grids": "jaxvit.interventions.grids", "parallel": "jaxvit.io.parallel", "convert": "jaxvit.convert"}
MODULES |= {"training": "jaxvit.training", "classify": "jaxvit.tasks.classify", "dense": "jaxvit.tasks.dense"}
MODULES |= {"match": "jaxvit.tasks.match", "score": "jaxvit.tasks.score"}


def api_pages(names: str) -> Iterator[tuple[str, str]]:
    """(name of a file, page) for each row of docs/names.md, which a test holds complete."""
    tasks: dict[str, list[str]] = {}
    last = ""
    for task, listed in re.findall(r"^\| ?([a-z ]*?) ?\| (.*`.*) \|$", names, re.MULTILINE):
        last = task or last
        tasks.setdefault(last, []).extend(re.findall(r"`(.*?)`", listed))
    told: set[str] = set()
    for task, listed in tasks.items():
        new = [name for name in dict.fromkeys(qualified(listed)) if name not in told]
        told.update(new)
        directives = "\n".join(directive(name) for name in new)
        yield task.replace(" ", "-"), f"# {task.capitalize()}\n\n```{{eval-rst}}\n{directives}\n```\n"


def qualified(listed: list[str]) -> Iterator[str]:
    """Full names: `grids.heads` `.tokens` are two functions of one module, methods are part of their class."""
    last = ""
    for name in (each.split("(")[0] for each in listed):
        start, _, rest = name.partition(".")
        if not start:
            if last in MODULES:
                yield f"{MODULES[last]}.{rest}"
        elif start == "model":
            yield "jaxvit.ViT"
        elif start in MODULES and rest:
            last = start
            yield f"{MODULES[start]}.{rest}"
        else:
            last = start
            yield f"jaxvit.{name}"


def directive(name: str) -> str:
    """How Sphinx documents what has this name."""
    value = resolved(name)
    if isinstance(value, type):
        if issubclass(value, Exception):
            return f".. autoexception:: {name}\n   :no-members:\n"
        own = [each for each, what in vars(value).items() if documented(each, what)]
        members = f":members: {', '.join(own)}" if own else ":no-members:"
        special = "\n   :special-members: __call__" if "__call__" in own else ""
        return f".. autoclass:: {name}\n   {members}{special}\n"
    if callable(value):
        return f".. autofunction:: {name}\n"
    assert name == "jaxvit.SITES", f"{name} is documented nowhere"
    listed = ", ".join(f"``{site}`` ({axes})" for site, axes in SITES.items())
    text = f"Every value that can be recorded and edited, with its axes in one layer: {listed}."
    return f".. py:data:: {name}\n\n   {text}\n"


def documented(name: str, what: object) -> bool:
    """Whether an entry of a class is a public method or property with a docstring."""
    function = what.fget if isinstance(what, property) else getattr(what, "__func__", what)
    public = name == "__call__" or not name.startswith("_")
    return public and isinstance(function, types.FunctionType) and bool(function.__doc__)


def resolved(name: str) -> object:
    """Raises an AttributeError if there is no such name."""
    import importlib

    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def api_index(pages: dict[str, str]) -> str:
    assert convert.load  # named on the page
    return (
        "# Reference\n\nEvery public name, by task. All names of `jaxvit` itself are attributes of the package.\n\n"
        + ("```{toctree}\n:maxdepth: 1\n\n" + "\n".join(pages) + "\n../../names\n```\n")
    )


# The picture of a block -----------------------------------------------------------------------------------------------

PLACES = {
    "resid_pre": (430, 20),
    "q": (30, 110),
    "k": (130, 110),
    "v": (250, 110),
    "scores": (80, 190),
    "pattern": (80, 260),
    "z": (165, 335),
    "attn_out": (165, 425),
    "skip_attn": (430, 225),
    "resid_mid": (430, 425),
    "mlp_pre": (165, 515),
    "mlp_post": (165, 605),
    "mlp_out": (165, 700),
    "skip_mlp": (430, 565),
    "resid_post": (430, 700),
}
"""Site -> left and top of its box."""
STEPS = {"norm1, qkv": (148, 37), "norm2, first matrix": (207, 480)}
"""What is computed where an arrow forks or turns -> the middle of its words."""
ARROWS = (
    ("resid_pre", "norm1, qkv", ""),
    ("norm1, qkv", "q", ""),
    ("norm1, qkv", "k", ""),
    ("norm1, qkv", "v", ""),
    ("q", "scores", ""),
    ("k", "scores", "q · k / √d"),
    ("scores", "pattern", "softmax"),
    ("pattern", "z", ""),
    ("v", "z", ""),
    ("z", "attn_out", "projection, LayerScale"),
    ("resid_pre", "skip_attn", ""),
    ("attn_out", "resid_mid", "+"),
    ("skip_attn", "resid_mid", ""),
    ("resid_mid", "norm2, first matrix", ""),
    ("norm2, first matrix", "mlp_pre", ""),
    ("mlp_pre", "mlp_post", "activation"),
    ("mlp_post", "mlp_out", "second matrix, LayerScale"),
    ("resid_mid", "skip_mlp", ""),
    ("mlp_out", "resid_post", "+"),
    ("skip_mlp", "resid_post", ""),
)
WIDE, TALL = 84, 34


def sites_svg() -> str:
    """One block with all its sites, as `SITES` lists them. Raises a ValueError if the picture lacks one."""
    if list(PLACES) != list(SITES):
        raise ValueError(f"docs/generate.py places {list(PLACES)}, the sites are {list(SITES)}")
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 560 770" width="560" font-family="sans-serif" role="img" '
        'aria-label="One block of the model, with the sites that can be recorded and edited">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#666"/></marker></defs>',
        '<rect width="560" height="770" fill="#fff" rx="6"/>',
    ]
    for arrow in ARROWS:
        parts += drawn(*arrow)
    for text, (x, y) in STEPS.items():
        parts.append(f'<rect x="{x - 62}" y="{y - 13}" width="124" height="19" fill="#fff"/>')
        parts.append(text_at(x, y, text, 11))
    for site, (x, y) in PLACES.items():
        fill = "#fde9c8" if site.startswith(("resid", "skip")) else "#d6e6f5"
        parts.append(f'<rect x="{x}" y="{y}" width="{WIDE}" height="{TALL}" rx="5" fill="{fill}" stroke="#555"/>')
        middle = x + WIDE / 2
        parts.append(text_at(middle, y + 15, site, 12, "bold"))
        parts.append(text_at(middle, y + 28, SITES[site], 10))
    parts.append(text_at(430, 755, "to the next block, or to the final norm", 11))
    return "\n".join([*parts, "</svg>\n"])


def drawn(start: str, end: str, text: str) -> list[str]:
    """An arrow from one box or step to another, and words beside it."""

    def box(name: str) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        if name in STEPS:
            x, y = STEPS[name]
            return x - 40, y - 12, x + 40, y + 5
        x, y = PLACES[name]
        return x, y, x + WIDE, y + TALL

    a, b = box(start), box(end)
    level = min(a[3], b[3]) > max(a[1], b[1])
    x1, x2 = (a[0] + a[2]) / 2, (b[0] + b[2]) / 2
    if level:  # from side to side
        x1, x2 = (a[2], b[0]) if x1 < x2 else (a[0], b[2] + 22 * (end in STEPS))
        y1 = y2 = (max(a[1], b[1]) + min(a[3], b[3])) / 2
    elif end in STEPS:  # down, then to the side
        y1, y2, x2 = a[3], (b[1] + b[3]) / 2, b[2]
        return [f'<path d="M{x1 - 24} {y1} V{y2} H{x2 + 22}" {LINE} fill="none"/>']
    else:
        y1, y2 = a[3], b[1]
    found = [f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" {LINE}/>']
    if text:
        dy = -6 if level else 4
        found.append(text_at((x1 + x2) / 2 + 7, (y1 + y2) / 2 + dy, text, 11, anchor="start"))
    return found


LINE = 'stroke="#666" stroke-width="1.3" marker-end="url(#tip)"'


def text_at(x: float, y: float, text: str, size: int, weight: str = "normal", anchor: str = "middle") -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="#222">'
        f"{escape(text)}</text>"
    )
