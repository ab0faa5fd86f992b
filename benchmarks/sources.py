"""What comes of every kind of file that users have: the table of docs/sources.md.

    python -m benchmarks sources            build each file, convert it, print the table
    python -m benchmarks sources --write    and write docs/sources.md

Each file is written as its library or training code writes it, around random weights, and converted in float64. A model
that comes of it must compute what the library's own model of these weights computes, to 1e-12 of the largest value (the
library never sees the file). A file that no model can be made of must be refused with the words that help. Exits 1 if a
row does not hold. Takes two minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import open_clip
import timm
import torch
import transformers
from jax import Array
from safetensors.torch import load_file, save_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

import convert
from benchmarks.originals import randomise
from convert.engine import ConversionError
from convert.originals import build_dinov3_timm, build_timm, precise_positions
from jaxvit import ViT, ViTConfig

DOCS = Path("docs/sources.md")
LIMIT = 1e-12

State = dict[str, torch.Tensor]
Module = Any


@dataclass(frozen=True)
class Made:
    """A file as users have it.

    Attributes:
      source: what is given to the converter.
      reference: the library's model of the same weights; None where the converter must refuse.
      options: what the user says beside.
      words: parts of the refusal that tell what to do.
    """

    source: Any
    reference: Module | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()


ROWS: dict[str, dict[str, Callable[[Path], Made]]] = {}
"""Heading -> what the file is -> how it is made."""


def row(heading: str, what: str) -> Callable[[Callable[[Path], Made]], Callable[[Path], Made]]:
    def add(make: Callable[[Path], Made]) -> Callable[[Path], Made]:
        ROWS.setdefault(heading, {})[what] = make
        return make

    return add


# Weights --------------------------------------------------------------------------------------------------------------

SMALL = dict(depth=12, width=384, heads=6, hidden=96, patch=16, grid=(2, 2))
"""As wide and as deep as the S of most families, with a narrow MLP."""


def plain(**changes: Any) -> Module:
    """A ViT of timm as DINO, MAE and MoCo v3 have it."""
    return randomise(build_timm(ViTConfig(**{**SMALL, "layer_scale": False, **changes}), positioned=True))


def dinov2(**changes: Any) -> Module:
    return randomise(
        build_timm(ViTConfig(**{**SMALL, "patch": 14, **changes}), positioned=not changes.get("registers"))
    )


def created(name: str = "vit_small_patch16_224", **arguments: Any) -> Module:
    """A model that timm itself creates, and knows by name."""
    return randomise(timm.create_model(name, **{"img_size": 32, **arguments}))


def state_of(module: Module) -> State:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def renamed(state: State, *pairs: tuple[str, str]) -> State:
    for old, new in pairs:
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    return state


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(path: Path, content: Any, **how: Any) -> Path:
    torch.save(content, path, **how)
    return path


def safe(path: Path, state: State) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata={"format": "pt"})
    return path


HEAD = {"head.mlp.0.weight": torch.ones(4, 4), "head.last_layer.weight_g": torch.ones(4, 1)}
MASK = {"mask_token": torch.full((1, 384), 0.3)}

# timm -----------------------------------------------------------------------------------------------------------------

TIMM = "timm"


def timm_folder(folder: Path, module: Module, **arguments: Any) -> Made:
    timm.models.save_for_hf(module, folder, model_args={"img_size": 32, **arguments}, safe_serialization=True)
    return Made(folder, module)


@row(TIMM, "a folder that `save_for_hf` wrote")
def _(folder: Path) -> Made:
    return timm_folder(folder, created(num_classes=5), num_classes=5)


@row(TIMM, "a folder with `model_args`: other heads, mean pooling, dropped paths")
def _(folder: Path) -> Made:
    arguments = dict(num_classes=5, num_heads=12, global_pool="avg", drop_path_rate=0.1)
    return timm_folder(folder, created(**arguments), **arguments)


@row(TIMM, "a folder of a model for 32x128 pixels")
def _(folder: Path) -> Made:
    return timm_folder(folder, created(img_size=(32, 128), num_classes=5), img_size=[32, 128], num_classes=5)


@row(TIMM, "a folder of a DINOv2 with registers")
def _(folder: Path) -> Made:
    return timm_folder(folder, created("vit_small_patch14_reg4_dinov2", img_size=28, depth=2), img_size=28, depth=2)


@row(TIMM, "a folder of a DINOv3")
def _(folder: Path) -> Made:
    return timm_folder(folder, created("vit_small_patch16_dinov3", depth=2), depth=2)


@row(TIMM, "a folder of a SigLIP, which pools by attention")
def _(folder: Path) -> Made:
    small = dict(depth=2, embed_dim=192, num_heads=3)
    return timm_folder(folder, created("vit_base_patch16_siglip_224", **small), **small)


@row(TIMM, "a folder of a distilled DeiT")
def _(folder: Path) -> Made:
    small = dict(depth=2, num_classes=5)
    return timm_folder(folder, created("deit_tiny_distilled_patch16_224", **small), **small)


@row(TIMM, "a state dict, with `--architecture`")
def _(folder: Path) -> Made:
    module = created(num_classes=5)
    source = saved(folder / "vit_small.pth", module.state_dict())
    return Made(source, module, {"architecture": "vit_small_patch16_224.augreg_in1k"})


@row(TIMM, "a state dict without classifier, and nothing said")
def _(folder: Path) -> Made:
    module = created(num_classes=0)
    return Made(saved(folder / "vit_small.pth", module.state_dict()), module)


@row(TIMM, "a state dict in safetensors, under the name pytorch_model.bin")
def _(folder: Path) -> Made:
    module = created(num_classes=5)
    return Made(safe(folder / "pytorch_model.bin", module.state_dict()), module)


@row(TIMM, "a state dict of another architecture than the one that is named")
def _(folder: Path) -> Made:
    source = saved(folder / "vit.pth", created(num_classes=5, depth=3).state_dict())
    return Made(source, None, {"architecture": "vit_small_patch16_224"}, ("depth 3, not 12", "--set depth=3"))


@row(TIMM, "a live model")
def _(folder: Path) -> Made:
    module = created(num_classes=5, global_pool="avg")
    return Made(module, module)


@row(TIMM, "a live model in `torch.compile`")
def _(folder: Path) -> Made:
    module = created(num_classes=5, global_pool="avg")
    return Made(torch.compile(module), module)


@row(TIMM, "a live model in `DataParallel`")
def _(folder: Path) -> Made:
    module = created(num_classes=5, global_pool="avg")
    return Made(torch.nn.DataParallel(module), module)


@row(TIMM, "a live model that pools nothing (`global_pool=''`)")
def _(folder: Path) -> Made:
    module = created(num_classes=0, global_pool="")
    return Made(module, module)


@row(TIMM, "a live model of 1 channel")
def _(folder: Path) -> Made:
    module = created(num_classes=5, in_chans=1)
    return Made(module, module)


@row(TIMM, "a live model of 4 channels")
def _(folder: Path) -> Made:
    module = created(num_classes=5, in_chans=4)
    return Made(module, module)


@row(TIMM, "a checkpoint of its training script, with a moving average: that is taken")
def _(folder: Path) -> Made:
    module, raw = created(num_classes=5), created(num_classes=5)
    with torch.no_grad():
        raw.cls_token += 1
    content = {"epoch": 3, "arch": "vit_small_patch16_224", "args": argparse.Namespace(lr=0.1)}
    content |= {"state_dict": state_of(raw), "state_dict_ema": state_of(module), "metric": 0.7}
    return Made(saved(folder / "last.pth.tar", content), module)


@row(TIMM, "a bare file of a model with 2x8 patches, `--set grid=2x8`")
def _(folder: Path) -> Made:
    module = plain(grid=(2, 8), classes=5)
    return Made(saved(folder / "vit.pth", module.state_dict()), module, {"config": {"grid": "2x8"}})


# transformers ---------------------------------------------------------------------------------------------------------

TRANSFORMERS = "transformers"
SIZES = dict(hidden_size=384, num_hidden_layers=2, num_attention_heads=6, image_size=28, patch_size=14)
CLIP = dict(
    hidden_size=768, num_hidden_layers=2, num_attention_heads=12, intermediate_size=96, image_size=28, patch_size=14
)
TEXT = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=10)
TEXT |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def hf_dinov2(**changes: Any) -> Module:
    return randomise(transformers.Dinov2Model(transformers.Dinov2Config(**{**SIZES, "mlp_ratio": 1, **changes})))


def hf_clip() -> Module:
    config = transformers.CLIPVisionConfig(**CLIP, hidden_act="quick_gelu", projection_dim=16)
    return randomise(transformers.CLIPVisionModelWithProjection(config))


def pretrained(folder: Path, module: Module, reference: Module | None = None, **how: Any) -> Made:
    module.save_pretrained(folder, **how)
    return Made(folder, module if reference is None else reference)


@row(TRANSFORMERS, "a folder of a Dinov2Model")
def _(folder: Path) -> Made:
    return pretrained(folder, hf_dinov2())


@row(TRANSFORMERS, "a folder of a Dinov2WithRegistersModel")
def _(folder: Path) -> Made:
    config = transformers.Dinov2WithRegistersConfig(**SIZES, mlp_ratio=1)
    return pretrained(folder, randomise(transformers.Dinov2WithRegistersModel(config)))


@row(TRANSFORMERS, "a folder of a Dinov2ForImageClassification")
def _(folder: Path) -> Made:
    config = transformers.Dinov2Config(**SIZES, mlp_ratio=1, num_labels=5)
    return pretrained(folder, randomise(transformers.Dinov2ForImageClassification(config)))


@row(TRANSFORMERS, "a folder of a DINOv3ViTModel")
def _(folder: Path) -> Made:
    config = transformers.DINOv3ViTConfig(
        **{**SIZES, "patch_size": 16, "image_size": 32}, intermediate_size=96, num_register_tokens=4
    )
    return pretrained(folder, randomise(transformers.DINOv3ViTModel(config)))


@row(TRANSFORMERS, "a folder of a CLIPVisionModelWithProjection")
def _(folder: Path) -> Made:
    return pretrained(folder, hf_clip())


@row(TRANSFORMERS, "a folder of a CLIPModel, both sides")
def _(folder: Path) -> Made:
    vision = transformers.CLIPVisionConfig(**CLIP, hidden_act="quick_gelu")
    config = transformers.CLIPConfig(vision_config=vision.to_dict(), text_config=TEXT, projection_dim=16)
    whole = randomise(transformers.CLIPModel(config))
    one_side = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**CLIP, hidden_act="quick_gelu", projection_dim=16)
    ).eval()
    own = one_side.state_dict().keys()
    one_side.load_state_dict({name: tensor for name, tensor in whole.state_dict().items() if name in own}, strict=True)
    return pretrained(folder, whole, one_side)


def without(folder: Path, *names: str) -> None:
    """The config.json as an older version writes it: without what equals the library's default."""
    path = folder / "config.json"
    content = {key: value for key, value in json.loads(path.read_text()).items() if key not in names}
    path.write_text(json.dumps(content))


