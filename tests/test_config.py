"""Configs and token layouts: what is refused, what survives JSON, and where each token stands."""

import json
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from jaxvit import Preprocess, TokenLayout, ViTConfig
from jaxvit.model.config import Mlp, check_types, unknown_fields

SMALL = dict(depth=2, width=32, heads=4, hidden=48)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(depth=0), ["depth", "at least 1", "0"]),
        (dict(width=-32), ["width", "-32"]),
        (dict(heads=0), ["heads", "0"]),
        (dict(hidden=0), ["hidden", "0"]),
        (dict(patch=0), ["patch", "0"]),
        (dict(registers=-1), ["registers", "-1"]),
        (dict(grid=(0, 5)), ["grid", "(0, 5)"]),
        (dict(heads=5), ["width 32", "multiple", "heads", "5"]),
        (dict(mlp="relu"), ["mlp", "'relu'", "gelu, swiglu"]),
        (dict(resampling="nearest"), ["resampling", "'nearest'", "bicubic_antialias, bicubic, bicubic_offset"]),
    ],
)
def test_sizes_that_make_no_model_are_refused(changes, words):
    # `replace` would do, were it not for the run-time types of the signature, which speak first in this suite.
    with pytest.raises(ValueError) as caught:
        ViTConfig.__post_init__(bare(ViTConfig(**SMALL), changes))
    assert all(word in str(caught.value) for word in words)


def bare(config, changes):
    """The config with fields set behind the back of its validation."""
    config = replace(config)
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    return config


def test_configs_are_values():
    a, b = ViTConfig(**SMALL), ViTConfig(**SMALL)
    assert a == b
    assert hash(a) == hash(b)
    assert a != replace(a, registers=1)
    with pytest.raises(FrozenInstanceError):
        a.depth = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("small", (12, 384, 6, 1536, "gelu")),
        ("base", (12, 768, 12, 3072, "gelu")),
        ("large", (24, 1024, 16, 4096, "gelu")),
        ("giant", (40, 1536, 24, 4096, "swiglu")),
    ],
)
def test_dinov2_has_its_published_sizes(size, expected):
    config = ViTConfig.dinov2(size, registers=4, depth=2)
    assert (config.width, config.heads, config.hidden, config.mlp) == expected[1:]
    assert ViTConfig.dinov2(size).depth == expected[0]
    assert (config.depth, config.registers, config.head_size) == (2, 4, 64)
    assert config.layout(518) == TokenLayout(4, (37, 37))


def test_an_unknown_size_names_the_known_ones():
    with pytest.raises(ValueError, match="no DINOv2 of size 'huge'; there are small, base, large, giant"):
        ViTConfig.dinov2("huge")


@pytest.mark.parametrize(
    "config",
    [
        ViTConfig(**SMALL),
        ViTConfig.dinov2("giant", 4),
        ViTConfig(
            **SMALL,
            grid=(3, 5),
            layer_scale=False,
            eps=1e-5,
            resampling="bicubic_offset",
            preprocess=Preprocess(resize=64, crop=56, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)),
        ),
    ],
)
def test_configs_survive_json(config):
    again = ViTConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)  # lists would have no hash


def test_unknown_and_missing_names_are_all_listed():
    values = ViTConfig(**SMALL).to_dict()
    del values["depth"], values["heads"], values["eps"]
    values |= dict(droppath=0.1, dropout=0.2)
    with pytest.raises(ValueError, match=r"ViTConfig.*unknown names \['dropout', 'droppath'\].*\['depth', 'heads'\]"):
        ViTConfig.from_dict(values)


def test_missing_names_take_their_defaults():
    assert ViTConfig.from_dict(SMALL) == ViTConfig(**SMALL)
    assert ViTConfig.from_dict(SMALL | {"preprocess": {"crop": 56}}).preprocess == Preprocess(crop=56)


def test_unknown_fields_are_found_at_both_levels():
    values = ViTConfig(**SMALL).to_dict()
    assert unknown_fields(values) == unknown_fields(SMALL) == []
    values["preprocess"]["depth"] = 3
    assert unknown_fields(values | {"roped": 1, "crop": 2}) == ["crop", "roped", "preprocess.depth"]


def test_unknown_names_of_the_preparation_are_listed():
    values = ViTConfig(**SMALL).to_dict()
    values["preprocess"] = dict(resize=256, crop=224, mean=[0, 0, 0], scale=[1, 1, 1])
    with pytest.raises(ValueError, match=r"Preprocess.*unknown names \['scale'\]"):
        ViTConfig.from_dict(values)


