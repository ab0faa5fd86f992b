"""What a checkpoint is: its sizes, the choices that change its numbers, and how images are prepared for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from math import inf, isfinite
from numbers import Integral, Real
from typing import Any, Literal, get_args

from jaxvit.model.tokens import TokenLayout

Resampling = Literal["bicubic_antialias", "bicubic", "bicubic_offset"]
"""How positions learned on one grid are brought to another; see `jaxvit.model.positions`."""

Mlp = Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"]
"""`gelu`: fc2(gelu(fc1(x))), with the exact (erf) GELU; `gelu_tanh` and `quick_gelu`, x sigmoid(1.702 x), approximate
it, and belong to the checkpoints trained with them. `swiglu`: out(silu(gate(x)) * value(x))."""

Norm = Literal["layer", "rms"]
"""LayerNorm, or RMSNorm, which neither centres nor has a bias."""

FinalNorm = Literal["tokens", "pooled", "none"]
"""Where the norm after the blocks stands: on all tokens, on what they are pooled to alone, or nowhere."""

Pool = Literal["cls", "mean", "cls_mean", "attention", "distilled"]
"""What `Output.pooled` is: [CLS]; the mean of the patches; both, one after the other (2 D numbers); what a learned
query attends to (`jaxvit.model.heads`); or the mean of [CLS] and the last register: a distilled DeiT's second."""

Fit = Literal["cover", "contain", "stretch", "none"]
"""How an image is brought to a size; see `Preprocess`."""

Interpolation = Literal["bicubic", "bilinear", "lanczos", "nearest", "box", "hamming"]
"""Pillow's filters. All but "nearest" average over the pixels that a shrunk image merges."""

Rope = Literal["float32", "bfloat16"]
"""Rotary positions as in DINOv3, with periods in this type: its training rounded them, its later ports do not."""

CHOICES = {
    "mlp": get_args(Mlp),
    "norm": get_args(Norm),
    "final_norm": get_args(FinalNorm),
    "pool": get_args(Pool),
    "rope": (None, *get_args(Rope)),
    "resampling": get_args(Resampling),
}

_DINOV2_SIZES: dict[str, dict[str, Any]] = {
    "small": dict(depth=12, width=384, heads=6, hidden=1536, mlp="gelu"),
    "base": dict(depth=12, width=768, heads=12, hidden=3072, mlp="gelu"),
    "large": dict(depth=24, width=1024, heads=16, hidden=4096, mlp="gelu"),
    "giant": dict(depth=40, width=1536, heads=24, hidden=4096, mlp="swiglu"),
}


