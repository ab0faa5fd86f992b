"""Which compiled programs the library's functions run, and with which arguments: to lower them for other platforms."""

import sys
from contextlib import contextmanager
from typing import Any

import jax
import pytest

Jitted = type(jax.jit(lambda: None))


class Recorder:
    """A jitted function that notes what it is called with, outside of other programs."""

    def __init__(self, inner: Any, seen: list[tuple[Any, tuple, dict]]):
        self.inner, self.seen = inner, seen

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs))):
            self.seen.append((self.inner, *jax.tree.map(shaped, (args, kwargs))))
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def shaped(leaf: Any) -> Any:
    """A leaf without its numbers, which a program may overwrite; its place among devices stays."""
    if not isinstance(leaf, jax.Array) or not leaf.committed:
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


@contextmanager
def recorded():
    """Yields a list to which all programs that jaxvit's own code runs are added: function, arguments, keywords."""
    seen: list[tuple[Any, tuple, dict]] = []
    plain = jax.jit

    def jit(*args: Any, **kwargs: Any) -> Any:
        made = plain(*args, **kwargs)
        asked_by = sys._getframe(1).f_globals.get("__name__", "")
        return Recorder(made, seen) if asked_by.startswith("jaxvit.") else made

    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("jaxvit"):
                for each, value in list(vars(module).items()):
                    if isinstance(value, Jitted):
                        patch.setattr(module, each, Recorder(value, seen))
        patch.setattr(jax, "jit", jit)
        yield seen