def test_values_from_a_dict_are_validated():
    with pytest.raises(ValueError, match="multiple of the number of heads"):
        ViTConfig.from_dict(ViTConfig(**SMALL).to_dict() | dict(heads=5))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(crop=0), "crop is 0; expected pixels"),
        (dict(resize=(10, -1)), r"resize is \(10, -1\); expected pixels"),
        (dict(fit="squash"), "fit(.|\n)*'squash'"),  # where types are checked, it is that check which speaks
        (dict(interpolation="cubic"), "interpolation(.|\n)*'cubic'"),
        (dict(margin="ceil"), "margin(.|\n)*'ceil'"),
        (dict(mean=(0.5,)), "must have one number for each channel"),
        (dict(std=(1.0, 0.0, 1.0)), "std positive"),
        (dict(mean=(0.0, float("nan"), 0.0)), "must be finite"),
    ],
)
def test_a_preparation_makes_sense(values, words):
    with pytest.raises((ValueError, TypeError), match=words):
        Preprocess(**values)


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (448, 512), (518, 592), (14, 16), (112, 128)])
def test_preparation_at_another_size_keeps_the_proportion(size, resize):
    prepared = Preprocess(mean=(0.5, 0.5, 0.5)).at(size)
    assert prepared == Preprocess(resize=resize, crop=size, mean=(0.5, 0.5, 0.5))
    assert prepared.at(224).resize == (256, 256) and prepared.at(None) is prepared


def test_a_preparation_without_margin_has_none_at_any_size():
    assert all(Preprocess(resize=518, crop=518).at(size).resize == (size, size) for size in range(1, 600))


@pytest.mark.parametrize("registers", [0, 1, 4])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (16, 16)])
def test_the_sequence_is_cls_then_registers_then_patches(registers, grid):
    layout = TokenLayout(registers, grid)
    patches = grid[0] * grid[1]
    assert (layout.prefix, layout.patches, layout.tokens) == (1 + registers, patches, 1 + registers + patches)
    assert layout.group_names == ("cls", *(f"register {i}" for i in range(registers)), "patches")
    assert layout.groups.tolist() == [*range(1 + registers), *[1 + registers] * patches]


@pytest.mark.parametrize("registers", [0, 4])
def test_every_token_is_member_of_its_group_alone(registers):
    layout = TokenLayout(registers, (3, 2))
    assert layout.membership.shape == (layout.tokens, len(layout.group_names))
    assert (layout.membership.sum(axis=1) == 1).all()
    assert (layout.membership.argmax(axis=1) == layout.groups).all()
    assert layout.membership.sum(axis=0).tolist() == [1] * (1 + registers) + [6]
    assert layout.membership.dtype == np.float32


def test_a_config_lays_out_any_image_its_patches_divide():
    config = ViTConfig(**SMALL, registers=2, preprocess=Preprocess(resize=70, crop=56))
    assert config.layout() == TokenLayout(2, (4, 4))
    assert config.layout(28) == TokenLayout(2, (2, 2))
    assert config.layout(28, 42) == TokenLayout(2, (2, 3))


@pytest.mark.parametrize(("height", "width"), [(225, 224), (224, 225), (0, 14), (-14, 14)])
def test_other_images_are_refused(height, width):
    with pytest.raises(ValueError, match=f"{height}x{width} pixels; .* multiples of the patch size 14: .*prepare"):
        ViTConfig(**SMALL).layout(height, width)


def test_the_kinds_of_mlp_are_those_the_model_has():
    from jaxvit.model.layers import ACTIVATIONS

    assert {*ACTIVATIONS, "swiglu"} == set(Mlp.__args__)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("heads", "six", "heads is 'six'; expected a whole number"),
        ("depth", 2.0, "expected a whole number"),
        ("registers", True, "expected a whole number"),
        ("eps", "1e-6", "expected a number"),
        ("cls", 1, "expected true or false"),
        ("grid", [4, 4], "expected a tuple"),
    ],
)
def test_values_of_another_type_are_named(field, value, words):
    config = ViTConfig(**SMALL)
    check_types(config)
    object.__setattr__(config, field, value)  # as the tests' checks of types would not let it through
    with pytest.raises(ValueError, match=words):
        check_types(config)


def test_words():
    words = ViTConfig.dinov2("small", 4, classes=10).in_words()
    assert words == (
        "12 blocks of width 384, 6 heads, gelu MLP, 4 registers, patches of 14 px, a grid of 37x37, 10 classes"
    )
    assert "no class token" in ViTConfig(**SMALL, cls=False, pool="mean").in_words()