@row(TRANSFORMERS, "a folder of MetaCLIP 2 whose config.json leaves out activation and heads, which equal the defaults")
def _(folder: Path) -> Made:
    sizes = {**CLIP, "hidden_size": 384, "hidden_act": "quick_gelu"}
    made = pretrained(folder, randomise(transformers.MetaClip2VisionModel(transformers.MetaClip2VisionConfig(**sizes))))
    without(folder, "hidden_act", "num_attention_heads")
    return made


@row(TRANSFORMERS, "a folder of Chinese-CLIP whose config.json leaves out activation and heads")
def _(folder: Path) -> Made:
    sizes = {**CLIP, "hidden_size": 384, "hidden_act": "quick_gelu"}
    config = transformers.ChineseCLIPVisionConfig(**sizes)
    made = pretrained(folder, randomise(transformers.ChineseCLIPVisionModel(config)))
    without(folder, "hidden_act", "num_attention_heads")
    return made


@row(TRANSFORMERS, "a folder in shards of safetensors")
def _(folder: Path) -> Made:
    made = pretrained(folder, hf_dinov2(), max_shard_size="2MB")
    assert (folder / "model.safetensors.index.json").exists()
    return made


@row(TRANSFORMERS, "a folder in shards of pytorch_model.bin, as version 4 wrote it")
def _(folder: Path) -> Made:
    made = pretrained(folder, hf_dinov2(), max_shard_size="2MB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    new = {file: f"pytorch_{file.removesuffix('.safetensors')}.bin" for file in index["weight_map"].values()}
    for file in new:
        saved(folder / new[file], load_file(folder / file))
        (folder / file).unlink()
    names = {key: new[file] for key, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index | {"weight_map": names}))
    return made


