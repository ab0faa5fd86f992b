"""Linear segmentation: one linear layer on the features of patches, upsampled to pixels.

Axes: n images, rows and columns of patches, D features, C classes, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from jaxvit.tasks.classify import Classifier, logistic_regression
from jaxvit.tasks.score import Score

IGNORED = 255
"""The class of pixels that do not count."""


def parts_of_patches(
    masks: Integer[np.ndarray, "n H W"], grid: tuple[int, int], classes: int
) -> Float[np.ndarray, "n r c C"]:
    """Which part of each patch belongs to each class. Ignored pixels belong to none.

    Raises:
      ValueError: sides that are no multiples of the grid's.

    Example:

        parts_of_patches(masks, (4, 4), 3)  # [n, 4, 4, 3]: how much of each patch is of each class
    """
    n, H, W = masks.shape
    rows, columns = grid
    if H % rows or W % columns:
        raise ValueError(f"masks of {H}x{W} pixels do not fit {rows}x{columns} patches: resize them to a multiple")
    blocks = masks.reshape(n, rows, H // rows, columns, W // columns).swapaxes(2, 3).reshape(n, rows, columns, -1)
    return np.stack([(blocks == c).mean(axis=-1) for c in range(classes)], axis=-1)


def fit_segmentation(
    patches: Float[np.ndarray, "n rows columns D"],
    masks: Integer[np.ndarray, "n H W"],
    classes: int,
    *,
    l2: float = 0.1,
    iterations: int = 1000,
) -> Classifier:
    """A linear layer from a patch to classes: multinomial logistic regression on the parts of patches.

    Its loss is the cross-entropy of all pixels, each with the scores of its patch, divided by the pixels of a patch.

    Args:
      l2: penalty, for features that are scaled as they are given.
      iterations: at most; a fit that has not converged by then warns.

    Example:

        classifier = fit_segmentation(patches, masks, 3)
        score = mean_iou(segment(classifier, patches, (56, 56)), masks, 3)
    """
    parts = parts_of_patches(masks, patches.shape[1:3], classes).reshape(-1, classes)
    flat, known = patches.reshape(-1, patches.shape[-1]), parts.sum(axis=1) > 0
    return logistic_regression(flat[known], parts[known], classes, l2=l2, iterations=iterations).trusted(iterations)


def segment(
    classifier: Classifier, patches: Float[np.ndarray, "n rows columns D"], size: tuple[int, int]
) -> Iterator[Integer[np.ndarray, "H W"]]:
    """The class of each pixel, picture by picture: scores of patches, upsampled bilinearly, and the largest.

    Example:

        classifier = fit_segmentation(patches, masks, 3)
        next(segment(classifier, patches, (56, 56)))  # [56, 56], a class of each pixel
    """
    for picture in patches:
        scores = classifier.scores(picture.reshape(-1, picture.shape[-1]))
        scores = jnp.asarray(scores.reshape(*picture.shape[:2], -1), jnp.float32)
        pixels = jax.image.resize(scores, (*size, scores.shape[-1]), "linear")
        yield np.asarray(pixels.argmax(axis=-1))


def mean_iou(found: Iterator[np.ndarray], masks: Integer[np.ndarray, "n H W"], classes: int) -> Score:
    """Mean over classes of intersection over union, each summed over all images; without classes that are nowhere.

    Example:

        mean_iou(iter(masks), masks, 3).value  # 1.0
    """
    counts = []
    for ours, mask in zip(found, masks, strict=True):
        known = mask != IGNORED
        both = [((ours == c) & (mask == c) & known).sum() for c in range(classes)]
        either = [(((ours == c) | (mask == c)) & known).sum() for c in range(classes)]
        counts.append([both, either])

    def of(sums: np.ndarray) -> np.ndarray | np.floating:
        both, either = sums[..., 0, :], sums[..., 1, :]
        with np.errstate(invalid="ignore"):
            return np.nanmean(both / np.where(either > 0, either, np.nan), axis=-1)

    return Score(np.array(counts, np.float64), of)
