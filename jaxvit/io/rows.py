"""Features on disk: arrays with one row for each image, their names and labels, and what they are.

While a run goes on, all of it lies in a folder beside the file, PLACE.partial. Each batch is written there, and then
what is done is noted. A run that was killed goes on from that note, and what was written behind it is written again. At
the end, the file takes its place in one step: a file that is there is complete.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from jaxvit.io.checkpoint import SafetensorsFile, claimed, writing

NAMES, LABELS, HEADER = "names", "labels", "header"
"""What is in a file beside the arrays; no array may be called so."""

AT_ONCE = 2**24
"""Bytes that are copied at once."""


class FeaturesError(ValueError):
    """Features that cannot be written or read; the message says why, and what to do."""


class Features(Mapping[str, Any]):
    """Arrays of features by name, [images, ..], and what is known of the images.

    Attributes:
      names: of the images, in the order of rows.
      labels: of the images, [images]; None where there are none.
      header: the model, its weights' checksum, the preparation, what was read, which images were left out, versions.

    Example:

        found = jaxvit.read_features("features.zarr")
        found["cls"][0], found.names[0], found.header["model"]
    """

    def __init__(
        self, arrays: Mapping[str, Any], names: Sequence[str], labels: np.ndarray | None, header: Mapping[str, Any]
    ):
        self.arrays: dict[str, Any] = dict(arrays)
        self.names: list[str] = list(names)
        self.labels: np.ndarray | None = labels
        self.header: dict[str, Any] = dict(header)

    def __getitem__(self, name: str) -> Any:
        if name not in self.arrays:
            raise KeyError(f"no array {name!r}; there are {', '.join(self.arrays)}")
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def __repr__(self) -> str:
        each = ", ".join(f"{name}: {array.dtype}{list(array.shape)}" for name, array in self.arrays.items())
        return f"Features({each}; {len(self.names)} images, {'with' if self.labels is not None else 'without'} labels)"


# Writing --------------------------------------------------------------------------------------------------------------


class Writer(ABC):
    """Writes features as they come. Use it as a context; `finish` puts the file in its place.

    Args:
      place: the file, or the folder of a Zarr group.
      header: what the features depend on; JSON. A run goes on only where it is the same.
      resume: go on with what an earlier run left.
      overwrite: replace what is there.

    Attributes:
      rows: how many are done.
      next: number of the image that comes next.
      left_out: name and reason of each image that could not be used.
      complete: whether the file is there, and nothing remains to be done.

    Raises:
      FeaturesError: something is there already, another run is writing, or the header is another one.
    """

    def __init__(self, place: Path, header: Mapping[str, Any], *, resume: bool, overwrite: bool, batch_size: int):
        self.place, self.header, self.batch_size = place, header, batch_size
        self.partial = place.with_name(place.name + ".partial")
        self.rows, self.next, self.complete = 0, 0, False
        self.left_out: list[list[str]] = []
        self.shapes: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self.stack = ExitStack()
        if place.exists():
            there = read_features(place).header  # what is no file of features is never replaced
            if not (overwrite or resume):
                raise FeaturesError(f"{place} exists: choose another --out, or give --overwrite (overwrite=True)")
            if not overwrite:
                check_header(self.header, there, place)
                self.complete = True
                return
        if self.partial.exists() and not (resume or overwrite):
            raise FeaturesError(
                f"{self.partial} holds a run that was interrupted: --resume goes on with it (resume=True), --overwrite "
                "starts anew"
            )
        self.partial.mkdir(parents=True, exist_ok=True)
        if not self.stack.enter_context(claimed(self.partial)) and os.name == "posix":
            self.stack.close()
            raise FeaturesError(f"{self.partial} is being written by another process")
        if resume and (self.partial / "progress.json").exists():
            self.restore()
        else:
            self.clear()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
        self.stack.close()

    def clear(self) -> None:
        """Starts anew, in a folder that is ours."""
        for path in self.partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def restore(self) -> None:
        noted = json.loads((self.partial / "progress.json").read_text(encoding="utf-8"))
        check_header(self.header, noted["header"], self.partial)
        self.rows, self.next, self.left_out = noted["rows"], noted["next"], noted["left out"]
        self.shapes = {name: (np.dtype(dtype), tuple(shape)) for name, (dtype, shape) in noted["arrays"].items()}
        with open(self.partial / "images.jsonl", "r+b") as file:
            file.truncate(noted["bytes of names"])
        self.reopen()

    def add(self, arrays: Mapping[str, np.ndarray], names: Sequence[str], labels: Sequence[Any]) -> None:
        """Appends rows: arrays [rows, ..], and the images' names and labels."""
        if not self.shapes:
            self.shapes = {name: (a.dtype, a.shape[1:]) for name, a in arrays.items()}
            self.create()
        check_shapes(arrays, {name: shape for name, (_, shape) in self.shapes.items()}, names[0])
        self.append(arrays)
        with open(self.partial / "images.jsonl", "ab") as file:
            for name, label in zip(names, labels, strict=True):
                file.write(json.dumps([readable(name), plain(label)], ensure_ascii=False).encode() + b"\n")
        self.rows += len(names)

    def note(self, next: int) -> None:
        """Everything up to the image before `next` is written or left out."""
        self.next = next
        noted = {
            "rows": self.rows,
            "next": next,
            "left out": self.left_out,
            "arrays": {name: [dtype.name, list(shape)] for name, (dtype, shape) in self.shapes.items()},
            "bytes of names": (self.partial / "images.jsonl").stat().st_size if self.rows else 0,
            "header": self.header,
        }
        temporary = self.partial / "progress.json.new"
        temporary.write_text(json.dumps(noted, ensure_ascii=False), encoding="utf-8")
        temporary.replace(self.partial / "progress.json")

    def finish(self, more: Mapping[str, Any]) -> None:
        """Puts the file in its place.

        Args:
          more: what is added to the header now that it is known.
        """
        self.close()
        header = {**self.header, **more, "rows": self.rows, "left out": self.left_out}
        names, labels = self.known()
        made = self.partial / f"whole{self.place.suffix}"
        self.assemble(made, names, labels, json.loads(json.dumps(header)))
        if self.place.is_dir():
            shutil.rmtree(self.place)
        made.replace(self.place)
        self.complete = True
        shutil.rmtree(self.partial, ignore_errors=True)

    def known(self) -> tuple[list[str], np.ndarray | None]:
        if not self.rows:
            return [], None
        with open(self.partial / "images.jsonl", encoding="utf-8") as file:
            pairs = [json.loads(line) for line in file]
        return [name for name, _ in pairs], labels_of([label for _, label in pairs])

    # Of each format.

    @abstractmethod
    def create(self) -> None: ...

    @abstractmethod
    def reopen(self) -> None: ...

    @abstractmethod
    def append(self, arrays: Mapping[str, np.ndarray]) -> None: ...

    @abstractmethod
    def assemble(self, path: Path, names: list[str], labels: np.ndarray | None, header: Mapping[str, Any]) -> None: ...

    def close(self) -> None:  # noqa: B027
        """Closes files; there may be none."""


