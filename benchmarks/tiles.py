"""How long attention takes on a CPU, in tiles of so many query rows and heads: what
`jaxvit.model.attention.ROWS`, `HEADS` and `TILE_BYTES` are chosen by.

    python -m benchmarks tiles

Each row of the table is one shape; its numbers are milliseconds, medians of runs that take turns. `whole` writes out
all scores at once. Takes five minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed import device_name
from benchmarks.timing import take_turns
from jaxvit.model import attention

SHAPES = {
    "S, 224 px, 1 image": (1, 261, 6),
    "S, 224 px, 2 images": (2, 261, 6),
    "S, 224 px, 8 images": (8, 261, 6),
    "B, 224 px, 2 images": (2, 261, 12),
    "S, 518 px, 1 image": (1, 1374, 6),
    "S, 518 px, 2 images": (2, 1374, 6),
}
"""Images, tokens and heads."""
ROWS = (64, 128, 192, 261, 352, 512)
HEADS = (1, 2, 3, 6)


def in_tiles(q: jax.Array, k: jax.Array, v: jax.Array, rows: int, heads: int) -> jax.Array:
    T, H = q.shape[1:3]
    parts = attention.cuts(H, -(-H // heads))
    numbers = np.arange(T)
    return jnp.concatenate(
        [attention.of_heads(q[:, r], k, v, numbers[r], None, parts) for r in attention.cuts(T, -(-T // rows))], axis=1
    )


def programs(tokens: int, heads: int) -> dict[str, Callable[..., jax.Array]]:
    found: dict[str, Callable[..., jax.Array]] = {
        "whole": lambda q, k, v: attention.attention(q, k, v, np.arange(tokens)),
        "as chosen": partial(attention.attention_in_tiles, first=0, factor=None),
    }
    for rows in (n for n in ROWS if n <= tokens):
        for some in (n for n in HEADS if n <= heads):
            if -(-tokens // rows) * -(-heads // some) <= 2 * attention.TILES:
                found[f"{rows} x {some}"] = partial(in_tiles, rows=rows, heads=some)
    return {name: jax.jit(run) for name, run in found.items()}


def measure(shape: tuple[int, int, int]) -> dict[str, float]:
    """Name -> milliseconds."""
    B, T, H = shape
    rng = np.random.default_rng(0)
    qkv = [jnp.asarray(rng.normal(size=(B, T, H, 64)), jnp.float32) for _ in range(3)]
    runs = {name: partial(lambda run: run(*qkv).block_until_ready(), run) for name, run in programs(T, H).items()}
    timed = take_turns(runs, seconds=40, rounds=(5, 15))
    return {name: 1e3 * timed.median(name) for name in runs}


def main() -> None:
    print(f"{device_name()}; rows x heads, in ms")
    for name, shape in SHAPES.items():
        found = measure(shape)
        fixed = {n: found.pop(n) for n in ("whole", "as chosen")}
        best = sorted(found, key=lambda n: found[n])[:5]
        told = [f"{n} {ms:.1f}" for n, ms in fixed.items()] + [f"{n} {found[n]:.1f}" for n in best]
        print(f"{name:20} {'   '.join(told)}", flush=True)
