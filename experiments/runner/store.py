"""A pass over any number of images: streamed, on all local devices, in fixed memory, and restartable at any point.

What a pass found lies in a folder of its own:

    settings.json   what was asked for; other settings have another folder
    rows.bin        one record an image, appended batch by batch
    state.npz       everything summed up, how many images that is, and how many rows count; replaced as a whole

Images are always batched the same way, and batches are always summed up in the same order, so that a pass that was
killed and gone on with gives the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxvit import ImageError, ViTConfig, stream
from jaxvit.analysis.similarity import StreamingCKA
from jaxvit.io import parallel
from jaxvit.io.checkpoint import replacing_file
from jaxvit.io.images import Source

from ..core.experiment import KEPT, Found, Measured, readable
from ..core.trace import widened

SAVE_EVERY = 30.0
"""Seconds between two savings of the state; more where saving takes long."""

Measure = Callable[[Any, Any, Any], Measured]
"""measure(arguments, images, position): one batch; `position` [B] counts the images of the pass from 0."""


class Store:
    """What a pass has found so far, in memory and in its folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        """Goes on with what is in the folder, or begins.

        Raises:
          ValueError: a folder of other settings, which is left as it is.
        """
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        self._clear()
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".state.npz.*"):  # of a process that was killed while it wrote
            leftover.unlink()
        known = self.folder / "settings.json"
        if known.is_file():
            if json.loads(known.read_text()) != self.settings:
                raise ValueError(f"{folder} holds a pass of other settings")
        else:
            self.state.unlink(missing_ok=True)
            with replacing_file(known) as temporary:
                temporary.write_text(json.dumps(self.settings, indent=1))
        if self.state.is_file():
            try:
                self._restore()
                if self.rows.stat().st_size < self.n * self.row_bytes:
                    raise ValueError("rows are missing")
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                print(f"{self.folder} is damaged ({error}): it is measured again", file=sys.stderr)
                self._clear()
        with open(self.rows, "ab") as file:  # what was appended after the state was last saved is measured again
            file.truncate(self.n * self.row_bytes)
        self.saved, self.saving = time.monotonic(), 0.0

    def _clear(self) -> None:
        self.next, self.n, self.done = 0, 0, False
        self.digest = ""
        self.skipped: list[dict[str, Any]] = []
        self.dtype: np.dtype | None = None
        self.cka: dict[str, StreamingCKA] = {}
        self.sums: dict[str, np.ndarray] = {}
        self.keep: dict[str, np.ndarray] = {}

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize if self.dtype else 0

    def forget_moments(self) -> None:
        """Frees what only CKAs are made of, once they are; it stays on disk."""
        self.cka = {}

    @property
    def state(self) -> Path:
        return self.folder / "state.npz"

    @property
    def rows(self) -> Path:
        return self.folder / "rows.bin"

    def add(self, m: Measured, indices: np.ndarray) -> None:
        """Adds one batch, all of whose images count; `indices` are theirs among the sources."""
        rows = {"image": np.asarray(indices), **m.per_image}
        dtype = np.dtype([(name, a.dtype, a.shape[1:]) for name, a in rows.items()])
        if self.dtype is None:
            self.dtype = dtype
        records = np.zeros(len(indices), self.dtype)
        for name, values in rows.items():
            records[name] = values
        with open(self.rows, "ab") as file:
            file.write(records.tobytes())
        for name, (reference, others) in m.pairs.items():
            self.cka.setdefault(name, StreamingCKA()).update(reference, others)
        self._add_up({name: values.sum(axis=0, dtype=np.float64) for name, values in m.sums.items()}, m.keep)
        self.n += len(indices)
        self.next = int(indices[-1]) + 1

    def _add_up(self, sums: Mapping[str, np.ndarray], keep: Mapping[str, Any]) -> None:
        for name, total in sums.items():
            self.sums[name] = self.sums[name] + total if name in self.sums else total
        for name, values in keep.items():
            kept = np.concatenate([self.keep[name], values]) if name in self.keep else values
            self.keep[name] = kept[:KEPT]

    def save(self, done: bool = False, every: float = 0.0) -> None:
        """Saves every so many seconds, but never spends more than about 5 % of the time saving; 0 saves always."""
        if not done and every and time.monotonic() - self.saved < max(every, 20 * self.saving):
            return
        started = time.monotonic()
        self.done = done
        about = {"next": self.next, "n": self.n, "done": done, "digest": self.digest, "skipped": self.skipped}
        if self.dtype is not None:
            about["rows"] = [[name, kind, *shape] for name, kind, *shape in np.lib.format.dtype_to_descr(self.dtype)]
        arrays = {"about": np.asarray(json.dumps(about))}
        for name, cka in self.cka.items():
            arrays |= {f"cka|{name}|{key}": value for key, value in cka.state().items()}
        arrays |= {f"sums|{name}": value for name, value in self.sums.items()}
        arrays |= {f"keep|{name}": value for name, value in self.keep.items()}
        with open(self.rows, "ab") as rows:  # first what the state counts on
            os.fsync(rows.fileno())
        with replacing_file(self.state) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        self.saved = time.monotonic()
        self.saving = self.saved - started

    def _restore(self) -> None:
        cka: dict[str, dict[str, np.ndarray]] = {}
        with open(self.state, "rb") as file, np.load(file) as arrays:
            about = json.loads(arrays["about"].item())
            for path in arrays.files:
                kind, _, name = path.partition("|")
                if kind == "cka":
                    name, _, key = name.rpartition("|")
                    cka.setdefault(name, {})[key] = arrays[path]
                elif kind in ("sums", "keep"):
                    getattr(self, kind)[name] = arrays[path]
        self.cka = {name: StreamingCKA.restore(state) for name, state in cka.items()}
        self.next, self.n, self.done = about["next"], about["n"], about["done"]
        self.digest, self.skipped = about["digest"], about["skipped"]
        if "rows" in about:
            self.dtype = np.dtype([(name, kind, *map(tuple, shape)) for name, kind, *shape in about["rows"]])

    def append(self, part: Store) -> None:
        """Adds all of a pass over the images behind these, which has the same settings."""
        if part.n:
            if self.dtype is None:
                self.dtype = part.dtype
            if part.dtype != self.dtype:
                raise ValueError(f"{part.folder} holds rows of another kind: {part.dtype}, not {self.dtype}")
            with open(self.rows, "ab") as file, open(part.rows, "rb") as more:
                shutil.copyfileobj(more, file)
        for name, cka in part.cka.items():
            self.cka.setdefault(name, StreamingCKA()).merge(cka)
        self._add_up(part.sums, part.keep)
        self.digest = added(self.digest, part.digest)
        self.skipped += part.skipped
        self.n, self.next = self.n + part.n, part.next

    def reload(self) -> None:
        """What another process wrote."""
        self._clear()
        self._restore()

    def found(self) -> Found:
        return Found(self.n, Columns(self), self.cka, self.sums, self.keep)


