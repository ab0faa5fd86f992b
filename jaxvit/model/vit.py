"""The model: images in, tokens out, with every internal value named in passing.

Axes: B batch, T tokens, D width, H heads, d head size, F hidden, L depth, N patches, R registers, P prefix = 1 + R,
Q recorded query rows (P or T).

The modules are Flax NNX, used as plain pytrees: nothing here mutates, so every `jax` transformation takes a model as
an argument. All blocks are one `Block` whose parameters have a leading axis L, run under `jax.lax.scan`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float

from jaxvit.model.attention import Attention, Form, Kernel, Rope, by_rows
from jaxvit.model.config import ViTConfig
from jaxvit.model.edits import Edits
from jaxvit.model.heads import POOLS, Head, Pool, make_head
from jaxvit.model.layers import LayerScale, Linear, Norm, PlainMlp, SwigluMlp, identity, make_mlp, make_norm
from jaxvit.model.positions import resample_positions
from jaxvit.model.run import Outputs, Ran, Remat, check_choices, checked_edits, run_blocks
from jaxvit.model.sites import Plan, Record, recording_plan
from jaxvit.model.tap import Tap
from jaxvit.model.tokens import TokenLayout


@jax.tree_util.register_pytree_with_keys_class
class Trace(dict[str, Array]):
    """What a run recorded, site -> [recorded layers, *axes of the site]; prints shapes, not numbers."""

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{site}: {shown(value)}' for site, value in self.items())}}}"

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[str, ...]]:
        sites = tuple(sorted(self))
        return tuple((jax.tree_util.DictKey(site), self[site]) for site in sites), sites

    @classmethod
    def tree_unflatten(cls, sites: tuple[str, ...], values: Iterable[Any]) -> Trace:
        return cls(zip(sites, values, strict=True))


class Output(NamedTuple):
    """What a model returns; a pytree.

    Attributes:
      cls, registers, patches: after the final norm, if that stands on tokens; `cls` is None without a class token.
      tokens: the whole sequence before the final norm.
      pooled: [CLS], the mean of the patches, or what `config.pool` says, after the final norm.
      logits: the checkpoint's classifier of what is pooled; None without one.
      projection: what is pooled, in the space a CLIP shares with texts; None without such a projection.
      trace: site -> [recorded layers, *axes of the site], see `SITES`; layers in the order asked for.

    Example:

        out = model(images, record=["resid_post"])
        out.cls, out.registers, out.patches  # after the final norm
        out.trace["resid_post"][-1]  # [B, T, D]
    """

    cls: Float[Array, "B D"] | None
    registers: Float[Array, "B R D"]
    patches: Float[Array, "B N D"]
    tokens: Float[Array, "B T D"]
    trace: dict[str, Array]
    pooled: Float[Array, "B D"]
    logits: Float[Array, "B C"] | None
    projection: Float[Array, "B E"] | None

    def __repr__(self) -> str:
        return shapes_of(self)


class PrefixOutput(NamedTuple):
    """What a model returns with `outputs="prefix"` or `"cls"`; a pytree. See `Output`.

    Attributes:
      cls: after the final norm; None without a class token.
      registers: None with `outputs="cls"`.
      trace: as of `Output`.
      pooled, logits, projection: None too where they read patches, which were not computed.

    Example:

        model(images, outputs="prefix").registers  # [B, R, D]
    """

    cls: Float[Array, "B D"] | None
    registers: Float[Array, "B R D"] | None
    trace: dict[str, Array]
    pooled: Float[Array, "B D"] | None
    logits: Float[Array, "B C"] | None
    projection: Float[Array, "B E"] | None

    def __repr__(self) -> str:
        return shapes_of(self)

    def __getattr__(self, name: str) -> Any:
        if name in Output._fields:
            raise AttributeError(f"{name} were not computed: call the model with outputs='all'")
        raise AttributeError(f"a {type(self).__name__} has no {name!r}")


def shapes_of(out: Output | PrefixOutput) -> str:
    """An output as text: shapes, not numbers."""
    return f"{type(out).__name__}({', '.join(f'{name}={shown(value)}' for name, value in out._asdict().items())})"


def shown(value: object) -> str:
    """An array as its type and shape, float32[2, 5, 384]."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return repr(value) if shape is None else f"{dtype}{list(shape)}"


