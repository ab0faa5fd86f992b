"""Scenes to train on, in memory, and how a batch of them is varied."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from jaxvit.io.checkpoint import replacing_file
from jaxvit.io.progress import bar

from ..models import scenes


class Scenes(NamedTuple):
    """Scenes of the numbers from 0 on; those to learn from come first.

    Attributes:
      images: [n, pixels, pixels, 4]: red, green, blue, and how much of a pixel is the shape's, 0 to 255.
      labels: [n], index into `scenes.CLASSES`.
      train: how many are to learn from.
    """

    images: UInt8[np.ndarray, "n pixels pixels 4"]
    labels: Int[np.ndarray, " n"]
    train: int


_photographs: list[Image.Image] = []


def _open(photographs: Sequence[Path]) -> None:
    _photographs[:] = [scenes.opened(path) for path in photographs]


def _draw(number: int, pixels: int) -> np.ndarray:
    scene = scenes.draw(number, _photographs)
    shape = np.where(scene.mask > 0, 255, 0).astype(np.uint8)
    small = (Image.fromarray(a).resize((pixels, pixels), Image.Resampling.BOX) for a in (scene.image, shape))
    return np.dstack([np.asarray(picture) for picture in small])


def digest(photographs: Sequence[Path]) -> str:
    """sha256 of what scenes are made from: the photographs in their order, and the code that draws."""
    whole = hashlib.sha256(Path(scenes.__file__).read_bytes())
    for path in photographs:
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def load(
    train: int, test: int, pixels: int, photographs: Sequence[Path], folder: Path, *, progress: bool = False
) -> Scenes:
    """Scenes 0 to `train` + `test` - 1, drawn the first time by all cores and kept in `folder`.

    Args:
      pixels: of a side; a divisor of `scenes.SIZE` averages whole pixels.
      photographs: what scenes are made of, in an order that stays.
    """
    n = train + test
    kept = folder / f"scenes-{n}-{pixels}-{digest(photographs)[:12]}.npy"
    if kept.is_file():
        images = np.load(kept)
    else:
        images = np.empty((n, pixels, pixels, 4), np.uint8)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Not a fork: JAX has threads.
        with get_context("spawn").Pool(cores, _open, (list(photographs),)) as pool, bar("scenes", n, progress) as more:
            for number, image in enumerate(pool.imap(partial(_draw, pixels=pixels), range(n), chunksize=32)):
                images[number] = image
                more(1)
        with replacing_file(kept) as temporary, open(temporary, "wb") as file:
            np.save(file, images)
    return Scenes(images, np.arange(n) % len(scenes.CLASSES), train)


SHIFT = 0.08
"""How far a picture is moved at most, in terms of its side; what comes in is mirrored."""
LIGHT = 0.3
"""How much brightness and contrast change at most."""


def normalised(images: Array, mean: Sequence[float], std: Sequence[float]) -> Float[Array, "B H W 3"]:
    """The colours, 0 to 255, as the model reads them."""
    scale, shift = (jnp.asarray(values, jnp.float32)[None, None, None] for values in (std, mean))
    return (images[..., :3].astype(jnp.float32) / 255 - shift) / scale


def shares(images: Array, patch: int) -> Float[Array, "B N"]:
    """How much of each patch is the shape's, 0 to 1."""
    B, H, W = images.shape[:3]
    shape = images[..., 3].astype(jnp.float32) / 255
    return shape.reshape(B, H // patch, patch, W // patch, patch).mean(axis=(2, 4)).reshape(B, -1)


def varied(images: UInt8[Array, "B H W 4"], key: Array) -> Float[Array, "B H W 4"]:
    """The pictures mirrored by chance, moved a little, with other brightness and contrast; 0 to 255."""

    def one(image: Array, key: Array) -> Array:
        flip, move, light = jax.random.split(key, 3)
        image = jnp.where(jax.random.bernoulli(flip), image[:, ::-1], image)
        room = round(SHIFT * image.shape[0])
        wide = jnp.pad(image, ((room, room), (room, room), (0, 0)), mode="reflect")
        top, left = jax.random.randint(move, (2,), 0, 2 * room + 1)
        image = jax.lax.dynamic_slice(wide, (top, left, 0), image.shape).astype(jnp.float32)
        brightness, contrast = jax.random.uniform(light, (2,), minval=1 - LIGHT, maxval=1 + LIGHT)
        colours, shape = image[..., :3], image[..., 3:]
        grey = colours.mean()
        lit = jnp.clip((colours - grey) * contrast + grey * brightness, 0, 255)
        return jnp.concatenate([lit, shape], axis=-1)

    return jax.vmap(one)(images, jax.random.split(key, len(images)))
