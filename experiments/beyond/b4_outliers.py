"""B4: outlier patches and massive activations, layer by layer.

    jaxvit B4 --models MODEL .. --images FOLDER --out OUT

After every block, of every image:

* An outlier is a patch whose norm is above mean + `sigma` standard deviations of the patches of its image. With
  `threshold` above 0 it is one whose norm is above that number instead: norms are then comparable between images, and
  not between models.
* A massive activation is an |x| above both `above` and `times` the median |x| of all tokens and channels (Sun et al.
  2024). Whether an image has one is told by its largest |x| alone; token and channel are those of the largest.

What to know: mean + 3 sigma is crossed by some patch in most images of any model, also where all norms are alike, so
`share of images` says little; look at how many there are and at the ratio of the largest norm to the median. By
Chebyshev's inequality (Cantelli's form) at most 1 in 1 + sigma^2 patches can be one: the rule misses outliers that are
many. The median is exact; it is found by counting, and takes about a tenth of what sorting would.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxvit import ViT

from ..core.charts import (
    COLOURS,
    INK,
    LABELS,
    canvas,
    caption,
    layer_ticks,
    number,
    ordered,
    percent,
    shades,
    short,
)
from ..core.experiment import About, Experiment, Found, Measured, Option, Results, Table, View, summary
from ..core.trace import Trace

TOP = 3
"""How many channels are told."""


class Outliers(Experiment):
    id = "B4"
    title = "Outlier patches and massive activations"
    shown = (
        "Norms of tokens after every block, and their distribution after the last; largest and median |x| after every "
        "block, and the share of images with a massive activation."
    )
    wants = frozenset({"activations"})
    options = (
        Option(
            "sigma", 3.0, "a patch is an outlier if its norm is this many standard deviations above the mean", least=0
        ),
        Option(
            "threshold", 0.0, "if above 0: a patch is an outlier if its norm is above this, whatever sigma", least=0
        ),
        Option("above", 100.0, "a massive activation is above this", late=True, least=0),
        Option("times", 1000.0, "and above this many times the median of its layer", late=True, least=0),
    )

    def measure(self, trace: Trace, model: ViT, options: Mapping[str, Any]) -> Measured:
        norms = jnp.moveaxis(trace.norms, 0, 1)  # B L T
        patches = norms[..., model.prefix :]
        middle = jnp.median(patches, axis=-1)
        largest = patches.max(axis=-1)
        over = jnp.where(middle > 0, largest / jnp.where(middle > 0, middle, 1), 0)
        sums = {"cls": norms[..., 0], "patches": patches.mean(axis=-1), "median": middle, "largest": largest}
        sums |= {"largest over median": over}
        if model.prefix > 1:
            sums["registers"] = norms[..., 1 : model.prefix].mean(axis=-1)
        activations = {name: jnp.moveaxis(getattr(trace, name), 0, 1) for name in ACTIVATIONS}
        return Measured(
            per_image={
                "outliers": outliers(patches, options).sum(axis=-1).astype(jnp.int32),
                "largest norm": largest,
                **{f"activation {name}": value for name, value in activations.items()},
            },
            sums={f"norm {name}": value for name, value in sums.items()},
            keep={"norms": norms[:, -1]},
        )

    def numbers(self, found: Mapping[str, Found], about: About, options: Mapping[str, Any]) -> dict[str, Any]:
        clean = found["clean"]
        columns = clean.per_image
        count = columns["outliers"]  # n L
        patches = clean.keep["norms"].shape[1] - about.registers - 1
        largest, median, token, channel = (columns[f"activation {name}"] for name in ACTIVATIONS)
        massive = (largest > options["above"]) & (largest > options["times"] * median)
        groups = {"cls": token == 0, "registers": (token > 0) & (token <= about.registers)}
        groups |= {"patches": token > about.registers}
        if not about.registers:
            del groups["registers"]
        return {
            "n": clean.n,
            "patches": patches,
            "norms": {
                name.removeprefix("norm "): (total / clean.n).tolist()
                for name, total in clean.sums.items()
                if name.startswith("norm ")
            },
            "distribution": distribution(clean.keep["norms"], about.registers),
            "outliers": {
                "mean number": count.mean(axis=0).tolist(),
                "share of patches": (count.mean(axis=0) / patches).tolist(),
                "share of images": (count > 0).mean(axis=0).tolist(),
                "last layer": summary(count[:, -1]),
            },
            "massive": {
                "share of images": massive.mean(axis=0).tolist(),
                "largest": largest.mean(axis=0, dtype=np.float64).tolist(),
                "largest of all images": largest.max(axis=0).tolist(),
                "median": median.mean(axis=0, dtype=np.float64).tolist(),
                "channels": [common(channel[massive[:, i], i]) for i in range(massive.shape[1])],
                "tokens": {name: share(inside, massive) for name, inside in groups.items()},
            },
        }

    def table(self, results: Results, models: Mapping[str, About]) -> Table | None:
        rows = []
        for about in ordered({key: models[key] for key in results}):
            each = results[about.key]
            out, massive = each["outliers"], each["massive"]
            peak = int(np.argmax(massive["share of images"]))
            channels = ", ".join(str(one["channel"]) for one in massive["channels"][peak]) or "none"
            rows.append(
                [
                    about.name,
                    number(out["mean number"][-1], 2),
                    percent(out["share of patches"][-1]),
                    number(each["norms"]["largest over median"][-1], 2),
                    percent(massive["share of images"][peak]) + f" (layer {peak})",
                    channels,
                ]
            )
        head = ["", "outliers an image", "of patches", "largest norm / median", "images with massive", "channels"]
        return (
            Table(
                head,
                rows,
                "outliers after the last block; massive activations where most images have one; layers count from 0",
            )
            if rows
            else None
        )

    def figures(self, view: View) -> dict[str, Figure]:
        models = ordered({key: view.models[key] for key in view.results})
        if not models:
            return {}
        norms = (
            "Norms of tokens after every block, means over images (dashed: of the largest patch of each image); and "
            "after the last block, of all tokens of the first 64 images."
        )
        massive = (
            "Largest and median |x| of all tokens and channels after every block, means over images; and the share of "
            "images whose largest |x| is massive. Depth 1 is after the last block."
        )
        return {
            "b4-norms": caption(norms_figure(view, models), norms),
            "b4-massive": caption(massive_figure(view, models), massive),
        }


ACTIVATIONS = ("largest", "median", "largest_token", "largest_channel")


def outliers(norms: Any, options: Mapping[str, Any]) -> Any:
    """Which patches of norms [.., N] are outliers among those of their image."""
    if options["threshold"] > 0:
        return norms > options["threshold"]
    return norms > (norms.mean(axis=-1) + options["sigma"] * norms.std(axis=-1))[..., None]


def common(channels: np.ndarray) -> list[dict[str, Any]]:
    """The most common channels, and their share."""
    names, counts = np.unique(channels, return_counts=True)
    best = np.argsort(-counts, kind="stable")[:TOP]
    return [{"channel": int(names[i]), "share": float(counts[i] / len(channels))} for i in best]


def share(inside: np.ndarray, among: np.ndarray) -> list[float]:
    """Of the images that count, in each layer: how many are `inside`; NaN where there are none."""
    total = among.sum(axis=0)
    return np.where(total > 0, (inside & among).sum(axis=0) / np.maximum(total, 1), np.nan).tolist()


def distribution(norms: np.ndarray, registers: int) -> dict[str, Any]:
    """Shares of each kind of tokens by norm, in bins that grow by a factor.

    Args:
      norms: of the tokens of some images, [n, T].
    """
    low, high = max(float(norms.min()), 1e-12), max(float(norms.max()), 2e-12)
    edges, prefix = np.geomspace(0.98 * low, 1.02 * high, 50), registers + 1
    groups = {"patches": norms[:, prefix:], "registers": norms[:, 1:prefix], "cls": norms[:, :1]}
    shares = {name: (np.histogram(of, edges)[0] / of.size).tolist() for name, of in groups.items() if of.size}
    return {"n": len(norms), "edges": edges.tolist(), "shares": shares}


def norms_figure(view: View, models: list[About]) -> Figure:
    figure, axes = canvas(2, len(models), 9.0, 0.9 + 2.3 * len(models), squeeze=False)
    for (left, right), about in zip(axes, models, strict=True):
        norms = view.results[about.key]["norms"]
        layers = np.arange(about.depth)
        layer_ticks(left, layers)
        for name in ("cls", "registers", "patches"):
            if name in norms:
                left.plot(layers, norms[name], color=COLOURS[name], label=LABELS[name])
        left.plot(layers, norms["largest"], color=COLOURS["patches"], linestyle="--", label="largest patch")
        left.set(yscale="log", ylabel=f"{short(about)}\nnorm")
        after = view.results[about.key]["distribution"]
        for name, shares in after["shares"].items():
            right.stairs(shares, after["edges"], fill=True, color=COLOURS[name], alpha=0.6, label=LABELS[name])
        right.set(xscale="log", yscale="log", ylabel="share of tokens")
    axes[0, 0].set_title("mean norm after every block")
    axes[0, 1].set_title("distribution after the last")
    axes[-1, 0].set_xlabel("layer")
    axes[-1, 1].set_xlabel("norm")
    entries = {label: line for ax in axes[:, 0] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries, loc="outside upper right", ncols=4)
    return figure


def massive_figure(view: View, models: list[About]) -> Figure:
    figure, (left, right) = canvas(2, 1, 9.0, 3.6 + 0.2 * len(models))
    styles = {"none": "-", "trained": "--", "random": "--", "test-time": ":"}
    for about, colour in zip(models, shades(models), strict=True):
        massive, style = view.results[about.key]["massive"], styles[about.registers_are]
        depth = np.arange(1, about.depth + 1) / about.depth
        left.plot(depth, massive["largest"], style, color=colour, label=about.name)
        left.plot(depth, massive["median"], style, color=INK, linewidth=0.7, alpha=0.6)
        right.plot(depth, massive["share of images"], style, color=colour, marker=".", markersize=3)
    left.set(yscale="log", xlabel="depth", title="largest |x|, and (thin) median |x|; mean over images")
    right.set(ylim=(-0.03, 1.03), xlabel="depth", title="images with a massive activation")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


EXPERIMENT = Outliers()
