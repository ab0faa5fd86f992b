"""B7: questions the paper leaves open: which images lean on registers, in which directions parts vary, and what models
of one size without registers do instead.

    jaxvit B7 --models MODEL .. --images FOLDER --out OUT

All of the last layer's [CLS], with parts after LayerScale.

Images. The share of a source in the update is <part, update> / ||update||^2; over patches, registers, [CLS] itself and
the bias it sums to 1, and may be negative. Images are ranked by the registers' share, and by the share of the skip path
in [CLS] after attention, which all models have; the ten first and last are told.
Pearson and Spearman correlations over images tell what goes along with it: attention on registers and on patches,
norms, and the entropy of the attention row over patches, divided by the log of their number and averaged over heads
(1: all patches alike). A share and a norm of the same part are related by what they are, not by a finding.

Directions. Eigenvalues of the covariance over images of each part, and of the skip path: participation ratio
(sum l)^2 / sum l^2, and the number of components that hold 90 % of the variance. `overlap` is the share of one's
variance in the k first principal components of another, beside the chance k / d of a random subspace, and beside what
its own k first hold, the most there can be. No covariance of n images has more than n - 1 directions: with n not far
above d, spectra look more concentrated, and overlaps smaller, than they are.

Matched models. Models of one family, depth and width, such as with and without registers, or with test-time registers,
side by side, with differences to the first. They may differ in more than the registers: in data, recipe, and seed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations, permutations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from jaxvit import ViT
from jaxvit.analysis.decompose import projection_shares

from ..core import charts
from ..core.cka import plain_cka
from ..core.experiment import About, Experiment, Found, Measured, Pairs, Results, Table, View, summary
from ..core.trace import Trace, by_source, parts

TOLD, NAMED = 10, 2
"""How many images of each end of a ranking are told, and how many below the figure."""
COMPONENTS = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000)
"""Sizes of the leading subspaces, as far as there are so many directions."""
RANKED = {"registers": "share registers", "skip": "stream share skip"}
ALONG = ("mass registers", "mass patches", "norm registers", "norm patches", "norm skip", "norm update", "entropy")
HEADLINE = {
    "registers' share of the update": ("shares", "share registers", "mean"),
    "patches' share of the update": ("shares", "share patches", "mean"),
    "skip path's share of [CLS]": ("shares", "stream share skip", "mean"),
    "attention on registers": ("shares", "mass registers", "mean"),
    "participation ratio, patches": ("spectra", "patches", "participation"),
    "participation ratio, skip path": ("spectra", "skip", "participation"),
    "CKA patches, skip path": ("cka", "skip", "unbiased"),
}
"""Name -> where it stands in the numbers of a model."""


class OpenQuestions(Experiment):
    id = "B7"
    title = "Which images lean on registers, directions of variance, and models matched in size"
    shown = (
        "Left to right, image by image: share of the registers (without any: of the skip path) against attention, and "
        "in order. Variance of the parts within their own leading components, and within those of each other."
    )

    def measure(self, trace: Trace, model: ViT, options: Mapping[str, Any]) -> Measured:
        split = parts(trace, model)
        update, skip = trace.update[-1], trace.skip[-1]
        row = trace.row[-1]
        rows = {f"share {name}": x for name, x in projection_shares(split, update).items()}
        rows["stream share skip"] = projection_shares(skip, trace.middle[-1])
        mass = by_source(trace.mass[-1].mean(axis=1), model, axis=1)
        rows |= {f"mass {name}": x for name, x in mass.items()}
        norms = {**split, "skip": skip, "update": update}
        rows |= {f"norm {name}": jnp.linalg.norm(x, axis=-1) for name, x in norms.items() if name != "bias"}
        rows["entropy"] = entropy(row[..., model.prefix :]).mean(axis=1)
        others = {"skip": skip} | ({"registers": split["registers"]} if "registers" in split else {})
        return Measured(per_image=rows, pairs={"patches": Pairs(split["patches"], others)})

    def numbers(self, found: Mapping[str, Found], about: About, options: Mapping[str, Any]) -> dict[str, Any]:
        clean = found["clean"]
        columns = {name: clean.per_image[name] for name in clean.per_image if name != "image"}
        places = clean.per_image["image"] if "image" in clean.per_image else np.arange(clean.n)
        cka = clean.cka["patches"]
        ranked = {name: column for name, column in RANKED.items() if column in columns}
        return {
            "n": clean.n,
            "d": about.width,
            "ranking": {name: ranking(columns[column], places) for name, column in ranked.items()},
            "correlations": {
                name: {other: correlations(columns[column], columns[other]) for other in ALONG if other in columns}
                for name, column in ranked.items()
            },
            "shares": {name: summary(values) for name, values in columns.items()},
            **directions({"patches": cka.covariance(), **{name: cka.covariance(name) for name in cka.results()}}),
            "cka": {name: plain_cka(each) for name, each in cka.results().items()},
        }

    def table(self, results: Results, models: Mapping[str, About]) -> Table | None:
        shown = [about for about in charts.ordered(models) if about.key in results]
        if not shown:
            return None
        alone = [about for about in shown if not any(about in group for group in matched(shown))]
        rows = []
        for group in [*matched(shown), *([about] for about in alone)]:
            values = {about.key: [headline(results[about.key], path) for path in HEADLINE.values()] for about in group}
            first, *more = group
            rows += [(about.name, *map(told, values[about.key])) for about in group]
            for about in more:
                gaps = [x - y for x, y in zip(values[about.key], values[first.key], strict=True)]
                signed = (("+" if x > 0 else "") + told(x) for x in gaps)
                rows.append((f"difference of {about.name} to {first.name}", *signed))
        note = (
            "Models of one family, depth and width stand together."
            if matched(shown)
            else "No two models match in size."
        )
        return Table(("model", *HEADLINE), rows, note)

    def figures(self, view: View) -> dict[str, Figure]:
        shown = [about for about in charts.ordered(view.models) if about.key in view.results]
        if not shown:
            return {}
        images = (
            "Above: share of the registers in the update against the attention they get, image by image (without "
            "registers: of the skip path in [CLS] against attention on patches). Below: the same shares in order. "
            f"First and last images: {'; '.join(ends(view.results[about.key], about) for about in shown)}."
        )
        directions = (
            "Share of the variance over images of a part in its own first k components, and in those of another part "
            "(dotted: in a random subspace of k dimensions)."
        )
        return {
            "b7-images": charts.caption(of_images(view, shown), images),
            "b7-directions": charts.caption(of_directions(view.results, shown), directions),
        }


def entropy(attention: Float[Array, "B H N"]) -> Float[Array, "B H"]:
    """Of rows as distributions, from 0 (one patch) to 1 (all alike); 0 where there is no attention."""
    total = attention.sum(axis=-1, keepdims=True)
    p = jnp.where(total > 0, attention / jnp.where(total > 0, total, 1), 0)
    return -jax.scipy.special.xlogy(p, p).sum(axis=-1) / math.log(max(attention.shape[-1], 2))


def ranking(values: np.ndarray, places: np.ndarray) -> dict[str, list[dict[str, Any]]]:
    """The images with the highest and the lowest values, from the ends on; equal ones in their order."""
    order = np.argsort(-values, kind="stable")
    ends = {"top": order[:TOLD], "bottom": order[::-1][:TOLD]}
    return {end: [{"image": int(places[i]), "value": float(values[i])} for i in at] for end, at in ends.items()}


def ends(numbers: Mapping[str, Any], about: About) -> str:
    """The images at the ends of what the figure has in order, by their names, or by number where they have none."""
    order = numbers["ranking"][leaning(numbers["ranking"])]

    def told(end: str) -> str:
        images = [each["image"] for each in order[end][:NAMED]]
        return charts.listed(image if isinstance(image, str) else f"image {image}" for image in images)

    return f"{about.name}: {told('top')}, and {told('bottom')}"


def leaning(ranked: Collection[str]) -> str:
    """Whose share is shown: that of the registers, or of the skip path where there are none."""
    return "registers" if "registers" in ranked else "skip"


def correlations(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Over images, of the values and of their ranks; NaN where one does not vary."""
    return {"pearson": pearson(x, y), "spearman": pearson(ranks(x), ranks(y))}


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size > 0 else math.nan


