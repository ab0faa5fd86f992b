"""Pictures with known answers: a textured shape over a photograph, its class, mask, box, and where its points went.

    scene = draw(7, photographs)          # the same for the same number
    scene.image, scene.label, scene.mask, scene.box

A shape is cut out of one photograph and laid on another, at a random place, size and angle, so that neither texture nor
colour nor place tells its class. A second view of a scene has the same shape, turned, scaled and moved, on another
background: each of its points is known in both. Everything follows from the number of the scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("disc", "square", "triangle", "ring", "cross", "star", "bar", "crescent", "diamond", "heart")
SIZE = 224
"""Pixels of a side."""


class Scene(NamedTuple):
    """A picture and its answers.

    Attributes:
      image: uint8 [SIZE, SIZE, 3].
      label: index into `CLASSES`.
      mask: uint8 [SIZE, SIZE], 0 on the background, 1 + label on the shape.
      box: of the shape in pixels: top, left, bottom, right.
      points: of the shape in pixels, row and column, float [points, 2]: those of two views of a scene go together.
    """

    image: np.ndarray
    label: int
    mask: np.ndarray
    box: tuple[int, int, int, int]
    points: np.ndarray


def outline(name: str) -> list[list[tuple[float, float]]]:
    """Polygons of a shape of about unit radius; the second is a hole."""
    around = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    circle = [(np.cos(a), np.sin(a)) for a in around]
    match name:
        case "disc":
            return [circle]
        case "square":
            return [[(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]]
        case "triangle":
            return [[(np.cos(a), np.sin(a)) for a in np.pi * np.array([0.5, 7 / 6, 11 / 6])]]
        case "ring":
            return [circle, [(0.55 * x, 0.55 * y) for x, y in circle]]
        case "cross":
            a, b = 0.32, 0.95
            corner = [(a, b), (a, a), (b, a), (b, -a), (a, -a), (a, -b)]
            return [[*corner, *((-x, -y) for x, y in corner)]]
        case "star":
            radii = np.where(np.arange(10) % 2, 0.42, 1.05)
            return [[(r * np.sin(a), -r * np.cos(a)) for r, a in zip(radii, np.arange(10) * np.pi / 5, strict=True)]]
        case "bar":
            return [[(-1.05, -0.3), (1.05, -0.3), (1.05, 0.3), (-1.05, 0.3)]]
        case "crescent":
            return [circle, [(0.45 + 0.85 * x, 0.85 * y) for x, y in circle]]
        case "diamond":
            return [[(0, -1.05), (0.6, 0), (0, 1.05), (-0.6, 0)]]
        case "heart":
            x = 16 * np.sin(around) ** 3
            y = -(13 * np.cos(around) - 5 * np.cos(2 * around) - 2 * np.cos(3 * around) - np.cos(4 * around))
            return [list(zip(x / 16, y / 16, strict=True))]
    raise ValueError(f"there is no shape {name!r}")


@lru_cache(maxsize=len(CLASSES))
def stencil(name: str, size: int = 4 * SIZE) -> Image.Image:
    """A shape, white on black, that fills most of a square."""
    picture = Image.new("L", (size, size), 0)
    pen = ImageDraw.Draw(picture)
    for fill, polygon in zip((255, 0), outline(name), strict=False):
        pen.polygon([(size / 2 * (1 + x / 1.2), size / 2 * (1 + y / 1.2)) for x, y in polygon], fill=fill)
    return picture


def opened(photograph: Path | Image.Image) -> Image.Image:
    if isinstance(photograph, Image.Image):
        return photograph
    with Image.open(photograph) as picture:
        return picture.convert("RGB")


def crop_of(photographs: Sequence[Path | Image.Image], rng: np.random.Generator) -> Image.Image:
    """A random square of a random photograph, at random mirrored, SIZE pixels wide."""
    picture = opened(photographs[rng.integers(len(photographs))])
    side = rng.uniform(0.5, 1.0) * min(picture.size)
    left, top = (rng.uniform(0, n - side) for n in picture.size)
    cut = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else cut


def placed(picture: Image.Image, scale: float, angle: float, centre: tuple[float, float]) -> Image.Image:
    """A square picture, `scale` of the SIZE wide, turned about its middle, which lands on `centre` (row, column)."""
    factor, c, s = picture.width / (SIZE * scale), np.cos(angle), np.sin(angle)
    middle, (row, column) = picture.width / 2, centre
    # Where a pixel of the result comes from: column, row.
    matrix = (factor * c, factor * s, middle - factor * (c * column + s * row))
    matrix += (-factor * s, factor * c, middle - factor * (-s * column + c * row))
    return picture.transform((SIZE, SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


def draw(number: int, photographs: Sequence[Path | Image.Image], view: int = 0) -> Scene:
    """The scene of this number; its class is the number modulo ten.

    Args:
      photographs: files that textures and backgrounds come from, in an order that stays; where many scenes are drawn,
        as pictures in RGB, so that they are not decoded for each.
      view: 0, or another one with the same shape and texture.
    """
    label = number % len(CLASSES)
    of_shape, of_view = np.random.default_rng([number, 0]), np.random.default_rng([number, 1 + view])
    shape = stencil(CLASSES[label])
    texture = crop_of(photographs, of_shape)
    tint = of_shape.uniform(0.6, 1.4, 3)
    pixels = np.clip(np.asarray(texture, np.float64) * tint, 0, 255).astype(np.uint8)
    inside = np.argwhere(np.asarray(shape.resize((SIZE, SIZE))) > 250) + 0.5
    spots = inside[of_shape.permutation(len(inside))[:16]]  # row, column in the square of the stencil
    scale, angle = of_view.uniform(0.45, 0.8), of_view.uniform(-0.6, 0.6) if view else of_view.uniform(-0.3, 0.3)
    room = SIZE * scale * 0.45
    centre = (of_view.uniform(room, SIZE - room), of_view.uniform(room, SIZE - room))
    background = np.asarray(crop_of(photographs, of_view), np.float64)
    alpha = np.asarray(placed(shape, scale, angle, centre), np.float64)[..., None] / 255
    wide = Image.fromarray(pixels).resize(shape.size, Image.Resampling.BICUBIC)
    object = np.asarray(placed(wide, scale, angle, centre), np.float64)
    image = (alpha * object + (1 - alpha) * background).round().astype(np.uint8)
    there = alpha[..., 0] > 0.5
    rows, columns = np.nonzero(there)
    offset = (spots - SIZE / 2) * scale
    c, s = np.cos(angle), np.sin(angle)
    points = np.stack([s * offset[:, 1] + c * offset[:, 0], c * offset[:, 1] - s * offset[:, 0]], axis=1) + centre
    box = (int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1)
    return Scene(image, label, np.where(there, 1 + label, 0).astype(np.uint8), box, points)
