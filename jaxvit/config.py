"""What a checkpoint is: its sizes, the choices that change its numbers, and how images are prepared for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from jaxvit.tokens import TokenLayout

Resampling = Literal["bicubic_antialias", "bicubic", "bicubic_offset"]
"""How positions learned on one grid are brought to another; see `jaxvit.positions`."""

Mlp = Literal["gelu", "swiglu"]
"""`gelu`: fc2(gelu(fc1(x))), with the exact (erf) GELU. `swiglu`: fc2(silu(gate(x)) * value(x))."""

_DINOV2_SIZES: dict[str, dict[str, Any]] = {
    "small": dict(depth=12, width=384, heads=6, hidden=1536, mlp="gelu"),
    "base": dict(depth=12, width=768, heads=12, hidden=3072, mlp="gelu"),
    "large": dict(depth=24, width=1024, heads=16, hidden=4096, mlp="gelu"),
    "giant": dict(depth=40, width=1536, heads=24, hidden=4096, mlp="swiglu"),
}


@dataclass(frozen=True)
class Preprocess:
    """Resize the short side to `resize`, crop the centre to `crop` x `crop`, scale to [0, 1], normalise per channel.

    Lengths in pixels; `mean` and `std` in units of the [0, 1] range, in RGB order.
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if not 0 < self.crop <= self.resize:
            raise ValueError(f"crop {self.crop} must be positive and at most resize {self.resize}")

    def at(self, size: int) -> Preprocess:
        """The same preparation for crops of `size` pixels: the resize keeps its proportion to the crop."""
        return replace(self, resize=round(self.resize * size / self.crop), crop=size)


@dataclass(frozen=True)
class ViTConfig:
    """A Vision Transformer with [CLS] and register tokens; immutable, hashable, and static under every transformation.

    Attributes:
      depth: number of blocks, L.
      width: size of a token, D.
      heads: attention heads, H; the head size is width // heads.
      hidden: size of the MLP's hidden layer, F (for `swiglu`, of its value branch).
      mlp: which MLP.
      registers: number of register tokens, R; 0 for none.
      patch: side of a square patch, in pixels.
      grid: rows and columns of the patches that positions were learned for.
      layer_scale: whether each branch is multiplied by a learned vector before it is added to the stream.
      eps: epsilon of every LayerNorm.
      resampling: the rule that brings positions to another grid. It belongs to the checkpoint's *source*: the same
        weights give different features at 224 px in different libraries.
      preprocess: how images are prepared.
    """

    depth: int
    width: int
    heads: int
    hidden: int
    mlp: Mlp = "gelu"
    registers: int = 0
    patch: int = 14
    grid: tuple[int, int] = (37, 37)
    layer_scale: bool = True
    eps: float = 1e-6
    resampling: Resampling = "bicubic_antialias"
    preprocess: Preprocess = Preprocess()

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "hidden", "patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.registers < 0 or min(self.grid) < 1:
            raise ValueError(f"registers ({self.registers}) cannot be negative nor a grid ({self.grid}) empty")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of the number of heads, {self.heads}")
        for name, value, known in (
            ("mlp", self.mlp, get_args(Mlp)),
            ("resampling", self.resampling, get_args(Resampling)),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; known: {', '.join(known)}")

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @classmethod
    def dinov2(cls, size: str, registers: int = 0, **changes: Any) -> ViTConfig:
        """DINOv2 in one of its sizes: small, base, large (GELU MLP) or giant (SwiGLU), for 518 px images.

        `changes` override single fields, such as `depth=2` for a test.
        """
        if size not in _DINOV2_SIZES:
            raise ValueError(f"no DINOv2 of size {size!r}; there are {', '.join(_DINOV2_SIZES)}")
        values: dict[str, Any] = {**_DINOV2_SIZES[size], "registers": registers, **changes}
        return cls(**values)

    def layout(self, height: int | None = None, width: int | None = None) -> TokenLayout:
        """Where each token stands in the sequence of an image of `height` x `width` pixels (default: the crop's size).

        Raises:
          ValueError: if a side is not a positive multiple of the patch size.
        """
        height = self.preprocess.crop if height is None else height
        width = height if width is None else width
        if height < 1 or width < 1 or height % self.patch or width % self.patch:
            raise ValueError(
                f"images are {height}x{width} pixels; sides must be positive multiples of the patch size {self.patch}: "
                f"resize them, or use jaxvit.prepare"
            )
        return TokenLayout(self.registers, (height // self.patch, width // self.patch))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ViTConfig:
        """The inverse of `to_dict`. Unknown or missing names raise a ValueError that lists them."""
        return _strict(cls, values, grid=tuple, preprocess=lambda p: _strict(Preprocess, p, mean=tuple, std=tuple))


def _strict(cls: Any, values: Mapping[str, Any], **decode: Any) -> Any:
    known = {f.name for f in fields(cls)}
    unknown, missing = sorted(set(values) - known), sorted(known - set(values))
    if unknown or missing:
        raise ValueError(f"{cls.__name__} from a dict: unknown names {unknown}, missing names {missing}")
    return cls(**{name: decode.get(name, lambda v: v)(value) for name, value in values.items()})
