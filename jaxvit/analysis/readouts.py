"""What is read off a model for use elsewhere, named by a short text: `cls`, `tokens@[3,6,9,-1]:normed`.

The grammar is WHAT, then perhaps @LAYERS, then any of :normed, :mean, :grid, :head=.. and, of sites, which tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxvit.model.edits import Edits
from jaxvit.model.run import checked_edits, run_blocks
from jaxvit.model.sites import ATTENTION_SITES, SITES, Take, recording_plan
from jaxvit.model.tokens import TokenLayout
from jaxvit.model.vit import ViT

GROUPS = ("cls", "registers", "prefix", "patches", "tokens")
"""Which tokens: [CLS], the registers, both, the patches, all."""

WHOLE = ("pooled", "logits", "projection")
"""What a model returns one vector of for an image."""

STREAM = ("resid_pre", "resid_mid", "resid_post")
"""Sites that the final norm may follow."""

GRAMMAR = re.compile(
    r"(?:(?P<name>[^=:@/]+)=)?(?P<what>\w+)(?:@(?P<layers>all|-?\d+(?:,-?\d+)+|\[-?\d+(?:,-?\d+)*\]|-?\d+))?"
    r"(?P<how>(?::[^:@/]+)*)"
)


@dataclass(frozen=True)
class Readout:
    """One array that is read off a model; `Readout.parse` makes it of its text.

    Attributes:
      name: of the array; the text, unless it is given as NAME=TEXT.
      text: what it was made of.
      site: a site, or "" for what the model returns after all layers.
      whole: one of `WHOLE`, or "".
      layers: a number, several, None for all; None too where there is no site.
      tokens: one of `GROUPS`.
      normed: whether the final norm follows.
      mean: whether the mean over these tokens is taken; at attention sites, over query rows.
      grid: whether patches are laid out as rows and columns.
      heads: a number, several, "mean", or None for all, each by itself.
    """

    name: str
    text: str
    site: str = ""
    whole: str = ""
    layers: int | tuple[int, ...] | None = None
    tokens: str = "tokens"
    normed: bool = False
    mean: bool = False
    grid: bool = False
    heads: int | tuple[int, ...] | str | None = None
    every: bool = field(default=False, compare=False)  # of a site whose tokens were not said

    @classmethod
    def parse(cls, text: str) -> Readout:
        """Reads the text.

        Raises:
          ValueError: what it does not know, or a combination that makes no sense; it says what would.

        Example:

            Readout.parse("tokens@[3,6,9,-1]:normed").layers  # (3, 6, 9, -1)
        """
        plain = re.sub(r"\s", "", text)
        match = GRAMMAR.fullmatch(plain)
        if not match:
            raise ValueError(f"cannot read {text!r}: expected WHAT[@LAYERS][:HOW], such as cls or tokens@[3,-1]:normed")
        what, layers, how = (
            match["what"],
            layers_of(match["layers"]),
            [each for each in match["how"].split(":") if each],
        )
        name, plain = match["name"] or plain, plain.removeprefix(f"{match['name']}=")
        if what == "patch_mean":
            what, how = "patches", [*how, "mean"]
        if what not in (*GROUPS, *WHOLE, *SITES):
            known = ", ".join((*GROUPS, "patch_mean", *WHOLE, *SITES))
            raise ValueError(f"{text!r}: there is no {what!r}; there are {known}")
        made: dict[str, Any] = {}
        if what in WHOLE:
            if match["layers"] or how:
                raise ValueError(
                    f"{text!r}: {what} is of the whole model, and takes no layers and nothing after a colon"
                )
            return cls(name, plain, whole=what)
        if what in SITES:
            if not match["layers"]:
                raise ValueError(f"{text!r}: of which layers? Say {what}@-1, {what}@[3,-1] or {what}@all")
            made |= {"site": what, "every": True}
        else:
            made |= {"tokens": what, "site": "resid_post" if match["layers"] else ""}
        for each in how:
            word, _, value = each.partition("=")
            if word in GROUPS and what in SITES and not value:
                made |= {"tokens": word, "every": False}
            elif word in ("normed", "mean", "grid") and not value:
                made[word] = True
            elif word == "head" and re.fullmatch(r"mean|\d+(,\d+)*", value):
                made["heads"] = value if value == "mean" else int(value) if value.isdigit() else numbers(value)
            else:
                raise ValueError(f"{text!r}: what is :{each}? Expected :normed, :mean, :grid, :head=0,3 or :head=mean"
                                 + (f", or tokens: {', '.join(GROUPS)}" if what in SITES else ""))  # fmt: skip
        made_of = cls(name, plain, layers=layers, **made)
        made_of.check()
        return made_of

    def check(self) -> None:
        if self.normed and self.site not in STREAM:
            where = "after all layers, which is normed already" if not self.site else self.site
            raise ValueError(
                f"{self.text!r}: the final norm follows the residual stream ({', '.join(STREAM)}), not {where}"
            )
        if self.heads is not None and "H" not in SITES.get(self.site, ""):
            raise ValueError(f"{self.text!r}: only q, k, v, z, scores and pattern have heads")
        if self.grid and (self.tokens != "patches" or self.mean):
            raise ValueError(f"{self.text!r}: only patches, and not their mean, can be laid out as a grid")
        if self.mean and self.tokens == "cls":
            raise ValueError(f"{self.text!r}: [CLS] is one token: leave out :mean")


def layers_of(text: str | None) -> int | tuple[int, ...] | None:
    if text in (None, "all"):
        return None
    return numbers(text.strip("[]")) if "," in text or "[" in text else int(text)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def parsed(take: str | Readout | Iterable[str | Readout]) -> tuple[Readout, ...]:
    """Readouts of all of these.

    Raises:
      ValueError: one that cannot be read, none, or two of one name.
    """
    each = [take] if isinstance(take, str | Readout) else list(take)
    made = tuple(Readout.parse(one) if isinstance(one, str) else one for one in each)
    names = [one.name for one in made]
    if not made:
        raise ValueError("nothing is taken: name what to read, such as cls or patches@-1:normed")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{twice[0]} is taken twice: give one another name, NAME={twice[0]}")
    return made


def check_fits(readouts: Sequence[Readout], model: ViT) -> None:
    """Raises a ValueError for what this model does not have."""
    c = model.config
    for each in readouts:
        there = {"logits": c.classes > 0, "projection": c.projection > 0, "cls": c.cls, "registers": c.registers > 0}
        there["prefix"] = c.prefix > 0
        if not there.get(each.whole or each.tokens, True):
            what = {"logits": "classifier", "cls": "class token", "prefix": "class token and no registers"}
            word = each.whole or each.tokens
            raise ValueError(f"{each.text!r}: this model has no {what.get(word, word)}")
        if each.normed and c.final_norm != "tokens":
            raise ValueError(
                f"{each.text!r}: the final norm of this model does not stand on tokens, but on what is pooled"
            )
        heads = (each.heads,) if isinstance(each.heads, int) else each.heads if isinstance(each.heads, tuple) else ()
        if wrong := [head for head in heads if head >= c.heads]:
            raise ValueError(f"{each.text!r}: there is no head {wrong[0]}; this model has {c.heads}, from 0")
    record_of(readouts, model)  # which checks layers


def record_of(readouts: Sequence[Readout], model: ViT) -> dict[str, Take]:
    """What the model must record: of each site the layers that any of them reads."""
    c, record = model.config, {}
    for site in dict.fromkeys(each.site for each in readouts if each.site):
        reading = [each for each in readouts if each.site == site]
        layers = sorted({layer for each in reading for layer in asked(each, c.depth)})
        prefix = all(rows(each, c.prefix) in ("cls", "registers", "prefix") for each in reading)
        record[site] = Take(layers, "prefix" if prefix else "all")
    recording_plan(record, c.depth, c.prefix)
    return record


def asked(readout: Readout, depth: int) -> tuple[int, ...]:
    """The layers of a readout, from 0.

    Raises:
      ValueError: one that is not there.
    """
    layers = readout.layers
    several = tuple(range(depth)) if layers is None else (layers,) if isinstance(layers, int) else layers
    if wrong := [layer for layer in several if not -depth <= layer < depth]:
        raise ValueError(
            f"{readout.text!r}: there is no layer {wrong[0]}; this model has {depth}, from 0 to {depth - 1}"
        )
    return tuple(layer % depth for layer in several)


def rows(readout: Readout, prefix: int) -> str:
    """Which tokens, or query rows: at attention sites the prefix, where they are not said."""
    return "prefix" if readout.every and readout.site in ATTENTION_SITES and prefix else readout.tokens


def read_out(
    model: ViT,
    images: Float[Array, "B H W C"],
    take: str | Readout | Iterable[str | Readout],
    edits: Edits | None = None,
) -> dict[str, Array]:
    """Reads named arrays off one batch. Layers behind the last one that is read do not run.

    Args:
      images: normalised, see `jaxvit.prepare`.
      take: texts such as "cls", "patches@-1:normed:grid", "maps=pattern@-1:cls:head=mean"; see docs/features.md.
      edits: as for the model; what is read at an edited site is what the edit left.

    Returns:
      name -> [B, ..]. The axes are, as far as they are there: layers, heads, tokens (or rows and columns of patches),
      channels; at q, k, v and z heads follow tokens.

    Raises:
      ValueError: what cannot be read, or is not there in this model; edits that do not fit.

    Example:

        jaxvit.read_out(model, images, ["cls", "tokens@[3,6,9,-1]:normed"])  # [B, D] and [B, 4, T, D]
    """
    readouts = parsed(take)
    check_fits(readouts, model)
    grid = model.check_images(images)
    changes = checked_edits(model, edits, images.shape[0], model.config.layout(*images.shape[1:3]).tokens)
    found = _read(model, images, changes, readouts=readouts, grid=grid)
    return {each.name: found[each.name] for each in readouts}  # programs sort the names of what they return


@partial(jax.jit, static_argnames=("readouts", "grid"))
def _read(
    model: ViT, images: Array, edits: Any, *, readouts: tuple[Readout, ...], grid: tuple[int, int]
) -> dict[str, Array]:
    return read_stream(model, model.embedding(images), readouts, grid, edits)


def read_stream(
    model: ViT, stream: Array, readouts: Sequence[Readout], grid: tuple[int, int], edits: Any = None
) -> dict[str, Array]:
    """Reads arrays off a stream [B, T, D] that enters the first block, as part of a program.

    Args:
      edits: as `checked_edits` returns them.
    """
    c, layout = model.config, TokenLayout(model.config.registers, grid, model.config.cls)
    record = record_of(readouts, model)
    to_the_end = any(not each.site for each in readouts)
    stop = c.depth if to_the_end else 1 + max(layer for each in readouts for layer in asked(each, c.depth))
    plan = recording_plan(record, c.depth, c.prefix, 0, stop)
    of_prefix = c.prefix > 0 and not any(reads_patches(each, model) for each in readouts)
    ran = run_blocks(model, stream, edits or {}, plan, grid=grid, outputs="prefix" if of_prefix else "all")
    found = {}
    for each in readouts:
        if each.whole:
            _, pooled, head = model.pooled(ran.stream)
            found[each.name] = pooled if each.whole == "pooled" else head
            continue
        if not each.site:
            value = model.normed(ran.stream)[None]
        else:
            recorded: Any = record[each.site].layers  # a tuple, see `record_of`
            places = [recorded.index(layer) for layer in asked(each, c.depth)]
            value = ran.trace[each.site][np.asarray(places)]
            value = model.norm(value) if each.normed else value
        found[each.name] = shaped(each, value, layout)
    return found


def reads_patches(readout: Readout, model: ViT) -> bool:
    """Whether it needs patches as the last block that runs leaves them."""
    if readout.whole:
        return model.pool.reads_patches
    return not readout.site and readout.tokens in ("patches", "tokens")  # sites say what they need by being recorded


def shaped(readout: Readout, value: Array, layout: TokenLayout) -> Array:
    """[layers, B, *axes of the site] as the readout wants it, [B, ..]."""
    by_query = readout.site in ATTENTION_SITES
    axes = ["layers", *(SITES[readout.site].split() if readout.site else ("B", "T", "D"))]
    if by_query:
        axes[-2] = "T"  # what is chosen are query rows
        axes[-1] = "keys"
    if readout.heads is not None:
        at = axes.index("H")
        value = value.mean(at) if readout.heads == "mean" else jnp.take(value, jnp.asarray(readout.heads), axis=at)
        if not isinstance(readout.heads, tuple):
            axes.pop(at)
    at, which = axes.index("T"), rows(readout, layout.prefix)
    if which == "cls":
        value = jax.lax.index_in_dim(value, 0, at, keepdims=False)
        axes.pop(at)
    else:
        start = {"registers": int(layout.cls), "patches": layout.prefix}.get(which, 0)
        end = {"registers": layout.prefix, "prefix": layout.prefix}.get(which, layout.tokens)
        value = jax.lax.slice_in_dim(value, start, end, axis=at)
        if readout.mean:
            value = value.mean(at)
            axes.pop(at)
        elif readout.grid:
            value = value.reshape(*value.shape[:at], *layout.grid, *value.shape[at + 1 :])
    value = jnp.moveaxis(value, 1, 0)
    one = not readout.site or isinstance(readout.layers, int)
    return value[:, 0] if one else value


def axes_of(readout: Readout) -> tuple[str, ...]:
    """The names of the axes of its array."""
    if readout.whole:
        return ("image", "channel")
    names = {"T": "token", "D": "channel", "F": "hidden", "d": "channel", "H": "head", "Q": "query"}
    axes = [names[a] for a in (SITES[readout.site].split()[1:] if readout.site else ("T", "D")) if a in names]
    if readout.site in ATTENTION_SITES:
        axes = ["head", "query", "key"]
    if readout.heads is not None and not isinstance(readout.heads, tuple):
        axes.remove("head")
    token = "query" if "query" in axes else "token"
    if readout.tokens == "cls" or readout.mean:
        axes.remove(token)
    elif readout.grid:
        at = axes.index(token)
        axes[at : at + 1] = ["row", "column"]
    layers = ["layer"] if readout.site and not isinstance(readout.layers, int) else []
    return ("image", *layers, *axes)


def described(readout: Readout, depth: int) -> Mapping[str, Any]:
    """For a header: what it is, in the order of its axes."""
    about: dict[str, Any] = {"readout": readout.text, "axes": list(axes_of(readout))}
    if readout.site and not isinstance(readout.layers, int):
        about["layers"] = list(asked(readout, depth))
    return about
