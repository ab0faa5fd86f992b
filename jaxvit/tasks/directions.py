"""Features of which only the direction counts."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def unit(features: Float[np.ndarray, "... D"]) -> Float[np.ndarray, "... D"]:
    """Each row divided by its length, in float64; rows of zeros stay."""
    features = np.asarray(features, np.float64)
    length = np.linalg.norm(features, axis=-1, keepdims=True)
    return np.divide(features, length, out=np.zeros_like(features), where=length != 0)
