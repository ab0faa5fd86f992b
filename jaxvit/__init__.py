"""Vision Transformers as JAX values: every internal token and attention weight can be read.

model = jaxvit.load(folder)
out = model(jaxvit.prepare("photo.jpg", model.config), record=("pattern",))
out.cls, out.registers, out.patches, out.trace["pattern"]

All names are those of `jaxvit.api`. They are loaded when the first of them is used, so that `jaxvit --help` answers
without waiting for JAX.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxvit.api import *  # noqa: F403

if not Path(__file__).with_name("convert").is_dir():  # a checkout: they lie beside this folder
    __path__.append(str(Path(__file__).parents[1]))  # noqa: F405


def __getattr__(name: str) -> Any:
    if name != "__all__" and name.startswith("__"):
        raise AttributeError(f"module 'jaxvit' has no attribute {name!r}")
    # Not `from jaxvit import api`, which would ask this function for `api`.
    api = importlib.import_module("jaxvit.api")
    globals().update({each: getattr(api, each) for each in api.__all__}, __all__=api.__all__)
    if name not in globals():
        raise AttributeError(f"module 'jaxvit' has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
