"""Many devices, and many processes: where a model and images lie, and what processes tell one another.

    mesh = jaxvit.parallel.mesh()  # all devices; of one process or of many
    jaxvit.sweep(model, images, edits, grid, mesh=mesh)

A mesh has two axes. Images, or points of a sweep, are spread over `data`. A model is copied along `data`, and spread
over `model` by heads and hidden units, so that no device holds all of a large one.

Functions that go through many images take `mesh=`. With several processes, each works on its own devices, on its share
of the images or points, and what all of them found is put together at the end: no process waits for another in between.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import secrets
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from jaxvit.model.params import from_params, to_params
from jaxvit.model.vit import ViT

Item = TypeVar("Item")

DATA, MODEL = "data", "model"
"""Axes of a mesh."""

OVER_MODEL = {
    "attn.qkv.kernel": PartitionSpec(None, None, None, MODEL),
    "attn.qkv.bias": PartitionSpec(None, None, MODEL),
    "attn.proj.kernel": PartitionSpec(None, MODEL),
    "mlp.fc1.kernel": PartitionSpec(None, None, MODEL),
    "mlp.fc1.bias": PartitionSpec(None, MODEL),
    "mlp.fc2.kernel": PartitionSpec(None, MODEL),
    "mlp.gate.kernel": PartitionSpec(None, None, MODEL),
    "mlp.gate.bias": PartitionSpec(None, MODEL),
    "mlp.value.kernel": PartitionSpec(None, None, MODEL),
    "mlp.value.bias": PartitionSpec(None, MODEL),
    "mlp.out.kernel": PartitionSpec(None, MODEL),
}
"""Parameters of blocks that are spread, by heads [L, .., H, ..] or by hidden units [L, .., F]. Others are copied."""

HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as dead."""

_waits = itertools.count()


class ProcessesError(ConnectionError):
    """Another process of the run has ended."""


@contextmanager
def together() -> Iterator[None]:
    """What processes do together ends with a ProcessesError where one of them does not come."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise ProcessesError("another process of this run has ended, or cannot be reached") from error


# --- meshes


def mesh(model: int = 1, *, devices: Sequence[Any] | None = None, explicit: bool = False) -> Mesh:
    """A mesh of all devices, of all processes, with the axes `data` and `model`.

    Args:
      model: over how many devices a model is spread; they belong to one process.
      devices: which ones; by default all.
      explicit: with shardings in the types of arrays, which JAX calls explicit; by default automatic.

    Raises:
      ValueError: devices that cannot be divided so.

    Example:

        jaxvit.parallel.mesh(model=2)  # of 8 devices: data 4, model 2
    """
    chosen = list(jax.devices() if devices is None else devices)
    by_process: dict[int, list[Any]] = {}
    for device in chosen:
        by_process.setdefault(device.process_index, []).append(device)
    sizes = {len(each) for each in by_process.values()}
    if model < 1 or len(sizes) != 1 or min(sizes) % model:
        counts = ", ".join(map(str, sorted(sizes))) or "no"
        raise ValueError(f"a model over {model} devices cannot be made of {counts} devices in each process")
    axes = (AxisType.Explicit if explicit else AxisType.Auto,) * 2
    if len(by_process) == 1 and devices is None:
        return jax.make_mesh((len(chosen) // model, model), (DATA, MODEL), axis_types=axes)  # as they are wired
    rows = [device for process in sorted(by_process) for device in by_process[process]]
    return Mesh(np.asarray(rows).reshape(-1, model), (DATA, MODEL), axis_types=axes)


def local(mesh: Mesh) -> Mesh:
    """The devices of this process, as an automatic mesh: what it works on by itself.

    Raises:
      ValueError: axes of other names, or a model that is spread over processes.
    """
    if mesh.axis_names != (DATA, MODEL):
        raise ValueError(f"the mesh has the axes {', '.join(mesh.axis_names)}; expected one of jaxvit.parallel.mesh()")
    me = jax.process_index()
    rows = [row for row in np.asarray(mesh.devices) if {device.process_index for device in row} == {me}]
    if sum(map(len, rows)) != sum(device.process_index == me for device in mesh.devices.flat):
        raise ValueError("the mesh spreads a model over several processes: give jaxvit.parallel.mesh a smaller `model`")
    if not rows:
        raise ValueError("the mesh holds no device of this process")
    return Mesh(np.asarray(rows), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)


# --- placement


def place(model: ViT, mesh: Mesh) -> ViT:
    """The model on a mesh: copied along `data`, spread over heads and hidden units along `model`.

    Raises:
      ValueError: heads or hidden units that cannot be divided so.

    Example:

        mesh = jaxvit.parallel.mesh(model=2)
        out = jax.jit(lambda model, x: model(x))(place(model, mesh), spread(images, mesh))
    """
    over, c = mesh.shape[MODEL], model.config
    for count, what in ((c.heads, "heads"), (c.hidden, "hidden units")):
        if count % over:
            raise ValueError(f"a model of {count} {what} cannot be spread over {over} devices")
    params = {name: jax.device_put(a, placement(name, mesh)) for name, a in to_params(model).items()}
    return from_params(c, params)


def placement(name: str, mesh: Mesh) -> NamedSharding:
    """Where a parameter of this name lies on a mesh."""
    spec = OVER_MODEL.get(name.removeprefix("blocks."), PartitionSpec()) if mesh.shape[MODEL] > 1 else PartitionSpec()
    return NamedSharding(mesh, spec)


def spread(images: Float[Array | np.ndarray, "B H W C"], mesh: Mesh) -> Float[Array, "B H W C"]:
    """Images spread over `data`; with several processes each gives its own, and the result has those of all.

    Raises:
      ValueError: images that cannot be divided so.

    Example:

        mesh = jaxvit.parallel.mesh()
        model(spread(images, mesh)).cls  # each device has some of the images
    """
    sharding = NamedSharding(mesh, PartitionSpec(DATA))
    mine = mesh.shape[DATA] // len({device.process_index for device in mesh.devices.flat})
    if len(images) % mine:
        raise ValueError(f"{len(images)} images cannot be spread over {mine} devices: give a multiple of these")
    if jax.process_count() == 1:
        return jax.device_put(images, sharding)
    return jax.make_array_from_process_local_data(sharding, np.asarray(images))


def copied(tree: PyTree[Any], mesh: Mesh) -> PyTree[Array]:
    """Arrays on every device of a mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def working(model: Any, mesh: Mesh | None) -> tuple[Any, Mesh | None]:
    """A model, or any arrays, on the devices of this process, and these. Without a mesh both as they are."""
    if mesh is None:
        return model, None
    mesh = local(mesh)
    return place(model, mesh) if isinstance(model, ViT) else copied(model, mesh), mesh


