"""Where each token stands: [CLS], registers, patches in row-major order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenLayout:
    """The sequence [CLS, register 0 .. register R - 1, patch (0, 0) .. patch (rows - 1, columns - 1)].

    A *group* is a set of tokens that is read or edited as one: [CLS] is one, each register is one, and the last is all
    the patches. Register 0 is the first register, and never [CLS]. Some models have no class token (`cls` is False).

    Example:

        layout = model.config.layout(56, 112)  # of images of 56 x 112 pixels
        layout.tokens, layout.group_names
    """

    registers: int
    grid: tuple[int, int]
    cls: bool = True

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches: 1 + R, with a class token."""
        return self.cls + self.registers

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        return self.prefix + self.patches

    @property
    def group_names(self) -> tuple[str, ...]:
        return (*["cls"][: self.cls], *(f"register {i}" for i in range(self.registers)), "patches")

    @property
    def groups(self) -> np.ndarray:
        """[T], the group each token belongs to."""
        return np.minimum(np.arange(self.tokens), self.prefix)

    @property
    def membership(self) -> np.ndarray:
        """[T, G] of 0 and 1: multiply a row of attention by it to get the mass on each group."""
        return (self.groups[:, None] == np.arange(self.prefix + 1)).astype(np.float32)