def check_header(header: Mapping[str, Any], other: Mapping[str, Any], where: Path) -> None:
    """Raises a FeaturesError if features that are there depend on other things."""
    differ = [name for name in header if other.get(name) != header[name]]
    if differ:
        name = differ[0]
        raise FeaturesError(
            f"{where} holds features of another {', '.join(differ)}: {brief(other.get(name))}, and not "
            f"{brief(header[name])}; give --overwrite (overwrite=True), or another --out"
        )


def check_shapes(arrays: Mapping[str, np.ndarray], before: Mapping[str, tuple[int, ...]], image: str) -> None:
    """Raises a FeaturesError for rows of another shape than those before them; the first is of this image."""
    for name, a in arrays.items():
        if name in before and a.shape[1:] != before[name]:
            raise FeaturesError(
                f"{image} gives {name} of {list(a.shape[1:])}, and the images before it {list(before[name])}: give one "
                "size= (--size), or read means and [CLS] alone"
            )


def labels_of(labels: Sequence[Any]) -> np.ndarray | None:
    """Whole numbers if they are all such, else texts."""
    if all(label is None for label in labels):
        return None
    if all(isinstance(label, int) for label in labels):
        return np.array(labels, np.int64)
    return np.array(["" if label is None else str(label) for label in labels])


def plain(label: Any) -> int | str | None:
    if label is None or isinstance(label, str):
        return label
    return (
        int(label)
        if isinstance(label, int | np.integer) or (np.ndim(label) == 0 and label == int(label))
        else str(label)
    )


