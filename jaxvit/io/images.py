"""From photographs to the arrays a model reads: decode, resize as Pillow does, crop the centre, normalise.

Published features were made from images that Pillow resized, and another antialiased bicubic moves pixels by a few
grey levels. `resize` is therefore Pillow's arithmetic (libImaging/Resample.c), bit for bit, as a JAX program.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxvit.model.config import Preprocess, ViTConfig

Source = str | os.PathLike | bytes | Image.Image | np.ndarray | Array
"""One image: a path, the bytes of a file, a Pillow image, or uint8 pixels [H, W, 3] or [H, W]."""

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""What `find_images` takes for an image, in lower case."""

_BITS = 22  # fractional bits of Pillow's fixed-point weights for 8-bit images
_WORKERS = min(8, os.cpu_count() or 1)


class ImageError(ValueError):
    """An image that cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class Batch:
    """Images of a stream, always as many as its batch size.

    Attributes:
      images: prepared images, as from `prepare`.
      valid: False where the last image was repeated to fill the last batch; `features[batch.valid]` drops those.
      indices: where each image stands among the sources.
      names: the path of each image, or "image 3" for the source at index 3 that has none.
    """

    images: Float[Array, "batch side side 3"]
    valid: Bool[np.ndarray, " batch"]
    indices: Int[np.ndarray, " batch"]
    names: tuple[str, ...]


def resize(
    image: UInt8[np.ndarray | Array, "height width 3"],
    size: tuple[int, int],
    crop: tuple[int, int, int, int] | None = None,
) -> UInt8[Array, "rows columns 3"]:
    """Pillow's `resize(..., Image.BICUBIC)`, equal in every bit.

    The order of the two passes is Pillow 13's. Earlier versions always take the horizontal one first, and so differ in
    some pixels, mostly by one grey level, where a picture more than twice as tall as wide is shrunk in proportion.

    Only the part of `image` that the result depends on is sent to the device, padded to one of a few sizes: photographs
    of all sizes share a handful of compiled programs for each size of the result. Under `jax.jit` and `jax.vmap`, where
    the size of the image is fixed anyway, nothing is padded.

    Args:
      image: RGB pixels.
      size: (height, width) of the whole resized image, in pixels.
      crop: (top, left, height, width), the window of the resized image to compute; default: all of it.

    Raises:
      ValueError: if the image is not uint8 [H, W, 3] with at least one pixel, a side of the result is not positive, or
        the window is empty or reaches outside `size`.
    """
    traced = isinstance(image, Tracer)
    pixels: Any = image if traced else np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"expected uint8 pixels [height, width, 3], got {_describe(pixels)}; use jaxvit.decode")
    top, left, height, width = crop or (0, 0, *size)
    if min(size) < 1:
        raise ValueError(f"the resized image cannot be of size (height, width) {size}; sides must be at least 1")
    if min(top, left) < 0 or min(height, width) < 1 or top + height > size[0] or left + width > size[1]:
        raise ValueError(f"crop (top, left, height, width) {crop} must lie inside the resized image, {size}")
    rows, *vertical = _taps(pixels.shape[0], size[0], top, height)
    columns, *horizontal = _taps(pixels.shape[1], size[1], left, width)
    # Pillow takes the vertical pass first where that leaves less to do, and rounds after each pass: order matters.
    lost_rows, lost_columns = pixels.shape[0] - size[0], pixels.shape[1] - size[1]
    vertical_first = lost_rows > max(0, 2 * lost_columns)

    needed = pixels[rows, columns]
    sides = [_bucket(side, 256) for side in needed.shape[:2]]
    taps = _bucket(max(len(vertical[0]), len(horizontal[0])), 8)
    return _resample(
        needed if traced else _pad(needed, *sides, 3),
        [_pad(a, taps, width) for a in horizontal],
        [_pad(a, taps, height) for a in vertical],
        vertical_first,
    )


def _taps(source: int, target: int, start: int, length: int) -> tuple[slice, np.ndarray, np.ndarray]:
    """For outputs start .. start + length - 1 of a side: the slice of the source they read, and how.

    How: indices into that slice and fixed-point weights, both int32 [taps, length]. Where the side does not change, the
    weights are those of the identity. Floating-point operations are in the order of Pillow's `precompute_coeffs`.
    """
    scale = source / target
    stretch = max(scale, 1.0)
    center = (np.arange(start, start + length) + 0.5) * scale
    low = np.maximum(center - 2 * stretch + 0.5, 0).astype(np.int64)
    high = np.minimum((center + 2 * stretch + 0.5).astype(np.int64), source)

    index = low + np.arange((high - low).max())[:, None]
    x = np.abs((index - center + 0.5) * (1 / stretch))
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weight = np.where(index < high, np.where(x < 1, near, np.where(x < 2, far, 0.0)), 0.0)
    weight /= np.cumsum(weight, axis=0)[-1]  # not np.sum, which adds in another order
    weight = weight * 2**_BITS + np.copysign(0.5, weight)  # the cast truncates: halves are rounded away from zero

    first, last = int(low.min()), int(high.max())
    index = np.minimum(index, last - 1) - first
    return slice(first, last), index.astype(np.int32), weight.astype(np.int32)


def _bucket(n: int, least: int) -> int:
    """The first of least, 1.5 least, 2 least, 3 least, 4 least, ... that holds n."""
    while least < n:
        least = least * 3 // 2 if least & (least - 1) == 0 else least * 4 // 3
    return least


def _pad(array: np.ndarray, *shape: int) -> np.ndarray:
    """Zeros at the end of each axis. No tap reads padded pixels; padded taps have weight 0."""
    padded = np.zeros(shape, array.dtype)
    padded[tuple(map(slice, array.shape))] = array
    return padded


@partial(jax.jit, static_argnames="vertical_first")
def _resample(image: Array, horizontal: Sequence[Array], vertical: Sequence[Array], vertical_first: bool) -> Array:
    for axis in (0, 1) if vertical_first else (1, 0):
        # A pass gathers along its first axis: whole rows of memory, which is what makes it fast on a CPU.
        image = _pass(image.swapaxes(0, axis), *(vertical, horizontal)[axis]).swapaxes(0, axis)
    return image


def _pass(source: Array, index: Array, weight: Array) -> Array:
    flat = source.reshape(len(source), -1)

    def add_tap(total: Array, tap: tuple[Array, Array]) -> tuple[Array, None]:
        index, weight = tap
        pixels = flat.at[index].get(mode="promise_in_bounds").astype(jnp.int32)
        return total + weight[:, None] * pixels, None

    half = jnp.full((index.shape[1], flat.shape[1]), 1 << (_BITS - 1), jnp.int32)
    total, _ = jax.lax.scan(add_tap, half, (index, weight), unroll=4)
    return jnp.clip(total >> _BITS, 0, 255).astype(jnp.uint8).reshape(-1, *source.shape[1:])


def decode(source: Source) -> UInt8[np.ndarray, "height width 3"]:
    """The RGB pixels of an image, upright.

    Follows `Image.convert("RGB")`, which the original evaluations use: transparency is dropped, not blended with a
    background. Two exceptions, where that gives a wrong picture: the orientation in EXIF is applied, and 16-bit grey
    is scaled to 8 bits instead of clipped. Of a file with several frames, the first is taken.

    Raises:
      ImageError: if there is no such file, it is not an image, is damaged, or has more pixels than
        `PIL.Image.MAX_IMAGE_PIXELS`; or if pixels given as an array are not uint8 [H, W, 3] or [H, W].
      TypeError: if `source` is none of the types of `Source`.
    """
    return _decode(source, _name(source, "the image"))


def _decode(source: Source, name: str) -> np.ndarray:
    if isinstance(source, (np.ndarray, jax.Array)):
        pixels = np.asarray(source)
        if pixels.dtype != np.uint8 or pixels.shape[2:] not in ((), (3,)) or pixels.ndim < 2:
            raise ImageError(
                f"{name} is {_describe(pixels)}; expected uint8 [height, width, 3] or [height, width], 0 to 255"
            )
        pixels = np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels
    elif isinstance(source, (str, os.PathLike, bytes, Image.Image)):
        try:
            pixels = _pixels(_open(source, name), name)
        except (ImageError, MemoryError):
            raise
        except Exception as error:  # damaged files make Pillow raise OSError, SyntaxError, ValueError, struct.error...
            raise ImageError(f"{name} cannot be decoded, is it damaged? Pillow says: {error}") from error
    else:
        raise TypeError(f"{name} is a {type(source).__name__}; expected a path, bytes, Pillow image or uint8 array")
    if not pixels.size:
        raise ImageError(f"{name} has no pixels: its size is {pixels.shape[0]}x{pixels.shape[1]}")
    return pixels


def _open(source: str | os.PathLike | bytes | Image.Image, name: str) -> Image.Image:
    """The image, checked for size but not yet decoded."""
    bomb = f"{name} has more pixels than PIL.Image.MAX_IMAGE_PIXELS; raise that limit if you trust the image"
    if isinstance(source, Image.Image):
        image = source
    else:
        data = source if isinstance(source, bytes) else _read(Path(source))
        if not data:
            raise ImageError(f"{name} is empty (0 bytes)")
        try:
            image = Image.open(io.BytesIO(data))
        except UnidentifiedImageError as error:
            raise ImageError(f"{name} is not an image in a format that Pillow can read") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageError(bomb) from error
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ImageError(bomb)
    return image


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise ImageError(f"{path} is a folder, not an image; list its images with jaxvit.find_images")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError(f"{path} does not exist") from error
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from error


def _pixels(image: Image.Image, name: str) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.size and (grey.min() < 0 or grey.max() > 65535):
            raise ImageError(f"{name} is grey from {grey.min()} to {grey.max()}; expected 16 bits, 0 to 65535")
        return np.repeat(((grey * 255 + 32767) // 65535).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ImageError(f"{name} is floating-point grey, whose black and white are unknown; scale it to 8 bits first")
    if image.mode == "P":
        image = image.convert("RGBA")  # the same colours, and no warning about transparent palettes
    return np.asarray(image.convert("RGB"))


def prepare(
    images: Source | Sequence[Source], config: ViTConfig | Preprocess, size: int | None = None
) -> Float[Array, "batch side side 3"]:
    """What a model reads: the short side resized, the centre cropped, scaled to [0, 1] and normalised per channel.

    Args:
      images: one image, or several. uint8 [B, H, W, 3] is several.
      config: whose preparation to follow.
      size: side of the crop in pixels, if not the configuration's; the resize keeps its proportion to it.

    Returns:
      float32 [B, size, size, 3]; B is 1 for one image.

    Raises:
      ImageError: as `decode`, naming the image.
      ValueError: if there are no images.
    """
    preprocess = _preprocess(config, size)
    sources = cast("Sequence[Source]", [images] if _is_one(images) else images)
    crops = [_crop(source, _name(source, f"image {i}"), preprocess) for i, source in enumerate(sources)]
    if not crops:
        raise ValueError("there are no images to prepare: the sequence is empty")
    return _normalise(crops, preprocess)


def _crop(source: Source, name: str, preprocess: Preprocess) -> Array:
    pixels = _decode(source, name)
    short = min(pixels.shape[:2])
    # The long side is truncated and the margin floored, as in transformers; torchvision rounds the margin.
    height, width = (int(preprocess.resize * side / short) for side in pixels.shape[:2])
    side = preprocess.crop
    return resize(pixels, (height, width), ((height - side) // 2, (width - side) // 2, side, side))


@partial(jax.jit, static_argnums=1)
def _normalise(crops: list[Array], preprocess: Preprocess) -> Array:
    mean, std = np.array([preprocess.mean, preprocess.std], np.float32).reshape(2, 1, 1, 1, 3)
    return (jnp.stack(crops).astype(jnp.float32) / 255 - mean) / std


def _preprocess(config: ViTConfig | Preprocess, size: int | None) -> Preprocess:
    preprocess = config.preprocess if isinstance(config, ViTConfig) else config
    return preprocess if size is None else preprocess.at(size)


def find_images(folder: str | os.PathLike) -> list[Path]:
    """The images in a folder and its subfolders, by suffix (`SUFFIXES`), sorted; hidden files are left out.

    Raises:
      ImageError: if there is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"{folder} is {'a file, not a folder' if folder.exists() else 'not there'}; expected a folder")
    # macOS leaves a hidden "._photo.jpg", which is no image, beside each photo.jpg that it copies.
    visible = (p for p in folder.rglob("*") if not any(part[0] == "." for part in p.relative_to(folder).parts))
    found = [p for p in visible if p.suffix.lower() in SUFFIXES and p.is_file()]
    if not found:
        raise ImageError(f"{folder} holds no image, at any depth; looked for {', '.join(sorted(SUFFIXES))}")
    return sorted(found)


