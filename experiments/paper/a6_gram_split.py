"""A6, equation 5: which parts of the [CLS] update make its similarities between images.

    jaxvit A6 --models MODEL .. --images FOLDER --out OUT

Let the rows of X be the updates of [CLS] by attention in the last layer, one an image, and X = Xp + Xr + Xc: what comes
from patches, registers and [CLS] itself. Then XX', the similarities of all pairs of images, is the sum of XpXp', XrXr',
XcXc' and of cross terms such as XpXr' + XrXp'. The share of a term G is <G, XX'> / ||XX'||^2, Frobenius products;
shares sum to 1, those of cross terms may be negative. They come from moments in feature space, <XaXb', XX'> =
<X'Xa, X'Xb>, with no matrix over images.

`trace` is the same for tr(XX'), the total variance of the update: a share <G, I> / <XX', I>. It sees each image by
itself, and large directions less.

Columns are centred over images, where the bias of the projection vanishes. With --no-a6-centred they are not, `bias` is
one more source, and whatever all images share weighs as much as it is large.

`gram` of one part alone, unlike its CKA, says how much of the similarities it makes up, and not only whether it is
similar to the whole. Shares of parts that nearly cancel are large and of both signs: read them with the cross terms.
`sum` tells how far rounding in the model keeps the parts from adding up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations, combinations_with_replacement
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxvit import ViT
from jaxvit.analysis.similarity import StreamingCKA

from ..core import charts
from ..core.experiment import About, Experiment, Found, Measured, Option, Pairs, Results, Table, View
from ..core.trace import Trace, parts

SOURCES = ("patches", "registers", "cls", "bias")
TERMS = (*SOURCES, *(f"{a} x {b}" for a, b in combinations(SOURCES, 2)))
"""Terms of the Gram matrix, in the order of tables and figures."""
CROSS = {"patches x registers": "#7d5fa8", "patches x cls": "#b9a3d3", "registers x cls": "#f0a878"}


class GramSplit(Experiment):
    id = "A6"
    title = "Similarities between images, split by the source of the [CLS] update"
    figure = "equation 5"
    shown = (
        "Shares of the parts, and of their cross terms, in the Gram matrix of the last layer's [CLS] updates, and in "
        "their total variance. Each bar sums to 1; cross terms that are negative are drawn below zero."
    )
    options = (Option("centred", True, "subtract means over images", late=True),)

    def measure(self, trace: Trace, model: ViT, options: Mapping[str, Any]) -> Measured:
        split = parts(trace, model)
        bias = split.pop("bias")
        return Measured(pairs={"update": Pairs(trace.update[-1], split)}, sums={"bias": bias})

    def numbers(self, found: Mapping[str, Found], about: About, options: Mapping[str, Any]) -> dict[str, Any]:
        clean = found["clean"]
        bias = None if options["centred"] else clean.sums["bias"] / clean.n
        gram, trace = split_shares(clean.cka["update"], bias)
        total = {"gram": sum(gram.values()), "trace": sum(trace.values())}
        return {"n": clean.n, "d": about.width, "gram": gram, "trace": trace, "sum": total}

    def table(self, results: Results, models: Mapping[str, About]) -> Table | None:
        shown = [about for about in charts.ordered(models) if about.key in results]
        if not shown:
            return None
        terms = [term for term in TERMS if any(term in each["gram"] for each in results.values())]
        rows = []
        for about in shown:
            for kind, name in (("gram", about.name), ("trace", f"{about.name}, total variance")):
                each = results[about.key][kind]
                rows.append((name, *(charts.percent(each[term]) if term in each else "–" for term in terms)))  # noqa: RUF001
        return Table(("share", *terms), rows, "Each row sums to 100 %; cross terms may be negative.")

    def figures(self, view: View) -> dict[str, Figure]:
        shown = [about for about in charts.ordered(view.models) if about.key in view.results]
        if not shown:
            return {}
        figure, axes = charts.canvas(2, width=2.2 + 1.6 * len(shown), height=3.6, sharey=True)
        colours = charts.COLOURS | CROSS
        for chart, kind, title in zip(axes, ("gram", "trace"), ("Gram matrix", "Total variance"), strict=True):
            each = [view.results[about.key][kind] for about in shown]
            above, below = np.zeros(len(shown)), np.zeros(len(shown))
            for term in TERMS:
                if any(term in model for model in each):
                    height = np.nan_to_num([model.get(term, 0.0) for model in each])
                    bottom = np.where(height >= 0, above, below)
                    colour = colours.get(term, charts.QUIET)
                    chart.bar(range(len(shown)), height, 0.7, bottom=bottom, color=colour, label=term)
                    above, below = above + np.maximum(height, 0), below + np.minimum(height, 0)
            chart.axhline(0, color=charts.INK, linewidth=0.8)
            chart.set_xticks(range(len(shown)), [charts.short(about) for about in shown])
            chart.set_title(title)
        axes[0].set_ylabel("share")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
        return {"eq5": figure}


def split_shares(cka: StreamingCKA, bias: np.ndarray | None = None) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of all terms in the Gram matrix, and in its trace.

    Args:
      cka: of the update as reference, and of its parts.
      bias: [D], what every update has beside its parts; if given, columns are not centred.
    """
    sources = [name for name in SOURCES if name in cka.names]
    whole, cross = cka.cross(), {name: cka.cross(name) for name in sources}  # X'X and X'Xa, [D, D]
    inner = _inner_products({name: np.trace(each) for name, each in cross.items()}, cka)
    if bias is not None:
        means = {name: cka.mean(name) for name in sources} | {"bias": bias}
        middle = cka.mean()
        whole = whole + cka.n * np.outer(middle, middle)
        cross = {name: cross.get(name, 0) + cka.n * np.outer(middle, means[name]) for name in means}
        pairs = combinations_with_replacement(means, 2)
        inner = {(a, b): inner.get((a, b), 0) + cka.n * means[a] @ means[b] for a, b in pairs}
    gram = {(a, b): (cross[a] * cross[b]).sum() for a, b in inner}
    return shares(gram, np.square(whole).sum()), shares(inner, np.trace(whole))


def _inner_products(with_whole: Mapping[str, float], cka: StreamingCKA) -> dict[tuple[str, str], float]:
    """tr(Xa'Xb) of all centred parts, from tr(X'Xa), the sum of these over b, and tr(Xa'Xa).

    Two or three parts have as many pairs of different ones as these sums tell.
    """
    own = {name: cka.n * np.trace(cka.covariance(name)) for name in with_whole}
    rest = {name: with_whole[name] - own[name] for name in own}
    found = {}
    for a, b in combinations_with_replacement(own, 2):
        others = sum(rest[name] for name in rest if name not in (a, b))
        found[a, b] = own[a] if a == b else (rest[a] + rest[b] - others) / 2
    return found


def shares(products: Mapping[tuple[str, str], float], whole: float) -> dict[str, float]:
    """Of each part, and of each pair of parts, which counts twice; NaN where the update does not vary."""
    found = {}
    for (a, b), value in products.items():
        name, weight = (a, 1) if a == b else (f"{a} x {b}", 2)
        found[name] = float(weight * value / whole) if whole > 0 else math.nan
    return found


EXPERIMENT = GramSplit()
