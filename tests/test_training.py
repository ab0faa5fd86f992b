"""`jaxvit.training`: what learns, what stays, and the same steps in PyTorch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.models.subjects import random_weights
from jaxvit import Edit, Preprocess, Take, ViTConfig
from jaxvit.model.layers import wide_dtype
from jaxvit.model.params import cast, to_params
from jaxvit.training import (
    add_registers,
    apply,
    attach_head,
    cross_entropy,
    decays,
    join,
    layer_decay,
    lora,
    random_mask,
    some_patches,
    split,
    stochastic_depth,
)

SMALL = dict(depth=4, width=16, heads=2, hidden=24, patch=4, grid=(3, 3), registers=2, preprocess=Preprocess(12, 12))
PATTERNS = {
    "all": ("all",),
    "head": ("head",),
    "last blocks": ("head", "blocks[-2:]"),
    "single layers": ("blocks[0].attn", "blocks[2]"),
    "norms and a layer": ("norms", "blocks[1:3].mlp"),
    "tokens": ("registers", "cls", "positions"),
    "a pattern": ("blocks.*.bias",),
}


@pytest.fixture(autouse=True, scope="module")
def double():
    with jax.enable_x64(True):
        yield


def model_of(**more):
    return random_weights(ViTConfig(**SMALL, classes=5, mask_token=True, **more), "float64")


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).normal(size=(3, 12, 12, 3)))


LABELS = jnp.arange(3)


def near(found, expected, within=1e-12):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0) <= within * max(np.abs(expected).max(initial=0), 1e-30)


def loss(learn, frozen, images, **how):
    out = apply(learn, frozen, images, **how)
    return cross_entropy(out.logits, LABELS) + jnp.square(out.cls.astype(wide_dtype(out.cls.dtype))).mean()


@pytest.mark.parametrize("name", PATTERNS)
def test_a_split_model_is_the_model(name, model, images):
    learn, frozen = split(model, *PATTERNS[name])
    whole = to_params(join(learn, frozen))
    for each, a in to_params(model).items():
        assert (whole[each] == a).all()
    record = {"pattern": Take(layers=(3, 0)), "resid_post": Take()}
    edits = {"z": Edit(np.linspace(0, 1, 4).reshape(4, 1, 1, 1, 1))}
    for outputs in ("all", "cls"):
        near_all(
            apply(learn, frozen, images, edits, record, outputs=outputs), model(images, edits, record, outputs=outputs)
        )


def near_all(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(near, found, expected)


@pytest.fixture(scope="module")
def slopes(model, images):
    """Of all parameters, each with its whole stack."""
    return jax.jit(jax.grad(loss))(*split(model, "all"), images)


@pytest.mark.parametrize(("name", "remat"), [*((name, "none") for name in PATTERNS), ("last blocks", "block")])
def test_gradients_are_those_of_the_whole_model(name, remat, model, images, slopes):
    learn, frozen = split(model, *PATTERNS[name])
    found = jax.jit(jax.grad(partial(loss, remat=remat)))(learn, frozen, images)
    whole = slopes
    assert set(found) == set(learn)
    for each, a in found.items():
        head, *layers = each.replace("]", "[").split("[")
        expected = whole[head + layers[1]][slice(*map(int, layers[0].split(":")))] if layers else whole[each]
        near(a, expected)


def test_what_is_frozen_is_not_copied_and_has_no_gradient(model):
    learn, frozen = split(model, "head", "blocks[-1:]")
    params = to_params(model)
    assert all(a is params[name] for name, a in frozen.params.items())
    assert {a.shape[0] for name, a in learn.items() if name.startswith("blocks")} == {1}
    assert set(frozen.params) | {"head.linear.kernel", "head.linear.bias"} == set(params)


def test_frozen_layers_take_no_memory_of_gradients():
    deep = random_weights(ViTConfig(**{**SMALL, "depth": 40, "width": 64, "hidden": 256}, classes=5), "float32")
    images = jnp.zeros((2, 12, 12, 3), "float32")

    def temporary(*trainable):
        learn, frozen = split(deep, *trainable)
        run = jax.jit(jax.grad(lambda p, f: cross_entropy(apply(p, f, images).logits, LABELS[:2])))
        return run.lower(learn, frozen).compile().memory_analysis().temp_size_in_bytes

    stacks = sum(a.nbytes for name, a in to_params(deep).items() if name.startswith("blocks"))
    assert temporary("head", "blocks[-2:]") < stacks / 4
    assert temporary("all") > temporary("head", "blocks[-2:]") * 2


def test_lora_starts_as_the_model_and_merges_exactly(model, images):
    learn, frozen = split(model, "head")
    learn |= lora(model, 2, ("attn.qkv", "attn.proj", "mlp.fc1"), layers="1:3", key=jax.random.key(0))
    assert learn["blocks[1:3].attn.proj.kernel.lora_a"].shape == (2, 2, 8, 2)
    near_all(apply(learn, frozen, images), model(images))
    noise = jax.random.split(jax.random.key(1), len(learn))
    learn = {n: a + jax.random.normal(k, a.shape) for (n, a), k in zip(learn.items(), noise, strict=True)}
    merged = join(learn, frozen)
    near_all(apply(learn, frozen, images), merged(images))
    a, b = (learn[f"blocks[1:3].attn.proj.kernel.lora_{end}"] for end in "ab")
    old, new = (to_params(m)["blocks.attn.proj.kernel"] for m in (model, merged))
    near(new[1:3], old[1:3] + np.einsum("lhdr,lro->lhdo", a, b))
    assert (new[np.array([0, 3])] == old[np.array([0, 3])]).all()
    slopes = jax.jit(jax.grad(loss))(learn, frozen, images)
    name = "blocks[1:3].attn.qkv.kernel.lora_a"
    step = 1e-6 * jax.random.normal(jax.random.key(2), learn[name].shape)
    ends = [loss(learn | {name: learn[name] + sign * step}, frozen, images) for sign in (1, -1)]
    assert (ends[0] - ends[1]) / 2 == pytest.approx(float((slopes[name] * step).sum()), rel=1e-6)


def test_words_that_name_nothing_are_refused(model):
    for word, told in (
        ("heads", "'heads' names no parameter"),
        ("blocks[9]", "expected layers of 4"),
        ("blocks[2:2]", "expected layers of 4"),
        ("blocks[x]", "expected layers of 4"),
        ("blocks.gate", "names no parameter"),
    ):
        with pytest.raises(ValueError, match=told):
            split(model, word)
    with pytest.raises(ValueError, match="no kernel 'mlp.gate'; there are attn.proj, attn.qkv"):
        lora(model, 2, ("mlp.gate",), key=jax.random.key(0))
    learn, frozen = split(model, "blocks.attn.qkv")
    with pytest.raises(ValueError, match=r"learns itself: it cannot be trained in part"):
        join(learn | lora(model, 2, ("attn.qkv",), key=jax.random.key(0)), frozen)


def test_new_heads_and_registers(model, images):
    with_head = attach_head(model, 7, pool="cls_mean", key=jax.random.key(0))
    assert with_head(images).logits.shape == (3, 7)
    near(with_head(images).cls, model(images).cls)
    wider = add_registers(model, 3, key=jax.random.key(0))
    assert wider.registers.shape == (5, 16) and (wider.registers[:2] == model.registers[...]).all()
    assert wider.registers[2:].std() == pytest.approx(0.02, rel=0.3)
    with pytest.raises(ValueError, match="expected 2 or more"):
        attach_head(model, 1, key=jax.random.key(0))
    with pytest.raises(ValueError, match="weights of their own"):
        attach_head(model, 3, pool="attention", key=jax.random.key(0))


def test_masked_patches_hold_the_mask_token(model, images):
    learn, frozen = split(model, "mask_token")
    masked = random_mask(jax.random.key(0), 3, 9, 0.4)
    assert (masked.sum(1) == 4).all()
    found = apply(learn, frozen, images, None, {"resid_pre": Take(layers=0)}, masked=masked).trace["resid_pre"][0]
    positions = model.positions[...].reshape(9, -1)
    expected = jnp.where(
        masked[..., None], model.mask_token[...][None, None] + positions[None], model.embed(images)[:, model.prefix :]
    )
    near(found[:, model.prefix :], expected)
    near(found[:, : model.prefix], model.embed(images)[:, : model.prefix])
    bare = random_weights(ViTConfig(**SMALL), "float64")
    with pytest.raises(ValueError, match="no mask token"):
        apply(*split(bare, "cls"), images, masked=masked)


def test_dropped_patches_are_as_if_they_were_not_there(model, images):
    from jaxvit import TokenIndices, knockout

    learn, frozen = split(model, "cls")
    kept = some_patches(jax.random.key(0), 3, 9, 0.5)
    assert kept.shape == (3, 4) and (np.diff(kept, axis=1) > 0).all()
    short = apply(learn, frozen, images, kept=kept)
    assert short.patches.shape == (3, 4, 16)
    for i in range(3):
        gone = [int(n) + model.prefix for n in range(9) if n not in kept[i]]
        whole = model(images[i : i + 1], knockout(model, key=TokenIndices(gone, model.layout), queries="all"))
        near(short.cls[i], whole.cls[0])
        near(short.patches[i], whole.patches[0][kept[i]])
    turning = random_weights(ViTConfig(**SMALL, rope="float32", positions=False), "float64")
    with pytest.raises(ValueError, match="rotary"):
        apply(*split(turning, "cls"), images, kept=kept)


def test_stochastic_depth_drops_branches_of_images(model, images):
    nothing = stochastic_depth(jax.random.key(0), 4, 3, 0.0)
    near_all(model(images, nothing), model(images))
    edits = stochastic_depth(jax.random.key(1), 4, 3, 0.9)
    out = model(images, edits, record=("attn_out", "mlp_out"))
    clean = model(images, record=("attn_out",)).trace["attn_out"]
    for site in ("attn_out", "mlp_out"):
        dropped = (out.trace[site] == 0).all(axis=(2, 3))
        assert (dropped == (edits[site].scale[..., 0, 0] == 0)).all() and dropped.any() and not dropped.all()
    assert not (out.trace["attn_out"][0] == 0).any()  # the first layer is never dropped
    near(out.trace["attn_out"][0], clean[0])
    many = np.stack([stochastic_depth(jax.random.key(i), 4, 64, 0.5)["mlp_out"].scale for i in range(50)])
    assert many.mean(axis=(0, 2, 3, 4)) == pytest.approx(np.ones(4), abs=0.05)
    with pytest.raises(ValueError, match="rate is 1"):
        stochastic_depth(jax.random.key(0), 4, 3, 1.0)


def test_layers_learn_as_fast_as_asked():
    names = {"patch_embed.kernel": (2, 3), "blocks.mlp.fc1.kernel": (4, 2, 3), "blocks[2:4].attn.qkv.bias": (2, 5)}
    ones = {name: jnp.ones(shape) for name, shape in names.items()} | {"head.linear.bias": jnp.ones(2)}
    updates, _ = layer_decay(4, 0.5).update(ones, layer_decay(4, 0.5).init(ones))
    assert (updates["head.linear.bias"] == 1).all() and (updates["patch_embed.kernel"] == 0.5**5).all()
    assert updates["blocks.mlp.fc1.kernel"][:, 0, 0].tolist() == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert updates["blocks[2:4].attn.qkv.bias"][:, 0].tolist() == [0.25, 0.5]
    assert decays(ones) == {
        "patch_embed.kernel": True,
        "blocks.mlp.fc1.kernel": True,
        "blocks[2:4].attn.qkv.bias": False,
        "head.linear.bias": False,
    }


def test_in_half_precision_what_learns_stays_in_float32(model, images):
    single = cast(model, "float32")
    learn, frozen = split(single, "head", "blocks[-1]")
    learn |= lora(single, 2, ("mlp.fc2",), layers="0:2", key=jax.random.key(0))
    out = apply(learn, frozen, images.astype("float32"), dtype="bfloat16")
    assert out.logits.dtype == jnp.bfloat16 and cross_entropy(out.logits, LABELS).dtype == jnp.float32
    slopes = jax.jit(jax.grad(partial(loss, dtype="bfloat16")))(learn, frozen, images.astype("float32"))
    assert {a.dtype for a in slopes.values()} == {jnp.dtype("float32")}
    exact = jax.jit(jax.grad(loss))(learn, frozen, images.astype("float32"))
    half, whole = (np.concatenate([np.ravel(each[name]) for name in learn]) for each in (slopes, exact))
    assert half @ whole > 0.95 * np.linalg.norm(half) * np.linalg.norm(whole)


# Beside PyTorch -------------------------------------------------------------------------------------------------------

STEPS = 20
HOW = dict(learning_rate=1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.05)


def steps_of(learn, frozen, batches):
    optimiser = optax.adamw(**HOW)
    state = optimiser.init(learn)

    @jax.jit
    def step(learn, state, images, labels):
        slopes = jax.grad(lambda p: cross_entropy(apply(p, frozen, images, remat="block").logits, labels))(learn)
        updates, state = optimiser.update(slopes, state, learn)
        return optax.apply_updates(learn, updates), state

    with jax.numpy_dtype_promotion("standard"):  # for optax's own arithmetic
        for images, labels in batches:
            learn, state = step(learn, state, images, labels)
    return learn


@pytest.mark.parametrize("what", ["full", "last blocks", "lora"])
def test_twenty_steps_are_those_of_pytorch(what):
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm")
    import convert
    from benchmarks.originals import randomise

    sizes = dict(img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, reg_tokens=2, init_values=1.0)
    module = timm.models.vision_transformer.VisionTransformer(
        **sizes, num_classes=5, global_pool="token", no_embed_class=True
    )
    module = randomise(module).double().train()
    model = convert.load(module, dtype="float64")
    rng = np.random.default_rng(1)
    batches = [(rng.normal(size=(4, 16, 16, 3)), rng.integers(5, size=4)) for _ in range(STEPS)]

    if what == "full":
        learn, frozen = split(model, "all")
        trained = list(module.parameters())
    else:
        learn, frozen = split(model, "head", *(["blocks[-2:]"] if what == "last blocks" else []))
        trained = [*module.head.parameters()]
        trained += [p for block in module.blocks[-2:] for p in block.parameters()] if what == "last blocks" else []
    if what == "lora":
        added = lora(model, 3, ("attn.qkv", "mlp.fc2"), key=jax.random.key(0))
        noise = {n: jnp.asarray(rng.normal(size=a.shape) * 0.1) for n, a in added.items()}
        learn |= noise  # both matrices away from 0

        class Added(torch.nn.Module):
            def __init__(self, a, b):
                super().__init__()
                self.a, self.b = (torch.nn.Parameter(torch.tensor(np.asarray(m))) for m in (a, b))

            def forward(self, weight):
                return weight + (self.a @ self.b).T

        for layer, block in enumerate(module.blocks):
            for linear, name in ((block.attn.qkv, "attn.qkv"), (block.mlp.fc2, "mlp.fc2")):
                a, b = (noise[f"blocks.{name}.kernel.lora_{end}"][layer] for end in "ab")
                one = Added(a, b.reshape(3, -1))
                torch.nn.utils.parametrize.register_parametrization(linear, "weight", one)
                trained += [one.a, one.b]

    optimiser = torch.optim.AdamW(trained, lr=HOW["learning_rate"], weight_decay=HOW["weight_decay"], eps=HOW["eps"])
    for images, labels in batches:
        logits = module(torch.tensor(images).permute(0, 3, 1, 2))
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
        optimiser.step()
    if what == "lora":
        for block in module.blocks:
            for linear in (block.attn.qkv, block.mlp.fc2):
                torch.nn.utils.parametrize.remove_parametrizations(linear, "weight")
    expected = to_params(convert.load(module.eval(), dtype="float64"))
    found = to_params(join(steps_of(learn, frozen, batches), frozen))
    started = to_params(model)
    moved = {name for name, a in found.items() if (a != started[name]).any()}
    for name, a in found.items():
        near(a, expected[name], 1e-9)
    assert len(moved) == {"full": len(found), "last blocks": None, "lora": 4}[what] or what == "last blocks"
    if what == "last blocks":
        assert all((found[n][:1] == started[n][:1]).all() for n in moved if n.startswith("blocks."))
        assert not any(n.startswith(("patch_embed", "cls", "positions", "norm.")) for n in moved)
