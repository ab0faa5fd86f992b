"""From photographs to the arrays a model reads: decode, resize with Pillow, crop the centre, normalise.

Published features were made from images that Pillow resized, and another antialiased bicubic moves pixels by a few grey
levels. So Pillow resizes here too, in threads, with the filter and the rounding that the checkpoint's own library uses.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxvit.model.config import Preprocess, ViTConfig, both_sides

Source = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Array
"""One image: a path, the bytes of a file, a Pillow image, or uint8 pixels [H, W, C] or [H, W]."""

FORMATS = {
    "AVIF": ("avif", "avifs"),
    "BMP": ("bmp", "dib"),
    "GIF": ("gif",),
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "JPEG2000": ("jp2", "j2k", "jpf", "jpx"),
    "MPO": ("mpo",),
    "PNG": ("png", "apng"),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
    "TIFF": ("tif", "tiff"),
    "WEBP": ("webp",),
}
"""Pillow's formats that are decoded -> their suffixes. Others are refused: Pillow hands EPS to Ghostscript, for one."""

SUFFIXES = frozenset(f".{suffix}" for suffixes in FORMATS.values() for suffix in suffixes)
"""What `find_images` takes for an image, in lower case."""

WORKERS = min(8, os.cpu_count() or 1)
"""Threads that prepare the images of a stream, unless it is told how many."""


class ImageError(ValueError):
    """An image that cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class Batch:
    """Images of a stream, always as many as its batch size, and all of one shape.

    A batch is a pytree of its arrays. Names are no part of it, as they would make `jax.jit` compile for each batch.
    They are empty in what comes out of a transformation; `indices` still tells which images these are.

    Attributes:
      images: prepared images, as from `prepare`.
      valid: False where the last image was repeated to fill the batch; `features[batch.valid]` drops those.
      indices: where each image stands among the sources.
      labels: the label of each image, or None for a stream without labels.
      names: the path of each image, or "image 3" for the source at index 3 that has none.

    Example:

        batch = next(jaxvit.stream(paths, model.config, batch_size=8))
        batch.images  # [8, height, width, 3]; where there were fewer images, `valid` says which are none
        cls = model(batch.images).cls[batch.valid]
    """

    images: Float[Array, "batch height width channels"]
    valid: Bool[np.ndarray | Array, " batch"]
    indices: Int[np.ndarray | Array, " batch"]
    labels: np.ndarray | Array | None = field(default=None, kw_only=True)
    names: tuple[str, ...] = field(default=(), kw_only=True)


jax.tree_util.register_dataclass(
    Batch, data_fields=("images", "valid", "indices", "labels"), meta_fields=(), drop_fields=("names",)
)


# Decoding -------------------------------------------------------------------------------------------------------------


def decode(source: Source) -> UInt8[np.ndarray, "height width 3"]:
    """The RGB pixels of an image, upright.

    Follows `Image.convert("RGB")`, which the original evaluations use: transparency is dropped, not blended with a
    background. Two exceptions, where that gives a wrong picture: the orientation in EXIF is applied, and 16-bit grey
    is scaled to 8 bits instead of clipped. Of a file with several frames, the first is taken.

    Raises:
      ImageError: if there is no such file, it is of none of `FORMATS`, is damaged, has more pixels than
        `PIL.Image.MAX_IMAGE_PIXELS`, or is grey of a range that is not known; or if pixels given as an array are not
        uint8 [H, W, 3] or [H, W].
      TypeError: if `source` is none of the types of `Source`.

    Example:

        jaxvit.decode("photo.jpg").shape  # (480, 640, 3)
    """
    name = _name(source, "the image")
    return _pixels(source, name, 3) if _is_array(source) else np.asarray(_image(source, name, "RGB"))


def _planes(source: Source, name: str, channels: int) -> list[Image.Image]:
    """The image as Pillow resizes it: as a whole if it is RGB, else channel by channel.

    As a whole, Pillow would take the fourth channel for transparency, and weigh the others with it.
    """
    if _is_array(source):
        pixels = _pixels(source, name, channels)
        return [Image.fromarray(each) for each in ([pixels] if channels == 3 else np.moveaxis(pixels, 2, 0))]
    if channels not in (1, 3):
        raise ImageError(f"{name} is a picture, and the model reads {channels} channels: give uint8 [H, W, {channels}]")
    return [_image(source, name, "RGB" if channels == 3 else "L")]


def _pixels(source: Any, name: str, channels: int) -> np.ndarray:
    pixels = np.asarray(source)
    if pixels.dtype != np.uint8 or pixels.shape[2:] not in ((), (channels,)) or pixels.ndim < 2:
        raise ImageError(
            f"{name} is an array of {pixels.dtype} {list(pixels.shape)}; expected uint8 [height, width, {channels}] or "
            f"[height, width], 0 to 255"
        )
    return _some(pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], channels, axis=2), name)


def _some(pixels: np.ndarray, name: str) -> np.ndarray:
    if not pixels.size:
        raise ImageError(f"{name} has no pixels: its size is {pixels.shape[0]}x{pixels.shape[1]}")
    return pixels


def _image(source: Source, name: str, mode: str) -> Image.Image:
    if not isinstance(source, (str, os.PathLike, bytes, Image.Image)):
        raise TypeError(f"{name} is a {type(source).__name__}; expected a path, bytes, Pillow image or uint8 array")
    try:
        image = _upright(_open(source, name), name).convert(mode)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # damaged files make Pillow raise OSError, SyntaxError, ValueError, struct.error...
        raise ImageError(f"{name} cannot be decoded, is it damaged? Pillow says: {error}") from error
    if not image.width * image.height:
        raise ImageError(f"{name} has no pixels: its size is {image.height}x{image.width}")
    return image


def _open(source: str | os.PathLike[str] | bytes | Image.Image, name: str) -> Image.Image:
    """The image, checked for size but not yet decoded."""
    bomb = f"{name} has more pixels than PIL.Image.MAX_IMAGE_PIXELS; raise that limit if you trust the image"
    if isinstance(source, Image.Image):
        image = source
    else:
        data = source if isinstance(source, bytes) else _read(Path(source))
        if not data:
            raise ImageError(f"{name} is empty (0 bytes)")
        try:
            image = Image.open(io.BytesIO(data), formats=_formats())
        except UnidentifiedImageError as error:
            raise ImageError(f"{name} is not an image of the formats {', '.join(_formats())}") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageError(bomb) from error
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ImageError(bomb)
    return image


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this build of Pillow can decode."""
    Image.init()
    return tuple(format for format in FORMATS if format in Image.OPEN)


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise ImageError(f"{path} is a folder, not an image; list its images with jaxvit.find_images")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError(f"{path} does not exist") from error
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from error


