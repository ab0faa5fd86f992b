"""PyTorch originals: the models jaxvit is compared with, and their internal values, read by forward hooks.

The originals run the code of timm and transformers. Where a checkpoint's own code is not published as a package (Meta's
hub layout), timm's own loader for that layout brings it into timm's model.

Their blocks run one at a time, so that never more is held in memory than the values of one layer, and one block in the
precision that is asked for: at 518 px the values of all layers of a giant take 24 GB in float64.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from timm.layers import pos_embed_sincos
from timm.layers.mlp import GluMlp, SwiGLU, SwiGLUPacked
from timm.layers.norm import LayerNorm, RmsNorm
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as dinov3_filter_fn
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3_vit

from jaxvit import ViTConfig
from jaxvit.model.config import Resampling

from . import (
    LAYOUTS,
    Reading,
    assumptions,
    clip,
    deit,
    dino,
    dinov2,
    dinov3,
    is_jaxvit_folder,
    read,
    recognise,
    versions,
)
from . import timm as plain
from .engine import ConversionError, Layout, Tensors, locate, tensor_shape
from .export import State, within
from .sources import submodule, unwrapped

READ = ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_pre", "mlp_post", "mlp_out") + (
    "resid_post",
)
"""The sites that the libraries compute as well, in order."""

Values = Mapping[str, np.ndarray]
"""Site -> value in one layer, with the axes of `jaxvit.SITES`; after the last layer `final`, `pooled` and `head`."""

Module = Any
"""A torch.nn.Module, whose submodules no type checker can follow."""


@dataclass
class Original:
    """A PyTorch model to compare with.

    Attributes:
      name: library, version and class.
      config: what jaxvit reads off it.
      resampling: a rule to put in place of the library's own; None leaves the library alone.
      checksums: file -> sha256, of the files it was read from.
      assumed: what nothing told, so that it was built on the assumptions that jaxvit makes too.
    """

    name: str
    module: Module
    config: ViTConfig
    resampling: Resampling | None = None
    checksums: Mapping[str, str] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()

    @property
    def only(self) -> tuple[int, int] | None:
        """Height and width of the only images that the module takes: timm's without `dynamic_img_size`; else None."""
        if getattr(self.module, "dynamic_img_size", True):
            return None
        height, width = self.module.patch_embed.img_size
        return height, width

    def run(self, images: np.ndarray, dtype: torch.dtype) -> Iterator[Values]:
        """What the library computes for images [B, H, W, C]: the values of each layer, and then those after the last:
        `final`, all tokens after the final norm, `pooled`, and `head`: logits or a projection, if there are any.
        """
        library, places = library_of(self.module), Places.of(self.module, self.config)
        blocks: Module = self.module.get_submodule(places.blocks)
        # The library's own forward pass, with a block in it that does nothing, goes from the pixels to what enters the
        # first block, and beside it what else blocks are given: rotary positions.
        catch = Catch()
        ends = copy.deepcopy(self.module, {id(blocks): type(blocks)(*([catch] if library.unpacked else [[catch]]))})
        if places.positioned:
            fold(ends, places.positioned, math.prod(self.config.grid))
        ends = ends.to("cpu", dtype).eval()
        pixels = torch.tensor(images, dtype=dtype).permute(0, 3, 1, 2).contiguous()
        with torch.inference_mode(), precise_positions(ends, dtype, self.resampling):
            library.forward(ends, pixels)
        x, more, arguments = catch.take()
        for block in blocks:
            block = eager(copy.deepcopy(block)).to("cpu", dtype).eval()
            hooks = Hooks()
            library.watch(block, hooks, arguments)
            with torch.inference_mode(), replaced(torch.nn.functional, "softmax", wide_softmax):
                x = block(x, *more, **arguments)
            values = [{name: hooks.values[name] for name in READ}]
            del block, hooks
            yield values.pop()  # held by nobody but who asked for it
        with torch.inference_mode():
            yield {name: value.numpy() for name, value in library.finish(ends, x).items()}


def eager(block: Module) -> Module:
    """The block, a copy, with attention that returns its weights: a live model of transformers may have another."""
    for part in block.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation = "eager"
    return block


