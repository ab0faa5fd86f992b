"""The way back: a jaxvit model as a state dict that PyTorch's libraries load, strictly, and run equal.

Three layouts: "timm", "transformers", and "hub", which is that of a family's authors. The config tells the family. What
is to be written is first read again, by the table that converts such files, and must give every parameter back to the
last bit. What a layout has no place for is refused, with the reason.

A state dict does not tell everything, and the model that is to load it must be built as the config says: its heads,
activation, epsilon and pooling. Positions resample as that library does it: at sizes other than that of the config's
grid, results are equal only where this is the config's `resampling`. jaxvit keeps [CLS] and registers together with
their positions; where a layout has these, they are zeros. Token masks of pretraining are zeros too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from convert import clip, deit, dino, dinov2, dinov3, timm
from convert.engine import ConversionError, Layout, convert_tensors, locate
from convert.meta import BLOCK, MEASURED
from jaxvit import CheckpointError, ViT, ViTConfig
from jaxvit.io.checkpoint import replacing_file
from jaxvit.model.params import Params, abstract, matrix_shape, to_params
from jaxvit.model.positions import rope_periods

LAYOUTS = ("timm", "transformers", "hub")

State = dict[str, np.ndarray]
"""Tensor name -> array, in PyTorch's orientation."""


Needs = dict[str, tuple[Any, ...]]
"""Field of a config -> the values that there is a place for."""

Biases = Mapping[str, bool]
"""Field of a config -> whether there are these biases."""


@dataclass(frozen=True)
class Target:
    """A family of models in one library.

    Attributes:
      whose: the library's model, for messages.
      layout: how its files are converted.
      write: the state dict of parameters that fit `needs` and `biases`.
      needs: what a config must be.
      biases: those that are always there, or never: zeros are added, or left out.
      why: field -> the reason, where the value alone does not explain a refusal.
      hidden: whether its MLP comes in this size.
    """

    whose: str
    layout: Layout
    write: Callable[[ViTConfig, Params], State]
    needs: Needs
    biases: Callable[[ViTConfig], Biases]
    why: Mapping[str, str] = field(default_factory=dict)
    hidden: Callable[[ViTConfig], bool] = lambda c: True


