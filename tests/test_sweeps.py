"""A sweep is a Python loop over its points, in one compiled program; attribution is its derivative.

In float64, so that the two ways to one number agree to rounding.
"""

import itertools
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, random_images, random_model

import jaxvit
from jaxvit import (
    ActivationStats,
    Batch,
    Edit,
    Grid,
    Knockout,
    Registers,
    Shuffle,
    Take,
    TokenIndices,
    attribute,
    grids,
    sweep,
)
from jaxvit.interventions import sweeps
from jaxvit.interventions.constructors import (
    ablate,
    amplify,
    knockout,
    patch,
    replace_by_mean,
    replace_by_noise,
    replace_by_shuffle,
    steer,
    zero_attention,
)
from jaxvit.io.progress import bar, track
from jaxvit.model.params import from_params, to_params

HEIGHT, WIDTH, BATCH = 8, 8, 3  # 2 x 2 patches
ORDER = np.array([1, 2, 0])
SITE = "resid_post"
LAYERS = 3

run = jax.jit(lambda model, images, edits=None: model(images, edits))
recorded = jax.jit(lambda model, images, edits=None: model(images, edits, record={"pattern": Take(layers=-1)}))


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def one(float64):
    """A model of the family that has everything."""
    return jaxvit.cast(random_model(FAMILIES["dinov2 with registers"]), jnp.float64)


@pytest.fixture(scope="module")
def images(float64):
    return jnp.asarray(random_images(0, BATCH, HEIGHT, WIDTH), jnp.float64)


