"""Every named intervention does what its name says: it is compared with a forward pass in NumPy, changed by hand."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, double, random_images
from reference import BATCH, HEIGHT, WIDTH, everything, in_full, meaning, numpy_run, run_all

from jaxvit import (
    SITES,
    ActivationStats,
    Edit,
    Registers,
    Relocate,
    Shuffle,
    TokenIndices,
    TokenLayout,
    ablate,
    amplify,
    freeze_attention,
    knockout,
    merge,
    patch,
    remove_registers,
    replace_by_mean,
    replace_by_noise,
    replace_by_shuffle,
    scale_skip,
    steer,
    zero_attention,
)
from jaxvit.model.params import from_params, to_params
from jaxvit.model.sites import ATTENTION_SITES

LAYOUT = FAMILIES["dinov2 with registers"].layout(HEIGHT, WIDTH)
P, T = LAYOUT.prefix, LAYOUT.tokens
ALL, HEADS = range(3), range(4)


@pytest.fixture
def model(float64):
    """[CLS], three registers, 24 patches; 3 layers of 4 heads."""
    return double(FAMILIES["dinov2 with registers"])


@pytest.fixture
def bare(float64):
    """The model without registers, and with the other MLP."""
    return double(FAMILIES["dinov2 giant"])


@pytest.fixture(scope="session")
def images():
    with jax.enable_x64(True):
        return jnp.asarray(random_images(0, BATCH, HEIGHT, WIDTH), jnp.float64)


@cache
def clean_trace(family):
    """What a run without edits records of everything, as NumPy computes it."""
    with jax.enable_x64(True):
        model, images = double(FAMILIES[family]), jnp.asarray(random_images(0, BATCH, HEIGHT, WIDTH), jnp.float64)
        return numpy_run(model, run_all(model, images, everything(model)).trace["resid_pre"][0])


@pytest.fixture
def clean(model):
    return clean_trace("dinov2 with registers")


def assert_equal_runs(out, expected, but=()):
    found = out.trace | dict(cls=out.cls, registers=out.registers, patches=out.patches, tokens=out.tokens)
    for name, a in found.items():
        if name not in but and expected[name].size:
            error = np.abs(a - expected[name]).max() / np.abs(expected[name]).max()
            assert error <= 1e-12, (name, error)


def assert_does(model, images, edits, change, but=()):
    """That the run with these edits is the run in which `change(site, layer, x)` was done by hand."""
    stream = clean_trace("dinov2 with registers" if model.config.registers else "dinov2 giant")["resid_pre"][0]
    expected = numpy_run(model, stream, change)
    untouched = numpy_run(model, stream)
    assert any((expected[name] != untouched[name]).any() for name in SITES)
    assert_equal_runs(run_all(model, images, in_full(model, edits)), expected, but)


def setting(site, layers, index, value=0.0):
    """Sets x[index] of a site."""

    def change(at, layer, x):
        if at == site and layer in layers:
            x[index] = value(layer, x) if callable(value) else value

    return change


# --- what is edited


ABLATED = [
    ("resid_pre", dict(layers=2), [2], np.s_[:]),
    ("z", dict(layers=1, heads=(0, 3)), [1], np.s_[:, :, [0, 3]]),
    ("q", dict(heads=-1), ALL, np.s_[:, :, 3]),
    ("k", dict(tokens="cls", channels=[0, -1]), ALL, np.s_[:, 0, :, ::7]),
    ("v", dict(tokens="registers", layers=(-1, 0)), [2, 0], np.s_[:, 1:P]),
    ("resid_post", dict(tokens="patches", layers=[0, 2]), [0, 2], np.s_[:, P:]),
    ("resid_mid", dict(tokens=("cls", "register 1")), ALL, np.s_[:, [0, 2]]),
    ("skip_attn", dict(tokens=3, layers=0), [0], np.s_[:, 3]),
    ("skip_mlp", dict(tokens=-1, layers=0), [0], np.s_[:, P:]),
    ("mlp_out", dict(tokens=[0, 1], layers=np.array([1, -1])), [1, 2], np.s_[:, :2]),
    ("mlp_post", dict(channels=np.array([3, 40]), layers=-2), [1], np.s_[:, :, [3, 40]]),
    ("mlp_pre", dict(tokens="all", channels=range(5), layers=0), [0], np.s_[:, :, :5]),
    ("attn_out", dict(tokens=TokenIndices([0, 5, -1], LAYOUT), layers=1), [1], np.s_[:, [0, 5, -1]]),
    ("mlp_out", dict(tokens=TokenIndices(np.arange(T) % 2 == 0, LAYOUT)), ALL, np.s_[:, ::2]),
    ("mlp_out", dict(tokens=np.array([0.0, 0, 1, 0, 1])), ALL, np.s_[:, [2, *range(P, T)]]),
    ("scores", dict(query="cls", layers=1), [1], np.s_[:, :, 0]),
]


@pytest.mark.parametrize(("site", "where", "layers", "index"), ABLATED)
def test_what_is_selected_is_ablated_and_nothing_else(model, images, site, where, layers, index):
    assert_does(model, images, ablate(model, site, **where), setting(site, layers, index))


def test_of_a_model_without_registers_too(bare, images):
    assert_does(bare, images, ablate(bare, "resid_mid", tokens="cls", layers=1), setting("resid_mid", [1], np.s_[:, 0]))
    edits = ablate(bare, "mlp_pre", tokens="patches", channels=7)
    assert_does(bare, images, edits, setting("mlp_pre", ALL, np.s_[:, 1:, 7]))
    with pytest.raises(ValueError, match="no group of tokens 'registers'; there are cls, patches, all"):
        ablate(bare, "z", tokens="registers")


@pytest.mark.parametrize("site", SITES)
def test_a_selection_of_nothing_in_particular_is_all(model, site):
    where = dict(queries="all") if site in ATTENTION_SITES else {}
    edit = ablate(model, site, **where)[site]
    assert (np.asarray(edit.mask) == 1).all() and edit.mask.ndim == 1 + len(SITES[site].split())
    empty = ablate(model, site, layers=(), **where)[site]
    assert (np.asarray(empty.mask) == 0).all()


STYLES = [
    lambda i, n: i,
    lambda i, n: i - n,
    lambda i, n: (i,),
    lambda i, n: [i, i - n],
    lambda i, n: range(i, i + 1),
    lambda i, n: np.int64(i),
    lambda i, n: np.array(i),
    lambda i, n: np.array([i - n]),
    lambda i, n: jnp.asarray(i),
    lambda i, n: jnp.asarray([i, i]),
    lambda i, n: [np.int32(i), i],
    lambda i, n: np.arange(n) == i,
    lambda i, n: [j == i for j in range(n)],
    lambda i, n: [float(j == i) for j in range(n)],
    lambda i, n: jnp.asarray(np.eye(n)[i]),
]


@pytest.mark.parametrize("style", range(len(STYLES)))
def test_there_are_many_ways_to_say_an_index(model, style):
    sizes = {"layers": 3, "heads": 4, "channels": 8, "tokens": 5}
    for axis, (name, n) in zip((0, 3, 4, 2), sizes.items(), strict=True):
        for i in (0, 1, n - 1):
            mask = ablate(model, "z", **{name: STYLES[style](i, n)})["z"].mask
            others = tuple(a for a in range(5) if a != axis)
            np.testing.assert_array_equal(np.asarray(mask).min(axis=others), np.eye(n)[i])
    for axis, name in ((3, "query"), (4, "key")):
        mask = knockout(model, **{name: STYLES[style](2, 5)})["scores"].mask
        np.testing.assert_array_equal(np.ravel(mask[0]), np.eye(5)[2])
        assert mask.shape[axis] == 5 and mask.shape[7 - axis] == 1
    mask = ablate(model, "z", tokens=TokenIndices(STYLES[style](9, T), LAYOUT))["z"].mask
    np.testing.assert_array_equal(mask[0, 0, :, 0, 0], np.eye(T)[9])


@pytest.mark.parametrize("style", range(len(STYLES)))
def test_a_register_number_is_never_that_of_a_group(model, style):
    for i, name in enumerate(("register 0", "register 1", "register 2")):
        chosen = Registers(STYLES[style](i, 3))
        for site, where in (("z", "tokens"), ("pattern", "key"), ("pattern", "query")):
            found, named = (ablate(model, site, **{where: what})[site] for what in (chosen, name))
            np.testing.assert_array_equal(found.mask, named.mask)
            assert found.queries == named.queries
    # Beside single tokens, whose masks are over all tokens.
    both = [
        ablate(model, "pattern", query=q, key=TokenIndices(9, LAYOUT))["pattern"] for q in (Registers(1), "register 1")
    ]
    np.testing.assert_array_equal(both[0].mask, both[1].mask)
    every = ablate(model, "z", tokens=Registers())["z"].mask
    np.testing.assert_array_equal(every, ablate(model, "z", tokens="registers")["z"].mask)


def test_a_traced_register_number_does_as_a_plain_one(model, bare):
    @jax.jit
    def masks(i):
        cut = knockout(model, query=Registers(i), key=Registers([i, 0]))["scores"]
        return ablate(model, "z", tokens=Registers(i))["z"].mask, cut.mask, remove_registers(model, i)["scores"].mask

    for i in (0, 1, 2, -1):
        cut = knockout(model, query=Registers(i), key=Registers((i % 3, 0)))["scores"]
        expected = (
            ablate(model, "z", tokens=Registers(i))["z"].mask,
            cut.mask,
            remove_registers(model, i)["scores"].mask,
        )
        for a, b in zip(masks(i), expected, strict=True):
            np.testing.assert_array_equal(a, b)
    assert not np.any(masks(3)[0])  # what is not there selects nothing: not the patches
    with pytest.raises(ValueError, match="registers are selected, but this model has none"):
        ablate(bare, "z", tokens=Registers(0))


SELECTIONS = {"layers": 3, "heads": 4, "channels": 8, "tokens": 5}


@pytest.mark.parametrize("axis", [*SELECTIONS, "query", "key", "registers"])
def test_integers_that_may_be_a_mask_are_refused(model, axis):
    n = {**SELECTIONS, "query": 5, "key": 5, "registers": 3}[axis]
    numbers = [1, *[0] * (n - 1)]

    def mask(what):
        if axis == "registers":
            return ablate(model, "z", tokens=Registers(what))["z"].mask
        site = "pattern" if axis in ("query", "key") else "z"
        return ablate(model, site, **{axis: what})[site].mask

    for given in (numbers, tuple(numbers), np.array(numbers), np.array(numbers, np.uint8), jnp.asarray(numbers)):
        with pytest.raises(ValueError) as error:
            mask(given)
        told = str(error.value)
        assert f"np.array({[bool(i) for i in numbers]})" in told and "or [0, 1] for the indices" in told, told
    for same in ([0] * n, [1] * n):
        with pytest.raises(ValueError, match=rf"or \[{same[0]}\] for the indices"):
            mask(same)
    # What the message says to write, and all that has one meaning.
    np.testing.assert_array_equal(mask(np.array([bool(i) for i in numbers])), mask(0))
    np.testing.assert_array_equal(mask([0, 1]), mask(range(2)))
    np.testing.assert_array_equal(mask([*numbers, 0]), mask([0, 1]))
    np.testing.assert_array_equal(mask([-n, *numbers[1:]]), mask(0))
    np.testing.assert_array_equal(mask([float(i) for i in numbers]), mask(np.array(numbers, bool)))


def test_two_of_two_are_spelled_as_a_range_or_by_name(bare):
    with pytest.raises(ValueError, match=r"np.array\(\[False, True\]\) for the mask, or range\(2\) for the indices"):
        ablate(bare, "z", tokens=[0, 1])
    for all_groups in (range(2), ("cls", "patches"), ("cls", 1), np.ones(2)):
        assert (np.asarray(ablate(bare, "z", tokens=all_groups)["z"].mask) == 1).all()


def test_traced_selections_are_those_of_numbers(model):
    @jax.jit
    def masks(layer, group, heads, weights):
        return [
            ablate(model, "z", layers=layer, heads=heads)["z"].mask,
            ablate(model, "z", layers=[layer, 0], tokens=group)["z"].mask,
            ablate(model, "z", heads=weights)["z"].mask,
            knockout(model, query=group, key=[layer, "cls"])["scores"].mask,
            ablate(model, "q", tokens=TokenIndices(group, LAYOUT))["q"].mask,
        ]

    weights = np.array([0.5, 0.0, 1.0, 0.0])
    for layer, group in ((1, 3), (-1, -2)):
        found = masks(layer, group, np.array([3, -4]), weights)
        expected = [
            ablate(model, "z", layers=layer, heads=[0, 3])["z"].mask,
            ablate(model, "z", layers=(0, layer), tokens=group)["z"].mask,
            ablate(model, "z", heads=weights)["z"].mask,
            knockout(model, query=group, key=(0, layer % 5))["scores"].mask,
            ablate(model, "q", tokens=TokenIndices(group, LAYOUT))["q"].mask,
        ]
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)
    assert not masks(3, 5, np.array([4]), weights)[0].any()  # what is not there selects nothing


def test_a_mask_between_0_and_1_edits_in_part(model, images):
    edits = ablate(model, "mlp_out", layers=np.array([0.0, 0.25, 1.0]), tokens=[0.5, 1.0, 0.0, 0.0, 1.0])

    def change(site, layer, x):
        if site == "mlp_out":
            x *= 1 - np.array([0, 0.25, 1])[layer] * np.array([0.5, 1, 0, 0, *[1] * 24])[:, None]

    assert_does(model, images, edits, change)


# --- attention


CUTS = [
    (dict(query="cls", key="registers"), ALL, HEADS, 0, np.s_[1:P], "prefix"),
    (dict(query="registers", key="patches", heads=1, layers=-1), [2], [1], np.s_[1:P], np.s_[P:], "prefix"),
    (dict(query="patches", key="cls", layers=(0, 1)), [0, 1], HEADS, np.s_[P:], 0, "all"),
    (dict(key="register 1"), ALL, HEADS, np.s_[:], 2, "all"),
    (dict(query="all", key=(0, 4), heads=[0, 3]), ALL, [0, 3], np.s_[:], [0, *range(P, T)], "all"),
    (dict(query=("cls", "patches"), key="cls"), ALL, HEADS, [0, *range(P, T)], 0, "all"),
    (dict(query=[0, 4], key="register 0"), ALL, HEADS, [0, *range(P, T)], 1, "all"),
    (dict(query=-1, key="register 0", queries="all"), ALL, HEADS, np.s_[P:], 1, "all"),
    (dict(query=0, key="cls", queries="prefix"), ALL, HEADS, 0, 0, "prefix"),
    (dict(query="cls", key=TokenIndices([7, 9], LAYOUT)), ALL, HEADS, 0, [7, 9], "prefix"),
    (dict(query=TokenIndices(20, LAYOUT), key=TokenIndices(20, LAYOUT)), ALL, HEADS, 20, 20, "all"),
    (dict(query=TokenIndices(20, LAYOUT), key="registers"), ALL, HEADS, 20, np.s_[1:P], "all"),
    (dict(query="register 0", layers=1), [1], HEADS, 1, np.s_[:], "prefix"),
    (dict(queries="prefix", key="patches"), ALL, HEADS, np.s_[:P], np.s_[P:], "prefix"),
]


def cut(layers, heads, query, key, renormalise):
    where = np.zeros((4, T, T))
    row = np.zeros((T, T))
    row[query] += 1
    row[:, key] += 1
    where[list(heads)] = row == 2

    def change(site, layer, x):
        if site == "pattern" and layer in layers:
            x *= 1 - where
            if renormalise:
                total = x.sum(-1, keepdims=True)
                np.divide(x, total, out=x, where=total != 0)

    return change


@pytest.mark.parametrize(("where", "layers", "heads", "query", "key", "queries"), CUTS)
def test_a_knockout_divides_what_is_left_of_a_row_and_zero_attention_does_not(
    model, images, where, layers, heads, query, key, queries
):
    edits = knockout(model, **where)
    assert edits["scores"].queries == queries
    assert_does(model, images, edits, cut(layers, heads, query, key, True), but=("scores",))
    edits = zero_attention(model, **where)
    assert edits["pattern"].queries == queries
    assert_does(model, images, edits, cut(layers, heads, query, key, False))


def test_removed_registers_are_not_attended_to(model, images):
    edits = remove_registers(model)
    assert_does(model, images, edits, cut(ALL, HEADS, np.s_[:], np.s_[1:P], True), but=("scores",))
    for which, columns in (
        ("register 1", [2]),
        (0, [1]),
        (-1, [3]),
        ((0, 2), [1, 3]),
        (["register 0", 2], [1, 3]),
        (np.array([True, False, True]), [1, 3]),
        ("registers", [1, 2, 3]),
    ):
        edits = remove_registers(model, which)
        assert_does(model, images, edits, cut(ALL, HEADS, np.s_[:], columns, True), but=("scores",))
    edits = remove_registers(model, registers=0, layers=(0, -1))
    assert_does(model, images, edits, cut([0, 2], HEADS, np.s_[:], [1], True), but=("scores",))


@pytest.mark.parametrize("family", ["dinov2 with registers", "dinov2 giant with registers"])
@pytest.mark.usefixtures("float64")
def test_removing_registers_is_deleting_them(family, images):
    model = double(FAMILIES[family])
    config = FAMILIES[family.removesuffix(" with registers")]
    fewer = from_params(config, {name: a for name, a in to_params(model).items() if name != "registers"})
    out, expected = run(model, images, remove_registers(model)), run(fewer, images, {})
    np.testing.assert_allclose(out.cls, expected.cls, rtol=0, atol=1e-13)
    np.testing.assert_allclose(out.patches, expected.patches, rtol=0, atol=1e-13)


@jax.jit
def run(model, images, edits):
    return model(images, edits)


@pytest.mark.parametrize("queries", ["prefix", "all"])
def test_frozen_attention_is_that_of_another_run(model, images, clean, queries):
    other, rows = clean["pattern"][:, ::-1], P if queries == "prefix" else T
    given = {} if queries == "prefix" else {"queries": "all"}

    def change(site, layer, x):
        if site == "pattern" and layer != 1:
            x[:, :, :rows] = other[layer, :, :, :rows]

    assert_does(model, images, freeze_attention(model, other[:, :, :, :rows], layers=(0, 2), **given), change)


# --- values in place of others


def test_a_patch_takes_values_with_or_without_layers_of_all_or_some(model, images, clean):
    other = clean["resid_post"][:, ::-1]
    for value, layers, expected in [
        (other[1], 1, {1: other[1]}),
        (other[1], (0, 2), {0: other[1], 2: other[1]}),
        (other[1:2], None, {0: other[1], 1: other[1], 2: other[1]}),
        (other, 1, {1: other[1]}),
        (other, np.array([0.0, 1.0, 1.0]), {1: other[1], 2: other[2]}),
        (other[:2], (0, 2), {0: other[0], 2: other[1]}),
        (other[:2], (-1, 0), {2: other[0], 0: other[1]}),  # in the order in which layers are asked for
        (other[1:], np.array([2, 0]), {2: other[1], 0: other[2]}),
        (other, (1, -1, 0), {1: other[0], 2: other[1], 0: other[2]}),
        (other, [2, 0], {0: other[0], 2: other[2]}),  # of all layers
        (other[:2], np.array([True, False, True]), {0: other[0], 2: other[1]}),
        (other[:2], range(2, 0, -1), {2: other[0], 1: other[1]}),
        (other, None, dict(enumerate(other))),
    ]:

        def change(site, layer, x, expected=expected):
            if site == "resid_post" and layer in expected:
                x[:, P:] = expected[layer][:, P:]

        assert_does(model, images, patch(model, "resid_post", value, layers=layers, tokens="patches"), change)


def test_layers_are_in_the_order_asked_for_everywhere(model, images, clean):
    """That of a value, of donors, of their order, of frozen attention, and of factors and vectors."""
    rng = np.random.default_rng(0)
    layers, orders = (-1, 0), np.array([[1, 0], [0, 0]])

    def same(one, other):
        (a,), (b,) = one.values(), other.values()
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            mask = np.broadcast_to(
                np.asarray(a.mask).max(tuple(range(1, np.ndim(a.mask))), keepdims=True), a.mask.shape
            )
            at = mask.ravel()[:: mask[0].size] > 0
            np.testing.assert_array_equal(*((np.asarray(v)[at] if np.shape(v)[:1] == (3,) else v) for v in (x, y)))

    for site, make in (
        ("pattern", lambda value, **w: freeze_attention(model, value, **w)),
        ("z", lambda value, **w: patch(model, "z", value, **w)),
        ("z", lambda value, **w: replace_by_shuffle(model, "z", [1, 0], value, **w)),
    ):
        whole = clean[site][:, :, :, :P] if site == "pattern" else clean[site]
        same(make(whole[[2, 0]], layers=layers), make(whole, layers=(0, 2)))
        same(make(whole[[1, 2, 0]], layers=(1, 2, 0)), make(whole))
    by_depth = np.array([[0, 0], [0, 1], [1, 0]])
    for value in (None, clean["z"], clean["z"][1]):
        found = replace_by_shuffle(model, "z", orders, value, layers=layers)
        same(found, replace_by_shuffle(model, "z", by_depth, value, layers=(0, 2)))
    factor = rng.normal(size=(3, 1, 1, 4, 1))
    for make in (amplify, steer):
        same(make(model, "q", factor[[2, 0]], layers=layers), make(model, "q", factor, layers=(0, 2)))

    edits = replace_by_shuffle(model, "z", orders, clean["z"][[2, 0]], layers=layers, heads=2)

    def change(site, layer, x):
        if site == "z" and layer in (0, 2):
            x[:, :, 2] = clean["z"][layer][orders[0 if layer == 2 else 1]][:, :, 2]

    assert_does(model, images, edits, change)


def test_traced_layers_take_values_in_their_order(model, clean):
    value = clean["resid_post"]

    @jax.jit
    def edit(layers):
        return patch(model, "resid_post", value[:2], layers=layers)["resid_post"]

    for layers in ((2, 0), (-2, 2)):
        found = edit(np.array(layers))
        expected = patch(model, "resid_post", value[:2], layers=layers)["resid_post"]
        np.testing.assert_array_equal(found.mask, expected.mask)
        np.testing.assert_array_equal(found.shift, expected.shift)
    found = edit(np.array([-5, 1]))  # what is not there selects nothing, and no other layer gets its value
    np.testing.assert_array_equal(found.mask.ravel(), [0, 1, 0])
    np.testing.assert_array_equal(found.shift[1], value[1])


@pytest.mark.parametrize("site", SITES)
def test_a_patch_at_every_site_is_the_other_run_there(model, images, clean, site):
    other, attention = clean[site][:, ::-1], site in ATTENTION_SITES
    rows = np.s_[:, :, :P] if attention else np.s_[:]
    value = other[:, :, :, :P] if attention else other
    edits = patch(model, site, value, layers=1)
    assert_does(model, images, edits, setting(site, [1], rows, lambda layer, x: other[layer][rows]))
    if attention:
        edits = patch(model, site, other, layers=1, queries="all", key="registers")
        at = np.s_[..., 1:P]
        assert_does(model, images, edits, setting(site, [1], at, lambda layer, x: other[layer][at]))


def test_a_patch_over_groups_and_over_the_prefix(model, images, clean):
    rng = np.random.default_rng(0)
    groups = rng.normal(size=(3, 1, 5, 32))

    def spread(layer, x):
        return groups[layer][:, LAYOUT.groups]

    edits = patch(model, "attn_out", groups, over="groups")
    assert_does(model, images, edits, setting("attn_out", ALL, np.s_[:], spread))
    edits = patch(model, "attn_out", groups[0], over="groups", layers=2, tokens=("cls", "patches"))
    at = np.s_[:, [0, *range(P, T)]]
    assert_does(model, images, edits, setting("attn_out", [2], at, lambda layer, x: spread(0, x)[at]))


@pytest.mark.parametrize("site", ["resid_pre", "z"])
def test_a_patch_over_the_prefix_leaves_patches_as_they_are(model, images, clean, site):
    other = clean[site][:, ::-1, :P]
    for where, layers, tokens in [
        ({}, ALL, np.s_[:]),
        (dict(layers=1, tokens="registers"), [1], np.s_[1:]),
        (dict(tokens=TokenIndices([0, 2], LAYOUT)), ALL, [0, 2]),
    ]:
        edits = patch(model, site, other, over="prefix", **where)

        def change(at, layer, x, layers=layers, tokens=tokens):
            if at == site and layer in layers:
                x[:, :P][:, tokens] = other[layer][:, tokens]

        assert_does(model, images, edits, change)


@pytest.fixture
def stats():
    rng, stats = np.random.default_rng(0), ActivationStats()
    stats.count = np.array([10.0, 10, 10, 10, 240])
    for site, axes in (("resid_pre", (32,)), ("z", (4, 8))):
        stats.means[site] = rng.normal(size=(3, 5, *axes))
        stats.squares[site] = stats.count.reshape(-1, *[1] * len(axes)) * rng.uniform(0.5, 2, size=(3, 5, *axes))
    return stats


def test_the_mean_of_each_layer_and_group_takes_the_place_of_its_tokens(model, images, stats):
    for site in ("resid_pre", "z"):
        means = stats.means[site]
        edits = replace_by_mean(model, site, stats, layers=(0, 2), tokens=("register 2", "patches"))
        at = np.s_[:, P - 1 :]
        expected = setting(site, [0, 2], at, lambda layer, x, m=means: m[layer, LAYOUT.groups][P - 1 :])
        assert_does(model, images, edits, expected)


def test_noise_is_a_draw_of_the_mean_and_variance_of_each_layer_group_and_channel(model, images, stats):
    key = jax.random.key(3)
    for site in ("resid_pre", "z"):
        mean, deviation = stats.means[site], np.sqrt(np.asarray(stats.variance(site))[:, 0])
        draw = np.asarray(jax.random.normal(key, (3, BATCH, *mean.shape[1:])))
        noise = mean[:, None] + deviation[:, None] * draw
        # Without a layout there is one draw for each group, and none of patches.
        edits = replace_by_noise(model, site, stats, key, BATCH, layers=(0, 1))
        assert_does(model, images, edits, setting(site, [0, 1], np.s_[:, :P], lambda l, x, n=noise: n[l, :, :P]))
        edits = replace_by_noise(model, site, stats, key, BATCH, tokens="registers")
        assert_does(model, images, edits, setting(site, ALL, np.s_[:, 1:P], lambda l, x, n=noise: n[l, :, 1:P]))
        edits = replace_by_noise(model, site, stats, key, BATCH, tokens=TokenIndices(2, LAYOUT))
        assert_does(model, images, edits, setting(site, ALL, np.s_[:, 2], lambda l, x, n=noise: n[l, :, 2]))

        draw = np.asarray(jax.random.normal(key, (3, BATCH, T, *mean.shape[2:])))
        noise = mean[:, None, LAYOUT.groups] + deviation[:, None, LAYOUT.groups] * draw
        edits = replace_by_noise(model, site, stats, key, BATCH, LAYOUT, tokens="patches", layers=2)
        assert_does(model, images, edits, setting(site, [2], np.s_[:, P:], lambda l, x, n=noise: n[l, :, P:]))


def test_many_draws_of_noise_have_the_mean_and_variance(model, stats):
    n = 4000
    shift = np.asarray(replace_by_noise(model, "resid_pre", stats, jax.random.key(0), n)["resid_pre"].shift)
    mean, variance = stats.means["resid_pre"], np.asarray(stats.variance("resid_pre"))[:, 0]
    assert (np.abs(shift.mean(1) - mean) < 5 * np.sqrt(variance / n)).all()
    assert (np.abs(shift.var(1) / variance - 1) < 5 * np.sqrt(2 / n)).all()


def test_a_shuffle_takes_the_values_of_another_image(model, images, clean):
    order = np.array([1, 0])
    where = dict(tokens="patches", layers=(0, 2))

    def live(site, layer, x):
        if site == "resid_post" and layer in (0, 2):
            x[:, P:] = x[order][:, P:].copy()

    assert_does(model, images, replace_by_shuffle(model, "resid_post", order, **where), live)

    def from_clean(site, layer, x):
        if site == "resid_post" and layer in (0, 2):
            x[:, P:] = clean["resid_post"][layer][order][:, P:]

    recorded = clean["resid_post"]
    for given in (recorded, recorded[::2]):
        edits = replace_by_shuffle(model, "resid_post", order, given, **where)
        assert isinstance(edits["resid_post"], Edit)
        assert_does(model, images, edits, from_clean)
    # Where the donor was edited the two differ.
    a, b = (numpy_run(model, clean["resid_pre"][0], change)["tokens"] for change in (live, from_clean))
    assert np.abs(a - b).max() > 1e-3


def test_a_shuffle_may_differ_between_layers(model, images, clean):
    orders = np.array([[1, 0], [0, 0], [1, 1]])

    def live(site, layer, x):
        if site == "resid_post":
            x[:, :1] = x[orders[layer]][:, :1].copy()

    assert_does(model, images, replace_by_shuffle(model, "resid_post", orders, tokens="cls"), live)

    def same_layer(site, layer, x):
        if site == "z":
            x[:, :, 2] = clean["z"][layer][orders[layer]][:, :, 2]

    assert_does(model, images, replace_by_shuffle(model, "z", orders, clean["z"], heads=2), same_layer)

    def of_layer_1(site, layer, x):
        if site == "z":
            x[:, :, 2] = clean["z"][1][orders[layer]][:, :, 2]

    for value in (clean["z"][1], clean["z"][1:2]):
        assert_does(model, images, replace_by_shuffle(model, "z", orders, value, heads=2), of_layer_1)

    def rows(site, layer, x):
        if site == "pattern" and layer == 1:
            x[:, :, :P] = clean["pattern"][1][[1, 0]][:, :, :P]

    edits = replace_by_shuffle(model, "pattern", [1, 0], clean["pattern"][:, :, :, :P], layers=1)
    assert_does(model, images, edits, rows)


def test_a_shuffle_after_chosen_blocks_is_a_loop_over_runs_from_there(model, images):
    order = jnp.asarray([1, 0])
    edits = replace_by_shuffle(model, "resid_post", order, tokens="patches", layers=(0, 1))
    from_layer = jax.jit(lambda m, layer, x: m.run_from(layer, x, record="resid_post"), static_argnums=1)
    stream = jax.jit(type(model).embed)(model, images)
    for layer in range(2):
        stream = np.array(from_layer(model, layer, stream).trace["resid_post"][0])
        stream[:, P:] = stream[::-1, P:].copy()
    expected = from_layer(model, 2, jnp.asarray(stream))
    np.testing.assert_allclose(run(model, images, edits).tokens, expected.tokens, rtol=0, atol=1e-12)


# --- values changed


def test_amplifying_multiplies(model, images):
    edits = amplify(model, "mlp_post", 3, layers=1, tokens="cls", channels=[4, 5])
    assert_does(model, images, edits, setting("mlp_post", [1], np.s_[:, 0, 4:6], lambda l, x: 3 * x[:, 0, 4:6]))
    factor = np.random.default_rng(0).normal(size=(3, 1, 1, 4, 1))
    edits = amplify(model, "q", factor, layers=(0, 2))
    assert_does(model, images, edits, setting("q", [0, 2], np.s_[:], lambda l, x: factor[l] * x))


def test_steering_adds(model, images):
    rng = np.random.default_rng(0)
    for site, shape in [
        ("resid_post", (32,)),
        ("mlp_pre", (48,)),
        ("z", (8,)),
        ("z", (4, 8)),
        ("resid_mid", ()),
        ("resid_post", (3, 2, 1, 32)),
        ("v", (1, 2, 5, 4, 1)),
    ]:
        vector = rng.normal(size=shape)

        def added(layer, x, vector=vector, shape=shape):
            v = vector[min(layer, len(vector) - 1)] if len(shape) > 3 else vector
            return x[:, :1] + (v[:, :1] if len(shape) > 3 else v)

        edits = steer(model, site, vector, layers=(1, 2), tokens="cls")
        assert_does(model, images, edits, setting(site, [1, 2], np.s_[:, :1], added))


@pytest.mark.parametrize("branch", ["attn", "mlp"])
def test_scaling_a_skip_scales_the_identity_branch_alone(model, images, branch):
    for factor in (0.0, 0.5):
        edits = scale_skip(model, factor, branch, tokens="registers", layers=1)
        change = setting(f"skip_{branch}", [1], np.s_[:, 1:P], lambda l, x, f=factor: f * x[:, 1:P])
        assert_does(model, images, edits, change)
    assert list(scale_skip(model, 0.0)) == ["skip_attn"]


def test_relocating_moves_the_largest_activation_of_patches_to_chosen_tokens(model, images):
    mask = ablate(model, "mlp_post", channels=(3, 17), layers=(0, 2))["mlp_post"].mask
    to = np.zeros((1, 1, 5, 1))
    to[0, 0, 2] = 1

    def change(site, layer, x):
        if site == "mlp_post" and layer in (0, 2):
            for channel in (3, 17):
                largest = x[:, P:, channel].max(1)
                x[:, :, channel] = 0
                x[:, 2, channel] = largest

    assert_does(model, images, {"mlp_post": Relocate(mask, to)}, change)


# --- together


@pytest.mark.parametrize("family", ["dinov2 with registers", "dinov2 giant"])
@pytest.mark.usefixtures("float64")
def test_interventions_of_all_kinds_run_in_one_program_as_they_are(family, images, stats):
    model, clean = double(FAMILIES[family]), clean_trace(family)
    layout = model.config.layout(HEIGHT, WIDTH)
    of_mlp = ablate(model, "mlp_post", channels=(3, 17), layers=(0, 2))["mlp_post"].mask
    to = np.eye(model.prefix + 1)[0].reshape(1, 1, -1, 1)
    edits = merge(
        ablate(model, "z", layers=1, heads=(0, 3)),
        replace_by_shuffle(model, "z", [1, 0], layers=2, heads=1),
        knockout(model, query="cls", key=TokenIndices([3, 5], layout)),
        knockout(model, query="patches", key="cls", layers=0, heads=1),
        zero_attention(model, query="cls", key="cls", layers=2),
        patch(model, "scores", clean["scores"][:, ::-1], layers=1, queries="all", query="patches", heads=2),
        patch(model, "resid_mid", clean["resid_mid"][1:, ::-1], layers=(1, 2), tokens="patches"),
        steer(model, "resid_post", np.arange(32) / 10, layers=0, tokens=TokenIndices(7, layout)),
        scale_skip(model, 0.5, "mlp", layers=1),
        amplify(model, "v", 2.0, tokens="cls", layers=0),
        {"mlp_post": Relocate(of_mlp, to)},
    )
    out = run(model, images, edits)
    expected = numpy_run(model, clean["resid_pre"][0], meaning(model, edits))
    for name in ("cls", "patches", "tokens"):
        np.testing.assert_allclose(getattr(out, name), expected[name], rtol=0, atol=1e-12)


def test_other_numbers_compile_nothing(model, images):
    traces = []

    @jax.jit
    def cls(model, images, point):
        traces.append(1)
        edits = merge(
            ablate(model, "z", layers=point["layer"], heads=point["head"]),
            knockout(model, layers=point["layer"], query=point["group"], key=point["key"]),
            steer(model, "resid_post", point["vector"], layers=point["layer"], tokens=point["group"]),
            amplify(model, "mlp_post", point["factor"], channels=point["channels"]),
        )
        return model(images, edits).cls

    rng, results = np.random.default_rng(0), []
    for _ in range(12):
        point = {name: int(rng.integers(size)) for name, size in dict(layer=3, head=4, group=5, key=5).items()}
        point |= dict(vector=rng.normal(size=32), factor=rng.normal(), channels=rng.uniform(size=48))
        results.append(cls(model, images, jax.tree.map(jnp.asarray, point)))
        edits = merge(
            ablate(model, "z", layers=point["layer"], heads=point["head"]),
            knockout(model, layers=point["layer"], query=point["group"], key=point["key"]),
            steer(model, "resid_post", point["vector"], layers=point["layer"], tokens=point["group"]),
            amplify(model, "mlp_post", point["factor"], channels=point["channels"]),
        )
        stream = clean_trace("dinov2 with registers")["resid_pre"][0]
        expected = numpy_run(model, stream, meaning(model, edits))["cls"]
        np.testing.assert_allclose(results[-1], expected, rtol=0, atol=1e-12)
    assert len(traces) == 1 and cls._cache_size() == 1


def test_what_meets_is_known_inside_of_a_compiled_function(model):
    def both(query):
        return merge(*(zero_attention(model, query=q, key="registers") for q in ("cls", query)))

    masks = jax.eval_shape(lambda: [edit.mask for edit in both("patches")["pattern"]])
    assert [mask.shape for mask in masks] == [(3, 1, 1, 5, 5)] * 2
    with pytest.raises(ValueError, match="two edits at 'pattern' change the same values"):
        jax.eval_shape(lambda: both("cls")["pattern"][0].mask)


# --- errors


def refusal(make, *args, **kwargs):
    make = getattr(make, "__wrapped__", make)  # without run-time types, which would speak first
    with pytest.raises(ValueError) as caught:
        make(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


OTHER = TokenLayout(3, (2, 2))
CALL = "model.config.layout(height, width)"


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (dict(site="zz"), ["no site 'zz'", *SITES]),
        (dict(site="z", head=3), ["'z' has no head", "layers, tokens, heads, channels"]),
        (dict(site="mlp_out", heads=3), ["'mlp_out' has no heads", "layers, tokens, channels"]),
        (dict(site="resid_pre", query="cls", key="cls"), ["'resid_pre' has no query, key"]),
        (dict(site="pattern", tokens="cls"), ["'pattern' has no tokens", "layers, query, key, heads, queries"]),
        (dict(site="pattern", channels=1), ["'pattern' has no channels"]),
        (dict(site="z", layers=3), ["no layer 3", "0 to 2"]),
        (dict(site="z", layers=-4), ["no layer -4", "0 to 2"]),
        (dict(site="z", heads=(0, 4)), ["no head 4", "0 to 3"]),
        (dict(site="z", heads=np.array([0, 4])), ["no head 4", "0 to 3"]),
        (dict(site="z", heads=jnp.asarray(-5)), ["no head -5", "0 to 3"]),
        (dict(site="z", channels=8), ["no channel 8", "0 to 7"]),
        (dict(site="mlp_post", channels=48), ["no channel 48", "0 to 47"]),
        (dict(site="z", tokens=5), ["no group of tokens 5", "0 to 4"]),
        (
            dict(site="z", tokens="patch"),
            ["no group of tokens 'patch'", "cls, register 0, register 1, register 2, patches"],
        ),
        (dict(site="z", tokens=("cls", "register 3", "cat")), ["no group of tokens 'register 3', 'cat'"]),
        (dict(site="z", layers="last"), ["no layer 'last'", "0 to 2"]),
        (dict(site="z", layers=1.5), ["selection of layers", "float64, [1]", "indices, or a mask of shape [3]"]),
        (dict(site="z", heads=np.ones(3)), ["selection of heads", "[3]", "mask of shape [4]"]),
        (dict(site="z", heads=[True, False]), ["selection of heads", "bool, [2]", "mask of shape [4]"]),
        (dict(site="z", heads=slice(2)), ["selection of heads", "mask of shape [4]"]),
        (dict(site="z", heads={1, 2}), ["selection of heads", "mask of shape [4]"]),
        (dict(site="z", heads=[[1, 2], [3]]), ["selection of heads", "mask of shape [4]"]),
        (dict(site="z", heads=[0.0, 1.0, 2.0, 0.0]), ["mask of heads holds 2.0", "from 0 to 1", "integers"]),
        (dict(site="z", layers=np.array([0, -0.5, 1])), ["mask of layers holds -0.5"]),
        (dict(site="z", layers=np.array([0, np.nan, 1])), ["mask of layers holds nan"]),
        (dict(site="z", heads=[True, 2]), ["mixes booleans and numbers", "mask of shape [4]"]),
        (dict(site="z", tokens=Registers(3)), ["no register 3", "0 to 2"]),
        (dict(site="z", tokens=Registers("cls")), ["no register 'cls'", "register 0, register 1, register 2"]),
        (dict(site="z", tokens=TokenIndices(T, LAYOUT)), [f"no token {T}", f"0 to {T - 1}", "6x4 patches", CALL]),
        (dict(site="z", tokens=TokenIndices(0, TokenLayout(1, (6, 4)))), ["1 registers", "the model has 3", CALL]),
        (dict(site="pattern", query=TokenIndices(0, LAYOUT), key=TokenIndices(0, OTHER)), ["different layouts", CALL]),
        (dict(site="pattern", query="patches", queries="prefix"), ["queries='prefix'", "patches"]),
        (dict(site="pattern", query=-1, queries="prefix"), ["queries='prefix'", "patches"]),
        (dict(site="pattern", query=TokenIndices(9, LAYOUT), queries="prefix"), ["queries='prefix'", "patches"]),
    ],
)
def test_wrong_selections_are_described(model, where, words):
    where = dict(where)
    message = refusal(ablate, model, where.pop("site"), **where)
    assert all(word in message for word in words), message


def test_positions_of_another_size_of_image_are_described(model, images):
    message = refusal(type(model).__call__, model, images, ablate(model, "z", tokens=TokenIndices(0, OTHER)))
    assert "mask of the Edit at 'z' has shape [3, 1, 8, 1, 1]" in message and "one for each token" in message


@pytest.mark.parametrize(
    ("make", "args", "where", "words"),
    [
        (patch, ("resid_pre", np.ones((28, 32))), {}, ["'resid_pre'", "[28, 32]", "[B, T, D]", "axis of layers"]),
        (patch, ("resid_pre", np.ones((2, 2, 28, 32))), {}, ["2 layers", "3 of 3"]),
        (patch, ("resid_pre", np.ones((2, 2, 28, 32))), dict(layers=0), ["2 layers", "1 of 3"]),
        (patch, ("resid_pre", np.ones((1, 2, 4, 32)), "prefix"), dict(tokens="patches"), ["cannot replace", "patches"]),
        (patch, ("resid_pre", np.ones((1, 2, 4, 32)), "prefix"), dict(tokens=4), ["cannot replace", "patches"]),
        (patch, ("pattern", np.ones((1, 2, 4, 4, 28)), "prefix"), {}, ["over='prefix'", "queries='prefix'"]),
        (patch, ("pattern", np.ones((1, 2, 4, 4, 28))), dict(query="patches"), ["queries='prefix'", "'all'"]),
        (steer, ("zz", np.ones(32)), {}, ["no site 'zz'"]),
        (steer, ("resid_pre", np.ones((2, 32))), {}, ["'resid_pre'", "[2, 32]", "[D]", "[L, B, T, D]"]),
        (steer, ("z", np.ones((2, 4, 8))), {}, ["'z'", "[2, 4, 8]"]),
        (scale_skip, (0.5, "attention"), {}, ["no site 'skip_attention'"]),
        (remove_registers, ("cls",), {}, ["'cls'", "is not a register", "knockout"]),
        (remove_registers, ("all",), {}, ["is not a register"]),
        (remove_registers, ([1, 4],), {}, ["no register 4", "0 to 2"]),
        (remove_registers, (3,), {}, ["no register 3", "0 to 2"]),
        (remove_registers, ("register 3",), {}, ["no register 'register 3'", "register 0, register 1, register 2"]),
        (patch, ("resid_pre", np.ones((2, 2, 28, 32))), dict(layers=(0, -3)), ["(0, -3)", "a layer twice"]),
        (amplify, ("q", np.ones((2, 1, 1, 4, 1))), dict(layers=0), ["the factor has 2 layers", "1 of 3"]),
        (replace_by_shuffle, ("z", [[1, 0], [0, 1]]), {}, ["order has 2 layers", "3 of 3"]),
        (replace_by_shuffle, ("z", [[[1, 0]]]), {}, ["order has shape [1, 1, 2]", "[B], or [L, B]"]),
        (replace_by_shuffle, ("z", [0, 2]), {}, ["'z'", "image 2", "0 to 1"]),
        (replace_by_shuffle, ("z", [0, -1]), {}, ["'z'", "image -1", "0 to 1"]),
        (replace_by_shuffle, ("z", jnp.asarray([0, 2])), {}, ["'z'", "image 2", "0 to 1"]),
        (replace_by_shuffle, ("z", [[0, 1], [1, 0], [2, 0]]), {}, ["'z'", "image 2", "0 to 1"]),
        (replace_by_shuffle, ("z", [1.0, 0.0]), {}, ["'z'", "float64", "integers"]),
        (replace_by_shuffle, ("z", [True, False]), {}, ["'z'", "bool", "integers"]),
        (replace_by_shuffle, ("z", [0, 1], np.ones((3, 3, 28, 4, 8))), {}, ["order", "[1, 2]", "[3] or [3, 3]"]),
        (replace_by_shuffle, ("z", [0, 3], np.ones((3, 2, 28, 4, 8))), {}, ["'z'", "image 3", "0 to 1"]),
        (replace_by_shuffle, ("z", [0.0, 1.0], np.ones((3, 2, 28, 4, 8))), {}, ["'z'", "float64", "integers"]),
        (replace_by_shuffle, ("zz", [0, 1], np.ones((3, 2, 28, 4, 8))), {}, ["no site 'zz'"]),
    ],
)
def test_wrong_values_are_described(model, make, args, where, words):
    message = refusal(make, model, *args, **where)
    assert all(word in message for word in words), message


def test_values_of_another_size_than_the_selected_tokens_say_what_to_call(model, stats):
    at = TokenIndices(7, OTHER)
    message = refusal(patch, model, "z", np.ones((1, 2, T, 4, 8)), tokens=at)
    assert f"'z' has {T} tokens" in message and "8 tokens (2x2 patches)" in message and CALL in message
    message = refusal(replace_by_shuffle, model, "z", [1, 0], np.ones((3, 2, T, 4, 8)), tokens=at)
    assert f"'z' has {T} tokens" in message and CALL in message
    message = refusal(freeze_attention, model, np.ones((3, 2, 4, P, T)), key=at)
    assert f"'pattern' has {T} tokens" in message and CALL in message
    message = refusal(replace_by_noise, model, "z", stats, jax.random.key(0), 2, LAYOUT, tokens=at)
    assert f"{T} tokens (6x4 patches)" in message and CALL in message


def test_a_model_without_registers_has_none_to_remove(bare):
    assert "no registers to remove" in refusal(remove_registers, bare)


def test_statistics_that_are_not_there_are_described(model, stats):
    assert "no statistics of 'q'" in refusal(replace_by_mean, model, "q", stats)
    assert "patches" in refusal(replace_by_noise, model, "z", stats, jax.random.key(0), 2, tokens="patches")


def test_a_value_of_some_layers_needs_layers_that_are_known(model):
    value = np.ones((2, 2, 28, 32))
    with pytest.raises(ValueError, match="2 layers, but the selected layers are traced: give all 3 layers, or one"):
        jax.eval_shape(lambda layer: patch(model, "resid_pre", value, layers=layer), 1)


def test_shuffles_of_other_numbers_of_images_are_described(model, images):
    message = refusal(type(model).__call__, model, images, replace_by_shuffle(model, "z", [0, 1, 2]))
    assert "order of the Shuffle at 'z' has shape [1, 3]" in message
    assert isinstance(replace_by_shuffle(model, "z", [0, 1])["z"], Shuffle)
