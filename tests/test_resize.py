"""The resize that runs inside JAX programs equals Pillow's in every bit."""

import jax
import numpy as np
import pytest
from PIL import Image

from jaxvit.io.resize import resize


def noise(height, width, seed=0):
    """Uniform grey levels: the hardest case, as it reaches both clips of both passes."""
    return np.random.default_rng([height, width, seed]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pillow_resize(pixels, size):
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def test_resize_equals_pillow_over_random_sizes():
    rng = np.random.default_rng(0)
    tall = 0
    for _ in range(40):
        source = tuple(int(2**e) for e in rng.uniform(0, 8, 2))
        size = tuple(int(n) for n in np.maximum(24, np.array(source) * 2.0 ** rng.uniform(-2, 2, 2)))
        tall += source[0] - size[0] > max(0, 2 * (source[1] - size[1]))
        top, left = (int(rng.integers(n - 24 + 1)) for n in size)
        pixels = noise(*source)
        expected = pillow_resize(pixels, size)[top : top + 24, left : left + 24]
        found = np.asarray(resize(pixels, size, (top, left, 24, 24)))
        np.testing.assert_array_equal(found, expected, err_msg=f"{source} to {size}, window at {top, left}")
    assert 5 < tall < 35  # both orders of the passes were met


NASTY = [
    ((1, 1), (1, 1)),
    ((1, 1), (5, 4)),
    ((1, 1), (1, 40)),
    ((3, 500), (1, 1)),
    ((1, 700), (256, 3)),
    ((700, 1), (3, 256)),
    ((2, 3), (64, 64)),
    ((64, 64), (64, 64)),
    ((64, 64), (64, 31)),
    ((128, 129), (127, 128)),
    ((5, 2000), (7, 9)),
    ((1, 30000), (1, 3)),
    ((255, 257), (2, 300)),
    ((60, 30), (30, 15)),  # as many rows lost as twice the columns: still the horizontal pass first
    ((61, 30), (30, 15)),
]


@pytest.mark.parametrize("source, size", NASTY)
def test_resize_equals_pillow_on_nasty_sizes(source, size):
    pixels = noise(*source)
    found = resize(pixels, size)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, pillow_resize(pixels, size))


def test_resize_clips_overshoot_and_keeps_flat_pictures():
    edge = np.zeros((40, 40, 3), np.uint8)
    edge[10:20, 15:30] = 255
    np.testing.assert_array_equal(resize(edge, (64, 64)), pillow_resize(edge, (64, 64)))
    for level in (0, 1, 254, 255):
        assert (np.asarray(resize(np.full((37, 53, 3), level, np.uint8), (64, 64))) == level).all()


def test_resize_reads_arrays_of_any_layout_and_of_jax():
    pixels = noise(50, 60)
    expected = pillow_resize(pixels, (24, 24))
    for same in (np.asfortranarray(pixels), np.repeat(pixels, 2, axis=0)[::2], jax.numpy.asarray(pixels)):
        np.testing.assert_array_equal(resize(same, (24, 24)), expected)


def test_resize_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        pixels = noise(91, 83)
        np.testing.assert_array_equal(resize(pixels, (23, 29)), pillow_resize(pixels, (23, 29)))


@pytest.mark.parametrize(
    "size, crop, words",
    [
        ((0, 4), None, "size"),
        ((8, 8), (0, 0, 9, 8), "crop"),
        ((8, 8), (0, 1, 8, 8), "crop"),
        ((8, 8), (-1, 0, 4, 4), "crop"),
        ((8, 8), (0, 0, 0, 4), "crop"),
    ],
)
def test_resize_refuses_impossible_sizes(size, crop, words):
    with pytest.raises(ValueError, match=words):
        resize(noise(8, 8), size, crop)


@pytest.mark.parametrize("pixels", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), noise(0, 4)])
def test_resize_refuses_other_arrays(pixels):
    # A TypeError is that of jaxtyping, where the tests run with its checks.
    with pytest.raises((ValueError, TypeError)):
        resize(pixels, (4, 4))


def test_resize_under_jit_and_vmap():
    images = np.random.default_rng(3).integers(0, 256, (3, 37, 51, 3), dtype=np.uint8)
    resized = jax.jit(jax.vmap(lambda image: resize(image, (20, 28), (2, 4, 16, 16))))(images)
    for image, result in zip(images, resized, strict=True):
        expected = np.asarray(Image.fromarray(image).resize((28, 20), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(result, expected[2:18, 4:20])