@row(TRANSFORMERS, "a folder that holds a variant alone: model.fp16.safetensors")
def _(folder: Path) -> Made:
    module = hf_dinov2().half().float()
    module.half().save_pretrained(folder, variant="fp16")
    return Made(folder, module.float())


@row(TRANSFORMERS, "a folder in bfloat16")
def _(folder: Path) -> Made:
    module = hf_dinov2().bfloat16()
    module.save_pretrained(folder)
    return Made(folder, module.float())


@row(TRANSFORMERS, "a live model, and its state dict with `module.` before each name")
def _(folder: Path) -> Made:
    module = hf_dinov2()
    return Made(prefixed(state_of(module), "module."), module)


@row(TRANSFORMERS, "pytorch_model.bin of a CLIP without its config.json")
def _(folder: Path) -> Made:
    return Made(saved(folder / "pytorch_model.bin", hf_clip().state_dict()), None, {}, ("activation", "--set mlp="))


@row(TRANSFORMERS, "the same, with `--set mlp=quick_gelu`")
def _(folder: Path) -> Made:
    module = hf_clip()
    return Made(saved(folder / "clip.bin", module.state_dict()), module, {"config": {"mlp": "quick_gelu"}})


@row(TRANSFORMERS, "a folder of a ViTModel")
def _(folder: Path) -> Made:
    config = transformers.ViTConfig(**SIZES, intermediate_size=96)
    transformers.ViTModel(config).save_pretrained(folder)
    return Made(folder, None, {}, ("a transformers ViT", "timm's file"))


