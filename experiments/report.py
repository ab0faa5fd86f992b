"""One page for people: the numbers of `experiments.last_layer`, drawn. A single file that needs nothing else."""

# ruff: noqa: RUF001 (what people read has true minus signs and apostrophes)

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from experiments import embedded
from experiments.last_layer import Example

Statistics = Mapping[str, Any]
"""What `experiments.running.Running.result` gives."""

COLOURS = {
    "skip": "#009e73",
    "cls": "#cc79a7",
    "registers": "#d55e00",
    "patches": "#0072b2",
    "bias": "#50555c",
    "mlp": "#e0a100",
}
"""One colour for each summand of [CLS], the same everywhere, in the order of drawing (after Okabe and Ito)."""
LABELS = {"skip": "skip path", "cls": "[CLS] itself", "registers": "registers", "patches": "patches"}
LABELS |= {"bias": "bias", "mlp": "MLP"}
PARTS = {"patches": "patches’ part", "registers": "registers’ part", "skip": "skip path"}

TEMPLATE = Path(__file__).with_name("report.html")
INK, QUIET, RULE = "#1d2228", "#5c6670", "#dde1e5"
WIDTH, LEFT, RIGHT, BELOW = 440, 98, 64, 42  # of a chart, and of its margins, in pixels
MAX_POINTS = 250  # drawn under one distribution
MAX_SIDE = 288  # of an embedded picture, in pixels
MARGIN = 0.05  # CKAs closer than this are not ranked
STYLE = {
    "svg.fonttype": "none",  # text stays text; report.html replaces the font
    "svg.hashsalt": "jaxvit",
    "font.size": 12.5,
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.labelsize": 12,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
}

_warm = colormaps["inferno"](np.linspace(0.45, 1, 255))
_warm[:, 3] = 0.9 * np.linspace(0, 1, 255) ** 1.2
ATTENTION = (_warm * 255).round().astype(np.uint8)  # [255, RGBA]: transparent to bright
_signed = LinearSegmentedColormap.from_list("", ["#6b3a00", "#c98a3c", "#f4f2ee", "#5aa3d0", "#004a78"])
CONTRIBUTION = (_signed(np.linspace(0, 1, 255)) * 255).round().astype(np.uint8)


def write_report(path: Path, results: dict[str, Any], examples: list[Example]) -> None:
    """Writes the page: the same bytes for the same input.

    Args:
      results: what `analyse` returns as results, with what was run (model, versions, ...), as in results.json.
      examples: the images to show, all of them.
    """
    fragments = {
        "colours": "; ".join(f"--{name}: {colour}" for name, colour in COLOURS.items()),
        "attention_bar": gradient(ATTENTION),
        "contribution_bar": gradient(CONTRIBUTION),
        "max_points": str(MAX_POINTS),
    }
    with matplotlib.style.context(["default", STYLE]):
        for section in (header, mass, cosines, norms, depth, cka, made):
            fragments |= section(results)
        shown = map(example_figure, examples)
        fragments["examples"] = "".join(shown) or "<p>No image was chosen to be shown.</p>"
        fragments["shown"] = str(len(examples))
    path.write_text(Template(TEMPLATE.read_text(encoding="utf-8")).substitute(fragments), encoding="utf-8")


# Words and numbers


def number(x: float, digits: int = 3) -> str:
    """Rounded; with a true minus sign, and never minus zero; NaN is "undefined"."""
    if math.isnan(x):
        return "undefined"
    return f"{round(x, digits) or 0:.{digits}f}".replace("-", "−")


def percent(x: float) -> str:
    return f"{number(100 * x, 1)}\N{NO-BREAK SPACE}%"


def length(x: float) -> str:
    return number(x, 2)


def between(statistics: Statistics, form: Callable[[float], str] = number) -> str:
    low, high = (form(statistics["quantiles"][q]) for q in ("0.05", "0.95"))
    return f"{low} to {high}"


def listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def count(n: int) -> str:
    return "1 image" if n == 1 else f"{n} images"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of HTML; the first of each row is its heading."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>" for first, *rest in rows)
    top = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def swatch(name: str) -> str:
    return f'<span class="swatch" style="background:var(--{name})"></span>{LABELS[name]}'


# What varies in each section of report.html


def header(results: dict[str, Any]) -> dict[str, str]:
    images, choices, config = results["images"], results["choices"], results["model"]["config"]
    name, n, skipped = escape(results["model"]["name"]), images["n"], len(images["skipped"])
    registers = "registers" in results["A1"]["mass"]
    run = (
        count(n),
        f"{choices['size in pixels']} pixels, {' × '.join(map(str, choices['patches']))} patches",
        f"{config['registers']} registers" if registers else "no registers",
        f"block {config['depth']} of {config['depth']}",
        f"vectors of {config['width']} numbers",
    )
    extent = f"One model, {count(n)}."
    if n < config["width"]:
        extent += " There are fewer images than numbers in a vector, which inflates the biased CKA; see its null."
    if Path(images.get("folder", "")) == embedded.DATA / "photographs":
        extent += (
            f" The images are overlapping crops, {len(embedded.CROPS)} of each of "
            f"{sum(map(len, embedded.PHOTOGRAPHS.values()))} photographs: they are not independent, "
            "and no spread shown here is that of unrelated images."
        )
    warning = (
        f'<p class="warning" role="note">{skipped} of {count(skipped + n)} could not be used: '
        '<a href="#skipped">which, and why</a>.</p>'
    )
    return {
        "title": f"Last layer of {name}",
        "model": name,
        "images": count(n),
        "sampled": sampled(results["A1"]["mass"]["patches"]),
        "run": " · ".join(run),
        "warning": warning if skipped else "",
        "headline": headline(results),
        "verdict": verdict(results),
        "extent": extent,
        "others": "[CLS] itself, the registers" if registers else "[CLS] itself",
    }


def sampled(statistics: Statistics) -> str:
    every = statistics["sampled_every"]
    note = "" if every == 1 else f" (dots, densities and quantiles: one in {every}; means: all)"
    return count(statistics["n"]) + note


def headline(results: dict[str, Any]) -> str:
    a1, a9, ratio = results["A1"]["mass"], results["A9"], results["A7"]["skip over patches"]
    tiles = [
        (f"Mean attention on {name}", percent(a1[name]["mean"]), f"5–95 %: {between(a1[name], percent)}")
        for name in ("patches", "registers")
        if name in a1
    ]
    tiles += [
        (
            f"CKA with [CLS], {PARTS[name]}",
            number(a9[name]["unbiased"]).replace("undefined", "–"),
            f"unbiased, n = {a9[name]['n']}",
        )
        for name in PARTS
        if name in a9
    ]
    tiles.append(("Mean ratio of lengths, skip path ÷ patches", number(ratio["mean"]), f"5–95 %: {between(ratio)}"))
    for before in results["A8"]["raw"][-2:-1]:
        tiles.append(("Mean cosine with [CLS] one block before", number(before["mean"]), f"5–95 %: {between(before)}"))
    cell = '<div><dt>{}</dt><dd class="value">{}</dd><dd class="range">{}</dd></div>'
    return "".join(cell.format(*tile) for tile in tiles)


def verdict(results: dict[str, Any]) -> str:
    """Two sentences: the numbers, and which of the two signs of decoupling they show."""
    a1, norm, a9 = results["A1"]["mass"], results["A7"]["norm"], results["A9"]
    similar = [f"{number(a9[name]['unbiased'])} for the {PARTS[name]}" for name in PARTS if name in a9]
    rival = "registers" if "registers" in a9 else "skip"
    ahead = a9[rival]["unbiased"] - a9["patches"]["unbiased"]
    first, second = ahead > MARGIN, norm[rival]["mean"] > norm["patches"]["mean"]
    shown = {(1, 1): "both", (1, 0): "only the first", (0, 1): "only the second", (0, 0): "neither"}[first, second]
    found = f"shows <b>{shown}</b>"
    if math.isnan(ahead):
        found = f"cannot tell the first, and <b>{'shows' if second else 'does not show'} the second</b>"
    return (
        f"On average the last attention row of [CLS] falls {falls(a1)}; the linear CKA with [CLS] after attention "
        f"is {listed(similar)} (unbiased). Of two signs of a [CLS] decoupled from patches – that the {PARTS[rival]} "
        f"follows [CLS] more closely than the patches’ part does (CKA higher by over {MARGIN}, a margin chosen here), "
        f"and that it is on average the longer of the two – this run {found}."
    )


