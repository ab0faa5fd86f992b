"""The way back: a jaxvit model as a state dict, or as a folder, that PyTorch's libraries load in full, and run equal.

Four layouts. "timm" and "hub", which is that of a family's authors, have the names of the modules, whose
`load_state_dict` takes them strictly. "transformers" has the names of published files, which `save_pretrained` writes
and `from_pretrained` of every version loads. Modules of transformers 5 have other names in memory: "transformers5"
writes those, which both `load_state_dict` and `from_pretrained` of that version take.

The config tells the family. What is to be written is first read again, by the table that converts such files, and must
give every parameter back to the last bit. What a layout has no place for is refused, with the reason.

A state dict does not tell everything. The model that is to load it must be built as the config says: its heads,
activation, epsilon and pooling. In a folder for transformers or timm a config.json says all of this. Positions resample
as that library does it: at sizes other than that of the config's grid, results are equal only where this is the
config's `resampling`. jaxvit keeps [CLS] and registers together with their positions; where a layout has these, they
are zeros. The mask token of pretraining is written as it came, zeros if there is none; timm's models have no place for
it, and `left_out` says so.
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

from jaxvit import CheckpointError, ViT, ViTConfig
from jaxvit.io.checkpoint import WEIGHTS, replacing, replacing_file, write_json
from jaxvit.model.params import Params, abstract, matrix_shape, to_params
from jaxvit.model.positions import rope_periods

from . import clip, configs, deit, dino, dinov2, dinov3, is_jaxvit_folder, timm
from .engine import ConversionError, Layout, convert_tensors, invert, locate
from .meta import MEASURED

LAYOUTS = ("timm", "transformers", "transformers5", "hub")

State = dict[str, np.ndarray]
"""Tensor name -> array, in PyTorch's orientation."""


Shapes = dict[str, tuple[int, ...]]
"""Tensor name -> shape, of those that tell variants of a layout apart."""

Needs = dict[str, tuple[Any, ...]]
"""Field of a config -> the values that there is a place for."""

Biases = dict[str, Any]
"""Field of a config -> whether there are these biases."""


@dataclass(frozen=True)
class Target:
    """A family of models in one library.

    Attributes:
      whose: the library's model, for messages.
      layout: how its files are converted.
      write: the state dict of parameters that fit `needs` and `biases`.
      needs: what a config must be.
      biases: those that are always there, or never: zeros are added, or left out. The mask token is treated so too,
        but left out whatever it holds: nothing that is computed depends on it.
      why: field -> the reason, where the value alone does not explain a refusal.
      hidden: whether its MLP comes in this size.
      beside: the files that stand beside the weights in a folder; None where the weights stand alone.
    """

    whose: str
    layout: Layout
    write: Callable[[ViTConfig, Params], State]
    needs: Needs
    biases: Callable[[ViTConfig], Biases]
    why: Mapping[str, str] = field(default_factory=dict)
    hidden: Callable[[ViTConfig], bool] = lambda c: True
    beside: configs.Beside | None = None


def state_dict(model: ViT, layout: str) -> State:
    """The model as a state dict of the model's own floating-point type.

    Which model it is for:

    * timm: `VisionTransformer`, or `VisionTransformerDistilled`. With registers, without a final norm, and in DeiT III,
      it has positions for patches alone (`no_embed_class=True`), and otherwise for all tokens; a SwiGLU is
      `SwiGLUPacked`, with RMSNorm `SwiGLU`. Models with rotary positions: `Eva`, as its DINOv3.
    * transformers: DINOv2 with and without registers, with a classifier if the model has one, DINOv3, CLIP's
      image encoder. The names are those of published files: `from_pretrained` loads them. `load_state_dict` of
      transformers 5 does not know most of them.
    * transformers5: the same models, under the names that modules of transformers 5 have in memory:
      `load_state_dict(.., strict=True)` takes them.
    * hub: DINOv2, DINOv3, DeiT III, DINO and iBOT as their authors have them; CLIP as OpenAI's `model.visual`.

    Raises:
      ConversionError: no such layout, or one that has no place for this model.
    """
    return _state_dict(model, layout)[0]