@row(TRANSFORMERS, "a folder of a SiglipModel")
def _(folder: Path) -> Made:
    config = transformers.SiglipConfig(vision_config=dict(CLIP), text_config=dict(TEXT))
    transformers.SiglipModel(config).save_pretrained(folder)
    return Made(folder, None, {}, ("SigLIP", "timm's file"))


# The authors' own -----------------------------------------------------------------------------------------------------

AUTHORS = "Authors' files"


@row(AUTHORS, "DINOv2, bare")
def _(folder: Path) -> Made:
    module = dinov2()
    return Made(saved(folder / "dinov2_vits14_pretrain.pth", state_of(module) | MASK), module)


@row(AUTHORS, "DINOv2, blocks in chunks, with the heads of its training")
def _(folder: Path) -> Made:
    module = dinov2()
    state = state_of(module)
    chunked = {
        re.sub(r"^blocks.(\d+)", lambda i: f"blocks.{int(i[1]) // 4}.{i[1]}", name): state[name] for name in state
    }
    teacher = prefixed(chunked | MASK, "backbone.") | prefixed(HEAD, "dino_head.")
    return Made(saved(folder / "teacher_checkpoint.pth", {"teacher": teacher}), module)


@row(AUTHORS, "DINO, a full checkpoint of its training: the teacher is taken")
def _(folder: Path) -> Made:
    module = plain()
    teacher = prefixed(state_of(module), "backbone.") | HEAD
    student = {f"module.{name}": tensor + 1 for name, tensor in teacher.items()}
    content = {"student": student, "teacher": teacher, "epoch": 3, "args": argparse.Namespace(arch="vit_small")}
    content |= {"optimizer": {"state": {}, "param_groups": []}, "best": np.float64(0.7)}
    return Made(saved(folder / "checkpoint.pth", content), module)


@row(AUTHORS, "the same, `--branch student`")
def _(folder: Path) -> Made:
    module = plain()
    student = prefixed(state_of(module), "module.backbone.")
    teacher = {name.removeprefix("module."): tensor + 1 for name, tensor in student.items()}
    return Made(saved(folder / "c.pth", {"student": student, "teacher": teacher}), module, {"branch": "student"})


@row(AUTHORS, "iBOT, with its token of hidden patches")
def _(folder: Path) -> Made:
    module = plain(layer_scale=True)
    state = renamed(state_of(module), ("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"))
    return Made(
        saved(folder / "checkpoint_teacher.pth", {"state_dict": state | {"masked_embed": MASK["mask_token"]}}), module
    )


@row(AUTHORS, "DeiT III")
def _(folder: Path) -> Made:
    config = ViTConfig(**SMALL, classes=5)
    module = randomise(build_timm(config, positioned=False))
    state = renamed(state_of(module), ("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"))
    return Made(saved(folder / "deit_3_small_224_1k.pth", {"model": state}), module)


@row(AUTHORS, "MAE, fine-tuned with mean pooling")
def _(folder: Path) -> Made:
    module = created(num_classes=5, global_pool="avg")
    content = {"model": module.state_dict(), "epoch": 99, "args": argparse.Namespace(lr=1.0), "scaler": {}}
    return Made(saved(folder / "mae_finetuned.pth", content), module)


