"""What is done to a model while a task is scored, named by a short text.

    registers=zero              tokens are replaced where they enter the blocks, here from layer 1 on:
    registers=mean@last         .. by zeros, by their mean over images, by noise of their mean and variance, or by those
    cls=noise  registers=shuffle   of the next image of the batch
    registers=remove            no token attends to them
    knockout:cls<-registers     attention is cut before the softmax, and the row renormalised
    zero:cls<-patches@last      attention is cut after the softmax
    heads=11.3,11.5             layer.head: outputs of heads are set to zero
    skip:cls=0@last             the skip path around attention is multiplied by a number

@LAYERS is `last`, `all`, a number, or several: 3,6,-1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxvit import (
    ActivationStats,
    Take,
    ViT,
    ablate,
    knockout,
    merge,
    patch,
    replace_by_mean,
    replace_by_noise,
    scale_skip,
    zero_attention,
)
from jaxvit.model.edits import Edits

SITE = "resid_pre"
TOKENS = ("cls", "registers", "patches")
KINDS = ("zero", "mean", "noise", "shuffle", "remove")
LAYERS = re.compile(r"all|last|-?\d+(,-?\d+)*")
TOKEN = re.compile(r"cls|registers|patches|register \d+")

Make = Callable[[Array, Array], Edits]
"""Images and a random key -> edits of a run on them; is traced."""


@dataclass(frozen=True)
class Under:
    """One intervention.

    Attributes:
      text: as it was given.
      needs: whether it needs statistics of the tokens that enter blocks.
      make: of a model and its statistics, what makes edits.
    """

    text: str
    needs: bool
    make: Callable[[ViT, ActivationStats | None], Make]


def parse(text: str) -> Under:
    """Reads one intervention.

    Raises:
      ValueError: it is none of those above.

    Example:

        parse("knockout:cls<-registers@last").make(model, None)(images, key)  # edits for model(images, edits)
    """
    plain = re.sub(r"\s*(<-|=|:|@|,)\s*", r"\1", text.strip())
    what, at, place = plain.partition("@")
    if at and not LAYERS.fullmatch(place):
        raise ValueError(f"--under {text}: @{place} is no layer; expected last, all, or numbers such as 3,6,-1")
    if match := re.fullmatch(r"(knockout|zero):(.+)<-(.+)", what):
        cut, query, key = match.groups()
        check_tokens(text, query, key)
        of = knockout if cut == "knockout" else zero_attention
        return plainly(text, lambda model: of(model, query=query, key=key, **layers(place, "all")))
    if match := re.fullmatch(r"skip(?::(.+))?=(\d+(?:\.\d+)?)", what):
        tokens, factor = match.groups()
        chosen: dict[str, Any] = {} if tokens is None else {"tokens": tokens}
        check_tokens(text, *chosen.values())
        return plainly(text, lambda model: scale_skip(model, float(factor), **chosen, **layers(place, "all")))
    if match := re.fullmatch(r"heads=(\d+\.\d+(?:,\d+\.\d+)*)", what):
        if at:
            raise ValueError(f"--under {text}: heads are named layer.head, and take no @")
        pairs = [tuple(map(int, pair.split("."))) for pair in match[1].split(",")]
        return plainly(text, lambda model: merge(*(ablate(model, "z", layers=l, heads=h) for l, h in pairs)))
    if match := re.fullmatch(r"(.+)=(\w+)", what):
        tokens, kind = match.groups()
        if kind in KINDS:
            check_tokens(text, tokens)
            return replaced(text, tokens, kind, place)
    raise ValueError(
        f"--under {text}: expected TOKENS={'|'.join(KINDS)}, knockout:QUERY<-KEY, zero:QUERY<-KEY, skip:TOKENS=NUMBER "
        "or heads=LAYER.HEAD,.., each but the last perhaps with @LAYERS"
    )


def check_tokens(text: str, *names: str) -> None:
    for name in names:
        if not TOKEN.fullmatch(name):
            raise ValueError(f"--under {text}: there is no {name!r}; tokens are {', '.join(TOKENS)} or 'register 0' ..")


def layers(place: str, otherwise: str) -> dict[str, Any]:
    """As an argument of jaxvit's constructors."""
    place = place or otherwise
    return {} if place == "all" else {"layers": -1 if place == "last" else tuple(map(int, place.split(",")))}


def plainly(text: str, edits: Callable[[ViT], Edits]) -> Under:
    """Of edits that depend on the model alone."""

    def make(model: ViT, stats: ActivationStats | None) -> Make:
        made = edits(model)
        return lambda images, key: made

    return Under(text, False, make)


def replaced(text: str, tokens: str, kind: str, place: str) -> Under:
    def make(model: ViT, stats: ActivationStats | None) -> Make:
        if kind == "remove":
            return lambda images, key: knockout(model, key=tokens, **layers(place, "all"))
        depth = model.config.depth
        where = layers(place, ",".join(map(str, range(min(1, depth - 1), depth))))
        if kind == "zero":
            return lambda images, key: ablate(model, SITE, tokens=tokens, **where)
        if kind == "shuffle":
            if tokens == "patches":
                raise ValueError(f"--under {text}: [CLS] and registers can be those of another image, patches cannot")
            return lambda images, key: shuffled(model, images, tokens, where)
        assert stats is not None, "see `needs`"
        if kind == "mean":
            return lambda images, key: replace_by_mean(model, SITE, stats, tokens=tokens, **where)

        def noise(images: Array, key: Array) -> Edits:
            layout = model.config.layout(*images.shape[1:3]) if tokens == "patches" else None
            return replace_by_noise(model, SITE, stats, key, len(images), layout, tokens=tokens, **where)

        return noise

    return Under(text, kind in ("mean", "noise"), make)


def shuffled(model: ViT, images: Array, tokens: str, where: dict[str, Any]) -> Edits:
    """Tokens of the next image in the batch, of its own clean run."""
    own = model(images, record={SITE: Take(tokens="prefix")}).trace[SITE]  # [L, B, P, D]
    chosen = where.get("layers")
    own = own if chosen is None else own[np.atleast_1d(np.asarray(chosen))]
    return patch(model, SITE, jnp.roll(own, -1, axis=1), over="prefix", tokens=tokens, **where)


def check(under: Sequence[Under], model: ViT, images: Array) -> None:
    """Raises a ValueError for what this model does not have."""
    stats = ActivationStats.collect(model, images[:1], SITE, progress=False) if any(u.needs for u in under) else None
    for each in under:
        try:
            jax.eval_shape(each.make(model, stats), images, jax.random.key(0))
        except ValueError as error:
            raise ValueError(f"--under {each.text}: {error}") from None
