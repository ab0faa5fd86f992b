"""The experiments of Lappe & Giese 2025, and what goes beyond them: `jaxvit run --help`.

Its rooms, whose imports run one way: `core` (what an experiment is made of), `models` (what is studied), `paper` (A1 to
A9), `beyond` (B1 to B7), `report` (pages for people), `runner` (which runs them all).
"""

from typing import Any

if __name__ == "experiments":  # in a checkout, this is jaxvit.experiments
    from jaxvit.checkout import alias

    alias(__name__)


def __getattr__(name: str) -> Any:
    """`embedded`, imported when it is used: it needs JAX."""
    if name != "embedded":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jaxvit.io import embedded

    return embedded
