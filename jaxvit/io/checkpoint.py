"""A model on disk: a folder of `model.safetensors` and `config.json`, and `parity.json` once it was verified."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from jaxvit.io.parallel import fetch
from jaxvit.io.provenance import Provenance, of_parity
from jaxvit.model.config import ViTConfig, unknown_fields
from jaxvit.model.params import abstract, enabled, from_params, matrix_shape, to_params
from jaxvit.model.vit import ViT

WEIGHTS, CONFIG, PARITY = "model.safetensors", "config.json", "parity.json"
TRAINING, CURVES, EVALUATE = "training.json", "curves.png", "evaluate.json"
"""What `jaxvit finetune` writes beside a model: how it was trained. It is gone when the folder is written anew."""
FORMAT = 3
READABLE_FROM = "0.1.0"
"""The first release that reads what this one writes: a new field of the config raises it, and leaves FORMAT alone.

FORMAT rises when the same fields or tensors mean something else. Then `load` brings older folders up to date."""

TYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(bool),
    "C64": np.dtype(np.complex64),
}
"""safetensors' names of types, and NumPy's."""
CODES = {dtype: code for code, dtype in TYPES.items()}

Put = Callable[[str, int, np.ndarray], None]
"""`put(name, start, values)` sets the numbers of a tensor from its `start`th on, its last axis running fastest."""


class CheckpointError(ValueError):
    """A folder that is not a complete jaxvit model, or cannot be written."""


class FormatError(CheckpointError):
    """A jaxvit model that another release wrote, and that this one does not read."""


def save(
    model: ViT, folder: str | os.PathLike[str], provenance: Provenance | None = None, *, overwrite: bool = False
) -> Path:
    """Writes the model to a new folder: all of it or nothing.

    Everything is written under a temporary name next to `folder`, which is then renamed.

    Args:
      provenance: where the weights come from. If the model's weights or config are not the ones it speaks of, the
        folder says so, and keeps no certificate of parity; else it keeps the certificate, if there is one.
      overwrite: replace `folder` if it already holds a jaxvit model; anything else is never replaced.

    Raises:
      CheckpointError: the folder exists, or cannot be written.

    Example:

        model, provenance = jaxvit.load("base", described=True)
        jaxvit.save(jaxvit.cast(model, "bfloat16"), "half", provenance)
    """
    arrays = fetch(to_params(model))
    with saving(folder, model.config, provenance, overwrite=overwrite) as weights:
        save_file(arrays, weights)
    return Path(folder)


@contextmanager
def saving(
    folder: str | os.PathLike[str], config: ViTConfig, provenance: Provenance | None = None, *, overwrite: bool = False
) -> Iterator[Path]:
    """Yields where to write the weights of a model of `config`. When the block succeeds, the model takes its place.

    See `save` for arguments and errors.
    """
    check_place(folder, overwrite)
    with replacing(Path(folder), (WEIGHTS, CONFIG, PARITY, TRAINING, CURVES, EVALUATE)) as temporary:
        weights = temporary / WEIGHTS
        yield weights
        weights.chmod(0o644)  # whatever the umask
        digest = sha256(weights)
        told = (provenance or Provenance()).compared(digest, dtype_of(SafetensorsFile(weights)), config)
        if told.parity is not None:
            write_json(temporary / PARITY, told.parity)
        content = {"format": FORMAT, "readable from": READABLE_FROM, "config": config.to_dict()}
        # Last: without it, what an interruption left would be no model.
        write_json(temporary / CONFIG, content | {"sha256": digest, "provenance": told.to_dict()})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """The checksum of a file, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(model: ViT) -> str:
    """The sha256 of the file of weights that `save` writes for this model. Writes no file.

    Example:

        checksum(model) == Provenance.weights  # the model still has the weights that it was loaded with
    """
    params = to_params(model)
    return checksum_of({name: (leaf.dtype, leaf.shape) for name, leaf in params.items()}, params.__getitem__)