@row(AUTHORS, "MAE, pretrained, with its decoder")
def _(folder: Path) -> Made:
    decoder = {"decoder_embed.weight": torch.ones(8, 384), "mask_token": torch.zeros(1, 1, 8)}
    return Made(
        saved(folder / "mae_pretrain.pth", {"model": state_of(plain()) | decoder}), None, {}, ("masked autoencoder",)
    )


@row(AUTHORS, "MoCo v3, whose S has 12 heads")
def _(folder: Path) -> Made:
    state = prefixed(state_of(plain(heads=12)), "module.base_encoder.")
    return Made(
        saved(folder / "vit-s-300ep.pth.tar", {"state_dict": state}), None, {}, ("12 in MoCo", "--set heads=12")
    )


@row(AUTHORS, "the same, `--set heads=12`")
def _(folder: Path) -> Made:
    module = plain(heads=12)
    state = prefixed(state_of(module), "module.base_encoder.")
    return Made(saved(folder / "vit-s.pth.tar", {"state_dict": state, "epoch": 300}), module, {"config": {"heads": 12}})


@row(AUTHORS, "a MAE ViT-H, 1280 wide, and nothing said of its heads")
def _(folder: Path) -> Made:
    state = state_of(plain(width=1280, heads=16, depth=2, hidden=8))
    return Made(saved(folder / "vit_h.pth", state), None, {}, ("16", "--set heads="))


def dinov3_file(module: Eva) -> State:
    """Meta's names; its biases of keys stand beside a mask that takes them away."""
    state, width = state_of(module), module.embed_dim
    pairs = (("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"))
    for i in range(len(module.blocks)):
        q, v = (state.pop(f"blocks.{i}.attn.{name}_bias") for name in "qv")
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.full((width,), 0.7), v])
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(width)
    periods = torch.tensor(100.0) ** (torch.arange(16) / 16)
    return renamed(state, *pairs) | MASK | {"rope_embed.periods": periods.bfloat16()}


@row(AUTHORS, "DINOv3, whose periods are in bfloat16")
def _(folder: Path) -> Made:
    config = dict(depth=2, width=384, heads=6, hidden=96, patch=16, registers=4, rope="float32", rope_base=100.0)
    config |= dict(eps=1e-5, positions=False, qkv_bias=True, grid=(14, 14), final_norm="tokens")
    module = randomise(build_dinov3_timm(ViTConfig(**config)))
    state = dinov3_file(module)
    module.rope.periods = state["rope_embed.periods"].float()
    return Made(saved(folder / "dinov3_vits16_pretrain.pth", state), module)


@row(AUTHORS, "OpenCLIP, a checkpoint of its training on several GPUs: `--set mlp=gelu`")
def _(folder: Path) -> Made:
    model = clip_model()
    content = {"epoch": 3, "name": "run", "state_dict": prefixed(model.state_dict(), "module."), "optimizer": {}}
    return Made(saved(folder / "epoch_3.pt", content), model.visual, {"config": {"mlp": "gelu"}})


def clip_model() -> Module:
    vision = open_clip.CLIPVisionCfg(layers=2, width=768, head_width=64, mlp_ratio=0.25, patch_size=14, image_size=28)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=50, width=64, heads=2, layers=1)
    return randomise(open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text))


