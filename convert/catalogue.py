"""The published checkpoints this converter was made for: `jaxvit list`.

A hub id is a source as it stands; a file is what its authors publish outside of hubs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from jaxvit import ViTConfig
from jaxvit.model.params import abstract, to_params


@dataclass(frozen=True)
class Checkpoint:
    """Attributes:
    family, name: for people.
    config: its sizes.
    licence: of the weights, as published; check it at the source.
    sources: hub ids and names of files that `convert.load` takes.
    """

    family: str
    name: str
    config: ViTConfig
    licence: str
    sources: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """How many numbers the converted model has."""
        return sum(math.prod(leaf.shape) for leaf in to_params(abstract(self.config)).values())


SIZES: dict[str, dict[str, Any]] = {
    "small": dict(depth=12, width=384, heads=6, hidden=1536),
    "medium": dict(depth=12, width=512, heads=8, hidden=2048),
    "base": dict(depth=12, width=768, heads=12, hidden=3072),
    "large": dict(depth=24, width=1024, heads=16, hidden=4096),
    "huge": dict(depth=32, width=1280, heads=16, hidden=5120),
}


def of_size(size: str, patch: int, pixels: int, **more: Any) -> ViTConfig:
    return ViTConfig(**SIZES[size], patch=patch, grid=(pixels // patch, pixels // patch), **more)


def dinov2() -> list[Checkpoint]:
    letters = {"small": "s", "base": "b", "large": "l", "giant": "g"}
    found = []
    for registers in (0, 4):
        for size, letter in letters.items():
            hub = f"facebook/dinov2-{'with-registers-' if registers else ''}{size}"
            timm = f"timm/vit_{size}_patch14_{'reg4_' if registers else ''}dinov2.lvd142m"
            file = f"dinov2_vit{letter}14_{'reg4_' if registers else ''}pretrain.pth"
            name = f"{letter if letter == 'g' else letter.upper()}/14{' with 4 registers' if registers else ''}"
            config = ViTConfig.dinov2(size, registers)
            found.append(Checkpoint("DINOv2", name, config, "Apache-2.0", (hub, timm, file)))
    return found


def dinov3() -> list[Checkpoint]:
    family: dict[str, Any] = dict(registers=4, patch=16, grid=(14, 14), positions=False, rope="float32", eps=1e-5)
    plus = dict(depth=12, width=384, heads=6, hidden=1536, mlp="swiglu")
    huge = dict(depth=32, width=1280, heads=20, hidden=5120, mlp="swiglu")
    seven = dict(depth=40, width=4096, heads=32, hidden=8192, mlp="swiglu", qkv_bias=False)
    sizes: dict[str, tuple[str, str, dict[str, Any]]] = {
        "S/16": ("vits16", "vit_small_patch16", SIZES["small"]),
        "S+/16": ("vits16plus", "vit_small_plus_patch16", plus),
        "B/16": ("vitb16", "vit_base_patch16", SIZES["base"]),
        "L/16": ("vitl16", "vit_large_patch16", SIZES["large"]),
        "H+/16": ("vith16plus", "vit_huge_plus_patch16", huge),
        "7B/16": ("vit7b16", "vit_7b_patch16", seven),
    }
    return [
        Checkpoint(
            "DINOv3",
            name,
            ViTConfig(**family, **size),
            "DINOv3 License (gated)",
            (f"facebook/dinov3-{hub}-pretrain-lvd1689m", f"timm/{timm}_dinov3.lvd1689m"),
        )
        for name, (hub, timm, size) in sizes.items()
    ]


def deit3() -> list[Checkpoint]:
    found = []
    for size in SIZES:
        patch = 14 if size == "huge" else 16
        for pixels in (224, 384) if size in ("small", "base", "large") else (224,):
            config = of_size(size, patch, pixels, classes=1000)
            timm = f"timm/deit3_{size}_patch{patch}_{pixels}.fb_in1k"
            file = f"deit_3_{size}_{pixels}_1k.pth"
            name = f"{size[0].upper()}/{patch} at {pixels} px"
            found.append(Checkpoint("DeiT III", name, config, "Apache-2.0", (timm, file)))
    return found


def clip() -> list[Checkpoint]:
    family: dict[str, Any] = dict(layer_scale=False, patch_bias=False, pre_norm=True, eps=1e-5, mlp="quick_gelu")
    models = (
        ("B/32", "base", 32, 224, 512, "base-patch32", "ViT-B-32.pt"),
        ("B/16", "base", 16, 224, 512, "base-patch16", "ViT-B-16.pt"),
        ("L/14", "large", 14, 224, 768, "large-patch14", "ViT-L-14.pt"),
        ("L/14 at 336 px", "large", 14, 336, 768, "large-patch14-336", "ViT-L-14-336px.pt"),
    )
    return [
        Checkpoint(
            "CLIP",
            name,
            of_size(size, patch, pixels, projection=projection, **family),
            "MIT",
            (f"openai/clip-vit-{hub}", f"timm/vit_{size}_patch{patch}_clip_quickgelu_{pixels}.openai", file),
        )
        for name, size, patch, pixels, projection, hub, file in models
    ]


def dino() -> list[Checkpoint]:
    found = []
    for size, patch, file in (
        ("small", 16, "dino_deitsmall16_pretrain.pth"),
        ("small", 8, "dino_deitsmall8_pretrain.pth"),
        ("base", 16, "dino_vitbase16_pretrain.pth"),
        ("base", 8, "dino_vitbase8_pretrain.pth"),
    ):
        config = of_size(size, patch, 224, layer_scale=False)
        timm = f"timm/vit_{size}_patch{patch}_224.dino"
        found.append(Checkpoint("DINO", f"{size[0].upper()}/{patch}", config, "Apache-2.0", (timm, file)))
    for size in ("small", "base", "large"):
        config = of_size(size, 16, 224, layer_scale=False)
        found.append(Checkpoint("iBOT", f"{size[0].upper()}/16", config, "Apache-2.0", ("checkpoint_teacher.pth",)))
    return found


def known() -> list[Checkpoint]:
    return [*dinov2(), *dinov3(), *deit3(), *clip(), *dino()]


def table() -> str:
    """One line a checkpoint: parameters in millions, size of the converted file in float32, licence, sources."""
    rows = [("family", "model", "params", "float32", "licence", "sources")]
    for each in known():
        n = each.parameters
        rows.append(
            (each.family, each.name, f"{n / 1e6:.0f} M", f"{4 * n / 1e9:.2f} GB", each.licence, ", ".join(each.sources))
        )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )
