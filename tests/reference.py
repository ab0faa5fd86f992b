"""The forward pass a second time, in NumPy and one layer after the other, with a function that is called at every site:
what runs with edits are compared with. Nothing of the model's own arithmetic is used, only its parameters.
"""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
from scipy.special import erf

from jaxvit import SITES, Edit, Knockout, Relocate, Shuffle, Take
from jaxvit.model.edits import check_edits, normalise_edits
from jaxvit.model.params import to_params
from jaxvit.model.sites import ATTENTION_SITES

HEIGHT, WIDTH, BATCH = 24, 16, 2  # 6 x 4 patches: another grid than the positions', and not square


def numpy_run(model, stream, change=lambda site, layer, x: None, start=0):
    """Site -> its values in layers `start` .., and `cls`, `registers`, `patches` and `tokens` as of an output.

    Args:
      stream: [B, T, D], what enters block `start`.
      change: `change(site, layer, x)` changes x in place, or returns what goes on instead of it.
    """
    c, params = model.config, {name: np.asarray(a, np.float64) for name, a in to_params(model).items()}
    trace = {site: [] for site in SITES}

    def norm(x, scale, bias):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + c.eps) * scale + bias

    x = np.asarray(stream, np.float64)
    for layer in range(start, c.depth):

        def tap(site, value, layer=layer):
            value = np.array(value)
            new = change(site, layer, value)
            trace[site].append(value if new is None else np.asarray(new))
            return trace[site][-1]

        def p(name, layer=layer):
            return params[f"blocks.{name}"][layer]

        def linear(name, x, p=p):
            return x @ p(f"{name}.kernel").reshape(x.shape[-1], -1) + p(f"{name}.bias").ravel()

        def scale(name, p=p):
            return p(name) if c.layer_scale else 1

        x = tap("resid_pre", x)
        qkv = linear("attn.qkv", norm(x, p("norm1.scale"), p("norm1.bias")))
        q, k, v = np.moveaxis(qkv.reshape(*x.shape[:2], 3, c.heads, c.head_size), 2, 0)
        q, k, v = tap("q", q), tap("k", k), tap("v", v)
        scores = tap("scores", np.einsum("BQHd,BTHd->BHQT", q, k) / np.sqrt(c.head_size))
        top = scores.max(-1, keepdims=True)
        weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
        total = weights.sum(-1, keepdims=True)
        pattern = tap("pattern", np.divide(weights, total, out=np.zeros_like(weights), where=total != 0))
        z = tap("z", np.einsum("BHQT,BTHd->BQHd", pattern, v))
        attn_out = tap("attn_out", linear("attn.proj", z.reshape(x.shape)) * scale("scale1.gamma"))
        x = tap("resid_mid", tap("skip_attn", x) + attn_out)
        normed = norm(x, p("norm2.scale"), p("norm2.bias"))
        if c.mlp != "swiglu":
            pre = tap("mlp_pre", linear("mlp.fc1", normed))
            gate = (1 + erf(pre / np.sqrt(2))) / 2 if c.mlp == "gelu" else 1 / (1 + np.exp(-1.702 * pre))
            out = linear("mlp.fc2", tap("mlp_post", pre * gate))
        else:
            gate = tap("mlp_pre", linear("mlp.gate", normed))
            out = linear("mlp.out", tap("mlp_post", gate / (1 + np.exp(-gate)) * linear("mlp.value", normed)))
        mlp_out = tap("mlp_out", out * scale("scale2.gamma"))
        x = tap("resid_post", tap("skip_mlp", x) + mlp_out)
    normed, prefix = norm(x, params["norm.scale"], params["norm.bias"]), 1 + c.registers
    parts = {"cls": normed[:, 0], "registers": normed[:, 1:prefix], "patches": normed[:, prefix:], "tokens": x}
    return {site: np.stack(values) for site, values in trace.items() if values} | parts


def meaning(model, edits):
    """What edits say, as a function for `numpy_run`."""
    every, prefix = normalise_edits(edits), 1 + model.config.registers

    def change(site, layer, x):
        for edit in sorted(every.get(site, ()), key=lambda edit: isinstance(edit, Knockout)):  # these come last
            m = spelled_out(site, edit.mask, edit.mask_over, x.shape, layer, prefix)
            if "Q" in SITES[site] and edit.queries == "prefix":
                m = np.array(np.broadcast_to(m, x.shape))
                m[:, :, prefix:] = 0
            if isinstance(edit, Knockout):
                with np.errstate(divide="ignore"):
                    x = x + np.log(1 - m)
            else:
                x = (1 - m) * x + m * replacement(site, edit, x, layer, prefix)
        return x

    return change


def replacement(site, edit, x, layer, prefix):
    if isinstance(edit, Edit):
        scale, shift = (spelled_out(site, a, edit.value_over, x.shape, layer, prefix) for a in (edit.scale, edit.shift))
        return scale * x + shift
    if isinstance(edit, Shuffle):
        order = np.asarray(edit.order)
        return x[order[layer if len(order) > 1 else 0]]
    assert isinstance(edit, Relocate)
    return spelled_out(site, edit.to, "groups", x.shape, layer, prefix) * x[:, prefix:].max(1, keepdims=True)


