"""Classifiers on features: k nearest neighbours, logistic regression, nearest class mean; and what accuracy says.

Each is deterministic: where scores are tied, accuracies are what breaking ties at random would give on average. Scale
features to length 1 first (`unit`), so that only directions matter.

Axes: n images, D features, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from scipy import stats

from jaxvit.tasks.directions import unit

CONFIDENCE = 0.95


class Classifier(NamedTuple):
    """Scores are features @ weights + bias."""

    weights: Float[np.ndarray, "D C"]
    bias: Float[np.ndarray, " C"]

    def scores(self, features: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n C"]:
        return features @ self.weights + self.bias[None]


class Fit(NamedTuple):
    """A logistic regression, and whether it may be trusted.

    Attributes:
      gradient: norm of the objective's gradient where the fit ended, over that where it began, at 0.
      steps: of L-BFGS.
    """

    classifier: Classifier
    gradient: float
    steps: int

    def trusted(self, iterations: int) -> Classifier:
        """The classifier; warns if all its `iterations` were not enough."""
        if self.steps >= iterations:
            told = f"{self.steps} steps, at {self.gradient:.0e} of its first gradient"
            warnings.warn(f"a logistic regression has not converged after {told}", stacklevel=3)
        return self.classifier


def logistic_regression(
    features: Float[np.ndarray, "n D"],
    labels: Int[np.ndarray, " n"] | Float[np.ndarray, "n C"],
    classes: int,
    *,
    l2: float | int = 1.0,
    iterations: int = 500,
    tolerance: float = 1e-5,
) -> Fit:
    """Multinomial: minimises, from 0 and by L-BFGS, the sum over images of the cross-entropy + l2 / 2 ||weights||^2.

    That is scikit-learn's LogisticRegression with C = 1 / l2; biases are not penalised there either. Runs in float64 if
    JAX is set to 64 bits (`jax_enable_x64`), else in float32.

    Args:
      labels: the class of each, or how much of each belongs to each class.
      tolerance: of `Fit.gradient`, at which it stops; after `iterations` steps it stops in any case.

    Example:

        fit = logistic_regression(features, labels, 10, l2=1.0)
        fit.classifier.scores(features)  # [n, C]
    """
    if not l2 > 0:
        raise ValueError(f"l2 is {l2}; without a penalty above 0, classes that can be told apart have no best weights")
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    told = jnp.asarray(labels, jnp.int32) if labels.ndim == 1 else jnp.asarray(labels.astype(np.float64))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # for optax's own arithmetic
        found = _fit(jnp.asarray(features), told, l2, tolerance, iterations=iterations, classes=classes)
    return fit_of(*jax.device_get(found))


def fit_of(weights: Any, bias: Any, gradient: Any, steps: Any) -> Fit:
    """What `_fit` found, on the host."""
    classifier = Classifier(np.asarray(weights, np.float64), np.asarray(bias, np.float64))
    return Fit(classifier, float(gradient), int(steps))


@partial(jax.jit, static_argnames="classes")
def _fit(
    features: Array, labels: Array, l2: Any, tolerance: Any, *, iterations: Any, classes: int
) -> tuple[Array, ...]:
    n, width = features.shape

    def objective(parameters: dict[str, Array]) -> Array:
        weights, bias = parameters["weights"], parameters["bias"]
        logits = jnp.matmul(features, weights, precision=jax.lax.Precision.HIGHEST) + bias[None]
        whole = labels.ndim == 1
        entropy = optax.softmax_cross_entropy_with_integer_labels if whole else optax.softmax_cross_entropy
        loss = entropy(logits, labels).sum()
        return (loss + l2 / 2 * jnp.square(weights).sum()) / n

    start = {"weights": jnp.zeros((width, classes), features.dtype), "bias": jnp.zeros(classes, features.dtype)}
    solver = optax.lbfgs(linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=30))
    value_and_grad = optax.value_and_grad_from_state(objective)
    first = _norm(jax.grad(objective)(start))

    def size(gradient: dict[str, Array]) -> Array:
        return jnp.where(first > 0, _norm(gradient) / jnp.where(first > 0, first, 1), 0)

    def go_on(carry: tuple) -> Array:
        _, _, gradient, steps = carry
        # Below eps a gradient is made of rounding errors, as where features tell no classes apart.
        return (steps < iterations) & (gradient > tolerance) & (gradient * first > jnp.finfo(features.dtype).eps)

    def step(carry: tuple) -> tuple:
        parameters, state, _, steps = carry
        value, grad = value_and_grad(parameters, state=state)
        updates, state = solver.update(grad, state, parameters, value=value, grad=grad, value_fn=objective)
        # The line search leaves the gradient where it ended in its state.
        return (
            optax.apply_updates(parameters, updates),
            state,
            size(optax.tree_utils.tree_get(state, "grad")),
            steps + 1,
        )

    begin = (start, solver.init(start), size(jax.grad(objective)(start)), jnp.zeros((), jnp.int32))
    parameters, _, gradient, steps = jax.lax.while_loop(go_on, step, begin)
    return parameters["weights"], parameters["bias"], gradient, steps


def _norm(gradient: dict[str, Array]) -> Array:
    return jnp.sqrt(sum(jnp.square(a).sum() for a in gradient.values()))


def nearest_mean(features: Float[np.ndarray, "n D"], labels: Int[np.ndarray, " n"], classes: int) -> Classifier:
    """Scores are cosines with the mean of each class, of features of length 1.

    Example:

        nearest_mean(features, labels, 10).scores(features)  # [n, C]
    """
    features = np.asarray(features, np.float64)
    means = np.zeros((classes, features.shape[1]))
    np.add.at(means, labels, features)
    return Classifier(unit(means).T, np.zeros(classes))


def nearest_neighbours(
    train: Float[np.ndarray, "m D"],
    labels: Int[np.ndarray, " m"],
    test: Float[np.ndarray, "n D"],
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Float[np.ndarray, "n C"]:
    """Scores by the k neighbours of highest cosine, each counted exp(cosine / temperature) times.

    That is the weighted k-NN of DINO's and DINOv2's evaluation. Lengths of features do not matter.

    Raises:
      ValueError: fewer than k images to learn from.

    Example:

        scores = nearest_neighbours(features, labels, features, 10, k=20)
        accuracy(scores, labels, top=1)
    """
    if k > len(train):
        raise ValueError(f"{k} neighbours of {len(train)} images: give more images, or a smaller k")
    scores, train, test = np.zeros((len(test), classes)), unit(train), unit(test)
    for start in range(0, len(test), 256):
        cosines = test[start : start + 256] @ train.T
        near = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        weights = np.exp((np.take_along_axis(cosines, near, axis=1) - 1) / temperature)
        for row, (neighbours, counted) in enumerate(zip(near, weights, strict=True)):
            np.add.at(scores[start + row], labels[neighbours], counted)
    return scores


class Probe(NamedTuple):
    """A linear classifier whose penalty was chosen on a part of the images that it was not fitted to.

    Attributes:
      classifier: fitted to all images, with that penalty.
      l2: the penalty.
      held_out: accuracy on the part held out, of each penalty.
    """

    classifier: Classifier
    l2: float
    held_out: dict[float, float]


ITERATIONS = 3000
"""Of the fits of a linear probe, at most."""
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def linear_probe(
    features: Float[np.ndarray, "n D"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    *,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
) -> Probe:
    """Logistic regression; every fifth image of each class, in a random order, chooses among penalties.

    All penalties are fitted at once, under `jax.vmap`. Of penalties that are equally good the largest is taken.

    Raises:
      ValueError: no class has five images, so that none can be held out.

    Example:

        probe = linear_probe(features, labels, 10)
        probe.l2, probe.held_out  # the penalty that did best on the part held out, and how each did
    """
    held = held_out(labels, seed)
    if not held.any():
        raise ValueError("no class has five images: a linear probe holds every fifth one out to choose its penalty")
    features = np.asarray(features, np.float64)
    every = jnp.asarray(penalties, jnp.asarray(features).dtype)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        fit = partial(_fit, iterations=ITERATIONS, classes=classes)
        one = jax.vmap(lambda l2: fit(jnp.asarray(features[~held]), jnp.asarray(labels[~held], jnp.int32), l2, 1e-4))
        fits = [fit_of(*each) for each in zip(*jax.device_get(one(every)), strict=True)]
    found = {
        float(l2): accuracy(fit.trusted(ITERATIONS).scores(features[held]), labels[held], 1)
        for l2, fit in zip(penalties, fits, strict=True)
    }
    best = max(found, key=lambda l2: (found[l2], l2))
    whole = logistic_regression(features, labels, classes, l2=best, iterations=ITERATIONS)
    return Probe(whole.trusted(ITERATIONS), best, found)


def held_out(labels: Int[np.ndarray, " n"], seed: int) -> Bool[np.ndarray, " n"]:
    """Every fifth image of each class, in a random order."""
    held, rng = np.zeros(len(labels), bool), np.random.default_rng(seed)
    for label in np.unique(labels):
        held[rng.permutation(np.flatnonzero(labels == label))[4::5]] = True
    return held


def accuracy(scores: Float[np.ndarray, "n C"], labels: Int[np.ndarray, " n"], top: int) -> float:
    """In how many of all images the right class is among the `top` ones of highest score; see `hits`.

    Example:

        scores = nearest_neighbours(features, labels, features, 10)
        accuracy(scores, labels, top=5)  # 0 to 1
    """
    return float(hits(scores, labels, top).mean())


def hits(scores: Float[np.ndarray, "n C"], labels: Int[np.ndarray, " n"], top: int) -> Float[np.ndarray, " n"]:
    """Of each image, whether the right class is among the `top` ones of highest score: 0, 1, or the chance of it.

    Of t classes tied at the edge, only some are among them, each with the same chance. Images with a score that is not
    a number are counted as wrong.
    """
    own = scores[np.arange(len(labels)), labels][:, None]
    above, tied = (scores > own).sum(axis=1), (scores == own).sum(axis=1)
    chance = np.clip((top - above) / np.maximum(tied, 1), 0, 1)
    return np.where(np.isnan(scores).any(axis=1), 0, chance)


def t_interval(values: Sequence[float] | np.ndarray, confidence: float = CONFIDENCE) -> dict[str, float]:
    """Mean of values that were drawn independently, and Student's t interval for what they are draws of.

    Of a single value the interval is NaN; of equal ones it has no length. It may reach below 0 or above 1.

    Example:

        t_interval([0.71, 0.74, 0.69])  # mean, low, high
    """
    drawn = np.asarray(values, np.float64)
    mean, n = float(drawn.mean()), len(drawn)
    if n < 2:
        return {"mean": mean, "low": float("nan"), "high": float("nan")}
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * drawn.std(ddof=1) / n**0.5)
    return {"mean": mean, "low": mean - half, "high": mean + half}
