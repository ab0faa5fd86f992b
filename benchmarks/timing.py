"""Timing on machines that do other things too: alternatives take turns, and only quotients of neighbours count."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import jax
import numpy as np

# Not tracing, which is reported for every function within another: it counts as part of the run.
COMPILING = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")


@contextmanager
def compiling() -> Iterator[list[float]]:
    """Collects the seconds that JAX spends on lowering and compiling within it."""
    found: list[float] = []

    def listen(event: str, seconds: float, **_: object) -> None:
        if event in COMPILING:
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


class Timed(NamedTuple):
    """Seconds of each alternative in each round, and how often they took turns."""

    seconds: dict[str, np.ndarray]

    def median(self, name: str) -> float:
        return float(np.median(self.seconds[name]))

    def ratio(self, name: str, other: str) -> float:
        """The median over rounds of how many times as long `name` took as `other` in the same round."""
        return float(np.median(self.seconds[name] / self.seconds[other]))


def take_turns(
    alternatives: Mapping[str, Callable[[], object]], seconds: float = 20.0, rounds: tuple[int, int] = (5, 40)
) -> Timed:
    """Runs every alternative once untimed, then all of them in turn.

    Each must wait for its result, and may return how many of its seconds do not count. Odd rounds go backwards, so that
    nobody is always first.

    Args:
      seconds: when to stop, once the least number of rounds is done.
      rounds: least and most.
    """
    for run in alternatives.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in alternatives}
    begin, n = time.perf_counter(), 0
    while n < rounds[0] or (n < rounds[1] and time.perf_counter() - begin < seconds):
        for name in list(alternatives)[:: 1 if n % 2 == 0 else -1]:
            start = time.perf_counter()
            result = alternatives[name]()
            found[name].append(time.perf_counter() - start - (result if isinstance(result, float) else 0.0))
        n += 1
    return Timed({name: np.array(times) for name, times in found.items()})
