"""Sensitivity: A3, A5 and A9 under all their readings, in one pass over the images.

    jaxvit sensitivity --models MODEL .. --images FOLDER --out OUT

The paper does not say where it reads its vectors, nor what becomes of the rest of an attention row when a group's part
is cut. Here is every combination of the options of

  A3   renormalise, keep_cls, stage   CKA of the update with the patches' and the registers' part
  A5   stage, bias                    cosine of the patches' (the registers', its own) part with the update
  A9   reading                        CKA of [CLS] after attention with each of its summands

with the default reading marked, and for every model whether another reading would turn the paper's ordering round:
whether registers' CKA is above the patches' (A3), whether the patches' part points along the update (A5), whether the
skip path's CKA is above the patches' (A9). Orderings over sizes are tested again under every reading.

CKAs are compared by their unbiased estimate. Differences near zero may turn by chance: look at the values. Takes 112
D x D matrices in float64 for a model with registers: 130 MB for S, 940 MB for L, 2.1 GB for g.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure

from jaxvit import ViT

from ..core import charts
from ..core.cka import plain_cka
from ..core.experiment import (
    SOURCES,
    About,
    Claim,
    Experiment,
    Found,
    Measured,
    Option,
    Pairs,
    Results,
    Table,
    View,
)
from ..core.trace import Trace
from ..paper import a3_update_cka, a5_patch_cosine, a9_skip_cka

A3, A5, A9 = a3_update_cka.EXPERIMENT, a5_patch_cosine.EXPERIMENT, a9_skip_cka.EXPERIMENT
STUDIED: dict[str, Experiment] = {e.id: e for e in (A3, A5, A9)}
STATEMENTS = {
    "A3": ("CKA(registers) > CKA(patches)", "CKA(registers)", "CKA(patches)"),
    "A5": ("cosine(patches) > 0", "cosine(patches)", None),
    "A9": ("CKA(skip) > CKA(patches)", "CKA(skip)", "CKA(patches)"),
}
"""Experiment -> what is compared within one model: that the first quantity is above the second, or above zero."""
VERDICTS = {True: "holds", False: "does not hold", None: "is undecided"}


class Sensitivity(Experiment):
    id = "sensitivity"
    alone = True
    title = "Do the readings the paper leaves open matter?"
    shown = (
        "Unbiased CKAs (A3, A9) and mean cosines (A5) under every reading; the default readings are in bold, and a "
        "mark says where the ordering within the model is another than under the default."
    )

    def measure(self, trace: Trace, model: ViT, options: Mapping[str, Any]) -> Measured:
        pairs, sums = {}, {}
        for stage in choices(A3, "stage"):
            # Update and stage are common to these four readings: one reference serves all.
            others: dict[str, Array] = {}
            for renormalise, keep_cls in product((False, True), repeat=2):
                of = a3_update_cka.readings(trace, model, renormalise=renormalise, keep_cls=keep_cls, stage=stage)
                others |= {
                    f"{named(renormalise=renormalise, keep_cls=keep_cls)} {name}": part
                    for name, part in of.others.items()
                    if name != "cls"
                }
            pairs[f"A3 {stage}"] = Pairs(of.reference, others)
        for stage in choices(A5, "stage"):
            cosines = A5.measure(trace, model, {"stage": stage, "bias": "with"}).per_image  # gives both
            for name, values in cosines.items():
                sums |= {f"A5 {stage} {name}": values, f"A5 {stage} {name} squared": values**2}
        for reading in choices(A9, "reading"):
            pairs[f"A9 {reading}"] = a9_skip_cka.readings(trace, model, reading)
        return Measured(pairs=pairs, sums=sums)

    def numbers(self, found: Mapping[str, Found], about: About, options: Mapping[str, Any]) -> dict[str, Any]:
        rows = list(all_rows(found["clean"]))
        return {"rows": rows, "orderings": orderings(rows)}

    def claims(self, results: Results, models: Mapping[str, About]) -> list[Claim]:
        found = []
        for e in (A3, A9):
            of_reading = {}
            for reading in readings(e):
                numbers = {key: as_numbers(each["rows"], e.id, reading) for key, each in results.items()}
                of_reading[label(reading)] = e.claims(numbers, models)
            default = label(defaults(e))
            for i, claim in enumerate(of_reading[default]):
                held = {name: claims[i].holds for name, claims in of_reading.items()}
                if all(holds is None for holds in held.values()):
                    continue  # the experiment itself says what is missing
                differing = [name for name, holds in held.items() if holds != claim.holds]
                usual, same = VERDICTS[claim.holds], None if claim.holds is None else not differing
                by = f"{usual} under the default ({claim.by}) and {len(held) - 1 - len(differing)} of {len(held) - 1} "
                by += "other readings"
                by += f"; not so under: {'; '.join(differing)}" if differing else ""
                text = f"The verdict does not depend on the reading of {e.id} (default: {usual}): {claim.text}"
                found.append(Claim(0, self.id, text, same, by, claim.on))
        return found

    def table(self, results: Results, models: Mapping[str, About]) -> Table | None:
        shown = [about for about in charts.ordered(models) if about.key in results]
        if not shown:
            return None
        rows = []
        for e in STUDIED.values():
            for reading in readings(e):
                star = " *" if reading == defaults(e) else ""
                cells = [cell(results[about.key], e.id, reading) for about in shown]
                rows.append((f"{e.id}: {label(reading)}{star}", *cells))
        note = (
            "A3: CKA of patches / registers; A5: mean cosine of the patches' part; A9: CKA of patches / skip path. "
            "*: default reading. ≠: orders the two, or has the sign, other than the default does."
        )
        return Table(("reading", *(about.name for about in shown)), rows, note)

    def figures(self, view: View) -> dict[str, Figure]:
        shown = [about for about in charts.ordered(view.models) if about.key in view.results]
        if not shown:
            return {}
        counts = [len(readings(e)) for e in STUDIED.values()]
        figure, axes = charts.canvas(
            len(shown),
            len(STUDIED),
            width=3.2 + 2.4 * len(shown),
            height=2.6 + 0.2 * sum(counts),
            squeeze=False,
            sharex="row",
            sharey="row",
            height_ratios=counts,
        )
        for (id, e), line in zip(STUDIED.items(), axes, strict=True):
            each_reading = readings(e)
            quantities = [name for name in STATEMENTS[id][1:] if name]
            for about, chart in zip(shown, line, strict=True):
                of = view.results[about.key]
                changed = [ordering(of, id, reading)["as default"] is False for reading in each_reading]
                for quantity in quantities:
                    source = quantity.partition("(")[2].rstrip(")")
                    values = [value_of(of["rows"], id, reading, quantity) for reading in each_reading]
                    label_of = charts.LABELS[source]
                    chart.plot(values, range(len(values)), "o", color=charts.COLOURS[source], label=label_of)
                    other = np.where(changed, np.asarray(values, float), np.nan)
                    chart.plot(other, range(len(values)), "x", color=charts.INK)
                chart.grid(True, axis="both")
                chart.set_xlabel("mean cosine" if id == "A5" else "CKA, unbiased")
            line[0].set_yticks(range(len(each_reading)), [label(reading) for reading in each_reading])
            for tick, reading in zip(line[0].get_yticklabels(), each_reading, strict=True):
                tick.set_fontweight("bold" if reading == defaults(e) else "normal")
            line[0].set_ylim(len(each_reading) - 0.5, -0.5)
            line[0].set_ylabel(id)
        for about, chart in zip(shown, axes[0], strict=True):
            chart.set_title(charts.short(about).replace("\n", " "))
        handles = {}
        for chart in axes.ravel():
            handles |= {name: handle for handle, name in zip(*chart.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
        return {"sensitivity": figure}


def option(e: Experiment, name: str) -> Option:
    return next(each for each in e.options if each.name == name)


def choices(e: Experiment, name: str) -> Sequence[Any]:
    """All values of an option."""
    found = option(e, name)
    return (False, True) if isinstance(found.default, bool) else found.choices or ()


def readings(e: Experiment) -> list[dict[str, Any]]:
    """All combinations of an experiment's options."""
    names = [each.name for each in e.options]
    return [dict(zip(names, values, strict=True)) for values in product(*(choices(e, name) for name in names))]


