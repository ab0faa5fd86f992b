"""Replacement controls: the same measurements while registers, or [CLS], are put out of action in other ways than zero.

A token of zeros is nothing the model has seen in training. So registers and [CLS] are replaced by

  zero     zeros
  mean     their mean over images, of each block
  noise    Gaussian noise of their mean and variance over images, of each block and channel
  shuffle  those of another image: of the next one among the first 64, of which the last is followed by the first
  donor    those of the first image, for all; for the first, those of the second

where they enter the last block alone (`last`), or after every block but the last (`every`). `registers mean every` is a
model whose registers are held fixed: they are there, and tell nothing about the image. `none` replaces nothing: the
same images as under the controls, which are often fewer than those of the clean pass, and so what controls are to be
compared with.

Means, variances and the tokens of the first images come from the clean pass. So an image's number does not depend on
what else is in its batch. All controls differ in numbers only, and run through one compiled program.

The clean pass keeps the tokens of its first 64 images (`experiment.KEPT`). With more control images than that,
`shuffle` goes round: each of the 64 gives to several images, which have fewer different registers than images of their
own would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxvit import Edit, Take, ViT, merge
from jaxvit.model.edits import Edits

from .experiment import About, Found, Measured, Option, Subject
from .passes import Pass, Request, measure_all, sites_of
from .trace import observe, widened

KINDS = ("zero", "mean", "noise", "shuffle", "donor")
NONE = "none"
"""Name of the run without replacement, on the images of the controls."""


class Control(NamedTuple):
    """One way to put tokens out of action; its name is a prefix of all it measures."""

    tokens: Literal["registers", "cls"]
    kind: str
    where: Literal["last", "every"]

    @property
    def name(self) -> str:
        return " ".join(self)


def controls_of(registers: int) -> list[Control]:
    """All controls of a model with so many registers, in the order they are shown."""
    tokens: tuple[Literal["registers", "cls"], ...] = ("registers", "cls") if registers else ("cls",)
    places: tuple[Literal["last", "every"], ...] = ("last", "every")
    return [Control(which, kind, where) for which in tokens for where in places for kind in KINDS]


def in_order(names: Iterable[str]) -> list[str]:
    """Names of controls as they are shown: `none` first, then those of `controls_of`, then others."""
    order = [NONE, *(control.name for control in controls_of(1))]
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


class Controls(Pass):
    """The model under every control, on the first `control_images` images."""

    name = "controls"
    reads_earlier = True
    options = (Option("seed", 0, "seed of the noise", least=0),)

    def sources(self, request: Request) -> Any:
        return request.images[: request.control_images]

    def refuses(self, request: Request, about: About) -> str | None:
        enough = len(self.sources(request)) > 1
        return None if enough else "controls need 2 or more images, and --control-images of 2 or more"

    def extra(self, request: Request, subject: Subject, found: Mapping[str, Found]) -> Any:
        """bank, mean and standard deviation of the prefix tokens, out of the clean pass."""
        clean = found["clean"]
        mean = clean.sums["prefix"] / clean.n
        variance = np.maximum(clean.sums["prefix squared"] / clean.n - mean**2, 0)
        dtype = clean.keep["prefix"].dtype
        return {
            "bank": jnp.asarray(clean.keep["prefix"]),
            "mean": jnp.asarray(mean, dtype),
            "std": jnp.asarray(np.sqrt(variance), dtype),
        }

    def measure(self, request: Request, about: About) -> Callable[..., Measured]:
        reading = request.reading(self.name, about)
        every, sites = controls_of(about.registers), sites_of(reading)
        seed, last = request.options["controls"]["seed"], about.depth - 1

        def measure(model: ViT, edits: Edits | None, extra: Any, images: Array, position: Array) -> Measured:
            controlled = [e for e in reading if e.controlled]
            stream = model(images, edits, {"resid_pre": Take(layers=-1)}).trace["resid_pre"][-1]
            clean = observe(model, images, edits, start=(last, stream), sites=sites)
            values = [  # with zeros for the group of patches, which no mask selects
                jnp.pad(a.astype(stream.dtype), ((0, 0), (0, 0), (0, 1), (0, 0)))
                for a in replacements(extra, position, seed)
            ]

            def under(where: str, tokens: Array, kind: Array) -> Measured:
                layers = np.arange(about.depth) >= min(1, last) if where == "every" else np.arange(about.depth) == last
                mask = jnp.asarray(layers, stream.dtype)[:, None, None, None] * tokens[None, None, :, None]
                edit = Edit(mask, shift=jax.lax.switch(kind, [lambda a=a: a for a in values]))
                start = None if where == "every" else (last, stream)
                wide = widened(model)  # here, where it is no copy that is handed to the loop
                changed = observe(model, images, merge(edits or {}, {"resid_pre": edit}), start=start, sites=sites)
                m = measure_all(controlled, changed, wide, request.options)
                for e in reading:
                    m.update(e.compare(changed, clean, wide, request.options[e.id]).prefixed(f"{e.id}/"))
                return m

            whole = measure_all(controlled, clean, widened(model), request.options).prefixed(f"{NONE}/")
            for where in ("every", "last"):
                chosen = [c for c in every if c.where == where]
                tokens = np.stack([mask_of(c.tokens, model.prefix) for c in chosen]).astype(stream.dtype)
                kinds = np.asarray([KINDS.index(c.kind) for c in chosen])
                stacked = jax.lax.map(lambda at, where=where: under(where, *at), (tokens, kinds))
                for i, control in enumerate(chosen):
                    whole.update(jax.tree.map(lambda a, i=i: a[i], stacked).prefixed(f"{control.name}/"))
            return whole

        return measure


def mask_of(tokens: str, prefix: int) -> np.ndarray:
    """1 for the groups that are replaced, [G]."""
    group = np.arange(prefix + 1)
    return group == 0 if tokens == "cls" else (group > 0) & (group < prefix)


def replacements(extra: Mapping[str, Array], position: Array, seed: int) -> list[Array]:
    """What stands for the prefix tokens as they enter each block, [L, B, P, D], for each of `KINDS`.

    Args:
      extra: `bank` [K, L, P, D], the tokens of the first images of the pass, which donate; `mean`, `std` [L, P, D].
      position: of these images in the pass, [B].
    """
    bank, mean, std = extra["bank"], extra["mean"], extra["std"]
    means = jnp.repeat(mean[:, None], len(position), axis=1)
    # A key for each image, so that noise does not depend on how images are batched.
    keys = jax.vmap(lambda at: jax.random.fold_in(jax.random.key(seed), at))(position)
    draw = jax.vmap(lambda key: jax.random.normal(key, mean.shape, mean.dtype), out_axes=1)(keys)
    # Never the image itself, if there are two.
    next_one, first = (position + 1) % len(bank), jnp.where(position == 0, min(1, len(bank) - 1), 0)
    return [
        jnp.zeros_like(means),
        means,
        means + std[:, None] * draw,
        *(jnp.moveaxis(bank[donors], 0, 1) for donors in (next_one, first)),
    ]
