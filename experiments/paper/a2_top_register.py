"""A2, figure 2b: what the register with the highest norm holds, and how little it differs between images.

    jaxvit A2 --models MODEL .. --images FOLDER --out OUT

Reads the registers where they enter the last block, before and after the first norm of that block (LN1), whose output
attention reads. The register is the same for all images: the one whose norm before LN1 is highest on average. How often
it is also the one of highest norm in an image is reported, as are the other registers. With --a2-register argmax,
dimensions and cosines are of the register of highest norm in each image; `per register` stays that of fixed ones.
Registers count from 0.

Its dimensions are ranked by their mean size over images, |x|, or with --a2-ranking signed by their mean. The two differ
where the largest dimensions are negative. Before and after LN1 are ranked each for itself.

The mean cosine between two different images is exact and over all pairs: with u = x / ||x|| and n images it is

    ( ||sum of u||^2 - n ) / ( n (n - 1) )

A few dimensions that are enormous in every image bring this near 1, whatever the others do. So it says that the token
is almost constant as a vector, and not that it tells nothing about the image. Statements are decided on 30 images or
more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from jaxvit import ViT

from ..core.charts import COLOURS, canvas, caption, number, ordered, percent, short
from ..core.claims import Verdict, decide, images_of, largest_of, names, stated, tested
from ..core.experiment import About, Claim, Experiment, Found, Measured, Option, Results, Table, View, summary
from ..core.trace import Trace

PLACES = ("before", "after")
"""LN1 of the last block."""
REGISTERS = ("fixed", "argmax")
ALMOST = 0.99
"""A cosine above this counts as the paper's 0.9989."""
TEXTS = (
    "In the largest model the same register has the highest norm in every image.",
    f"In the largest model its cosine between images is about 0.9989 before LN1 (tested: above {ALMOST}).",
    "In the largest model its cosine between images is lower after LN1 than before.",
)
SIGNS = {"positive": COLOURS["registers"], "negative": COLOURS["patches"]}
BARS = (
    "The largest dimensions of its register with the highest norm, by rank: the number of the first is written beside "
    "it, and the colour is the sign of the mean. Both sides are ranked for themselves."
)


class TopRegister(Experiment):
    id = "A2"
    title = "The register with the highest norm"
    figure = "figure 2b"
    shown = (
        "The largest dimensions of the register with the highest norm at the input of the last block, averaged over "
        "images, before and after the block's first norm (LN1)."
    )
    options = (
        Option(
            "ranking",
            "absolute",
            "rank dimensions by their mean |x|, or by their mean",
            ("absolute", "signed"),
            late=True,
        ),
        Option("count", 100, "how many of the largest dimensions to show", late=True, least=1),
        Option(
            "register",
            "fixed",
            "one register for all images, or the one of highest norm in each image",
            REGISTERS,
            late=True,
        ),
    )

    def refuses(self, about: About) -> str | None:
        return None if about.registers else "has no registers"

    def measure(self, trace: Trace, model: ViT, options: Mapping[str, Any]) -> Measured:
        before = trace.prefix[-1][:, 1:]
        norm1 = jax.tree.map(lambda a: a[-1], model.blocks).norm1
        norms = jnp.linalg.norm(before.astype(trace.row.dtype), axis=-1)  # at least float32, whatever the model
        highest = norms.argmax(axis=1)[:, None, None]
        sums = {}
        for place, x_BRD in zip(PLACES, (before, norm1(before)), strict=True):
            x_BRD = x_BRD.astype(trace.row.dtype)
            # As one more register, that of highest norm in each image.
            x_BRD = jnp.concatenate([x_BRD, jnp.take_along_axis(x_BRD, highest, axis=1)], axis=1)
            norm = jnp.linalg.norm(x_BRD, axis=-1)
            unit = x_BRD / jnp.where(norm > 0, norm, 1)[..., None]
            sums |= {f"x {place}": x_BRD, f"|x| {place}": jnp.abs(x_BRD), f"unit {place}": unit}
            sums[f"unit squared {place}"] = jnp.square(unit).sum(-1)
        return Measured(per_image={"norm": norms}, sums=sums)

    def numbers(self, found: Mapping[str, Found], about: About, options: Mapping[str, Any]) -> dict[str, Any]:
        clean = found["clean"]
        norms = np.asarray(clean.per_image["norm"], np.float64)
        first = np.bincount(norms.argmax(axis=1), minlength=norms.shape[1]) / len(norms)
        register = int(norms.mean(axis=0).argmax())
        at = register if options["register"] == "fixed" else -1
        cosines = {
            place: pairwise_cosine(clean.sums[f"unit {place}"], clean.sums[f"unit squared {place}"], clean.n)
            for place in PLACES
        }
        tops = {}
        for place in PLACES:
            mean, absolute = (clean.sums[f"{what} {place}"][at] / clean.n for what in ("x", "|x|"))
            order = np.argsort(-(absolute if options["ranking"] == "absolute" else mean), kind="stable")
            tops[place] = [
                {"dimension": int(i), "mean": float(mean[i]), "mean absolute": float(absolute[i])}
                for i in order[: options["count"]]
            ]
        common = set.intersection(*({each["dimension"] for each in top} for top in tops.values()))
        return {
            "register": register,
            "is the argmax": float(first[register]),
            "norms": [summary(norms[:, r]) for r in range(norms.shape[1])],
            "highest norm": summary(norms.max(axis=1)),
            "cosine before": float(cosines["before"][at]),
            "cosine after": float(cosines["after"][at]),
            "per register": [
                {
                    "register": r,
                    "is the argmax": float(first[r]),
                    "cosine before": float(cosines["before"][r]),
                    "cosine after": float(cosines["after"][r]),
                }
                for r in range(norms.shape[1])
            ],
            "ranking": options["ranking"],
            "reading": {"register": options["register"]},
            "top before": tops["before"],
            "top after": tops["after"],
            "overlap": len(common) / len(tops["before"]),
        }

    def claims(self, results: Results, models: Mapping[str, About]) -> list[Claim]:
        def test(judge: Any) -> Any:
            def tell(members: list[About]) -> Verdict:
                large, missing = largest_of(members)
                if not large:
                    return Verdict(None, missing)
                verdicts = [judge(results[about.key]) for about in large]
                told = ", ".join(f"{names(members)[a.key]}: {v.by}" for a, v in zip(large, verdicts, strict=True))
                n = [images_of(results[about.key]["highest norm"]) for about in large]
                holds = [v.holds for v in verdicts]
                known = [math.nan if held is None else 0.0 for held in holds]
                return decide(told, n, known, lambda: all(holds))

            return tell

        def same(of: Mapping[str, Any]) -> Verdict:
            share = of["is the argmax"]
            return Verdict(share == 1, f"register {of['register']}, in {percent(share)} of images")

        def cosines(holds: Any) -> Any:
            def judge(of: Mapping[str, Any]) -> Verdict:
                before, after = (stated(of, f"cosine {place}") for place in PLACES)
                known = math.isfinite(before) and math.isfinite(after)
                told = f"{number(before, 4)} before, {number(after, 4)} after"
                return Verdict(holds(before, after) if known else None, told)

            return judge

        read = [option for option in self.options if option.name == "register"]
        return [
            # What is said of the highest norm in every image has one reading.
            *tested(4, self.id, TEXTS[0], test(same), results, models, registers=True),
            *tested(
                4,
                self.id,
                TEXTS[1],
                test(cosines(lambda before, after: before > ALMOST)),
                results,
                models,
                registers=True,
                options=read,
            ),
            *tested(
                4,
                self.id,
                TEXTS[2],
                test(cosines(lambda before, after: after < before)),
                results,
                models,
                registers=True,
                options=read,
            ),
        ]

    def table(self, results: Results, models: Mapping[str, About]) -> Table:
        rows = []
        for about in ordered({key: models[key] for key in results}):
            of = results[about.key]
            largest = of["top before"][0]
            rows.append(
                [
                    about.name,
                    f"{of['register']} (0 to {len(of['norms']) - 1})",
                    percent(of["is the argmax"]),
                    number((of["norms"][of["register"]] if fixed(of) else of["highest norm"])["mean"], 1),
                    *(number(of[f"cosine {place}"], 4) for place in PLACES),
                    f"{largest['dimension']}: {number(largest['mean'], 1)}",
                ]
            )
        head = ["model", "register", "highest in", "norm", "cosine before LN1", "after", "largest dimension: mean"]
        return Table(head, rows, "Cosines are means over all pairs of images; registers and dimensions count from 0.")

    def figures(self, view: View) -> dict[str, Figure]:
        models = ordered({key: view.models[key] for key in view.results})
        largest = max(models, key=lambda about: about.parameters)
        figures = {"2b": caption(drawn([largest], view.results), f"The largest model: {largest.name}. {BARS}")}
        if len(models) > 1:
            figures["2b-all"] = caption(drawn(models, view.results), f"Every model with registers. {BARS}")
        return figures