@row(AUTHORS, "OpenCLIP, a folder with its config")
def _(folder: Path) -> Made:
    model = clip_model()
    safe(folder / "open_clip_model.safetensors", model.state_dict())
    vision = dict(layers=2, width=768, head_width=64, mlp_ratio=0.25, patch_size=14, image_size=28)
    text = dict(context_length=8, vocab_size=50, width=64, heads=2, layers=1)
    about = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}}
    about["preprocess_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    return Made(folder, model.visual)


@row(AUTHORS, "OpenAI's CLIP, an archive of TorchScript, of which nothing is run")
def _(folder: Path) -> Made:
    model = clip_model()
    path = folder / "ViT-S-14.pt"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch gives TorchScript up; OpenAI's files stay as they are
        torch.jit.save(torch.jit.trace(_Called(model.visual), torch.zeros(1, 3, 28, 28), check_trace=False), str(path))
    return Made(path, model.visual, {"config": {"mlp": "gelu"}})


class _Called(torch.nn.Module):
    """As OpenAI's archives have it: the image side under the name `visual`."""

    def __init__(self, visual: Module):
        super().__init__()
        self.visual = visual

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual(images)


# Around the weights ---------------------------------------------------------------------------------------------------

AROUND = "Wrappers, levels, containers"


@row(AROUND, "`torch.compile` and DistributedDataParallel in the names: `module._orig_mod.`")
def _(folder: Path) -> Made:
    module = dinov2()
    return Made(saved(folder / "c.pth", prefixed(state_of(module) | MASK, "module._orig_mod.")), module)


@row(AROUND, "PyTorch's AveragedModel, which keeps a number beside its `module.`")
def _(folder: Path) -> Made:
    module = hf_clip()
    state = torch.optim.swa_utils.AveragedModel(module).state_dict()
    return Made(saved(folder / "swa.pth", state), module, {"config": {"mlp": "quick_gelu"}})


@row(AROUND, "a classifier of transformers as an attribute of another class: `net.` before each name")
def _(folder: Path) -> Made:
    config = transformers.Dinov2Config(**SIZES, mlp_ratio=1, num_labels=5)
    module = randomise(transformers.Dinov2ForImageClassification(config))
    return Made(saved(folder / "c.pth", {"model": prefixed(state_of(module), "net.")}), module)


@row(AROUND, "activation checkpoints and FSDP within blocks")
def _(folder: Path) -> Made:
    module = dinov2()
    state = renamed(state_of(module) | MASK, (".attn.", "._checkpoint_wrapped_module.attn."))
    return Made(saved(folder / "c.pth", prefixed(state, "_fsdp_wrapped_module.")), module)


@row(AROUND, "two levels: `{'model': {'state_dict': ..}}`")
def _(folder: Path) -> Made:
    module = dinov2()
    return Made(saved(folder / "c.pth", {"model": {"state_dict": state_of(module) | MASK}, "epoch": 1}), module)


@row(AROUND, "a Lightning checkpoint, with hyper-parameters of any class")
def _(folder: Path) -> Made:
    module = dinov2()
    content = {"state_dict": prefixed(state_of(module) | MASK, "model."), "pytorch-lightning_version": "2.5.0"}
    content |= {"hyper_parameters": argparse.Namespace(out=folder, seed=np.int64(3)), "optimizer_states": []}
    return Made(saved(folder / "epoch=3.ckpt", content), module)


@row(AROUND, "two networks in one state dict, `--branch student`")
def _(folder: Path) -> Made:
    module = dinov2()
    state = prefixed(state_of(module) | MASK, "student_backbone.")
    state |= {f"teacher_backbone.{name}": tensor + 1 for name, tensor in (state_of(module) | MASK).items()}
    return Made(saved(folder / "c.pth", {"model": state}), module, {"branch": "student"})


@row(AROUND, "the same, and nothing said")
def _(folder: Path) -> Made:
    state = state_of(dinov2()) | MASK
    both = prefixed(state, "student_backbone.") | prefixed(state, "teacher_backbone.")
    return Made(saved(folder / "c.pth", both), None, {}, ("two networks", "--branch teacher or --branch student"))


DEPTH_HEAD = {f"depth_head.scratch.layer{i}.weight": torch.ones(2, 2) for i in range(30)}


@row(AROUND, "Depth Anything: an encoder inside a larger model")
def _(folder: Path) -> Made:
    state = prefixed(state_of(dinov2()) | MASK, "pretrained.") | DEPTH_HEAD
    return Made(saved(folder / "depth_anything_vits14.pth", state), None, {}, ("depth_head", "--prefix pretrained."))


@row(AROUND, "the same, `--prefix pretrained.`")
def _(folder: Path) -> Made:
    module = dinov2()
    state = prefixed(state_of(module) | MASK, "pretrained.") | DEPTH_HEAD
    return Made(saved(folder / "depth_anything_vits14.pth", state), module, {"prefix": "pretrained."})


@row(AROUND, "LLaVA's vision tower, `--prefix vision_tower. --set mlp=quick_gelu`")
def _(folder: Path) -> Made:
    config = transformers.CLIPVisionConfig(**CLIP, hidden_act="quick_gelu")
    module = randomise(transformers.CLIPVisionModel(config))
    state = {f"vision_tower.vision_model.{n.removeprefix('vision_model.')}": t for n, t in state_of(module).items()}
    state |= {f"language_model.model.layers.{i}.input_layernorm.weight": torch.ones(4) for i in range(9)}
    options = {"prefix": "vision_tower.vision_model.", "config": {"mlp": "quick_gelu"}}
    return Made(saved(folder / "pytorch_model.bin", state), module, options)


@row(AROUND, "a file in PyTorch's format of before 1.6, without a suffix")
def _(folder: Path) -> Made:
    module = dinov2()
    return Made(saved(folder / "weights", state_of(module) | MASK, _use_new_zipfile_serialization=False), module)


@row(AROUND, "a folder that `jaxvit convert` wrote")
def _(folder: Path) -> Made:
    module = dinov2()
    source = saved(folder / "dinov2.pth", state_of(module) | MASK)
    with jax.enable_x64(True):
        convert.convert(source, folder / "dinov2", dtype="float64")
    return Made(folder / "dinov2", module)


@row(AROUND, "a file in half precision")
def _(folder: Path) -> Made:
    module = dinov2().half().float()
    state = {name: tensor.half() for name, tensor in (state_of(module) | MASK).items()}
    return Made(safe(folder / "dinov2.safetensors", state), module)


# Refused --------------------------------------------------------------------------------------------------------------

REFUSED = "What is no checkpoint of a plain Vision Transformer"


class _Runs:
    """A pickle of this would run code when it is read."""

    def __reduce__(self) -> Any:
        return (print, ("this ran",))


@row(REFUSED, "a pickle that would run code")
def _(folder: Path) -> Made:
    return Made(saved(folder / "c.pth", state_of(dinov2()) | MASK | {"x": _Runs()}), None, {}, ("print",))


@row(REFUSED, "a pointer of Git LFS instead of the file")
def _(folder: Path) -> Made:
    path = folder / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 88283115\n")
    return Made(path, None, {}, ("Git-LFS pointer", "git lfs pull"))


@row(REFUSED, "a web page instead of the file")
def _(folder: Path) -> Made:
    path = folder / "dinov2.pth"
    path.write_text("<!DOCTYPE html><html><body>403 Forbidden</body></html>")
    return Made(path, None, {}, ("web page",))


@row(REFUSED, "a download that broke off")
def _(folder: Path) -> Made:
    path = safe(folder / "dinov2.safetensors", state_of(dinov2()) | MASK)
    path.write_bytes(path.read_bytes()[:100_000])
    return Made(path, None, {}, ("not a complete safetensors file",))


@row(REFUSED, "the index of a model in shards, without its folder")
def _(folder: Path) -> Made:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    return Made(path, None, {}, ("give the folder",))


@row(REFUSED, "big_vision's .npz")
def _(folder: Path) -> Made:
    path = folder / "vit_s16.npz"
    np.savez(path, **{"params/embedding/kernel": np.ones((16, 16, 3, 8)), "params/cls": np.ones((1, 1, 8))})
    return Made(path, None, {}, ("NumPy",))


@row(REFUSED, "a LoRA")
def _(folder: Path) -> Made:
    state = {"base_model.model.encoder.layer.0.attention.attention.query.lora_A.weight": torch.ones(2, 2)}
    return Made(safe(folder / "adapter_model.safetensors", state), None, {}, ("LoRA",))


@row(REFUSED, "a quantised DINOv2")
def _(folder: Path) -> Made:
    state = state_of(dinov2()) | MASK | {"blocks.0.attn.qkv.SCB": torch.ones(2)}
    return Made(saved(folder / "dinov2-int8.pth", state), None, {}, ("quantised",))


@row(REFUSED, "the state of an optimizer")
def _(folder: Path) -> Made:
    state = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))]).state_dict()
    return Made(saved(folder / "optimizer.bin", state), None, {}, ("optimizer",))


