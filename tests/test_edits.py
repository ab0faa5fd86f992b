"""The laws of edits: what is not edited does not change, what is edited is what the edit says, and edits are data."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, TINY, double, random_images, random_model
from reference import BATCH, HEIGHT, WIDTH, everything, kinds, meaning, numpy_run, run_all

import jaxvit
from jaxvit import SITES, Edit, Knockout, Relocate, Shuffle, Take, ViT, ViTConfig, merge, one_of
from jaxvit.model.attention import softmax
from jaxvit.model.edits import Operation, normalise_edits
from jaxvit.model.params import abstract, from_params, to_params
from jaxvit.model.sites import ATTENTION_SITES
from jaxvit.model.tap import Tap

# Rounding of float64 in two orders of summation, in units of a site's largest value.
ROUNDING = 1e-12


@pytest.fixture(params=["dinov2", "dinov2 giant with registers"])
def exact(request, float64):
    """The two families that differ in everything, in float64."""
    return double(FAMILIES[request.param])


RICHEST = "dinov2 giant with registers"


@pytest.fixture
def one(float64):
    """A model of the family that has everything, for laws of the machinery around the edits."""
    return double(FAMILIES[RICHEST])


@pytest.fixture(scope="session")
def images():
    with jax.enable_x64(True):
        return jnp.asarray(random_images(0, BATCH, HEIGHT, WIDTH), jnp.float64)


@jax.jit
def run(model, images, edits):
    return model(images, edits)


@jax.jit
def run_blocks(model, stream, edits):
    return model.run_from(0, stream, edits)


def run_plain(model, images):
    """No edits, every site recorded in full."""
    return jax.device_get(all_of_plain(model, images))


@jax.jit
def all_of_plain(model, images):
    return model(images, record={site: Take(tokens="all") for site in SITES})


def parts(out):
    """What a run gives, by name."""
    if isinstance(out, jaxvit.Output):
        return out.trace | {name: getattr(out, name) for name in ("cls", "registers", "patches", "tokens")}
    return out if isinstance(out, dict) else dict(enumerate(out))


def assert_close(actual, expected, tolerance=ROUNDING):
    """Within the tolerance of the largest expected value, for everything that `actual` has."""
    actual, expected = parts(actual), parts(expected)
    for name, a in actual.items():
        a, b = np.asarray(a, np.float64), np.asarray(expected[name], np.float64)
        assert a.shape == b.shape, name
        cut = np.isneginf(b)  # scores of keys that are knocked out
        np.testing.assert_array_equal(np.isneginf(a), cut, err_msg=name)
        a, b = a[~cut], b[~cut]
        if b.size:
            error = np.abs(a - b).max() / np.abs(b).max()
            assert error <= tolerance, (name, error)


def assert_same(actual, expected):
    """In every bit."""
    actual, expected = parts(actual), parts(expected)
    for name, a in actual.items():
        a, b = np.asarray(a), np.asarray(expected[name])
        assert a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True), name


def randomly(rng, edit, site):
    """The edit with random arrays of the same shapes, and a mask of 0, 1 and between."""
    mask = rng.choice([0.0, 0.3, 1.0], size=edit.mask.shape)
    if isinstance(edit, Shuffle):
        return replace(edit, mask=mask, order=rng.integers(BATCH, size=edit.order.shape))
    if isinstance(edit, Relocate):
        return replace(edit, mask=mask, to=rng.normal(size=edit.to.shape))
    if isinstance(edit, Knockout):
        return replace(edit, mask=mask)
    scale, shift = 1 + 0.5 * rng.normal(size=np.shape(edit.scale)), rng.normal(size=edit.shift.shape)
    if site == "pattern":  # which is not negative
        scale, shift = np.abs(scale), np.abs(shift)
    return replace(edit, mask=mask, scale=scale, shift=shift)


def full_edit(mask, scale=0.0, shift=0.0):
    return Edit(mask, scale, shift, mask_over="tokens", value_over="tokens")


def run_with(model, images, edits):
    """A run with these edits over tokens, site -> edit; all such runs are one program."""
    kinds = {Edit: "tokens", Knockout: "knockout"}
    every = [(site, one) for site, edit in edits.items() for one in (edit if isinstance(edit, tuple) else (edit,))]
    return run_all(model, images, everything(model, {(site, kinds[type(edit)]): edit for site, edit in every}))


def cut_off(mask):
    return Knockout(mask, mask_over="tokens")


def zeros(model, site):
    """A mask for `run_with`."""
    return np.zeros(kinds(model, site, "tokens")["tokens"].mask.shape)


# --- what is not edited


def test_an_edit_whose_mask_is_0_changes_nothing(exact, images):
    rng = np.random.default_rng(0)
    neutral = run_all(exact, images, everything(exact))
    assert_close(neutral, run_plain(exact, images))
    chosen = {
        (site, kind): replace(randomly(rng, edit, site), mask=0.0)
        for site in SITES
        for kind, edit in kinds(exact, site, "tokens").items()
    }
    assert_same(run_all(exact, images, everything(exact, chosen)), neutral)


def test_an_edit_over_groups_whose_mask_is_0_changes_nothing(exact, images):
    assert_close(run_all(exact, images, everything(exact, program="mixed")), run_plain(exact, images))


@pytest.mark.parametrize("queries", ["prefix", "all"])
@pytest.mark.parametrize("site", [*ATTENTION_SITES, "v"])
def test_neither_does_one_at_one_site_alone(site, queries):
    # In float32, where the sites decide which rows of attention take the fused path.
    model = random_model(replace(FAMILIES[RICHEST], depth=1))
    stream = jnp.asarray(np.random.default_rng(0).normal(size=(1, 10, 32)), jnp.float32)
    neutral = {site: Edit(0.0, 5.0, 7.0, queries=queries)}
    assert_close(run_blocks(model, stream, neutral), run_blocks(model, stream, {}), 3e-6)


def only_recorded(tap, site, x):
    if site in tap.wanted:
        axis = 2 if site in ATTENTION_SITES else 1
        tap.trace[site] = x if tap.wanted[site] else jax.lax.slice_in_dim(x, 0, tap.prefix, axis=axis)
    return x


@pytest.mark.parametrize("record", [(), "pattern"])
def test_no_edits_cost_nothing(record, monkeypatch):
    model, images = abstract(FAMILIES["dinov2 with registers"]), jax.ShapeDtypeStruct((2, 24, 16, 3), jnp.float32)

    def text(*edits):
        jax.clear_caches()  # of the call inside, which is compiled by itself

        def forward(model, images):
            return model(images, *edits, record=record)

        return jax.jit(forward).lower(model, images).as_text()

    expected = text()
    assert text(None) == text({}) == text({"z": ()}) == expected
    assert text({"z": Edit(0.0)}) != expected
    # And it is that of a model without any code for edits.
    monkeypatch.setattr(Tap, "knockout_factor", lambda self, first, tokens: None)
    monkeypatch.setattr(Tap, "__call__", only_recorded)
    assert text({"z": Edit(1.0)}) == text() == expected
    assert "is_finite" not in expected


def test_recording_changes_no_output_of_a_run_with_edits(one, images):
    rng = np.random.default_rng(0)
    edits = everything(
        one, {(site, kind): randomly(rng, e, site) for site in SITES for kind, e in kinds(one, site, "tokens").items()}
    )
    assert_close(run(one, images, edits), run_all(one, images, edits), 1e-14)


def test_editing_an_image_leaves_the_others_as_they_were_bit_for_bit(exact, images):
    rng = np.random.default_rng(0)
    chosen = {(site, "tokens"): randomly(rng, kinds(exact, site, "tokens")["tokens"], site) for site in SITES}
    for edit in chosen.values():
        edit.mask[:, 1] = 0
    chosen["mlp_post", "relocate"] = Relocate(np.arange(BATCH).reshape(1, -1, 1, 1) == 0, np.ones((1, 1, 1, 1)))
    out, clean = run_all(exact, images, everything(exact, chosen)), run_all(exact, images, everything(exact))
    assert_same({site: a[:, 1] for site, a in out.trace.items()}, {site: a[:, 1] for site, a in clean.trace.items()})
    assert_same([a[1] for a in out[:4]], [a[1] for a in clean[:4]])
    assert (out.cls[0] != clean.cls[0]).all()


# --- what is edited


def assert_sites_become_what_their_edits_say(model, images, program):
    rng = np.random.default_rng(0)
    stream = run_all(model, images, everything(model, program=program)).trace["resid_pre"][0]
    every = {}
    for site in SITES:
        for kind, edit in kinds(model, site, program).items():
            chosen = {(site, kind): randomly(rng, edit, site)}
            every |= chosen
            edits = everything(model, chosen, program)
            out = run_all(model, images, edits)
            assert_close(out, numpy_run(model, stream, meaning(model, edits)))
    edits = everything(model, every, program)
    assert_close(run_all(model, images, edits), numpy_run(model, stream, meaning(model, edits)))


def test_every_site_becomes_what_its_edit_says_of_tokens(exact, images):
    assert_sites_become_what_their_edits_say(exact, images, "tokens")


def test_so_it_does_over_groups_with_axes_of_1_for_rows_of_the_prefix_and_several_in_order(exact, images):
    assert_sites_become_what_their_edits_say(exact, images, "mixed")


def test_an_edit_of_one_entry_changes_that_entry_and_what_comes_after(exact, images):
    rng, clean = np.random.default_rng(0), run_with(exact, images, {})
    for i, site in enumerate(SITES):
        mask = zeros(exact, site)
        entry = tuple(rng.integers(size) for size in mask.shape)
        mask[entry] = 1
        out = run_with(exact, images, {site: full_edit(mask, 2.0, 0.25)})
        at = out.trace[site][entry[0]]
        np.testing.assert_allclose(at[entry[1:]], 2 * clean.trace[site][entry] + 0.25, rtol=1e-15)
        expected = np.array(clean.trace[site][entry[0]])
        expected[entry[1:]] = at[entry[1:]]
        assert_same([at], [expected])
        before = list(SITES)[:i]
        assert_same(
            {s: out.trace[s][: entry[0] + 1] for s in before}, {s: clean.trace[s][: entry[0] + 1] for s in before}
        )
        image = entry[1]
        last = entry[0] == exact.config.depth - 1 and site in ("resid_post", "skip_mlp", "mlp_out")
        changed = out.tokens[image] != clean.tokens[image]
        assert changed.any() if last or site in ("q", "scores", "pattern") else changed.sum() > 1, site


def test_patching_a_run_with_its_own_activations_is_the_run(exact, images):
    clean = run_with(exact, images, {})
    for sites in [*((site,) for site in SITES), SITES]:
        out = run_with(exact, images, {site: full_edit(1.0, 0.0, clean.trace[site]) for site in sites})
        assert_same(out, clean)


def test_patching_all_of_a_layer_from_another_image_is_that_image_from_there(exact, images):
    clean = run_with(exact, images, {})
    for site, first in (("resid_post", 1), ("resid_pre", 0)):
        for layer in range(exact.config.depth):
            mask = zeros(exact, site)
            mask[layer] = 1
            out = run_with(exact, images, {site: full_edit(mask, 0.0, clean.trace[site][:, ::-1])})
            later = layer + first
            assert_close(
                {s: a[later:] for s, a in out.trace.items() if later < len(a)},
                {s: a[later:, ::-1] for s, a in clean.trace.items()},
            )
            assert_close(out[:4], [a[::-1] for a in clean[:4]])
            assert_same({s: a[:layer] for s, a in out.trace.items()}, {s: a[:layer] for s, a in clean.trace.items()})


def test_the_residual_stream_adds_up_under_edits_of_its_parts(exact, images):
    rng = np.random.default_rng(0)
    sites = [site for site in SITES if site not in ("resid_mid", "resid_post")]
    edits = {site: randomly(rng, kinds(exact, site, "tokens")["tokens"], site) for site in sites}
    t = run_with(exact, images, edits).trace
    assert_close(
        [t["resid_mid"], t["resid_post"]], [t["skip_attn"] + t["attn_out"], t["skip_mlp"] + t["mlp_out"]], 1e-15
    )


def test_zeroing_a_head_is_zeroing_its_rows_of_the_output_matrix(exact, images):
    params = to_params(exact)
    for head in range(exact.config.heads):
        mask = zeros(exact, "z")
        mask[:, :, :, head] = 1
        without = params["blocks.attn.proj.kernel"].at[:, head].set(0)
        cut = from_params(exact.config, params | {"blocks.attn.proj.kernel": without})
        expected = run_with(cut, images, {})
        out = run_with(exact, images, {"z": full_edit(mask)})
        assert_close(
            {"attn_out": out.trace["attn_out"]} | dict(enumerate(out[:4])),
            parts(expected) | dict(enumerate(expected[:4])),
        )


# --- attention


def cuts(model, seed=0):
    """A random mask over attention, with one whole row and one whole column in every head."""
    mask = np.random.default_rng(seed).choice([0.0, 1.0], size=zeros(model, "scores").shape)
    mask[:, :, :, 1], mask[..., 2] = 1, 1
    return mask


def test_a_knockout_is_zeroing_the_pattern_and_dividing_by_its_sum(exact, images):
    mask, stream = cuts(exact), run_with(exact, images, {}).trace["resid_pre"][0]

    def change(site, layer, x):
        if site == "pattern":
            x[mask[layer] == 1] = 0
            total = x.sum(-1, keepdims=True)
            np.divide(x, total, out=x, where=total != 0)

    out, expected = run_with(exact, images, {"scores": cut_off(mask)}), numpy_run(exact, stream, change)
    assert_close(out._replace(trace={site: a for site, a in out.trace.items() if site != "scores"}), expected)
    cut, clean = out.trace["scores"][0], run_with(exact, images, {}).trace["scores"][0]
    assert (cut[mask[0] == 1] == -np.inf).all()
    np.testing.assert_array_equal(cut[mask[0] == 0], clean[mask[0] == 0])
    # The same by way of the scores.
    lowest = run_with(exact, images, {"scores": full_edit(mask, 0.0, -np.inf)})
    assert_close({site: lowest.trace[site] for site in ("pattern", "z", "resid_post")} | {"cls": lowest.cls}, out)


def test_cutting_the_pattern_leaves_the_rest_of_a_row(exact, images):
    mask, stream = cuts(exact), run_with(exact, images, {}).trace["resid_pre"][0]

    def change(site, layer, x):
        if site == "pattern":
            x[mask[layer] == 1] = 0

    assert_close(run_with(exact, images, {"pattern": full_edit(mask)}), numpy_run(exact, stream, change))


def test_a_row_without_any_key_is_zeros(exact, images):
    rows, stream = zeros(exact, "scores"), run_with(exact, images, {}).trace["resid_pre"][0]
    rows[:, :, :, 2] = 1
    for edit, zeroed in (
        (cut_off(rows), 2),
        (full_edit(rows, 0.0, -np.inf), 2),
        (full_edit(rows, 1.0, -np.inf), 2),
        ((full_edit(rows, 0.0, -np.inf), cut_off(rows)), 2),
        (cut_off(1.0), slice(None)),
    ):

        def change(site, layer, x, zeroed=zeroed):
            if site == "pattern":
                x[:, :, zeroed] = 0

        out = run_with(exact, images, {"scores": edit})
        assert (out.trace["pattern"][:, :, :, zeroed] == 0).all() and (out.trace["z"][:, :, zeroed] == 0).all()
        trace = {site: a for site, a in out.trace.items() if site != "scores" and a.any()}
        assert_close(out._replace(trace=trace), numpy_run(exact, stream, change))


def test_removing_registers_by_their_columns_is_a_model_without_them(exact, images):
    c = exact.config
    if not c.registers:
        return
    params = to_params(exact)
    without = from_params(replace(c, registers=0), {name: a for name, a in params.items() if name != "registers"})
    mask = zeros(exact, "scores")
    mask[..., 1 : exact.prefix] = 1
    out, expected = run_with(exact, images, {"scores": cut_off(mask)}), run_plain(without, images)
    assert_close([out.cls, out.patches], [expected.cls, expected.patches])


@jax.jit
def softmax_with(scores, edit):
    rows, keys = scores.shape[2:]
    return softmax(scores, np.arange(rows), Tap({}, {"scores": (edit,)}, prefix=1).knockout_factor(0, keys))


@jax.jit
@partial(jax.grad, argnums=(0, 1))
def slopes_of_softmax(scores, edit):
    return (softmax_with(scores, edit) ** 2).sum()


def test_a_key_that_is_cut_may_be_far_above_the_others():
    # Were it subtracted as the largest, all other weights would underflow.
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 5, 5)), jnp.float32)
    mask = np.zeros((1, 1, 1, 5), np.float32)
    mask[..., 2] = 1
    others = np.delete(np.arange(5), 2)
    slopes = jax.grad(lambda rest: (jax.nn.softmax(rest, -1) ** 2).sum())(scores[..., others])
    for height in (-200.0, 0.0, 80.0, 200.0, 1e30):
        pattern = softmax_with(scores + height * mask, cut_off(mask))
        np.testing.assert_allclose(pattern[..., others], jax.nn.softmax(scores[..., others], -1), rtol=1e-6)
        assert (pattern[..., 2] == 0).all()
        by_scores, by_edit = slopes_of_softmax(scores + height * mask, cut_off(mask))
        np.testing.assert_allclose(by_scores, np.insert(slopes, 2, 0, axis=-1), atol=1e-6)
        assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(by_edit))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("m", [0.25, 0.5, 0.999])
def test_a_fraction_of_a_knockout_weakens_a_key(m):
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 5, 5)))
    mask = np.zeros((1, 1, 1, 5))
    mask[..., 2] = m
    expected = jax.nn.softmax(scores + np.log(1 - mask), axis=-1)
    np.testing.assert_allclose(softmax_with(scores, cut_off(mask)), expected, rtol=1e-13)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("height", [-5.0, 0.0, 5.0, 50.0])
def test_the_gradient_of_the_mask_is_right_where_a_key_is_cut(height):
    rng = np.random.default_rng(0)
    scores, v = jnp.asarray(rng.normal(size=(1, 1, 2, 5))), rng.normal(size=(1, 1, 2, 5))
    scores = scores.at[..., 2].add(height)

    @jax.jit
    def value(m):
        return (softmax_with(scores, cut_off(m * np.eye(5)[None, None, 2:3])) * v).sum()

    # d/dm of ((1 - m) w a + sum of the others) / ((1 - m) w + their sum), at m = 1.
    w = np.exp(np.asarray(scores))
    rest = np.delete(np.arange(5), 2)
    total, mean = w[..., rest].sum(-1), (w * v)[..., rest].sum(-1) / w[..., rest].sum(-1)
    np.testing.assert_allclose(jax.grad(value)(1.0), (w[..., 2] / total * (mean - v[..., 2])).sum(), rtol=1e-12)


# --- edits are data


def test_other_values_compile_nothing(one, images):
    traces = []

    @jax.jit
    def forward(model, images, edits):
        traces.append(1)
        return model(images, edits).cls

    rng = np.random.default_rng(0)
    blank = kinds(one, "resid_post", "tokens")["tokens"]
    results = []
    for convert in (np.asarray, jnp.asarray):
        for _ in range(3):
            edit = jax.tree.map(convert, randomly(rng, blank, "resid_post"))
            results.append(forward(one, images, {"resid_post": edit}))
    assert len(traces) == 1
    assert all((a != b).any() for a, b in pairwise(results))


def test_the_program_does_not_grow_with_depth():
    def lines(depth):
        model = abstract(ViTConfig(**TINY | dict(depth=depth), registers=3))
        edits = {site: tuple(kinds(model, site, "groups").values()) for site in SITES}
        images = jax.ShapeDtypeStruct((BATCH, HEIGHT, WIDTH, 3), jnp.float32)
        return jax.jit(lambda *args: ViT.__call__(*args)).lower(model, images, edits).as_text().count("\n")

    assert lines(2) == lines(40)


SOME = ("scores", "z", "resid_post")


def some_edits(model, seed=0, sites=SOME):
    rng = np.random.default_rng(seed)
    return {site: randomly(rng, group_edit(model, site), site) for site in sites}


def group_edit(model, site):
    """One edit over groups that changes nothing; at the scores a knock-out."""
    return kinds(model, site, "groups")["knockout" if site == "scores" else "groups"]


def stacked(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def test_vmap_over_edits_is_a_loop(one, images):
    edits = some_edits(one)
    masks = [{site: edit.mask for site, edit in some_edits(one, seed).items()} for seed in range(3)]

    def masked(masks):  # the values, which are large, are shared
        return run(one, images, {site: replace(edits[site], mask=mask) for site, mask in masks.items()})[:4]

    assert_close(jax.jit(jax.vmap(masked))(stacked(*masks)), stacked(*map(masked, masks)))


def test_vmap_over_models_is_a_loop(one, images):
    models = [one, double(FAMILIES[RICHEST], seed=1)]
    edits = some_edits(one)
    out = jax.jit(jax.vmap(run, in_axes=(0, None, None)))(stacked(*models), images, edits)
    assert_close(out, stacked(*(run(model, images, edits) for model in models)))


def test_a_run_from_a_layer_is_the_run(one, images):
    traces, depth = [], one.config.depth
    from_number = jax.jit(ViT.run_from, static_argnames="layer")

    @jax.jit
    def from_traced(model, layer, stream, edits):
        traces.append(1)
        return model.run_from(layer, stream, edits)

    edits, clean = some_edits(one), run_plain(one, images)
    for layer, stream in enumerate([*clean.trace["resid_pre"], clean.tokens]):
        later = {}
        for site, edit in edits.items():
            runs = (np.arange(depth) >= layer).reshape(-1, *[1] * (edit.mask.ndim - 1))
            later[site] = replace(edit, mask=edit.mask * runs)
        expected = run(one, images, later)
        # What stands in layers that do not run has no effect.
        for each in (later, edits):
            assert_close(from_traced(one, jnp.asarray(layer), stream, each), expected)
        if layer in (1, depth):
            assert_close(from_number(one, layer, stream, edits), expected)
    assert len(traces) == 1


def loss(model, images, edits):
    out = model(images, edits)
    return (out.cls**3).mean() + (out.patches**3).mean()  # squares hardly depend on what comes before a LayerNorm


slopes, level = jax.jit(jax.grad(loss, argnums=(1, 2))), jax.jit(loss)


def directional(model, images, edits, d_images, d_edits, h=2e-5):
    """The finite difference of the loss along a direction, to fourth order."""

    def along(step):
        return level(model, images + step * d_images, jax.tree.map(lambda a, d: a + step * d, edits, d_edits))

    return (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)


def inner(a, b):
    return sum((x * y).sum() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


SMOOTH = ("scores", "pattern", "z", "mlp_post", "resid_post")


def one_each(model):
    return {site: group_edit(model, site) for site in SMOOTH}


@pytest.mark.parametrize("at", ["mask 0", "any mask"])
def test_gradients_equal_finite_differences(one, images, at):
    rng, blank = np.random.default_rng(0), one_each(one)
    edits = {site: randomly(rng, edit, site) for site, edit in blank.items()}
    names = ("mask", "scale", "shift")
    if at == "mask 0":
        edits, names = {site: replace(edit, mask=np.zeros_like(edit.mask)) for site, edit in edits.items()}, ("mask",)
    else:  # fractions: a finite step from 1 would go beyond what a knock-out can cut
        edits["scores"] = replace(edits["scores"], mask=edits["scores"].mask * 0.7)
    by_image, by_edit = slopes(one, images, edits)
    still = np.zeros(images.shape)
    for site in SMOOTH:
        of_site = [name for name in names if hasattr(blank[site], name)]
        direction = {name: rng.normal(size=getattr(blank[site], name).shape) for name in of_site}
        direction = blank | {site: replace(blank[site], **direction)}
        slope = inner(by_edit, direction)
        assert abs(slope) > 1e-4, site
        np.testing.assert_allclose(slope, directional(one, images, edits, still, direction), rtol=1e-7, err_msg=site)
    step = rng.normal(size=images.shape)
    np.testing.assert_allclose((by_image * step).sum(), directional(one, images, edits, step, blank), rtol=1e-7)


def test_gradients_are_finite_through_rows_without_any_key(one, images):
    blank = one_each(one)
    shape = blank["scores"].mask.shape
    for rows in (np.ones(shape), np.broadcast_to(np.eye(shape[-1])[1][:, None], shape)):
        gradients = slopes(one, images, blank | {"scores": replace(blank["scores"], mask=rows)})
        assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(gradients))
        assert (gradients[0] != 0).any()


# --- NaN and infinity


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_outside_of_the_mask_does_not_matter(exact, images, value):
    rng, edits = np.random.default_rng(0), {}
    for site in SITES:
        edit = randomly(rng, kinds(exact, site, "tokens")["tokens"], site)
        edits[site] = edit
    finite = run_with(exact, images, edits)
    bad = {
        s: replace(e, **{f: np.where(e.mask == 0, value, getattr(e, f)) for f in ("scale", "shift")})
        for s, e in edits.items()
    }
    assert_same(run_with(exact, images, bad), finite)


@pytest.mark.parametrize("site", SITES)
def test_what_is_not_finite_inside_of_the_mask_stays_in_its_image(one, images, site):
    mask = zeros(one, site)
    mask[1, 0] = 1
    out, clean = run_with(one, images, {site: full_edit(mask, 1.0, np.nan)}), run_with(one, images, {})
    assert jnp.isnan(out.cls[0]).all() or site in ("skip_mlp", "mlp_out")
    assert jnp.isnan(out.trace[site][1, 0]).any()
    assert_same([a[1] for a in out[:4]], [a[1] for a in clean[:4]])
    assert_same({s: a[:, 1] for s, a in out.trace.items()}, {s: a[:, 1] for s, a in clean.trace.items()})


@pytest.mark.parametrize(
    ("origin", "site"),
    [
        ("q", "scores"),
        ("k", "pattern"),
        ("scores", "pattern"),
        ("v", "z"),
        ("z", "attn_out"),
        ("attn_out", "resid_mid"),
        ("skip_attn", "resid_mid"),
        ("mlp_pre", "mlp_post"),
        ("mlp_post", "mlp_out"),
        ("mlp_out", "resid_post"),
        ("skip_mlp", "resid_post"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_activation_that_is_not_finite_is_gone_once_it_is_replaced(one, images, origin, site, value):
    clean = run_with(one, images, {})
    broken = full_edit(1.0, 1.0, value)
    out = run_with(one, images, {origin: broken, site: full_edit(1.0, 0.0, clean.trace[site])})
    assert not jnp.isfinite(out.trace[origin]).any()
    assert_same([out.trace[site], out.cls, out.tokens], [clean.trace[site], clean.cls, clean.tokens])
    erased = run_with(one, images, {origin: broken, site: full_edit(1.0)})
    assert_same(erased.cls, run_with(one, images, {site: full_edit(1.0)}).cls)


# --- precision


def test_edits_keep_the_type_of_the_model(images):
    model, edits, outputs = random_model(FAMILIES[RICHEST]), some_edits(double(FAMILIES[RICHEST])), {}
    single = jnp.asarray(np.asarray(images), jnp.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        outputs[dtype] = out = run(jaxvit.cast(model, dtype), single, edits)
        assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {np.dtype(dtype)}
    assert_close(outputs[jnp.bfloat16], outputs[jnp.float32], 0.05)


def test_rows_of_the_prefix_are_edited_where_the_others_take_the_fused_path(images):
    model, rng = random_model(FAMILIES[RICHEST]), np.random.default_rng(0)
    edits = {"pattern": randomly(rng, kinds(model, "pattern", "mixed")["prefix groups"], "pattern")}
    out = run(model, jnp.asarray(np.asarray(images), jnp.float32), edits)
    with jax.enable_x64(True):
        assert_close(out, run(double(FAMILIES[RICHEST]), images, edits), 1e-5)


# --- several edits


def layers_mask(*layers):
    mask = np.zeros((3, 1, 1, 1))
    mask[list(layers)] = 1
    return mask


def test_merging_keeps_every_edit():
    a, b, c = Edit(layers_mask(0)), Edit(layers_mask(1)), Edit(layers_mask(2), 2.0)
    assert merge() == {}
    assert merge({"resid_pre": a}) == {"resid_pre": a}
    assert merge({"resid_pre": a}, {"mlp_out": b}) == {"resid_pre": a, "mlp_out": b}
    assert merge({"resid_pre": a}, {"resid_pre": b}, {"resid_pre": c}) == {"resid_pre": (a, b, c)}
    assert merge({"resid_pre": (a, b)}, {"resid_pre": c, "v": ()}) == {"resid_pre": (a, b, c)}


def test_edits_that_meet_are_merged_in_order_or_not_at_all(one, images):
    a, b = Edit(layers_mask(0, 1), 0.0, 1.5), Edit(layers_mask(1, 2), 2.0)
    with pytest.raises(
        ValueError, match=r"two edits at 'resid_mid' change the same values in layers \[1\]: .*in_order"
    ):
        merge({"resid_mid": a}, {"resid_mid": b})
    with pytest.raises(ValueError, match="at 'resid_mid' change the same values: "):
        merge({"resid_mid": Edit(0.5)}, {"resid_mid": Edit(0.5)})
    edits = merge({"resid_mid": a}, {"resid_mid": b}, in_order=True)
    out = run(one, images, edits)

    def change(site, layer, x):
        if site == "resid_mid":
            x[...] = [1.5, 3.0, 2.0][layer] * (x if layer == 2 else 1)

    stream = run_plain(one, images).trace["resid_pre"][0]
    assert_close(out, numpy_run(one, stream, change))


def test_one_of_several_is_that_one(one, images):
    choices = [{"z": Edit(1.0)}, {"z": Edit(0.5, 2.0), "mlp_out": Edit(1.0)}, {"resid_mid": Edit(1.0, 1.0, 0.5)}]
    chosen = jax.jit(lambda i: run(one, images, one_of(i, *choices)))
    stream = run_plain(one, images).trace["resid_pre"][0]
    for i, edits in enumerate([*choices, {}]):
        assert_close(chosen(i), numpy_run(one, stream, meaning(one, edits)))
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=f"there is no choice {wrong}: they are 0 to 2"):
            one_of(wrong, *choices)


def attention_mask(over, rows=None, columns=None):
    layout = jaxvit.TokenLayout(3, (6, 4))
    size = layout.tokens if over == "tokens" else layout.prefix + 1
    mask = np.ones((1, 1, 1, 1, 1))
    for axis, chosen in ((3, rows), (4, columns)):
        if chosen is not None:
            along = np.isin(np.arange(size), chosen).astype(float)
            mask = mask * np.expand_dims(along, [i for i in range(5) if i != axis])
    return mask


@pytest.mark.parametrize(
    ("a", "b", "meet"),
    [
        # Groups 0 to 4, [CLS], three registers and patches; tokens 0 to 27, of which 4 .. are patches.
        (Edit(attention_mask("groups", [0])), Edit(attention_mask("groups", [1, 2])), False),
        (Edit(attention_mask("groups", [0])), Edit(attention_mask("groups", [0])), True),
        (Edit(attention_mask("groups", [0])), Edit(attention_mask("groups", None, [3])), True),
        (Edit(attention_mask("groups", [4])), Edit(attention_mask("tokens", [7]), mask_over="tokens"), True),
        (Edit(attention_mask("groups", [3])), Edit(attention_mask("tokens", [7]), mask_over="tokens"), False),
        (Edit(attention_mask("tokens", [8]), mask_over="tokens"), Edit(attention_mask("groups", [3, 4])), True),
        (
            Edit(attention_mask("tokens", [8]), mask_over="tokens"),
            Edit(attention_mask("tokens", [9]), mask_over="tokens"),
            False,
        ),
        # Rows of patches are not reached by an edit of the prefix.
        (Edit(attention_mask("groups"), queries="prefix"), Edit(attention_mask("groups", [4])), False),
        (Edit(attention_mask("groups", [0, 4]), queries="prefix"), Edit(attention_mask("groups", [4])), False),
        (
            Edit(attention_mask("groups", [0, 4]), queries="prefix"),
            Edit(attention_mask("tokens", [9]), mask_over="tokens"),
            False,
        ),
        (Edit(attention_mask("groups"), queries="prefix"), Edit(attention_mask("groups", [3])), True),
        (
            Edit(attention_mask("tokens", [1])[:, :, :, :4], mask_over="tokens", queries="prefix"),
            Edit(attention_mask("tokens", [9]), mask_over="tokens"),
            False,
        ),
        (
            Edit(attention_mask("tokens", [1])[:, :, :, :4], mask_over="tokens", queries="prefix"),
            Edit(attention_mask("tokens", [1]), mask_over="tokens"),
            True,
        ),
        (
            Edit(attention_mask("tokens", [1])[:, :, :, :4], mask_over="tokens", queries="prefix"),
            Edit(attention_mask("groups", [1, 4])),
            True,
        ),
        (
            Edit(attention_mask("tokens", [1])[:, :, :, :4], mask_over="tokens", queries="prefix"),
            Edit(attention_mask("groups", [2, 4])),
            False,
        ),
        (Edit(0.0), Edit(attention_mask("groups", [0])), False),
        (Edit(1.0), Edit(attention_mask("groups", [0])), True),
        (Edit(jnp.asarray(attention_mask("groups", [0]))), Edit(attention_mask("groups", [0]) > 0), True),
    ],
)
def test_edits_meet_where_they_change_the_same_entry(a, b, meet):
    for pair in ((a, b), (b, a)):
        if not meet:
            assert merge(*({"pattern": edit} for edit in pair))["pattern"] == pair
            continue
        with pytest.raises(
            ValueError, match="two edits at 'pattern' change the same values: remove one, or give in_order"
        ):
            merge(*({"pattern": edit} for edit in pair))


def test_whether_traced_masks_meet_cannot_be_seen():
    a, b = {"q": Edit(np.zeros((1, 1, 1, 1, 1)))}, {"q": Edit(np.ones((1, 1, 1, 1, 1)))}
    assert jax.eval_shape(lambda: merge(a, b)["q"][0].mask).shape == (1, 1, 1, 1, 1)  # known inside of jit too
    with pytest.raises(ValueError, match="two edits at 'q' have traced masks.*in_order=True"):
        jax.eval_shape(merge, a, b)
    assert len(jax.eval_shape(partial(merge, in_order=True), a, b)["q"]) == 2


def test_masks_that_fit_no_site_are_not_merged():
    with pytest.raises(
        ValueError, match=r"two edits at 'z' have masks of shapes \[3, 1, 5, 1, 1\] and \[3, 1, 4, 1, 1\]"
    ):
        merge({"z": Edit(np.ones((3, 1, 5, 1, 1)))}, {"z": Edit(np.ones((3, 1, 4, 1, 1)))})


# --- errors


def refusal(edits, config=FAMILIES["dinov2 with registers"]):
    with pytest.raises(ValueError) as caught:
        images = jax.ShapeDtypeStruct((BATCH, HEIGHT, WIDTH, 3), jnp.float32)
        jax.eval_shape(lambda model, images: model(images, edits), abstract(config), images)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ({"patern": Edit(1.0), "zz": Edit(1.0)}, ["no site 'patern', 'zz'", *SITES]),
        (
            {"z": Edit(np.ones((3, 2, 4, 4, 1)))},
            ["mask of the Edit at 'z'", "[3, 2, 4, 4, 1]", "[3, 2, 5, 4, 8]", "L B T H d", "5 groups", "may be 1"],
        ),
        ({"z": Edit(np.ones((3, 1, 28, 1, 1)))}, ["one for each of 5 groups"]),
        ({"z": Edit(np.ones((3, 1, 5, 1, 1)), mask_over="tokens")}, ["[3, 2, 28, 4, 8]", "one for each token"]),
        ({"q": Edit(np.ones(3))}, ["mask of the Edit at 'q'", "[3]"]),
        ({"q": Edit(1.0, np.ones((2, 1, 1, 1, 1)))}, ["scale of the Edit at 'q'", "[2, 1, 1, 1, 1]"]),
        ({"v": Edit(1.0, shift=np.ones((1, 1, 28, 1, 1)))}, ["shift of the Edit at 'v'", "[1, 1, 28, 1, 1]"]),
        ({"pattern": Edit(np.ones((1, 1, 1, 28, 1)), mask_over="tokens", queries="prefix")}, ["[3, 2, 4, 4, 28]"]),
        ({"pattern": Edit(np.ones((1, 1, 1, 4, 1)), mask_over="tokens")}, ["[3, 2, 4, 28, 28]", "L B H Q T"]),
        ({"mlp_pre": (Edit(1.0), Edit(1.0, np.ones((1, 1, 1, 49))))}, ["scale", "'mlp_pre'", "[3, 2, 5, 48]"]),
        ({"q": Edit(np.ones(3)), "k": Edit(np.ones(4))}, ["'q'", "'k'", "; "]),
        ({"v": Edit(1.0, 0.0, np.nan)}, ["shift of the Edit at 'v' holds NaN or infinity"]),
        ({"v": Edit(1.0, 0.0, -np.inf)}, ["shift of the Edit at 'v' holds NaN or infinity"]),
        ({"v": Edit(np.full((1, 1, 1, 1, 1), np.nan))}, ["mask of the Edit at 'v' holds NaN"]),
        ({"v": Edit(1.0, jnp.asarray(np.inf, jnp.bfloat16))}, ["scale of the Edit at 'v' holds"]),
        ({"scores": Edit(1.0, 0.0, np.inf)}, ["shift of the Edit at 'scores' holds"]),
        ({"scores": Edit(1.0, -np.inf)}, ["scale of the Edit at 'scores' holds"]),
        ({"z": Edit([1.0, 2.0])}, ["mask of the Edit at 'z' is of type list; expected an array or a number"]),
        ({"z": Edit(None)}, ["mask of the Edit at 'z' is of type NoneType"]),
        (
            {"z": Shuffle(1.0, np.array([[0, 1]]) + 0.5)},
            ["the Shuffle at 'z'", "an order of float", "expected integers"],
        ),
        ({"z": Shuffle(1.0, np.array([[0, 2]]))}, ["the Shuffle at 'z'", "image 2", "0 to 1"]),
        ({"z": Shuffle(1.0, np.array([[0, -1]]))}, ["image -1", "0 to 1"]),
        ({"z": Shuffle(1.0, np.array([0, 1, 1]))}, ["order of the Shuffle at 'z'", "[3]", "[3, 2]", "L B"]),
        ({"pattern": Relocate(1.0, 1.0)}, ["the Relocate at 'pattern'", "between tokens"]),
        ({"mlp_post": Relocate(1.0, np.ones((3, 1, 28, 1)))}, ["to of the Relocate", "5 groups"]),
    ],
)
def test_wrong_edits_are_described(edits, words):
    message = refusal(edits)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ("z", "edits is 'z'; expected a mapping of sites to edits"),
        (["z"], "edits is of type list; expected a mapping"),
        (Edit(np.ones((3, 1, 1, 1, 1))), "edits is of type Edit; expected a mapping"),
        ({"z": None}, "the edits at 'z' are neither an Edit nor a sequence"),
        ({"z": (Edit(1.0), 3.0), "q": "z"}, "the edits at 'z', 'q' are neither an Edit nor a sequence"),
    ],
)
def test_what_is_no_edit_is_refused(edits, words):
    plain = getattr(
        normalise_edits, "__wrapped__", normalise_edits
    )  # without the run-time types, which would speak first
    with pytest.raises(ValueError, match=words):
        plain(edits)


@pytest.mark.parametrize("field", ["mask_over", "value_over", "queries"])
def test_words_that_an_edit_does_not_know_are_refused(field):
    edit = object.__new__(Edit)  # past the run-time types of its constructor, which would speak first
    for name, value in dict(mask_over="groups", value_over="tokens", queries="all").items():
        object.__setattr__(edit, name, value)
    Operation.__post_init__(edit)
    object.__setattr__(edit, field, "token")
    with pytest.raises(ValueError, match=f"{field} is 'token'; expected '(groups' or 'tokens|prefix' or 'all)'"):
        Operation.__post_init__(edit)


def test_minus_infinity_is_a_score():
    assert refusal({"scores": Edit(1.0, 0.0, -np.inf), "v": Edit(1.0, np.nan)}).count("holds") == 1