def readable(name: str) -> str:
    """The name, with `?` for bytes that are no UTF-8."""
    return name.encode("utf-8", "replace").decode()


def brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + ".."


class ZarrWriter(Writer):
    """A Zarr group: chunks of a batch, without compression, as floats hardly shrink."""

    @property
    def folder(self) -> Path:
        return self.partial / "whole.zarr"

    def create(self) -> None:
        zarr = needed("zarr")
        shutil.rmtree(self.folder, ignore_errors=True)
        group = zarr.open_group(self.folder, mode="w")
        self.arrays = {
            name: group.create_array(
                name, shape=(0, *shape), chunks=(self.batch_size, *shape), dtype=dtype, compressors=None
            )
            for name, (dtype, shape) in self.shapes.items()
        }

    def reopen(self) -> None:
        for torn in self.folder.rglob("*.partial"):  # what zarr was writing when it was killed
            torn.unlink()
        if self.shapes:
            group = needed("zarr").open_group(self.folder, mode="r+")
            self.arrays = {name: group[name] for name in self.shapes}
            for name, (_, shape) in self.shapes.items():
                self.arrays[name].resize((self.rows, *shape))

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        for name, rows in arrays.items():
            array = self.arrays[name]
            array.resize((self.rows + len(rows), *rows.shape[1:]))
            array[self.rows :] = rows

    def assemble(self, path: Path, names: list[str], labels: np.ndarray | None, header: Mapping[str, Any]) -> None:
        zarr = needed("zarr")
        group = zarr.open_group(path, mode="a")
        beside = {NAMES: names} | ({} if labels is None else {LABELS: labels})
        for name, values in beside.items():
            texts = isinstance(values, list) or values.dtype.kind == "U"
            made = group.create_array(
                name,
                shape=(len(values),),
                chunks=(max(len(values), 1),),
                dtype=str if texts else np.int64,
                overwrite=True,
                compressors=None,
            )
            if len(values):
                made[:] = np.array(values, object) if texts else values
        for name, axes in axes_in(header).items():
            if name in group:
                group[name].attrs["axes"] = axes
        group.attrs[HEADER] = dict(header)


class Spooled(Writer):
    """Rows go to plain files, one for each array. The file is made of them at the end, which takes their size again."""

    def spool(self, name: str) -> Path:
        return self.partial / f"{list(self.shapes).index(name)}.bin"

    def create(self) -> None:
        self.files: dict[str, BinaryIO] = {name: open(self.spool(name), "wb") for name in self.shapes}  # noqa: SIM115

    def reopen(self) -> None:
        self.files = {}
        for name, (dtype, shape) in self.shapes.items():
            self.files[name] = open(self.spool(name), "r+b")  # noqa: SIM115
            length = self.rows * dtype.itemsize * int(np.prod(shape))
            if self.spool(name).stat().st_size < length:
                raise FeaturesError(f"{self.spool(name)} has become shorter: --overwrite starts anew")
            self.files[name].truncate(length)
            self.files[name].seek(length)

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        for name, rows in arrays.items():
            self.files[name].write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
            self.files[name].flush()

    def close(self) -> None:
        for file in getattr(self, "files", {}).values():
            file.close()

    def pieces(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """The rows of an array, some at a time, and where they start."""
        dtype, shape = self.shapes[name]
        if not self.rows:
            return
        size = dtype.itemsize * max(int(np.prod(shape)), 1)
        at_once = max(AT_ONCE // size, 1)
        with open(self.spool(name), "rb") as file:
            for start in range(0, self.rows, at_once):
                n = min(at_once, self.rows - start)
                yield start, np.frombuffer(file.read(n * size), dtype).reshape(n, *shape)


class NpzWriter(Spooled):
    """NumPy's own, uncompressed."""

    def assemble(self, path: Path, names: list[str], labels: np.ndarray | None, header: Mapping[str, Any]) -> None:
        beside = {NAMES: np.array(names, str), HEADER: np.array(json.dumps(header, ensure_ascii=False))}
        beside |= {} if labels is None else {LABELS: labels}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:

            def member(name: str) -> Any:
                # The date of all members is that of ZipInfo, 1980: bytes must not depend on when they were written.
                return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)

            for name, (dtype, shape) in self.shapes.items():
                with member(name) as file:
                    described = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False}
                    npy.write_array_header_1_0(file, {**described, "shape": (self.rows, *shape)})
                    for _, rows in self.pieces(name):
                        file.write(rows.tobytes())
            for name, values in beside.items():
                buffer = io.BytesIO()
                npy.write_array(buffer, values, allow_pickle=False)
                with member(name) as file:
                    file.write(buffer.getvalue())