def _state_dict(model: ViT, layout: str) -> tuple[State, Target, ViTConfig]:
    """The state dict, and the target and config that it was written for."""
    if layout not in LAYOUTS:
        raise ConversionError(f"no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    params = {name: np.asarray(a).reshape(matrix_shape(name, a.shape)) for name, a in to_params(model).items()}
    if unsound := [name for name, a in params.items() if not np.isfinite(a).all()]:
        raise ConversionError(f"the model cannot be exported: {', '.join(unsound)} holds NaN or infinity")
    target = target_of(model.config, layout)
    refuse(target, model.config)
    config, params = with_biases(target, model.config, params)
    try:
        state = {name: np.ascontiguousarray(a) for name, a in target.write(config, params).items()}
    except ValueError as error:
        raise ConversionError(f"{target.whose} cannot hold this model: {error}") from None
    check(target, config, params, state)
    return state, target, config


def export(model: ViT, path: str | os.PathLike[str], layout: str, *, overwrite: bool = False) -> Path:
    """Writes `state_dict(model, layout)`, and what stands beside it: all of it or nothing.

    Args:
      path: a name that ends in .safetensors, for a file; or a name without a suffix, for a folder of
        model.safetensors and the library's config.json. Folders are for timm and transformers:

            timm.create_model("local-dir:FOLDER", pretrained=True)
            transformers.AutoModel.from_pretrained("FOLDER")

      overwrite: replace a file; or a folder that holds an export and nothing else.

    Raises:
      ConversionError: as `state_dict`; a file of another kind, a place that is taken or cannot be written; a folder
        for a layout without a config.json, or whose config.json cannot describe this model.

    Example:

        export(model, "dinov2-small", "transformers")
    """
    path = Path(path)
    if path.suffix not in ("", ".safetensors"):
        raise ConversionError(
            f"{path} must end in .safetensors, for a file, or have no suffix, for a folder: nothing else is written"
        )
    if path.suffix and path.is_dir():
        raise ConversionError(f"{path} exists: choose another name")
    if os.path.lexists(path) and not overwrite:
        raise ConversionError(f"{path} exists: choose another name, or give --overwrite (overwrite=True)")
    if not path.suffix and is_jaxvit_folder(path):
        raise ConversionError(f"{path} is a jaxvit model: choose another folder")
    state, target, config = _state_dict(model, layout)
    try:
        if path.suffix:
            with replacing_file(path) as temporary:
                write(state, temporary)
        else:
            files = beside(target, config, model.dtype.name)
            with replacing(path, EXPORTED) as folder:
                write(state, folder / WEIGHTS)
                for name, content in files.items():
                    write_json(folder / name, content)
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    except SafetensorError as error:
        raise ConversionError(f"cannot write {path}: {error}") from error
    return path


EXPORTED = (WEIGHTS, "config.json", "preprocessor_config.json")
"""What the folder of an export may hold."""


def write(state: State, path: Path) -> None:
    save_file(state, path, metadata={"format": "pt"})  # transformers asks for this
    path.chmod(0o644)  # safetensors makes its files private


def beside(target: Target, config: ViTConfig, dtype: str) -> Mapping[str, configs.Json]:
    """The files beside the weights in a folder, by name."""
    if target.beside is None:
        raise ConversionError(
            f"{target.whose} keeps no config.json beside its weights: give the name of a file, .safetensors"
        )
    return target.beside(config, dtype)


def left_out(model: ViT, layout: str) -> list[str]:
    """What `state_dict` leaves out because the layout has no place for it, and nothing that is computed depends on it.

    Example:

        left_out(convert.load("facebook/dinov2-giant"), "timm")  # ["mask_token"]
    """
    kept = target_of(model.config, layout).biases(model.config).get("mask_token", True)
    return ["mask_token"] if model.config.mask_token and not kept else []


def margins(model: ViT, layout: str) -> str | None:
    """How the library of a layout rounds half a pixel of the margin around a crop, where the model does it otherwise.

    Example:

        margins(convert.load("facebook/dinov2-giant"), "timm")  # "round"
    """
    there = "round" if layout == "timm" else "floor"
    return there if there != model.config.preprocess.margin else None


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
    if lost := [n for n in params if n not in expected and n != "mask_token" and params[n].any()]:
        raise ConversionError(f"{target.whose} cannot hold this model: it has no place for {', '.join(lost)}")
    dtype = params["patch_embed.kernel"].dtype
    shapes = {name: matrix_shape(name, a.shape) for name, a in expected.items()}
    return config, {n: params[n] if n in params else np.zeros(shape, dtype) for n, shape in shapes.items()}


def check(target: Target, config: ViTConfig, params: Params, state: State) -> None:
    """Raises a ConversionError unless the converter makes exactly this model of the state dict."""
    # Infer everything from shapes, except a grid that is not square.
    hints = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in MEASURED - {"grid", "positions"}}
    library = {"library": "timm"} if target.layout is timm.LAYOUT else {}
    layout, tensors = locate((target.layout,), state, hints | library)
    found = layout.config(tensors, hints).config
    back = convert_tensors(layout, tensors, config, params["patch_embed.kernel"].dtype)
    wrong = [name for name in params if not np.array_equal(back[name].ravel(), params[name].ravel())]
    wrong += [f.name for f in fields(config) if getattr(found, f.name) != getattr(config, f.name)]
    if wrong:
        raise ConversionError(f"{target.whose} cannot hold this model: {', '.join(wrong)} would not come back equal")


