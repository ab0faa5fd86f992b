"""A4, figure 3b: what class an image is of, told from the full update of [CLS], and from the patches' part or the
registers' part of it alone.

    jaxvit A4 --models MODEL .. --labelled FOLDER --out OUT

A classifier is fitted on the full output of one image of each class, and tested on the full output, and on what is left
of it with one source of attention alone, of another image of each class. It never sees a part while it is fitted: so
this asks whether a part stands where the whole would, not how much a part tells. That is one draw; there are several,
and accuracies come with Student's t interval (95 %) over draws.

Outputs are read at two places:

  layerscale  what attention adds to [CLS] in the last layer, after the output projection and LayerScale, without the
              residual, as in A3. `patches`, `registers` and `cls` are what is left with the attention weights on all
              other tokens set to zero after the softmax, the rest not renormalised.
  final       [CLS] after the last block and the final norm, as if attention had added only that. The residual is in all
              of these; `skip` is what comes of the residual alone.

There are two classifiers, both of outputs scaled to length 1: multinomial logistic regression, and the nearest class
mean by cosine (here the one training image).

Options:

  draws       how many pairs of a training and a test image are drawn of each class. Draws share no image as long as
              every class has two for each draw: --labelled-per-class says how many images of each class the model
              reads. If classes are too small, we keep the draws that share no image. If fewer than two remain, we
              reuse images and decide no statement: the intervals are then too short, as they are about other draws
              from these images and not about other images
  seed        of the draws
  stage       at which place outputs are read
  bias        leave the bias of the output projection in all outputs at `layerscale`, where zeroed attention leaves it
  keep_cls    leave the attention of [CLS] to itself in the patches' and the registers' part
  top         an image counts as told if its class is among that many of highest score. With fewer than twice as many
              classes that is no feat, and figure and claim take the single highest
  l2          weight of the penalty, l2 / 2 ||weights||^2, beside the summed loss: 1 / C of scikit-learn
  iterations  most steps of L-BFGS
  tolerance   at which the fit stops: norm of the gradient over that at the start; how far fits came is in `fit`

A part at chance may still tell the class: it may be small beside the bias, or lie in other directions than the whole.
Classes with fewer than two images that can be used are left out, and counted. The paper does not tell its classifier,
its penalty or its number of draws, nor by how much is `far` less often: here small models must be right at least 1.5
times as often as large ones, with intervals apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from jaxvit import ViT
from jaxvit.tasks.classify import Classifier, accuracy, logistic_regression, nearest_mean, t_interval
from jaxvit.tasks.directions import unit

from ..core import charts
from ..core.claims import FAR, Verdict, lacking, names, sides, tested
from ..core.experiment import SOURCES, About, Claim, Experiment, Found, Measured, Option, Results, Table, View
from ..core.trace import Trace, cls_reading, parts

STAGES = ("layerscale", "final")
LOGISTIC, NEAREST = "logistic", "nearest mean"
READINGS = ("full", "patches", "registers", "cls", "skip")
READ = ("bias", "keep_cls", "top", "l2", "iterations", "tolerance")
"""Options that have a say in the claim."""
COLOURS = {"full": "#a7afb7", "patches": charts.COLOURS["patches"], "registers": charts.COLOURS["registers"]}
TITLES = {"layerscale": "update by attention", "final": "after the final norm"}


class OneShot(Experiment):
    id = "A4"
    title = "One-shot classification from parts of the [CLS] update"
    figure = "figure 3b"
    shown = (
        "Accuracy of a classifier fitted on the full output of one image of each class, on the full output, the "
        "patches' part and the registers' part of another. Lines: 95 % t intervals over draws; dashes: chance."
    )
    passes = ("labelled",)
    options = (
        Option("draws", 10, "how many pairs of a training and a test image to draw for each class", late=True, least=1),
        Option("seed", 0, "seed of the draws", late=True, least=0),
        Option("stage", "both", "where outputs are read", (*STAGES, "both")),
        Option("bias", True, "leave the bias of the output projection in all outputs"),
        Option("keep_cls", False, "leave the attention of [CLS] to itself in the patches' and the registers' part"),
        Option(
            "top", 5, "an image counts as right if its class is among this many of highest score", late=True, least=1
        ),
        Option("l2", 1.0, "weight of the logistic regression's penalty, 1 / C of scikit-learn", late=True, least=1e-9),
        Option("iterations", 500, "maximum number of L-BFGS steps", late=True, least=1),
        Option("tolerance", 1e-5, "relative norm of the gradient at which a fit stops", late=True, least=1e-12),
    )

    def measure(self, trace: Trace, model: ViT, options: Mapping[str, Any]) -> Measured:
        stages = STAGES if options["stage"] == "both" else (options["stage"],)
        found = {}
        for stage in stages:
            each = outputs(trace, model, stage, bias=options["bias"], keep_cls=options["keep_cls"])
            found |= {f"{stage} {name}": _stored(value) for name, value in each.items()}
        return Measured(per_image=found)

    def numbers(self, found: Mapping[str, Found], about: About, options: Mapping[str, Any]) -> dict[str, Any]:
        columns = found["labelled"].per_image
        labels = np.asarray(columns["label"])
        pairs, classes = draw_pairs(labels, options["draws"], options["seed"])
        C, top = len(classes), options["top"]
        apart = min(len(pairs), int(np.bincount(labels)[classes].min() // 2)) if C else 0
        if apart > 1:
            pairs = pairs[:apart]
        tops = (1,) if top == 1 else (1, top)
        few = 2 * top > C
        numbers: dict[str, Any] = {
            "classes": C,
            "draws": len(pairs),
            "draws asked for": options["draws"],
            "draws that share no image": apart,
            "chance": {f"top{k}": min(k / C, 1.0) if C else math.nan for k in tops},
            "reads": "top1" if few else f"top{top}",
            "left out": {
                "classes": int(columns["classes"][0]) - C,
                "images": int((~np.isin(labels, classes)).sum()),
            },
            "reading": {name: options[name] for name in READ},
        }
        if few:
            numbers["note"] = f"top {top} of {C} classes says little: top 1 is what is shown"
        if C < 2:
            return numbers | {"note": f"{C} classes have two images that can be used; at least 2 are needed"}
        names = list(columns)
        for stage in STAGES:
            if f"{stage} full" in names:
                readings = [name for name in READINGS if f"{stage} {name}" in names]
                numbers[stage] = of_stage(columns, stage, readings, pairs, tops, options)
        return numbers

    def claims(self, results: Results, models: Mapping[str, About]) -> list[Claim]:
        text = (
            "Fitted on the full update of one image a class, a classifier is right far less often on the patches' part "
            f"in the large models than in the small ones (tested: in these at least {FAR} times as often, with "
            "intervals apart)."
        )
        among = {key: numbers for key, numbers in results.items() if "layerscale" in numbers}

        def test(members: list[About]) -> Verdict:
            if missing := lacking(members):
                return Verdict(None, missing)
            small, large = sides(members)
            each = {about.key: shown(among[about.key], "layerscale", LOGISTIC, "patches") for about in members}
            called = names(members)
            by = ", ".join(f"{called[key]} {spell(one)}" for key, one in each.items())
            samples = list(dict.fromkeys(sample(among[about.key]) for about in members))
            by += f" ({'; '.join(samples)}; logistic regression)"
            if len({among[about.key]["classes"] for about in members}) > 1:
                return Verdict(None, f"not of the same classes: {by}")
            if any(among[about.key]["draws that share no image"] < 2 for about in members):
                return Verdict(None, f"needs at least 2 draws that share no image: {by}")
            if not all(math.isfinite(value) for one in each.values() for value in one.values()):
                return Verdict(None, f"undefined: {by}")
            of_large, of_small = ([each[about.key] for about in side] for side in (large, small))
            far = min(one["mean"] for one in of_small) >= FAR * max(one["mean"] for one in of_large)
            apart = max(one["high"] for one in of_large) < min(one["low"] for one in of_small)
            return Verdict(far and apart, by)

        read = [option for option in self.options if option.name in READ]
        more = ", and images with classes, read at layerscale"
        return tested(3, self.id, text, test, among, models, registers=True, options=read, more=more)

    def table(self, results: Results, models: Mapping[str, About]) -> Table | None:
        rows, notes = [], []
        for about in charts.ordered(models):
            numbers = results.get(about.key, {})
            for stage in (each for each in STAGES if each in numbers):
                for classifier in (LOGISTIC, NEAREST):
                    cells = [spell(shown(numbers, stage, classifier, name)) for name in READINGS]
                    chance = charts.percent(numbers["chance"][numbers["reads"]])
                    rows.append((about.name, TITLES[stage], classifier, *cells, chance))
                notes.append(sample(numbers))
        if not rows:
            return None
        head = ("model", "output", "classifier", "full", "patches", "registers", "[CLS] itself", "skip path", "chance")
        told = "; ".join(dict.fromkeys(notes))
        return Table(head, rows, f"Accuracy, {told}: mean and 95 % t interval over draws.")

    def figures(self, view: View) -> dict[str, Figure]:
        figures = {}
        for stage in STAGES:
            models = [a for a in charts.ordered(view.models) if stage in view.results.get(a.key, {})]
            if models:
                figures["3b" if stage == "layerscale" else f"3b-{stage}"] = chart(view.results, models, stage)
        return figures


def outputs(trace: Trace, model: ViT, stage: str, *, bias: bool = True, keep_cls: bool = False) -> dict[str, Array]:
    """The full output and what is left of it with single sources, [B, D] each, by name of `READINGS`."""
    update = parts(trace, model)
    constant = update["bias"] if bias or stage == "final" else jnp.zeros_like(update["bias"])
    present = [name for name in SOURCES if name in update]
    added = {"full": sum((update[name] for name in present), constant)}
    for name in present:
        extra = update["cls"] if keep_cls and name != "cls" else jnp.zeros_like(constant)
        added[name] = update[name] + extra + constant
    if stage == "layerscale":
        return added
    added["skip"] = constant
    skip = trace.skip[-1].astype(constant.dtype)
    return {name: cls_reading(model, (skip + each).astype(trace.skip.dtype), "final") for name, each in added.items()}


def _stored(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """In float32 at least: files know no bfloat16."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def draw_pairs(labels: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """For each draw and each class a training image and a test image, [draws, C, 2], as rows; and which classes, [C].

    The images of a class are put in random order and taken two by two; when fewer than two are left, all are put in
    order anew. Classes of fewer than two images are left out.
    """
    classes = np.asarray([label for label in np.unique(labels) if (labels == label).sum() > 1], np.int64)
    pairs = np.zeros((draws, len(classes), 2), np.int64)
    for at, label in enumerate(classes):
        rng, members = np.random.default_rng([seed, int(label)]), np.flatnonzero(labels == label)
        order: np.ndarray = members[:0]
        for each in range(draws):
            if len(order) < 2:
                order = rng.permutation(members)
            pairs[each, at], order = order[:2], order[2:]
    return pairs, classes


def of_stage(
    columns: Mapping[str, np.ndarray],
    stage: str,
    readings: Sequence[str],
    pairs: np.ndarray,
    tops: Sequence[int],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Accuracies of both classifiers at one stage, and how the fits went; reads one column after another."""
    C = pairs.shape[1]
    own = np.arange(C)
    full = np.asarray(columns[f"{stage} full"])
    fitted: dict[str, list[Classifier]] = {LOGISTIC: [], NEAREST: []}
    fits = []
    for pair in pairs:
        train = unit(full[pair[:, 0]])
        how = {name: options[name] for name in ("l2", "iterations", "tolerance")}
        fits.append(logistic_regression(train, own, C, **how))
        fitted[LOGISTIC].append(fits[-1].classifier)
        fitted[NEAREST].append(nearest_mean(train, own, C))
    found: dict[str, Any] = {name: {} for name in fitted}
    draws: dict[str, Any] = {name: {} for name in fitted}
    for reading in readings:
        column = full if reading == "full" else np.asarray(columns[f"{stage} {reading}"])
        tests = [unit(column[pair[:, 1]]) for pair in pairs]
        for name, classifiers in fitted.items():
            scores = [classifier.scores(test) for classifier, test in zip(classifiers, tests, strict=True)]
            each = {f"top{k}": [accuracy(score, own, k) for score in scores] for k in tops}
            found[name][reading] = {top: t_interval(values) for top, values in each.items()}
            draws[name][reading] = each
    found["draws"] = draws
    found["fit"] = {
        "converged": sum(fit.gradient <= options["tolerance"] for fit in fits),
        "largest gradient": max(fit.gradient for fit in fits),
        "most steps": max(fit.steps for fit in fits),
    }
    return found


def shown(numbers: Mapping[str, Any], stage: str, classifier: str, reading: str) -> dict[str, float]:
    """Mean, low and high of the accuracy that is shown; NaN where undefined, which results.json has as null."""
    interval = numbers[stage][classifier].get(reading, {}).get(numbers["reads"], {})
    return {name: math.nan if interval.get(name) is None else interval[name] for name in ("mean", "low", "high")}


def spell(interval: Mapping[str, float]) -> str:
    """Mean and half the length of an interval, in per cent."""
    if not math.isfinite(interval["mean"]):
        return "–"  # noqa: RUF001
    mean, half = (charts.number(100 * x, 1) for x in (interval["mean"], interval["high"] - interval["mean"]))
    return f"{mean} %" if half == "undefined" else f"{mean} ± {half} %"


def words(reads: str) -> str:
    return reads.replace("top", "top-")


def sample(numbers: Mapping[str, Any]) -> str:
    """What the accuracies are of."""
    apart, draws, asked = (numbers[name] for name in ("draws that share no image", "draws", "draws asked for"))
    note = "" if apart == draws == asked else f" that share no image, of {asked} asked for"
    if apart != draws:
        note = f" of which {apart} share no image: intervals are too short"
    return f"{words(numbers['reads'])} of {numbers['classes']} classes, {draws} draws{note}"


