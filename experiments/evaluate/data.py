"""Images whose answers are known: generated scenes, or a folder of classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxvit import ViT, find_images, stream
from jaxvit.io import embedded
from jaxvit.io.image_sets import PREFIX, open_images
from jaxvit.io.images import ImageError

from ..models import scenes


@dataclass(frozen=True)
class Answers:
    """Images to learn from, then images to test on.

    Attributes:
      source: what `jaxvit.stream` takes, of an image by number; those to learn from come first.
      labels: of each image, index into `classes`.
      train: how many are to learn from.
      name: where they come from.
      scene: the scene of this number, and its second view; None where there are none.
    """

    source: Callable[[int], Any]
    labels: np.ndarray
    classes: Sequence[str]
    train: int
    name: str
    scene: Callable[[int, int], scenes.Scene] | None = None


KEPT = 2000
"""Scenes that are kept in memory, 200 kB each: every intervention runs on the same ones."""


def generated(train: int, test: int, photographs: Path | None = None, first: int = 0) -> Answers:
    """Scenes over the photographs that come from PyPI, or those of a folder.

    Args:
      first: number of the first scene, a multiple of the number of classes.
    """
    paths = find_images(photographs or embedded.photographs())
    n, classes = train + test, scenes.CLASSES
    labels = np.arange(n) % len(classes)
    of = f"{n} generated scenes over {photographs or 'photographs from PyPI'}"
    scene = lru_cache(KEPT)(lambda number, view=0: scenes.draw(first + number, paths, view))
    return Answers(lambda number: scene(number, 0).image, labels, classes, train, of, scene)


def labelled(place: str, test_part: float, seed: int) -> Answers:
    """A folder with a subfolder for each class, or datasets:NAME[:SPLIT]; a part of each class is tested on.

    Raises:
      ImageError: there is no such thing, or an image has no class.
      ValueError: fewer than two classes of two images.
    """
    if not 0 < test_part < 1:
        raise ValueError(f"{test_part} of each class is to be tested on; expected more than 0 and less than 1")
    images = open_images(place, labelled=not place.startswith(PREFIX))
    labels = np.array(images.labels if images.labels is not None else [-1])
    if (labels < 0).any():
        raise ImageError(f"{images.title}: image {int(np.argmin(labels))} has no class")
    rng, train, test = np.random.default_rng(seed), [], []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cut = min(max(round(test_part * len(members)), 1), len(members) - 1)  # one at least on each side
        if len(members) > 1:
            test += list(members[:cut])
            train += list(members[cut:])
    if len(np.unique(labels[train])) < 2:
        raise ValueError(f"{images.title} has no two classes of two images")
    order = np.array([*sorted(train), *sorted(test)])
    single = len(labels) - len(order)
    title = images.title + (f", without {single} that are alone in their class" if single else "")

    def source(number: int) -> Any:
        return next(images.start(int(order[number]))).source

    return Answers(source, labels[order], images.classes, len(train), title)


def batches(model: ViT, sources: Iterable[Any], batch_size: int, size: Any) -> Iterator[tuple[Array, int]]:
    """Prepared images, all batches of one size, and how many of each count."""
    for batch in stream(sources, model.config, batch_size, size):
        yield jnp.asarray(batch.images), int(np.sum(batch.valid))
