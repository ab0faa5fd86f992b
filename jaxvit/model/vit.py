"""The model: images in, tokens out, with every internal value named in passing.

Axes: B batch, T tokens, D width, H heads, d head size, F hidden, L depth, N patches, R registers, P prefix = 1 + R,
Q recorded query rows (P or T).

The modules are Flax NNX, used as plain pytrees: nothing here mutates, so every `jax` transformation takes a model as
an argument. All blocks are one `Block` whose parameters have a leading axis L, run under `jax.lax.scan`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxvit.model.attention import Attention, Turn
from jaxvit.model.config import ViTConfig
from jaxvit.model.edits import Edits, by_layer, check_edits, listed
from jaxvit.model.heads import POOLS, make_head
from jaxvit.model.layers import LayerScale, identity, make_mlp, make_norm
from jaxvit.model.positions import resample_positions, rotation
from jaxvit.model.sites import Record, recording_plan
from jaxvit.model.tap import Tap
from jaxvit.model.tokens import TokenLayout


class Output(NamedTuple):
    """What a model returns; a pytree.

    Attributes:
      cls, registers, patches: after the final norm, if that stands on tokens; `cls` is None without a class token.
      tokens: the whole sequence before the final norm.
      pooled: [CLS], the mean of the patches, or what `config.pool` says, after the final norm.
      logits: the checkpoint's linear layer on what is pooled: classes, or a CLIP's projection; None without one.
      trace: site -> [recorded layers, *axes of the site], see `SITES`.
    """

    cls: Float[Array, "B D"] | None
    registers: Float[Array, "B R D"]
    patches: Float[Array, "B N D"]
    tokens: Float[Array, "B T D"]
    trace: dict[str, Array]
    pooled: Float[Array, "B D"]
    logits: Float[Array, "B C"] | None


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), each branch through its LayerScale."""

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        self.norm1, self.norm2 = make_norm(c), make_norm(c)
        self.attn = Attention(c, rngs)
        self.mlp = make_mlp(c, rngs)
        self.scale1, self.scale2 = (LayerScale(c) if c.layer_scale else identity for _ in range(2))

    def __call__(self, x_BTD: Array, tap: Tap, turn: Turn = identity) -> Array:
        x = tap("resid_pre", x_BTD)
        attn_out = tap("attn_out", self.scale1(self.attn(self.norm1(x), tap, turn)))
        x = tap("resid_mid", tap("skip_attn", x) + attn_out)
        mlp_out = tap("mlp_out", self.scale2(self.mlp(self.norm2(x), tap)))
        return tap("resid_post", tap("skip_mlp", x) + mlp_out)


