"""What kind of file this is, from its first bytes: people name the same file .pth, .pth.tar, .pyth, .model, or nothing.

A suffix only chooses the words of an error, for a file whose bytes say nothing.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from .engine import ConversionError

Kind = Literal["safetensors", "zip", "pickle", "onnx"]
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".pyth", ".pkl")
SUFFIXES: Mapping[str, Kind] = {".safetensors": "safetensors", ".onnx": "onnx", **dict.fromkeys(PICKLES, "pickle")}

FOREIGN: tuple[tuple[int, bytes, str], ...] = (
    (
        0,
        b"version https://git-lfs",
        "a Git-LFS pointer, which stands for weights that were not downloaded: run `git lfs pull` in its repository, "
        "or download the file itself",
    ),
    (0, b"\x1f\x8b", "compressed by gzip: unpack it (gunzip, or tar xzf) and give the file in it"),
    (0, b"BZh", "compressed by bzip2: unpack it (bunzip2, or tar xjf) and give the file in it"),
    (0, b"\xfd7zXZ\x00", "compressed by xz: unpack it (unxz, or tar xJf) and give the file in it"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by Zstandard: unpack it (unzstd) and give the file in it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it and give the file in it"),
    (0, b"Rar!", "a RAR archive: unpack it and give the file in it"),
    (257, b"ustar", "a tar archive: unpack it (tar xf) and give the file in it"),
    (0, b"\x89HDF", "an HDF5 file, such as Keras writes: convert the PyTorch checkpoint of the model"),
    (0, b"\x93NUMPY", "a single NumPy array: expected a file of named tensors"),
    (0, b"GGUF", "a GGUF file, whose weights are quantised: convert the PyTorch checkpoint of the model"),
    (4, b"TFL3", "a TensorFlow Lite model: convert the PyTorch checkpoint of the model"),
    (0, b"<", "a web page or XML, perhaps the page of a download that failed: download the file itself"),
)
"""Offset, bytes that stand there, and what such a file is and what to do."""


def kind_of(path: Path) -> Kind:
    """The kind of a file of weights.

    Raises:
      ConversionError: it is something else; the message says what, and what to do.
    """
    with open(path, "rb") as f:
        head = f.read(262)
    # The length of a header of JSON, in 8 bytes, and its first brace.
    if head[8:9] == b"{" and head[5:8] == bytes(3):
        return "safetensors"
    if head[:4] == b"PK\x03\x04":
        return "zip"
    for at, magic, what in FOREIGN:
        if head[at:].startswith(magic):
            raise ConversionError(f"{path} is {what}")
    if head[:1] == b"\x80":
        return "pickle"
    if is_onnx(head):
        return "onnx"
    if head.lstrip()[:1] in (b"{", b"["):
        raise ConversionError(f"{path} holds no tensors but JSON: give the folder that holds it, {path.parent}")
    if kind := SUFFIXES.get(path.suffix.lower()):
        return kind
    what = f"starts with {head[:8]!r}" if head else "is empty"
    raise ConversionError(
        f"{path} is of no known kind, it {what}: expected what safetensors, "
        f"torch.save, TorchScript or ONNX write (.safetensors, .pth, .pt, .bin, .ckpt, .onnx)"
    )


def is_onnx(head: bytes) -> bool:
    """Whether this is protobuf as ONNX starts: the version of its format, then the producer, or the graph."""
    return bool(re.match(rb"\x08[\x03-\x20][\x12\x1a\x22\x28\x32\x3a\x42]", head))


INFLATED = 2**26
"""Bytes that the compressed members of an archive, the code of TorchScript, may take beyond the size of the file."""


def is_torchscript(path: Path) -> bool:
    """Whether a zip archive is one of TorchScript, as OpenAI's CLIPs are. Archives are never extracted.

    Raises:
      ConversionError: it claims to hold more than a file of its size can, or it is no archive of PyTorch.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ConversionError(f"{path} is not a complete PyTorch file: {first_sentence(str(error))}") from error
    claimed = sum(member.file_size for member in members)
    if claimed > path.stat().st_size + INFLATED:
        raise ConversionError(
            f"{path} claims to hold {claimed:,} bytes in a file of {path.stat().st_size:,}: "
            f"expected an archive of torch.save, which compresses no tensors"
        )
    names = [member.filename for member in members]
    if names and all(name.endswith(".npy") for name in names):
        raise ConversionError(
            f"{path} is an archive of NumPy arrays: give them as a dict, convert.load(dict(np.load(..)))"
        )
    inside = [name.partition("/")[2] for name in names]
    if "data.pkl" not in inside and (held := [name for name in names if Path(name).suffix.lower() in SUFFIXES]):
        raise ConversionError(f"{path} is a zip archive of files: unpack it and give the one in it, {held[0]}")
    return "constants.pkl" in inside and any(name.startswith("code/") for name in inside)


def first_sentence(message: str) -> str:
    message = re.sub(r"^\[enforce fail at [^\]]*\][\s.]*", "", message.strip())  # a line of torch's own source
    return re.split(r"\.\s|\n", message)[0]