@row(REFUSED, "an EVA")
def _(folder: Path) -> Made:
    module = timm.create_model("eva_giant_patch14_224", img_size=28, depth=1, embed_dim=16, num_heads=2)
    return Made(saved(folder / "eva.pth", module.state_dict()), None, {}, ("EVA",))


@row(REFUSED, "a Swin")
def _(folder: Path) -> Made:
    sizes = dict(img_size=56, depths=(1, 1), embed_dim=8, num_heads=(2, 2))
    module = timm.create_model("swin_tiny_patch4_window7_224", **sizes)
    return Made(saved(folder / "swin.pth", module.state_dict()), None, {}, ("Swin",))


# What comes of them ---------------------------------------------------------------------------------------------------


def theirs(module: Module, pixels: torch.Tensor) -> tuple[str, torch.Tensor]:
    """What the library's model computes last: logits, a projection, what a CLIP pools, or all tokens."""
    module = module.double().eval()
    with torch.inference_mode(), precise_positions(module, torch.float64, None):
        if isinstance(module, VisionTransformer | Eva):
            if module.num_classes:
                return "logits", module(pixels)
            return "tokens", module.forward_features(pixels)
        if not type(module).__module__.startswith("transformers"):
            return "projection", module(pixels)
        out = module(pixels)
        for name, kind in {"logits": "logits", "image_embeds": "projection"}.items():
            if name in out:
                return kind, out[name]
        if "clip" in type(module).__name__.lower():
            return "pooled", out.pooler_output
        return "tokens", out.last_hidden_state


