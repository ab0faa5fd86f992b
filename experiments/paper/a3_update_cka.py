"""A3, figure 3a: how much of what attention brings to [CLS] in the last layer is in the patches' part, and how much in
the registers'.

    jaxvit A3 --models MODEL .. --images FOLDER --out OUT

Linear CKA over images between the full update of [CLS] by attention and the part of it that patches alone, or registers
alone, bring. By default a part is what is left of the update when the attention weights on all other tokens are set to
zero after the softmax, and the rest of the row stays as it is: so the parts of [CLS], registers and patches, and the
bias, add up to the update. The attention of [CLS] to itself is in neither of the two parts, but it is in the update.
Both are read after the output projection and LayerScale, without the residual.

Options:

  renormalise  divide each head's part by its attention on the tokens that are left, as if the softmax had been over
               them alone
  keep_cls     leave the attention of [CLS] to itself in both parts
  stage        heads       outputs of the heads side by side, before the output projection
               proj        after the output projection
               layerscale  after LayerScale
               block       [CLS] after the block, residual and MLP included, if attention had brought that part and the
                           bias alone
               final       that, after the final norm

CKA does not see the bias before `block`. Its usual estimate is inflated unless n is far above d, so it comes with the
unbiased one, on which the claims are decided (of 30 images or more), and with the mean of the biased one over all
orders of the rows (null).
A CKA says that two sets of vectors vary alike over images, and nothing of their sizes: the parts' CKAs do not add up,
and parts that vary together both have a high one. A part that does not vary has none (NaN).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from jaxvit import ViT
from jaxvit.analysis.decompose import einsum, readout

from ..core import charts
from ..core.cka import cka_bars, cka_images, cka_table, controls_figure, plain_cka, told_ckas, unbiased
from ..core.claims import Verdict, decide, falls, groups, lacking, largest_of, names, sides, tested
from ..core.experiment import About, Claim, Experiment, Found, Measured, Option, Pairs, Results, Table, View
from ..core.trace import READINGS, Trace, by_source, cls_reading

ALMOST_ALL = 0.9
"""What counts as a CKA of about 1."""


class UpdateCKA(Experiment):
    id = "A3"
    title = "CKA of the full [CLS] update with its patches' and its registers' part"
    figure = "figure 3a"
    shown = (
        "Linear CKA over images between what attention adds to [CLS] in the last layer and the part that comes from "
        "patches, or from registers, alone. Bars: unbiased; circles: biased; dashes: the biased one's mean over all "
        "orders of the images."
    )
    passes = ("clean", "controls")
    controlled = True
    options = (
        Option("renormalise", False, "divide a part by the head's attention on the tokens that are left"),
        Option("keep_cls", False, "leave the attention of [CLS] to itself in both parts"),
        Option("stage", "layerscale", "where update and parts are read", READINGS),
    )

    def measure(self, trace: Trace, model: ViT, options: Mapping[str, Any]) -> Measured:
        return Measured(pairs={"update": readings(trace, model, **options)})

    def numbers(self, found: Mapping[str, Found], about: About, options: Mapping[str, Any]) -> dict[str, Any]:
        ckas = {name: plain_cka(cka) for name, cka in found["clean"].cka["update"].results().items()}
        return ckas | {"reading": dict(options)}

    def claims(self, results: Results, models: Mapping[str, About]) -> list[Claim]:
        texts = {
            f"CKA(update, patches) is about 1 (above {ALMOST_ALL}) in the small models and falls from one large size "
            "to the next.": falls_in,
            "In the largest model, CKA(update, registers) is above CKA(update, patches).": overtakes,
        }
        found = []
        for text, test in texts.items():
            found += tested(
                2, self.id, text, partial(test, results), results, models, registers=True, options=self.options
            )
        return found

    def table(self, results: Results, models: Mapping[str, About]) -> Table | None:
        return cka_table(results, models, ("patches", "registers", "cls"))

    def figures(self, view: View) -> dict[str, Figure]:
        shown = [about for about in charts.ordered(view.models) if about.key in view.results]
        if not shown:
            return {}
        figure, axes = charts.canvas(width=max(5.0, 1.0 + 1.1 * len(shown)))
        cka_bars(axes, view.results, shown, ("patches", "registers"))
        axes.set_title("Full update and its parts")
        figures = {"3a": figure}
        if controls := controls_figure(view, ("patches", "registers")):
            figures["3a-controls"] = controls
        return figures


def falls_in(results: Results, members: Sequence[About]) -> Verdict:
    """The paper's: in a family that was given with all of its large sizes."""
    if missing := lacking(members):
        return Verdict(None, missing)
    small, large = sides(members)
    values = {about.key: unbiased(results, about, "patches") for about in members}
    levels = [[values[about.key] for about in each] for each in (small, *groups(large))]
    told, n = told_ckas(results, members, "patches"), [cka_images(results, about) for about in members]
    return decide(told, n, values.values(), lambda: min(levels[0]) > ALMOST_ALL and falls(levels))