def defaults(e: Experiment) -> dict[str, Any]:
    return {each.name: each.default for each in e.options}


def named(*, renormalise: bool, keep_cls: bool) -> str:
    """Of the readings of A3 that share a stage."""
    return f"{'renormalised' if renormalise else 'as they are'}, {'with' if keep_cls else 'without'} cls,"


def label(reading: Mapping[str, Any]) -> str:
    """For people: switches by name if they are on, `bias` with its word, all else by value."""
    told = []
    for name, value in reading.items():
        if isinstance(value, bool):
            told += [name] if value else []
        else:
            told.append(f"{value} {name}" if name == "bias" else str(value))
    return ", ".join(reversed(told))


def all_rows(found: Found) -> Iterator[dict[str, Any]]:
    """One row for each experiment, reading and quantity."""
    kinds = {name: cka.results() for name, cka in found.cka.items()}
    for reading in readings(A3):
        switches = named(renormalise=reading["renormalise"], keep_cls=reading["keep_cls"])
        for name, cka in kinds[f"A3 {reading['stage']}"].items():
            if name.startswith(f"{switches} "):
                yield row(A3, reading, f"CKA({name.removeprefix(f'{switches} ')})", plain_cka(cka))
    for reading in readings(A5):
        for source in reversed(SOURCES):
            column = source + (a5_patch_cosine.WITHOUT if reading["bias"] == "without" else "")
            name = f"A5 {reading['stage']} {column}"
            if name in found.sums:
                mean, square = (float(found.sums[each] / found.n) for each in (name, f"{name} squared"))
                values = {"n": found.n, "mean": mean, "std": math.sqrt(max(square - mean**2, 0))}
                yield row(A5, reading, f"cosine({source})", values)
    for reading in readings(A9):
        for name, cka in kinds[f"A9 {reading['reading']}"].items():
            yield row(A9, reading, f"CKA({name})", plain_cka(cka))


