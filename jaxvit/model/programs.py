"""Functions that users give, as static arguments of compiled programs.

`jax.jit` keeps what a function captured when it was first traced, and takes another lambda for another program. Here
neither holds: a function is traced anew at each call, which takes milliseconds, and compiled anew only if what it
computes is new.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer

T = TypeVar("T")


class Program:
    """A function, equal to another one if both compute the same of arguments like these.

    What it captures, such as arrays of an enclosing scope, is part of what it computes.

    Args:
      function: of arrays, or pytrees of them.
      arguments: arrays, or `jax.ShapeDtypeStruct` in their place.
      differentiated: whether gradients with respect to the first argument must be the same too.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, differentiated: bool = False):
        self.function = function

        def traced(*args: Any) -> Any:  # a new function each time: of an old one, JAX would take what it captured then
            if not differentiated:
                return function(*args)
            values, pull_back = jax.vjp(lambda first: function(first, *args[1:]), args[0])
            return values, pull_back(jax.tree.map(jnp.ones_like, values))

        try:
            lowered = jax.jit(traced).lower(*arguments)
            text = lowered.as_text()
            result = jax.tree.structure(lowered.out_info)
            self.key: Any = (hashlib.sha256(text.encode()).digest(), result, lowered.in_tree)
        except TypeError:  # it returns what is no array: whoever runs it says so
            self.key = object()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key if not isinstance(self.key, tuple) else self.key[0])


def kept(maxsize: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Keeps what a function builds of programs, and finds it again for equal ones.

    It must call `program.function` when it is traced, and no earlier: the kept programs get the functions of the newest
    call. Other sizes are traced later, and what an older function captured may have changed by then. Few are kept, as
    they keep what their functions hold.
    """

    def decorate(build: Callable[..., T]) -> Callable[..., T]:
        @lru_cache(maxsize=maxsize)
        def found(*args: Any) -> tuple[tuple[Any, ...], T]:
            return args, build(*args)

        def newest(*args: Any) -> T:
            old, built = found(*args)
            for before, now in zip(old, args, strict=True):
                if isinstance(before, Program):
                    before.function = now.function
            return built

        return newest

    return decorate


def is_traced(arguments: Any, *functions: Callable[..., Any]) -> bool:
    """Whether this is part of a program that JAX traces: by `jit`, `grad`, `vmap` and the like.

    What the functions capture is looked at too.
    """
    leaves = jax.tree.leaves((arguments, [captured(function) for function in functions]))
    return any(isinstance(leaf, Tracer) for leaf in (*leaves, jnp.zeros(()) + 0))


def captured(function: Any, seen: frozenset[int] = frozenset()) -> list[Any]:
    """What a function holds of the scopes around it, and what functions among that hold."""
    if isinstance(function, partial):
        held = [function.func, *function.args, *function.keywords.values()]
    else:
        held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if filled(cell)]
    seen = seen | {id(function)}
    inner = [captured(each, seen) for each in held if callable(each) and id(each) not in seen]
    return [each for each in held if not callable(each)] + inner


def filled(cell: Any) -> bool:
    """Whether a variable of an enclosing scope has a value by now."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