class Catch(torch.nn.Module):
    """Stands in for all blocks: keeps what it is given."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.given = x, args, kwargs
        return x

    def take(self) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
        given = self.given
        del self.given
        return given


def original_of(source: Any, resampling: Resampling | None = None, **known: Unpack[Reading]) -> Original:
    """The original of anything `convert.load` takes.

    Raises:
      ConversionError: the source cannot be read, or its library's model does not take its tensors.
    """
    if isinstance(source, torch.nn.Module):
        _, _, config = recognise(read(source, **known))
        source = submodule(source, prefix) if (prefix := known.get("prefix")) else unwrapped(source)
        return Original(_name(source), source, config, overriding(resampling, config))
    if is_jaxvit_folder(source):
        raise ConversionError(f"{source} is a jaxvit model: its original is the PyTorch checkpoint it was made from")
    opened = read(source, **known)
    layout, tensors, config = recognise(opened)
    ignored = [*layout.ignored, *opened.ignored]
    # Libraries know a layout by its anchors too.
    state = {name: tensors[name] for name in tensors if name in layout.anchors or not matches(name, ignored)}
    builder = BUILDERS[layout.name]
    try:
        module = builder.build(layout, tensors, state, config)
    except RuntimeError as error:  # PyTorch's way to say that a state dict does not fit
        raise ConversionError(f"the original's own library does not load this checkpoint: {error}") from error
    # timm's model resamples positions in its own way; the authors' code, which it stands in for, may have another.
    own = None if builder.own else config.resampling
    rule = overriding(resampling, config) or own
    opened.assumed.pop("preprocess", None)  # no number that is compared depends on it
    if overriding(resampling, config) is not None:
        opened.assumed.pop("resampling", None)
    checksums = opened.description.get("sha256", {})
    return Original(_name(module), module, config, rule, checksums, assumptions(opened, config))


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def overriding(resampling: Resampling | None, config: ViTConfig) -> Resampling | None:
    """The rule to force on the original: none where its source implies it, so that the original's own code runs."""
    return None if resampling == config.resampling else resampling


def _name(module: Module) -> str:
    library = type(module).__module__.split(".")[0]
    return f"{library} {versions(library)[library]} {type(module).__name__}"


def positioned(layout: Layout, tensors: Tensors, config: ViTConfig) -> tuple[str, ...]:
    """Names of the tokens before the patches, in order, and of the positions, as the layout's table has them."""
    (names,) = [rule.sources for rule in layout.rules(config, tensors) if "positions" in rule.targets]
    return names


class Places(NamedTuple):
    """Where a module has its blocks, its tokens and its positions: names of submodules and parameters."""

    blocks: str
    positioned: tuple[str, ...]

    @classmethod
    def of(cls, module: Module, config: ViTConfig) -> Places:
        """From the table that converts the module."""
        library = {"library": "timm"} if isinstance(module, VisionTransformer) else {}
        # Of tensors the table reads names and shapes alone: these take no memory.
        state = {name: np.broadcast_to(np.float32(0), t.shape) for name, t in module.state_dict().items()}
        if isinstance(module, Eva):  # without registers, timm's DINOv3 has no tensor by which the table would know it
            state.setdefault("reg_token", np.zeros((1, 0, config.width), np.float32))
        layout, tensors = locate(LAYOUTS, state, library)
        (norm,) = [r.sources[0] for r in layout.rules(config, tensors) if "blocks.norm1.scale" in r.targets]
        blocks = tensors.names[norm.format(i=0)].rpartition(".0.")[0]
        names = positioned(layout, tensors, config) if config.positions else ()
        return cls(blocks, tuple(tensors.names[name] for name in names))


def fold(module: Module, names: Sequence[str], patches: int) -> None:
    """Adds the positions of tokens before the patches to these, as conversion does, in the precision of the weights.

    A float32 forward pass does the same sum and rounds it the same way; a float64 pass of float32 weights would not
    round it, and so compare unequal to any float32 file that holds the sum.

    Args:
      names: of these tokens, in order, and of the positions, of which the last `patches` belong to patches.
    """
    state = module.state_dict()  # the parameters themselves, not copies
    *tokens, positions = (state[name].view(-1, state[name].shape[-1]) for name in names)
    before = positions[: len(positions) - patches]
    start = 0
    for token in tokens:
        own = before[start : start + len(token)]
        token[: len(own)] += own
        start += len(token)
    before.zero_()


