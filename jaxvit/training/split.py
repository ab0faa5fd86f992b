"""Which parameters learn: a model taken apart into them and the rest, and run as one.

    learn, frozen = split(model, "head", "blocks[-2:]")        # dict: name -> array; everything else
    slopes = jax.grad(lambda learn: loss(apply(learn, frozen, images)))(learn)
    model = join(learn, frozen)

`learn` is a plain dict, for any optimiser of optax. What is frozen stays bit for bit, and takes neither gradients nor
an optimiser's memory: blocks are stacked, and the layers that learn are cut out of the stack.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxvit.model.config import ViTConfig
from jaxvit.model.edits import Edits
from jaxvit.model.params import Params, from_params, to_params
from jaxvit.model.pieces import Piece, value
from jaxvit.model.run import Outputs, Remat, check_choices, checked_edits, run_blocks
from jaxvit.model.sites import Record, recording_plan
from jaxvit.model.vit import Output, PrefixOutput, ViT, outputs_of

BLOCKS = "blocks."
LORA = (".lora_a", ".lora_b")
"""Ends of the names of a low-rank addition to a kernel."""

GROUPS = {
    "all": ("*",),
    "head": ("head.*", "pool.*"),
    "norms": ("*norm.*", "*norm1.*", "*norm2.*"),
    "biases": ("*.bias",),
    "scales": ("blocks.scale1.*", "blocks.scale2.*"),
    "embedding": ("patch_embed.*", "patch_norm.*", "positions", "cls", "registers", "mask_token", "pre_norm.*"),
}
"""What a word stands for; parameters' own names and patterns with * and ? are understood too."""


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config"])
@dataclass(frozen=True)
class Frozen:
    """What does not learn.

    Attributes:
      params: name -> array. Of blocks some of whose layers learn it is the whole stack, in which these layers hold what
        they started from.
      config: of the model.

    Example:

        learn, frozen = split(model, "norms")
        apply(learn, frozen, images).cls  # [B, D]
    """

    params: Params
    config: ViTConfig

    def __repr__(self) -> str:
        return f"Frozen({self.config.in_words()}: {sum(a.size for a in self.params.values()):,} parameters)"


def split(model: ViT, *trainable: str) -> tuple[Params, Frozen]:
    """Takes a model apart into what learns and what is frozen. Copies the layers that learn, and nothing else.

    Args:
      trainable: any of
        `all`, `head` (and an attention pool), `norms`, `biases`, `scales` (LayerScale), `embedding`;
        `cls`, `registers`, `positions`, or another parameter's name;
        `blocks`, `blocks[-2:]`, `blocks[3]`: all of some layers; `blocks[-2:].mlp`, `blocks.attn.qkv`: a part of them;
        a pattern with * or ?, such as `blocks.*.kernel`.

    Returns:
      `(learn, frozen)`. Names in `learn` are those of `jaxvit.functional`, with the layers where these are not all:
      `blocks[10:12].attn.qkv.kernel`, [2, D, 3, H, d].

    Raises:
      ValueError: a word that names no parameter of this model.

    Example:

        learn, frozen = split(attach_head(model, 10, key=jax.random.key(0)), "head", "blocks[-2:]")
    """
    params, depth = to_params(model), model.config.depth
    chosen: dict[str, np.ndarray] = {}
    for word in trainable:
        found = named(word, params, depth)
        if not found:
            raise ValueError(
                f"{word!r} names no parameter of this model; there are {', '.join(GROUPS)}, blocks[-2:] .., and "
                f"{', '.join(name for name in params if not name.startswith(BLOCKS))}"
            )
        for name, layers in found.items():
            chosen[name] = chosen.get(name, np.zeros(depth, bool)) | layers
    learn: Params = {}
    for name in params:  # in the model's order
        if name not in chosen:
            continue
        if not name.startswith(BLOCKS) or chosen[name].all():
            learn[name] = params[name]
            continue
        for start, stop in ranges(chosen[name]):
            learn[f"blocks[{start}:{stop}].{name[len(BLOCKS) :]}"] = params[name][start:stop]
    return learn, Frozen({name: a for name, a in params.items() if name not in learn}, model.config)