def falls(a1: Mapping[str, Statistics]) -> str:
    """Where the attention row goes, in words."""
    names = [name for name in ("patches", "registers", "cls") if name in a1]
    return listed([f"{percent(a1[name]['mean'])} on {LABELS[name]}" for name in names])


def mass(results: dict[str, Any]) -> dict[str, str]:
    a1 = results["A1"]["mass"]
    rows = [Row(LABELS[name], COLOURS[name], a1[name]) for name in COLOURS if name in a1]
    note = ""
    if "registers" in a1:
        ratio = share_of_registers(a1)
        rows.append(Row("registers ÷\n(registers +\npatches)", COLOURS["registers"], ratio))
        note = f" The last row is the measure of the paper’s figure, {number(ratio['mean'])} on average."
    return {
        "mass_found": f"On average the row falls {falls(a1)}.",
        "mass_chart": chart(ridges("mass", "Attention mass by kind of token", rows, "share of the row", (0, 1))),
        "mass_registers": note,
    }


def share_of_registers(a1: Mapping[str, Statistics]) -> dict[str, Any]:
    """Statistics of registers ÷ (registers + patches), from the samples, which are of the same images."""
    registers, patches = (np.asarray(a1[name]["sample"]) for name in ("registers", "patches"))
    ratio = registers / (registers + patches)
    quantiles = {q: float(np.quantile(ratio, float(q))) for q in a1["patches"]["quantiles"]}
    return {"mean": float(ratio.mean()), "quantiles": quantiles, "sample": ratio.tolist()}


def cosines(results: dict[str, Any]) -> dict[str, str]:
    a5 = results["A5"]["cosine with the update"]
    names = [name for name in COLOURS if name in a5]
    limits = (math.floor(10 * min(0.0, *(statistics["min"] for statistics in a5.values()))) / 10, 1.0)
    panels = []
    for title, suffix in (("Bias included", ""), ("Without the bias", " without bias")):
        rows = [Row(LABELS[name], COLOURS[name], a5[name + suffix]) for name in names]
        description = f"Cosine with the update, {title.lower()}"
        panels.append(ridges(f"cosine{len(panels)}", description, rows, "cosine with the update", limits, title=title))
    means = {name: number(statistics["mean"]) for name, statistics in a5.items()}
    found = [
        f"{means[name]} for the {PARTS[name]} ({means[f'{name} without bias']} without the bias)" for name in names
    ]
    return {
        "cosine_found": f"The mean cosine with the update is {listed(found)}.",
        "cosine_charts": "".join(map(chart, panels)),
    }