jax.export.register_namedtuple_serialization(Output, serialized_name="jaxvit.Output")
jax.export.register_namedtuple_serialization(PrefixOutput, serialized_name="jaxvit.PrefixOutput")
jax.export.register_pytree_node_serialization(
    Trace,
    serialized_name="jaxvit.Trace",
    serialize_auxdata=lambda sites: ",".join(sites).encode(),
    deserialize_auxdata=lambda stored: tuple(filter(None, stored.decode().split(","))),
)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), each branch through its LayerScale."""

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        self.norm1: Norm = make_norm(c)
        self.norm2: Norm = make_norm(c)
        self.attn: Attention = Attention(c, rngs)
        self.mlp: PlainMlp | SwigluMlp = make_mlp(c, rngs)
        self.scale1: Norm = LayerScale(c) if c.layer_scale else identity
        self.scale2: Norm = LayerScale(c) if c.layer_scale else identity

    def __call__(
        self, x_BTD: Array, tap: Tap, apply_rope: Rope = identity, kernel: Form = "auto", rows: int | None = None
    ) -> Array:
        """[B, T, D], or [B, rows, D]: of the first tokens alone, which attend to all."""
        x = tap("resid_pre", x_BTD)
        with jax.named_scope("attention"):
            attn_out = tap("attn_out", self.scale1(self.attn(self.norm1(x), tap, apply_rope, kernel, rows)))
            x = x if rows is None else x[:, :rows]
            x = tap("resid_mid", tap("skip_attn", x) + attn_out)
        with jax.named_scope("mlp"):
            whole = "auto" if tap.touches("mlp_pre", "mlp_post") else kernel
            mlp_out = by_rows(lambda x: self.mlp(self.norm2(x), tap), x, whole)
            mlp_out = tap("mlp_out", self.scale2(mlp_out))
            return tap("resid_post", tap("skip_mlp", x) + mlp_out)


class ViT(nnx.Module):
    """A Vision Transformer over [CLS], registers and patches.

    `cls` and `registers` hold these tokens *and* their positions, where a checkpoint has such: they are only ever used
    as a sum. `mask_token` [D] is what pretraining puts in place of hidden patches: no forward pass reads it.

    Args:
      config: sizes and choices.
      rngs: for the random initialisation; `nnx.Rngs(0)`.

    Example:

        model = ViT(ViTConfig.dinov2("small", registers=4), rngs=nnx.Rngs(0))  # random weights
        out = model(images)
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        c = config
        token = jax.nn.initializers.truncated_normal(0.02)

        def tokens(*shape: int, present: bool = True) -> nnx.Param[Array] | None:
            return nnx.Param(token(rngs.params(), (*shape, c.width))) if present else None

        # Rows of the kernel: y, x, channel within a patch.
        self.patch_embed: Linear = Linear(c.channels * c.patch**2, c.width, c.patch_bias, rngs)
        self.patch_norm: Norm = make_norm(c, present=c.patch_norm)
        self.cls: nnx.Param[Array] | None = tokens(present=c.cls)
        self.registers: nnx.Param[Array] | None = tokens(c.registers, present=c.registers > 0)
        self.positions: nnx.Param[Array] | None = tokens(*c.grid, present=c.positions)
        self.mask_token: nnx.Param[Array] | None = tokens(present=c.mask_token)
        self.pre_norm: Norm = make_norm(c, present=c.pre_norm)
        make_blocks = jax.jit(jax.vmap(lambda key: Block(c, nnx.Rngs(key))))  # jit: one compilation, not one an array
        self.blocks: Block = make_blocks(jax.random.split(rngs.params(), c.depth))
        self.norm: Norm = make_norm(c, present=c.final_norm != "none")
        self.pool: Pool = POOLS[c.pool](c, rngs)
        self.head: Head = make_head(c, rngs)
        self.config: ViTConfig = c

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self)
        dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
        return f"ViT({self.config.in_words()}: {sum(leaf.size for leaf in leaves):,} parameters of {dtypes})"

    def __str__(self) -> str:  # NNX's own prints every number
        return repr(self)

    @property
    def layout(self) -> TokenLayout:
        """The sequence for images of the size the checkpoint's preparation gives.

        For images of another size, call `model.config.layout(height, width)`.
        """
        return self.config.layout()

    @overload
    def __call__(
        self,
        images: Float[Array, "B H W C"],
        edits: Edits | None = None,
        record: Record = (),
        *,
        outputs: Literal["all"] = "all",
        remat: Remat = "none",
        attention: Kernel = "auto",
    ) -> Output: ...
    @overload
    def __call__(
        self,
        images: Float[Array, "B H W C"],
        edits: Edits | None = None,
        record: Record = (),
        *,
        outputs: Literal["prefix", "cls"],
        remat: Remat = "none",
        attention: Kernel = "auto",
    ) -> PrefixOutput: ...
    @overload
    def __call__(
        self,
        images: Float[Array, "B H W C"],
        edits: Edits | None = None,
        record: Record = (),
        *,
        outputs: Outputs,
        remat: Remat = "none",
        attention: Kernel = "auto",
    ) -> Output | PrefixOutput: ...
    def __call__(
        self,
        images: Float[Array, "B H W C"],
        edits: Edits | None = None,
        record: Record = (),
        *,
        outputs: Outputs = "all",
        remat: Remat = "none",
        attention: Kernel = "auto",
    ) -> Output | PrefixOutput:
        """Runs the model. A call outside of `jax.jit` compiles once for each shape.

        Args:
          images: normalised (see `jaxvit.prepare`), of `config.channels` channels; sides are multiples of the patch
            size. They are cast to the parameters' dtype.
          edits: site -> what to change there; see `jaxvit.Edit`, and `ablate`, `patch`, `knockout` .. which make them.
          record: sites to keep, `("pattern", "resid_post")`, or how much of each, `{"pattern": Take(layers=-1)}`;
            after their edits.
          outputs: of which tokens the outputs are read: `prefix` are [CLS] and registers. In the last block the others
            are then attended to, but neither attend nor go through the MLP, and what would need them is not returned.
          remat: `block`: a backward pass computes each block again instead of keeping what is inside it.
          attention: how attention is computed where no weights are recorded or edited: `xla`, `cudnn` (in half
            precision on an NVIDIA GPU), or `auto`.

        Raises:
          ValueError: an image size that is not a multiple of the patch, an unknown site, a layer that is not there,
            an edit whose arrays do not fit, outputs of tokens that this model does not have, or a choice of attention
            that cannot be used here.

        Example:

            out = model(images, record={"pattern": Take(layers=-1)})
            out.trace["pattern"]  # [1, B, H, P, T]
            model(images, outputs="cls").cls  # [B, D]; the last block costs a fifth
        """
        c = self.config
        grid = self.check_images(images)
        changes = checked_edits(self, edits, images.shape[0], c.layout(*images.shape[1:3]).tokens)
        check_choices(self, images, remat, attention, outputs)
        static: Any = dict(grid=grid, remat=remat, kernel=attention, outputs=outputs)
        return _forward(self, images, changes, plan=recording_plan(record, c.depth, c.prefix), **static)

    @overload
    def run_from(
        self,
        layer: int | np.integer | Array,
        resid_BTD: Float[Array, "B T D"],
        edits: Edits | None = None,
        record: Record = (),
        grid: tuple[int, int] | None = None,
        *,
        outputs: Literal["all"] = "all",
        remat: Remat = "none",
        attention: Kernel = "auto",
    ) -> Output: ...
    @overload
    def run_from(
        self,
        layer: int | np.integer | Array,
        resid_BTD: Float[Array, "B T D"],
        edits: Edits | None = None,
        record: Record = (),
        grid: tuple[int, int] | None = None,
        *,
        outputs: Literal["prefix", "cls"],
        remat: Remat = "none",
        attention: Kernel = "auto",
    ) -> PrefixOutput: ...
    @overload
    def run_from(
        self,
        layer: int | np.integer | Array,
        resid_BTD: Float[Array, "B T D"],
        edits: Edits | None = None,
        record: Record = (),
        grid: tuple[int, int] | None = None,
        *,
        outputs: Outputs,
        remat: Remat = "none",
        attention: Kernel = "auto",
    ) -> Output | PrefixOutput: ...
    def run_from(
        self,
        layer: int | np.integer | Array,
        resid_BTD: Float[Array, "B T D"],
        edits: Edits | None = None,
        record: Record = (),
        grid: tuple[int, int] | None = None,
        *,
        outputs: Outputs = "all",
        remat: Remat = "none",
        attention: Kernel = "auto",
    ) -> Output | PrefixOutput:
        """Runs blocks `layer` .. L - 1 and the final norm on the residual stream that enters block `layer`.

        `run_from(l, out.trace["resid_pre"][l])` equals the run that was recorded. Layers keep their absolute numbers,
        in `record` and in `edits`, whose arrays have an axis of all L layers.

        Args:
          layer: 0 .. L; with L only the final norm runs. It may be a traced integer, so that one program serves every
            start; then nothing can be recorded, there is no reverse-mode gradient, and a number outside gives NaN.
          resid_BTD: the stream.
          edits, record, outputs, remat, attention: as for the model.
          grid: rows and columns of patches; models with rotary positions need it.

        Raises:
          ValueError: no such layer, a stream of another width, or what the model raises.
        """
        c = self.config
        if resid_BTD.ndim != 3 or resid_BTD.shape[-1] != c.width:
            raise ValueError(f"the stream has shape {resid_BTD.shape}; expected [batch, tokens, {c.width}]")
        changes = checked_edits(self, edits, *resid_BTD.shape[:2])
        check_choices(self, resid_BTD, remat, attention, outputs)
        static: Any = dict(grid=grid, remat=remat, kernel=attention, outputs=outputs)
        if isinstance(layer, Tracer):
            if record:
                raise ValueError("a run from a traced layer records nothing: the number of layers is not known")
            return _forward_from(self, resid_BTD, changes, layer, plan=Plan(()), **static)
        if np.ndim(layer) or not jnp.issubdtype(jnp.result_type(layer), jnp.integer):
            raise ValueError(f"layer is {layer!r}; expected a whole number from 0 to {c.depth}")
        plan = recording_plan(record, c.depth, c.prefix, int(layer))
        return _forward_from(self, resid_BTD, changes, None, plan=plan, **static)

    def embed(self, images: Float[Array, "B H W C"]) -> Float[Array, "B T D"]:
        """The sequence that enters the first block.

        Raises:
          ValueError: images of a wrong shape or type, or whose sides are not multiples of the patch size.
        """
        self.check_images(images)
        return _embed(self, images)

    def check_images(self, images: Array) -> tuple[int, int]:
        """Rows and columns of their patches.

        Raises:
          ValueError: as `embed`.
        """
        if images.ndim != 4 or images.shape[-1] != self.config.channels:
            raise ValueError(
                f"images have shape {images.shape}; expected [batch, height, width, {self.config.channels} channels]"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images are {images.dtype}; expected normalised numbers: use jaxvit.prepare")
        return self.config.layout(*images.shape[1:3]).grid

    def embedding(self, images: Array, masked_BN: Array | None = None) -> Array:
        """`embed` as part of a program, without its checks; the mask token stands in for masked patches."""
        layout, p, C = self.config.layout(*images.shape[1:3]), self.config.patch, self.config.channels
        B, (rows, columns) = images.shape[0], layout.grid
        with jax.named_scope("embed"):
            # One axis at a time, which JAX can follow when the batch is sharded.
            strips = images.astype(self.dtype).reshape(B, rows, p, columns * p, C)
            pixels = strips.reshape(B, rows, p, columns, p, C).swapaxes(2, 3)
            patches_BND = self.patch_norm(self.patch_embed(jax.lax.collapse(jax.lax.collapse(pixels, 3), 1, 3)))
            if masked_BN is not None and self.mask_token is not None:
                hidden = self.mask_token[...][None, None].astype(patches_BND.dtype)
                patches_BND = jnp.where(masked_BN[..., None], hidden, patches_BND)
            # One sum of [0, patches] and [cls, registers, positions] instead of a concatenation with tokens that must
            # first be copied for each image: it holds as it is when images are sharded. In half precision positions
            # are computed in float32, and the sum is rounded once.
            before = [] if self.cls is None else [self.cls[...][None]]
            before += [] if self.registers is None else [self.registers[...]]
            if self.positions is None:
                positions = jnp.zeros(patches_BND.shape[1:], patches_BND.dtype)
            else:
                positions = resample_positions(self.positions[...], layout.grid, self.config.resampling)
                positions = positions.reshape(-1, self.config.width)
            added = jnp.concatenate([a.astype(positions.dtype) for a in (*before, positions)])
            patches_BND = jnp.pad(patches_BND, ((0, 0), (layout.prefix, 0), (0, 0)))
            return self.pre_norm((patches_BND.astype(added.dtype) + added[None]).astype(patches_BND.dtype))

    def outputs(self, tokens_BTD: Array, trace: dict[str, Array]) -> Output:
        """What follows the blocks, as part of a program."""
        c = self.config
        with jax.named_scope("output"):
            final, pooled, head = self.pooled(tokens_BTD)
        return Output(
            cls=final[:, 0] if c.cls else None,
            registers=final[:, c.cls : self.prefix],
            patches=final[:, self.prefix :],
            tokens=tokens_BTD,
            trace=Trace(trace),
            pooled=pooled,
            logits=head if c.classes else None,
            projection=head if c.projection else None,
        )

    def prefix_outputs(self, tokens_BPD: Array, trace: dict[str, Array], registers: bool) -> PrefixOutput:
        """The same of the tokens before the patches alone."""
        c = self.config
        with jax.named_scope("output"):
            if self.pool.reads_patches:
                final, pooled, head = self.normed(tokens_BPD), None, None
            else:
                final, pooled, head = self.pooled(tokens_BPD)
        return PrefixOutput(
            cls=final[:, 0] if c.cls else None,
            registers=final[:, c.cls :] if registers else None,
            trace=Trace(trace),
            pooled=pooled,
            logits=head if c.classes else None,
            projection=head if c.projection else None,
        )

    def normed(self, tokens_BTD: Array) -> Array:
        """Tokens as they leave the model."""
        return self.norm(tokens_BTD) if self.config.final_norm == "tokens" else tokens_BTD

    def pooled(self, tokens_BTD: Array) -> tuple[Array, Array, Array | None]:
        """Tokens as they leave the model, what is pooled of them, and what the head makes of that."""
        final = self.normed(tokens_BTD)
        pooled = self.pool(final, self.prefix)
        if self.config.final_norm == "pooled":
            pooled = self.norm(pooled)
        return final, pooled, self.head(pooled, final, self.prefix)

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches: [CLS] and the registers."""
        return self.config.prefix

    @property
    def dtype(self) -> jnp.dtype:
        """Of the parameters, in which the model computes."""
        return self.patch_embed.kernel.dtype


# The programs of calls outside of `jax.jit`: of a module's level, so that a second call finds the first one's.


@partial(jax.jit, static_argnames=("plan", "grid", "outputs", "remat", "kernel"))
def _forward(
    model: ViT, images: Array, edits: Any, *, plan: Plan, grid: tuple[int, int], outputs: Outputs, **how: Any
) -> Output | PrefixOutput:
    ran = run_blocks(model, model.embedding(images), edits, plan, grid=grid, outputs=outputs, **how)
    return outputs_of(model, ran, outputs)


@partial(jax.jit, static_argnames=("plan", "grid", "outputs", "remat", "kernel"))
def _forward_from(
    model: ViT,
    stream: Array,
    edits: Any,
    layer: Array | None,
    *,
    plan: Plan,
    grid: tuple[int, int] | None,
    outputs: Outputs,
    **how: Any,
) -> Output | PrefixOutput:
    ran = run_blocks(model, stream, edits, plan, grid=grid, first=layer, outputs=outputs, **how)
    return outputs_of(model, ran, outputs)


def outputs_of(model: ViT, ran: Ran, outputs: Outputs) -> Output | PrefixOutput:
    """What a run gives, as part of a program."""
    if outputs == "all":
        return model.outputs(ran.stream, ran.trace)
    return model.prefix_outputs(ran.stream, ran.trace, registers=outputs == "prefix")


@jax.jit
def _embed(model: ViT, images: Array) -> Array:
    return model.embedding(images)
