"""Tasks without a fit: which patch of one picture is which of another, and where the object is.

Axes: rows and columns of patches, D features. Points and boxes are in patches: (0, 0) is the upper left corner of the
first patch, (rows, columns) the lower right one of the last.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from jaxvit.tasks.directions import unit

Box = tuple[float | int, float | int, float | int, float | int]
"""Top, left, bottom, right."""


def correspondences(
    source: Float[np.ndarray, "rows columns D"],
    target: Float[np.ndarray, "rows columns D"],
    points: Float[np.ndarray, "points 2"],
) -> Float[np.ndarray, "points 2"]:
    """Where points of the source are in the target: the centre of the patch of highest cosine with theirs.

    Args:
      points: row and column.

    Example:

        correspondences(a, a, np.array([[2.5, 3.5]]))  # [[2.5, 3.5]]
    """
    places = np.clip(np.floor(points).astype(int), 0, np.array(source.shape[:2]) - 1)
    chosen = unit(source[places[:, 0], places[:, 1]])
    best = (chosen @ unit(target.reshape(-1, target.shape[-1])).T).argmax(axis=1)
    return np.stack(np.unravel_index(best, target.shape[:2]), axis=1) + 0.5


def pck(
    found: Float[np.ndarray, "points 2"],
    expected: Float[np.ndarray, "points 2"],
    extent: float | int,
    alpha: float = 0.1,
) -> Bool[np.ndarray, " points"]:
    """Which points are right: within `alpha` times `extent`, the larger side of the object's box (Yang & Ramanan).

    Example:

        pck(np.array([[10.0, 10.0], [50.0, 9.0]]), np.array([[12.0, 10.0], [9.0, 9.0]]), extent=40)  # True, False
    """
    return np.linalg.norm(found - expected, axis=1) <= alpha * extent


def point_in_box(
    cls: Float[np.ndarray, " D"], patches: Float[np.ndarray, "rows columns D"], box: Box
) -> tuple[bool, tuple[float, float]]:
    """Whether the patch of highest cosine with [CLS] lies in the box, and its centre.

    Example:

        inside, point = point_in_box(np.asarray(out.cls[0]), patches[0], (0, 0, 4, 4))
    """
    scores = unit(patches) @ unit(cls)
    row, column = np.unravel_index(scores.argmax(), scores.shape)
    point = (float(row) + 0.5, float(column) + 0.5)
    return bool(box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]), point


def lost(features: Float[np.ndarray, "rows columns D"], expand: int = 100) -> Box:
    """The box of the object in a picture, from one feature a patch, by LOST (Siméoni et al., BMVC 2021).

    The seed is the patch that agrees, by the sign of the product, with the fewest others: objects cover less than the
    background does. Of the `expand` patches that agree with the fewest, those that agree with the seed join it. Patches
    whose products with all of these sum to 0 or more are the object: the box is that of the connected part of them that
    holds the seed.

    Args:
      features: the paper takes the keys of the last layer.

    Example:

        lost(patches[0])  # top, left, bottom, right, in patches
    """
    shape = features.shape[:2]
    flat = np.asarray(features, np.float64).reshape(-1, features.shape[-1])
    products = flat @ flat.T
    degree = (products >= 0).sum(axis=1)
    order = np.argsort(degree, kind="stable")
    seed = order[0]
    joined = [patch for patch in order[:expand] if products[seed, patch] >= 0]
    mask = (products[:, joined].sum(axis=1) >= 0).reshape(shape)
    place = np.unravel_index(seed, shape)
    mask[place] = True
    parts: np.ndarray = ndimage.label(mask)[0]  # pyright: ignore[reportIndexIssue]
    rows, columns = np.nonzero(parts == parts[place])
    return float(rows.min()), float(columns.min()), float(rows.max()) + 1, float(columns.max()) + 1


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; CorLoc counts images where it is above 0.5.

    Example:

        overlap((0, 0, 4, 4), (0, 0, 4, 2))  # 0.5
    """
    height, width = (max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0) for i in (0, 1))
    sizes = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    union = sum(sizes) - height * width
    return height * width / union if union > 0 else 0.0
