"""A model on disk: a folder of `model.safetensors` and `config.json`, and `parity.json` once it was verified."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxvit.config import ViTConfig
from jaxvit.params import abstract, enabled, from_params, to_params
from jaxvit.vit import ViT

WEIGHTS, CONFIG, PARITY = "model.safetensors", "config.json", "parity.json"
FORMAT = 1


class CheckpointError(ValueError):
    """A folder that is not a complete jaxvit model, or cannot be written."""


def save(
    model: ViT, folder: str | os.PathLike[str], *, source: Mapping[str, Any] | None = None, overwrite: bool = False
) -> Path:
    """Writes the model to a new folder: all of it or nothing.

    Everything is written under a temporary name next to `folder`, which is then renamed.

    Args:
      source: where the weights come from, kept in config.json (names, checksums, versions).
      overwrite: replace `folder` if it already holds a jaxvit model; anything else is never replaced.

    Raises:
      CheckpointError: the folder exists, or cannot be written.
    """
    folder = Path(folder)
    if any_entry(folder):
        try:
            read_config(folder)  # others keep a config.json too
        except CheckpointError as error:
            raise CheckpointError(f"{folder} exists and is not a jaxvit model: choose another folder") from error
        if not overwrite:
            raise CheckpointError(f"{folder} already holds a model: choose another folder, or overwrite it")
    config = {"format": FORMAT, "config": model.config.to_dict(), "source": dict(source or {})}
    arrays = {name: np.asarray(leaf) for name, leaf in to_params(model).items()}
    with replacing(folder, (WEIGHTS, CONFIG, PARITY)) as temporary:
        save_file(arrays, temporary / WEIGHTS)
        (temporary / WEIGHTS).chmod(0o644)  # safetensors makes its files private
        (temporary / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    return folder


def any_entry(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


@contextmanager
def replacing(folder: Path, own: Collection[str]) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` if the block succeeds, and disappears if it fails.

    Args:
      own: patterns of names of what is written there; a folder that holds anything else is never replaced.
    """
    folder = folder.resolve()  # a link stays one
    try:
        present = [path.name for path in folder.iterdir()] if folder.exists() else []
        if foreign := [name for name in present if not any(fnmatchcase(name, pattern) for pattern in own)]:
            raise CheckpointError(f"{folder} holds other things, such as {foreign[0]}: choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from None
    old = temporary.with_name(temporary.name + ".old")
    try:
        temporary.chmod(0o755)  # mkdtemp makes it private
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for leftover in (old, temporary):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """The same for one file: a temporary name that becomes `path` if the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def read_config(folder: str | os.PathLike[str]) -> tuple[ViTConfig, dict[str, Any]]:
    """The config of a saved model, and what is known of its source.

    Raises:
      CheckpointError: no such folder, no config.json in it, or one that does not make sense.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise CheckpointError(f"{folder} {what}: expected a folder written by jaxvit.save or python -m convert")
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path} is of format {content['format']}; this version reads format {FORMAT}")
        return ViTConfig.from_dict(content["config"]), content["source"]
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not the config of a jaxvit model: {error!r}") from error


def load(folder: str | os.PathLike[str]) -> ViT:
    """Reads a model that `save` or `python -m convert` wrote.

    Raises:
      CheckpointError: a missing, truncated or foreign file, or parameters whose names, shapes or dtypes do not fit
        the config; all offenders are listed.
    """
    folder = Path(folder)
    config, _ = read_config(folder)
    arrays = dict(SafetensorsFile(folder / WEIGHTS))
    expected = to_params(abstract(config))
    dtypes = {str(a.dtype) for a in arrays.values()}
    problems = [f"{name} is missing" for name in expected if name not in arrays]
    problems += [f"{name} is not expected" for name in arrays if name not in expected]
    problems += [
        f"{name} has shape {list(a.shape)}, expected {list(expected[name].shape)}"
        for name, a in arrays.items()
        if name in expected and a.shape != expected[name].shape
    ]
    if len(dtypes) > 1 or not dtypes <= {"float32", "float16", "bfloat16", "float64"}:
        problems.append(f"dtypes are {sorted(dtypes)}, expected one floating-point type")
    elif not all(map(enabled, dtypes)):
        problems.append(f"parameters are {dtypes.pop()}, which JAX has disabled: set JAX_ENABLE_X64=1")
    if problems:
        raise CheckpointError(f"{folder / WEIGHTS} does not fit its config: " + "; ".join(problems))
    return from_params(config, {name: jnp.asarray(a) for name, a in arrays.items()})


class SafetensorsFile(Mapping[str, np.ndarray]):
    """The tensors of a safetensors file, each read from disk when it is asked for.

    Raises:
      CheckpointError: a missing, truncated or foreign file.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist")
        try:
            self.file = safe_open(path, framework="numpy")
            self.names = list(self.file.keys())
            types = {name: self.file.get_slice(name).get_dtype() for name in self.names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from error
        if foreign := [f"{name} ({type})" for name, type in types.items() if type.startswith(("F8_", "F6_", "F4"))]:
            raise CheckpointError(f"{path} holds types that NumPy cannot read: {', '.join(foreign)}")

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.names:
            raise KeyError(name)
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