# Building them --------------------------------------------------------------------------------------------------------

SWIGLU_LAYERS = {1: SwiGLUPacked, 2: SwiGLU}


def build_timm(config: ViTConfig, positioned: bool, gates: int = 1) -> Module:
    """timm's model of these sizes, for images of any size.

    Args:
      positioned: whether tokens before the patches have positions.
      gates: how many layers hold the gate and the value of a SwiGLU.
    """
    c = config
    norm_layer = partial({"layer": LayerNorm, "rms": RmsNorm}[c.norm], eps=c.eps)
    act = {"gelu": torch.nn.GELU, "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "swiglu": torch.nn.SiLU}
    packed = 2 if c.mlp == "swiglu" and gates == 1 else 1
    distilled = c.pool == "distilled"
    more: dict[str, Any] = {"mlp_layer": SWIGLU_LAYERS[gates]} if c.mlp == "swiglu" else {}
    if c.patch_norm:
        more["embed_norm_layer"] = norm_layer
    more["global_pool"] = {"cls": "token", "distilled": "token", "mean": "avg", "attention": "map"}[c.pool]
    module = (VisionTransformerDistilled if distilled else VisionTransformer)(
        img_size=(c.grid[0] * c.patch, c.grid[1] * c.patch),
        patch_size=c.patch,
        in_chans=c.channels,
        embed_dim=c.width,
        depth=c.depth,
        num_heads=c.heads,
        mlp_ratio=packed * c.hidden / c.width,
        class_token=c.cls,
        reg_tokens=c.registers - distilled,
        no_embed_class=not positioned,
        pos_embed="learn" if c.positions else "none",
        qkv_bias=c.qkv_bias,
        proj_bias=c.proj_bias,
        qk_norm=c.qk_norm,
        scale_attn_norm=c.branch_norms,
        scale_mlp_norm=c.branch_norms,
        pre_norm=c.pre_norm,
        final_norm=c.final_norm != "none",
        fc_norm=c.final_norm == "pooled",
        pool_include_prefix=c.pool_prefix,
        init_values=1.0 if c.layer_scale else None,
        num_classes=c.classes or c.projection,
        norm_layer=norm_layer,
        act_layer=act[c.mlp],
        dynamic_img_size=True,
        **more,
    )
    if c.patch_bias == c.pre_norm:  # timm ties the two
        raise ConversionError(
            "timm's models have a bias in the embedding of patches just if they have no norm after it"
        )
    return module


def build_transformers(config: ViTConfig) -> Module:
    """transformers' DINOv2 of these sizes, with attention that returns its weights."""
    if config.grid[0] != config.grid[1]:
        raise ConversionError(
            "transformers' DINOv2 takes positions for a square grid: there is nothing to compare with"
        )
    sizes: dict[str, Any] = dict(
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        mlp_ratio=4 if config.mlp == "swiglu" else config.hidden // config.width,
        image_size=config.grid[0] * config.patch,
        patch_size=config.patch,
        num_channels=config.channels,
        use_swiglu_ffn=config.mlp == "swiglu",
        layer_norm_eps=config.eps,
        attn_implementation="eager",
    )
    if config.classes:
        sizes["num_labels"] = config.classes
    if config.registers:
        registers = transformers.Dinov2WithRegistersConfig(num_register_tokens=config.registers, **sizes)
        if config.classes:
            return transformers.Dinov2WithRegistersForImageClassification(registers)
        return transformers.Dinov2WithRegistersModel(registers)
    plain = transformers.Dinov2Config(**sizes)
    return transformers.Dinov2ForImageClassification(plain) if config.classes else transformers.Dinov2Model(plain)


def build_dinov3(config: ViTConfig) -> Module:
    """transformers' DINOv3 of these sizes."""
    eager: dict[str, Any] = {"attn_implementation": "eager"}
    return transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(
            hidden_size=config.width,
            intermediate_size=config.hidden,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            patch_size=config.patch,
            num_channels=config.channels,
            image_size=config.grid[0] * config.patch,
            num_register_tokens=config.registers,
            use_gated_mlp=config.mlp == "swiglu",
            hidden_act="silu" if config.mlp == "swiglu" else "gelu",
            query_bias=config.qkv_bias,
            value_bias=config.qkv_bias,
            layer_norm_eps=config.eps,
            **eager,
        )
    )