@pytest.fixture(scope="module")
def layout(one):
    return one.config.layout(HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def clean(one, images):
    return jax.jit(lambda m, x: m(x, record={site: Take(tokens="all") for site in (SITE, "z", "pattern")}))(one, images)


def assert_close(actual, expected, rtol=1e-12):
    """Within `rtol` of the largest expected value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == np.float64
    assert np.abs(expected).max() > 1e-6
    assert np.abs(actual - expected).max() <= rtol * np.abs(expected).max()


def summary(out, clean=None):
    """A number about each image that every token has a part in, and that is linear in none."""
    tokens = jnp.concatenate([out.cls[:, None], out.registers, out.patches], axis=1)
    weights = jnp.asarray(np.random.default_rng(5).normal(size=tokens.shape[1:]) / tokens[0].size ** 0.5)
    return jnp.tanh((jnp.sin(tokens) * weights[None]).sum((1, 2)))


def loop(model, images, edits_of, grid, metric=summary, call=run):
    """The metric at every point: a run of the model each, with edits that are made of labels."""
    values = [metric(call(model, images, edits_of(*labels))) for labels in itertools.product(*grid.axes.values())]
    return np.reshape(values, (*grid.shape, *np.shape(values[0])))


# --- a sweep is a loop


def of_heads(model, layout, stats, clean):
    def traced(point, clean):
        return ablate(model, "z", layers=point["layer"], heads=point["head"])

    return grids.heads(model), traced, lambda layer, head: ablate(model, "z", layers=layer, heads=head)


def of_groups(model, layout, stats, clean):
    def traced(point, clean):
        return ablate(model, "mlp_out", layers=point["layer"], tokens=point["group"])

    return (
        grids.layers_by_groups(model),
        traced,
        lambda layer, group: ablate(model, "mlp_out", layers=layer, tokens=group),
    )


def of_edges(model, layout, stats, clean):
    def traced(point, clean):
        return knockout(model, layers=point["layer"], query=point["query"], key=point["key"])

    return grids.group_edges(model), traced, lambda l, query, key: knockout(model, layers=l, query=query, key=key)


def of_prefix_edges(model, layout, stats, clean):
    def traced(point, clean):
        where = dict(layers=point["layer"], query=point["query"], key=point["key"], queries="prefix")
        return zero_attention(model, **where)

    grid = grids.group_edges(model, queries="prefix")
    return grid, traced, lambda l, query, key: zero_attention(model, layers=l, query=query, key=key)


def of_tokens(model, layout, stats, clean):
    def edit(place):
        return steer(model, SITE, jnp.arange(32.0), layers=1, tokens=TokenIndices(place, layout))

    return grids.tokens(model, layout), lambda point, clean: edit(point["token"]), edit


def of_registers(model, layout, stats, clean):
    def traced(point, clean):
        return ablate(model, "v", layers=point["layer"], tokens=Registers(point["register"]))

    return grids.registers(model), traced, lambda l, r: ablate(model, "v", layers=l, tokens=f"register {r}")


def of_strengths(model, layout, stats, clean):
    """Numbers that float32 does not hold."""
    grid = Grid(strength=(-0.1, 0.3, 1, 2.7), layer=(0, -1), branch={"attn": 0, "mlp": 1})

    def traced(point, clean):
        factors = jnp.where(jnp.arange(2) == point["branch"], point["strength"], 1)
        attn, mlp = (
            amplify(model, f"{name}_out", f, layers=point["layer"])
            for name, f in zip(("attn", "mlp"), factors, strict=True)
        )
        return attn | mlp

    return grid, traced, lambda strength, l, branch: amplify(model, f"{branch}_out", strength, layers=l)


def of_controls(model, layout, stats, clean):
    """What is put in place is chosen by the number of the point; the loop calls each control by its name."""
    rng = jax.random.key(3)
    grid = Grid(layer=range(LAYERS), group=grids.groups(model), control=("zero", "mean", "noise", "shuffle"))

    def traced(point, clean):
        donors = clean.trace[SITE]
        values = [jnp.zeros((1, 1, 1, 1)), stats.mean(SITE)[:, :, layout.groups], stats.noise(SITE, rng, BATCH, layout)]
        values = jnp.stack([jnp.broadcast_to(v, donors.shape) for v in values])
        values = jnp.concatenate([values, donors[None, :, ORDER]])
        return patch(model, SITE, values[point["control"]], layers=point["layer"], tokens=point["group"])

    def plain(layer, group, control):
        where = dict(layers=layer, tokens=group)
        return {
            "zero": lambda: ablate(model, SITE, **where),
            "mean": lambda: replace_by_mean(model, SITE, stats, **where),
            "noise": lambda: replace_by_noise(model, SITE, stats, rng, BATCH, layout, **where),
            "shuffle": lambda: replace_by_shuffle(model, SITE, ORDER, clean.trace[SITE], **where),
        }[control]()

    return grid, traced, plain


CASES = [of_heads, of_groups, of_edges, of_prefix_edges, of_tokens, of_registers, of_strengths, of_controls]


@pytest.fixture(scope="module")
def stats(one):
    return ActivationStats.collect(one, random_images(7, 4, HEIGHT, WIDTH).astype(jnp.float64), SITE, progress=False)


@pytest.mark.parametrize("case", CASES)
def test_a_sweep_is_a_loop_over_its_points(case, one, images, layout, stats, clean):
    grid, traced, plain = case(one, layout, stats, clean)
    effect = sweep(one, images, traced, grid, summary, batch_size=7, record_clean=SITE, progress=False)
    expected = loop(one, images, plain, grid)
    assert_close(effect, expected)
    assert dict(effect.axes) == {**grid.axes, "image": (0, 1, 2)} and effect.name == "summary"
    # Were all points the same, any order of them would do.
    assert len(np.unique(expected.reshape(len(grid), -1).round(12), axis=0)) > len(grid) * 0.7


@pytest.fixture(scope="module")
def heads(one, images, layout, stats, clean):
    """The grid of heads, its edits, and the loop over it."""
    grid, traced, plain = of_heads(one, layout, stats, clean)
    return grid, traced, loop(one, images, plain, grid)


def test_points_may_run_one_by_one(one, images, heads):
    grid, traced, expected = heads
    assert_close(sweep(one, images, traced, grid, summary, batch_size=1, progress=False), expected)


def test_streams_are_one_array_in_parts(one, images, heads):
    """The last batch repeats its last image, which does not count; the image at place 1 was unreadable."""
    grid, traced, expected = heads
    streamed = sweep(one, iter(stream_of(images)), traced, grid, summary, batch_size=5, progress=False)
    assert_close(streamed, expected)
    assert streamed.axes["image"] == (0, 2, 3)


def stream_of(images):
    return [
        Batch(images[:2], np.array([True, True]), np.array([0, 2]), names=("a", "c")),
        Batch(images[jnp.array([2, 2])], np.array([True, False]), np.array([3, 3]), names=("d", "d")),
    ]


def test_batches_of_one_size_are_one_program(one, images, heads, capsys):
    grid, traced, expected = heads
    count = []

    def metric(out, clean):
        count.append(1)
        return summary(out)

    parts = [images[:1], np.asarray(images[1:2]), images[2:]]
    assert_close(sweep(one, parts, traced, grid, metric, progress=False), expected)
    assert len(count) == 2  # traced to tell programs apart, and to compile
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("places", "labels"), [([[7, 2], [5]], (7, 2, 5)), ([[0, 1], [0]], (0, 1, 2)), ([None], (0, 1, 2))]
)
def test_images_have_the_places_of_their_stream_unless_two_have_the_same(places, labels):
    given = [None if p is None else np.array(p) for p in places]
    assert sweeps._named(Grid(layer=(4,)), np.zeros((1, 3)), given, summary).axes["image"] == labels


def test_metrics_may_have_axes_and_names(one, images, layout, stats, clean):
    grid, traced, plain = of_heads(one, layout, stats, clean)

    def lengths(out, clean=None):
        return jnp.linalg.norm(out.registers, axis=-1)

    def several(out, clean=None):
        return {"lengths": lengths(out), "first": out.cls[:, :3]}

    effect = sweep(one, images, traced, grid, several, batch_size=5, progress=False)
    assert list(effect.axes) == ["layer", "head", "image", "metric", "several 0"]
    assert set(effect.axes["metric"]) == {"lengths", "first"} and effect.name == "value"
    expected = loop(one, images, plain, grid, lengths)
    assert expected.shape == (3, 4, 3, 3)
    assert_close(effect.select(metric="lengths"), expected)
    assert_close(effect.select(metric="first"), loop(one, images, plain, grid, lambda out: out.cls[:, :3]))


def test_the_default_metric_is_the_cosine_of_cls_with_that_of_the_clean_run(one, images, layout, stats, clean):
    grid, traced, plain = of_heads(one, layout, stats, clean)

    def cosine(out):
        a, b = np.asarray(out.cls), np.asarray(clean.cls)
        return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    effect = sweep(one, images, traced, grid, progress=False)
    assert effect.name == "cls cosine"
    assert_close(effect, loop(one, images, plain, grid, cosine))


def test_metrics_read_what_was_recorded_of_the_edited_run_and_edits_what_was_of_the_clean_one(one, images, clean):
    """A head's output is replaced by that of the next head in the clean run."""
    grid = Grid(layer=(1, -1), head=range(4))

    def edits(point, clean):
        return patch(one, "z", jnp.roll(clean.trace["z"], 1, axis=3), layers=point["layer"], heads=point["head"])

    def mass(out, clean=None):
        return out.trace["pattern"][0, :, :, 0, 1:4].sum(-1)

    record = dict(record_clean=("z",), record={"pattern": Take(layers=(-1,))})
    effect = sweep(one, images, edits, grid, mass, batch_size=3, progress=False, **record)
    given = np.roll(clean.trace["z"], 1, axis=3)
    expected = loop(one, images, lambda l, h: patch(one, "z", given, layers=l, heads=h), grid, mass, recorded)
    assert_close(effect, expected)
    # Heads of the last layer do not change that layer's attention.
    np.testing.assert_array_equal(
        effect.select(layer=-1).values, effect.select(layer=-1, head=0).values[None].repeat(4, 0)
    )
    assert_close(effect.select(layer=-1, head=0), mass(recorded(one, images)))


# --- the shared prefix


class Spy:
    """The programs of a sweep, with what is seen of every call of `run`."""

    def __init__(self, monkeypatch, spoil=False):
        self.starts, self.points, self.live, self.programs = [], [], [], []
        of = sweeps._sweep_programs

        def spied(*args):
            programs = of(*args)
            self.programs.append(programs)

            def call(model, images, clean, points, start):
                self.arguments = model, images, clean, points, start
                self.starts.append(int(start))
                self.points.append({axis: np.asarray(numbers) for axis, numbers in points.items()})
                self.live.append(sum(array.nbytes for array in jax.live_arrays()))
                return programs.run(spoiled(model, start) if spoil else model, images, clean, points, start)

            return programs._replace(run=call)

        monkeypatch.setattr(sweeps, "_sweep_programs", spied)


def spoiled(model, start):
    """The model with NaN for all weights of the blocks before `start`."""
    return from_params(
        model.config,
        {
            name: leaf.at[:start].set(jnp.nan) if name.startswith("blocks.") else leaf
            for name, leaf in to_params(model).items()
        },
    )


def test_points_run_from_their_first_edited_layer(monkeypatch, one, images, layout, stats, clean):
    _, traced, plain = of_heads(one, layout, stats, clean)
    spy = Spy(monkeypatch, spoil=True)
    grid = Grid(head=range(4), layer=(2, 0, 1))  # neighbours in the grid differ in their layer
    effect = sweep(one, images, traced, grid, summary, batch_size=4, progress=False)
    assert spy.starts == [0, 1, 2]
    assert_close(effect, loop(one, images, lambda head, layer: plain(layer, head), grid))
    # A chunk of several layers starts at the first of them.
    sweep(one, images, traced, grid, summary, batch_size=7, progress=False)
    assert spy.starts[3:] == [0, 1]


def nothing(point, clean):
    return {}


def test_points_that_edit_nothing_are_the_clean_run(monkeypatch, one, images, clean):
    spy = Spy(monkeypatch, spoil=True)

    def edits(point, clean):
        return {"z": Edit(ablate(one, "z", layers=1)["z"].mask * point["strength"])}

    effect = sweep(one, images, edits, Grid(strength=(0, 1.0)), summary, batch_size=1, progress=False)
    assert spy.starts == [1, 2]
    assert_close(effect.select(strength=0), summary(run(one, images)))
    assert_close(effect.select(strength=1.0), summary(run(one, images, ablate(one, "z", layers=1))))
    # Two points are no reason to run 64.
    same = sweep(one, images, nothing, Grid(layer=range(2)), summary, batch_size=64, progress=False)
    assert_close(same, np.stack([summary(run(one, images))] * 2))
    assert list(spy.points[-1]["layer"]) == [0, 1]


@pytest.mark.parametrize(
    ("masks", "first"),
    [
        ({}, 3),
        ({"z": 0.0}, 3),
        ({"z": 1.0}, 0),
        ({"z": np.zeros((3, 1, 1, 1, 1))}, 3),
        ({"z": np.array([0, 0, 0.1]).reshape(3, 1, 1, 1, 1)}, 2),
        ({"z": np.array([0, -0.1, 0.1]).reshape(3, 1, 1, 1, 1)}, 1),
        ({"resid_pre": np.ones((1, 1, 5, 1))}, 0),
        ({"resid_pre": np.eye(3, 5, -1).reshape(3, 1, 5, 1)}, 1),
        ({"resid_pre": np.eye(3, 5, -2).reshape(3, 1, 5, 1), "q": np.array([0, 1, 0]).reshape(3, 1, 1, 1, 1)}, 1),
        ({"resid_pre": 0, "q": np.array([0, 0, 1]).reshape(3, 1, 1, 1, 1)}, 2),
    ],
)
def test_the_first_edited_layer_is_that_of_the_first_mask_which_is_not_zero(masks, first):
    edits = {site: (Edit(0.0), Edit(jnp.asarray(mask, float))) for site, mask in masks.items()}
    assert jax.jit(lambda edits: sweeps.first_edited(edits, 3))(edits) == first


# --- one program


def test_a_thousand_points_are_one_program_and_take_no_more_memory_than_ten(monkeypatch, one, images, layout):
    """Nothing is traced for a point, and what is alive between chunks, and inside the programs, does not grow."""
    spy, traces = Spy(monkeypatch), []

    def edits(point, clean):
        traces.append("edits")
        edit = patch(
            one, SITE, clean.trace[SITE][:, ::-1], layers=point["layer"], tokens=TokenIndices(point["token"], layout)
        )
        return {site: replace(e, mask=e.mask * point["strength"]) for site, e in edit.items()}

    def metric(out, clean):
        traces.append("metric")
        return summary(out)

    found = []
    for strengths in (1, 44):
        grid = Grid(layer=range(LAYERS), token=range(layout.tokens), strength=np.linspace(0.1, 1, strengths))
        effect = sweep(one, images, edits, grid, metric, batch_size=8, record_clean=SITE, progress=False)
        assert effect.values.shape == (LAYERS, layout.tokens, strengths, BATCH)
        program = spy.programs[-1].first_layer.lower(one, spy.arguments[2], grid.points).compile()
        found.append((sorted(traces), max(spy.live), program.memory_analysis().temp_size_in_bytes, len(spy.starts)))
        traces.clear(), spy.live.clear(), spy.starts.clear()
    few, many = found
    assert len(grid) == 1056 and (few[3], many[3]) == (3, 132)
    # Traced once a sweep, to see whether they are what they were, once a program, and once more for more points.
    assert [few[0].count(name) for name in ("metric", "edits")] == [2, 3]
    assert [many[0].count(name) for name in ("metric", "edits")] == [1, 2]
    assert {np.shape(numbers) for points in spy.points for numbers in points.values()} == {(8,)}
    assert many[1] - few[1] <= 8 * 1056  # each point's first layer; all edits of a point are 30,000 bytes
    assert many[2] - few[2] <= 3 * 8 * 1056  # the points, one after another, and nothing made of them


def test_half_precision_gives_numbers_that_numpy_knows(one, images):
    """Where the weights are in float32, too, and the tokens are not."""
    half, grid = jaxvit.cast(one, jnp.bfloat16), grids.heads(one)

    def edits(point, clean):
        return zero_attention(half, layers=point["layer"], heads=point["head"], query="cls")

    def first(out, clean):
        return out.cls[:, 0]

    effect = attribute(half, images, edits, grid, first, progress=False)
    assert effect.values.dtype == np.float32
    exact = attribute(one, images, edits, grid, first, progress=False).values
    # Two dozen sums, each rounded to 8 bits.
    assert np.abs(effect.values - exact).max() < 24 * 2.0**-9 * np.abs(exact).max()
    swept = sweeps._named(Grid(layer=(0, 1)), np.ones((2, 3), jnp.bfloat16), [None], summary)
    assert swept.values.dtype == np.float32 and (swept.values == 1).all()


# --- attribution


def derivative(model, images, edits, clean, metric=summary):
    """d metric / dt of a run with all masks times t, at 0."""

    def at(t):
        scaled = {
            site: tuple(replace(e, mask=jnp.asarray(e.mask) * t) for e in each)
            for site, each in jaxvit.model.edits.normalise_edits(edits).items()
        }
        return metric(model(images, scaled), clean)

    return jax.jvp(at, (jnp.zeros(()),), (jnp.ones(()),))[1]


def of_edges_after(model, layout, stats, clean):
    def traced(point, clean):
        return zero_attention(model, layers=point["layer"], query=point["query"], key=point["key"])

    return grids.group_edges(model), traced, None


def of_replaced_tokens(model, layout, stats, clean):
    """Each token becomes that of another image."""

    def traced(point, clean):
        donors = clean.trace[SITE][:, ORDER]
        return patch(model, SITE, donors, layers=point["layer"], tokens=TokenIndices(point["token"], layout))

    return Grid(layer=range(LAYERS), token=range(layout.tokens)), traced, None


@pytest.fixture(scope="module")
def slopes(one, images, layout, clean):
    """The derivative of every image's number in every entry of four masks, by one reverse pass through the model."""
    donors = clean.trace[SITE][:, ORDER]

    def effect(masks):
        heads, before, after, tokens = (masks[name] for name in ("heads", "before", "after", "tokens"))
        edits = {
            "z": Edit(heads[:, None, None, :, None]),
            "scores": Knockout(before[:, None, None]),
            "pattern": Edit(after[:, None, None]),
            SITE: Edit(tokens[:, None, :, None], shift=donors, mask_over="tokens", value_over="tokens"),
        }
        return summary(one(images, edits))

    shapes = {"heads": (3, 4), "before": (3, 5, 5), "after": (3, 5, 5), "tokens": (LAYERS, layout.tokens)}
    return jax.jit(jax.jacrev(effect))({name: jnp.zeros(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize(
    ("name", "case"),
    [("heads", of_heads), ("before", of_edges), ("after", of_edges_after), ("tokens", of_replaced_tokens)],
)
def test_attribution_is_the_gradient_in_a_mask(name, case, one, images, layout, stats, clean, slopes):
    """Of heads, of edges between groups before and after the softmax, and of tokens."""
    grid, edits, _ = case(one, layout, stats, clean)
    given, places = (stream_of(images), (0, 2, 3)) if name == "heads" else (images, (0, 1, 2))
    estimate = attribute(one, given, edits, grid, summary, batch_size=7, record_clean=SITE, progress=False)
    assert_close(estimate, jnp.moveaxis(slopes[name], 0, -1), 1e-9)
    assert dict(estimate.axes) == {**grid.axes, "image": places} and estimate.name == "estimated change of summary"


def every_kind(model, point, clean):
    """Edits of many sites, with every operation, and two that meet in one value."""
    where = dict(layers=point["layer"])
    twice = [steer(model, "attn_out", jnp.arange(32.0), layers=1)["attn_out"]]
    twice += [amplify(model, "attn_out", point["strength"], **where)["attn_out"]]
    return {
        **replace_by_shuffle(model, "k", ORDER, **where, heads=1),
        **zero_attention(model, **where, query="cls", key="patches"),
        **ablate(model, "skip_mlp", **where, tokens="registers"),
        "attn_out": tuple(twice),
        "mlp_post": jaxvit.Relocate(jnp.ones((1, 1, 1, 48)) * 0.3, jnp.eye(1, 5, 1)[None, ..., None]),
    }


def test_attribution_is_the_derivative_in_all_masks_at_once(one, images, clean):
    grid = Grid(layer=range(LAYERS), strength=(0.3, 2.0))
    assert Shuffle in {type(edit) for edit in every_kind(one, {"layer": 0, "strength": 1.0}, clean).values()}
    estimate = attribute(one, images, lambda p, c: every_kind(one, p, c), grid, summary, batch_size=4, progress=False)
    slope = jax.jit(lambda point: derivative(one, images, every_kind(one, point, clean), clean))
    points = [dict(zip(grid.points, at, strict=True)) for at in zip(*grid.points.values(), strict=True)]
    assert_close(estimate, np.reshape([slope(point) for point in points], (3, 2, BATCH)), 1e-9)


def test_attribution_is_the_sweep_but_for_the_square_of_the_effect(one, images):
    """sweep(t) = t estimate + t^2 / 2 second derivative + O(t^3), of a metric that is 0 without edits."""
    parts = np.array([1e-2, 5e-3, 2.5e-3])
    grid = Grid(part=parts, layer=range(LAYERS), head=range(4))

    def part_of(part, layer, head):
        return {"z": Edit(ablate(one, "z", layers=layer, heads=head)["z"].mask * part)}

    def edits(point, clean):
        return part_of(point["part"], point["layer"], point["head"])

    def patches(out, clean):
        return jnp.sin(out.patches).mean((1, 2)) - jnp.sin(clean.patches).mean((1, 2))

    exact = sweep(one, images, edits, grid, patches, batch_size=36, progress=False).values
    estimate = attribute(one, images, edits, grid, patches, progress=False).values
    t = parts.reshape(3, 1, 1, 1)
    assert_close(estimate, t * (estimate[:1] / t[:1]))

    @jax.jit
    def curvature(layer, head):
        def metric(t):
            return patches(one(images, part_of(t, layer, head)), one(images))

        def slope(t):
            return jax.jvp(metric, (t,), (jnp.ones(()),))[1]

        return jax.jvp(slope, (jnp.zeros(()),), (jnp.ones(()),))[1]

    expected = np.reshape([curvature(*at) for at in itertools.product(range(LAYERS), range(4))], (LAYERS, 4, BATCH))
    first, second, third = 2 * (exact - estimate) / t**2  # off by t times a third derivative, and t^2 times a fourth
    third, second = 2 * third - second, 2 * second - first
    assert_close((4 * third - second) / 3, expected, 1e-4)


# --- progress and errors


@pytest.mark.parametrize("function", [sweep, attribute])
def test_progress_shows_on_stderr(function, one, images, capsys):
    grid = Grid(layer=range(5))
    parts = [images[:1], images[1:2]]
    function(one, parts, nothing, grid, summary, batch_size=2)
    out, err = capsys.readouterr()
    expected = ["5 points", "10/10"] if function is sweep else ["attribution", "2/2"]
    assert not out and all(text in err for text in expected)


def test_without_tqdm_there_is_no_progress_to_see(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(track([3, 4], "things")) == [3, 4]
    with bar("things", 2) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")


def test_a_bar_ends_with_what_it_counts(capsys):
    assert list(track((n for n in (3, 4)), "things")) == [3, 4]
    with pytest.raises(ZeroDivisionError):
        for n in track([1, 0], "others"):
            1 / n
    err = capsys.readouterr().err
    assert "things: 2it" in err and "others:  50%" in err


@pytest.mark.parametrize("function", [sweep, attribute])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(images=[]), "no images to run"),
        (dict(images=np.zeros((8, 8, 3))), r"shape \[8, 8, 3\]; expected \[batch, height, width, channels\]"),
        (dict(grid=Grid(image=(0, 1))), "the result has an axis 'image' of its own"),
        (dict(batch_size=0), "batch_size is 0; expected"),
        (dict(metric=lambda out, clean: out.cls.mean()), r"the metric returns \[?\(?.*\]?; expected"),
        (dict(metric=lambda out, clean: out.cls[0]), r"the metric returns .*32.*; expected"),
        (dict(metric=lambda out, clean: None), "the metric returns None.*; expected"),
        (dict(make_edits=lambda point, clean: {"zz": Edit(1.0)}), "no site 'zz'"),
        (dict(make_edits=lambda point, clean: None, metric=lambda out, clean: {}), "the metric returns .*; expected"),
    ],
)
def test_what_cannot_be_swept_is_said_in_a_sentence(function, wrong, message, one, images):
    given = dict(model=one, images=images, make_edits=nothing, grid=Grid(layer=range(2)), metric=summary) | wrong
    with pytest.raises(ValueError, match=message):
        function(**given, progress=False)


def test_named_metrics_have_one_shape(one, images):
    def metric(out, clean):
        return {"a": out.cls[:, 0], "b": out.cls}

    with pytest.raises(ValueError, match=r"returns \[3\], \[3, 32\]; expected .* several of one shape"):
        sweep(one, images, nothing, Grid(layer=range(2)), metric, progress=False)