def ours(model: ViT, images: np.ndarray, kind: str) -> Array:
    out = model(jnp.asarray(images, jnp.float64))
    if kind == "tokens":
        parts = [x if x.ndim == 3 else x[:, None] for x in (out.cls, out.registers, out.patches) if x is not None]
        return jnp.concatenate(parts, axis=1)
    return getattr(out, kind)


@dataclass(frozen=True)
class Outcome:
    """What came of a file: the error of the model, or the refusal; and whether that is what must come of it."""

    holds: bool
    error: float = float("nan")
    assumed: tuple[str, ...] = ()
    message: str = ""

    def cells(self) -> str:
        """The rest of a row of the table."""
        if self.message:
            return f"refused: {shortened(self.message)} | | |"
        assumed = ", ".join(f"`{name}`" for name in self.assumed) or "nothing"
        return f"converted | {assumed} | {self.error:.0e} |"


def shortened(message: str, most: int = 250) -> str:
    return message if len(message) <= most else f"{message[:most].rpartition(' ')[0]} .."


def outcome(make: Callable[[Path], Made]) -> Outcome:
    folder = Path(tempfile.mkdtemp(prefix="jaxvit-sources-"))
    try:
        made = make(folder)
        with jax.enable_x64(True):
            try:
                model, provenance = convert.load_described(made.source, **made.options, dtype="float64")
            except ConversionError as error:
                message = str(error).replace(str(folder) + "/", "").replace(str(folder), "FOLDER")
                holds = made.reference is None and all(word in message for word in made.words)
                return Outcome(holds, message=message)
            if made.reference is None:
                return Outcome(False)
            c = model.config
            images = np.random.default_rng(0).normal(size=(2, c.grid[0] * c.patch, c.grid[1] * c.patch, c.channels))
            kind, expected = theirs(made.reference, torch.tensor(images).permute(0, 3, 1, 2))
            largest = np.abs(expected.numpy()).max()
            error = np.abs(np.asarray(ours(model, images, kind)) - expected.numpy()).max() / largest
        assumed = tuple(dict.fromkeys(line.split()[0] for line in provenance.assumptions))
        return Outcome(bool(error <= LIMIT), float(error), assumed)
    finally:
        shutil.rmtree(folder)


def main(write: bool) -> int:
    lines, failed = [], []
    for heading, rows in ROWS.items():
        lines += ["", f"## {heading}", "", "| file | what comes of it | assumed | error |", "|---|---|---|---|"]
        for what, make in rows.items():
            found = outcome(make)
            print(f"{'' if found.holds else 'FAILED '}{what}: {found.cells()}", file=sys.stderr, flush=True)
            failed += [] if found.holds else [what]
            lines.append(f"| {what} | {found.cells()}")
    print("\n".join(lines))
    if write:
        DOCS.write_text("\n".join([PAGE.format(count=sum(map(len, ROWS.values())), limit=LIMIT), *lines, ""]))
    if failed:
        print(f"{len(failed)} do not hold: {'; '.join(failed)}", file=sys.stderr)
    return bool(failed)


PAGE = """# What comes of the files that users have

`python -m benchmarks sources --write` wrote this table. It builds {count} kinds of files as libraries and training
codes write them, around random weights with the widths of published models, and converts each in float64. The model is
then compared with the library's own model of the same weights, which never sees the file: logits or projection where
there are any, else all tokens, at the native size. The error is max |difference| / max |value|; a row holds up to
{limit:.0e}.

"Assumed" are the fields of the config that nothing in the file tells. `jaxvit convert` prints each with its value and
its reason, and keeps them with the model; `--set FIELD=VALUE` or `--architecture NAME` settles them. What is refused
must name what helps. How photographs are prepared is compared with each library's own transforms by
tests/test_preparation.py."""