def build_dinov3_timm(config: ViTConfig, gates: int = 1) -> Module:
    """timm's DINOv3 of these sizes."""
    return Eva(
        img_size=config.grid[0] * config.patch,
        patch_size=config.patch,
        in_chans=config.channels,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.hidden / config.width,
        swiglu_mlp=config.mlp == "swiglu",
        swiglu_align_to=1 if gates == 2 else 0,  # timm's way to ask for gate and value apart
        qkv_bias=config.qkv_bias,
        num_reg_tokens=config.registers,
        init_values=1.0,
        rope_type="dinov3",
        rope_temperature=config.rope_base,
        rope_rotate_half=True,
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        use_fc_norm=False,
        global_pool={"cls": "token", "mean": "avg"}[config.pool],
        num_classes=config.classes,
        norm_layer=partial(LayerNorm, eps=config.eps),
        dynamic_img_size=True,
    )


TRANSFORMERS_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def build_clip(config: ViTConfig) -> Module:
    """transformers' CLIP image encoder of these sizes, with its projection if it has one."""
    if config.grid[0] != config.grid[1]:
        raise ConversionError("transformers' CLIP takes positions for a square grid: there is nothing to compare with")
    more: dict[str, Any] = {"projection_dim": config.projection} if config.projection else {}
    more["attn_implementation"] = "eager"
    kind = transformers.CLIPVisionModelWithProjection if config.projection else transformers.CLIPVisionModel
    return kind(
        transformers.CLIPVisionConfig(
            hidden_size=config.width,
            intermediate_size=config.hidden,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            patch_size=config.patch,
            num_channels=config.channels,
            image_size=config.grid[0] * config.patch,
            hidden_act=TRANSFORMERS_ACTIVATIONS[config.mlp],
            layer_norm_eps=config.eps,
            **more,
        )
    )


def _meta(build: Callable[[], Module]) -> Module:
    """No numbers are drawn: the checkpoint's take all places."""
    with torch.device("meta"):
        return build()


Translate = Callable[[dict[str, torch.Tensor], Module], dict[str, torch.Tensor]]
"""A library's own loader: the tensors of a file, and the model they are for, to the names of that model."""


def as_they_are(state: dict[str, torch.Tensor], module: Module) -> dict[str, torch.Tensor]:
    return state


def from_openai(state: dict[str, torch.Tensor], module: Module) -> dict[str, torch.Tensor]:
    return checkpoint_filter_fn({f"{clip.VISUAL}{name}": tensor for name, tensor in state.items()}, module)


def from_meta(state: dict[str, torch.Tensor], module: Module) -> dict[str, torch.Tensor]:
    """timm's models have no place for a mask token. Its loader knows DINOv2 by its own, and drops that one alone."""
    own = checkpoint_filter_fn(state, module, adapt_layer_scale=True)
    return {name: tensor for name, tensor in own.items() if name != dino.NAMES.mask}


def _timm(
    layout: Layout, tensors: Tensors, state: State, config: ViTConfig, translate: Translate = as_they_are
) -> Module:
    """timm's model, from its own names or from those that its own loader translates."""
    gates = len(plain.names_of(tensors).gates)
    in_positions = 0 < positions_before(layout, tensors, config) == config.prefix
    module = _meta(lambda: build_timm(config, in_positions, gates))
    module.load_state_dict(translate(_tensors(state), module), strict=True, assign=True)
    return module


def positions_before(layout: Layout, tensors: Tensors, config: ViTConfig) -> int:
    """How many tokens before the patches have positions of their own in a checkpoint."""
    if not config.positions:
        return 0
    return tensor_shape(tensors, positioned(layout, tensors, config)[-1])[-2] - math.prod(config.grid)


def _from_pretrained(module: Module, state: State) -> Module:
    """Published files have names that transformers changes on loading: let it."""
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: np.ascontiguousarray(a) for name, a in state.items()}, f"{folder}/model.safetensors")
        module.config.save_pretrained(folder)
        loaded, info = type(module).from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    if wrong := {kind: sorted(names) for kind, names in info.items() if names}:
        raise ConversionError(f"transformers does not load this checkpoint in full: {wrong}")
    return loaded


