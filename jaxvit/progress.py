"""Progress bars, for those who have tqdm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], what: str, total: int | None = None, enabled: bool = True) -> Iterator[T]:
    """The items, with a bar on stderr while they are used; silently without tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iter(items)
    return iter(tqdm(items, desc=what, total=total, disable=not enabled))
