"""PyTorch originals: the models jaxvit is compared with, and their internal values, read by forward hooks.

The originals run the code of timm and transformers. Where a checkpoint's own code is not published as a package (Meta's
hub layout), timm's own loader for that layout brings it into timm's model.

Their blocks run one at a time, so that never more is held in memory than the values of one layer, and one block in the
precision that is asked for: at 518 px the values of all layers of a giant take 24 GB in float64.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from timm.layers.mlp import GluMlp, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from convert import is_jaxvit_folder, recognise, versions
from convert.engine import ConversionError, Layout, Tensors
from convert.sources import open_source
from jaxvit import ViTConfig
from jaxvit.config import Resampling

READ = ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_pre", "mlp_post", "mlp_out") + (
    "resid_post",
)
"""The sites that the libraries compute as well, in order."""

Values = Mapping[str, np.ndarray]
"""Site -> value in one layer, with the axes of `jaxvit.SITES`. After the last layer come those of `final`: all tokens
after the final norm."""

Module = Any
"""A torch.nn.Module, whose submodules no type checker can follow."""


@dataclass
class Original:
    """A PyTorch model to compare with.

    Attributes:
      name: library, version and class.
      config: what jaxvit reads off it.
      resampling: a rule to put in place of the library's own; None leaves the library alone.
    """

    name: str
    module: Module
    config: ViTConfig
    resampling: Resampling | None = None

    def run(self, images: np.ndarray, dtype: torch.dtype) -> Iterator[Values]:
        """What the library computes for images [B, H, W, 3]: the values of each layer, and then `final`."""
        library = TIMM if isinstance(self.module, VisionTransformer) else TRANSFORMERS
        blocks: Module = self.module.get_submodule(library.blocks)
        # The library's own forward pass, without blocks in it, goes from the pixels to what enters the first of them.
        ends = copy.deepcopy(self.module, {id(blocks): type(blocks)()})
        ends = fold_class_position(ends).to(dtype).eval()
        norm = ends.get_submodule(library.norm)
        stream: list[torch.Tensor] = []
        before = norm.register_forward_pre_hook(lambda _, inputs: stream.append(inputs[0]))
        pixels = torch.tensor(images, dtype=dtype).permute(0, 3, 1, 2).contiguous()
        with torch.inference_mode(), interpolation(dtype, self.resampling):
            library.forward(ends, pixels)
        before.remove()
        x = stream.pop()
        for block in blocks:
            block = copy.deepcopy(block).to(dtype).eval()
            hooks = Hooks()
            library.watch(block, hooks)
            with torch.inference_mode():
                x = block(x)
            values = [{name: hooks.values[name] for name in READ}]
            del block, hooks
            yield values.pop()  # held by nobody but who asked for it
        with torch.inference_mode():
            yield {"final": norm(x).numpy()}


def original_of(source: Any, resampling: Resampling | None = None, revision: str | None = None) -> Original:
    """The original of anything `convert.load` takes.

    Raises:
      ConversionError: the source cannot be read, or its library's model does not take its tensors.
    """
    if isinstance(source, torch.nn.Module):
        _, _, config = recognise(open_source(source))
        return Original(_name(source), source, config, overriding(resampling, config))
    if is_jaxvit_folder(source):
        raise ConversionError(f"{source} is a jaxvit model: its original is the PyTorch checkpoint it was made from")
    opened = open_source(source, revision)
    layout, tensors, config = recognise(opened)
    ignored = [*layout.ignored, *opened.ignored]
    state = {name: tensors[name] for name in tensors if not any(fnmatchcase(name, pattern) for pattern in ignored)}
    try:
        if layout.name.startswith("dinov2/transformers"):
            module = _transformers(layout, state, config)
        else:
            module = _timm(layout, tensors, state, config)
    except RuntimeError as error:  # PyTorch's way to say that a state dict does not fit
        raise ConversionError(f"the original's own library does not load this checkpoint: {error}") from error
    # timm's model resamples positions in its own way; the hub's code, which it stands in for, has another.
    own = config.resampling if layout.name == "dinov2/hub" else None
    return Original(_name(module), module, config, overriding(resampling, config) or own)


def overriding(resampling: Resampling | None, config: ViTConfig) -> Resampling | None:
    """The rule to force on the original: none where its source implies it, so that the original's own code runs."""
    return None if resampling == config.resampling else resampling


def _name(module: Module) -> str:
    library = type(module).__module__.split(".")[0]
    return f"{library} {versions(library)[library]} {type(module).__name__}"