def mask_of(layout: Layout, tensors: Tensors, config: ViTConfig) -> list[str]:
    """The name of the mask token, whether a checkpoint has one or not."""
    rules = layout.rules(replace(config, mask_token=True), tensors)
    return [rule.sources[0] for rule in rules if rule.targets == ("mask_token",)]


def with_unused(layout: Layout, tensors: Tensors, state: State, config: ViTConfig, module: Module) -> State:
    """With zeros for what the library's model holds and a checkpoint may lack, as features do not depend on it."""
    unused = [f"*{pattern}" for pattern in (*layout.ignored, *mask_of(layout, tensors, config))]
    places = {name: tensor.shape for name, tensor in module.state_dict().items() if matches(name, unused)}
    return {**{name: np.zeros(shape, np.float32) for name, shape in places.items()}, **state}


def _dinov2(layout: Layout, tensors: Tensors, state: State, config: ViTConfig) -> Module:
    module = _meta(lambda: build_transformers(config))
    if config.classes:
        state = within(f"{module.base_model_prefix}.", layout, state)
    state = with_unused(layout, tensors, state, config, module)
    if layout is not dinov2.TRANSFORMERS_IN_MEMORY:
        return _from_pretrained(module, state)
    module.load_state_dict(_tensors(state), strict=True, assign=True)
    return module


def _dinov3(layout: Layout, tensors: Tensors, state: State, config: ViTConfig) -> Module:
    module = _meta(lambda: build_dinov3(config))
    return _from_pretrained(module, with_unused(layout, tensors, state, config, module))


def _dinov3_timm(layout: Layout, tensors: Tensors, state: State, config: ViTConfig) -> Module:
    """timm's model, from its own names or from Meta's, which its own loader translates."""
    names = dinov3.HUB_NAMES if layout is dinov3.HUB else dinov3.timm_names(tensors)
    module = build_dinov3_timm(config, len(names.gates))  # not on meta: it has buffers that no file holds
    # The loader knows Meta's names by the storage tokens. It drops the biases of keys, which Meta's mask takes away.
    known = state if layout is not dinov3.HUB else {"storage_tokens": np.zeros((1, 0, config.width)), **state}
    own = dinov3_filter_fn(_tensors(known), module)
    module.load_state_dict({n: a for n, a in own.items() if n != "reg_token" or config.registers}, strict=True)
    if layout is dinov3.HUB and dinov3.key_biases(tensors):  # timm keeps zeros in their place
        for i, block in enumerate(module.blocks):
            block.attn.k_bias = torch.tensor(np.split(np.asarray(state[f"blocks.{i}.attn.qkv.bias"], np.float32), 3)[1])
    if dinov3.PERIODS in tensors:  # timm computes them; the authors' code reads them
        module.rope.periods = torch.tensor(np.asarray(tensors[dinov3.PERIODS], np.float32))
    return module


def _clip(layout: Layout, tensors: Tensors, state: State, config: ViTConfig) -> Module:
    named = within(clip.TOWER, layout, state)
    return _from_pretrained(_meta(lambda: build_clip(config)), named)


class Builder(NamedTuple):
    """How the original of a layout is built.

    Attributes:
      build: from the layout, its tensors, those of them that are not ignored, and the config.
      own: whether the library it is built in is the one whose files have this layout.
    """

    build: Callable[[Layout, Tensors, State, ViTConfig], Module]
    own: bool = True


translated = partial(_timm, translate=from_meta)
BUILDERS = {
    plain.LAYOUT.name: Builder(_timm),
    dinov2.HUB.name: Builder(translated, own=False),
    dinov2.TRANSFORMERS.name: Builder(_dinov2),
    dinov2.TRANSFORMERS_IN_MEMORY.name: Builder(_dinov2),
    dinov3.HUB.name: Builder(_dinov3_timm),  # resamples nothing
    dinov3.TIMM.name: Builder(_dinov3_timm),
    dinov3.TRANSFORMERS.name: Builder(_dinov3),
    deit.LAYOUT.name: Builder(translated, own=False),
    dino.LAYOUT.name: Builder(translated, own=False),
    clip.OPENAI.name: Builder(partial(_timm, translate=from_openai), own=False),
    clip.TRANSFORMERS.name: Builder(_clip),
}


def _tensors(state: Tensors) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(np.asarray(state[name], np.float32)) for name in state}