def overtakes(results: Results, members: Sequence[About]) -> Verdict:
    large, missing = largest_of(members)
    if not large:
        return Verdict(None, missing)
    values = {a.key: [unbiased(results, a, name) for name in ("registers", "patches")] for a in large}
    called = names(members)
    each = (f"{called[key]} {charts.number(a)} against {charts.number(b)}" for key, (a, b) in values.items())
    told, n = f"unbiased: {', '.join(each)}", [cka_images(results, about) for about in large]
    return decide(told, n, chain(*values.values()), lambda: all(a > b for a, b in values.values()))


def readings(trace: Trace, model: ViT, *, renormalise: bool, keep_cls: bool, stage: str) -> Pairs:
    """The full update of [CLS] in the last layer and its parts, at any reading."""
    others = {name: read(trace, model, z, stage) for name, z in kept(trace, model, renormalise, keep_cls).items()}
    return Pairs(full(trace, model, stage), others)


def kept(trace: Trace, model: ViT, renormalise: bool, keep_cls: bool) -> dict[str, Float[Array, "B H d"]]:
    """What the heads write in the last layer if [CLS] attends to one source alone: `patches`, `registers` (if there are
    any), `cls`.
    """
    z, mass = by_source(trace.z[-1], model, axis=1), by_source(trace.mass[-1], model, axis=2)
    if keep_cls:
        z, mass = ({n: x if n == "cls" else x + each["cls"] for n, x in each.items()} for each in (z, mass))
    if renormalise:
        z = {name: _over(z[name], mass[name][..., None]) for name in z}
    return z


def _over(x: Array, mass: Array) -> Array:
    """0 where there is no attention at all."""
    return jnp.where(mass > 0, x / jnp.where(mass > 0, mass, 1), 0)


def full(trace: Trace, model: ViT, stage: str) -> Float[Array, "B D"]:
    """The whole whose parts `read` gives."""
    if stage in ("block", "final"):
        return trace.after[-1] if stage == "block" else model.norm(trace.after[-1])
    return trace.update[-1] if stage == "layerscale" else read(trace, model, trace.z[-1].sum(axis=1), stage)


def read(trace: Trace, model: ViT, z_BHd: Float[Array, "B H d"], stage: str) -> Float[Array, "B D"]:
    """What becomes of outputs of the heads of the last layer, at one of `READINGS`; with the bias."""
    if stage == "heads":
        return z_BHd.reshape(len(z_BHd), -1)
    after = jax.tree.map(lambda a: a[-1].astype(z_BHd.dtype), readout(model))
    update = einsum("BHd,HdD->BD", z_BHd, after.kernel) + after.bias[None]
    if stage == "proj":
        return update
    update = update * after.gamma[None]
    return update if stage == "layerscale" else cls_reading(model, trace.skip[-1] + update, stage)  # type: ignore[arg-type]


EXPERIMENT = UpdateCKA()
