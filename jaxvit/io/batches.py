"""Images as any number of batches, whatever form they are given in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jaxvit.io import parallel
from jaxvit.io.images import Batch

Images = Array | np.ndarray | Batch | Iterable[Array | np.ndarray | Batch]
"""[B, H, W, 3], or any number of batches, such as of `jaxvit.stream`, whose repeated images do not count."""


def batches_of(images: Images) -> Iterable[Array | np.ndarray | Batch]:
    """Batches, also where one is given as it is."""
    if isinstance(images, Batch) or (isinstance(images, Array | np.ndarray) and images.ndim < 5):
        return [images]
    return images


def images_and_valid(batch: Array | np.ndarray | Batch) -> tuple[Array, np.ndarray]:
    """The images of a batch, and which of them count."""
    if isinstance(batch, Batch):
        return batch.images, np.asarray(batch.valid)
    if np.ndim(batch) != 4:
        raise ValueError(f"images have shape {list(np.shape(batch))}; expected [batch, height, width, channels]")
    return jnp.asarray(batch), np.ones(len(batch), bool)


def spread_batches(
    batches: Iterable[Array | np.ndarray | Batch], mesh: Mesh | None
) -> Iterator[tuple[Array | np.ndarray | Batch, Any, np.ndarray]]:
    """Each batch as it is given, its images, on the mesh if there is one, and which of these count.

    Raises:
      ValueError: with a mesh, a process has no images, or two have the same.
    """
    begun = False
    for each in batches:
        images, valid = images_and_valid(each)
        if mesh is not None and not begun:
            parallel.check_shares(images)
        begun = True
        yield each, *parallel.filled(images, valid, mesh)
    if mesh is not None and not begun:
        parallel.check_shares(None)