def filled(images: Array | np.ndarray, valid: np.ndarray, mesh: Mesh | None) -> tuple[Any, np.ndarray]:
    """Images in a number that devices can share, on them: the last one again where it does not.

    Returns:
      Them, and which of them count. Without a mesh both as they are.
    """
    if mesh is None:
        return images, valid
    more = -len(images) % mesh.shape[DATA]
    if more:
        images = np.concatenate([np.asarray(images), np.repeat(np.asarray(images[-1:]), more, axis=0)])
    return spread(images, mesh), np.concatenate([valid, np.zeros(more, bool)])


# --- processes


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat: int = HEARTBEAT,
) -> None:
    """Joins this process to the others of its run; before anything else of JAX.

    Without arguments JAX finds the others by itself: on TPU virtual machines, under SLURM, Open MPI or Kubernetes.
    Under SLURM a task that is alone on its node takes all GPUs that it sees; where there are several, each takes one.

    Args:
      coordinator: HOST:PORT of process 0, to which all of them connect.
      processes: how many there are.
      process_id: which of them this is, from 0.
      heartbeat: seconds without a sign of life after which a process counts as dead. JAX then ends all others.

    Example:

        jaxvit.parallel.start("10.0.0.1:9000", processes=2, process_id=0)
    """
    jax.distributed.initialize(
        coordinator,
        processes,
        process_id,
        gpus_of_task(),
        heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=2 * heartbeat,
    )