def state_dict(model: ViT, layout: str) -> State:
    """The model as a state dict of the model's own floating-point type.

    Which model it is for:

    * timm: `VisionTransformer`, or `VisionTransformerDistilled`. With registers, without a final norm, and in DeiT III,
      it has positions for patches alone (`no_embed_class=True`), and otherwise for all tokens; a SwiGLU is
      `SwiGLUPacked`, with RMSNorm `SwiGLU`. Models with rotary positions: `Eva`, as its DINOv3.
    * transformers: DINOv2 with and without registers, with a classifier if the model has one, DINOv3, CLIP's
      image encoder. The names are those of published files: `from_pretrained` loads them.
    * hub: DINOv2, DINOv3, DeiT III, DINO and iBOT as their authors have them; CLIP as OpenAI's `model.visual`.

    Raises:
      ConversionError: no such layout, or one that has no place for this model.
    """
    if layout not in LAYOUTS:
        raise ConversionError(f"no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    params = {name: np.asarray(a).reshape(matrix_shape(name, a.shape)) for name, a in to_params(model).items()}
    if unsound := [name for name, a in params.items() if not np.isfinite(a).all()]:
        raise ConversionError(f"the model cannot be exported: {', '.join(unsound)} holds NaN or infinity")
    target = target_of(model.config, layout)
    refuse(target, model.config)
    config, params = with_biases(target, model.config, params)
    state = {name: np.ascontiguousarray(a) for name, a in target.write(config, params).items()}
    check(target, config, params, state)
    return state


def export(model: ViT, path: str | os.PathLike[str], layout: str, *, overwrite: bool = False) -> Path:
    """Writes `state_dict(model, layout)` to a .safetensors file: all of it or nothing.

    Raises:
      ConversionError: as `state_dict`; a file of another kind, one that exists, or one that cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConversionError(f"{path} must end in .safetensors: no other kind of file is written")
    if path.is_dir() or (os.path.lexists(path) and not overwrite):
        raise ConversionError(f"{path} exists: choose another name{'' if path.is_dir() else ', or overwrite it'}")
    state = state_dict(model, layout)
    try:
        with replacing_file(path) as temporary:
            save_file(state, temporary, metadata={"format": "pt"})  # transformers asks for this
            temporary.chmod(0o644)  # safetensors makes its files private
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    except SafetensorError as error:
        raise ConversionError(f"cannot write {path}: {error}") from error
    return path


# What fits ------------------------------------------------------------------------------------------------------------


def refuse(target: Target, c: ViTConfig) -> None:
    """Raises a ConversionError if the target has no place for a model of this config; every reason is listed."""
    reasons = [
        target.why.get(name) or f"{name} is {getattr(c, name)!r}, there it is {' or '.join(map(repr, allowed))}"
        for name, allowed in target.needs.items()
        if getattr(c, name) not in allowed
    ]
    if target.layout is not timm.LAYOUT and c.positions and c.grid[0] != c.grid[1]:
        reasons.append(f"its positions are a grid of {c.grid[0]}x{c.grid[1]}, there it is a square")
    if c.rope and not c.registers:
        reasons.append("it has no registers, there is at least one")
    if target is OPENAI and not (c.classes or c.projection):
        reasons.append("it has no projection, there is always one")
    if not target.hidden(c):
        reasons.append(f"hidden is {c.hidden}, a size that does not occur there at width {c.width}")
    if reasons:
        raise ConversionError(f"{target.whose} cannot hold this model: {'; '.join(reasons)}")


def with_biases(target: Target, c: ViTConfig, params: Params) -> tuple[ViTConfig, Params]:
    """The same function of images, with the biases of the target: zeros more, or zeros fewer."""
    config = replace(c, **target.biases(c))
    expected = to_params(abstract(config))
    if lost := [name for name in params if name not in expected and params[name].any()]:
        raise ConversionError(f"{target.whose} cannot hold this model: it has no place for {', '.join(lost)}")
    dtype = params["patch_embed.kernel"].dtype
    shapes = {name: matrix_shape(name, a.shape) for name, a in expected.items()}
    return config, {n: params[n] if n in params else np.zeros(shape, dtype) for n, shape in shapes.items()}


def check(target: Target, config: ViTConfig, params: Params, state: State) -> None:
    """Raises a ConversionError unless the converter makes exactly this model of the state dict."""
    # What shapes tell must come from them alone; the grid cannot, where it is no square.
    hints = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in MEASURED - {"grid", "positions"}}
    library = {"library": "timm"} if target.layout is timm.LAYOUT else {}
    layout, tensors = locate((target.layout,), state, hints | library)
    found = layout.config(tensors, hints).config
    back = convert_tensors(layout, tensors, config, params["patch_embed.kernel"].dtype)
    wrong = [name for name in params if not np.array_equal(back[name].ravel(), params[name].ravel())]
    wrong += [f.name for f in fields(config) if getattr(found, f.name) != getattr(config, f.name)]
    if wrong:
        raise ConversionError(f"{target.whose} cannot hold this model: {', '.join(wrong)} would not come back equal")


def keyless_bias(whose: str, params: Params) -> tuple[np.ndarray, np.ndarray]:
    """The biases [L, D] of queries and of values, where keys have none."""
    q, k, v = np.split(params["blocks.attn.qkv.bias"], 3, axis=-1)
    if k.any():
        raise ConversionError(f"{whose} cannot hold this model: its keys have a bias, there they have none")
    return q, v


# Names ----------------------------------------------------------------------------------------------------------------

Modules = Mapping[str, str]
"""jaxvit's module -> that of a PyTorch model, or several, "q k v", with an equal share of its outputs; `{i}`: block."""

SUFFIX = {"kernel": ".weight", "bias": ".bias", "scale": ".weight", "gamma": ""}
TOKENS = ("cls", "registers", "positions")


def renamed(c: ViTConfig, params: Params, modules: Modules) -> State:
    """All parameters but tokens, by the names of their modules: matrices turned, blocks apart.

    Raises:
      ConversionError: parameters of modules that are not listed.
    """
    state: State = {}
    for name, a in params.items():
        module, _, leaf = name.rpartition(".")
        if name in TOKENS:
            continue
        if module not in modules:
            raise ConversionError(f"there is no place for {name}")  # `needs` refused it before, with the reason
        targets = modules[module].split()
        for to, part in zip(targets, np.split(a, len(targets), axis=-1), strict=True):
            if name == "patch_embed.kernel":
                state[f"{to}.weight"] = part.reshape(c.patch, c.patch, 3, c.width).transpose(3, 2, 0, 1)
            elif module.startswith("blocks."):
                state |= {to.format(i=i) + SUFFIX[leaf]: block.T for i, block in enumerate(part)}
            else:
                state[f"{to}{SUFFIX[leaf]}"] = part.T
    return state


def meta_modules(c: ViTConfig, scales: tuple[str, str] = ("ls1.gamma", "ls2.gamma"), **mlp: str) -> Modules:
    """Those of Meta and timm, whose names jaxvit's follow; `mlp` are the layers of a SwiGLU."""
    same = ("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.norm", "attn.proj", "norm2", "mlp.norm")
    block = {name: name for name in (*same, "mlp.fc1", "mlp.fc2")}
    block |= {"scale1": scales[0], "scale2": scales[1]}
    block |= {f"mlp.{ours}": f"mlp.{theirs}" for ours, theirs in mlp.items()}
    pool = {f"pool.{name}": f"attn_pool.{name}" for name in ("q", "kv", "proj", "norm")}
    pool |= {f"pool.{name}": f"attn_pool.mlp.{name}" for name in ("fc1", "fc2")}
    ends = {"patch_embed": "patch_embed.proj", "patch_norm": "patch_embed.norm", "pre_norm": "norm_pre"}
    ends |= {"norm": "fc_norm" if c.final_norm == "pooled" else "norm"}
    ends |= {"head.linear": "head", "head.distilled": "head_dist"}
    return within(BLOCK, block) | ends | pool


def within(block: str, modules: Modules) -> dict[str, str]:
    """The same of modules of a block, which has this name."""
    return {
        f"blocks.{ours}": " ".join(f"{block}.{each}" for each in theirs.split()) for ours, theirs in modules.items()
    }


def packed(params: Params) -> Params:
    """Gate and value of a SwiGLU as one layer, `gates`."""
    gate, value = "blocks.mlp.gate", "blocks.mlp.value"
    rest = {name: a for name, a in params.items() if not name.startswith((f"{gate}.", f"{value}."))}
    for leaf in ("kernel", "bias"):
        if f"{gate}.{leaf}" in params:
            both = [params[f"{name}.{leaf}"] for name in (gate, value)]
            rest[f"blocks.mlp.gates.{leaf}"] = np.concatenate(both, axis=-1)
    return rest


def tokens(
    c: ViTConfig,
    params: Params,
    positioned: int,
    registers: str = "reg_token",
    cls: str = "cls_token",
    positions: str = "pos_embed",
) -> State:
    """[CLS] [1, 1, D], registers [1, R, D], and positions [1, `positioned` + N, D], the first of which are zeros."""
    state: State = {}
    if c.cls:
        state[cls] = params["cls"][None, None]
    if c.registers:
        state[registers] = params["registers"][None]
    if c.positions:
        rows = params["positions"].reshape(-1, c.width)
        state[positions] = np.concatenate([np.zeros((positioned, c.width), rows.dtype), rows])[None]
    return state


def zeros(params: Params, *shape: int) -> np.ndarray:
    return np.zeros(shape, params["patch_embed.kernel"].dtype)


# timm -----------------------------------------------------------------------------------------------------------------


def write_timm(c: ViTConfig, params: Params) -> State:
    distilled = c.pool == "distilled"
    patches_alone = not distilled and (c.registers > 0 or c.final_norm == "none" or is_deit3(c))
    state = tokens(c, params, 0 if patches_alone else c.prefix, "dist_token" if distilled else "reg_token")
    params = dict(params)
    if c.pool == "attention":
        state["attn_pool.latent"] = params.pop("pool.latent")[None, None]
    if c.norm == "rms":  # AIMv2
        return state | renamed(c, params, meta_modules(c, gate="fc1_g", value="fc1_x", out="fc2"))
    return state | renamed(c, packed(params), meta_modules(c, gates="fc1", out="fc2"))


def write_timm_dinov3(c: ViTConfig, params: Params) -> State:
    state = tokens(c, params, 0)
    params = dict(params)
    if c.qkv_bias:
        q, v = keyless_bias(TIMM_DINOV3.whose, params)
        del params["blocks.attn.qkv.bias"]
        for i in range(c.depth):
            state |= {f"{BLOCK}.attn.q_bias".format(i=i): q[i], f"{BLOCK}.attn.v_bias".format(i=i): v[i]}
    modules = meta_modules(c, ("gamma_1", "gamma_2"), gate="fc1_g", value="fc1_x", out="fc2")
    return state | renamed(c, params, modules)


# transformers ---------------------------------------------------------------------------------------------------------


def write_transformers_dinov2(c: ViTConfig, params: Params) -> State:
    at = "embeddings"
    state = tokens(c, params, 1, f"{at}.register_tokens", f"{at}.cls_token", f"{at}.position_embeddings")
    state[f"{at}.mask_token"] = zeros(params, 1, c.width)
    block = {name: name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}
    block |= {"scale1": "layer_scale1.lambda1", "scale2": "layer_scale2.lambda1", "attn.proj": "attention.output.dense"}
    block |= {"mlp.gates": "mlp.weights_in", "mlp.out": "mlp.weights_out"}
    block |= {"attn.qkv": " ".join(f"attention.attention.{name}" for name in ("query", "key", "value"))}
    ends = {"patch_embed": f"{at}.patch_embeddings.projection", "norm": "layernorm", "head.linear": "classifier"}
    state |= renamed(c, packed(params), within("encoder.layer.{i}", block) | ends)
    if not c.classes:
        return state
    base = "dinov2_with_registers" if c.registers else "dinov2"
    return {name if name.startswith("classifier.") else f"{base}.{name}": a for name, a in state.items()}


def write_transformers_dinov3(c: ViTConfig, params: Params) -> State:
    at, attention = "embeddings", "attention"
    state = tokens(c, params, 0, f"{at}.register_tokens", f"{at}.cls_token")
    state[f"{at}.mask_token"] = zeros(params, 1, 1, c.width)
    block = {name: name for name in ("norm1", "norm2")}
    block |= {"scale1": "layer_scale1.lambda1", "scale2": "layer_scale2.lambda1", "attn.proj": f"{attention}.o_proj"}
    block |= {"attn.qkv": " ".join(f"{attention}.{name}_proj" for name in "qkv")}
    block |= {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
    block |= {"mlp.gate": "mlp.gate_proj", "mlp.value": "mlp.up_proj", "mlp.out": "mlp.down_proj"}
    ends = {"patch_embed": f"{at}.patch_embeddings", "norm": "norm"}
    state |= renamed(c, params, within("layer.{i}", block) | ends)
    if c.qkv_bias:
        keyless_bias(TRANSFORMERS_DINOV3.whose, params)
    return {name: a for name, a in state.items() if not name.endswith(".k_proj.bias")}


def write_transformers_clip(c: ViTConfig, params: Params) -> State:
    at = "embeddings"
    state = tokens(c, params, 1, cls=f"{at}.class_embedding", positions=f"{at}.position_embedding.weight")
    state = {name: a.squeeze() for name, a in state.items()}
    block = {name: name for name in ("mlp.fc1", "mlp.fc2")}
    block |= {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
    block |= {"attn.qkv": " ".join(f"self_attn.{name}_proj" for name in "qkv")}
    ends = {"patch_embed": f"{at}.patch_embedding", "pre_norm": "pre_layrnorm", "norm": "post_layernorm"}
    projection = {"head.linear": "visual_projection"}
    state |= renamed(c, params, within("encoder.layers.{i}", block) | ends | projection)
    return {name if name.startswith("visual_") else f"vision_model.{name}": a for name, a in state.items()}


# The authors' own -----------------------------------------------------------------------------------------------------


def write_dinov2(c: ViTConfig, params: Params) -> State:
    state = tokens(c, params, 1, "register_tokens") | {"mask_token": zeros(params, 1, c.width)}
    return state | renamed(c, packed(params), meta_modules(c, gates="w12", out="w3"))


def write_dinov3(c: ViTConfig, params: Params) -> State:
    state = tokens(c, params, 0, "storage_tokens") | {"mask_token": zeros(params, 1, c.width)}
    state[dinov3.PERIODS] = rope_periods(c.head_size, c.rope_base, "bfloat16").astype(np.float32)
    state |= renamed(c, params, meta_modules(c, gate="w1", value="w2", out="w3"))
    if c.qkv_bias:
        keyless_bias(DINOV3.whose, params)
        mask = np.repeat(np.array([1, 0, 1], params["cls"].dtype), c.width)
        state |= {f"{BLOCK}.attn.qkv.bias_mask".format(i=i): mask for i in range(c.depth)}
    if c.width == 4096:  # the 7B has one more norm, which is for the small crops of training alone
        state["local_cls_norm.weight"] = np.ones_like(params["cls"])
        state["local_cls_norm.bias"] = np.zeros_like(params["cls"])
    return state


def write_deit3(c: ViTConfig, params: Params) -> State:
    return tokens(c, params, 0) | renamed(c, params, meta_modules(c, ("gamma_1", "gamma_2")))


def write_dino(c: ViTConfig, params: Params) -> State:
    return tokens(c, params, 1) | renamed(c, params, meta_modules(c, ("gamma_1", "gamma_2")))


def write_openai(c: ViTConfig, params: Params) -> State:
    state = tokens(c, params, 1, cls="class_embedding", positions="positional_embedding")
    state = {name: a.squeeze() for name, a in state.items()}
    params = dict(params)
    state["proj"] = params.pop("head.linear.kernel")
    block = {"norm1": "ln_1", "norm2": "ln_2", "attn.qkv": "attn.in_proj", "attn.proj": "attn.out_proj"}
    block |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    ends = {"patch_embed": "conv1", "pre_norm": "ln_pre", "norm": "ln_post"}
    state |= renamed(c, params, within(clip.BLOCK, block) | ends)
    for at in (f"{clip.BLOCK}.attn.in_proj".format(i=i) for i in range(c.depth)):
        for kind in ("weight", "bias"):
            state[f"{at}_{kind}"] = state.pop(f"{at}.{kind}")
    return state


# Which ----------------------------------------------------------------------------------------------------------------

PLAIN: Needs = dict(cls=(True,), patch_norm=(False,), pre_norm=(False,), qk_norm=(False,), branch_norms=(False,))
PLAIN |= dict(norm=("layer",), final_norm=("tokens",), pool=("cls",), projection=(0,))
LEARNED: Needs = PLAIN | dict(rope=(None,), positions=(True,))
ROTARY: Needs = PLAIN | dict(layer_scale=(True,), positions=(False,), rope_base=(100.0,), mlp=("gelu", "swiglu"))
OF_DINOV2: Needs = LEARNED | dict(layer_scale=(True,), mlp=("gelu", "swiglu"))
OF_DEIT3: Needs = LEARNED | dict(layer_scale=(True,), registers=(0,), mlp=("gelu",))
OF_DINO: Needs = LEARNED | dict(registers=(0,), classes=(0,), mlp=("gelu",))
OF_CLIP: Needs = LEARNED | dict(pre_norm=(True,), layer_scale=(False,), registers=(0,))
OF_CLIP |= dict(mlp=("gelu", "gelu_tanh", "quick_gelu"))
del OF_CLIP["projection"]
OF_TIMM: Needs = dict(rope=(None,), pool=("cls", "mean", "attention", "distilled"))

COMPUTED = {"rope": "it computes the periods of rotary positions in float32, and this model has them in bfloat16"}
STORED = {"rope": "its files hold the periods of rotary positions in bfloat16, and this model has them in float32"}


def all_biases(c: ViTConfig) -> Biases:
    return dict(patch_bias=True, qkv_bias=True, proj_bias=True)


def rotary_biases(c: ViTConfig) -> Biases:
    return dict(patch_bias=True, proj_bias=True)


def clip_biases(c: ViTConfig) -> Biases:
    head = dict(classes=0, projection=c.projection or c.classes)
    return dict(patch_bias=False, qkv_bias=True, proj_bias=True, **head)


def timm_biases(c: ViTConfig) -> Biases:
    head = dict(classes=c.classes or c.projection, projection=0)  # there a projection is a classifier
    return dict(patch_bias=not c.pre_norm, **head)  # which is tied to the norm


def whole_ratio(c: ViTConfig) -> bool:
    """transformers' DINOv2 derives this size from a whole multiple of the width."""
    full = [ratio * c.width for ratio in range(1, 33)]
    return c.hidden in ([(int(n * 2 / 3) + 7) // 8 * 8 for n in full] if c.mlp == "swiglu" else full)


def multiple_of_8(c: ViTConfig) -> bool:
    """So Meta's SwiGLUs are."""
    return c.mlp != "swiglu" or c.hidden % 8 == 0


TIMM = Target(
    "timm's VisionTransformer",
    timm.LAYOUT,
    write_timm,
    needs=OF_TIMM,
    biases=timm_biases,
)
TIMM_DISTILLED = replace(
    TIMM,
    whose="timm's VisionTransformerDistilled",
    needs=OF_TIMM | dict(registers=(1,), positions=(True,)),
)
TIMM_DINOV3 = Target(
    "timm's DINOv3",
    dinov3.TIMM,
    write_timm_dinov3,
    needs=ROTARY | dict(rope=("float32",), pool=("cls", "mean")),
    biases=rotary_biases,
    why=COMPUTED,
)
TRANSFORMERS_DINOV2 = Target(
    "transformers' DINOv2",
    dinov2.TRANSFORMERS,
    write_transformers_dinov2,
    needs=OF_DINOV2,
    biases=all_biases,
    hidden=whole_ratio,
)
TRANSFORMERS_CLASSIFIER = replace(
    TRANSFORMERS_DINOV2,
    whose="the classifier of transformers' DINOv2",
    needs=OF_DINOV2 | dict(pool=("cls_mean",)),
)
TRANSFORMERS_DINOV3 = Target(
    "transformers' DINOv3",
    dinov3.TRANSFORMERS,
    write_transformers_dinov3,
    needs=ROTARY | dict(rope=("float32",), classes=(0,)),
    biases=rotary_biases,
    why=COMPUTED,
)
TRANSFORMERS_CLIP = Target(
    "transformers' CLIP",
    clip.TRANSFORMERS,
    write_transformers_clip,
    needs=OF_CLIP,
    biases=clip_biases,
)
DINOV2 = Target(
    "Meta's DINOv2",
    dinov2.HUB,
    write_dinov2,
    needs=OF_DINOV2 | dict(classes=(0,)),
    biases=all_biases,
    hidden=multiple_of_8,
)
DINOV3 = Target(
    "Meta's DINOv3",
    dinov3.HUB,
    write_dinov3,
    needs=ROTARY | dict(rope=("bfloat16",), classes=(0,)),
    biases=rotary_biases,
    why=STORED,
    hidden=multiple_of_8,
)
DEIT3 = Target(
    "the authors' DeiT III",
    deit.LAYOUT,
    write_deit3,
    needs=OF_DEIT3,
    biases=all_biases,
)
DINO = Target(
    "the authors' DINO",
    dino.LAYOUT,
    write_dino,
    needs=OF_DINO,
    biases=all_biases,
)
IBOT = replace(
    DINO,
    whose="the authors' iBOT",
    needs=OF_DINO | dict(pool=("mean",), final_norm=("pooled",)),
)
OPENAI = Target(
    "OpenAI's CLIP",
    clip.OPENAI,
    write_openai,
    needs=OF_CLIP,
    biases=clip_biases,
)


def target_of(c: ViTConfig, layout: str) -> Target:
    """The family of a model of this config in a layout; not yet whether it fits in every point.

    Raises:
      ConversionError: none, or it cannot be told which.
    """
    return {"timm": timm_target, "transformers": transformers_target, "hub": hub_target}[layout](c)


def timm_target(c: ViTConfig) -> Target:
    return TIMM_DINOV3 if c.rope else TIMM_DISTILLED if c.pool == "distilled" else TIMM


def transformers_target(c: ViTConfig) -> Target:
    if c.rope:
        return TRANSFORMERS_DINOV3
    if c.pre_norm:
        return TRANSFORMERS_CLIP
    if not c.layer_scale:
        raise ConversionError(
            "of transformers' models, DINOv2, DINOv3 and CLIP's image encoder can be written; this one has no rotary "
            "positions, norm before the blocks or LayerScale, and so is none of them: use the layout timm"
        )
    return TRANSFORMERS_CLASSIFIER if c.classes else TRANSFORMERS_DINOV2


def hub_target(c: ViTConfig) -> Target:
    if c.rope:
        return DINOV3
    if c.pre_norm:
        return OPENAI
    if c.pool == "distilled" or (c.classes and not c.layer_scale):
        raise ConversionError(
            "the authors of DeiT use timm's names, and others published no classifier like this one: "
            "use the layout timm"
        )
    if c.pool == "mean":
        return IBOT
    if not c.layer_scale:
        return DINO
    if c.registers or c.mlp == "swiglu" or has_sizes_of_dinov2(c):
        return DINOV2
    if c.classes or is_deit3(c):
        return DEIT3
    raise ConversionError(
        f"DINOv2 and iBOT have other names for LayerScale, and a model with patches of {c.patch} and heads of "
        f"{c.head_size}, and no registers, may be either: use the layout timm"
    )


def is_deit3(c: ViTConfig) -> bool:
    """A plain ViT with LayerScale, without registers, whose positions resample as in DeiT III: iBOT's and DINOv2's own
    code does it otherwise. DINOv2 from timm does it alike, but has other sizes.
    """
    plain = all(getattr(c, name) in allowed for name, allowed in OF_DEIT3.items())
    return plain and c.resampling == "bicubic_antialias" and not has_sizes_of_dinov2(c)


def has_sizes_of_dinov2(c: ViTConfig) -> bool:
    """DeiT III's patches are of 16 pixels, and where they are of 14 its heads are of 80."""
    return c.patch == 14 and c.head_size == 64