@dataclass(frozen=True)
class Preprocess:
    """How photographs become what a model reads: resize, cut out the centre, scale to [0, 1], normalise per channel.

    Attributes:
      resize: (height, width) in pixels that `fit` refers to; one number stands for both.
      crop: (height, width) in pixels of what the model reads, or one number for both. Where the resized image is
        smaller, it is padded.
      mean, std: of each channel, in units of the [0, 1] range, in RGB order. 0 and 1 leave the range [0, 1] as it is.
      fit: how an image is brought to `resize`. "cover": the aspect ratio is kept and the image covers `resize`, so its
        short side becomes that of a square. "contain": the aspect ratio is kept and the image fits inside. "stretch":
        both sides become those of `resize`. "none": it keeps its size.
      interpolation: Pillow's filter.
      margin: how half a pixel of the margin around the crop is rounded: "floor", as transformers does it, or "round",
        to even, as torchvision and timm do it.
      fill: what is padded, "black" or the "mean".
      whole: whether resized values are rounded to whole grey levels, as Pillow does it; DINOv3's processor in
        transformers does not.

    Example:

        Preprocess(256, 224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear")
    """

    resize: int | tuple[int, int] = (256, 256)
    crop: int | tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    fit: Fit = "cover"
    interpolation: Interpolation = "bicubic"
    margin: Literal["floor", "round"] = "floor"
    fill: Literal["black", "mean"] = "black"
    whole: bool = True

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            object.__setattr__(self, name, both_sides(getattr(self, name), name))
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        choices = {"fit": get_args(Fit), "interpolation": get_args(Interpolation)}
        choices |= {"margin": ("floor", "round"), "fill": ("black", "mean"), "whole": (False, True)}
        for name, kinds in choices.items():
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} is {getattr(self, name)!r}; known: {', '.join(map(str, kinds))}")
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(f"mean {self.mean} and std {self.std} must have one number for each channel")
        if not all(map(isfinite, self.mean)) or not all(0 < x < inf for x in self.std):
            raise ValueError(f"mean {self.mean} and std {self.std} must be finite, and std positive")

    def at(self, size: int | tuple[int, int] | None) -> Preprocess:
        """The same preparation for crops of `size` pixels: the resize keeps its proportion to the crop. None: itself.

        Example:

            Preprocess(256, 224).at(448).resize  # (512, 512)
        """
        if size is None:
            return self
        height, width = both_sides(size, "size")
        (rows, columns), (h, w) = self.resized, self.size
        return replace(self, resize=(round(rows * height / h), round(columns * width / w)), crop=(height, width))

    def in_words(self) -> str:
        """The preparation as one line.

        Example:

            Preprocess().in_words()  # short side to 256, bicubic; crop 224x224; mean 0.485 0.456 0.406, std ..
        """
        h, w = self.resized
        side = f"{h}x{w}"
        fits = {
            "cover": f"short side to {h}" if h == w else f"cover {side}",
            "contain": f"long side to {h}" if h == w else f"fit into {side}",
            "stretch": f"stretch to {side}",
            "none": "no resize",
        }
        parts = [fits[self.fit] + (f", {self.interpolation}" if self.fit != "none" else "")]
        crop = "x".join(map(str, self.size))
        if not (self.fit == "stretch" and self.crop == self.resize):
            parts.append(f"crop{f' or pad with {self.fill}' if self.pads else ''} {crop}")
        mean, std = (" ".join(f"{x:.3g}" for x in numbers) for numbers in (self.mean, self.std))
        return "; ".join([*parts, f"mean {mean}, std {std}"])

    @property
    def pads(self) -> bool:
        """Whether an image may come out smaller than the crop."""
        return self.fit in ("contain", "none") or any(c > r for c, r in zip(self.size, self.resized, strict=True))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of what the model reads."""
        return both_sides(self.crop, "crop")

    @property
    def resized(self) -> tuple[int, int]:
        """(height, width) in pixels that `fit` refers to."""
        return both_sides(self.resize, "resize")


def both_sides(size: Any, name: str) -> tuple[int, int]:
    """(height, width) from one number or both.

    Raises:
      ValueError: neither, or not positive.
    """
    sides = (size, size) if isinstance(size, Integral) else tuple(size) if isinstance(size, tuple | list) else ()
    if len(sides) == 2 and all(isinstance(n, Integral) and not isinstance(n, bool) for n in sides):
        height, width = map(int, sides)
        if min(height, width) > 0:
            return height, width
    raise ValueError(f"{name} is {size!r}; expected pixels, one number or (height, width)")


@dataclass(frozen=True)
class ViTConfig:
    """A Vision Transformer with [CLS] and register tokens; immutable, hashable, and static under every transformation.

    The defaults are those of DINOv2.

    Attributes:
      depth: number of blocks, L.
      width: size of a token, D.
      heads: attention heads, H; the head size is width // heads.
      hidden: size of the MLP's hidden layer, F (for `swiglu`, of its value branch).
      mlp: which MLP.
      cls: whether there is a class token.
      registers: number of register tokens, R; 0 for none.
      patch: side of a square patch, in pixels.
      channels: of the images; 3 for RGB. Others are given as arrays, as `jaxvit.prepare` makes RGB.
      grid: rows and columns of the patches that positions were learned for.
      positions: whether a learned vector is added to each patch.
      mask_token: whether there is a vector that stands in for hidden patches during pretraining. A forward pass does
        not use it; it is kept, so that exports hold it.
      rope: rotary positions, which turn the queries and keys of patches; None for none.
      rope_base: the largest of their periods is about this many times the smallest.
      patch_bias, qkv_bias, proj_bias: whether there are biases in the embedding of patches; in queries, keys and
        values; in what attention and MLP end with, and in the MLP's first layer.
      patch_norm: whether patches are normalised before positions are added.
      pre_norm: whether tokens are normalised before the first block.
      qk_norm: whether queries and keys are normalised, head by head.
      branch_norms: whether attention and MLP normalise what their last matrix reads.
      layer_scale: whether each branch is multiplied by a learned vector before it is added to the stream.
      norm: which norm, everywhere.
      eps: epsilon of every norm.
      final_norm: where the norm after the blocks stands.
      pool: what tokens are pooled to.
      pool_prefix: whether an attention pool also reads the tokens before the patches.
      classes: size of the classifier of what is pooled, `Output.logits`; 0 for none.
      projection: size of a CLIP's linear map, without bias, of what is pooled into the space shared with texts,
        `Output.projection`; 0 for none.
      resampling: the rule that brings positions to another grid. It belongs to the checkpoint's *source*: the same
        weights give different features at 224 px in different libraries.
      preprocess: how images are prepared.

    Example:

        ViTConfig(depth=4, width=64, heads=2, hidden=128, patch=8, grid=(8, 8), registers=4)
        ViTConfig.dinov2("base", registers=4).layout(224, 224).tokens  # 261: [CLS], 4 registers, 16 x 16 patches
    """

    depth: int
    width: int
    heads: int
    hidden: int
    mlp: Mlp = "gelu"
    cls: bool = True
    registers: int = 0
    patch: int = 14
    channels: int = 3
    grid: tuple[int, int] = (37, 37)
    positions: bool = True
    mask_token: bool = False
    rope: Rope | None = None
    rope_base: float = 100.0
    patch_bias: bool = True
    qkv_bias: bool = True
    proj_bias: bool = True
    patch_norm: bool = False
    pre_norm: bool = False
    qk_norm: bool = False
    branch_norms: bool = False
    layer_scale: bool = True
    norm: Norm = "layer"
    eps: float = 1e-6
    final_norm: FinalNorm = "tokens"
    pool: Pool = "cls"
    pool_prefix: bool = False
    classes: int = 0
    projection: int = 0
    resampling: Resampling = "bicubic_antialias"
    preprocess: Preprocess = Preprocess()

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("depth", "width", "heads", "hidden", "patch", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if min(self.registers, self.classes, self.projection) < 0 or min(self.grid) < 1:
            raise ValueError(
                f"registers ({self.registers}), classes ({self.classes}) and projection ({self.projection}) cannot be "
                f"negative, nor a grid ({self.grid}) be empty"
            )
        if self.classes and self.projection:
            raise ValueError("a model has a classifier or a projection, not both")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of the number of heads, {self.heads}")
        for name, kinds in CHOICES.items():
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} is {getattr(self, name)!r}; known: {', '.join(map(str, kinds))}")
        if (self.pool in ("cls", "cls_mean", "distilled") and not self.cls) or (
            self.pool == "distilled" and not self.registers
        ):
            raise ValueError(f"pool {self.pool!r} reads a token that this model does not have")
        if self.pool in ("cls_mean", "distilled") and self.final_norm == "pooled":
            raise ValueError(f"pool {self.pool!r} reads normalised tokens: the final norm must stand on tokens")
        if self.pool == "attention" and self.mlp == "swiglu":
            raise ValueError("an attention pool has a plain MLP, with the activation of the blocks': not with swiglu")
        if self.rope is not None and self.head_size % 4:
            raise ValueError(f"rotary positions need a head size that is a multiple of 4, not {self.head_size}")

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches: [CLS] and the registers."""
        return self.cls + self.registers

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
        if height is None:
            height, width = self.preprocess.size if width is None else (width, width)
        width = height if width is None else width
        if height < 1 or width < 1 or height % self.patch or width % self.patch:
            raise ValueError(
                f"images are {height}x{width} pixels; sides must be positive multiples of the patch size {self.patch}: "
                f"resize them, or use jaxvit.prepare"
            )
        return TokenLayout(self.registers, (height // self.patch, width // self.patch), self.cls)

    def in_words(self) -> str:
        """The config as one line.

        Example:

            ViTConfig.dinov2("small", 4).in_words()  # 12 blocks of width 384, 6 heads, gelu MLP, 4 registers, ..
        """
        parts = [f"{self.depth} blocks of width {self.width}", f"{self.heads} heads", f"{self.mlp} MLP"]
        parts += [f"{self.registers} registers" if self.registers else "no registers"]
        parts += ["no class token"] * (not self.cls)
        parts += [f"images of {self.channels} channels"] * (self.channels != 3)
        parts += [f"patches of {self.patch} px", f"a grid of {self.grid[0]}x{self.grid[1]}"]
        parts += [f"{self.classes} classes"] * (self.classes > 0)
        parts += [f"a projection to {self.projection}"] * (self.projection > 0)
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ViTConfig:
        """The inverse of `to_dict`. Fields that are not given take their defaults.

        Raises:
          ValueError: unknown fields, or missing ones that have no default; all of them are listed.

        Example:

            ViTConfig.from_dict(dict(depth=2, width=32, heads=4, hidden=48)).patch  # 14
        """
        made = {**values}
        if "preprocess" in made:
            lists = dict.fromkeys(("resize", "crop"), lambda v: tuple(v) if isinstance(v, list) else v)
            numbers = dict.fromkeys(("mean", "std"), lambda v: tuple(map(float, v)))
            made["preprocess"] = _strict(Preprocess, made["preprocess"], **lists, **numbers)
        return _strict(cls, made, grid=tuple)


def unknown_fields(values: Mapping[str, Any]) -> list[str]:
    """Names in a dict of a config that this version knows no field for."""
    known, inner = ({f.name for f in fields(kind)} for kind in (ViTConfig, Preprocess))
    found = [name for name in values if name not in known]
    return sorted(found) + sorted(f"preprocess.{name}" for name in values.get("preprocess", {}) if name not in inner)


KINDS = {"int": (Integral, "a whole number"), "float": (Real, "a number"), "bool": (bool, "true or false")}


def check_types(config: ViTConfig) -> None:
    """Raises a ValueError that lists every field whose value is of another type than the field's."""
    wrong = []
    for each in fields(config):
        kind, words = KINDS.get(str(each.type), (object, ""))
        value = getattr(config, each.name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind in (Integral, Real)):
            wrong.append(f"{each.name} is {value!r}; expected {words}")
    if not isinstance(config.grid, tuple) or [type(n) for n in config.grid] != [int, int]:
        wrong.append(f"grid is {config.grid!r}; expected a tuple of two whole numbers")
    if wrong:
        raise ValueError("; ".join(wrong))


def _strict(cls: Any, values: Mapping[str, Any], **decode: Any) -> Any:
    unknown = sorted(set(values) - {f.name for f in fields(cls)})
    missing = sorted({f.name for f in fields(cls) if f.default is MISSING} - set(values))
    if unknown or missing:
        raise ValueError(f"{cls.__name__} from a dict: unknown names {unknown}, missing names {missing}")
    return cls(**{name: decode.get(name, lambda v: v)(value) for name, value in values.items()})