@contextmanager
def interpolation(dtype: torch.dtype, rule: Resampling | None) -> Iterator[None]:
    """Within it, torch interpolates positions in `dtype`, and by `rule` if one is given.

    timm and transformers always interpolate in float32, also in a float64 model. Positions come from float32
    checkpoints, so their cast loses nothing, and only the interpolation itself has to be lifted.
    """
    original = torch.nn.functional.interpolate

    def lifted(x: torch.Tensor, size: Any = None, **kwargs: Any) -> torch.Tensor:
        if rule is not None:
            kwargs |= {"mode": "bicubic", "align_corners": False, "antialias": rule == "bicubic_antialias"}
        if rule == "bicubic_offset":
            factors = tuple((n + 0.1) / old for n, old in zip(size, x.shape[-2:], strict=True))
            return original(x.to(dtype), scale_factor=factors, **kwargs)
        return original(x.to(dtype), size=size, **kwargs)

    torch.nn.functional.interpolate = lifted
    try:
        yield
    finally:
        torch.nn.functional.interpolate = original


@contextmanager
def precise_positions(module: Module, dtype: torch.dtype, rule: Resampling | None) -> Iterator[None]:
    """`interpolation`, and the same for rotary positions: libraries compute the centres of patches in float32."""
    with interpolation(dtype, rule), ExitStack() as stack:
        if dtype == torch.float64:
            build, centres = pos_embed_sincos._build_grid, dinov3_vit.get_patches_center_coordinates
            lifted = partial(double_arange, build)
            stack.enter_context(replaced(pos_embed_sincos, "_build_grid", lifted))
            stack.enter_context(
                replaced(
                    dinov3_vit,
                    "get_patches_center_coordinates",
                    lambda rows, columns, dtype, device: centres(rows, columns, dtype=torch.float64, device=device),
                )
            )
            if (rope := getattr(module, "rope_embeddings", None)) is not None:
                # transformers keeps the inverses of periods, rounded once more; periods are what has a name.
                periods = rope.base ** torch.arange(0, 1, 4 / rope.head_dim, dtype=torch.float64)
                rope.inv_freq = 1 / periods.float().double()
        yield


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


SOFTMAX = torch.nn.functional.softmax


