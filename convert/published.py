"""How many heads published models have: tensors do not show it, and it is not always width / 64.

A number is *known* where the names of the tensors belong to one family, and that family published this width and depth
with one number of heads alone. Elsewhere it is an assumption, which is kept with the model, or it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .catalogue import known
from .engine import ConversionError

Kind = tuple[str, int, int, int]
"""Family, width, depth, heads."""

OTHERS: tuple[Kind, ...] = (
    ("MoCo v3", 384, 12, 12),
    ("MAE", 1280, 32, 16),
)
"""Published in the names of Meta's models, and in no list of this converter."""


@cache
def architectures() -> dict[str, dict[str, Any]]:
    """timm's names -> `convert.timm.FACTS`, preparation and shape (depth, width, whether it has [CLS]), or
    {"refused": why}; written by `python -m benchmarks architectures`."""
    return json.loads((Path(__file__).with_name("architectures.json")).read_text(encoding="utf-8"))


@cache
def kinds() -> tuple[Kind, ...]:
    """All that are known here and have [CLS]."""
    own = [(each.family, each.config.width, each.config.depth, each.config.heads) for each in known()]
    timm = [
        ("timm", width, depth, facts["heads"])
        for name, facts in architectures().items()
        for depth, width, cls in [facts.get("shape", (0, 0, False))]
        if cls and not name.startswith("test_")  # timm's own tests use them
    ]
    return (*own, *timm, *OTHERS)


def heads(width: int, depth: int, families: Sequence[str], alone: bool = True) -> tuple[int, str]:
    """The number of heads, and why it is an assumption: nothing where it is known.

    Args:
      families: those whose names the tensors have; none if they stand under names of no family.
      alone: whether no other family uses these names.

    Raises:
      ConversionError: models of this width were published with several numbers of heads.
    """
    of_width = [kind for kind in kinds() if kind[1] == width]
    own = [kind for kind in of_width if kind[0] in families]
    same = [kind for kind in own if kind[2] == depth]
    near = counts(same) or counts(own)
    others = counts(of_width) - near
    if len(near) == 1:
        (count,) = near
        if same and (alone or not others):
            return count, ""
        why = f"{'width / 64, ' if count * 64 == width else ''}as in {' and '.join(families)}"
        different = named(kind for kind in of_width if kind[3] != count)
        return count, why + (f"; there are {different}" if others else "")
    if near or others - {width // 64} or width % 64:
        example = max(counts(of_width), key=lambda n: (n != width // 64, n), default=max(width // 64, 1))
        raise ConversionError(
            f"the tensors do not tell the number of heads, and at width {width} it is not always the same"
            f"{f' ({named(of_width)})' if of_width else ''}: say the one that this model was trained with, such as "
            f"--set heads={example} (config={{'heads': {example}}})"
        )
    return width // 64, "width / 64"


def counts(kinds: Iterable[Kind]) -> set[int]:
    return {kind[3] for kind in kinds}


def named(kinds: Iterable[Kind]) -> str:
    """For example "6 in DINO and timm, 12 in MoCo v3"."""
    families: dict[int, list[str]] = {}
    for family, _, _, count in kinds:
        found = families.setdefault(count, [])
        found += [family] * (family not in found)
    return ", ".join(f"{n} in {' and '.join(names)}" for n, names in families.items())