def ranks(x: np.ndarray) -> np.ndarray:
    """From 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def directions(covariances: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Spectra, and how far parts vary in each other's leading directions; NaN where a part does not vary.

    Returns:
      `spectra`: name -> `participation`, `components for 90 %`, and `within own`, the share of its variance in its own
        first k components, for each of `k`. `overlap`: "registers in patches" -> the share of the registers' variance
        in the patches' first k components. `chance`: k / d.
    """
    d = len(covariances["patches"])
    ks = [k for k in COMPONENTS if k < d] + [d]
    spectra, bases, overlap = {}, {}, {}
    for name, covariance in covariances.items():
        values, vectors = np.linalg.eigh(covariance)
        values, bases[name] = np.maximum(values[::-1], 0), vectors[:, ::-1]
        total = values.sum()
        within = np.cumsum(values) / total if total > 0 else np.full(d, math.nan)
        spectra[name] = {
            "participation": float(total**2 / np.square(values).sum()) if total > 0 else math.nan,
            "components for 90 %": int(np.argmax(within >= 0.9)) + 1 if total > 0 else None,
            "within own": [float(within[k - 1]) for k in ks],
        }
    for a, b in permutations(covariances, 2):
        total = np.trace(covariances[a])
        along = ((covariances[a] @ bases[b]) * bases[b]).sum(axis=0)  # variance of a along each component of b
        fine = total > 0 and np.trace(covariances[b]) > 0
        overlap[f"{a} in {b}"] = (
            (np.cumsum(along)[np.asarray(ks) - 1] / total).tolist() if fine else [math.nan] * len(ks)
        )
    return {"k": ks, "chance": [k / d for k in ks], "spectra": spectra, "overlap": overlap}


