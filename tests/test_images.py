"""Images: the whole preparation, every kind of file, and the stream."""

import io
import threading
import time
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxvit.io import images as images_module
from jaxvit.io.images import Batch, ImageError, decode, denormalize, find_images, prepare, stream
from jaxvit.model.config import Preprocess, ViTConfig

SMALL = Preprocess(resize=20, crop=14)


def noise(height, width, seed=0):
    """Uniform grey levels: the hardest case, as it reaches both clips of both passes."""
    return np.random.default_rng([height, width, seed]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height, width):
    """A picture that survives JPEG: ramps down, across, and constant."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * y // max(height - 1, 1), 255 * x // max(width - 1, 1), 0 * x + 60], -1).astype(np.uint8)


def pillow_resize(pixels, size):
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def encode(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


# --- prepare


def pillow_prepare(pixels, preprocess):
    """The preparation again, by Pillow and numpy in float64, on the whole resized image."""
    height, width = pixels.shape[:2]
    (short, _), (side, _) = preprocess.resize, preprocess.crop
    size = int(short * height / min(height, width)), int(short * width / min(height, width))
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    cut = pillow_resize(pixels, size)[top : top + side, left : left + side]
    return (cut / 255 - np.array(preprocess.mean)) / np.array(preprocess.std)


@pytest.mark.parametrize("shape", [(48, 64), (65, 47), (20, 20), (20, 33), (7, 90), (300, 211)])
def test_prepare_equals_pillow_and_numpy(shape):
    pixels = noise(*shape)
    found = prepare(pixels, SMALL)
    assert found.shape == (1, 14, 14, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found[0], pillow_prepare(pixels, SMALL), rtol=0, atol=2e-6)


def test_prepare_equals_transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("transformers.models.bit.image_processing_pil_bit")
    preprocess = Preprocess()
    processor = module.BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        resample=Image.Resampling.BICUBIC,
        image_mean=preprocess.mean,
        image_std=preprocess.std,
    )
    for shape in [(301, 423), (375, 240)]:
        pixels = noise(*shape)
        expected = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(prepare(pixels, preprocess), expected, rtol=0, atol=2e-6)


def test_prepare_takes_one_or_several_of_every_kind(tmp_path):
    pixels = noise(30, 40)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    kinds = [path, str(path), path.read_bytes(), Image.fromarray(pixels), pixels, jax.numpy.asarray(pixels)]
    one = np.asarray(prepare(pixels, SMALL))
    for kind in kinds:
        np.testing.assert_array_equal(prepare(kind, SMALL), one)
    np.testing.assert_array_equal(prepare(kinds, SMALL), np.repeat(one, len(kinds), axis=0))
    np.testing.assert_array_equal(prepare(np.stack([pixels, pixels]), SMALL), np.repeat(one, 2, axis=0))


def test_prepare_follows_the_configuration_and_size():
    pixels = noise(30, 40)
    config = ViTConfig.dinov2("small", preprocess=SMALL)
    np.testing.assert_array_equal(prepare(pixels, config), prepare(pixels, SMALL))
    np.testing.assert_array_equal(prepare(pixels, config, size=28), prepare(pixels, Preprocess(40, 28)))
    np.testing.assert_array_equal(prepare(pixels, config, size=7), prepare(pixels, Preprocess(10, 7)))
    other = Preprocess(20, 14, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.1))
    np.testing.assert_allclose(prepare(pixels, other)[0], pillow_prepare(pixels, other), rtol=0, atol=2e-6)


def test_prepare_names_what_it_cannot_use():
    with pytest.raises(ImageError, match="image 1 is an array of float32"):
        prepare([noise(30, 40), noise(30, 40).astype(np.float32)], SMALL)
    with pytest.raises(ValueError, match="no images"):
        prepare([], SMALL)


def test_prepare_reads_whole_images():
    config = ViTConfig.dinov2("small", preprocess=SMALL)  # patches of 14 pixels
    pixels = noise(45, 57)
    mean, std = np.array(SMALL.mean), np.array(SMALL.std)
    for size, shape in [(None, (42, 56)), (28, (28, 42)), ((56, 56), (42, 56)), ((300, 28), (28, 28)), (14, (14, 14))]:
        found = prepare(pixels, config, size, crop=False)
        assert found.shape == (1, *shape, 3)
        expected = (pillow_resize(pixels, shape) / 255 - mean) / std
        np.testing.assert_allclose(found[0], expected, rtol=0, atol=2e-6)
    assert prepare(noise(3, 50), config, crop=False).shape == (1, 14, 56, 3)
    whole = noise(28, 42)  # nothing is resized
    np.testing.assert_array_equal(np.rint(denormalize(prepare(whole, config, crop=False)[0], config) * 255), whole)
    with pytest.raises(ValueError, match="give the model's config"):
        prepare(pixels, SMALL, crop=False)
    with pytest.raises(ValueError, match="smaller than a patch"):
        prepare(pixels, config, 13, crop=False)


def test_prepare_at_sizes_that_are_not_square():
    pixels = noise(60, 90)
    found = prepare(pixels, Preprocess(20, 14, margin="round"), (28, 14))
    assert found.shape == (1, 28, 14, 3)  # it covers (40, 20): resized to 40 x 60
    expected = prepare(pillow_resize(pixels, (40, 60))[6:34, 23:37], Preprocess((28, 14), (28, 14)))
    np.testing.assert_array_equal(found, expected)


def test_prepare_names_images_of_several_shapes():
    config = ViTConfig.dinov2("small", preprocess=SMALL)
    with pytest.raises(ValueError, match=r"images 0 and 2 become 28x42 and 42x28 pixels: jaxvit\.stream"):
        prepare([noise(28, 42), noise(30, 43), noise(42, 28)], config, crop=False)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_prepare_other_channels(channels):
    preprocess = Preprocess(20, 14, mean=(0.1,) * channels, std=(0.3,) * channels)
    pixels = np.random.default_rng(0).integers(0, 256, (31, 40, channels), dtype=np.uint8)
    found = prepare(pixels, preprocess)
    assert found.shape == (1, 14, 14, channels)
    for i in range(channels):  # each as if it were alone: no channel is a transparency
        alone = prepare(pixels[..., [i] * 3], Preprocess(20, 14, mean=(0.1,) * 3, std=(0.3,) * 3))
        np.testing.assert_array_equal(found[..., i], alone[..., 0])
    photograph = Image.fromarray(noise(31, 40))
    if channels == 1:
        np.testing.assert_array_equal(prepare(photograph, preprocess), prepare(photograph.convert("L"), preprocess))
    else:
        with pytest.raises(ImageError, match=f"the model reads {channels} channels"):
            prepare(photograph, preprocess)


def test_denormalize_undoes_the_normalisation():
    pixels = noise(20, 20)
    other = Preprocess(20, 20, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.1))
    np.testing.assert_allclose(denormalize(prepare(pixels, other), other)[0] * 255, pixels, rtol=0, atol=1e-4)


# --- decode

RGB = noise(6, 5)
GREY = RGB[:, :, 0]
ALPHA = noise(6, 5, seed=1)[:, :, 0]
GREYS = np.repeat(GREY[:, :, None], 3, axis=2)
PALETTE = Image.fromarray(RGB).quantize(16)


def with_alpha(*channels):
    return Image.fromarray(np.dstack(channels))


FILES = {
    "rgb.png": (Image.fromarray(RGB), {}, RGB),
    "rgba.png": (with_alpha(RGB, ALPHA), {}, RGB),
    "grey.png": (Image.fromarray(GREY), {}, GREYS),
    "grey_key.png": (Image.fromarray(GREY), {"transparency": int(GREY[0, 0])}, GREYS),
    "grey_alpha.png": (with_alpha(GREY, ALPHA), {}, GREYS),
    "rgb_key.png": (Image.fromarray(RGB), {"transparency": tuple(map(int, RGB[0, 0]))}, RGB),
    "palette.png": (PALETTE, {}, np.asarray(PALETTE.convert("RGB"))),
    "palette.gif": (PALETTE, {"transparency": 3}, np.asarray(PALETTE.convert("RGB"))),
    "palette_key.png": (PALETTE, {"transparency": 3}, np.asarray(PALETTE.convert("RGB"))),
    "palette_alpha.png": (PALETTE, {"transparency": bytes(range(0, 160, 10))}, np.asarray(PALETTE.convert("RGB"))),
    "bits.png": (Image.fromarray(GREY > 99), {}, np.where(GREYS > 99, 255, 0)),
    "cmyk.tif": (Image.fromarray(RGB).convert("CMYK"), {}, RGB),
    "rgb.webp": (Image.fromarray(RGB), {"lossless": True}, RGB),
    "grey16.png": (Image.fromarray(GREY.astype(np.uint16) * 257), {}, GREYS),
    "grey16.tif": (Image.fromarray(GREY.astype(np.uint16) * 257), {}, GREYS),
    "grey16.pgm": (Image.fromarray(GREY.astype(np.uint16) * 257), {}, GREYS),
    "rgb.jp2": (Image.fromarray(RGB), {"irreversible": False}, RGB),
}


@pytest.mark.parametrize("name", FILES)
def test_decode_files(name, tmp_path):
    image, options, expected = FILES[name]
    path = tmp_path / name
    image.save(path, **options)
    for source in (path, str(path), path.read_bytes()):
        found = decode(source)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)


def test_decode_pillow_images_that_no_file_holds():
    palette_alpha = with_alpha(RGB, ALPHA).convert("PA")
    np.testing.assert_array_equal(decode(palette_alpha), np.asarray(palette_alpha.convert("RGB")))
    big_endian = Image.frombytes("I;16B", (5, 6), (GREY.astype(">u2") * 257).tobytes())
    np.testing.assert_array_equal(decode(big_endian), GREYS)


def test_decode_16_bits_scales_instead_of_clipping():
    grey = np.array([[0, 128, 129, 32768, 65406, 65407, 65535]], np.uint16)
    assert decode(Image.fromarray(grey))[0, :, 1].tolist() == [0, 0, 1, 128, 254, 255, 255]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_decode_jpeg(mode):
    pixels = smooth(32, 48)
    image = Image.fromarray(pixels).convert(mode)  # Pillow writes CMYK as Adobe does, inverted
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert abs(decode(encode(image, "JPEG", quality=95)) - expected).max() < 12


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_applies_exif_orientation(orientation, format):
    upright = smooth(32, 48)
    # What a camera held that way stores; the tag says how to turn it back.
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encode(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif))
    assert found.shape == upright.shape and abs(found - upright.astype(int)).max() < 12


def test_decode_survives_damaged_exif():
    data = encode(Image.fromarray(smooth(32, 48)), "JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 40)
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        assert decode(data).shape == (32, 48, 3)


def test_decode_arrays():
    assert decode(RGB) is RGB
    np.testing.assert_array_equal(decode(GREY), GREYS)
    np.testing.assert_array_equal(decode(jax.numpy.asarray(RGB)), RGB)


def png(height=40, width=40):
    return encode(Image.fromarray(noise(height, width)), "PNG")


UNUSABLE = {
    "empty.png": (b"", "is empty"),
    "text.jpg": (b"this is not an image" * 20, "is not an image"),
    "truncated.png": (png()[:-2000], "cannot be decoded.*"),
    "truncated.jpg": (encode(Image.fromarray(noise(40, 40)), "JPEG")[:-400], "cannot be decoded.*truncated"),
    "header.png": (png()[:12], "is not an image|cannot be decoded"),
    "float.tif": (encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
    "wide.tif": (encode(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), "32-bit"),
    "grey32.tif": (encode(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "32-bit"),  # 0 to 255 would be black
    "page.eps": (encode(Image.fromarray(noise(4, 4)), "EPS"), "is not an image of the formats"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_decode_names_unusable_files(name, tmp_path):
    data, words = UNUSABLE[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ImageError, match=f"{name} .*({words})"):
        decode(path)
    with pytest.raises(ImageError, match=f"the image .*({words})"):
        decode(data)


def test_decode_names_what_is_no_file(tmp_path):
    with pytest.raises(ImageError, match=r"absent\.png does not exist"):
        decode(tmp_path / "absent.png")
    with pytest.raises(ImageError, match=r"is a folder.*find_images"):
        decode(str(tmp_path))


@pytest.mark.parametrize("limit", [1500, 1000, 100])  # Pillow: nothing said; a warning; an error
def test_decode_refuses_decompression_bombs(limit, monkeypatch):
    data = png(40, 40)
    image = Image.fromarray(noise(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for source in (data, image):
        with pytest.raises(ImageError, match="MAX_IMAGE_PIXELS"):
            decode(source)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode(data).shape == (40, 40, 3)


@pytest.mark.parametrize("shape", [(4, 4, 4), (4, 4, 1), (3,), (2, 4, 4, 3)])
def test_decode_refuses_other_shapes(shape):
    with pytest.raises(ImageError, match="expected uint8"):
        decode(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("kind", [np.float32, np.int32, bool])
def test_decode_refuses_other_numbers(kind):
    with pytest.raises(ImageError, match="expected uint8"):
        decode(np.zeros((4, 4, 3), kind))


def test_decode_refuses_nothing_and_strangers():
    with pytest.raises(ImageError, match="no pixels"):
        decode(np.zeros((0, 4, 3), np.uint8))
    with pytest.raises(TypeError):
        decode(None)


# --- find_images


def test_find_images_is_sorted_recursive_and_by_suffix(tmp_path):
    for name in ("b.png", "a.JPG", "deep/er/c.webp", "deep/a.tiff", "notes.txt", "._b.png", "folder.png/x.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [p.relative_to(tmp_path).as_posix() for p in find_images(str(tmp_path))]
    assert found == ["a.JPG", "b.png", "deep/a.tiff", "deep/er/c.webp", "folder.png/x.gif"]


def test_find_images_follows_links_and_knows_every_suffix(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    names = ("a.jfif", "b.JPE", "c.avif", "d.mpo", "deep/e.jp2")
    for name in names:
        (elsewhere / name).touch()
    folder = tmp_path / "photographs"
    folder.mkdir()
    (folder / "linked").symlink_to(elsewhere, target_is_directory=True)
    (folder / "z.png").symlink_to(elsewhere / "a.jfif")
    (folder / "gone.png").symlink_to(tmp_path / "absent.png")
    (elsewhere / "deep" / "up").symlink_to(folder, target_is_directory=True)  # no endless walk
    found = [p.relative_to(folder).as_posix() for p in find_images(folder)]
    assert found == [*(f"linked/{name}" for name in names), "z.png"]


def test_find_images_is_sorted_as_paths_are(tmp_path):
    for name in ("a/x.png", "a.b/x.png", "a-b.png", "A.png", "a/B/y.png", "ä.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == sorted(tmp_path.rglob("*.png"))


def test_find_images_names_unusable_folders(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ImageError, match="holds no image"):
        find_images(tmp_path)
    with pytest.raises(ImageError, match="is not there"):
        find_images(tmp_path / "absent")
    with pytest.raises(ImageError, match="is a file"):
        find_images(tmp_path / "notes.txt")


# --- stream


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("jaxvit-images")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not threads()


SOURCES = [noise(20 + i, 40 - i) for i in range(11)]


def test_stream_keeps_order_and_shape_and_equals_prepare():
    batches = list(stream(SOURCES, SMALL, 4))
    assert [b.images.shape for b in batches] == [(4, 14, 14, 3)] * 3
    assert np.concatenate([b.indices for b in batches]).tolist() == [*range(11), 10]
    assert np.concatenate([b.valid for b in batches]).tolist() == [True] * 11 + [False]
    assert batches[2].names == ("image 8", "image 9", "image 10", "image 10")
    found = np.concatenate([np.asarray(b.images) for b in batches])
    expected = np.concatenate([np.asarray(prepare(source, SMALL)) for source in SOURCES])
    np.testing.assert_array_equal(found[:11], expected)
    np.testing.assert_array_equal(found[11], expected[10])


def test_stream_keeps_order_when_images_take_unequal_time(monkeypatch):
    planes = images_module._planes

    def slow(source, name, channels):
        time.sleep(0.02 if len(source) % 3 == 0 else 0)
        return planes(source, name, channels)

    monkeypatch.setattr(images_module, "_planes", slow)
    assert [i for b in stream(SOURCES, SMALL, 2) for i in b.indices[b.valid]] == list(range(11))


def test_stream_ends_evenly_or_with_nothing():
    even = list(stream(iter(SOURCES[:4]), SMALL, 2))
    assert len(even) == 2 and all(b.valid.all() for b in even)
    assert list(stream([], SMALL, 2)) == []


def test_stream_of_a_folder_skips_or_names_a_corrupt_image(tmp_path):
    for i, source in enumerate(SOURCES[:5]):
        Image.fromarray(source).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(png()[:-2000])
    paths, errors = find_images(tmp_path), []
    first, second = stream(paths, SMALL, 2, on_error=lambda name, error: errors.append((name, error)))
    assert [*first.names, *second.names] == [str(tmp_path / f"{i}.png") for i in (0, 1, 3, 4)]
    assert [*first.indices, *second.indices] == [0, 1, 3, 4]
    assert [name for name, _ in errors] == [str(tmp_path / "2.png")] and isinstance(errors[0][1], ImageError)
    with pytest.raises(ImageError, match=r"2\.png"):
        list(stream(paths, SMALL, 2))
    assert list(stream([paths[2]] * 3, SMALL, 2, on_error=lambda name, error: None)) == []


def test_stream_names_sources_without_a_path():
    with pytest.raises(ImageError, match="image 3 is an array of float32"):
        list(stream([*SOURCES[:3], np.zeros((9, 9, 3), np.float32)], SMALL, 2))


def test_stream_runs_ahead_and_not_far(monkeypatch):
    taken = []
    started = []
    planes = images_module._planes

    def sources():
        for i in range(200):
            taken.append(i)
            yield SOURCES[i % len(SOURCES)]

    def counting(source, name, channels):
        started.append(name)
        return planes(source, name, channels)

    monkeypatch.setattr(images_module, "_planes", counting)
    batch_size, ahead = 4, 4 + images_module.WORKERS
    running = stream(sources(), SMALL, batch_size)
    assert not taken
    for step in range(1, 6):
        next(running)
        time.sleep(0.05)
        consumed = step * batch_size
        assert consumed < len(started) <= len(taken) <= consumed + ahead
    running.close()


def test_stream_closed_early_leaves_no_thread_and_no_work(monkeypatch):
    list(stream(SOURCES[:8], SMALL, 8))  # compile, so that the threads below are still at work when the batch is there
    started = []
    planes = images_module._planes

    def slow(source, name, channels):
        started.append(name)
        time.sleep(0.05)
        return planes(source, name, channels)

    monkeypatch.setattr(images_module, "_planes", slow)
    monkeypatch.setattr(images_module, "WORKERS", 2)
    running = stream(SOURCES * 20, SMALL, 8)
    next(running)
    assert threads()
    running.close()
    assert not threads()
    count = len(started)
    time.sleep(0.1)
    assert 8 <= len(started) == count < 8 + 8  # of the 9 that wait, those not begun are dropped


def test_stream_ends_its_threads_when_the_caller_or_the_sources_raise():
    def broken():
        yield from SOURCES[:5]
        raise RuntimeError("the list of sources broke")

    with pytest.raises(RuntimeError, match="the list of sources"):
        list(stream(broken(), SMALL, 2))
    assert not threads()

    def refuse(name, error):
        raise KeyError(name)

    with pytest.raises(KeyError):
        list(stream([*SOURCES, b""], SMALL, 2, on_error=refuse))
    assert not threads()

    def consume():
        for _ in stream(SOURCES, SMALL, 2):
            raise RuntimeError("the caller broke")

    with pytest.raises(RuntimeError, match="the caller"):
        consume()


def test_stream_refuses_misuse(tmp_path):
    for one in (str(tmp_path), SOURCES[0]):
        with pytest.raises(ValueError, match="find_images"):
            stream(one, SMALL, 2)
    for one in (tmp_path, b"..."):
        with pytest.raises((ValueError, TypeError)):  # a TypeError where jaxtyping checks: no iterables of images
            stream(one, SMALL, 2)
    with pytest.raises(ValueError, match="batch_size"):
        stream(SOURCES, SMALL, 0)


def test_stream_follows_the_size():
    (batch,) = stream(SOURCES[:2], ViTConfig.dinov2("small", preprocess=SMALL), 2, size=28)
    assert isinstance(batch, Batch)
    np.testing.assert_array_equal(batch.images, prepare(SOURCES[:2], SMALL, size=28))


def test_stream_follows_the_default_device():
    device = jax.devices()[-1]  # the default one, unless XLA_FLAGS make more
    with jax.default_device(device):
        (batch,) = stream(SOURCES[:2], SMALL, 2)
    assert batch.images.devices() == {device}


def test_stream_makes_batches_of_equal_shapes():
    config = ViTConfig.dinov2("small", preprocess=SMALL)
    shapes = [(28, 42)] * 3 + [(42, 28)] + [(28, 42)] * 2
    sources = [noise(*shape, seed=i) for i, shape in enumerate(shapes)]
    batches = list(stream(sources, config, 2, crop=False, labels="abcdef", workers=3))
    assert [b.images.shape[1:3] for b in batches] == [(28, 42), (28, 42), (42, 28), (28, 42)]
    assert [b.valid.tolist() for b in batches] == [[True, True], [True, False], [True, False], [True, True]]
    kept = [
        (int(i), str(label)) for b in batches for i, label in zip(b.indices[b.valid], b.labels[b.valid], strict=True)
    ]
    assert kept == list(enumerate("abcdef"))
    for batch in batches:
        for row, index in zip(batch.images, batch.indices, strict=True):
            np.testing.assert_array_equal(row, prepare(sources[index], config, crop=False)[0])


def test_stream_takes_labels_along_and_never_shifts_them():
    sources = [*SOURCES[:2], b"not an image", *SOURCES[2:4]]
    masks = [np.full((2, 2), i) for i in range(5)]
    skipped = []
    batches = list(stream(sources, SMALL, 2, on_error=lambda name, error: skipped.append(name), labels=iter(masks)))
    labels = np.concatenate([b.labels for b in batches])
    assert labels.shape == (4, 2, 2) and labels[:, 0, 0].tolist() == [0, 1, 3, 4] and skipped == ["image 2"]
    assert all(b.labels is None for b in stream(SOURCES[:2], SMALL, 2))
    for few in (masks[:4], [*masks, masks[0]]):
        with pytest.raises(ValueError, match="not as many labels as images"):
            list(stream(sources, SMALL, 2, on_error=lambda name, error: None, labels=few))
    with pytest.raises(ValueError, match="workers must be at least 1"):
        stream(SOURCES, SMALL, 2, workers=0)


def test_a_batch_is_a_pytree_of_its_arrays():
    traces = []

    @jax.jit
    def mean(batch):
        traces.append(batch.names)
        return jax.tree.map(jnp.asarray, batch)

    batches = list(stream(SOURCES[:4], SMALL, 2, labels=range(4)))
    found = [mean(batch) for batch in batches]
    assert traces == [()]  # other names compile nothing
    assert [leaf.shape for leaf in jax.tree.leaves(found[0])] == [(2, 14, 14, 3), (2,), (2,), (2,)]
    assert found[1].labels.tolist() == [2, 3] and found[1].names == ()
    jax.block_until_ready(batches)


def test_other_channels_than_those_of_the_preparation_are_refused():
    gray = ViTConfig(depth=1, width=8, heads=1, hidden=8, patch=7, channels=1, preprocess=SMALL)
    with pytest.raises(ValueError, match=r"reads 1 channels, and its Preprocess has the mean and std of 3: give"):
        prepare(SOURCES[0], gray)
    preprocess = replace(SMALL, mean=(0.5,), std=(0.5,))
    assert prepare(SOURCES[0][:, :, 0], replace(gray, preprocess=preprocess)).shape == (1, 14, 14, 1)
