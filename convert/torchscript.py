"""The tensors of a TorchScript archive, such as OpenAI's CLIPs, read without running anything that is in it.

Such an archive is a zip file: `data.pkl` is a pickle of the module, whose tensors name members of `data/`; beside it
stands code. `torch.jit.load` compiles that code, and runs some of it. Here the code is not looked at, and the pickle
may make modules, lists and tensors alone.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from .engine import ConversionError

STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class Module:
    """What stands for every object of a class of the archive: its attributes, and no behaviour."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Reader(pickle.Unpickler):
    """Reads a pickle in which nothing but modules, lists and tensors can be made."""

    def __init__(self, content: bytes, storage: Callable[[str, Any], np.ndarray]):
        super().__init__(BytesIO(content))
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return tensor
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name]).type
        if module == "torch.jit._pickle" and (name.startswith("build_") or name == "restore_type_tag"):
            return first
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not trusted")

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, kind, key, *_ = pid
        return self.storage(str(key), kind)


def first(value: Any, *_: Any) -> Any:
    return value


def tensor(storage: np.ndarray, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min(offset, *size, *stride, 0) < 0 or (math.prod(size) and last >= len(storage)):
        raise ValueError("a tensor reaches beyond its storage")
    if math.prod(size) > len(storage):
        raise ValueError("a tensor claims more numbers than its storage has")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], tuple(size), steps, writeable=False)


def read_torchscript(path: Path) -> dict[str, np.ndarray]:
    """Name -> array of all tensors of the module in an archive.

    Raises:
      ConversionError: it is damaged, or holds something else than modules and tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
            root = root.partition("/")[0]
            storage = cache(partial(read_storage, archive, root))
            module = Reader(archive.read(f"{root}/data.pkl"), storage).load()
            return dict(tensors_of(module))
    except Exception as error:  # what a broken archive or pickle makes Python raise has no common class
        reason = " ".join(str(error).split()) or repr(error)
        raise ConversionError(f"{path} is not a complete TorchScript archive: {reason}") from error


def read_storage(archive: zipfile.ZipFile, root: str, key: str, kind: Any) -> np.ndarray:
    return np.frombuffer(archive.read(f"{root}/data/{key}"), kind)


def tensors_of(module: Any, prefix: str = "", within: tuple[int, ...] = ()) -> Iterator[tuple[str, np.ndarray]]:
    """Those of a module and of the modules in it, by their paths."""
    if not isinstance(module, Module) or id(module) in within:
        raise ValueError(f"expected a tree of modules, not a {type(module).__name__}")
    for name, value in dict(module.state).items():
        if isinstance(value, np.ndarray):
            yield f"{prefix}{name}", value
        elif isinstance(value, Module):
            yield from tensors_of(value, f"{prefix}{name}.", (*within, id(module)))