class ViT(nnx.Module):
    """A Vision Transformer over [CLS], registers and patches.

    `cls` and `registers` hold these tokens *and* their positions, where a checkpoint has such: they are only ever used
    as a sum.

    Args:
      config: sizes and choices.
      rngs: for the random initialisation; `nnx.Rngs(0)`.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        c = config
        token = jax.nn.initializers.truncated_normal(0.02)

        def tokens(*shape: int, present: bool = True) -> nnx.Param | None:
            return nnx.Param(token(rngs.params(), (*shape, c.width))) if present else None

        # Rows of the kernel: y, x, channel within a patch.
        self.patch_embed = nnx.Linear(3 * c.patch**2, c.width, use_bias=c.patch_bias, rngs=rngs)
        self.patch_norm = make_norm(c, present=c.patch_norm)
        self.cls = tokens(present=c.cls)
        self.registers = tokens(c.registers, present=c.registers > 0)
        self.positions = tokens(*c.grid, present=c.positions)
        self.pre_norm = make_norm(c, present=c.pre_norm)
        make_blocks = jax.jit(jax.vmap(lambda key: Block(c, nnx.Rngs(key))))  # jit: one compilation, not one an array
        self.blocks = make_blocks(jax.random.split(rngs.params(), c.depth))
        self.norm = make_norm(c, present=c.final_norm != "none")
        self.pool = POOLS[c.pool](c, rngs)
        self.head = make_head(c, rngs)
        self.config = c

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self)
        dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
        return f"ViT({self.config.in_words()}: {sum(leaf.size for leaf in leaves):,} parameters of {dtypes})"

    __str__ = __repr__  # NNX's own prints every number

    @property
    def layout(self) -> TokenLayout:
        """The sequence for images of the size the checkpoint's preparation gives; `config.layout` for other sizes."""
        return self.config.layout()

    def __call__(self, images: Float[Array, "B H W 3"], edits: Edits | None = None, record: Record = ()) -> Output:
        """Runs the model.

        Args:
          images: normalised (see `jaxvit.prepare`), sides multiples of the patch size; cast to the parameters' dtype.
          edits: site -> what to change there; see `jaxvit.Edit`, and `ablate`, `patch`, `knockout` .. which make them.
          record: sites to keep, `("pattern", "resid_post")`, or how much of each, `{"pattern": Take(layers=-1)}`;
            after their edits.

        Raises:
          ValueError: an image size that is not a multiple of the patch, an unknown site, a layer that is not there,
            an edit whose arrays do not fit.
        """
        grid = self.config.layout(*images.shape[1:3]).grid if images.ndim == 4 else None  # embed explains what is wrong
        return self.run_from(0, self.embed(images), edits, record, grid)

    def embed(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B T D"]:
        """The sequence that enters the first block."""
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images have shape {images.shape}; expected [batch, height, width, 3 channels]")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images are {images.dtype}; expected normalised numbers: use jaxvit.prepare")
        layout, p = self.config.layout(*images.shape[1:3]), self.config.patch
        B, (rows, columns) = len(images), layout.grid
        # One axis at a time, which JAX can follow when the batch is sharded.
        strips = images.astype(self.patch_embed.kernel.dtype).reshape(B, rows, p, columns * p, 3)
        pixels = strips.reshape(B, rows, p, columns, p, 3).swapaxes(2, 3)
        patches_BND = self.patch_norm(self.patch_embed(jax.lax.collapse(jax.lax.collapse(pixels, 3), 1, 3)))
        # One sum of [0, patches] and [cls, registers, positions] instead of a concatenation with tokens that must
        # first be copied for each image: it holds as it is when images are sharded.
        before = [] if self.cls is None else [self.cls[...][None]]
        before += [] if self.registers is None else [self.registers[...]]
        if self.positions is None:
            positions = jnp.zeros(patches_BND.shape[1:], patches_BND.dtype)
        else:
            positions = resample_positions(self.positions[...], layout.grid, self.config.resampling)
            positions = positions.reshape(-1, self.config.width)
        tokens = (
            jnp.pad(patches_BND, ((0, 0), (layout.prefix, 0), (0, 0))) + jnp.concatenate([*before, positions])[None]
        )
        return self.pre_norm(tokens)

    def run_from(
        self,
        layer: int | Array,
        resid_BTD: Float[Array, "B T D"],
        edits: Edits | None = None,
        record: Record = (),
        grid: tuple[int, int] | None = None,
    ) -> Output:
        """Runs blocks `layer` .. L - 1 and the final norm on the residual stream that enters block `layer`.

        `run_from(l, out.trace["resid_pre"][l])` equals the run that was recorded. Layers keep their absolute numbers,
        in `record` and in `edits`, whose arrays have an axis of all L layers.

        `layer` may be a traced integer, so that one program serves every start; then nothing can be recorded, as the
        number of layers that run is not known, and there is no reverse-mode gradient.

        `grid`, rows and columns of patches, is needed by models with rotary positions, and by these alone.
        """
        if resid_BTD.ndim != 3 or resid_BTD.shape[-1] != self.config.width:
            raise ValueError(f"the stream has shape {resid_BTD.shape}; expected [batch, tokens, {self.config.width}]")
        changes = listed(edits)
        check_edits(changes, self._sizes(*resid_BTD.shape[:2]))
        scanned, of_layer = by_layer(changes, self.config.depth)
        turn = self.turn(grid, resid_BTD.shape[1])

        def step(x, block, edits, wanted):
            tap = Tap(wanted, of_layer(edits), self.prefix)
            return block(x, tap, turn), tap.trace

        def at_layer(i, x, wanted):
            at = partial(jax.lax.dynamic_index_in_dim, index=i, axis=0, keepdims=False)
            block, edits = jax.tree.map(at, (self.blocks, scanned))
            return step(x, block, edits, wanted)

        if isinstance(layer, jax.Array):
            if record:
                raise ValueError("a run from a traced layer records nothing: the number of layers is not known")
            end = self.config.depth
            return self._finish(jax.lax.fori_loop(layer, end, lambda i, x: at_layer(i, x, {})[0], resid_BTD), {})
        x, trace = resid_BTD, {}
        for start, stop, wanted in recording_plan(record, self.config.depth, layer):
            if stop - start == self.config.depth:
                x, new = jax.lax.scan(lambda x, xs: step(x, *xs, wanted), x, (self.blocks, scanned))  # noqa: B023
            else:  # by number: slices of the parameters for each run would be copies of them
                x, new = jax.lax.scan(lambda x, i: at_layer(i, x, wanted), x, jnp.arange(start, stop))  # noqa: B023
            for site, value in new.items():
                trace.setdefault(site, []).append(value)
        return self._finish(x, {site: v[0] if len(v) == 1 else jnp.concatenate(v) for site, v in trace.items()})

    def turn(self, grid: tuple[int, int] | None, tokens: int) -> Turn:
        """What gives queries and keys in a sequence of `tokens` over a `grid` of patches their rotary positions."""
        c = self.config
        if c.rope is None:
            return identity
        if grid is None or grid[0] * grid[1] + self.prefix != tokens:
            raise ValueError(
                f"a run of {tokens} tokens over a grid of {grid} patches: with rotary positions, give the grid of the "
                f"images, such as config.layout(height, width).grid"
            )
        return rotation(grid, c.head_size, c.rope_base, c.rope, self.prefix)

    def _finish(self, tokens_BTD: Array, trace: dict[str, Array]) -> Output:
        c = self.config
        final = self.norm(tokens_BTD) if c.final_norm == "tokens" else tokens_BTD
        pooled = self.pool(final, self.prefix)
        if c.final_norm == "pooled":
            pooled = self.norm(pooled)
        return Output(
            cls=final[:, 0] if c.cls else None,
            registers=final[:, c.cls : self.prefix],
            patches=final[:, self.prefix :],
            tokens=tokens_BTD,
            trace=trace,
            pooled=pooled,
            logits=self.head(pooled, final, self.prefix),
        )

    def _sizes(self, batch: int, tokens: int) -> dict[str, int]:
        c = self.config
        axes = {"B": batch, "T": tokens, "D": c.width, "H": c.heads, "d": c.head_size, "F": c.hidden}
        return {**axes, "L": c.depth, "P": self.prefix}

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches: [CLS] and the registers."""
        return self.config.prefix