def gpus_of_task() -> list[int] | None:
    """Numbers of the GPUs of a SLURM task that is alone on its node, of which JAX would take the first alone.

    None: what JAX takes by itself.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    alone = re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return list(range(len(visible.split(",")))) if alone and visible else None


def wait(name: str = "") -> None:
    """Waits, for as long as it takes, until every process has come here.

    Raises:
      ProcessesError: one of them has ended, or waits under another name: it has failed where others went on.

    Example:

        wait("all have written")
    """
    if jax.process_count() == 1:
        return
    from jax.experimental.multihost_utils import process_allgather
    from orbax.checkpoint import multihost  # collectives would give up after half a minute on a CPU

    with together():
        multihost.get_barrier_sync_fn()(key=f"jaxvit {next(_waits)}", timeout_ms=10 * 24 * 3600 * 1000)
        names = process_allgather(np.uint32(zlib.crc32(name.encode())))
    if len(set(names.tolist())) > 1:
        raise ProcessesError(f"processes of this run no longer do the same: this one is at {name!r}, see the others")


def check_disk(folder: Path) -> None:
    """Asks all processes whether they see the same folder, which is made if it is not there.

    Raises:
      ValueError: one of them does not; in all processes.
    """
    if jax.process_count() == 1:
        return
    mark = folder / ".seen-by-all"
    folder.mkdir(parents=True, exist_ok=True)
    number = secrets.token_hex(8)
    if jax.process_index() == 0:
        mark.write_text(number)
    (number, *_) = told(number)
    found = mark.read_text() if mark.is_file() else ""
    blind = [str(i) for i, seen in enumerate(told(found)) if seen != number]
    if jax.process_index() == 0:
        mark.unlink()
    if blind:
        raise ValueError(f"{folder} of process {', '.join(blind)} is not that of process 0: choose a place all share")


def share(items: Sequence[Item]) -> Sequence[Item]:
    """The items that are for this process: as many as for any other, in one piece.

    Example:

        paths = jaxvit.find_images("photographs")
        jaxvit.over_images(measure, model, jaxvit.stream(jaxvit.parallel.share(paths), model.config, 16), mesh=mesh)
    """
    me, all_of_us = jax.process_index(), jax.process_count()
    return items[me * len(items) // all_of_us : (me + 1) * len(items) // all_of_us]


def gather(tree: PyTree[np.ndarray]) -> list[PyTree[np.ndarray]]:
    """What each process gives, in their order; to all of them. Nested dicts of arrays, of any shapes.

    Arrays keep their types: they travel as bytes.

    Example:

        np.concatenate(gather(np.arange(3)))  # of all processes, in their order; here of one
    """
    if jax.process_count() == 1:
        return [tree]
    from flax.serialization import msgpack_restore, msgpack_serialize
    from jax.experimental.multihost_utils import process_allgather

    mine = np.frombuffer(msgpack_serialize(tree), np.uint8)
    wait("gather")
    with together():
        sizes = np.asarray(process_allgather(np.frombuffer(np.int64(len(mine)).tobytes(), np.uint8)))
        lengths = [int(np.frombuffer(row.tobytes(), np.int64)[0]) for row in sizes]
        every = np.asarray(process_allgather(np.pad(mine, (0, max(lengths) - len(mine)))))
    return [msgpack_restore(row[:length].tobytes()) for row, length in zip(every, lengths, strict=True)]


def fetch(tree: PyTree[Any]) -> PyTree[np.ndarray]:
    """Arrays on the host, whole, also those of which other processes hold a part: all processes must then call this.

    Example:

        fetch({"cls": model(images).cls})["cls"]  # a NumPy array
    """
    if all(not isinstance(a, jax.Array) or a.is_fully_addressable for a in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    from jax.experimental.multihost_utils import process_allgather

    wait("fetch")
    with together():
        return jax.tree.map(lambda a: np.asarray(process_allgather(a, tiled=True)), tree)


def joined(rows: PyTree[np.ndarray]) -> PyTree[np.ndarray]:
    """Rows of all processes, one process after another; each has some."""
    if jax.process_count() == 1:
        return rows
    leaves, structure = jax.tree.flatten(rows)
    every = gather(numbered(leaves))
    return jax.tree.unflatten(structure, [np.concatenate([each[i] for each in every]) for i in numbered(leaves)])


def dealt(mine: Sequence[PyTree[np.ndarray]]) -> list[PyTree[np.ndarray]]:
    """All pieces of work in order, dealt like cards, as many to each process; `mine` are those of this one."""
    if jax.process_count() == 1:
        return list(mine)
    structure = jax.tree.structure(mine[0])
    every = gather(numbered([numbered(jax.tree.leaves(piece)) for piece in mine]))
    pieces = [process[i] for i in numbered(mine) for process in every]
    return [jax.tree.unflatten(structure, [leaves[j] for j in numbered(leaves)]) for leaves in pieces]


def numbered(values: Iterable[Item]) -> dict[str, Item]:
    return {str(i): value for i, value in enumerate(values)}


def told(text: str) -> list[str]:
    """A text of each process."""
    return [each["text"].tobytes().decode() for each in gather({"text": np.frombuffer(text.encode(), np.uint8)})]


def check_shares(images: Array | np.ndarray | None) -> None:
    """Asks all processes whether their first images are different ones: all rows would come several times.

    Args:
      images: of this process, None where it has none.

    Raises:
      ValueError: a process has none, or two have the same; in all processes.
    """
    if jax.process_count() == 1:
        return
    digests = told("" if images is None else pixels_digest(images))
    if "" in digests:
        raise ValueError(
            f"process {digests.index('')} of {len(digests)} has no images: give fewer processes, or more images"
        )
    if len(set(digests)) < len(digests):
        raise ValueError("processes give the same images: give each its own, such as jaxvit.parallel.share(paths)")


def check_same(images: Array | np.ndarray) -> None:
    """Asks all processes whether they have the same images.

    Raises:
      ValueError: they have not; in all processes.
    """
    if jax.process_count() > 1 and len(set(told(pixels_digest(images)))) > 1:
        raise ValueError("processes give different images: a sweep spreads its points, give all of them the same ones")


def pixels_digest(images: Array | np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
