"""Options of commands that run programs: keep what was compiled, and write a profile."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def add_machine(parser: argparse.ArgumentParser) -> None:
    """--compilation-cache and --profile; `on_machine` does what they ask for."""
    group = parser.add_argument_group("the machine")
    group.add_argument(
        "--compilation-cache",
        type=Path,
        metavar="DIR",
        help="keep compiled programs here, and use those that are: the next start takes less time",
    )
    group.add_argument(
        "--profile", type=Path, metavar="DIR", help="write a profile for xprof: which operations took how long"
    )


@contextmanager
def on_machine(options: argparse.Namespace) -> Iterator[None]:
    """Runs the block with what `add_machine`'s options ask for. The library itself never sets a cache.

    Raises:
      ValueError: a folder that cannot be written.
    """
    for name in ("compilation_cache", "profile"):
        place = getattr(options, name)
        if place is None:
            continue
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--{name.replace('_', '-')} {place}: {error.strerror}") from error
        if not os.access(place, os.W_OK):
            raise ValueError(f"--{name.replace('_', '-')} {place}: not to be written to")
    with cached(options.compilation_cache), profiled(options.profile):
        yield


LEAST = 0.1
"""Seconds of compiling from which a program is kept. JAX's own default is 1; commands compile many that take less."""


@contextmanager
def cached(folder: Path | None) -> Iterator[None]:
    """Keeps compiled programs in a folder while the block runs."""
    if folder is None:
        yield
        return
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": LEAST}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX opens a cache once
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@contextmanager
def profiled(folder: Path | None) -> Iterator[None]:
    """Writes a profile of the block, also of one that fails, and says where."""
    if folder is None:
        yield
        return
    import jax

    try:
        with jax.profiler.trace(str(folder)):
            yield
    finally:
        print(f"wrote a profile; to see it: pip install xprof; xprof --logdir {folder}", file=sys.stderr)