def norms(results: dict[str, Any]) -> dict[str, str]:
    norm, share, ratio = (results["A7"][name] for name in ("norm", "share", "skip over patches"))
    names = [name for name in COLOURS if name in share]
    rows = [Row(LABELS[name], COLOURS[name], norm[name]) for name in names]
    total = number(sum(share[name]["mean"] for name in names))
    cells = [
        [length(norm[name]["mean"]), between(norm[name], length), number(share[name]["mean"]), between(share[name])]
        for name in names
    ]
    numbers = [[swatch(name), *row] for name, row in zip(names, cells, strict=True)]
    numbers.append(["their sum", length(norm["output"]["mean"]), between(norm["output"], length), total, ""])
    ends = (0, 1.04 * max(norm[name]["max"] for name in names) or 1)
    ratio_row = [Row("skip path ÷\npatches’ part", COLOURS["skip"], ratio)]
    ratio_ends = (0, max(1.2, 1.04 * ratio["max"]))
    largest = max(names, key=lambda name: share[name]["mean"])
    return {
        "norms_found": f"The skip path is on average {number(ratio['mean'])} times as long as the patches’ part. "
        f"The largest share of the output is {number(share[largest]['mean'])} ({LABELS[largest]}); all sum to {total}.",
        "norms_charts": chart(ridges("norms", "Norms of the summands", rows, "Euclidean norm", ends, 2, "Length"))
        + chart(
            waterfall("shares", {name: share[name] for name in names}),
            ridges(
                "ratio",
                "Ratio of norms",
                ratio_row,
                "ratio; black line: 1",
                ratio_ends,
                title="Ratio of lengths",
                mark=1,
            ),
        ),
        "norms_table": table(("", "norm, mean", "5 to 95 %", "share, mean", "5 to 95 %"), numbers, "numbers"),
    }


def depth(results: dict[str, Any]) -> dict[str, str]:
    curves = {name: results["A8"][name] for name in ("raw", "after the final norm")}
    low = min(0.0, *(layer["quantiles"]["0.05"] for curve in curves.values() for layer in curve))
    panels = [depth_chart(f"depth{i}", *curve, (low - 0.04, 1.05)) for i, curve in enumerate(curves.items())]
    found = "There is no block before the last."
    if len(curves["raw"]) > 1:
        before = [f"{number(curve[-2]['mean'])} {name}" for name, curve in curves.items()]
        found = f"One block before the last, the mean cosine is {listed(before)}."
    return {"depth_found": found, "depth_charts": "".join(map(chart, panels))}


def cka(results: dict[str, Any]) -> dict[str, str]:
    a9 = {name: results["A9"][name] for name in COLOURS if name in results["A9"]}
    values = [f"{number(value['unbiased'])} for the {PARTS[name]}" for name, value in a9.items()]
    found = f"The unbiased CKA with [CLS] after attention is {listed(values)}."
    if any(math.isnan(value["unbiased"]) for value in a9.values()):
        found += " It is undefined for fewer than 4 images, and for a part that does not vary."
    registers = " The paper’s figure 3a, of patches and registers, leaves the skip path out of [CLS]; here it is in."
    sizes = sorted(
        {
            f"n&nbsp;=&nbsp;{value['n']}, d₁&nbsp;=&nbsp;{value['d1']}, d₂&nbsp;=&nbsp;{value['d2']}"
            for value in a9.values()
        }
    )
    return {
        "cka_found": found,
        "cka_chart": chart(cka_chart("cka", a9)),
        "cka_sizes": "; ".join(sizes),
        "cka_registers": registers if "registers" in a9 else "",
    }


def made(results: dict[str, Any]) -> dict[str, str]:
    model, images, a1 = results["model"], results["images"], results["A1"]["mass"]["patches"]
    data = {"used": images["n"], "skipped": len(images["skipped"]), "in the sample: one in": a1["sampled_every"]}
    groups = {
        "Choices": results["choices"],
        "Model": {"name": model["name"], "parameters": f"{model['parameters']:,}", **model["config"]},
        "Source of the weights": model["source"],
        "Images": data | {name: value for name, value in images.items() if name not in ("n", "skipped")},
        "Run": {name: results[name] for name in ("experiment", "device", "seconds", "schema") if name in results},
        "Versions": results.get("versions", {}),
    }
    tables = (f"<div><h3>{title}</h3>{table((), flat(values))}</div>" for title, values in groups.items())
    rows = [[escape(entry["image"]), escape(entry["error"])] for entry in images["skipped"]]
    skipped = f'<h3 id="skipped">Skipped images</h3><div class="skipped">{table(("image", "error"), rows)}</div>'
    return {
        "made": "".join(tables),
        "skipped": skipped if rows else "",
        "command": escape(results.get("command", "")),
    }


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values as HTML, those of inner mappings behind the outer name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}: ")
        else:
            yield (
                escape(f"{prefix}{name}"),
                escape(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)),
            )