def fold_class_position(module: Module) -> Module:
    """Adds the class token's position to the class token, as conversion does, in the precision of the weights.

    A float32 forward pass does the same sum and rounds it the same way; a float64 pass of float32 weights would not
    round it, and so compare unequal to any float32 file that holds the sum.
    """
    if isinstance(module, VisionTransformer):
        token: Any = module.cls_token
        positions: Any = None if module.no_embed_class else module.pos_embed
    else:
        token, positions = module.embeddings.cls_token, module.embeddings.position_embeddings
    if positions is not None:
        with torch.no_grad():
            token += positions[:, :1]
            positions[:, :1] = 0
    return module


# Building them --------------------------------------------------------------------------------------------------------


def build_timm(config: ViTConfig, class_has_position: bool) -> Module:
    """timm's model of these sizes, for images of any size."""
    swiglu: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU}
    packed = 2 if config.mlp == "swiglu" else 1
    return VisionTransformer(
        img_size=(config.grid[0] * config.patch, config.grid[1] * config.patch),
        patch_size=config.patch,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=packed * config.hidden / config.width,
        reg_tokens=config.registers,
        no_embed_class=not class_has_position,
        init_values=1.0 if config.layer_scale else None,
        num_classes=0,
        dynamic_img_size=True,
        **(swiglu if config.mlp == "swiglu" else {}),
    )


def build_transformers(config: ViTConfig) -> Module:
    """transformers' DINOv2 of these sizes, with attention that returns its weights."""
    sizes: dict[str, Any] = dict(
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        mlp_ratio=4 if config.mlp == "swiglu" else config.hidden // config.width,
        image_size=config.grid[0] * config.patch,
        patch_size=config.patch,
        use_swiglu_ffn=config.mlp == "swiglu",
        layer_norm_eps=config.eps,
        attn_implementation="eager",
    )
    if config.registers:
        registers = transformers.Dinov2WithRegistersConfig(num_register_tokens=config.registers, **sizes)
        return transformers.Dinov2WithRegistersModel(registers)
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes))


def _timm(layout: Layout, tensors: Tensors, state: Tensors, config: ViTConfig) -> Module:
    with torch.device("meta"):  # no numbers are drawn: the checkpoint's take all places
        module = build_timm(config, class_has_position=not config.registers)
    own = checkpoint_filter_fn(_tensors(tensors), module) if layout.name == "dinov2/hub" else _tensors(state)
    module.load_state_dict(own, strict=True, assign=True)
    return module


def _transformers(layout: Layout, state: Tensors, config: ViTConfig) -> Module:
    with torch.device("meta"):
        module = build_transformers(config)
    # The mask token must be there; it is not used.
    state = {"embeddings.mask_token": np.zeros((1, config.width), np.float32), **state}
    if layout.name == "dinov2/transformers in memory":
        module.load_state_dict(_tensors(state), strict=True, assign=True)
        return module
    # Published files have names that transformers changes on loading: let it.
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: np.ascontiguousarray(a) for name, a in state.items()}, f"{folder}/model.safetensors")
        module.config.save_pretrained(folder)
        loaded, info = type(module).from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    if wrong := {kind: sorted(names) for kind, names in info.items() if names}:
        raise ConversionError(f"transformers does not load this checkpoint in full: {wrong}")
    return loaded


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


def watch_timm(block: Module, hooks: Hooks) -> None:
    """The values of a block of a timm ViT."""
    attn, mlp, count = block.attn, block.mlp, block.attn.num_heads
    attn.fused_attn = False  # the fused kernel never writes its weights out
    hooks.input(block, site("resid_pre"))
    hooks.output(attn.qkv, lambda x: dict(zip("qkv", x.unflatten(-1, (3, count, -1)).unbind(2), strict=True)))
    hooks.input(attn.attn_drop, site("pattern"))
    hooks.input(attn.proj, heads("z", count))
    hooks.output(block.ls1, site("attn_out"))
    hooks.input(block.norm2, site("resid_mid"))
    gated = isinstance(mlp, GluMlp)
    hooks.output(mlp.fc1, lambda x: {"mlp_pre": x.chunk(2, -1)[0] if gated else x})
    hooks.input(mlp.fc2, site("mlp_post"))
    hooks.output(block.ls2, site("mlp_out"))
    hooks.output(block, site("resid_post"))


def watch_transformers(block: Module, hooks: Hooks) -> None:
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


class Library(NamedTuple):
    """How a library's models are taken apart.

    Attributes:
      blocks, norm: where they have their blocks, and the norm after them.
      forward: from pixels to tokens after the norm.
      watch: hooks on a block.
    """

    blocks: str
    norm: str
    forward: Callable[[Module, torch.Tensor], Any]
    watch: Callable[[Module, Hooks], None]


TIMM = Library("blocks", "norm", lambda module, pixels: module.forward_features(pixels), watch_timm)
TRANSFORMERS = Library("encoder.layer", "layernorm", lambda module, pixels: module(pixels), watch_transformers)