class SafetensorsWriter(Spooled):
    """A safetensors file; names, the header and labels that are texts are in its metadata."""

    def assemble(self, path: Path, names: list[str], labels: np.ndarray | None, header: Mapping[str, Any]) -> None:
        texts: dict[str, Any] = {NAMES: names, HEADER: header}
        tensors = {name: (dtype, (self.rows, *shape)) for name, (dtype, shape) in self.shapes.items()}
        if labels is not None and labels.dtype.kind == "U":
            texts[LABELS] = labels.tolist()
        elif labels is not None:
            tensors[LABELS] = (labels.dtype, labels.shape)
        metadata = {name: json.dumps(value, ensure_ascii=False) for name, value in texts.items()}
        with writing(path, tensors, metadata) as put:
            for name, (_, shape) in self.shapes.items():
                for start, rows in self.pieces(name):
                    put(name, start * int(np.prod(shape)), rows)
            if LABELS in tensors:
                assert labels is not None, "see above"
                put(LABELS, 0, labels)


class ParquetWriter(Spooled):
    """A Parquet file: a row for each image, each array as a column of lists of fixed size, its shape in the header."""

    def assemble(self, path: Path, names: list[str], labels: np.ndarray | None, header: Mapping[str, Any]) -> None:
        needed("pyarrow")
        import pyarrow as pa
        import pyarrow.parquet as pq

        fields = [pa.field(NAMES, pa.string())]
        if labels is not None:
            fields.append(pa.field(LABELS, pa.string() if labels.dtype.kind == "U" else pa.int64()))
        for name, (dtype, shape) in self.shapes.items():
            fields.append(pa.field(name, pa.list_(pa.from_numpy_dtype(dtype), int(np.prod(shape)))))
        whole = {name: list(shape) for name, (_, shape) in self.shapes.items()}
        about = {HEADER: json.dumps(header, ensure_ascii=False), "shapes": json.dumps(whole)}
        schema = pa.schema(fields, metadata=about)
        streams = {name: self.rows_of(name) for name in self.shapes}
        with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
            for start in range(0, self.rows, self.batch_size):
                part = slice(start, min(start + self.batch_size, self.rows))
                columns = [pa.array(names[part], pa.string())]
                if labels is not None:
                    columns.append(pa.array(labels[part].tolist(), schema.field(LABELS).type))
                for name in self.shapes:
                    rows = next(streams[name])
                    columns.append(pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows[0].size))
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))

    def rows_of(self, name: str) -> Iterator[np.ndarray]:
        dtype, shape = self.shapes[name]
        size = dtype.itemsize * int(np.prod(shape))
        with open(self.spool(name), "rb") as file:
            for start in range(0, self.rows, self.batch_size):
                n = min(self.batch_size, self.rows - start)
                yield np.frombuffer(file.read(n * size), dtype).reshape(n, *shape)


WRITERS: Mapping[str, type[Writer]] = {
    ".zarr": ZarrWriter,
    ".npz": NpzWriter,
    ".safetensors": SafetensorsWriter,
    ".parquet": ParquetWriter,
}
"""Suffix -> what writes such a file."""


def writer_for(place: str | os.PathLike[str]) -> type[Writer]:
    """Raises a FeaturesError for a suffix that is not known, or a package that is missing."""
    suffix = Path(place).suffix.lower()
    if suffix not in WRITERS:
        raise FeaturesError(f"{place} ends in none of {', '.join(WRITERS)}")
    if package := {".zarr": "zarr", ".parquet": "pyarrow"}.get(suffix):
        needed(package)
    return WRITERS[suffix]


