"""What PyTorch users do instead: timm's models, forward hooks, and loops over interventions.

Everything runs under inference_mode. Attention is timm's fused kernel wherever no weights are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

Module = Any


def forward(module: Module, pixels: torch.Tensor) -> torch.Tensor:
    """[CLS] after the final norm."""
    with torch.inference_mode():
        return module.forward_features(pixels)[:, 0]


@contextmanager
def unfused(module: Module, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Within it, these blocks write their attention weights out; the fused kernel does not."""
    blocks = [module.blocks[layer] for layer in (range(len(module.blocks)) if layers is None else layers)]
    fused = [block.attn.fused_attn for block in blocks]
    for block in blocks:
        block.attn.fused_attn = False
    try:
        yield
    finally:
        for block, was in zip(blocks, fused, strict=True):
            block.attn.fused_attn = was


def record_patterns(module: Module, pixels: torch.Tensor, rows: int | None) -> list[torch.Tensor]:
    """The attention weights of every block: of the first `rows` queries, or of all."""
    kept: list[torch.Tensor] = []
    # A copy of the rows alone lets go of the rest.
    hooks = [
        block.attn.attn_drop.register_forward_hook(lambda _, inputs, output: kept.append(output[:, :, :rows].clone()))
        for block in module.blocks
    ]
    with unfused(module):
        forward(module, pixels)
    for hook in hooks:
        hook.remove()
    return kept


def last_layer_parts(module: Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The last layer's analysis of [CLS] by hooks: attention mass, parts by source, norms, cosines, depth cosines."""
    kept: dict[str, Any] = {}
    last, prefix = module.blocks[-1], module.num_prefix_tokens
    stream: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _, i, output: stream.append(output[:, 0])) for block in module.blocks]
    for name, part in {"pattern": last.attn.attn_drop, "qkv": last.attn.qkv, "update": last.ls1}.items():
        hooks.append(part.register_forward_hook(lambda _, i, output, name=name: kept.update({name: output})))
    with unfused(module, [len(module.blocks) - 1]):
        forward(module, pixels)
    for hook in hooks:
        hook.remove()
    with torch.inference_mode():
        heads = last.attn.num_heads
        row = kept["pattern"][:, :, 0]  # [B, H, T]
        v = kept["qkv"].unflatten(-1, (3, heads, -1))[:, :, 2]  # [B, T, H, d]
        update, after = kept["update"][:, 0], stream[-1]
        kernel, gamma = last.attn.proj.weight, last.ls1.gamma
        found = {"mass": row.mean(1)}
        ends = {"cls": (0, 1), "registers": (1, prefix), "patches": (prefix, None)}
        for name, (start, stop) in ends.items():
            z = torch.einsum("bht,bthd->bhd", row[:, :, start:stop], v[:, start:stop]).flatten(1)
            part = (z @ kernel.T) * gamma
            found |= {
                f"norm {name}": part.norm(dim=-1),
                f"cosine {name}": torch.cosine_similarity(part, update),
                f"share {name}": (part * after).sum(-1) / after.square().sum(-1),
            }
        pulled = ((update * gamma) @ kernel).unflatten(-1, (heads, -1))
        found["contribution"] = torch.einsum("bht,bthd,bhd->bt", row, v, pulled)
        found["depth cosine"] = torch.cosine_similarity(torch.stack(stream), after[None], dim=-1)
        return found


def sweep_heads(module: Module, pixels: torch.Tensor, points: Sequence[tuple[int, int]]) -> torch.Tensor:
    """[points, B, D]: [CLS] with one head zeroed at the input of the output projection, a run and a hook a point."""
    found = []
    for layer, head in points:
        attn = module.blocks[layer].attn
        size = attn.head_dim

        def cut(_: Any, inputs: Any, head: int = head, size: int = size) -> tuple[torch.Tensor]:
            z = inputs[0].clone()
            z[..., head * size : (head + 1) * size] = 0
            return (z,)

        hook = attn.proj.register_forward_pre_hook(cut)
        found.append(forward(module, pixels))
        hook.remove()
    return torch.stack(found)


def sweep_heads_batched(module: Module, pixels: torch.Tensor) -> torch.Tensor:
    """The same for all heads, those of one layer in one batch: image i of the copies loses head i."""
    found = []
    for block in module.blocks:
        heads, size = block.attn.num_heads, block.attn.head_dim
        keep = 1 - torch.eye(heads, dtype=pixels.dtype, device=pixels.device)
        mask = keep.repeat_interleave(size, dim=1).repeat_interleave(len(pixels), dim=0)[:, None]
        hook = block.attn.proj.register_forward_pre_hook(lambda _, inputs, mask=mask: (inputs[0] * mask,))
        copies = pixels.repeat(heads, 1, 1, 1)
        found.append(forward(module, copies).unflatten(0, (heads, len(pixels))))
        hook.remove()
    return torch.cat(found)


def with_hook_points(module: Module, run: Callable[[], Any]) -> Any:
    """Runs with a hook at every submodule and all attention weights written out, as libraries of hook points do."""
    hooks = [part.register_forward_hook(lambda _, inputs, output: output) for part in module.modules()]
    with unfused(module):
        result = run()
    for hook in hooks:
        hook.remove()
    return result


def sweep_edges(module: Module, pixels: torch.Tensor, points: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """[points, B, D]: [CLS] with attention from one group of tokens to another cut before the softmax, in one layer."""
    prefix, found = module.num_prefix_tokens, []
    tokens = prefix + module.patch_embed.num_patches
    span = [slice(i, i + 1) for i in range(prefix)] + [slice(prefix, tokens)]
    for layer, query, key in points:
        block = module.blocks[layer]
        size = forward_tokens(module, pixels)
        mask = torch.zeros(size, size, dtype=pixels.dtype, device=pixels.device)
        mask[span[query], span[key]] = -torch.inf
        original = block.attn.forward
        block.attn.forward = lambda x, attn_mask=None, original=original, mask=mask, **k: original(x, attn_mask=mask)
        found.append(forward(module, pixels))
        block.attn.forward = original
    return torch.stack(found)


def forward_tokens(module: Module, pixels: torch.Tensor) -> int:
    """How many tokens images of this size have."""
    rows, columns = (side // module.patch_embed.patch_size[0] for side in pixels.shape[-2:])
    return module.num_prefix_tokens + rows * columns
