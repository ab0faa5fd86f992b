"""The model's features, clean and under interventions, and what tasks make of them.

Each task has two scores under an intervention. `fixed`: the readout was fitted to clean features, and meets changed
ones: what the model's users would see. `refitted`: it was fitted to changed features: what information is left. Tasks
without a fit have one score. All are of the same test images, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from jaxvit import ActivationStats, ViT, read_out
from jaxvit.io.progress import bar
from jaxvit.tasks import classify, dense, match
from jaxvit.tasks.directions import unit
from jaxvit.tasks.score import Score, mean_of

from . import under as interventions
from .data import Answers, batches
from .under import Under

CLEAN = "clean"
Arrays = dict[str, np.ndarray]


class Task(NamedTuple):
    """What is scored.

    Attributes:
      title: of the table.
      reads: readouts it needs.
      score: of what was fitted (None if nothing is), features to test, and the answers.
      fit: of features to fit to, and the answers; None: nothing is fitted.
      scenes: whether it needs scenes.
    """

    title: str
    reads: tuple[str, ...]
    score: Callable[[Any, Arrays, Answers], Score]
    fit: Callable[[Arrays, Answers], Any] | None = None
    scenes: bool = False


# Tasks ----------------------------------------------------------------------------------------------------------------

LAST, MEAN, GRID, KEYS = "cls@-1:normed", "patch_mean", "patches:grid", "k@-1:patches"


def learned(answers: Answers) -> np.ndarray:
    """Labels of the images to learn from."""
    return answers.labels[: answers.train]


def tested(answers: Answers) -> np.ndarray:
    return answers.labels[answers.train :]


def rows(arrays: Arrays, names: tuple[str, ...]) -> np.ndarray:
    """Vectors of length 1, side by side."""
    return np.concatenate([unit(arrays[name]) for name in names], axis=1)


NEIGHBOURS = 20


def by_neighbours(top: int) -> Callable[[Any, Arrays, Answers], Score]:
    def score(train: np.ndarray, test: Arrays, answers: Answers) -> Score:
        labels, classes = learned(answers), len(answers.classes)
        scores = classify.nearest_neighbours(train, labels, rows(test, (LAST,)), classes, NEIGHBOURS)
        return mean_of(classify.hits(scores, tested(answers), top))

    return score


def by_classifier(*names: str) -> Callable[[Any, Arrays, Answers], Score]:
    def score(classifier: classify.Classifier, test: Arrays, answers: Answers) -> Score:
        return mean_of(classify.hits(classifier.scores(rows(test, names)), tested(answers), 1))

    return score


def fit_nearest_mean(fit: Arrays, answers: Answers) -> classify.Classifier:
    return classify.nearest_mean(rows(fit, (LAST,)), learned(answers), len(answers.classes))


def fit_probe(*names: str) -> Callable[[Arrays, Answers], classify.Classifier]:
    return lambda fit, answers: (
        classify.linear_probe(rows(fit, names), learned(answers), len(answers.classes)).classifier
    )


def masks(answers: Answers, numbers: range) -> np.ndarray:
    assert answers.scene is not None, "see `Task.scenes`"
    return np.stack([answers.scene(number, 0).mask for number in numbers])


def fit_segmentation(fit: Arrays, answers: Answers) -> classify.Classifier:
    return dense.fit_segmentation(unit(fit[GRID]), masks(answers, range(answers.train)), len(answers.classes) + 1)


def segmentation(classifier: classify.Classifier, test: Arrays, answers: Answers) -> Score:
    held = masks(answers, range(answers.train, len(answers.labels)))
    return dense.mean_iou(dense.segment(classifier, unit(test[GRID]), held.shape[1:]), held, len(answers.classes) + 1)


def correspondence(nothing: None, test: Arrays, answers: Answers) -> Score:
    """Of the 16 points of a scene, how many are found in its second view within a tenth of its larger side."""
    assert answers.scene is not None, "see `Task.scenes`"
    counts = []
    for at, (a, b) in enumerate(zip(test[GRID], test["second view"], strict=True)):
        one, other = (answers.scene(answers.train + at, view) for view in (0, 1))
        patch = one.mask.shape[0] / a.shape[0]
        extent = max(other.box[2] - other.box[0], other.box[3] - other.box[1])
        found = match.correspondences(a, b, one.points / patch)
        right = match.pck(found * patch, other.points, extent)
        counts.append([right.sum(), len(right)])
    return Score(np.array(counts, float), lambda sums: sums[..., 0] / sums[..., 1])


def box_in_patches(answers: Answers, number: int, patches: np.ndarray) -> match.Box:
    assert answers.scene is not None, "see `Task.scenes`"
    scene = answers.scene(number, 0)
    top, left, bottom, right = (edge * patches.shape[0] / scene.mask.shape[0] for edge in scene.box)
    return top, left, bottom, right


def pointing(nothing: None, test: Arrays, answers: Answers) -> Score:
    hits = [
        match.point_in_box(cls, patches, box_in_patches(answers, answers.train + at, patches))[0]
        for at, (cls, patches) in enumerate(zip(test[LAST], test[GRID], strict=True))
    ]
    return mean_of(np.array(hits, float))


def discovery(nothing: None, test: Arrays, answers: Answers) -> Score:
    """Of keys without their mean over the picture: DINOv2's share a large part, which makes all products positive."""
    hits = []
    for at, (keys, patches) in enumerate(zip(test[KEYS], test[GRID], strict=True)):
        features = keys.reshape(*patches.shape[:2], -1)
        features = features - features.mean(axis=(0, 1), keepdims=True)
        box = box_in_patches(answers, answers.train + at, patches)
        hits.append(match.overlap(match.lost(features), box) > 0.5)
    return mean_of(np.array(hits, float))