def pairwise_cosine(unit: np.ndarray, squared: np.ndarray, n: int) -> np.ndarray:
    """Mean cosine over all pairs of different images, [R].

    Args:
      unit: sums of unit vectors over images, [R, D].
      squared: sums of their squared lengths, [R]: n but for rounding and vectors of zeros, whose cosines count as 0.
    """
    return (np.square(unit).sum(-1) - squared) / (n * (n - 1)) if n > 1 else np.full(len(unit), np.nan)


def fixed(of: Mapping[str, Any]) -> bool:
    """Whether dimensions and cosines are of one register for all images."""
    return of["reading"]["register"] == "fixed"


def called(of: Mapping[str, Any]) -> str:
    return f"register {of['register']}" if fixed(of) else "highest register of each image"


def drawn(models: list[About], results: Results) -> Figure:
    """A row for each model: its largest dimensions before and after LN1."""
    figure, axes = canvas(2, len(models), width=8.6, height=0.6 + 2.5 * len(models), squeeze=False)
    for row, about in zip(axes, models, strict=True):
        of = results[about.key]
        for ax, place in zip(row, PLACES, strict=True):
            draw_top(ax, of[f"top {place}"], of["ranking"])
            ax.set(
                title=f"{short(about).replace(chr(10), ' ')}, {called(of)}, {place} LN1",
                ylabel="mean |x|" if of["ranking"] == "absolute" else "mean x",
            )
            told = f"cosine between images {number(of[f'cosine {place}'], 4)}"
            ax.text(0.98, 0.94, told, transform=ax.transAxes, ha="right", va="top", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("dimensions, by rank")
    handles = [Patch(color=colour, label=f"{sign} on average") for sign, colour in SIGNS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def draw_top(axes: Axes, top: list[dict[str, Any]], ranking: str) -> None:
    heights = [each["mean absolute" if ranking == "absolute" else "mean"] for each in top]
    colours = [SIGNS["negative" if each["mean"] < 0 else "positive"] for each in top]
    axes.bar(range(len(top)), heights, 0.9, color=colours)
    axes.annotate(f"{top[0]['dimension']}", (0, heights[0]), (4, -2), textcoords="offset points", va="top", fontsize=8)
    axes.set_xlim(-1, len(top))


EXPERIMENT = TopRegister()