# Writing --------------------------------------------------------------------------------------------------------------
#
# Names stand in the tables of the layouts, which are read backwards. What is left to say here is which variant of a
# layout is written, by the shapes of its tokens, and what files hold beside parameters.


def token_shapes(
    c: ViTConfig,
    positioned: int,
    registers: str = "reg_token",
    cls: str = "cls_token",
    positions: str = "pos_embed",
) -> Shapes:
    """[CLS] [1, 1, D], registers [1, R, D], and positions [1, `positioned` + N, D], of which the first will be 0."""
    shapes: Shapes = {}
    if c.cls:
        shapes[cls] = (1, 1, c.width)
    if c.registers:
        shapes[registers] = (1, c.registers, c.width)
    if c.positions:
        shapes[positions] = (1, positioned + c.grid[0] * c.grid[1], c.width)
    return shapes


def clip_shapes(c: ViTConfig, cls: str, positions: str) -> Shapes:
    return {cls: (c.width,), positions: (1 + c.grid[0] * c.grid[1], c.width)}


def patches_alone(c: ViTConfig) -> bool:
    """Whether timm's model has positions for patches alone."""
    return c.pool != "distilled" and (c.registers > 0 or c.final_norm == "none" or is_deit3(c))


def timm_files(c: ViTConfig, dtype: str) -> Mapping[str, configs.Json]:
    return configs.timm_files(c, patches_alone(c))


def write_timm(c: ViTConfig, params: Params) -> State:
    registers = "dist_token" if c.pool == "distilled" else "reg_token"
    shapes = token_shapes(c, 0 if patches_alone(c) else c.prefix, registers)
    if c.norm == "rms":  # AIMv2
        shapes[timm.SPLIT_GATE] = ()
    return invert(timm.LAYOUT, c, params, shapes)


def write_timm_dinov3(c: ViTConfig, params: Params) -> State:
    return invert(dinov3.TIMM, c, params, token_shapes(c, 0) | {timm.SPLIT_GATE: ()})


def write_transformers_dinov2(c: ViTConfig, params: Params, layout: Layout = dinov2.TRANSFORMERS) -> State:
    at = "embeddings"
    shapes = token_shapes(c, 1, f"{at}.register_tokens", f"{at}.cls_token", f"{at}.position_embeddings")
    state = invert(layout, c, params, shapes)
    if not c.classes:
        return state
    base = "dinov2_with_registers" if c.registers else "dinov2"
    return within(f"{base}.", layout, state)


def write_transformers_dinov3(c: ViTConfig, params: Params) -> State:
    at = "embeddings"
    return invert(dinov3.TRANSFORMERS, c, params, token_shapes(c, 0, f"{at}.register_tokens", f"{at}.cls_token"))


def write_transformers_clip(c: ViTConfig, params: Params) -> State:
    shapes = clip_shapes(c, "embeddings.class_embedding", "embeddings.position_embedding.weight")
    return within(clip.TOWER, clip.TRANSFORMERS, invert(clip.TRANSFORMERS, c, params, shapes))


def write_transformers5_dinov2(c: ViTConfig, params: Params) -> State:
    return write_transformers_dinov2(c, params, dinov2.TRANSFORMERS_IN_MEMORY)


def write_transformers5_dinov3(c: ViTConfig, params: Params) -> State:
    state = write_transformers_dinov3(c, params)
    return {f"model.{name}" if name.startswith("layer.") else name: a for name, a in state.items()}


def write_transformers5_clip(c: ViTConfig, params: Params) -> State:
    """In memory the image encoder alone has no prefix; within the model with a projection it has."""
    state = write_transformers_clip(c, params)
    return state if c.projection else {name.removeprefix("vision_model."): a for name, a in state.items()}