def neighbours(fit: Arrays, answers: Answers) -> np.ndarray:
    return rows(fit, (LAST,))


CLS, BOTH = (LAST,), (LAST, MEAN)
TASKS = {
    "knn": Task("k-NN, 20 neighbours, top-1", CLS, by_neighbours(1), neighbours),
    "knn-top5": Task("k-NN, 20 neighbours, top-5", CLS, by_neighbours(5), neighbours),
    "nearest-mean": Task("nearest class mean, top-1", CLS, by_classifier(*CLS), fit_nearest_mean),
    "probe": Task("linear probe of [CLS], top-1", CLS, by_classifier(*CLS), fit_probe(*CLS)),
    "probe-patches": Task(
        "linear probe of [CLS] and the mean patch, top-1", BOTH, by_classifier(*BOTH), fit_probe(*BOTH)
    ),
    "segmentation": Task("linear segmentation, mIoU", (GRID,), segmentation, fit_segmentation, scenes=True),
    "correspondence": Task("correspondence, PCK 0.1", (GRID,), correspondence, scenes=True),
    "pointing": Task("[CLS]'s nearest patch in the box", (LAST, GRID), pointing, scenes=True),
    "discovery": Task("LOST on centred keys, CorLoc", (KEYS, GRID), discovery, scenes=True),
}


# The study ------------------------------------------------------------------------------------------------------------


def possible(answers: Answers, model: ViT, asked: Sequence[str] | None) -> list[str]:
    """The tasks that these images and this model allow.

    Raises:
      ValueError: a task that was asked for and is not possible, or is not known.
    """
    if unknown := [name for name in asked or () if name not in TASKS]:
        raise ValueError(f"there is no task {unknown[0]}; there are {', '.join(TASKS)}")
    found = []
    for name, task in TASKS.items():
        why = "needs the masks of generated scenes" if task.scenes and answers.scene is None else ""
        why = why or ("needs a class token" if LAST in task.reads and not model.config.cls else "")
        few = task.fit is neighbours and answers.train < NEIGHBOURS
        why = why or (f"needs {NEIGHBOURS} images to learn from, not {answers.train}" if few else "")
        if asked and name in asked and why:
            raise ValueError(f"{name} {why}")
        if not why and name in (asked or TASKS):
            found.append(name)
    if not found:
        raise ValueError("no task is possible: these images have no masks, and the model has no class token")
    return found


def run(
    model: ViT,
    answers: Answers,
    under: Sequence[Under] = (),
    tasks: Sequence[str] | None = None,
    *,
    batch_size: int = 16,
    size: Any = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Scores tasks, clean and under each intervention.

    Returns:
      task -> {"clean": {value, low, high}, "under": {text: {"fixed": .., "refitted": ..}}}, where each has its own
      value, low and high, and those of `difference` from clean. JSON.

    Raises:
      ValueError: a task or an intervention that is not possible.
      ImageError: an image that cannot be used.
    """
    names = possible(answers, model, tasks)
    reads = tuple(dict.fromkeys(read for name in names for read in TASKS[name].reads))
    second = "correspondence" in names
    stats = None
    if any(each.needs for each in under):
        learn = (images for images, _ in batches(model, map(answers.source, range(answers.train)), batch_size, size))
        stats = ActivationStats.collect(model, learn, interventions.SITE, progress=progress)
    makers: dict[str, Any] = {CLEAN: None} | {each.text: each.make(model, stats) for each in under}
    n = len(answers.labels)
    rounds = len(makers) * (n + second * (n - answers.train))
    found: dict[str, Any] = {}
    readouts: dict[str, Any] = {}
    scores: dict[str, Score] = {}
    with bar("images", rounds, progress) as advance:
        for text, make in makers.items():
            fit, test = features(model, answers, make, reads, second, batch_size, size, seed, advance)
            for name in names:
                task = TASKS[name]
                own = None if task.fit is None else task.fit(fit, answers)
                if make is None:
                    readouts[name], scores[name] = own, task.score(own, test, answers)
                    found[name] = {"title": task.title, CLEAN: scores[name].summary(seed), "under": {}}
                    continue
                each = {"fixed": task.score(readouts[name], test, answers)}
                if task.fit is not None:
                    each["refitted"] = task.score(own, test, answers)
                found[name]["under"][text] = {
                    how: score.summary(seed) | {"difference": score.minus(scores[name], seed)}
                    for how, score in each.items()
                }
    return found


def features(
    model: ViT,
    answers: Answers,
    make: Any,
    reads: tuple[str, ...],
    second: bool,
    batch_size: int,
    size: Any,
    seed: int,
    advance: Callable[[int], object],
) -> tuple[Arrays, Arrays]:
    """Of the images to learn from, and of those to test on."""

    @jax.jit
    def read(model: ViT, images: Array, key: Array) -> dict[str, Array]:
        return read_out(model, images, reads, None if make is None else make(images, key))

    def over(sources: Iterable[Any], part: int) -> Arrays:
        found: dict[str, list[np.ndarray]] = {}
        for number, (images, n) in enumerate(batches(model, sources, batch_size, size)):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), part), number)
            for name, a in jax.device_get(read(model, images, key)).items():
                found.setdefault(name, []).append(a[:n])
            advance(n)
        return {name: np.concatenate(arrays) for name, arrays in found.items()}

    learn, held = range(answers.train), range(answers.train, len(answers.labels))
    fit, test = over(map(answers.source, learn), 0), over(map(answers.source, held), 1)
    if second:
        assert answers.scene is not None, "see `possible`"
        scene = answers.scene
        test["second view"] = over((scene(number, 1).image for number in held), 2)[GRID]
    return fit, test
