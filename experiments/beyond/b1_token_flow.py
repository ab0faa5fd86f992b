"""B1: which group of tokens attends to which, in every layer.

    jaxvit B1 --models MODEL .. --images FOLDER --out OUT

The token-flow matrix of a layer: attention weights after the softmax, averaged over heads, over the queries of a group
and over images, and summed over the keys of a group. Groups are [CLS], the registers and the patches; every register by
itself is in results.json too. Each row sums to 1. Its standard deviation is over images.

A row says where a group looks, and not what it gets: values differ in size and may cancel. A group of many tokens also
gets much attention by their number alone. With uniform attention the patches would get N / (N + P), which is why the
figure marks this level.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from jaxvit import ViT

from ..core.charts import COLOURS, LABELS, canvas, layer_ticks, number, ordered, short
from ..core.experiment import SOURCES, About, Experiment, Found, Measured, Results, Table, View
from ..core.trace import Trace, by_source

QUERIES = {"cls": "from [CLS]", "registers": "from registers", "patches": "from patches"}


class TokenFlow(Experiment):
    id = "B1"
    title = "Attention between groups of tokens in every layer"
    shown = (
        "Lines: how much of the attention of [CLS], of the registers and of the patches goes to each group, layer by "
        "layer; mean over heads, queries and images, the band is one standard deviation over images. Dotted: the "
        "patches' share of all tokens, which uniform attention would give."
    )
    wants = frozenset({"flow"})

    def measure(self, trace: Trace, model: ViT, options: Mapping[str, Any]) -> Measured:
        assert trace.flow is not None, "wanted"
        each = jnp.moveaxis(trace.flow, 0, 1)  # B L G G
        flow = together(each, model)
        # The number of patches, from which the level of uniform attention follows: it differs with the images' size.
        patches = jnp.full(len(flow), trace.row.shape[-1] - model.prefix, flow.dtype)
        sums = {"flow": flow, "flow squared": flow**2, "patches": patches}
        return Measured(sums=sums | ({"each": each} if model.prefix > 2 else {}))

    def numbers(self, found: Mapping[str, Found], about: About, options: Mapping[str, Any]) -> dict[str, Any]:
        clean = found["clean"]
        mean = clean.sums["flow"] / clean.n
        std = np.sqrt(np.maximum(clean.sums["flow squared"] / clean.n - mean**2, 0))
        patches, prefix = float(clean.sums["patches"] / clean.n), about.registers + 1
        numbers = {
            "n": clean.n,
            "groups": [name for name in SOURCES if about.registers or name != "registers"],
            "flow": mean.tolist(),
            "std": std.tolist(),
            "patches of all tokens": patches / (patches + prefix),
        }
        if "each" in clean.sums:
            names = ["cls", *(f"register {i}" for i in range(about.registers)), "patches"]
            numbers["each register"] = {"groups": names, "flow": (clean.sums["each"] / clean.n).tolist()}
        return numbers

    def table(self, results: Results, models: Mapping[str, About]) -> Table | None:
        if not results:
            return None
        edges = [(a, b) for a in SOURCES for b in SOURCES if a != b]
        rows = []
        for about in ordered({key: models[key] for key in results}):
            flow = {edge: of_edge(results[about.key], *edge) for edge in edges}
            for which, at in (("all layers", slice(None)), ("last layer", slice(-1, None))):
                cells = ["" if line is None else number(float(line[0][at].mean())) for line in flow.values()]
                rows.append([f"{about.name}, {which}", *cells])
        return Table(["", *(f"{a} → {b}" for a, b in edges)], rows, "attention of a query group on a key group, mean")

    def figures(self, view: View) -> dict[str, Figure]:
        models = ordered({key: view.models[key] for key in view.results})
        if not models:
            return {}
        figure, axes = canvas(3, len(models), 9.0, 0.7 + 2.2 * len(models), squeeze=False, sharey=True, sharex="row")
        for row, about in zip(axes, models, strict=True):
            numbers = view.results[about.key]
            layer_ticks(row[0], range(about.depth))
            layers = np.arange(about.depth)
            for ax, query in zip(row, QUERIES, strict=True):
                ax.set_ylim(-0.02, 1.02)
                if query not in numbers["groups"]:
                    ax.text(0.5, 0.5, "no registers", ha="center", va="center", transform=ax.transAxes)
                    continue
                for key in numbers["groups"]:
                    mean, std = of_edge(numbers, query, key)
                    ax.plot(layers, mean, color=COLOURS[key], label=LABELS[key], marker=".", markersize=3)
                    low, high = np.maximum(mean - std, 0), np.minimum(mean + std, 1)
                    ax.fill_between(layers, low, high, color=COLOURS[key], alpha=0.15, linewidth=0)
                ax.axhline(numbers["patches of all tokens"], color=COLOURS["patches"], linestyle=":", linewidth=1)
            row[0].set_ylabel(f"{short(about)}\nattention")
        for ax, title in zip(axes[0], QUERIES.values(), strict=True):
            ax.set_title(title)
        for ax in axes[-1]:
            ax.set_xlabel("layer")
        entries = {label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(entries.values(), [f"to {name}" for name in entries], loc="outside upper right", ncols=3)
        return {"b1": figure}


def together(flow: Float[Array, "B L G G2"], model: ViT) -> Float[Array, "B L S S2"]:
    """The flow between [CLS], all registers (if there are any) and patches: a mean over queries, a sum over keys."""
    keys = jnp.stack(list(by_source(flow, model, axis=3).values()), axis=3)
    rows = by_source(keys, model, axis=2)
    if "registers" in rows:
        rows["registers"] = rows["registers"] / (model.prefix - 1)
    return jnp.stack(list(rows.values()), axis=2)


def of_edge(numbers: Mapping[str, Any], query: str, key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and standard deviation of one entry of the matrix in every layer, [L]; None without such groups."""
    groups = numbers["groups"]
    if query not in groups or key not in groups:
        return None
    at = (slice(None), groups.index(query), groups.index(key))
    return np.asarray(numbers["flow"])[at], np.asarray(numbers["std"])[at]


EXPERIMENT = TokenFlow()
