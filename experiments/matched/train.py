"""Trains one arm from several seeds at once: models stacked along an axis of seeds, under `jax.vmap`.

Every arm sees the same scenes, varied in the same way, in the same order: both follow from the seed and the step alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from jaxvit import ViT, ViTConfig
from jaxvit.io.progress import bar
from jaxvit.model.params import Params, from_params, to_params
from jaxvit.training import cross_entropy, decays

from .arms import Arm, skip_share
from .data import Scenes, normalised, shares, varied


@dataclass(frozen=True)
class Recipe:
    """How every arm is trained: AdamW, a cosine after a warm-up, gradients clipped to norm 1, float32 parameters.

    Attributes:
      steps, batch: number and size of batches.
      rate: largest learning rate.
      warmup: steps in which it rises from 0.
      decay: weight decay, of matrices alone.
      smoothing: of the labels.
    """

    steps: int
    batch: int = 128
    rate: float = 1e-3
    warmup: int = 200
    decay: float = 0.05
    smoothing: float = 0.1

    def optimiser(self) -> optax.GradientTransformation:
        rate = optax.warmup_cosine_decay_schedule(0.0, self.rate, self.warmup, max(self.steps, self.warmup + 1))
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(rate, weight_decay=self.decay, mask=decays),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


DENSE = "dense.kernel"
"""[D, 1 + classes]: which class a patch belongs to, 0 for the background. It is no part of the model that is kept."""


class State(NamedTuple):
    """A run after some steps, with an axis of seeds in front of every array.

    Attributes:
      params: of the model, and `DENSE`.
      key: of the seed; the order of scenes and their variations follow from it and the step.
      step: how many are done.
    """

    params: Params
    optimiser: Any
    key: Array
    step: Array


def start(config: ViTConfig, recipe: Recipe, seeds: Sequence[int]) -> State:
    """Freshly initialised models, one of each seed."""

    @jax.vmap
    def one(key: Array) -> State:
        weights, dense, order = jax.random.split(key, 3)
        params = to_params(ViT(config, rngs=nnx.Rngs(weights)))
        params[DENSE] = jax.random.normal(dense, (config.width, 1 + config.classes)) * 0.02
        return of_params(params, recipe, order)

    return jax.jit(one)(jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32)))


def of_params(params: Params, recipe: Recipe, key: Array) -> State:
    """The start of one run from these parameters."""
    return State(params, recipe.optimiser().init(params), key, jnp.zeros((), jnp.int32))


def loss_of(
    params: Params, arm: Arm, config: ViTConfig, smoothing: float, images: Array, labels: Array, shares: Array
) -> tuple[Array, dict[str, Array]]:
    """The loss of a batch; and its parts, which are drawn as curves.

    It is the cross-entropy of the picture's class, and that of the class of each patch, on average.
    """
    model = from_params(config, {name: a for name, a in params.items() if name != DENSE})
    # On a CPU it is faster to compute a block again than to keep what is inside it.
    remat = "block" if jax.default_backend() == "cpu" else "none"
    out = model(images, arm.changes(model), arm.records, remat=remat)
    assert out.logits is not None, "models of arms have classes"
    logits = out.logits.astype(jnp.float32)
    entropy = cross_entropy(logits, labels, smoothing)
    right = (logits.argmax(-1) == labels).mean(dtype=jnp.float32)
    of_patches = jax.nn.log_softmax((out.patches @ params[DENSE]).astype(jnp.float32))
    of_shape = jnp.take_along_axis(of_patches, 1 + labels[:, None, None], axis=2)[..., 0]
    dense = -(shares * of_shape + (1 - shares) * of_patches[..., 0]).mean()
    parts = {"entropy": entropy, "entropy of patches": dense, "accuracy": right}
    if not arm.penalty:
        return entropy + dense, parts
    share = skip_share(*(out.trace[site][0, :, 0] for site in ("skip_attn", "attn_out"))).mean()
    return entropy + dense + arm.penalty * share, parts | {"skip share": share}


Step = Callable[[State, Array, Array], tuple[State, dict[str, Array]]]


def stepper(arm: Arm, config: ViTConfig, recipe: Recipe, count: int) -> Step:
    """A compiled function that does `count` steps of every seed: state, images, labels -> state, curves [seeds, count].

    Images and labels to learn from are uint8 [n, H, W, 4] and integers [n], on the device.
    """
    optimiser, prepare = recipe.optimiser(), config.preprocess

    def step(state: State, images: Array, labels: Array) -> tuple[State, dict[str, Array]]:
        n = images.shape[0]
        rounds = n // recipe.batch  # in each epoch; what is over is left out of it
        epoch, at = state.step // rounds, state.step % rounds
        order = jax.random.permutation(jax.random.fold_in(state.key, epoch), n)
        chosen = jax.lax.dynamic_slice_in_dim(order, at * recipe.batch, recipe.batch)
        pixels = varied(images[chosen], jax.random.fold_in(jax.random.fold_in(state.key, 1 << 20), state.step))
        read = normalised(pixels, prepare.mean, prepare.std)
        of_batch = partial(loss_of, arm=arm, config=config, smoothing=recipe.smoothing)
        known = dict(images=read, labels=labels[chosen], shares=shares(pixels, config.patch))
        slopes, parts = jax.grad(lambda p: of_batch(p, **known), has_aux=True)(state.params)
        updates, kept = optimiser.update(slopes, state.optimiser, state.params)
        return State(optax.apply_updates(state.params, updates), kept, state.key, state.step + 1), parts

    @partial(jax.jit, donate_argnums=0)
    def steps(state: State, images: Array, labels: Array) -> tuple[State, dict[str, Array]]:
        one = jax.vmap(step, in_axes=(0, None, None))
        state, curves = jax.lax.scan(lambda s, _: one(s, images, labels), state, None, length=count)
        return state, {name: jnp.moveaxis(a, 0, 1) for name, a in curves.items()}

    return steps


class Trained(NamedTuple):
    """What training an arm gave.

    Attributes:
      params: with an axis of seeds in front.
      curves: name -> [seeds, steps].
      seconds: it took, compilation included.
    """

    params: Params
    curves: dict[str, np.ndarray]
    seconds: float


def train(
    arm: Arm,
    base: ViTConfig,
    scenes: Scenes,
    recipe: Recipe,
    seeds: Sequence[int],
    *,
    at_once: int = 50,
    name: str = "training",
    progress: bool = False,
) -> Trained:
    """Trains an arm from these seeds, all at once.

    Args:
      base: sizes of a model without registers.
      at_once: steps in one call of the device.
      name: of the bar.

    Raises:
      ValueError: fewer scenes than a batch.
    """
    if scenes.train < recipe.batch:
        raise ValueError(f"{scenes.train} scenes to learn from are fewer than a batch of {recipe.batch}")
    began, config = time.perf_counter(), arm.config(base)
    images, labels = (jnp.asarray(a[: scenes.train]) for a in (scenes.images, scenes.labels))
    state, curves = start(config, recipe, seeds), []
    with jax.numpy_dtype_promotion("standard"), bar(name, recipe.steps, progress) as advance:
        for first in range(0, recipe.steps, at_once):
            count = min(at_once, recipe.steps - first)
            if first == 0 or count != at_once:
                steps = stepper(arm, config, recipe, count)
            state, found = steps(state, images, labels)  # pyright: ignore[reportPossiblyUnboundVariable]
            curves.append(jax.device_get(found))
            advance(count)
    whole = {each: np.concatenate([found[each] for found in curves], axis=1) for each in curves[0]}
    kept = {each: a for each, a in state.params.items() if each != DENSE}
    return Trained(kept, whole, time.perf_counter() - began)


def measure(
    arm: Arm,
    config: ViTConfig,
    params: Params,
    scenes: Scenes,
    function: Callable[[Arm, ViT, Array, Array], dict[str, Array]],
    batch: int = 250,
) -> dict[str, np.ndarray]:
    """A function of arm, model, images and labels that gives numbers an image, on the test scenes: [seeds, images]."""

    @jax.jit
    def run(params: Params, images: Array, labels: Array) -> dict[str, Array]:
        read = normalised(images, config.preprocess.mean, config.preprocess.std)
        return jax.vmap(lambda p: function(arm, from_params(config, p), read, labels))(params)

    found = []
    for first in range(scenes.train, len(scenes.labels), batch):
        part = slice(first, first + batch)
        batch_of = (jnp.asarray(a[part]) for a in (scenes.images, scenes.labels))
        found.append(jax.device_get(run(params, *batch_of)))
    return {name: np.concatenate([each[name] for each in found], axis=1) for name in found[0]}
