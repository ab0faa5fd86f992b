"""The model: images in, tokens out, with every internal value named in passing.

Axes: B batch, T tokens, D width, H heads, d head size, F hidden, L depth, N patches, R registers, P prefix = 1 + R,
Q recorded query rows (P or T).

The modules are Flax NNX, used as plain pytrees: nothing here mutates, so every `jax` transformation takes a model as
an argument. All blocks are one `Block` whose parameters have a leading axis L, run under `jax.lax.scan`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxvit.config import ViTConfig
from jaxvit.edits import Edits, Operation, by_layer, check_edits, listed
from jaxvit.positions import resample_positions
from jaxvit.sites import ATTENTION_SITES, Layer, Record, recording_plan
from jaxvit.tokens import TokenLayout


class Output(NamedTuple):
    """What a model returns; a pytree.

    Attributes:
      cls, registers, patches: after the final norm.
      tokens: the whole sequence before the final norm.
      trace: site -> [recorded layers, *axes of the site], see `SITES`.
    """

    cls: Float[Array, "B D"]
    registers: Float[Array, "B R D"]
    patches: Float[Array, "B N D"]
    tokens: Float[Array, "B T D"]
    trace: dict[str, Array]


class Tap:
    """Names the values of one layer as they go by: edits those that are to change, keeps those that were asked for.

    Args:
      wanted: site -> whether of all tokens.
      edits: site -> what is applied there, in order; of this layer, without a layer axis.
    """

    def __init__(self, wanted: Layer, edits: Mapping[str, Sequence[Operation]], prefix: int):
        self.wanted, self.edits, self.prefix = wanted, edits, prefix
        self.trace: dict[str, Array] = {}

    def __call__(self, site: str, x: Array) -> Array:
        x = self.edited(site, x)
        if site in self.wanted:
            axis = 2 if site in ATTENTION_SITES else 1
            self.trace[site] = x if self.wanted[site] else jax.lax.slice_in_dim(x, 0, self.prefix, axis=axis)
        return x

    def edited(self, site: str, x: Array) -> Array:
        for edit in self.edits.get(site, ()):
            x = edit(site, x, self.prefix)
        return x

    def explicit_rows(self, tokens: int) -> int:
        """How many query rows, from the first, need their attention weights written out."""
        asked = [self.wanted[site] for site in ATTENTION_SITES if site in self.wanted]
        asked += [edit.queries == "all" for site in ATTENTION_SITES for edit in self.edits.get(site, ())]
        return tokens if any(asked) else self.prefix if asked else 0


def per_channel(a_D: Array, x: Array) -> Array:
    """A vector over the last axis, with as many axes as x."""
    return jnp.expand_dims(a_D, range(x.ndim - 1))


class LayerNorm(nnx.Module):
    """Normalises the last axis. Two passes: E[x^2] - E[x]^2, Flax's default, cancels the digits of tokens with a large
    mean; statistics in at least float32, under any rule of promotion, which Flax's module does not take.
    """

    def __init__(self, c: ViTConfig):
        self.scale, self.bias = nnx.Param(jnp.ones(c.width)), nnx.Param(jnp.zeros(c.width))
        self.eps = c.eps

    def __call__(self, x: Array) -> Array:
        wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return normal.astype(x.dtype) * per_channel(self.scale[...], x) + per_channel(self.bias[...], x)


class Attention(nnx.Module):
    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        self.qkv = nnx.Linear(c.width, 3 * c.width, rngs=rngs)
        self.proj = nnx.Linear(c.width, c.width, rngs=rngs)
        self.heads = c.heads

    def __call__(self, x_BTD: Array, tap: Tap) -> Array:
        B, T, D = x_BTD.shape
        qkv = self.qkv(x_BTD).reshape(B, T, 3, self.heads, D // self.heads)
        q, k, v = (tap(site, qkv[:, :, i]) for i, site in enumerate("qkv"))
        z_BTHd = tap("z", self.attend(q, k, v, tap))
        return self.proj(jax.lax.collapse(z_BTHd, 2))

    def attend(self, q_BTHd: Array, k_BTHd: Array, v_BTHd: Array, tap: Tap) -> Array:
        """Rows whose weights somebody reads or edits are written out; the others may use a fused kernel."""
        T = q_BTHd.shape[1]
        rows = tap.explicit_rows(T)
        if not rows:
            return fused_attention(q_BTHd, k_BTHd, v_BTHd)
        pattern = tap("pattern", softmax(tap("scores", scaled_scores(q_BTHd[:, :rows], k_BTHd)), tap))
        z_BQHd = jnp.einsum("BHQT,BTHd->BQHd", pattern.astype(v_BTHd.dtype), v_BTHd)
        if rows == T:
            return z_BQHd
        return jnp.concatenate([z_BQHd, fused_attention(q_BTHd[:, rows:], k_BTHd, v_BTHd)], axis=1)


def scaled_scores(q_BQHd: Array, k_BTHd: Array) -> Array:
    """[B, H, Q, T] in at least float32: in half precision a softmax over hundreds of tokens would not sum to 1."""
    wide = jnp.float64 if q_BQHd.dtype == jnp.float64 else jnp.float32
    return jnp.einsum("BQHd,BTHd->BHQT", q_BQHd * q_BQHd.shape[-1] ** -0.5, k_BTHd, preferred_element_type=wide)


def fused_attention(q_BQHd: Array, k_BTHd: Array, v_BTHd: Array) -> Array:
    """softmax(q k / sqrt(d)) v, by the fastest means; the weights are not to be seen."""
    if cudnn_takes(q_BQHd):
        return jax.nn.dot_product_attention(q_BQHd, k_BTHd, v_BTHd, implementation="cudnn")
    scores = scaled_scores(q_BQHd, k_BTHd)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))  # cancels
    weights = jnp.exp(scores - top)
    # Dividing the outputs by the sum of weights, not the weights, saves a pass over T x T numbers.
    z_BHQd = jnp.einsum("BHQT,BTHd->BHQd", weights.astype(v_BTHd.dtype), v_BTHd, preferred_element_type=scores.dtype)
    return (z_BHQd / weights.sum(-1, keepdims=True)).astype(v_BTHd.dtype).swapaxes(1, 2)


def cudnn_takes(q_BQHd: Array) -> bool:
    """Whether cuDNN's flash attention is there for such queries: half precision, on NVIDIA's Ampere or newer."""
    if q_BQHd.dtype not in (jnp.bfloat16, jnp.float16) or q_BQHd.shape[-1] % 8 or q_BQHd.shape[-1] > 128:
        return False
    if jax.default_backend() != "gpu":
        return False
    capability = str(getattr(jax.local_devices()[0], "compute_capability", "0"))  # "9.0"; AMD's is "gfx942"
    return capability.replace(".", "", 1).isdigit() and float(capability) >= 8


def softmax(scores_BHQT: Array, tap: Tap) -> Array:
    """The softmax over keys, by way of the site `weights`. A row without any weight is zeros."""
    if "weights" in tap.edits:
        # The largest score is that of the keys which are not cut: were one that is cut far above, the others' weights
        # would underflow. A key is cut where any weight would become 0.
        some, none = (tap.edited("weights", make(scores_BHQT)) for make in (jnp.ones_like, jnp.zeros_like))
        counted = jnp.where((some == 0) & (none == 0), -jnp.inf, scores_BHQT)
    else:
        counted = jax.lax.stop_gradient(scores_BHQT)  # what is subtracted cancels
    top = counted.max(-1, keepdims=True)
    exponents = scores_BHQT - jnp.where(jnp.isneginf(top), 0, top)
    if "weights" in tap.edits:
        exponents = jnp.minimum(exponents, 80)  # the weight of a key that is cut must be finite to become 0
    weights = tap("weights", jnp.exp(exponents))
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)


def gelu(x: Array) -> Array:
    """x Phi(x), exact, as PyTorch computes it. JAX's own goes by way of erfc, which takes twice as long on a CPU."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