def named(word: str, names: Iterable[str], depth: int) -> dict[str, np.ndarray]:
    """Names of parameters that a word stands for -> which layers, [L] booleans."""
    layers = np.ones(depth, bool)
    whole = re.fullmatch(r"blocks(?:\[([^\]]*)\])?(?:\.(.+))?", word)
    if whole:
        if whole[1] is not None:
            layers = layers_of(whole[1], depth, word)
        inside = whole[2] or "*"
        patterns: tuple[str, ...] = (f"blocks.{inside}", f"blocks.{inside}.*")
    else:
        patterns = GROUPS.get(word, (word, f"{word}.*"))
    return {name: layers for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def layers_of(text: str, depth: int, word: str) -> np.ndarray:
    """[L] booleans of an index or a slice in Python's manner."""
    found = re.fullmatch(r"(-?\d+)|(-?\d*):(-?\d*)", text)
    mask = np.zeros(depth, bool)
    if found and found[1] is not None:
        if -depth <= int(found[1]) < depth:
            mask[int(found[1])] = True
    elif found:
        mask[slice(*(int(end) if end else None for end in (found[2], found[3])))] = True
    if not mask.any():
        raise ValueError(f"{word!r}: expected layers of {depth}, such as blocks[-2:] or blocks[0]")
    return mask


def ranges(mask: np.ndarray) -> list[tuple[int, int]]:
    """Starts and ends of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def pieces_of(learn: Mapping[str, Array], frozen: Frozen) -> tuple[Params, list[Piece]]:
    """Whole parameters that learn, and pieces of stacks: some of their layers, and low-rank additions.

    Raises:
      ValueError: names that fit neither the model nor one another.
    """
    depth, whole = frozen.config.depth, {}
    pieces, pairs = [], {}
    for name, a in learn.items():
        layers = re.fullmatch(r"blocks\[(\d+):(\d+)\]\.(.+)", name)
        start, stop = (int(layers[1]), int(layers[2])) if layers else (0, depth)
        inside = layers[3] if layers else name.removeprefix(BLOCKS)
        if name.endswith(LORA):
            pairs.setdefault((inside[: -len(LORA[0])], start, stop), {})[name[-len(LORA[0]) :]] = a
        elif layers:
            pieces.append(Piece(inside, start, stop, (a,)))
        else:
            whole[name] = a
    for (inside, start, stop), pair in pairs.items():
        if set(pair) != set(LORA):
            raise ValueError(f"the low-rank addition to {inside} has one of its two matrices alone")
        pieces.append(Piece(inside, start, stop, tuple(pair[end] for end in LORA)))
    for piece in pieces:
        name = f"{BLOCKS}{piece.name}"
        if name not in frozen.params:
            why = "learns itself" if name in whole else "is not there"
            raise ValueError(f"{name} {why}: it cannot be trained in part")
    return whole, pieces


def join(learn: Mapping[str, Array], frozen: Frozen) -> ViT:
    """The model: what learns in its place, low-rank additions added up.

    Raises:
      ValueError: names or shapes that do not fit the model.

    Example:

        jaxvit.save(join(learn, frozen), "fine-tuned")
    """
    whole, pieces = pieces_of(learn, frozen)
    params = {**frozen.params, **whole}
    for piece in pieces:
        name, part = f"{BLOCKS}{piece.name}", slice(piece.start, piece.stop)
        old = params[name]
        new = jax.vmap(value)(old[part], piece.arrays)
        params[name] = new if len(new) == len(old) else jnp.asarray(old).at[part].set(new)
    return from_params(frozen.config, params)


def apply(
    learn: Mapping[str, Array],
    frozen: Frozen,
    images: Float[Array, "B H W C"],
    edits: Edits | None = None,
    record: Record = (),
    *,
    outputs: Outputs = "all",
    remat: Remat = "none",
    dtype: DTypeLike | None = None,
    masked: Bool[Array, "B N"] | None = None,
    kept: Int[Array, "B K"] | None = None,
) -> Output | PrefixOutput:
    """What `join(learn, frozen)(images, ..)` gives, for training: gradients have the size of what learns.

    Call it inside of `jax.jit`. Layers in front of the first that learns are not differentiated.

    Args:
      images, edits, record, outputs, remat: as of the model.
      dtype: to compute in, such as "bfloat16"; what learns keeps its own, and so do its gradients.
      masked: which patches are hidden: the mask token stands in their place.
      kept: numbers of the patches that go through the blocks, the same number of each image; the others are dropped.

    Raises:
      ValueError: what the model raises; a mask for a model without a mask token; dropped patches of a model with rotary
        positions.

    Example:

        def loss(learn, frozen, images, labels):
            return cross_entropy(apply(learn, frozen, images, outputs="cls").logits, labels)
    """
    if dtype is not None:
        learn, frozen = jax.tree.map(lambda a: a.astype(dtype), (dict(learn), frozen))
    whole, pieces = pieces_of(learn, frozen)
    if pieces:  # then stacks that learn whole become pieces too, whose gradients are written layer by layer
        stacks = {name: a for name, a in whole.items() if name.startswith(BLOCKS)}
        pieces += [Piece(name[len(BLOCKS) :], 0, frozen.config.depth, (a,)) for name, a in stacks.items()]
        whole |= {name: jax.lax.stop_gradient(a) for name, a in stacks.items()}
    model = from_params(frozen.config, {**frozen.params, **whole})
    grid = model.check_images(images)
    if masked is not None and model.mask_token is None:
        raise ValueError("this model has no mask token, which stands in for masked patches")
    if kept is not None and model.config.rope is not None:
        raise ValueError("patches cannot be dropped in a model with rotary positions, which belong to the whole grid")
    stream = model.embedding(images, masked)
    if kept is not None:
        chosen = jnp.take_along_axis(stream[:, model.prefix :], kept[:, :, None], axis=1)
        stream = jnp.concatenate([stream[:, : model.prefix], chosen], axis=1)
    c = model.config
    changes = checked_edits(model, edits, *stream.shape[:2])
    check_choices(model, images, remat, "auto", outputs)
    plan = recording_plan(record, c.depth, c.prefix)
    ran = run_blocks(model, stream, changes, plan, grid=grid, remat=remat, outputs=outputs, pieces=pieces)
    return outputs_of(model, ran, outputs)
