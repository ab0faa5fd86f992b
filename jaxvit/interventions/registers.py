"""More register tokens than a checkpoint was trained with: empty slots, and test-time registers.

Models trained without registers keep what registers would hold in a few patch tokens of enormous norm. Jiang et al.
2025 (arXiv 2506.08010) find that a few neurons of the MLPs write these outliers, and that moving their activation to an
appended token moves the outliers there, without any training.

    neurons = find_register_neurons(model, jaxvit.stream(paths, model.config, 8), count=20)
    wider, edits = test_time_registers(model, neurons)
    wider(images, edits).patches
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxvit.interventions.constructors import SiteEdits, select
from jaxvit.io.batches import images_and_valid
from jaxvit.io.images import Batch
from jaxvit.io.progress import track
from jaxvit.model.edits import Relocate
from jaxvit.model.params import from_params, to_params
from jaxvit.model.run import layer_by_layer
from jaxvit.model.sites import Take
from jaxvit.model.vit import Block, ViT


def add_registers(model: ViT, count: int = 1, values: ArrayLike = 0.0) -> ViT:
    """A copy of the model with more registers, after those it has.

    Args:
      count: how many registers are added.
      values: their values at the first block: a number, [D], or [count, D].

    Raises:
      ValueError: `count` is less than 1, or `values` has another shape.

    Example:

        wider = add_registers(model, 4)
        wider(images).registers  # [B, R + 4, D]
    """
    if count < 1:
        raise ValueError(f"count is {count}; expected the number of registers to add, 1 or more")
    shape = (count, model.config.width)
    params = to_params(model)
    try:
        new = jnp.broadcast_to(jnp.asarray(values, model.patch_embed.kernel.dtype), shape)
    except ValueError:
        raise ValueError(f"values have shape {list(np.shape(values))}; expected {list(shape)}") from None
    old = [params["registers"]] if model.config.registers else []
    config = replace(model.config, registers=model.config.registers + count)
    return from_params(config, params | {"registers": jnp.concatenate([*old, new])})


class Neurons(NamedTuple):
    """Neurons of the MLPs, the most active at outliers first.

    Attributes:
      layer, channel: [k] integers, where each is: `mlp_post[layer][..., channel]`.
      score: [k], mean absolute activation at outlier tokens.

    Example:

        neurons = find_register_neurons(model, jaxvit.stream(paths, model.config, 8), count=20)
        list(zip(neurons.layer, neurons.channel))[:3]
    """

    layer: np.ndarray
    channel: np.ndarray
    score: np.ndarray


def find_register_neurons(
    model: ViT,
    batches: Iterable[Batch | Array],
    count: int = 20,
    *,
    threshold: float | None = None,
    outliers_at: int = -1,
    layers: Iterable[int] | None = None,
    progress: bool = True,
) -> Neurons:
    """The neurons that are most active where patch tokens become outliers (algorithm 1 of Jiang et al. 2025).

    The score of a neuron is its mean |mlp_post| over the outliers of an image, then the mean over the images that have
    outliers. It does not depend on the batches.

    Args:
      batches: as of `jaxvit.stream`, or arrays [B, H, W, 3].
      count: how many neurons.
      threshold: the norm above which a patch is an outlier. None: the mean over the patches of its image plus 3
        standard deviations.
      outliers_at: the layer after which norms are read.
      layers: where to look for neurons. None: all layers up to `outliers_at`. Outliers arise in few layers; early
        layers are closer to their cause.

    Raises:
      ValueError: no image, no outlier, a layer that is not there, or more neurons than there are.

    Example:

        neurons = find_register_neurons(model, jaxvit.stream(paths, model.config, 8), count=20)
        wider, edits = test_time_registers(model, neurons)
    """
    depth = model.config.depth
    asked = [outliers_at, *(() if layers is None else (layers := tuple(layers)))]
    if wrong := [layer for layer in asked if not -depth <= layer < depth]:
        raise ValueError(f"there is no layer {wrong[0]} in a model of {depth} layers")
    chosen = sorted({layer % depth for layer in (range(outliers_at % depth + 1) if layers is None else layers)})
    if not 1 <= count <= len(chosen) * model.config.hidden:
        raise ValueError(f"count is {count}; expected 1 to {len(chosen) * model.config.hidden}, the number of neurons")
    run = partial(_scores, outliers_at=outliers_at, layers=tuple(chosen))
    total, n, seen = np.zeros((len(chosen), model.config.hidden)), 0, 0
    for batch in track(batches, "register neurons", enabled=progress):
        images, valid = images_and_valid(batch)
        scores, outliers = jax.device_get(run(model, images, jnp.asarray(valid), threshold))
        total += scores
        n, seen = n + int(outliers), seen + int(valid.sum())
    if not n:
        limit = "3 standard deviations above their mean" if threshold is None else threshold
        raise ValueError(f"none of {seen} images has a patch whose norm is above {limit}: lower the threshold")
    best = np.argsort(-total.ravel(), kind="stable")[:count]
    row, channel = np.unravel_index(best, total.shape)
    return Neurons(np.asarray(chosen)[row], channel, total.ravel()[best] / n)


@partial(jax.jit, static_argnames=("outliers_at", "layers"))
def _scores(
    model: ViT,
    images: Array,
    valid_B: Array,
    threshold: float | Array | None,
    outliers_at: int,
    layers: tuple[int, ...],
) -> tuple[Float[Array, "l F"], Array]:
    """The sum over images of each neuron's score, and how many images have outliers.

    Runs twice, as outliers show after the layers that make them: to find them, then to measure layer by layer.
    """
    last, prefix = outliers_at % model.config.depth, model.prefix
    nothing = partial(layer_by_layer, model, images, lambda trace, block, layer: None, ())
    stream = nothing(stop=last + 1).stream
    norms_BN = jnp.linalg.norm(stream[:, prefix:], axis=-1)
    if threshold is None:
        limit_B = norms_BN.mean(1) + 3 * norms_BN.std(1)
    else:
        limit_B = jnp.full(len(images), threshold, norms_BN.dtype)
    outlier_BN = (norms_BN > limit_B[:, None]) & valid_B[:, None]
    number_B = outlier_BN.sum(1)
    weight_BN = outlier_BN.astype(norms_BN.dtype) / jnp.maximum(number_B, 1).astype(norms_BN.dtype)[:, None]

    def of_layer(trace: dict[str, Array], block: Block, layer: Array) -> Array:
        active = jnp.abs(trace["mlp_post"][:, prefix:])
        return jnp.einsum("BN,BNF->F", weight_BN, active, precision=jax.lax.Precision.HIGHEST)

    record = {"mlp_post": Take(tokens="all")}
    scores = layer_by_layer(model, images, of_layer, record, stop=max(layers) + 1).measured
    return scores[np.asarray(layers)], (number_B > 0).sum()


def test_time_registers(model: ViT, neurons: Neurons, count: int = 1) -> tuple[ViT, SiteEdits]:
    """A model with new registers, and the edits that move the activation of these neurons to them.

    At each of the neurons, a new register gets the largest value over the patches, and the patches get 0. [CLS] and
    older registers keep their values.

    Args:
      neurons: as `find_register_neurons` returns them.
      count: how many registers are added; they are zero at the first block.

    Returns:
      The model, and the edits to run it with.

    Raises:
      ValueError: `count` is less than 1.

    Example:

        wider, edits = test_time_registers(model, neurons)
        wider(images, edits).patches  # [B, N, D]
    """
    wider = add_registers(model, count)
    of_layer = np.zeros((model.config.depth, model.config.hidden), np.float32)
    of_layer[neurons.layer, neurons.channel] = 1
    new = [f"register {model.config.registers + i}" for i in range(count)]
    moved = select(wider, "mlp_post", {"tokens": [*new, "patches"]})
    to = select(wider, "mlp_post", {"tokens": new})["mask"]
    return wider, {"mlp_post": Relocate(mask=moved["mask"] * of_layer[:, None, None], to=to[:1])}


test_time_registers.__test__ = False  # pyright: ignore[reportFunctionMemberAccess] -- pytest takes the name for a test
