"""A measure over any number of images, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from jaxvit.io import parallel
from jaxvit.io.batches import spread_batches
from jaxvit.io.images import Batch
from jaxvit.io.progress import bar
from jaxvit.model.programs import Program, kept


def over_images(
    measure: Callable[[Any, Array], Any],
    model: Any,
    batches: Iterable[Batch | Array | np.ndarray],
    *,
    total: int | None = None,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> PyTree[np.ndarray]:
    """Measures any number of images, batch by batch; the results of all of them, on the host.

        def mass(model, images):
            pattern = model(images, record={"pattern": Take(layers=-1)}).trace["pattern"][-1]
            return attention_mass(pattern[:, :, 0].mean(1), model.layout)

        over_images(mass, model, jaxvit.stream(paths, model.config, 16))  # [images, G]

    Args:
      measure: `measure(model, images)`, a pytree of arrays [B, ..]; is jitted, and compiled once for batches of one
        shape, also over several calls.
      batches: as of `jaxvit.stream`, whose images that only fill the last batch are left out; or arrays [B, H, W, 3].
      total: number of images, for the progress bar.
      mesh: of `jaxvit.parallel.mesh`; each batch is spread over its devices. With several processes `batches` are those
        of this process, such as of `jaxvit.stream(jaxvit.parallel.share(paths), ..)`, and the result holds all.

    Returns:
      The same pytree, of NumPy arrays [images, ..] in the order of the images.

    Raises:
      ValueError: no images, or a measure that does not give one entry for each image; processes with the same images.

    Example:

        def measure(model, images):
            return {"norm": jnp.linalg.norm(model(images).cls, axis=-1)}

        found = over_images(measure, model, jaxvit.stream(paths, model.config, 8))
        found["norm"]  # one of each image, in their order
    """

    run, found = None, []
    model, mesh = parallel.working(model, mesh)
    with bar("images", total, progress) as advance:
        for _, images, valid in spread_batches(batches, mesh):
            run = run or _compiled(Program(measure, model, images))
            values = parallel.fetch(run(model, images))
            for path, value in jax.tree.leaves_with_path(values):
                if value.shape[:1] != valid.shape:
                    name = f"measure{jax.tree_util.keystr(path)}"
                    raise ValueError(f"{name} has shape {list(value.shape)}; expected [{len(valid)} images, ..]")
            found.append(jax.tree.map(lambda a, valid=valid: a[valid], values))
            advance(int(valid.sum()))
    if not found:
        raise ValueError("no images to measure")
    whole = jax.tree.map(lambda *a: np.concatenate(a), *found)
    return whole if mesh is None else parallel.joined(whole)


@kept(maxsize=16)
def _compiled(measure: Program) -> Callable[..., Any]:
    return jax.jit(lambda model, images: measure.function(model, images))
