"""Images spread over devices, parameters copied to each or spread too: the same numbers, and images stay spread."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

DEVICES = 8
SCRIPT = """
    import warnings
    warnings.simplefilter("error")
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from conftest import FAMILIES, random_images, random_model
    import jaxvit
    from jaxvit import Take
    from jaxvit.model.params import from_params, to_params

    assert jax.device_count() == {devices}
    kind = getattr(AxisType, sys.argv[1])
    mesh = jax.make_mesh(({devices},), ("data",), axis_types=(kind,))

    def assert_close(actual, expected):
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            a, b = np.asarray(a), np.asarray(b)
            assert a.shape == b.shape
            assert a.size == 0 or np.abs(a - b).max() <= 1e-5 * np.abs(b).max()

    def assert_spread(array, axis):
        if array.size:
            shards = {{shard.data.shape[axis] for shard in array.addressable_shards}}
            assert shards == {{array.shape[axis] // {devices}}}, (shards, array.sharding)

    def loss(model, images):
        return (model(images).patches ** 3).mean()

    # The own grid of positions; another one; a single patch, whose axes are easily mistaken for one another.
    for family, size, record in [
        ("dinov2 with registers", (20, 20), ("pattern", "resid_post")),
        ("dinov2 with registers", (24, 16), ()),
        ("dinov2 giant", (4, 4), {{"pattern": Take(layers=(0, 2), tokens="all"), "q": Take(layers=-1)}}),
    ]:
        model, images = random_model(FAMILIES[family]), random_images(0, 2 * {devices}, *size)
        copied = jax.device_put(model, NamedSharding(mesh, P()))
        spread = jax.device_put(images, NamedSharding(mesh, P("data")))
        run = jax.jit(lambda m, x: m(x, record=record))
        expected = run(model, images)
        with jax.set_mesh(mesh):
            out = run(copied, spread)
        assert_close(out, expected)
        for array in (out.cls, out.registers, out.patches, out.tokens):
            assert_spread(array, 0)
        for array in out.trace.values():
            assert_spread(array, 1)  # after the layers

    # Parameters spread over heads and hidden units, images over the rest; one shot of everything that runs the model.
    both = jax.make_mesh(({devices} // 2, 2), ("data", "model"), axis_types=(kind,) * 2)
    OVER = {{"attn.qkv.kernel": P(None, None, None, "model"), "attn.qkv.bias": P(None, None, "model")}}
    OVER |= {{"attn.proj.kernel": P(None, "model"), "mlp.fc1.kernel": P(None, None, "model")}}
    OVER |= {{"mlp.fc1.bias": P(None, "model"), "mlp.fc2.kernel": P(None, "model")}}
    model, images = random_model(FAMILIES["dinov2 with registers"]), random_images(0, {devices}, 8)
    params = {{
        name: jax.device_put(a, NamedSharding(both, OVER.get(name.removeprefix("blocks."), P())))
        for name, a in to_params(model).items()
    }}
    placed = from_params(model.config, params)
    spread = jax.device_put(images, NamedSharding(both, P("data")))
    first = lambda out, clean: out.cls[:, 0]
    heads = lambda point, clean: jaxvit.ablate(model, "z", layers=point["layer"], heads=point["head"])
    cut = jaxvit.knockout(model, query="patches", key="registers")
    grid = jaxvit.Grid(layer=(0, 2), head=(1, 3))
    RUNS = {{
        "plain": lambda m, x: m(x).patches,
        "recorded": lambda m, x: m(x, record={{"pattern": Take(layers=(-1, 0)), "z": Take()}}).trace,
        "edited": lambda m, x: m(x, cut).cls,
        "gradient": lambda m, x: to_params(jax.grad(loss)(m, x)),
        "each_layer": lambda m, x: jaxvit.each_layer(m, x, lambda trace: trace["v"].mean((1, 2, 3)), "v"),
        "sweep": lambda m, x: jaxvit.sweep(m, x, heads, grid, first, progress=False).values,
        "attribute": lambda m, x: jaxvit.attribute(m, x, heads, grid, first, progress=False).values,
    }}
    for name, go in RUNS.items():
        expected = go(model, images)
        with jax.set_mesh(both):
            found = go(placed, spread)
        try:
            assert_close(found, expected)
        except AssertionError as error:
            raise AssertionError(name) from error

    gradient = jax.jit(jax.grad(loss))
    model, images = random_model(FAMILIES["dinov2 giant"]), random_images(0, 2 * {devices}, 4)
    copied = jax.device_put(model, NamedSharding(mesh, P()))
    spread = jax.device_put(images, NamedSharding(mesh, P("data")))
    expected = gradient(model, images)
    with jax.set_mesh(mesh):
        assert_close(gradient(copied, spread), expected)
    # Functions that go through many images take a mesh themselves; 11 images and 9 points do not divide by it.
    model, images = random_model(FAMILIES["dinov2 giant"]), random_images(0, 11, 8)
    several = jaxvit.Grid(layer=tuple(range(model.config.depth)), head=(0, 2, 3))
    pattern = lambda model, images: model(images, record={{"pattern": Take(layers=-1)}}).trace["pattern"][-1]
    halves = [images[:8], images[8:]]
    MESHED = {{
        "sweep": lambda **m: jaxvit.sweep(model, images, heads, several, first, **m).values,
        "points that are few": lambda **m: jaxvit.sweep(model, images, heads, grid, first, batch_size=3, **m).values,
        "metrics by name": lambda **m: jaxvit.sweep(
            model, images, heads, grid, {{"first": first, "last": lambda out, clean: out.cls[:, -1]}}, **m
        ).values,
        "attribute": lambda **m: jaxvit.attribute(model, images, heads, several, first, **m).values,
        "over_images": lambda **m: jaxvit.over_images(pattern, model, halves, **m),
        "statistics": lambda **m: jaxvit.ActivationStats.collect(model, halves, "mlp_post", **m).means,
    }}
    MESHES = {{
        "data": jaxvit.parallel.mesh(explicit=kind == AxisType.Explicit),
        "data and model": jaxvit.parallel.mesh(model=2, explicit=kind == AxisType.Explicit),
        "model": jaxvit.parallel.mesh(model=4, devices=jax.devices()[:4]),
    }}
    for name, go in MESHED.items():
        expected = go(progress=False)
        for which, mesh in MESHES.items():
            try:
                assert_close(go(progress=False, mesh=mesh), expected)
            except AssertionError as error:
                raise AssertionError(f"{{name}} over {{which}}") from error
    placed = jaxvit.parallel.place(model, MESHES["data and model"])
    parts = {{name: a.addressable_shards[0].data.size / a.size for name, a in to_params(placed).items()}}
    assert {{name for name, part in parts.items() if part == 0.5}} == {{
        f"blocks.{{name}}" for name in jaxvit.parallel.OVER_MODEL if f"blocks.{{name}}" in parts
    }}
    assert set(parts.values()) == {{0.5, 1.0}}

    # A folder's worth of pictures.
    mesh = jax.make_mesh(({devices},), ("data",), axis_types=(kind,))
    pixels = list(np.random.default_rng(0).integers(0, 256, (21, 24, 24, 3), dtype=np.uint8))
    model = random_model(FAMILIES["dinov2 with registers"])
    words = dict(take=["cls", "patches@[0,-1]"], size=20, batch_size={devices})
    spread = jaxvit.features(model, pixels, **words, mesh=jaxvit.parallel.mesh())
    assert_close(spread.arrays, jaxvit.features(model, pixels, **words).arrays)
    print("ran to the end")
"""


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_spread_images_give_the_outputs_of_one_device_spread(kind):
    here = Path(__file__).parent
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={DEVICES}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    script = textwrap.dedent(SCRIPT.format(devices=DEVICES))
    command = [sys.executable, "-c", script, kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "ran to the end" in done.stdout