def checksum_of(tensors: Mapping[str, tuple[DTypeLike, Sequence[int]]], read: Callable[[str], Any]) -> str:
    """The same for tensors of these dtypes and shapes. Each is read by name, one after the other."""
    header, starts = laid_out(tensors)
    digest = hashlib.sha256(header)
    for name in starts:
        digest.update(np.ascontiguousarray(read(name)).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def dtype_of(file: SafetensorsFile) -> str:
    """The type of the weights in a file; of several, all."""
    return ", ".join(sorted({file.dtype(name).name for name in file}))


def check_place(folder: str | os.PathLike[str], overwrite: bool) -> None:
    """Raises a CheckpointError unless a model may be written to `folder`."""
    folder = Path(folder)
    if any_entry(folder):
        try:
            read_config(folder)  # others keep a config.json too
        except FormatError:
            raise
        except CheckpointError as error:
            raise CheckpointError(f"{folder} exists and is not a jaxvit model: choose another folder") from error
        if not overwrite:
            raise CheckpointError(
                f"{folder} already holds a model: choose another folder, or give --overwrite (overwrite=True)"
            )


def save_file(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes a safetensors file, without a copy of the arrays that the library's own function makes."""
    with writing(path, {name: (array.dtype, array.shape) for name, array in arrays.items()}) as put:
        for name, array in arrays.items():
            put(name, 0, array)


@contextmanager
def writing(
    path: Path, tensors: Mapping[str, tuple[DTypeLike, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> Iterator[Put]:
    """Writes a safetensors file piece by piece, in any order; yields the function that does it.

    The header is written when the block succeeds: until then nobody takes the file for a complete one. All numbers must
    have been set by then.

    Args:
      tensors: name -> dtype and shape.
      metadata: texts of the header.

    Raises:
      ValueError: a type that safetensors files have no name for.
    """
    header, starts = laid_out(tensors, metadata)
    with open(path, "wb") as file:

        def put(name: str, start: int, values: np.ndarray) -> None:
            values = np.ascontiguousarray(values, np.dtype(tensors[name][0])).reshape(-1)
            file.seek(starts[name] + start * values.itemsize)
            file.write(values.view(np.uint8).data)  # Python's buffers know no bfloat16

        yield put
        file.seek(0)
        file.write(header)


def laid_out(
    tensors: Mapping[str, tuple[DTypeLike, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """How a safetensors file begins, and where each tensor starts in it, in their order. Raises as `writing`."""
    dtypes = {name: np.dtype(dtype) for name, (dtype, _) in tensors.items()}
    if foreign := sorted({dtype.name for dtype in dtypes.values() if dtype not in CODES}):
        raise ValueError(f"safetensors files hold no {', '.join(foreign)}")
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name)):  # the library's order: all aligned
        shape = list(tensors[name][1])
        starts[name], end = end, end + math.prod(shape) * dtypes[name].itemsize
        entries[name] = {"dtype": CODES[dtypes[name]], "shape": shape, "data_offsets": [starts[name], end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    header = len(header).to_bytes(8, "little") + header
    return header, {name: len(header) + start for name, start in starts.items()}


def any_entry(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


@contextmanager
def replacing(folder: Path, own: Collection[str]) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` if the block succeeds, and disappears if it fails.

    The next save of the same folder deletes temporary folders of killed processes.

    Args:
      own: patterns of names of what is written there; a folder that holds anything else is never replaced.
    """
    folder = folder.resolve()  # a link stays one
    try:
        present = [path.name for path in folder.iterdir()] if folder.exists() else []
        if foreign := [name for name in present if not any(fnmatchcase(name, pattern) for pattern in own)]:
            raise CheckpointError(f"{folder} holds other things, such as {foreign[0]}: choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.????????"):
            with claimed(leftover) as ours:
                if ours:
                    shutil.rmtree(leftover, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from None
    stack = ExitStack()
    stack.enter_context(claimed(temporary))
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
        stack.close()


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether this process has the folder for itself while the block runs; the claim ends with the process."""
    try:
        import fcntl
    except ImportError:  # not on Windows: what a killed process left stays there
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process has it, or the file system knows no locks
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """The same for one file: a temporary name that becomes `path` if the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")  # of this process of this machine
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

    Example:

        config, source = jaxvit.read_config("base")  # no weights are read
    """
    content = read_content(folder)
    return content["config"], dict(content["provenance"].source)


def read_content(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json in the present format, with its config as a ViTConfig and its provenance as a Provenance.

    `content["format"]` is the format that the folder is of. Raises as `read_config`.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise CheckpointError(
            f"{folder} {what}: expected a folder written by jaxvit.save or jaxvit convert; hub ids and PyTorch's files "
            "are read by jaxvit.convert.load"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stored, _ = content["format"], content["config"]  # other software may write the one, but not both
        if stored == 1:
            raise FormatError(f"{path} is of format 1, which jaxvit no longer reads: convert the model again")
        own, newer = own_version(), newer_release(content)
        if stored not in (2, FORMAT):
            reader = f"jaxvit {newer} or newer reads it" if newer else f"it reads formats 2 and {FORMAT}"
            raise FormatError(f"{path} is of format {stored}, which jaxvit {own} does not know: {reader}")
        if stored == 2:
            content = from_format_2(content)
        if unknown := unknown_fields(content["config"]):
            names = ", ".join(map(repr, unknown))
            reader = f"and jaxvit {newer} or newer reads it" if newer else "which has no such fields"
            raise FormatError(
                f"{path} has the fields {names}, which jaxvit {own} does not know: it is of format {stored}, {reader}"
            )
        config = ViTConfig.from_dict(content["config"])
        provenance = Provenance.from_dict(content["provenance"])
        return content | {"format": stored, "config": config, "provenance": provenance}
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not the config of a jaxvit model: {error!r}") from error


def from_format_2(content: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a folder of format 2, in the present format."""
    config = dict(content["config"])
    if not config.pop("head_bias"):  # of a CLIP, whose projection was called a classifier without a bias
        config |= {"classes": 0, "projection": config["classes"]}
    return {**content, "format": FORMAT, "config": config, "provenance": {"source": content["source"]}}


def newer_release(content: Mapping[str, Any]) -> str:
    """The first release that reads a config.json, if it is newer than this one; else an empty string."""
    first = str(content.get("readable from", ""))
    return first if numbers_of(first) > numbers_of(own_version()) else ""


def own_version() -> str:
    try:
        return version("jaxvit")
    except PackageNotFoundError:  # its folder is on the path, but it was not installed
        return "(not installed)"


def numbers_of(release: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", release)[:3]]


def read_parity(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The certificate of a model that was compared with its original, or None.

    Raises:
      CheckpointError: a parity.json that does not make sense.
    """
    path = Path(folder) / PARITY
    if not path.is_file():
        return None
    try:
        parity = json.loads(path.read_text(encoding="utf-8"))
        list(of_parity(parity))
        if "config" in parity:
            ViTConfig.from_dict(parity["config"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a certificate of parity: {error!r}") from error
    return parity


def describe(folder: str | os.PathLike[str]) -> Provenance:
    """Where the weights of a saved model come from, and how equal to their source they were found.

    Reads model.safetensors once, for its checksum: the provenance says so if it is not the file that was saved here.

    Raises:
      CheckpointError: as `read_config`, a parity.json that does not make sense, or no model.safetensors.

    Example:

        print(jaxvit.describe("base"))  # source: hub facebook/dinov2-with-registers-base at revision ..
    """
    folder = Path(folder)
    return provenance_of(folder, read_content(folder), SafetensorsFile(folder / WEIGHTS))


def provenance_of(folder: Path, content: Mapping[str, Any], file: SafetensorsFile) -> Provenance:
    config, told, digest = content["config"], content["provenance"], sha256(file.path)
    told = replace(told, parity=read_parity(folder)).compared(digest, dtype_of(file), config)
    if content["format"] == 2:
        # It names no checksum. That of the present format is the one to compare with from here on.
        shapes = {name: leaf.shape for name, leaf in to_params(abstract(config)).items()}
        tensors = {name: (file.dtype(name), shapes.get(name, file.shape(name))) for name in file}
        return replace(told, weights=checksum_of(tensors, file.__getitem__))
    if digest != content.get("sha256", digest):
        swapped = f"{WEIGHTS} is not the file that was saved here"
        return replace(told, changes=(swapped, *told.changes))
    return told


@overload
def load(folder: str | os.PathLike[str], *, described: Literal[False] = False) -> ViT: ...
@overload
def load(folder: str | os.PathLike[str], *, described: Literal[True]) -> tuple[ViT, Provenance]: ...
def load(folder: str | os.PathLike[str], *, described: bool = False) -> ViT | tuple[ViT, Provenance]:
    """Reads a model that `save` or `jaxvit convert` wrote.

    Args:
      described: whether to return `(model, provenance)`. That reads the file once more, for its checksum.

    Raises:
      CheckpointError: a missing, truncated or foreign file, or parameters whose names, shapes or dtypes do not fit
        the config; all offenders are listed.

    Example:

        model, provenance = jaxvit.load("base", described=True)
    """
    folder = Path(folder)
    content = read_content(folder)
    config, file = content["config"], SafetensorsFile(folder / WEIGHTS)
    expected = to_params(abstract(config))
    dtypes = {file.dtype(name).name for name in file}
    # The numbers of format 2 come in today's order, in some tensors under other axes.
    stored = {name: tuple(leaf.shape) for name, leaf in expected.items()}
    if content["format"] == 2:  # where heads have no axes of their own
        stored = {name: matrix_shape(name, shape) for name, shape in stored.items()}
    problems = [f"{name} is missing" for name in expected if name not in file]
    problems += [f"{name} is not expected" for name in file if name not in expected]
    problems += [
        f"{name} has shape {list(file.shape(name))}, expected {list(stored[name])}"
        for name in file
        if name in expected and file.shape(name) != stored[name]
    ]
    if len(dtypes) > 1 or not dtypes <= {"float32", "float16", "bfloat16", "float64"}:
        problems.append(f"dtypes are {sorted(dtypes)}, expected one floating-point type")
    elif not all(map(enabled, dtypes)):
        problems.append(f"parameters are {dtypes.pop()}, which JAX has disabled: set JAX_ENABLE_X64=1")
    if problems:
        raise CheckpointError(f"{folder / WEIGHTS} does not fit its config: " + "; ".join(problems))
    params = {name: jax.device_put(file[name].reshape(expected[name].shape)) for name in file}
    model = from_params(config, params)
    return (model, provenance_of(folder, content, file)) if described else model


def empty(shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
    """As `np.empty`, but where JAX on a CPU takes it as it is. Of what is not aligned so it makes copies."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(count + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + count].view(dtype).reshape(shape)


class SafetensorsFile(Mapping[str, np.ndarray]):
    """The tensors of a safetensors file, each read from disk when it is asked for.

    Raises:
      CheckpointError: a missing, truncated or foreign file.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist")
        try:
            with safe_open(path, framework="numpy"):  # which checks the header, and that the file is as long as it says
                pass
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self.entries: dict[str, dict[str, Any]] = json.loads(file.read(length))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from error
        self.entries.pop("__metadata__", None)
        self.path, self.data = path, 8 + length
        types = {name: entry["dtype"] for name, entry in self.entries.items()}
        if foreign := [f"{name} ({type})" for name, type in types.items() if type not in TYPES]:
            raise CheckpointError(f"{path} holds types that NumPy cannot read: {', '.join(foreign)}")

    def dtype(self, name: str) -> np.dtype:
        """The type of a tensor, which is not read."""
        return TYPES[self.entries[name]["dtype"]]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""
        return tuple(self.entries[name]["shape"])

    def __getitem__(self, name: str) -> np.ndarray:
        array = empty(self.shape(name), self.dtype(name))
        try:
            # Read and not mapped: pages of a mapped file stay with the process, which then seems to hold them all.
            with open(self.path, "rb") as file:
                file.seek(self.data + self.entries[name]["data_offsets"][0])
                count = file.readinto(array.reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from error
        if count != array.nbytes:
            raise CheckpointError(f"{self.path} is not a complete safetensors file: it has become shorter")
        return array

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)