def stream(
    sources: Iterable[Source],
    config: ViTConfig | Preprocess,
    batch_size: int,
    size: int | None = None,
    on_error: Callable[[str, ImageError], None] | None = None,
) -> Iterator[Batch]:
    """Any number of images, prepared as by `prepare`, in order, in batches of one constant shape.

    Threads prepare the next images while the caller uses a batch. They run ahead by at most a batch and one image per
    thread, so memory does not grow with the number of images; `sources` may be a generator. The threads end with the
    iterator: at its end, at an error, or when it is closed or dropped.

    Args:
      sources: images; see `find_images` for those of a folder.
      config, size: as for `prepare`.
      batch_size: images in a batch; the last batch is filled by repeating its last image, see `Batch.valid`.
      on_error: called as on_error(name, error) for an image that cannot be used, which is then left out.

    Raises:
      ImageError: when the stream reaches an image that cannot be used, if there is no `on_error`.
      ValueError: if `sources` is a single image or `batch_size` is not positive.
    """
    if _is_one(sources):
        raise ValueError("sources is one image, path or folder; expected several: [image], or find_images(folder)")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    return _stream(sources, _preprocess(config, size), batch_size, on_error)


def _stream(
    sources: Iterable[Source],
    preprocess: Preprocess,
    batch_size: int,
    on_error: Callable[[str, ImageError], None] | None,
) -> Iterator[Batch]:
    # `with jax.default_device(...)` does not reach other threads by itself.
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]

    def work(source: Source, name: str) -> Array:
        with jax.default_device(device):
            return _crop(source, name, preprocess)

    def batch() -> Batch:
        valid = np.arange(batch_size) < len(ready)
        indices, names, crops = zip(*ready, *[ready[-1]] * (batch_size - len(ready)), strict=True)
        return Batch(_normalise(list(crops), preprocess), valid, np.array(indices), names)

    numbered, waiting, ready = enumerate(sources), deque(), []
    pool = ThreadPoolExecutor(_WORKERS, "jaxvit-images")
    try:
        while True:
            for index, source in islice(numbered, batch_size + _WORKERS - len(waiting)):
                name = _name(source, f"image {index}")
                waiting.append((index, name, pool.submit(work, source, name)))
            if not waiting:
                break
            index, name, crop = waiting.popleft()
            try:
                ready.append((index, name, crop.result()))
            except ImageError as error:
                if on_error is None:
                    raise
                on_error(name, error)
            if len(ready) == batch_size:
                yield batch()
                ready = []
        if ready:
            yield batch()
    finally:
        pool.shutdown(cancel_futures=True)


def _is_one(images: object) -> bool:
    if isinstance(images, (np.ndarray, jax.Array)):
        return images.ndim < 4
    return isinstance(images, (str, os.PathLike, bytes, Image.Image))


def _name(source: object, default: str) -> str:
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else default


def _describe(pixels: np.ndarray) -> str:
    return f"an array of {pixels.dtype} {list(pixels.shape)}"