class Columns(Mapping[str, np.ndarray]):
    """The rows of a store by name, [n, ..], read from disk when they are asked for."""

    def __init__(self, store: Store):
        self.store = store

    def __getitem__(self, name: str) -> np.ndarray:
        if self.store.dtype is None or name not in (self.store.dtype.names or ()):
            raise KeyError(name)
        return np.array(np.memmap(self.store.rows, self.store.dtype, "r", shape=(self.store.n,))[name])

    def __iter__(self) -> Iterator[str]:
        return iter((self.store.dtype.names or ()) if self.store.dtype else ())

    def __len__(self) -> int:
        return len(list(iter(self)))


def run_pass(
    store: Store,
    measure: Measure,
    arguments: Any,
    sources: Sequence[Source],
    config: ViTConfig,
    *,
    batch_size: int,
    size: int | None = None,
    known: Mapping[str, np.ndarray] | None = None,
    devices: Sequence[jax.Device] | None = None,
    label: str = "",
    progress: bool = False,
    save_every: float = SAVE_EVERY,
    part: tuple[int, int] | None = None,
    before: int = 0,
) -> Store:
    """Measures all images that the store has not seen yet.

    Args:
      measure: a pure function, jitted here.
      arguments: its first argument, a pytree of arrays, the same for all batches; is copied to all devices.
      batch_size: images at a time, on all devices together; made a multiple of their number.
      sources: images, or small objects whose `fetch()` gives one, so that not all are in memory.
      known: what is known of each source beforehand, such as its label, [number of sources, ..]: the images' rows have
        that too, by name.
      devices: to spread each batch over; all local ones by default.
      part: only the sources from this number to the one before that. The store then holds nothing else, is not marked
        as done, and may have found no image that can be used.
      before: images of the pass that can be used and stand before the part.

    Raises:
      ImageError: not one image can be used.
    """
    if store.done:
        return store
    mesh = parallel.mesh(devices=devices or jax.local_devices())
    arguments = parallel.copied(arguments, mesh)
    batch_size = -(-batch_size // mesh.size) * mesh.size
    begin, end = part or (0, len(sources))
    run = jax.jit(lambda *given: widened(measure(*given)))  # files know no bfloat16
    offset = max(store.next, begin)
    position, waiting = before + store.n, None

    def absorb(batch: Any, measured: Any, digest: str) -> None:
        valid = batch.valid
        m: Measured = jax.device_get(measured)
        pairs = {name: jax.tree.map(lambda a: a[..., valid, :], each) for name, each in m.pairs.items()}
        per_image, sums, keep = jax.tree.map(lambda a: a[valid], (m.per_image, m.sums, m.keep))
        indices = batch.indices[valid] + offset
        per_image = per_image | {name: values[indices] for name, values in (known or {}).items()}
        store.digest = digest
        store.add(Measured(per_image, pairs, sums, keep), indices)
        store.skipped = [entry for entry in skipped if entry["position"] < store.next]
        store.save(every=save_every)
        bar.update(int(valid.sum()))

    skipped = list(store.skipped)

    def skip(name: str, error: ImageError) -> None:
        numbered = re.fullmatch(r"image (\d+)", name)  # what has no path
        at = int(numbered[1]) + offset if numbered else next(i for i, s in enumerate(sources) if str(s) == name)
        name = str(sources[at]) if hasattr(sources[at], "fetch") else name
        skipped.append({"image": readable(name), "error": readable(str(error)), "position": at})
        bar.update()

    shown = dict(desc=label, unit="image", disable=not progress, smoothing=0.1)
    with tqdm(total=end - begin, initial=offset - begin, **shown) as bar:
        digest = store.digest
        for batch in stream(map(fetched, sources[offset:end]), config, batch_size, size, on_error=skip):
            images = parallel.spread(batch.images, mesh)
            numbers = position + np.arange(batch_size)
            measured = run(arguments, images, numbers)
            position += int(batch.valid.sum())
            whole = np.asarray(batch.images)
            for i in np.flatnonzero(batch.valid):  # one by one: the same for any size of batches
                digest = added(digest, of_image(int(batch.indices[i]) + offset, whole[i]))
            # The batch before is summed up while this one is computed.
            if waiting is not None:
                absorb(*waiting)
            waiting = batch, measured, digest
        if waiting is not None:
            absorb(*waiting)
    store.skipped = skipped
    if part:
        store.next = end
        store.save()
        return store
    check_some(store, len(sources))
    store.save(done=True)
    return store


def check_some(store: Store, of: int) -> None:
    """Raises an ImageError if none of so many images could be used."""
    if not store.n:
        reason = f"; the first: {store.skipped[0]['error']}" if store.skipped else ""
        raise ImageError(f"none of the {of} images can be used{reason}")


def of_image(index: int, pixels: np.ndarray) -> str:
    """sha256 of an image and its number among the sources."""
    return hashlib.sha256(f"{index} ".encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def added(digest: str, other: str) -> str:
    """The digest of two sets of images; the same in any order and any parts."""
    return f"{(int(digest or '0', 16) + int(other or '0', 16)) % 2**256:064x}"


def fetched(source: Any) -> Source:
    """The image itself."""
    return source.fetch() if hasattr(source, "fetch") else source