def within(prefix: str, layout: Layout, state: State) -> State:
    """With the prefix of a model that wraps this one, except what stands beside it."""
    return {name if name in layout.outside else prefix + name: a for name, a in state.items()}


def write_dinov2(c: ViTConfig, params: Params) -> State:
    return invert(dinov2.HUB, c, params, token_shapes(c, 1, "register_tokens"))


def write_dinov3(c: ViTConfig, params: Params) -> State:
    state = invert(dinov3.HUB, c, params, token_shapes(c, 0, "storage_tokens"))
    state[dinov3.PERIODS] = rope_periods(c.head_size, c.rope_base, "bfloat16").astype(np.float32)
    if c.width == 4096:  # the 7B has one more norm, which is for the small crops of training alone
        state["local_cls_norm.weight"] = np.ones_like(params["cls"])
        state["local_cls_norm.bias"] = np.zeros_like(params["cls"])
    return state


def write_deit3(c: ViTConfig, params: Params) -> State:
    return invert(deit.LAYOUT, c, params, token_shapes(c, 0))


def write_dino(c: ViTConfig, params: Params) -> State:
    return invert(dino.LAYOUT, c, params, token_shapes(c, 1))


def write_openai(c: ViTConfig, params: Params) -> State:
    return invert(clip.OPENAI, c, params, clip_shapes(c, "class_embedding", "positional_embedding"))


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


def masked_biases(c: ViTConfig) -> Biases:
    return dict(all_biases(c), mask_token=True)


def unmasked_biases(c: ViTConfig) -> Biases:
    return dict(all_biases(c), mask_token=False)


def rotary_biases(c: ViTConfig) -> Biases:
    return dict(patch_bias=True, proj_bias=True, mask_token=True)


def timm_rotary_biases(c: ViTConfig) -> Biases:
    return dict(rotary_biases(c), mask_token=False)


def clip_biases(c: ViTConfig) -> Biases:
    head: Biases = dict(classes=0, projection=c.projection or c.classes)
    return head | dict(patch_bias=False, qkv_bias=True, proj_bias=True, mask_token=False)


def timm_biases(c: ViTConfig) -> Biases:
    head: Biases = dict(classes=c.classes or c.projection, projection=0)  # there a projection is a classifier
    return head | dict(mask_token=False, patch_bias=not c.pre_norm)  # which is tied to the norm


def whole_ratio(c: ViTConfig) -> bool:
    return configs.ratio_of(c) is not None


def multiple_of_8(c: ViTConfig) -> bool:
    """So Meta's SwiGLUs are."""
    return c.mlp != "swiglu" or c.hidden % 8 == 0


TIMM = Target(
    "timm's VisionTransformer",
    timm.LAYOUT,
    write_timm,
    needs=OF_TIMM,
    biases=timm_biases,
    beside=timm_files,
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
    biases=timm_rotary_biases,
    why=COMPUTED,
    beside=timm_files,
)
TRANSFORMERS_DINOV2 = Target(
    "transformers' DINOv2",
    dinov2.TRANSFORMERS,
    write_transformers_dinov2,
    needs=OF_DINOV2,
    biases=masked_biases,
    hidden=whole_ratio,
    beside=configs.transformers_dinov2,
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
    beside=configs.transformers_dinov3,
)
TRANSFORMERS_CLIP = Target(
    "transformers' CLIP",
    clip.TRANSFORMERS,
    write_transformers_clip,
    needs=OF_CLIP,
    biases=clip_biases,
    beside=configs.transformers_clip,
)
IN_MEMORY: dict[str, dict[str, Any]] = {
    dinov2.TRANSFORMERS.name: dict(layout=dinov2.TRANSFORMERS_IN_MEMORY, write=write_transformers5_dinov2),
    dinov3.TRANSFORMERS.name: dict(write=write_transformers5_dinov3),
    clip.TRANSFORMERS.name: dict(write=write_transformers5_clip),
}
"""What differs under the names of transformers 5."""
DINOV2 = Target(
    "Meta's DINOv2",
    dinov2.HUB,
    write_dinov2,
    needs=OF_DINOV2 | dict(classes=(0,)),
    biases=masked_biases,
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
    biases=unmasked_biases,
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
    if layout == "transformers5":
        target = transformers_target(c)
        return replace(target, **IN_MEMORY[target.layout.name])
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
