"""PyTorch models with random weights, as stand-ins for checkpoints: nothing in them is at its initial value."""

from __future__ import annotations

from typing import Any

import torch

from convert.originals import build_timm, build_transformers
from jaxvit import ViTConfig


def random_original(config: ViTConfig, library: str, seed: int = 0) -> Any:
    """A model of `timm` or `transformers` with every parameter random, in float32.

    Norms, LayerScale, class and register tokens are noise around their initial values, which would hide errors: at
    them, a missing LayerScale or a swapped norm changes nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if library == "timm":
            module = build_timm(config, positioned=not config.registers)
        else:
            module = build_transformers(config)
    return randomise(module, seed)


def randomise(module: Any, seed: int = 0) -> Any:
    """The model with noise added to every parameter."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in module.parameters():
            # Vectors and tokens move away from 0 and 1. Matrices of this size make attention neither uniform nor
            # one-hot: were it close to one-hot, the largest float32 error of a layer would be that of a handful of
            # weights, and its quotient with the original's a matter of luck.
            size = 0.5 * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.1
            parameter += size * torch.randn(parameter.shape)
    return module.eval()