def spelled_out(site, leaf, over, shape, layer, prefix):
    """An edit's array in one layer, with an entry for every token."""
    a = np.asarray(leaf, np.float64)
    if a.ndim == 0:
        return a
    a = a[layer if len(a) > 1 else 0]
    for axis, name in enumerate(SITES[site].split()):
        if name not in "TQ" or a.shape[axis] == 1:
            continue
        if over == "groups":
            a = np.take(a, np.minimum(np.arange(shape[axis]), prefix), axis)
        elif a.shape[axis] < shape[axis]:  # rows of [CLS] and registers alone: the others are not edited
            rows = [(0, shape[axis] - size if i == axis else 0) for i, size in enumerate(a.shape)]
            a = np.pad(a, rows)
    return a


# --- one compiled program for all edits of a model


def run_all(model, images, edits):
    """The run with every site recorded in full."""
    return jax.device_get(compiled(model, images, edits))


@jax.jit
def compiled(model, images, edits):
    return model(images, edits, record={site: Take(tokens="all") for site in SITES})


def kinds(model, site, program):
    """The edits of a site in one of the programs, which have every kind of array and change nothing."""
    return dict(kinds_of(model.config, site, program))


@cache
def kinds_of(config, site, program):
    edits = {"tokens": Edit(0.0, mask_over="tokens", value_over="tokens")}
    if program == "tokens" and site == "scores":
        edits["knockout"] = Knockout(0.0, mask_over="tokens")
    if program == "tokens" and site == "resid_post":
        edits["shuffle"] = Shuffle(0.0, np.tile(np.arange(BATCH), (config.depth, 1)))
    if program == "tokens" and site == "mlp_post":
        edits["relocate"] = Relocate(0.0, np.zeros((1, 1, config.registers + 2, 1)))
    if program == "groups":
        edits = {"groups": Edit(0.0)} | ({"knockout": Knockout(0.0)} if site == "scores" else {})
    if program == "mixed":
        # Some axes of size 1, others of the mask than of the scale; and a mask over groups of values over tokens.
        edits = {"axes": Edit(0.0), "both": Edit(0.0, value_over="tokens")}
        if site in ATTENTION_SITES:
            edits["prefix groups"] = Edit(0.0, queries="prefix")
            edits["prefix tokens"] = Edit(0.0, mask_over="tokens", value_over="tokens", queries="prefix")
        if site == "scores":
            edits["knockout axes"] = Knockout(0.0)
            edits["knockout prefix"] = Knockout(0.0, queries="prefix")
            edits["knockout prefix tokens"] = Knockout(0.0, mask_over="tokens", queries="prefix")
    for kind, edit in edits.items():
        full = [sizes(config, edit, edit.mask_over)[axis] for axis in f"L {SITES[site]}".split()]
        odd, even = ([1 if i % 2 == j and kind.endswith("axes") else n for i, n in enumerate(full)] for j in (1, 0))
        edits[kind] = replace(edit, mask=np.zeros(odd))
        if kind == "both":
            full = [sizes(config, edit, "tokens")[axis] for axis in f"L {SITES[site]}".split()]
            edits[kind] = replace(edits[kind], scale=np.zeros(()), shift=np.zeros(full))
        elif isinstance(edit, Edit):
            edits[kind] = replace(edits[kind], scale=np.zeros(even), shift=np.zeros(full))
    return edits


def sizes(config, edit, over):
    """Axis -> size, in an edit's arrays."""
    c, prefix = config, 1 + config.registers
    tokens = c.layout(HEIGHT, WIDTH).tokens if over == "tokens" else prefix + 1
    rows = prefix if over == "tokens" and edit.queries == "prefix" else tokens
    axes = {"L": c.depth, "B": BATCH, "T": tokens, "Q": rows, "D": c.width, "F": c.hidden}
    return axes | {"H": c.heads, "d": c.head_size}


def everything(model, chosen=None, program="tokens"):
    """Edits for `run_all`, of the same shapes for every choice: those of `chosen`, by site and kind, do something."""
    edits = {site: kinds(model, site, program) for site in SITES}
    for (site, kind), edit in (chosen or {}).items():
        blank = edits[site][kind]
        assert jax.tree.structure(blank) == jax.tree.structure(edit)
        edits[site][kind] = jax.tree.map(lambda a, b: np.broadcast_to(np.asarray(a, b.dtype), b.shape), edit, blank)
    return {site: tuple(each.values()) for site, each in edits.items()}


def in_full(model, edits):
    """The same edits with arrays of all axes, over tokens, as `everything` takes them."""
    known = sizes(model.config, Edit(0.0), "tokens") | {"P": model.prefix}
    check_edits(normalise_edits(edits), known)
    chosen = {}
    for site, each in normalise_edits(edits).items():
        shape = tuple(known[axis] for axis in SITES[site].split())

        def full(leaf, over, site=site, shape=shape):
            every = (spelled_out(site, leaf, over, shape, layer, model.prefix) for layer in range(model.config.depth))
            return np.stack([np.broadcast_to(one, shape) for one in every])

        for edit in each:
            kind, new = "shuffle" if isinstance(edit, Shuffle) else "relocate", edit
            if isinstance(edit, Edit | Knockout):
                mask = full(edit.mask, edit.mask_over)
                if site in ATTENTION_SITES and edit.queries == "prefix":
                    mask[:, :, :, model.prefix :] = 0
            if isinstance(edit, Knockout):
                kind, new = "knockout", Knockout(mask, mask_over="tokens")
            elif isinstance(edit, Edit):
                values = {"scale": full(edit.scale, edit.value_over), "shift": full(edit.shift, edit.value_over)}
                kind, new = "tokens", Edit(mask, **values, mask_over="tokens", value_over="tokens")
            assert (site, kind) not in chosen
            chosen[site, kind] = new
    return everything(model, chosen)