def _upright(image: Image.Image, name: str) -> Image.Image:
    """The image as its EXIF says it is held, in 8 bits."""
    # Pillow reads 16-bit grey as "I;16", but for PPM, whose values it scales to 16 bits of the 32 of an "I".
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    image = ImageOps.exif_transpose(image)
    if sixteen:
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise ImageError(f"{name} is {kind} grey, whose black and white are unknown; scale it to 8 bits first")
    if image.mode == "P":
        image = image.convert("RGBA")  # the same colours, and no warning about transparent palettes
    return image


# Preparing ------------------------------------------------------------------------------------------------------------


def prepare(
    images: Source | Sequence[Source],
    config: ViTConfig | Preprocess,
    size: int | tuple[int, int] | None = None,
    *,
    crop: bool = True,
) -> Float[Array, "batch height width channels"]:
    """What a model reads: resized and cropped as its `Preprocess` says, scaled to [0, 1], normalised per channel.

    Args:
      images: one image, or several. uint8 [B, H, W, C] is several.
      config: whose preparation to follow.
      size: pixels of the crop, one number or (height, width), if not the configuration's. The resize keeps its
        proportion to it.
      crop: False takes the whole image. It keeps its size, or is resized to the short side `size`, or to fit into
        (height, width); then each side goes to the nearest multiple of the patch. `config` must be a ViTConfig.

    Returns:
      float32 [B, height, width, C]; B is 1 for one image.

    Raises:
      ImageError: as `decode`, naming the image.
      ValueError: if there are no images, the results have several shapes (`stream` takes those), or the size makes no
        sense.

    Example:

        jaxvit.prepare("photo.jpg", model.config)  # [1, 224, 224, 3]
        jaxvit.prepare("photo.jpg", model.config, crop=False)  # of a photograph of 448x570: [1, 448, 574, 3]
    """
    sizing = Sizing(config, size, crop)
    sources = cast("Sequence[Source]", [images] if _is_one(images) else images)
    made = [sizing.apply(source, _name(source, f"image {i}")) for i, source in enumerate(sources)]
    if not made:
        raise ValueError("there are no images to prepare: the sequence is empty")
    if other := [i for i, pixels in enumerate(made) if pixels.shape != made[0].shape]:
        shapes = " and ".join("x".join(map(str, made[i].shape[:2])) for i in (0, other[0]))
        raise ValueError(f"images 0 and {other[0]} become {shapes} pixels: jaxvit.stream makes batches of equal shapes")
    return sizing.normalise(made)


