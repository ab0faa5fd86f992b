"""Patches whose norms stand apart from the others of their image: how many, and by how much.

Large ViTs without trained registers keep global information in a few patches of high norm (Darcet et al. 2024). A fixed
threshold on norms belongs to one checkpoint. Here each image is its own measure: do two groups of norms explain it
better than one? A group of high norms that holds most of the patches is no group of outliers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

STEPS = 60
"""Of expectation and maximisation. The likelihood of the mixtures met here is flat long before."""
NARROWEST = 0.02
"""The least standard deviation of a group, in log norms: 2 %. A narrower one could fit a single patch for any price."""


class Outliers(NamedTuple):
    """Of each image.

    Attributes:
      probability: that a patch belongs to the group of high norms, [*batch, N]; 0 where one group explains them as
        well.
      share: the mean of it, [*batch].
      ratio: the typical norm of the high group divided by that of the others, [*batch]; 1 where there is one group.
      evidence: by how much two groups explain the norms better than one, in nats and after the price of the three
        further numbers (half the difference of the Bayesian information criterion), [*batch]; below 0 one is enough.
    """

    probability: Float[Array, "*batch N"]
    share: Float[Array, "*batch"]
    ratio: Float[Array, "*batch"]
    evidence: Float[Array, "*batch"]


@jax.jit
def outliers(norms: Float[Array, "*batch N"], smallest_ratio: float = 2.0) -> Outliers:
    """Fits one and two normal distributions to the logarithms of the norms of an image's patches.

    Args:
      norms: of the patches of each image, positive; such as those of resid_post of one layer.
      smallest_ratio: two groups whose typical norms differ by less count as one: any skewed distribution is fitted
        better by two.

    Example:

        trace = model(images, record={"resid_post": Take(layers=-1)}).trace
        norms = jnp.linalg.norm(trace["resid_post"][-1][:, model.prefix :], axis=-1)
        outliers(norms).share  # [B]
    """
    x = jnp.log(jnp.maximum(norms.astype(jnp.float32), jnp.finfo(jnp.float32).tiny))
    n = x.shape[-1]

    def of_image(x: Array) -> Outliers:
        one = _log_normal(x, x.mean(), jnp.maximum(x.std(), NARROWEST)).sum()
        # One patch may be high, or a few, or half of them: start from each, keep the best.
        middle = jnp.median(x)
        starts = jnp.stack([(middle + x.max()) / 2, jnp.quantile(x, 0.98), middle])
        fits = jax.vmap(lambda split: _two(x, split))(starts)
        weight, low, high, *_, two = fits
        # Not a wide group around a narrow one, which explains skew, but one that stands apart.
        apart = (high - low >= jnp.log(smallest_ratio)) & (weight <= 0.5)
        best = jnp.argmax(jnp.where(apart, two, -jnp.inf))
        weight, low, high, narrow, wide, two = (each[best] for each in fits)
        evidence = two - one - 1.5 * jnp.log(n)
        ratio = jnp.exp(high - low)
        several = apart[best] & (evidence > 0)
        odds = jnp.log(weight) + _log_normal(x, high, wide) - jnp.log1p(-weight) - _log_normal(x, low, narrow)
        probability = jnp.where(several, jax.nn.sigmoid(odds), 0.0)
        # A wide group of high norms also claims the lowest ones.
        probability = jnp.where(x > low, probability, 0.0)
        return Outliers(probability, probability.mean(), jnp.where(several, ratio, 1.0), evidence)

    found = jax.vmap(of_image)(x.reshape(-1, n))
    return Outliers(found[0].reshape(norms.shape), *(each.reshape(norms.shape[:-1]) for each in found[1:]))


def _two(x: Array, split: Array) -> tuple[Array, ...]:
    """Weight of the high group, both means, both deviations, and the log likelihood of the mixture."""
    n = x.shape[0]
    is_high = (x >= split).astype(x.dtype)

    def maximise(high: Array) -> tuple[Array, ...]:
        count = jnp.clip(high.sum(), 1e-3, n - 1e-3)
        means = ((1 - high) * x).sum() / (n - count), (high * x).sum() / count
        spread = [
            ((p * (x - m) ** 2).sum() / c) for p, m, c in zip((1 - high, high), means, (n - count, count), strict=True)
        ]
        return count / n, *means, *(jnp.maximum(jnp.sqrt(s), NARROWEST) for s in spread)

    def terms(fit: tuple[Array, ...]) -> tuple[Array, Array]:
        weight, low, high, narrow, wide = fit
        return jnp.log1p(-weight) + _log_normal(x, low, narrow), jnp.log(weight) + _log_normal(x, high, wide)

    def step(_: Array, fit: tuple[Array, ...]) -> tuple[Array, ...]:
        of_low, of_high = terms(fit)
        return maximise(jax.nn.sigmoid(of_high - of_low))

    fit = jax.lax.fori_loop(0, STEPS, step, maximise(is_high))
    weight, low, high, narrow, wide = fit
    swap = high < low
    ordered = (
        jnp.where(swap, 1 - weight, weight),
        jnp.where(swap, high, low),
        jnp.where(swap, low, high),
        jnp.where(swap, wide, narrow),
        jnp.where(swap, narrow, wide),
    )
    return *ordered, jnp.logaddexp(*terms(fit)).sum()


def _log_normal(x: Array, mean: Array, deviation: Array) -> Array:
    return -0.5 * ((x - mean) / deviation) ** 2 - jnp.log(deviation) - 0.5 * jnp.log(2 * jnp.pi)