# Pictures


def example_figure(example: Example) -> str:
    """One image: photograph, attention over it, contributions, and its numbers."""
    photograph = Image.fromarray(example.pixels)
    photograph.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    pixels, s = data_uri(photograph, "JPEG", quality=88), example.scalars
    attention = example.maps["attention"].astype(np.float64)
    contribution = example.maps["contribution"] / max(float(s["norm update"]) ** 2, 1e-30)
    top, extent = attention.max() or 1.0, np.abs(contribution).max() or 1.0
    attended = map_picture(attention / top, ATTENTION, photograph.size)
    contributed = map_picture((contribution / extent + 1) / 2, CONTRIBUTION, photograph.size)
    name = escape(example.name)
    masses = [f"{LABELS[name]} <i>{percent(s[f'mass {name}'])}</i>" for name in COLOURS if f"mass {name}" in s]
    ends = [f"{number(100 * end, 2)} %" for end in (0, top, -extent, extent)]
    return (
        f'<figure class="example"><figcaption>{name}</figcaption><div class="tiles">'
        f'<div class="tile"><div class="stack"><img src="{pixels}" alt="{name}"></div>photograph</div>'
        f'<div class="tile"><div class="stack"><img class="under" src="{pixels}" alt="">'
        f'<img class="over" src="{attended}" alt="attention of [CLS] over {name}"></div>attention'
        f'<div class="bar attention"></div><div class="scale"><span>0</span><span>{ends[1]}</span></div></div>'
        f'<div class="tile"><div class="stack"><img src="{contributed}" alt="contribution of the patches of {name}">'
        f'</div>contribution<div class="bar contribution"></div><div class="scale"><span>{ends[2]}</span><span>0</span>'
        f"<span>{ends[3]}</span></div></div></div>"
        f'<div class="facts"><span>Attention: {", ".join(masses)}</span> '
        f"<span>Cosine of patches with update: <i>{number(s['cosine patches'])}</i>, without bias "
        f"<i>{number(s['cosine patches without bias'])}</i></span> "
        f"<span>All patches together: <i>{percent(contribution.sum())}</i> of ‖update‖²</span></div></figure>"
    )


def data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def map_picture(values: np.ndarray, colours: np.ndarray, size: tuple[int, int]) -> str:
    """A map in 0 to 1 [h, w], as a picture of (width, height) pixels in the 255 given colours."""
    smooth = Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    picture = Image.fromarray((np.asarray(smooth).clip(0, 1) * 254).round().astype(np.uint8))
    picture.putpalette(colours[:, :3].tobytes())
    return data_uri(picture, "PNG", optimize=True, transparency=colours[:, 3].tobytes())


