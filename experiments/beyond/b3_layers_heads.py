"""B3: A3 and A7 in every layer, and in every head: where patches, registers and the skip path make [CLS].

    jaxvit B3 --models MODEL .. --images FOLDER --out OUT

Of every layer:

  update   CKA of what attention adds to [CLS] with the parts from patches, registers and [CLS] itself, as in A3 at its
           default reading; in the last layer it is A3
  stream   CKA of [CLS] after attention with the skip path, as in A9
  norms    L2 norms of these parts, of skip path, bias, update, MLP output and of [CLS] after attention and after the
           block, means over images
  shares   <summand, [CLS] after the block> / ||[CLS] after the block||^2, means over images; they sum to 1
           over skip, cls, registers, patches, bias and mlp

Of every layer and head:

  heads    CKA of the head's output, d = D / H numbers, with its parts from patches, registers and [CLS] itself. Heads
           are compared before the output projection: a head with a high CKA may still add little
  mass     attention of [CLS] on patches, registers and itself, mean over images

In the first layer [CLS] and registers are the same for all images: their parts vary only with the attention they get,
and the skip path does not vary at all, so that it has no CKA (NaN).

--b3-stride K takes every K-th layer, from the last one back. CKA needs ten D x D matrices a layer in float64: 12 MB for
S, 47 MB for B, 84 MB for L, 189 MB for g, so 7.5 GB for all 40 layers of g and 1.9 GB for every fourth. Heads add seven
d x d matrices each, 220 MB for all of g. As in A3, CKA is inflated unless n is far above d, and estimates come with
their null; heads have fewer numbers than layers, so their biased CKAs cannot be compared with those of layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure

from jaxvit import ViT, ViTConfig
from jaxvit.analysis.decompose import einsum, projection_shares, readout

from ..core import charts
from ..core.cka import plain_cka
from ..core.experiment import About, Experiment, Found, Measured, Option, Pairs, Results, Table, View
from ..core.trace import Trace, by_source

PARTS = ("patches", "registers", "cls")


class LayersHeads(Experiment):
    id = "B3"
    title = "Parts of [CLS] in every layer and head"
    shown = (
        "Over depth: unbiased CKA of the [CLS] update with its parts, and of [CLS] after attention with the skip path "
        "(dotted: the null); norms of the parts. By layer and head: attention of [CLS], and CKA of a head's output "
        "with its parts."
    )
    options = (Option("stride", 1, "take every N-th layer, counted back from the last", least=1),)

    def measure(self, trace: Trace, model: ViT, options: Mapping[str, Any]) -> Measured:
        chosen = slice((len(trace.update) - 1) % options["stride"], None, options["stride"])
        trace = Trace(
            *(x if x is None or field in ("tokens", "sites") else x[chosen] for field, x in trace._asdict().items())
        )
        after = jax.tree.map(lambda a: a[chosen].astype(trace.z.dtype), readout(model))
        z = by_source(trace.z, model, axis=2)  # L B H d
        gamma = after.gamma[:, None]
        parts = {name: einsum("LBHd,LHdD->LBD", each, after.kernel) * gamma for name, each in z.items()}
        bias = jnp.zeros_like(trace.update) + after.bias[:, None] * gamma
        summands = {"skip": trace.skip, **parts, "bias": bias, "mlp": trace.mlp}
        sizes = {**summands, "update": trace.update, "middle": trace.middle, "after": trace.after}
        measured = {f"norm {name}": jnp.linalg.norm(x, axis=-1) for name, x in sizes.items()}
        measured |= {f"share {name}": x for name, x in projection_shares(summands, trace.after).items()}
        measured |= {f"mass {name}": x for name, x in by_source(trace.mass, model, axis=3).items()}
        heads = {name: each.swapaxes(1, 2) for name, each in z.items()}  # L H B d
        return Measured(
            pairs={
                "update": Pairs(trace.update, parts),
                "stream": Pairs(trace.middle, {"skip": trace.skip}),
                "heads": Pairs(sum_of(heads), heads),
            },
            sums={name: x.swapaxes(0, 1) for name, x in measured.items()},  # B in front
        )

    def numbers(self, found: Mapping[str, Found], about: About, options: Mapping[str, Any]) -> dict[str, Any]:
        clean = found["clean"]
        cka = {kind: {name: plain_cka(each) for name, each in of.results().items()} for kind, of in clean.cka.items()}

        def means(kind: str) -> dict[str, Any]:
            names = [name for name in clean.sums if name.startswith(f"{kind} ")]
            return {name.removeprefix(f"{kind} "): (clean.sums[name] / clean.n).tolist() for name in names}

        stride = options["stride"]
        layers = list(range((about.depth - 1) % stride, about.depth, stride))
        return {"n": clean.n, "layers": layers, **cka, **{kind + "s": means(kind) for kind in ("norm", "share")}} | {
            "mass": means("mass")
        }

    def moments(self, config: ViTConfig, options: Mapping[str, Any]) -> int:
        """D x D matrices of the update, its parts and the skip path."""
        parts = 3 if config.registers else 2
        return -(-config.depth // options["stride"]) * (1 + 2 * parts + 3) * 8 * config.width**2

    def table(self, results: Results, models: Mapping[str, About]) -> Table | None:
        """The last layer beside the one in the middle and the first."""
        rows = []
        for about in (about for about in charts.ordered(models) if about.key in results):
            each = results[about.key]
            last = len(each["layers"]) - 1
            for at in sorted({0, last // 2, last}):
                cells = [each["update"].get(name, {}).get("unbiased") for name in PARTS]
                values = [
                    math.nan if cell is None else cell[at] for cell in [*cells, each["stream"]["skip"]["unbiased"]]
                ]
                mass = [np.mean(each["mass"][name][at]) if name in each["mass"] else math.nan for name in PARTS[:2]]
                told = [charts.number(x) if x is not None and math.isfinite(x) else "–" for x in [*values, *mass]]  # noqa: RUF001
                rows.append((about.name, str(each["layers"][at]), *told))
        head = ("model", "layer", *(f"CKA {charts.LABELS[name]}" for name in (*PARTS, "skip")))
        head = (*head, "attention on patches", "on registers")
        return Table(head, rows, "unbiased CKAs; layers count from 0") if rows else None

    def figures(self, view: View) -> dict[str, Figure]:
        shown = [about for about in charts.ordered(view.models) if about.key in view.results]
        if not shown:
            return {}
        layers = (
            "By layer: unbiased CKA of the [CLS] update with its parts, and of [CLS] after attention with the skip "
            "path (dotted: the null); and the norms of the parts, means over images."
        )
        heads = (
            "By layer and head: attention of [CLS] on patches and on registers, means over images, and unbiased CKA of "
            "the head's output with its parts from them."
        )
        return {
            "b3-layers": charts.caption(over_depth(view.results, shown), layers),
            "b3-heads": charts.caption(over_heads(view.results, shown), heads),
        }


def sum_of(parts: Mapping[str, Array]) -> Array:
    first, *more = parts.values()
    return sum(more, first)


def over_depth(results: Results, shown: list[About]) -> Figure:
    """CKAs and norms, one column a model."""
    figure, axes = charts.canvas(len(shown), 2, width=1.6 + 2.6 * len(shown), height=5.6, squeeze=False, sharex="col")
    for about, (top, bottom) in zip(shown, axes.T, strict=True):
        each = results[about.key]
        for name, cka in {**each["update"], "skip": each["stream"]["skip"]}.items():
            style = dict(color=charts.COLOURS[name], label=charts.LABELS[name])
            top.plot(each["layers"], floats(cka["unbiased"]), marker=".", **style)
            top.plot(each["layers"], floats(cka["null"]), ":", color=style["color"], linewidth=1)
        top.set_ylim(-0.05, 1.05)
        top.set_title(charts.short(about).replace("\n", " "))
        for name in ("skip", *PARTS, "mlp"):
            if name in each["norms"]:
                values = floats(each["norms"][name])
                positive = np.where(values > 0, values, np.nan)
                bottom.plot(each["layers"], positive, marker=".", color=charts.COLOURS[name], label=charts.LABELS[name])
        bottom.set_yscale("log")
        bottom.set_xlabel("layer")
        charts.layer_ticks(bottom, each["layers"])
    axes[0, 0].set_ylabel("CKA, unbiased")
    axes[1, 0].set_ylabel("mean norm")
    with_all = max(axes[1], key=lambda chart: len(chart.lines))
    figure.legend(*with_all.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def over_heads(results: Results, shown: list[About]) -> Figure:
    """Heat maps of layer x head, one column a model; all from 0 to 1."""
    kinds = [("attention on patches", "patches", "mass"), ("attention on registers", "registers", "mass")]
    kinds += [("CKA with patches", "patches", "heads"), ("CKA with registers", "registers", "heads")]
    kinds = [kind for kind in kinds if any(kind[1] in results[about.key]["mass"] for about in shown)]
    figure, axes = charts.canvas(
        len(shown), len(kinds), width=1.6 + 2.2 * len(shown), height=0.6 + 2.2 * len(kinds), squeeze=False
    )
    image = None
    for about, column in zip(shown, axes.T, strict=True):
        each = results[about.key]
        for chart, (title, source, kind) in zip(column, kinds, strict=True):
            chart.grid(False)
            if source not in each["mass"]:
                chart.set_axis_off()
                continue
            values = floats(each["mass"][source] if kind == "mass" else each["heads"][source]["unbiased"])
            image = chart.imshow(values, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
            ticks = np.unique(np.linspace(0, len(values) - 1, 5).round().astype(int))
            chart.set_yticks(ticks, [str(each["layers"][at]) for at in ticks])
            chart.set_xticks(range(0, values.shape[1], charts.tick_step(values.shape[1])))
            chart.set_title(title)
            chart.set_ylabel("layer" if column is axes.T[0] else "")
        [chart for chart in column if chart.axison][-1].set_xlabel("head")
        column[0].set_title(f"{charts.short(about)}\n{kinds[0][0]}")
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.5)
    return figure


def floats(values: Any) -> np.ndarray:
    """NaN for None."""
    return np.asarray(values, np.float64)


EXPERIMENT = LayersHeads()