class GeluMlp(nnx.Module):
    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(c.width, c.hidden, rngs=rngs)
        self.fc2 = nnx.Linear(c.hidden, c.width, rngs=rngs)

    def __call__(self, x_BTD: Array, tap: Tap) -> Array:
        pre = tap("mlp_pre", self.fc1(x_BTD))
        return self.fc2(tap("mlp_post", gelu(pre)))


class SwigluMlp(nnx.Module):
    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        self.gate = nnx.Linear(c.width, c.hidden, rngs=rngs)
        self.value = nnx.Linear(c.width, c.hidden, rngs=rngs)
        self.out = nnx.Linear(c.hidden, c.width, rngs=rngs)

    def __call__(self, x_BTD: Array, tap: Tap) -> Array:
        gate = tap("mlp_pre", self.gate(x_BTD))
        return self.out(tap("mlp_post", jax.nn.silu(gate) * self.value(x_BTD)))


MLPS: dict[str, Callable[[ViTConfig, nnx.Rngs], nnx.Module]] = {"gelu": GeluMlp, "swiglu": SwigluMlp}


class LayerScale(nnx.Module):
    def __init__(self, c: ViTConfig):
        self.gamma = nnx.Param(jnp.ones(c.width))

    def __call__(self, x: Array) -> Array:
        return x * per_channel(self.gamma[...], x)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), each branch through its LayerScale."""

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        self.norm1, self.norm2 = LayerNorm(c), LayerNorm(c)
        self.attn = Attention(c, rngs)
        self.mlp = MLPS[c.mlp](c, rngs)
        self.scale1, self.scale2 = (LayerScale(c) if c.layer_scale else identity for _ in range(2))

    def __call__(self, x_BTD: Array, tap: Tap) -> Array:
        x = tap("resid_pre", x_BTD)
        attn_out = tap("attn_out", self.scale1(self.attn(self.norm1(x), tap)))
        x = tap("resid_mid", tap("skip_attn", x) + attn_out)
        mlp_out = tap("mlp_out", self.scale2(self.mlp(self.norm2(x), tap)))
        return tap("resid_post", tap("skip_mlp", x) + mlp_out)


def identity(x: Array) -> Array:
    return x


class ViT(nnx.Module):
    """A Vision Transformer over [CLS], registers and patches.

    `cls` holds the class token *and* its position, which are only ever used as a sum; registers have no position.

    Args:
      config: sizes and choices.
      rngs: for the random initialisation; `nnx.Rngs(0)`.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        c = config
        normal = jax.nn.initializers.truncated_normal(0.02)
        self.patch_embed = nnx.Linear(3 * c.patch**2, c.width, rngs=rngs)  # rows: y, x, channel within a patch
        self.cls = nnx.Param(normal(rngs.params(), (c.width,)))
        self.registers = nnx.Param(normal(rngs.params(), (c.registers, c.width))) if c.registers else None
        self.positions = nnx.Param(normal(rngs.params(), (*c.grid, c.width)))
        make_blocks = jax.jit(jax.vmap(lambda key: Block(c, nnx.Rngs(key))))  # jit: one compilation, not one an array
        self.blocks = make_blocks(jax.random.split(rngs.params(), c.depth))
        self.norm = LayerNorm(c)
        self.config = c

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
        return self.run_from(0, self.embed(images), edits, record)

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
        patches_BND = self.patch_embed(jax.lax.collapse(jax.lax.collapse(pixels, 3), 1, 3))
        positions = resample_positions(self.positions[...], layout.grid, self.config.resampling)
        # One sum of [0, patches] and [cls, registers, positions] instead of a concatenation with tokens that must
        # first be copied for each image: it holds as it is when images are sharded.
        tokens = [self.cls[...][None], positions.reshape(-1, self.config.width)]
        if self.registers is not None:
            tokens.insert(1, self.registers[...])
        return jnp.pad(patches_BND, ((0, 0), (layout.prefix, 0), (0, 0))) + jnp.concatenate(tokens)[None]

    def run_from(
        self,
        layer: int | Array,
        resid_BTD: Float[Array, "B T D"],
        edits: Edits | None = None,
        record: Record = (),
    ) -> Output:
        """Runs blocks `layer` .. L - 1 and the final norm on the residual stream that enters block `layer`.

        `run_from(l, out.trace["resid_pre"][l])` equals the run that was recorded. Layers keep their absolute numbers,
        in `record` and in `edits`, whose arrays have an axis of all L layers.

        `layer` may be a traced integer, so that one program serves every start; then nothing can be recorded, as the
        number of layers that run is not known, and there is no reverse-mode gradient.
        """
        if resid_BTD.ndim != 3 or resid_BTD.shape[-1] != self.config.width:
            raise ValueError(f"the stream has shape {resid_BTD.shape}; expected [batch, tokens, {self.config.width}]")
        changes = listed(edits)
        check_edits(changes, self._sizes(*resid_BTD.shape[:2]))
        scanned, of_layer = by_layer(changes, self.config.depth)

        def step(x, block, edits, wanted):
            tap = Tap(wanted, of_layer(edits), self.prefix)
            return block(x, tap), tap.trace

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

    def _finish(self, tokens_BTD: Array, trace: dict[str, Array]) -> Output:
        normed = self.norm(tokens_BTD)
        return Output(
            cls=normed[:, 0],
            registers=normed[:, 1 : self.prefix],
            patches=normed[:, self.prefix :],
            tokens=tokens_BTD,
            trace=trace,
        )

    def _sizes(self, batch: int, tokens: int) -> dict[str, int]:
        c = self.config
        axes = {"B": batch, "T": tokens, "D": c.width, "H": c.heads, "d": c.head_size, "F": c.hidden}
        return {**axes, "L": c.depth, "P": self.prefix}

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches: [CLS] and the registers."""
        return 1 + self.config.registers