def chart(results: Results, models: Sequence[About], stage: str) -> Figure:
    """Bars of each model, one chart for each classifier."""
    figure, axes = charts.canvas(2, width=max(7.0, 1.6 + 1.7 * len(models)), height=3.8, sharey=True)
    for at, (classifier, axis) in enumerate(zip((LOGISTIC, NEAREST), axes, strict=True)):
        heights, halves, chance = {}, {}, {}
        present = [name for name in COLOURS if any(name in results[about.key][stage][classifier] for about in models)]
        for name in present:
            each = [shown(results[about.key], stage, classifier, name) for about in models]
            heights[name] = [100 * one["mean"] for one in each]
            halves[name] = [100 * np.nan_to_num(one["high"] - one["mean"]) for one in each]
            chance[name] = [
                100 * results[about.key]["chance"][results[about.key]["reads"]]
                if math.isfinite(one["mean"])
                else math.nan
                for about, one in zip(models, each, strict=True)
            ]
        charts.bars(axis, heights, [charts.short(about) for about in models], COLOURS, errors=halves, marks=chance)
        axis.set_title({LOGISTIC: "logistic regression", NEAREST: "nearest class mean"}[classifier])
        if at == 0:
            read = sorted({words(results[about.key]["reads"]) for about in models})
            axis.set_ylabel(f"{charts.listed(read)} accuracy, %")
    axes[0].set_ylim(0, max(axes[0].get_ylim()[1], 1))
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    told = "; ".join(dict.fromkeys(sample(results[about.key]) for about in models))
    return charts.caption(figure, f"Output: {TITLES[stage]}. Accuracy, {told}.")


EXPERIMENT = OneShot()
