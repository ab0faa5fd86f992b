"""Progress bars, for those who have tqdm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], what: str, enabled: bool = True) -> Iterator[T]:
    """The items, with a bar on stderr while they are used; silently without tqdm."""
    with bar(what, length(items), enabled) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def bar(what: str, total: int | None, enabled: bool = True, initial: int = 0) -> Iterator[Callable[[int], object]]:
    """A bar on stderr, and the function that moves it; without tqdm a function that does nothing.

    Args:
      total: how many steps there are, if that is known.
      initial: how many are done already.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda steps: None
        return
    with tqdm(desc=what, total=total, initial=initial, disable=not enabled) as shown:
        yield shown.update


def length(items: Iterable[object]) -> int | None:
    """How many, where that is known beforehand."""
    return len(items) if hasattr(items, "__len__") else None  # pyright: ignore[reportArgumentType]