def needed(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise FeaturesError(f"this kind of file needs {package}: pip install 'jaxvit[features]'") from error


def axes_in(header: Mapping[str, Any]) -> dict[str, list[str]]:
    return {name: about["axes"] for name, about in header.get("arrays", {}).items()}


# Reading --------------------------------------------------------------------------------------------------------------


def read_features(place: str | os.PathLike[str]) -> Features:
    """Features that `jaxvit features` wrote.

    Arrays stay on disk until they are indexed; of a Parquet file, a whole column then comes at once.

    Args:
      place: a file that ends in .zarr, .npz, .safetensors or .parquet.

    Raises:
      FeaturesError: it is not there, not complete, or not of `jaxvit features`; or a package is missing.

    Example:

        found = jaxvit.read_features("features.zarr")
        found["cls"][:100], found.names[:100], found.header["model"]
    """
    path = Path(place)
    suffix = path.suffix.lower()
    writer_for(path)
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        why = f"not complete: {partial} holds an interrupted run, give --resume" if partial.exists() else "not there"
        raise FeaturesError(f"{path} is {why}")
    try:
        return READERS[suffix](path)
    except FeaturesError:
        raise
    except Exception as error:  # libraries' errors have many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FeaturesError(f"{path} is no file of jaxvit features, or is damaged: {reason}") from error


def read_zarr(path: Path) -> Features:
    group = needed("zarr").open_group(path, mode="r")
    header = group.attrs[HEADER]
    labels = np.asarray(group[LABELS][:]) if LABELS in group else None
    if labels is not None and labels.dtype.kind not in "iu":
        labels = np.array([str(label) for label in labels])
    return Features({name: group[name] for name in header["arrays"]}, list(map(str, group[NAMES][:])), labels, header)


def read_npz(path: Path) -> Features:
    with open(path, "rb") as opened, np.load(opened) as file:
        header = json.loads(str(file[HEADER]))
        labels, names = file.get(LABELS), file[NAMES].tolist()
    return Features({name: mapped_npz(path, name) for name in header["arrays"]}, names, labels, header)


def mapped_npz(path: Path, name: str) -> np.ndarray:
    """An array of an uncompressed archive, on disk."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        member = archive.getinfo(f"{name}.npy")
        file.seek(member.header_offset + 26)  # where the lengths of the name and of what is extra stand
        file.seek(sum(int.from_bytes(file.read(2), "little") for _ in range(2)), os.SEEK_CUR)
        npy.read_magic(file)
        shape, _, dtype = npy.read_array_header_1_0(file)
        return np.memmap(path, dtype, "r", file.tell(), shape)


def read_safetensors(path: Path) -> Features:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        texts = {name: json.loads(text) for name, text in file.metadata().items()}
    held = SafetensorsFile(path)
    arrays = {
        name: np.memmap(
            path, held.dtype(name), "r", held.data + held.entries[name]["data_offsets"][0], held.shape(name)
        )
        for name in texts[HEADER]["arrays"]
        if name in held  # a part of which no image could be used has none
    }
    labels = np.array(texts[LABELS]) if LABELS in texts else held.get(LABELS)
    return Features(arrays, texts[NAMES], labels, texts[HEADER])


class Column:
    """An array in a Parquet file, read when it is used."""

    def __init__(self, path: Path, name: str, dtype: np.dtype, shape: tuple[int, ...]):
        self.path, self.name, self.dtype, self.shape = path, name, dtype, shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        import pyarrow.parquet as pq

        column = pq.read_table(self.path, columns=[self.name]).column(0).combine_chunks()
        return (
            column.flatten().to_numpy(zero_copy_only=False).reshape(self.shape).astype(dtype or self.dtype, copy=False)
        )

    def __getitem__(self, rows: Any) -> Any:
        return np.asarray(self)[rows]

    def __len__(self) -> int:
        return self.shape[0]


def read_parquet(path: Path) -> Features:
    needed("pyarrow")
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    schema, n = file.schema_arrow, file.metadata.num_rows
    header, shapes = (json.loads(schema.metadata[name.encode()]) for name in (HEADER, "shapes"))
    arrays = {
        name: Column(path, name, np.dtype(schema.field(name).type.value_type.to_pandas_dtype()), (n, *shapes[name]))
        for name in header["arrays"]
    }
    beside = file.read([name for name in (NAMES, LABELS) if name in schema.names])
    labels = np.array(beside.column(LABELS).to_pylist()) if LABELS in schema.names else None
    return Features(arrays, beside.column(NAMES).to_pylist(), labels, header)


READERS = {".zarr": read_zarr, ".npz": read_npz, ".safetensors": read_safetensors, ".parquet": read_parquet}
