"""What `torch.save` wrote, read without running anything that is in it.

torch's reader of `weights_only=True` makes tensors and plain containers, and refuses every other name. Checkpoints of a
training hold more: their settings, counters, a metric. For these names it is given stand-ins of this module. A
stand-in keeps nothing, looks nothing up and calls nothing, whatever it stands for, so that no name in a file leads to
the code of that name. NumPy's arrays are read, as weights may be NumPy's.

`SETTINGS` says for which names. Weights are in no object of theirs. All other names are refused: what they stand for
is not known here, and a file that names `os.system` is none to take weights from.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from .engine import ConversionError
from .files import first_sentence

SETTINGS = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|typing\.\w+|enum\.\w+|uuid\.UUID|datetime\.\w+"
    r"|decimal\.Decimal|fractions\.Fraction|collections\.defaultdict|pathlib(\._local)?\.\w*Path"
    # Enums of Python 3.11 are written as getattr(class, name); the others are plain values.
    r"|builtins\.(getattr|object|int|float|str|bool|bytes|list|tuple|dict|set|frozenset|slice|range)"
    r"|(omegaconf|yacs|fvcore|easydict|addict|ml_collections|munch|box)(\.\w+)+"
    r"|(mmcv|mmengine|detectron2)\.(\w+\.)*(config|logging|history_buffer)(\.\w+)+"
    r"|(pytorch_lightning|lightning|lightning_fabric|lightning_utilities|torchmetrics)(\.\w+)+"
    r"|numpy\.((u?int|float|complex)\d*|(bool|str|bytes)_?|random(\.\w+)+)"
)
"""Settings, as training scripts keep them beside weights: of argparse, of configuration libraries, of Lightning."""

NUMPY = re.compile(
    r"numpy\.(_?core\.(multiarray|numeric)\.(scalar|_reconstruct|_frombuffer)|ndarray|dtype|dtypes\.\w+)"
)


class Inert:
    """Stands for an object of a class, or what a function returns: made of anything, and nothing of it is kept."""

    __slots__ = ()

    def __new__(cls, *_: Any) -> Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


DICTS = re.compile(r"collections\.defaultdict|.*(Dict|CfgNode|Munch|Box)")


class Items:
    """Stands for a dict of another class: an OrderedDict, as the reader sets items and attributes of no other dict."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


def row(*_: Any) -> list[Any]:
    """Stands for a list of another class."""
    return []


class Dtype:
    """Stands for numpy.dtype: its letter and size, such as f4, and its byte order."""

    def __init__(self, code: Any = "", *_: Any):
        self.code, self.order = str(code), "="

    def __setstate__(self, state: Any) -> None:
        self.order = str(state[1])

    def numbers(self) -> np.dtype:
        if not re.fullmatch("[fiub][1248]", self.code) or self.order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"it holds an array of {self.code}, expected one of numbers")
        return np.dtype(self.order + self.code)


class Array:
    """Stands for numpy.ndarray: its numbers, once they are read; an array of objects has none."""

    def __init__(self, *_: Any):
        self.numbers = np.zeros(0)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return self.numbers

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, columns_first, content = state
        if isinstance(dtype, Dtype) and isinstance(content, bytes):
            self.numbers = np.frombuffer(content, dtype.numbers()).reshape(shape, order="F" if columns_first else "C")


def scalar(*_: Any) -> Inert:
    return Inert()


def reconstruct(*_: Any) -> Array:
    return Array()


def stand_in(name: str) -> Callable[..., Any] | None:
    """What takes the place of a name in a pickle; nothing if the name is refused."""
    if name == "collections.deque":
        return row
    if NUMPY.fullmatch(name):
        kind = name.rpartition(".")[2]
        return {"_reconstruct": reconstruct, "ndarray": Array, "dtype": Dtype, "scalar": scalar}.get(kind, Inert)
    return None if not SETTINGS.fullmatch(name) else Items if DICTS.fullmatch(name) else Inert


def load_pickle(path: Path, mapped: bool) -> Any:
    """The content of a file of torch.save.

    Args:
      mapped: whether tensors are mapped into memory, and read when they are used; for zip archives.

    Raises:
      ConversionError: it is damaged, or holds an object of a kind that is not known to be harmless.
    """
    try:
        import torch
    except ImportError:
        raise ConversionError(
            f"reading {path} needs torch: pip install torch, or convert a .safetensors file"
        ) from None
    given: dict[str, Callable[..., Any]] = {}
    while True:
        try:
            known = torch.serialization.safe_globals([(value, name) for name, value in given.items()])
            with warnings.catch_warnings(), known, ExitStack() as stack:
                warnings.simplefilter("ignore")  # what matters of what torch warns of, it then raises
                # torch would take the suffix for the truth.
                misnamed = path.suffix == ".safetensors"
                file = stack.enter_context(open(path, "rb")) if misnamed else path
                return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped and not misnamed)
        except pickle.UnpicklingError as error:
            name = refused(str(error))
            if name is None:
                reason = first_sentence(str(error).split("WeightsUnpickler error:")[-1])
                raise ConversionError(f"{path} is not a PyTorch file of tensors alone: {reason}") from error
            value = stand_in(name)
            if value is None or name in given:
                raise ConversionError(
                    f"{path} holds {name}, which is not trusted: nothing of a file is run here, so load it where it "
                    f"was made, and save the state dict alone, torch.save(model.state_dict(), ..)"
                ) from error
            given[name] = value  # and once more: the names of a pickle come before its tensors
        except Exception as error:  # what a broken pickle makes Python raise has no common class
            reason = first_sentence(str(error)) if isinstance(error, RuntimeError) else repr(error)
            if "magic number" in reason:
                reason = (
                    "a pickle that torch.save did not write; load it where it was made, and write it with torch.save"
                )
            raise ConversionError(f"{path} is not a complete PyTorch file: {reason}") from error


def refused(message: str) -> str | None:
    """The name that torch refuses, with its module; torch leaves out that of builtins."""
    found = re.search(r"GLOBAL (\S+)", message)
    name = found and found[1]
    return f"builtins.{name}" if name and "." not in name else name