def row(e: Experiment, reading: dict[str, Any], quantity: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`value` is what orderings are decided on."""
    value = values["unbiased"] if "unbiased" in values else values["mean"]
    is_default = reading == defaults(e)
    return {
        "experiment": e.id,
        "reading": reading,
        "default": is_default,
        "quantity": quantity,
        "value": value,
        **values,
    }


def value_of(rows: Sequence[Mapping[str, Any]], id: str, reading: Mapping[str, Any], quantity: str) -> float:
    """NaN where it is undefined, or there is no such quantity."""
    for each in rows:
        if (each["experiment"], each["quantity"]) == (id, quantity) and each["reading"] == reading:
            return math.nan if each["value"] is None else each["value"]
    return math.nan


def orderings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each reading: whether the statement on its experiment holds, and whether that is as under the default; None
    where a quantity is undefined.
    """
    found = []
    for id, (statement, first, second) in STATEMENTS.items():
        e = STUDIED[id]

        def holds(reading: Mapping[str, Any], id: str = id, first: str = first, second: str | None = second) -> Any:
            a, b = value_of(rows, id, reading, first), 0.0 if second is None else value_of(rows, id, reading, second)
            return a > b if math.isfinite(a) and math.isfinite(b) else None

        usual = holds(defaults(e))
        for reading in readings(e):
            here = holds(reading)
            same = None if here is None or usual is None else here == usual
            is_default = reading == defaults(e)
            found.append(
                {
                    "experiment": id,
                    "reading": reading,
                    "default": is_default,
                    "statement": statement,
                    "holds": here,
                    "as default": same,
                }
            )
    return found


def ordering(numbers: Mapping[str, Any], id: str, reading: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(each for each in numbers["orderings"] if (each["experiment"], each["reading"]) == (id, reading))


def as_numbers(rows: Sequence[Mapping[str, Any]], id: str, reading: Mapping[str, Any]) -> dict[str, Any]:
    """What A3 or A9 has as numbers of a model under one reading."""
    return {
        each["quantity"].removeprefix("CKA(").rstrip(")"): each
        for each in rows
        if each["experiment"] == id and each["reading"] == reading
    }


def cell(numbers: Mapping[str, Any], id: str, reading: Mapping[str, Any]) -> str:
    quantities = [name for name in STATEMENTS[id][:0:-1] if name]
    values = [value_of(numbers["rows"], id, reading, quantity) for quantity in quantities]
    told = " / ".join(charts.number(x) if math.isfinite(x) else "–" for x in values)  # noqa: RUF001
    return told + (" ≠" if ordering(numbers, id, reading)["as default"] is False else "")


EXPERIMENT = Sensitivity()