def wide_softmax(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """transformers' CLIP always does its softmax in float32, also in a float64 model."""
    if x.dtype == torch.float64:
        kwargs.pop("dtype", None)
    return SOFTMAX(x, *args, **kwargs)


def double_arange(function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """Calls a function in which torch counts in float64 where float32 is asked for."""
    arange = torch.arange

    def lifted(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return arange(*args, **kwargs)

    with replaced(torch, "arange", lifted):
        return function(*args, **{**kwargs, "dtype": torch.float64})


# Reading them ---------------------------------------------------------------------------------------------------------

Read = Callable[[torch.Tensor], dict[str, torch.Tensor]]
"""From what passes a hook to sites."""


class Hooks:
    """Collects the values of a block while it runs. The block is a copy, and thrown away: nothing is unhooked."""

    def __init__(self) -> None:
        self.values: dict[str, np.ndarray] = {}

    def output(self, module: Module, read: Read) -> None:
        module.register_forward_hook(lambda _, inputs, output: self.add(read(output)))

    def input(self, module: Module, read: Read) -> None:
        module.register_forward_pre_hook(lambda _, inputs: self.add(read(inputs[0])))

    def add(self, values: dict[str, torch.Tensor]) -> None:
        self.values.update({site: value.detach().numpy() for site, value in values.items()})


def site(name: str) -> Read:
    return lambda x: {name: x}


def heads(name: str, count: int) -> Read:
    """[B, T, H d] -> [B, T, H, d]."""
    return lambda x: {name: x.unflatten(-1, (count, -1))}


Arguments = Mapping[str, Any]
"""What a block is given beside tokens."""


def watch_timm(block: Module, hooks: Hooks, _: Arguments) -> None:
    """The values of a block of a timm ViT."""
    attn, count = block.attn, block.attn.num_heads
    attn.fused_attn = False  # the fused kernel never writes its weights out
    hooks.input(block, site("resid_pre"))
    hooks.output(attn.qkv, lambda x: {"v": x.unflatten(-1, (3, count, -1))[:, :, 2]})
    hooks.output(attn.q_norm, lambda x: {"q": x.transpose(1, 2)})
    hooks.output(attn.k_norm, lambda x: {"k": x.transpose(1, 2)})
    hooks.input(attn.attn_drop, site("pattern"))
    hooks.input(attn.norm, heads("z", count))
    hooks.output(block.ls1, site("attn_out"))
    hooks.input(block.norm2, site("resid_mid"))
    watch_timm_mlp(block.mlp, hooks)
    hooks.output(block.ls2, site("mlp_out"))
    hooks.output(block, site("resid_post"))


def watch_timm_mlp(mlp: Module, hooks: Hooks) -> None:
    packed = isinstance(mlp, GluMlp)
    gate = mlp.fc1_g if isinstance(mlp, SwiGLU) else mlp.fc1
    hooks.output(gate, lambda x: {"mlp_pre": x.chunk(2, -1)[0] if packed else x})
    hooks.input(mlp.norm, site("mlp_post"))


def watch_eva(block: Module, hooks: Hooks, arguments: Arguments) -> None:
    """The values of a block of timm's DINOv3."""
    attn, count, rope = block.attn, block.attn.num_heads, arguments["rope"]
    attn.fused_attn = False

    def turned(name: str) -> Read:
        def read(x: torch.Tensor) -> dict[str, torch.Tensor]:
            before = attn.num_prefix_tokens
            patches = apply_rot_embed_cat(x[:, :, before:], rope, half=True)
            return {name: torch.cat([x[:, :, :before], patches], dim=2).transpose(1, 2)}

        return read

    hooks.input(block, site("resid_pre"))
    # The module `attn.qkv` is not called where there is a bias.
    bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    linear = torch.nn.functional.linear
    hooks.output(block.norm1, lambda x: {"v": linear(x, attn.qkv.weight, bias).unflatten(-1, (3, count, -1))[:, :, 2]})
    hooks.output(attn.q_norm, turned("q"))
    hooks.output(attn.k_norm, turned("k"))
    hooks.input(attn.attn_drop, site("pattern"))
    hooks.input(attn.norm, heads("z", count))
    hooks.output(attn, lambda x: {"attn_out": x * block.gamma_1})
    hooks.input(block.norm2, site("resid_mid"))
    watch_timm_mlp(block.mlp, hooks)
    hooks.output(block.mlp, lambda x: {"mlp_out": x * block.gamma_2})
    hooks.output(block, site("resid_post"))


def watch_dinov2(block: Module, hooks: Hooks, _: Arguments) -> None:
    """The values of a layer of transformers' DINOv2, with or without registers."""
    attn, mlp, count = block.attention, block.mlp, block.attention.num_attention_heads
    hooks.input(block, site("resid_pre"))
    for name in "qkv":
        hooks.output(getattr(attn, f"{name}_proj"), heads(name, count))
    hooks.output(attn, lambda outputs: {"pattern": outputs[1]})
    hooks.input(attn.o_proj, heads("z", count))
    hooks.output(block.layer_scale1, site("attn_out"))
    hooks.input(block.norm2, site("resid_mid"))
    gated = hasattr(mlp, "gate_proj")
    hooks.output(mlp.gate_proj if gated else mlp.fc1, site("mlp_pre"))
    hooks.input(mlp.down_proj if gated else mlp.fc2, site("mlp_post"))
    hooks.output(block.layer_scale2, site("mlp_out"))
    hooks.output(block, site("resid_post"))


def watch_dinov3(block: Module, hooks: Hooks, arguments: Arguments) -> None:
    """The values of a layer of transformers' DINOv3."""
    attn, mlp, count = block.attention, block.mlp, block.attention.num_heads
    cos, sin = arguments["position_embeddings"]

    def turned(name: str) -> Read:
        def read(x: torch.Tensor) -> dict[str, torch.Tensor]:
            x = x.unflatten(-1, (count, -1)).transpose(1, 2)
            return {name: dinov3_vit.apply_rotary_pos_emb(x, x, cos, sin)[0].transpose(1, 2)}

        return read

    hooks.input(block, site("resid_pre"))
    hooks.output(attn.q_proj, turned("q"))
    hooks.output(attn.k_proj, turned("k"))
    hooks.output(attn.v_proj, heads("v", count))
    hooks.output(attn, lambda outputs: {"pattern": outputs[1]})
    hooks.input(attn.o_proj, heads("z", count))
    hooks.output(block.layer_scale1, site("attn_out"))
    hooks.input(block.norm2, site("resid_mid"))
    hooks.output(mlp.gate_proj if hasattr(mlp, "gate_proj") else mlp.up_proj, site("mlp_pre"))
    hooks.input(mlp.down_proj, site("mlp_post"))
    hooks.output(block.layer_scale2, site("mlp_out"))
    hooks.output(block, site("resid_post"))


def watch_clip(block: Module, hooks: Hooks, _: Arguments) -> None:
    """The values of a layer of transformers' CLIP."""
    attn, mlp, count = block.self_attn, block.mlp, block.self_attn.num_heads
    hooks.input(block, site("resid_pre"))
    for name in "qkv":
        hooks.output(getattr(attn, f"{name}_proj"), heads(name, count))
    hooks.output(attn, lambda outputs: {"attn_out": outputs[0], "pattern": outputs[1]})
    hooks.input(attn.out_proj, heads("z", count))
    hooks.input(block.layer_norm2, site("resid_mid"))
    hooks.output(mlp.fc1, site("mlp_pre"))
    hooks.input(mlp.fc2, site("mlp_post"))
    hooks.output(mlp, site("mlp_out"))
    hooks.output(block, site("resid_post"))


class Library(NamedTuple):
    """How a library's models are taken apart.

    Attributes:
      unpacked: whether the container of blocks takes them one by one, not as a list.
      forward: from pixels through the blocks.
      watch: hooks on a block.
      finish: from the last block's tokens to what is computed of them.
    """

    unpacked: bool
    forward: Callable[[Module, torch.Tensor], Any]
    watch: Callable[[Module, Hooks, Arguments], None]
    finish: Callable[[Module, torch.Tensor], dict[str, torch.Tensor]]


def finish_timm(module: Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    final = module.norm(x)
    values = {"final": final, "pooled": module.forward_head(final, pre_logits=True)}
    values |= {"head": module.forward_head(final)} if module.num_classes else {}
    if not module.global_pool:  # all tokens, of which jaxvit takes [CLS], or else the mean of the patches
        patches = slice(module.num_prefix_tokens, None)
        for name in ("pooled", "head")[: len(values) - 1]:
            values[name] = values[name][:, patches].mean(1) if module.cls_token is None else values[name][:, 0]
    return values


def finish_dinov2(module: Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    final = getattr(module, module.base_model_prefix, module).layernorm(x)
    if not hasattr(module, "classifier"):
        return {"final": final, "pooled": final[:, 0]}
    patches = final[:, 1 + getattr(module.config, "num_register_tokens", 0) :]
    pooled = torch.cat([final[:, 0], patches.mean(1)], dim=1)
    return {"final": final, "pooled": pooled, "head": module.classifier(pooled)}


def finish_dinov3(module: Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    final = module.norm(x)
    return {"final": final, "pooled": final[:, 0]}


def clip_tower(module: Module) -> Module:
    return getattr(module, clip.TOWER.rstrip("."), module)


def finish_clip(module: Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    final = clip_tower(module).post_layernorm(x)
    values = {"final": final, "pooled": final[:, 0]}
    return values | ({"head": module.visual_projection(values["pooled"])} if module is not clip_tower(module) else {})


def library_of(module: Module) -> Library:
    """How the models of this module's library are taken apart.

    Raises:
      ConversionError: none of those known.
    """
    kind = type(module).__name__
    if isinstance(module, VisionTransformer):
        return Library(True, lambda m, x: m.forward_features(x), watch_timm, finish_timm)
    if isinstance(module, Eva):
        return Library(False, lambda m, x: m.forward_features(x), watch_eva, finish_timm)
    if kind.startswith("Dinov2"):
        return Library(False, lambda m, x: m(x), watch_dinov2, finish_dinov2)
    if kind == "DINOv3ViTModel":
        return Library(False, lambda m, x: m(x), watch_dinov3, finish_dinov3)
    if kind.startswith("CLIPVision"):
        return Library(False, lambda m, x: m(x, interpolate_pos_encoding=True), watch_clip, finish_clip)
    raise ConversionError(f"there is no way to look into a {type(module).__module__}.{kind}")