def gradient(colours: np.ndarray) -> str:
    """The colours as a CSS background, transparent ones over the grey of a dimmed photograph."""
    stops = ", ".join(
        "rgba({}, {}, {}, {:.2f})".format(*c[:3], c[3] / 255) for c in colours[:: (len(colours) - 1) // 8]
    )
    return f"linear-gradient(90deg, {stops}), #4a4a4a"


# Charts


class Row(NamedTuple):
    label: str
    colour: str
    statistics: Statistics


def chart(*svgs: str) -> str:
    return f'<div class="chart">{"".join(svgs)}</div>'


def blank(
    height: float, limits: tuple[float, float], top: float = 28, left: float = LEFT, right: float = RIGHT
) -> tuple[Figure, Axes]:
    """A chart to put rows in: y counts pixels up from the x axis, labels go left of it and values right of it."""
    whole = height + BELOW + top
    figure = Figure(figsize=(WIDTH / 72, whole / 72), dpi=72)
    axes = figure.add_axes((left / WIDTH, BELOW / whole, (WIDTH - left - right) / WIDTH, height / whole))
    axes.set(xlim=limits, ylim=(0, height), yticks=[])
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.tick_params(length=3, width=0.8)
    axes.grid(axis="x", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def write(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    """Text at pixels from the lower left corner of the plot."""
    axes.annotate(text, (0, 0), (x, y), "axes fraction", "offset pixels", va="center", linespacing=1.15, **style)


def beside(axes: Axes, y: float, label: str = "", value: str = "", **style: Any) -> None:
    """Text left and right of a row."""
    write(axes, -9, y, label, ha="right", **style)
    write(axes, axes.bbox.width + 9, y, value, **style)


def heading(axes: Axes, title: str, values: str = "") -> None:
    """A title over the chart, and one over the values at its right."""
    write(axes, 0, axes.bbox.height + 14, title, weight="bold")
    beside(axes, axes.bbox.height + 14, value=values, color=QUIET)


def ridges(
    name: str,
    description: str,
    rows: list[Row],
    xlabel: str,
    limits: tuple[float, float],
    digits: int = 3,
    title: str = "",
    mark: float | None = None,
) -> str:
    """Distributions over images: density, single images, intervals and the mean."""
    step = 52
    figure, axes = blank(step * len(rows), limits)
    if mark is not None:
        axes.axvline(mark, color=INK, linewidth=1, zorder=1.5)
    for base, row in zip(range(step * (len(rows) - 1), -1, -step), rows, strict=True):
        s = row.statistics
        sample, q = np.asarray(s["sample"], float), s["quantiles"]
        x, density = smoothed(sample)
        axes.fill_between(x, base + 20, base + 20 + 27 * density, color=row.colour, alpha=0.45, linewidth=0)
        axes.plot(x, base + 20 + 27 * density, color=row.colour, linewidth=1)
        points = sample[:: -(-len(sample) // MAX_POINTS)] if len(x) or len(sample) < 5 else sample[:0]
        height = base + 3 + 8 * (np.arange(len(points)) * 0.618034 % 1)
        dots = dict(
            color=row.colour, markersize=2.4 if len(points) > 20 else 4, alpha=0.45, markeredgewidth=0, clip_on=False
        )
        axes.plot(points, height, "o", **dots)
        axes.plot([q["0.05"], q["0.95"]], [base + 15.5] * 2, color=row.colour, linewidth=1.1)
        axes.plot([q["0.25"], q["0.75"]], [base + 15.5] * 2, color=row.colour, linewidth=4, solid_capstyle="butt")
        diamond = dict(color=INK, markersize=5, markeredgecolor="white", markeredgewidth=0.8, clip_on=False)
        axes.plot(s["mean"], base + 15.5, "D", **diamond)
        beside(axes, base + 22, row.label, number(s["mean"], digits))
    heading(axes, title, "mean")
    axes.set_xlabel(xlabel)
    return svg(figure, name, description)


def smoothed(sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A Gaussian density (Silverman's width) between the extremes of a sample, its peak scaled to 1."""
    spread = np.subtract(*np.quantile(sample, (0.75, 0.25))) / 1.34
    spread = min(spread or np.inf, sample.std())
    if len(sample) < 5 or spread <= 1e-6 * np.abs(sample).max():
        return np.empty(0), np.empty(0)
    x = np.linspace(sample.min(), sample.max(), 120)
    density = np.exp(-0.5 * ((x[:, None] - sample) / (0.9 * spread * len(sample) ** -0.2)) ** 2).sum(axis=1)
    return x, density / density.max()


def waterfall(name: str, share: Mapping[str, Statistics]) -> str:
    """Shares as bars, each from where the one above it ends; the last is their sum."""
    step, means = 27, [s["mean"] for s in share.values()]
    starts = np.cumsum([0, *means])
    edges = [
        *starts,
        *(a + s["quantiles"][q] for a, s in zip(starts, share.values(), strict=False) for q in ("0.05", "0.95")),
    ]
    pad = 0.03 * (max(edges) - min(edges))
    figure, axes = blank(step * (len(share) + 1), (min(edges) - pad, max(edges) + pad))
    for i, (part, s) in enumerate(share.items()):
        y, start = step * (len(share) - i) + step / 2, starts[i]
        axes.barh(y, s["mean"], 16, start, color=COLOURS[part])
        axes.plot([start + s["quantiles"][q] for q in ("0.05", "0.95")], [y, y], color=INK, linewidth=1)
        axes.plot([starts[i + 1]] * 2, [y - 8, y - step + 8], color=QUIET, linewidth=0.8)
        beside(axes, y, LABELS[part], ("+" if s["mean"] > 0 else "") + number(s["mean"]))
    axes.barh(step / 2, starts[-1], 16, color=INK)
    beside(axes, step / 2, "sum", number(starts[-1]), weight="bold")
    axes.axvline(0, color=QUIET, linewidth=0.8)
    heading(axes, "Share of the output", "mean")
    axes.set_xlabel("share of [CLS] after the block, summed from top to bottom")
    return svg(figure, name, "Projection shares of the summands, which sum to 1")


def depth_chart(name: str, title: str, layers: list[Statistics], limits: tuple[float, float]) -> str:
    """Mean and bands of the cosine after each block."""
    figure, axes = blank(220, (0.6, max(len(layers), 2) + 0.4), left=46, right=12)
    blocks, colour = np.arange(1, len(layers) + 1), COLOURS["cls"]
    quantiles = {q: np.array([layer["quantiles"][q] for layer in layers]) for q in layers[0]["quantiles"]}
    axes.fill_between(blocks, quantiles["0.05"], quantiles["0.95"], color=colour, alpha=0.18, linewidth=0)
    axes.fill_between(blocks, quantiles["0.25"], quantiles["0.75"], color=colour, alpha=0.35, linewidth=0)
    means = [layer["mean"] for layer in layers]
    axes.plot(blocks, means, "-o", color=colour, linewidth=1.8, markersize=3.6)
    axes.set(ylim=limits, xlabel=f"after block (of {len(layers)})")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 4, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.grid(visible=False, axis="x")
    axes.axhline(0, color=QUIET, linewidth=0.8)
    heading(axes, f"Cosine with the final [CLS], {title}")
    if len(means) > 1:
        axes.plot(blocks[-2], means[-2], "o", color="white", markeredgecolor=INK, markeredgewidth=1.2, markersize=5)
    return svg(figure, name, f"Cosine of [CLS] after each block with [CLS] after the last, {title}")


def cka_chart(name: str, a9: Mapping[str, Statistics]) -> str:
    """Biased and unbiased CKA as bars, the null as a mark."""
    step = 62
    low = min([0.0, *(v["unbiased"] for v in a9.values() if not math.isnan(v["unbiased"]))])
    figure, axes = blank(step * len(a9), (low, 1), right=120)
    for base, (part, value) in zip(range(step * (len(a9) - 1), -1, -step), a9.items(), strict=True):
        for y, kind, alpha in ((46, "biased", 0.4), (29, "unbiased", 1.0)):
            if not math.isnan(value[kind]):
                axes.barh(base + y, value[kind], 14, color=COLOURS[part], alpha=alpha, linewidth=0)
            beside(axes, base + y, value=f"{number(value[kind])} {kind}")
        if not math.isnan(value["null"]):
            axes.plot([value["null"]] * 2, [base + 6, base + 55], color=INK, linewidth=1.6)
        beside(axes, base + 12, value=f"{number(value['null'])} null")
        beside(axes, base + 37.5, LABELS[part])
    axes.set_xlabel("linear CKA with [CLS] after attention")
    return svg(figure, name, "CKA of the parts with [CLS] after attention")


def svg(figure: Figure, name: str, description: str) -> str:
    """A figure as an inline element: no outer files, and ids that no other figure has."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip().replace("xlink:href", "href")
    text = re.sub(r"<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view, "matplotlib writes one"
    return re.sub(r"<svg[^>]*>", f'<svg {view[0]} role="img" aria-label="{escape(description)}">', text, count=1)
