"""Two classifiers for features of few images, and what their accuracy says.

Features are scaled to length 1 first, so that only directions matter. Both classifiers are deterministic: where scores
are tied, accuracies are what breaking ties at random would give on average.

Axes: n images, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from scipy import stats

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


def unit(features: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
    """Each row divided by its length, in float64; rows of zeros stay."""
    features = np.asarray(features, np.float64)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return np.divide(features, length, out=np.zeros_like(features), where=length != 0)


def logistic_regression(
    features: Float[np.ndarray, "n D"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    *,
    l2: float = 1.0,
    iterations: int = 500,
    tolerance: float = 1e-5,
) -> Fit:
    """Multinomial: minimises, from 0 and by L-BFGS, the sum over images of the cross-entropy + l2 / 2 ||weights||^2.

    That is scikit-learn's LogisticRegression with C = 1 / l2; biases are not penalised there either. Runs in float64 if
    JAX is set to 64 bits (`jax_enable_x64`), else in float32.

    Args:
      tolerance: of `Fit.gradient`, at which it stops; after `iterations` steps it stops in any case.
    """
    if not l2 > 0:
        raise ValueError(f"l2 is {l2}; without a penalty above 0, classes that can be told apart have no best weights")
    features = np.asarray(features, np.float64)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # for optax's own arithmetic
        found = _fit(
            jnp.asarray(features), jnp.asarray(labels, jnp.int32), l2, tolerance, iterations=iterations, classes=classes
        )
    weights, bias, gradient, steps = jax.device_get(found)
    classifier = Classifier(np.asarray(weights, np.float64), np.asarray(bias, np.float64))
    return Fit(classifier, float(gradient), int(steps))


@partial(jax.jit, static_argnames="classes")
def _fit(
    features: Array, labels: Array, l2: float, tolerance: float, *, iterations: int, classes: int
) -> tuple[Array, ...]:
    n, width = features.shape

    def objective(parameters: dict[str, Array]) -> Array:
        weights, bias = parameters["weights"], parameters["bias"]
        logits = jnp.matmul(features, weights, precision=jax.lax.Precision.HIGHEST) + bias[None]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()
        return (loss + l2 / 2 * jnp.square(weights).sum()) / n

    start = {"weights": jnp.zeros((width, classes), features.dtype), "bias": jnp.zeros(classes, features.dtype)}
    solver = optax.lbfgs(linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=30))
    value_and_grad = optax.value_and_grad_from_state(objective)
    first = _norm(jax.grad(objective)(start))

    def size(gradient: dict[str, Array]) -> Array:
        return jnp.where(first > 0, _norm(gradient) / jnp.where(first > 0, first, 1), 0)

    def go_on(carry: tuple) -> Array:
        _, _, gradient, steps = carry
        return (steps < iterations) & (gradient > tolerance)

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
    """Scores are cosines with the mean of each class, of features of length 1."""
    features = np.asarray(features, np.float64)
    means = np.zeros((classes, features.shape[1]))
    np.add.at(means, labels, features)
    return Classifier(unit(means).T, np.zeros(classes))


def accuracy(scores: Float[np.ndarray, "n C"], labels: Int[np.ndarray, " n"], top: int) -> float:
    """In how many of all images the right class is among the `top` ones of highest score.

    Of t classes tied at the edge, only some are among them, each with the same chance. Images with a score that is not
    a number are counted as wrong.
    """
    own = scores[np.arange(len(labels)), labels][:, None]
    above, tied = (scores > own).sum(axis=1), (scores == own).sum(axis=1)
    hits = np.clip((top - above) / np.maximum(tied, 1), 0, 1)
    return float(np.where(np.isnan(scores).any(axis=1), 0, hits).mean())


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> dict[str, float]:
    """Mean of values that were drawn independently, and Student's t interval for what they are draws of.

    Of a single value the interval is NaN; of equal ones it has no length. It may reach below 0 or above 1.
    """
    values = np.asarray(values, np.float64)
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return {"mean": mean, "low": float("nan"), "high": float("nan")}
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * values.std(ddof=1) / n**0.5)
    return {"mean": mean, "low": mean - half, "high": mean + half}