def denormalize(
    images: Float[Array, "*batch channels"], config: ViTConfig | Preprocess
) -> Float[Array, "*batch channels"]:
    """Undoes the normalisation of `prepare`: the channels in [0, 1], to look at.

    Args:
      images: prepared images, or patches, or anything whose last axis are the channels.
      config: whose preparation they follow.

    Example:

        photograph = np.asarray(jaxvit.denormalize(images[0], model.config) * 255).round().astype("uint8")
    """
    preprocess = config.preprocess if isinstance(config, ViTConfig) else config
    shape = (1,) * (images.ndim - 1) + (-1,)
    mean, std = (jnp.asarray(each, images.dtype).reshape(shape) for each in (preprocess.mean, preprocess.std))
    return images * std + mean


class Sizing:
    """How images of any shape become arrays of the shape that is asked for, as `prepare` says it."""

    def __init__(self, config: ViTConfig | Preprocess, size: int | tuple[int, int] | None, crop: bool):
        preprocess = config.preprocess if isinstance(config, ViTConfig) else config
        if isinstance(config, ViTConfig) and config.channels != len(preprocess.mean):
            raise ValueError(
                f"the model reads {config.channels} channels, and its Preprocess has the mean and std of "
                f"{len(preprocess.mean)}: give a Preprocess(.., mean=.., std=..) of {config.channels} numbers each, or "
                f"give the model arrays [B, H, W, {config.channels}] that you normalised"
            )
        self.preprocess: Preprocess = preprocess.at(size) if crop else preprocess
        self.size: int | tuple[int, int] | None = size
        self.patch: int = 0  # a patch of 0: crop
        if crop:
            return
        if not isinstance(config, ViTConfig):
            raise ValueError("crop=False rounds sides to multiples of the patch: give the model's config, not its part")
        self.patch = config.patch
        if size is not None and min(both_sides(size, "size")) < self.patch:
            raise ValueError(f"size {size} is smaller than a patch, {self.patch} pixels")

    def apply(self, source: Source, name: str) -> np.ndarray:
        """The pixels [height, width, C] before they are normalised: grey levels, whole or not."""
        p = self.preprocess
        planes = _planes(source, name, len(p.mean))
        width, height = planes[0].size
        size = self.whole(height, width) if self.patch else fitted(height, width, p)
        if not p.whole:
            planes = [band.convert("F") for plane in planes for band in plane.split()]
        filter = Image.Resampling[p.interpolation.upper()]
        pixels = np.dstack([np.asarray(plane.resize((size[1], size[0]), filter)) for plane in planes])
        return pixels if self.patch else centre(pixels, p)

    def whole(self, height: int, width: int) -> tuple[int, int]:
        """The multiples of the patch that are nearest to the image at the size asked for."""
        if self.size is None:
            ratio, most = 1.0, (height + self.patch, width + self.patch)
        elif isinstance(self.size, tuple):
            ratio, most = min(self.size[0] / height, self.size[1] / width), self.size
        else:
            ratio = self.size / min(height, width)
            most = (height * ratio + self.patch, width * ratio + self.patch)
        sides = [
            (round(n * ratio / self.patch), int(m // self.patch)) for n, m in zip((height, width), most, strict=True)
        ]
        rows, columns = (max(1, min(nearest, most)) for nearest, most in sides)
        return rows * self.patch, columns * self.patch

    def normalise(self, pixels: Sequence[np.ndarray]) -> Array:
        mean, std = (np.array(each, np.float32) for each in (self.preprocess.mean, self.preprocess.std))
        return _normalise(np.stack(pixels), mean, std)


@jax.jit
def _normalise(pixels: Array, mean: Array, std: Array) -> Array:
    return (pixels.astype(jnp.float32) / 255 - mean[None, None, None]) / std[None, None, None]


def fitted(height: int, width: int, preprocess: Preprocess) -> tuple[int, int]:
    """(height, width) of an image after the resize."""
    rows, columns = preprocess.resized
    if preprocess.fit == "none":
        return height, width
    if preprocess.fit == "stretch":
        return rows, columns
    if preprocess.fit == "cover" and rows == columns:
        # torchvision and transformers truncate the long side.
        short = min(height, width)
        return int(rows * height / short), int(rows * width / short)
    # timm rounds both sides.
    ratio = (max if preprocess.fit == "contain" else min)(height / rows, width / columns)
    return max(round(height / ratio), 1), max(round(width / ratio), 1)


def centre(pixels: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """The centre of the crop's size; a side that is shorter is padded."""
    cut, pad = [], []
    up = preprocess.margin == "floor"
    for side, crop in zip(pixels.shape, preprocess.size, strict=False):
        spare = side - crop
        # Half a pixel too many: transformers rounds the crop's start down and the padding up, to the same effect;
        # torchvision rounds the crop's start to even, and the padding down.
        start = max(spare // 2 if up else round(spare / 2), 0)
        before = max(-(spare // 2) if up else -spare // 2, 0)
        cut.append(slice(start, start + crop))
        pad.append((before, max(-spare - before, 0)))
    pixels = pixels[tuple(cut)]
    if any(map(any, pad)):
        fill = [round(255 * m) if preprocess.fill == "mean" else 0 for m in preprocess.mean]
        whole = np.empty((*preprocess.size, len(fill)), pixels.dtype)
        whole[:] = fill
        (top, _), (left, _) = pad
        whole[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        return whole
    return pixels


# Folders and streams --------------------------------------------------------------------------------------------------


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """The images in a folder and its subfolders, linked ones too, by suffix (`SUFFIXES`), sorted; no hidden files.

    Raises:
      ImageError: if there is no such folder, it holds no image, or a folder within it cannot be read.

    Example:

        paths = jaxvit.find_images("photographs")
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"{folder} is {'a file, not a folder' if folder.exists() else 'not there'}; expected a folder")
    found = [Path(path) for path in _walk(os.fspath(folder), ())]
    if not found:
        raise ImageError(f"{folder} holds no image, at any depth; looked for {', '.join(sorted(SUFFIXES))}")
    return found


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """Paths of images in the order of their parts. `above` are the folders around this one, without links."""
    try:
        here = os.path.realpath(folder)
        if here in above:  # a link to a folder around it
            return
        with os.scandir(folder) as entries:
            # macOS leaves a hidden "._photo.jpg", which is no image, beside each photo.jpg that it copies.
            visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise ImageError(f"{folder} cannot be read: {error.strerror}") from error
    for entry in visible:
        if entry.is_dir():
            yield from _walk(entry.path, (*above, here))
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file():  # noqa: PTH122 a million of them
            yield entry.path


def stream(
    sources: Iterable[Source],
    config: ViTConfig | Preprocess,
    batch_size: int,
    size: int | tuple[int, int] | None = None,
    on_error: Callable[[str, ImageError], None] | None = None,
    *,
    crop: bool = True,
    labels: Iterable[Any] | None = None,
    names: Iterable[str] | None = None,
    workers: int | None = None,
) -> Iterator[Batch]:
    """Any number of images, prepared as by `prepare`, in order, in batches of one size.

    Threads prepare the next images while the caller uses a batch. They run ahead by at most a batch and one image per
    thread, so memory does not grow with the number of images; `sources` may be a generator. The threads end with the
    iterator: at its end, at an error, or when it is closed or dropped.

    Images of one batch have one shape. Where the shape changes (`crop=False`), the batch is filled up and the next one
    begins, so rows keep the order of the sources. Sort sources by shape if there are many shapes: each compiles.

    Args:
      sources: images; see `find_images` for those of a folder.
      config, size, crop: as for `prepare`.
      batch_size: images in a batch; one with fewer is filled by repeating its last image, see `Batch.valid`.
      on_error: called as on_error(name, error) for an image that cannot be used, which is then left out.
      labels: one for each of the sources, for `Batch.labels`.
      names: one for each of the sources, for `Batch.names` and for errors; by default as `Batch` says.
      workers: threads; by default one for each core, and 8 at most.

    Raises:
      ImageError: when the stream reaches an image that cannot be used, if there is no `on_error`.
      ValueError: if `sources` is a single image, or `batch_size` or `workers` is not positive; when the stream reaches
        the end of the labels or names before that of the sources, or the other way round.

    Example:

        for batch in jaxvit.stream(jaxvit.find_images("photographs"), model.config, batch_size=32):
            features = model(batch.images).cls[batch.valid]
    """
    if _is_one(sources):
        raise ValueError("sources is one image, path or folder; expected several: [image], or find_images(folder)")
    workers = WORKERS if workers is None else workers
    for name, number in (("batch_size", batch_size), ("workers", workers)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
    return stream_items(_items(sources, labels, names), Sizing(config, size, crop), batch_size, on_error, workers)


class Item(NamedTuple):
    """One image among many: its name, what `prepare` takes, and its label or None."""

    name: str
    source: Source
    label: Any


def _items(sources: Iterable[Source], labels: Iterable[Any] | None, names: Iterable[str] | None) -> Iterator[Item]:
    beside = {"labels": labels, "names": names}
    given = [name for name, values in beside.items() if values is not None]
    together = zip(sources, *(beside[name] for name in given), strict=True)
    for index in count():
        try:
            source, *values = next(together)
        except StopIteration:
            return
        except ValueError as error:
            raise ValueError(f"there are not as many {' and '.join(given)} as images: {error}") from error
        known = dict(zip(given, values, strict=True))
        yield Item(known.get("names") or _name(source, f"image {index}"), source, known.get("labels"))


def stream_items(
    items: Iterable[Item],
    sizing: Sizing,
    batch_size: int,
    on_error: Callable[[str, ImageError], None] | None,
    workers: int,
) -> Iterator[Batch]:
    """`stream`, of images that come with names and labels."""

    def batch() -> Batch:
        valid = np.arange(batch_size) < len(ready)
        indices, names, labels, pixels = zip(*ready, *[ready[-1]] * (batch_size - len(ready)), strict=True)
        known = None if all(label is None for label in labels) else np.stack([np.asarray(label) for label in labels])
        return Batch(sizing.normalise(pixels), valid, np.array(indices), labels=known, names=names)

    numbered, waiting, ready = enumerate(items), deque(), []
    pool = ThreadPoolExecutor(workers, "jaxvit-images")
    try:
        while True:
            for index, (name, source, label) in islice(numbered, batch_size + workers - len(waiting)):
                waiting.append((index, name, label, pool.submit(sizing.apply, source, name)))
            if not waiting:
                break
            index, name, label, made = waiting.popleft()
            try:
                pixels = made.result()
            except ImageError as error:
                if on_error is None:
                    raise
                on_error(name, error)
                continue
            if ready and pixels.shape != ready[0][-1].shape:
                yield batch()
                ready = []
            ready.append((index, name, label, pixels))
            if len(ready) == batch_size:
                yield batch()
                ready = []
        if ready:
            yield batch()
    finally:
        pool.shutdown(cancel_futures=True)


def _is_array(source: object) -> bool:
    return isinstance(source, (np.ndarray, jax.Array))


def _is_one(images: object) -> bool:
    return (
        cast("np.ndarray", images).ndim < 4
        if _is_array(images)
        else isinstance(images, (str, os.PathLike, bytes, Image.Image))
    )


def _name(source: object, default: str) -> str:
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else default
