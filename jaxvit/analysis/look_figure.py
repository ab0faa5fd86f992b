"""The picture of `jaxvit look`, and the page around it. Needs matplotlib."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxvit.analysis.look import percent
from jaxvit.analysis.named import NamedArray
from jaxvit.analysis.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jaxvit.analysis.look import Look, Seen

SIDE = 2.1
"""Inches of a panel."""
QUERIES = 5
"""At most so many have a panel of attention; more are named under the picture."""
COLOURS = {"skip": "#4878a8", "cls": "#e1812c", "patches": "#3a923a", "bias": "#7f7f7f"}
REGISTER = "#9372b2"
SUFFIXES = (".png", ".pdf", ".svg", ".html")


def draw(seen: Sequence[Seen], heads: Sequence[int] | None = None) -> Figure:
    """See `Look.figure`."""
    rows = [panels(each, heads) for each in seen]
    columns = max(map(len, rows))
    figure = new_figure(figsize=(SIDE * columns, SIDE * len(rows) * 1.25 + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for each, row, places in zip(seen, rows, axes, strict=True):
        for (title, kind, value), place in zip(row, places, strict=False):
            place.set_title(title, fontsize=8)
            PAINTERS[kind](place, value)
        for place in places[len(row) :]:
            place.set_axis_off()
        places[0].set_ylabel(f"{shortened(each.model)}\nlayer {each.layer}", fontsize=8)
    return figure


def panels(seen: Seen, heads: Sequence[int] | None) -> list[tuple[str, str, Any]]:
    """Title, how it is painted, and what, of each panel of one photograph and model."""
    share, largest = seen.outliers.values.mean(), seen.norms.values.max()
    outlying = f"{share:.1%} outliers" if share else "no outliers"
    found: list[tuple[str, str, Any]] = [
        (shortened(seen.photograph), "photograph", seen.pixels),
        (f"norms, up to {largest:.3g}\n{outlying}", "norms", (seen.norms.values, seen.outliers.values)),
        ("patch features\n(3 principal components)", "photograph", on_white(seen.colours.values)),
    ]
    if seen.attention is None or seen.contribution is None or seen.mass is None or seen.shares is None:
        return found
    queries = seen.attention.axes["query"]
    for query in queries[:QUERIES]:
        mass = seen.mass.select(query=query, group="patches").values
        for name, values in by_head(seen.attention.select(query=query), heads):
            found.append((f"attention of {shown(query)}{name}\n{mass:.0%} of it on patches", "map", values))
    for name, values in by_head(seen.contribution.select(query=queries[0]), heads):
        found.append((f"what patches add to\n{shown(queries[0])}{name}", "signed", values))
    found.append((f"{shown(queries[0])} after attention\nis made of", "shares", seen.shares.select(query=queries[0])))
    return found


def by_head(maps: NamedArray, heads: Sequence[int] | None) -> list[tuple[str, np.ndarray]]:
    """The mean over heads, or some heads, each by a name."""
    if heads is None:
        return [("", maps.mean("head").values)]
    known = maps.axes["head"]
    if wrong := [head for head in heads if head not in known]:
        raise ValueError(f"there is no head {wrong[0]}: they are 0 to {len(known) - 1}")
    return [(f", head {head}", maps.select(head=head).values) for head in heads]


def shown(group: object) -> str:
    return "[CLS]" if group == "cls" else str(group)


def shortened(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 9]}..{name[-7:]}"


def on_white(colours: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(colours), 1.0, colours)


# Painters -------------------------------------------------------------------------------------------------------------


def bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def paint_photograph(axes: Any, pixels: np.ndarray) -> None:
    axes.imshow(pixels, interpolation="nearest")
    bare(axes)


def paint_map(axes: Any, values: np.ndarray) -> None:
    axes.imshow(values, cmap="viridis", vmin=0, interpolation="nearest")
    bare(axes)


def paint_signed(axes: Any, values: np.ndarray) -> None:
    """Zero is white: along the update red, against it blue."""
    most = np.abs(values).max() or 1.0
    axes.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
    bare(axes)


def paint_norms(axes: Any, both: tuple[np.ndarray, np.ndarray]) -> None:
    norms, outliers = both
    drawn = axes.imshow(norms, cmap="magma", interpolation="nearest")
    rows, columns = np.nonzero(outliers > 0.5)
    axes.plot(columns, rows, "o", color="none", markeredgecolor="cyan", markersize=4, markeredgewidth=0.8)
    bar = axes.figure.colorbar(drawn, ax=axes, fraction=0.045, pad=0.02)
    bar.ax.tick_params(labelsize=6)
    bare(axes)


def paint_shares(axes: Any, shares: NamedArray) -> None:
    """A bar for each part; they may be negative, and add up to 1."""
    parts, values = list(shares.axes["part"]), shares.values
    colours = [COLOURS.get(str(part), REGISTER) for part in parts]
    axes.barh(range(len(parts)), values, color=colours)
    axes.set_yticks(range(len(parts)), [shown(part) for part in parts], fontsize=6)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.6)
    low, high = min(0.0, values.min()), max(1.0, values.max())
    axes.set_xlim(low - 0.05, high + 0.3)
    for i, value in enumerate(values):
        axes.text(max(value, 0) + 0.02, i, percent(value), va="center", fontsize=6)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.set_box_aspect(1)
    for spine in axes.spines.values():
        spine.set_visible(False)


PAINTERS = {
    "photograph": paint_photograph,
    "map": paint_map,
    "signed": paint_signed,
    "norms": paint_norms,
    "shares": paint_shares,
}


# Files ----------------------------------------------------------------------------------------------------------------


def save(look: Look, path: Path, heads: Sequence[int] | None = None) -> None:
    """See `Look.save`."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} ends in none of {', '.join(SUFFIXES)}")
    figure = look.figure(heads)
    if path.suffix.lower() != ".html":
        figure.savefig(path, dpi=150)
        return
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    path.write_text(page(look, picture.getvalue()), encoding="utf-8")


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1400px; margin: 2em auto; padding: 0 1em; }
img { width: 100%; min-width: 900px; } .wide { overflow-x: auto; background: white; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: .2em .7em; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr { border-bottom: 1px solid #8884; }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #ddd; } }
"""


def page(look: Look, picture: bytes) -> str:
    """The picture and its numbers in one file."""
    inside = base64.b64encode(picture).decode()
    told = html.escape(str(look))
    tables = "\n".join(table(seen) for seen in look)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>jaxvit look</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f'<h1>What models see</h1><div class="wide"><img alt="{told}" src="data:image/png;base64,{inside}"></div>'
        f"<pre>{told}</pre>{tables}</body></html>\n"
    )


def table(seen: Seen) -> str:
    """What each query is made of after attention."""
    if seen.shares is None:
        return ""
    parts = seen.shares.axes["part"]
    head = "".join(f"<th>{html.escape(shown(part))}</th>" for part in parts)
    rows = "".join(
        f"<tr><td>{html.escape(shown(query))}</td>"
        + "".join(f"<td>{value:.2%}</td>" for value in seen.shares.select(query=query).values)
        + "</tr>"
        for query in seen.shares.axes["query"]
    )
    name = html.escape(f"{seen.photograph}, {seen.model}, layer {seen.layer}")
    return f"<h2>{name}</h2><table><tr><th>after attention</th>{head}</tr>{rows}</table>"
