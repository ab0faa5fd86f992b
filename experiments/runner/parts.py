"""A pass over images that several processes share: each measures a part, and all parts are put together in order.

Parts lie in the pass's own folder, which all processes see: parts/BEGIN is a pass over the images from that number on.
After an interruption, what no part holds yet is shared anew, whatever the number of processes is then.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

import jax

from jaxvit.io import parallel

from .store import Store, check_some

FOLDER = "parts"


def parts_of(store: Store) -> list[int]:
    """Where the parts of a pass begin, in order."""
    return sorted(int(path.name) for path in (store.folder / FOLDER).glob("*") if path.name.isdigit())


def run_parts(store: Store, images: int, measure: Callable[[Store, tuple[int, int]], object]) -> None:
    """Measures all images that neither the store nor its parts have seen, and leaves all of them in the store.

    All processes call this at the same time.

    Args:
      images: how many there are.
      measure: `measure(part, (begin, end))`, of images for this process.

    Raises:
      RuntimeError: a process could not measure its part; in all of them, so that they go on together.
      ImageError: not one image can be used.
    """
    parallel.wait("parts: none is being written")
    known = {begin: opened(store, begin) for begin in parts_of(store)}
    parallel.wait("parts: all have seen what there is")
    if not store.done:
        covered = [(0, store.next), *((begin, max(part.next, begin)) for begin, part in known.items())]
        behind = {part.next: begin for begin, part in known.items() if part.next > begin}
        failure: Exception | None = None
        try:
            for begin, end in dealt(missing(covered, images), jax.process_index(), jax.process_count()):
                measure(opened(store, behind.get(begin, begin)), (behind.get(begin, begin), end))
        except OSError:
            raise
        except Exception as error:
            failure = error
        if failure and jax.process_count() == 1:
            raise failure
        for process, reason in enumerate(parallel.told(repr(failure) if failure else "")):
            if reason:
                raise RuntimeError(f"process {process}: {reason}") from failure
        if jax.process_index() == 0:
            for begin in parts_of(store):
                part = opened(store, begin)
                if part.next <= begin:
                    continue
                if begin != store.next:
                    raise ValueError(f"{store.folder} lacks the images from {store.next} to {begin - 1}: remove it")
                store.append(part)
            if store.next != images:
                raise ValueError(f"{store.folder} lacks the images from {store.next} on: remove it")
            store.save(done=True)
        parallel.wait("parts: together")
        if jax.process_index():
            store.reload()
    if jax.process_index() == 0:
        shutil.rmtree(store.folder / FOLDER, ignore_errors=True)
    check_some(store, images)


def opened(store: Store, begin: int) -> Store:
    return Store(store.folder / FOLDER / f"{begin:09}", {**store.settings, "begin": begin})


def missing(covered: list[tuple[int, int]], of: int) -> list[tuple[int, int]]:
    """The ranges of `of` numbers that no range covers, in order."""
    found, at = [], 0
    for begin, end in [*sorted(each for each in covered if each[0] < each[1]), (of, of)]:
        if begin > at:
            found.append((at, begin))
        at = max(at, end)
    return found


def dealt(ranges: list[tuple[int, int]], me: int, count: int) -> list[tuple[int, int]]:
    """The part of ranges that is for one of `count` processes; all have as many numbers, up to one."""
    total = sum(end - begin for begin, end in ranges)
    first, last = (total * i // count for i in (me, me + 1))
    mine, before = [], 0
    for begin, end in ranges:
        low, high = begin + max(first - before, 0), begin + min(last - before, end - begin)
        if low < high:
            mine.append((low, high))
        before += end - begin
    return mine