def matched(models: Sequence[About]) -> list[list[About]]:
    """Groups of two and more models of one family, depth and width; those of random weights are all of one family."""
    groups: dict[Any, list[About]] = {}
    for about in models:
        groups.setdefault((about.weights, about.family, about.depth, about.width), []).append(about)
    return [group for group in groups.values() if len(group) > 1]


def headline(numbers: Mapping[str, Any], path: tuple[str, str, str]) -> float:
    """NaN where there is no such part, or no such number."""
    kind, name, which = path
    value = numbers[kind].get(name, {}).get(which)
    return math.nan if value is None else value


def told(x: float) -> str:
    return charts.number(x) if math.isfinite(x) else "–"  # noqa: RUF001


def of_images(view: View, shown: Sequence[About]) -> Figure:
    """Share against attention, and in order, one column a model."""
    figure, axes = charts.canvas(len(shown), 2, width=1.2 + 2.6 * len(shown), height=5.4, squeeze=False)
    for about, (top, bottom) in zip(shown, axes.T, strict=True):
        columns = view.found[about.key]["clean"].per_image
        which = leaning(view.results[about.key]["ranking"])
        values = np.asarray(columns[RANKED[which]], np.float64)
        source = "registers" if which == "registers" else "patches"
        colour = charts.COLOURS[which]
        along = view.results[about.key]["correlations"][which][f"mass {source}"]
        top.plot(columns[f"mass {source}"], values, ".", color=colour, markersize=4, alpha=0.6)
        top.set_title(charts.short(about).replace("\n", " "))
        top.set_xlabel(f"attention on {source}; rank corr. {charts.number(along['spearman'], 2)}")
        top.set_ylabel(f"share of {charts.LABELS[which]}")
        bottom.plot(np.sort(values)[::-1], color=colour)
        bottom.axhline(0, color=charts.INK, linewidth=0.8)
        bottom.set_xlabel("images, in order")
        bottom.set_ylabel(f"share of {charts.LABELS[which]}")
    return figure


def of_directions(results: Results, shown: Sequence[About]) -> Figure:
    """Variance in the first k components, one column a model: of each part in its own, and in each other's."""
    figure, axes = charts.canvas(len(shown), 2, width=1.6 + 2.6 * len(shown), height=5.6, squeeze=False, sharex="col")
    for about, (top, bottom) in zip(shown, axes.T, strict=True):
        each = results[about.key]
        for name, spectrum in each["spectra"].items():
            ratio = charts.number(spectrum["participation"], 1)
            top.plot(
                each["k"],
                np.asarray(spectrum["within own"], float),
                marker=".",
                color=charts.COLOURS[name],
                label=f"{charts.LABELS[name]}: {ratio}",
            )
        top.set_title(charts.short(about).replace("\n", " "))
        top.legend(title="participation ratio", loc="lower right", fontsize=8)
        pairs = [
            (a, b) for a, b in combinations(("patches", "registers", "skip"), 2) if f"{a} in {b}" in each["overlap"]
        ]
        for a, b in pairs:
            for of, within, line in ((a, b, "--"), (b, a, "-")):
                if "patches" in (a, b):
                    other = b if a == "patches" else a
                    values = np.asarray(each["overlap"][f"{of} in {within}"], float)
                    label = f"{charts.LABELS[of]} in {charts.LABELS[within]}"
                    bottom.plot(each["k"], values, line, marker=".", color=charts.COLOURS[other], label=label)
        bottom.plot(each["k"], each["chance"], ":", color=charts.INK, label="chance, k / d")
        bottom.legend(loc="upper left", fontsize=8)
        for chart in (top, bottom):
            chart.set_xscale("log")
            chart.set_ylim(-0.02, 1.05)
        bottom.set_xlabel("components k")
    axes[0, 0].set_ylabel("share in own first k")
    axes[1, 0].set_ylabel("share in the other's first k")
    return figure


EXPERIMENT = OpenQuestions()
