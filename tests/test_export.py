"""Export: what the original libraries load strictly, run equal, and give back to the last bit; or a reason why not."""

import json
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from conftest import random_model
from layouts import WRITERS, numbers, tiny
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import convert
import convert.configs as configs
import convert.export as exporting
import convert.timm
import jaxvit
from convert import ConversionError
from convert.__main__ import main
from convert.export import LAYOUTS, export, left_out, state_dict
from convert.originals import (
    Original,
    build_clip,
    build_dinov3,
    build_dinov3_timm,
    build_timm,
    build_transformers,
    original_of,
)
from convert.verify import arithmetic, error, results
from jaxvit import Preprocess, ViTConfig
from jaxvit.model.params import abstract, from_params, to_params

BASE = dict(depth=2, width=64, heads=2, hidden=128, patch=4, grid=(4, 4))
DINOV2 = dict(BASE, hidden=256)
DINOV3 = dict(BASE, registers=3, positions=False, eps=1e-5)
PLAIN = dict(BASE, layer_scale=False)
CLIP = dict(PLAIN, mlp="quick_gelu", pre_norm=True, patch_bias=False, eps=1e-5)
CONFIGS = {
    "dinov2": ViTConfig(**dict(DINOV2, heads=1, patch=14)),
    "dinov2 gray": ViTConfig(**dict(DINOV2, heads=1, patch=14), channels=1),
    "dinov2 registers": ViTConfig(**dict(DINOV2, hidden=176), mlp="swiglu", registers=3),
    "dinov2 classifier": ViTConfig(**DINOV2, classes=5, pool="cls_mean"),
    "dinov2 registers classifier": ViTConfig(**DINOV2, registers=3, classes=5, pool="cls_mean"),
    "dinov3": ViTConfig(**DINOV3, rope="float32"),
    "dinov3 swiglu": ViTConfig(**DINOV3, rope="float32", mlp="swiglu", qkv_bias=False),
    "dinov3 classifier": ViTConfig(**DINOV3, rope="float32", pool="mean", classes=5),
    "dinov3 rounded": ViTConfig(**DINOV3, rope="bfloat16"),
    "dinov3 rounded swiglu": ViTConfig(**DINOV3, rope="bfloat16", mlp="swiglu"),
    "deit3": ViTConfig(**BASE, classes=5),
    "vit": ViTConfig(**dict(PLAIN, grid=(2, 6)), classes=5),
    "dino": ViTConfig(**PLAIN),
    "ibot": ViTConfig(**BASE, pool="mean", final_norm="pooled"),
    "distilled": ViTConfig(**PLAIN, registers=1, pool="distilled", classes=5),
    # Its originals take images of one size alone: other preparations would not come back.
    "clip": ViTConfig(**CLIP, projection=9, preprocess=Preprocess(18, 16)),
    "clip without projection": ViTConfig(**dict(CLIP, mlp="gelu"), preprocess=Preprocess(18, 16)),
    "registers, no class token": ViTConfig(**BASE, cls=False, registers=4, pool="mean", final_norm="pooled"),
    "siglip": ViTConfig(
        **PLAIN, cls=False, registers=1, pool="attention", pool_prefix=True, mlp="gelu_tanh", classes=5
    ),
    "norms": ViTConfig(**PLAIN, qk_norm=True, branch_norms=True, pre_norm=True, patch_bias=False, classes=5),
    "no final norm": ViTConfig(**PLAIN, final_norm="none"),
    "no positions": ViTConfig(**PLAIN, positions=False, registers=2),
    "aim": ViTConfig(
        **dict(PLAIN, eps=1e-5),
        **dict(mlp="swiglu", norm="rms", patch_norm=True, cls=False, qkv_bias=False, proj_bias=False, pool="mean"),
    ),
}
PATCHES_ALONE = {"dinov2 registers", "deit3", "registers, no class token", "siglip", "no final norm"}
"""Those for which timm's model has positions for patches alone."""

PAIRS = [
    *(("timm", name) for name in CONFIGS if "rounded" not in name and CONFIGS[name].pool != "cls_mean"),
    *(("transformers", name) for name in CONFIGS if name.startswith("dinov2")),
    *(("transformers", name) for name in ("dinov3", "dinov3 swiglu", "clip", "clip without projection")),
    *(("hub", name) for name in ("dinov2", "dinov2 registers", "dinov3 rounded", "dinov3 rounded swiglu")),
    *(("hub", name) for name in ("deit3", "dino", "ibot", "clip")),
]


@cache
def model_of(name):
    """Random; without a bias of keys where the family has none."""
    model = random_model(CONFIGS[name])
    if model.config.rope is None or not model.config.qkv_bias:
        return model
    params = to_params(model)
    bias = params["blocks.attn.qkv.bias"] * jnp.array([1.0, 0.0, 1.0])[None, :, None, None]
    return from_params(model.config, params | {"blocks.attn.qkv.bias": bias})


@cache
def images_of(name):
    c = CONFIGS[name]
    size = (2, c.grid[0] * c.patch, c.grid[1] * c.patch, c.channels)
    return np.random.default_rng(0).normal(size=size).astype(np.float32)


@cache
def values_of(name):
    """What jaxvit computes in float64."""
    with arithmetic("float64", precise=True):
        out = jax.jit(lambda model, x: model(x))(jaxvit.cast(model_of(name), "float64"), images_of(name))
        return {name: np.asarray(a) for name, a in results(out).items()}


def timm_module(name, path):
    c = CONFIGS[name]
    if c.rope:
        module = build_dinov3_timm(c, gates=2)
    else:
        module = build_timm(c, positioned=name not in PATCHES_ALONE, gates=2 if name == "aim" else 1)
    module.load_state_dict({name: torch.tensor(a) for name, a in load_file(path).items()}, strict=True)
    return module


def transformers_module(name, path):
    c = CONFIGS[name]
    build = build_dinov3 if c.rope else build_clip if c.pre_norm else build_transformers
    module = build(c)
    module.config.save_pretrained(path.parent)
    loaded, info = type(module).from_pretrained(path.parent, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    return loaded


def known(config):
    """What a state dict does not tell."""
    return {name: getattr(config, name) for name in ("heads", "mlp", "eps", "pool", "final_norm", "rope")}


@pytest.mark.parametrize(("layout", "name"), PAIRS)
def test_the_original_loads_it_and_runs_equal(layout, name, tmp_path):
    model = model_of(name)
    path = export(model, tmp_path / "model.safetensors", layout)
    if layout == "hub":
        source, original = path, original_of(path, config=known(model.config))
    elif layout == "timm":
        source = timm_module(name, path)
        original = Original(name, source, model.config)
    else:
        source, original = path, Original(name, transformers_module(name, path), model.config)

    *_, theirs = original.run(images_of(name), torch.float64)
    ours = values_of(name)
    assert ours.keys() == theirs.keys()
    assert max(error(ours[key], theirs[key]) for key in ours) < 1e-10

    options = {} if layout == "timm" else {"config": known(model.config)}
    again = convert.load(source, **options)
    params, wanted = to_params(again), to_params(model)
    added = params.keys() - wanted.keys()
    assert all(np.array_equal(params[key], wanted[key]) for key in wanted)
    assert added <= {"head.linear.bias", "mask_token"} and not any(params[key].any() for key in added)
    same = dict(resampling="bicubic", preprocess=model.config.preprocess)
    if layout == "timm":  # where a projection is a classifier
        same |= dict(classes=model.config.classes or model.config.projection, projection=0)
    same |= {} if model.config.positions else {"grid": (4, 4)}
    same |= {"mask_token": model.config.mask_token}  # zeros where it has to be
    assert replace(again.config, **same) == replace(model.config, **same)


@pytest.mark.parametrize(("layout", "registers"), [(layout, n) for layout in WRITERS for n in (0, 4)])
def test_names_and_shapes_are_those_of_published_files(layout, registers):
    """Checked against files written without the tables of the converter: what they hold comes back, name by name."""
    config = tiny("swiglu", registers)
    state = WRITERS[layout](config, numbers(config))
    back = state_dict(convert.load(state), layout.removeprefix("dinov2/"))
    assert {name: a.shape for name, a in back.items()} == {name: a.shape for name, a in state.items()}
    summed = ("cls_token", "position", "pos_embed")
    assert all(np.array_equal(back[name], state[name]) for name in state if not any(s in name for s in summed))


def hub_dinov3_names(blocks, mlp, bias=True):
    """Those of the parameters and buffers of Meta's `DinoVisionTransformer`."""
    linears = ["attn.proj", *(f"mlp.{name}" for name in mlp)]
    block = [f"{name}.{kind}" for name in ("norm1", "norm2", *linears) for kind in ("weight", "bias")]
    block += ["ls1.gamma", "ls2.gamma", "attn.qkv.weight", *(["attn.qkv.bias", "attn.qkv.bias_mask"] if bias else [])]
    names = {"cls_token", "storage_tokens", "mask_token", "rope_embed.periods", "norm.weight", "norm.bias"}
    names |= {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    return names | {f"blocks.{i}.{name}" for i in range(blocks) for name in block}


def test_names_of_dinov3_are_those_of_its_authors():
    state = state_dict(model_of("dinov3 rounded"), "hub")
    assert state.keys() == hub_dinov3_names(2, ("fc1", "fc2"))
    assert state["mask_token"].shape == (1, 64) and state["rope_embed.periods"].shape == (8,)
    mask = state["blocks.1.attn.qkv.bias_mask"]
    assert mask[:64].all() and not mask[64:128].any() and mask[128:].all()
    assert state_dict(model_of("dinov3 rounded swiglu"), "hub").keys() == hub_dinov3_names(2, ("w1", "w2", "w3"))
    # The 7B has one more norm, which only training reads.
    config = ViTConfig(
        **dict(DINOV3, width=4096, heads=32, depth=1, hidden=8), rope="bfloat16", qkv_bias=False, mask_token=True
    )
    params = {name: np.zeros(a.shape, np.float32) for name, a in to_params(abstract(config)).items()}  # takes no memory
    more = {"local_cls_norm.weight", "local_cls_norm.bias"}
    assert exporting.write_dinov3(config, params).keys() == hub_dinov3_names(1, ("fc1", "fc2"), bias=False) | more


def test_half_precision_stays(tmp_path):
    model = jaxvit.cast(model_of("dinov2 registers"), "bfloat16")
    for layout in LAYOUTS:
        path = export(model, tmp_path / f"{layout}.safetensors", layout)
        assert {str(a.dtype) for a in load_file(path).values()} == {"bfloat16"}
        again = convert.load(path, dtype="bfloat16", config={"heads": 2})
        assert all(np.array_equal(to_params(again)[name], a) for name, a in to_params(model).items())


FOLDERS = [(layout, name) for layout, name in PAIRS if layout != "hub" and name != "norms"]
FOLDERS += [("transformers5", name) for layout, name in PAIRS if layout == "transformers"]


@pytest.mark.parametrize(("layout", "name"), FOLDERS)
def test_a_folder_tells_its_library_everything(layout, name, tmp_path):
    """timm and transformers build the model from config.json alone, load all of it, and run equal."""
    model, folder = model_of(name), export(model_of(name), tmp_path / "model", layout)
    if layout == "timm":
        assert sorted(each.name for each in folder.iterdir()) == ["config.json", "model.safetensors"]
        module = timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert tuple(module.pretrained_cfg["mean"]) == model.config.preprocess.mean
        assert module.pretrained_cfg["input_size"][0] == model.config.channels
        data = timm.data.resolve_model_data_config(module)
        assert int(data["input_size"][-1] // data["crop_pct"]) >= data["input_size"][-1]
    else:
        written = json.loads((folder / "config.json").read_text())
        kind = getattr(transformers, written["architectures"][0])
        module, info = kind.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
        assert not any(info.values()), info
        found = model.config.preprocess
        assert (folder / "preprocessor_config.json").exists() == (model.config.channels == len(found.mean))
        if model.config.channels == len(found.mean):
            p = transformers.AutoImageProcessor.from_pretrained(folder)
            assert (p.size["shortest_edge"], p.crop_size["height"]) == (found.resized[0], found.size[0])
            assert (tuple(p.image_mean), tuple(p.image_std)) == (found.mean, found.std)
    *_, theirs = Original(name, module, model.config).run(images_of(name), torch.float64)
    assert values_of(name).keys() == theirs.keys()
    assert max(error(values_of(name)[key], theirs[key]) for key in theirs) < 1e-10
    again = convert.load(folder)
    same = dict(resampling=model.config.resampling, mask_token=model.config.mask_token)
    same |= {"grid": model.config.grid} if not model.config.positions else {}
    if layout == "timm":
        same |= dict(classes=model.config.classes, projection=model.config.projection)
    rounds = "round" if layout == "timm" else "floor"
    assert replace(again.config, **same) == replace(
        model.config, preprocess=replace(model.config.preprocess, margin=rounds)
    )


@pytest.mark.parametrize("name", [name for layout, name in PAIRS if layout == "transformers"])
def test_names_of_transformers_5_load_strictly_and_from_a_folder(name, tmp_path):
    """The published names load from a folder alone, where the live ones differ."""
    model = model_of(name)
    folder = export(model, tmp_path / "model", "transformers5")
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    module = kind(kind.config_class.from_pretrained(folder))
    live = {name: torch.tensor(a) for name, a in state_dict(model, "transformers5").items()}
    module.load_state_dict(live, strict=True)
    loaded, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(a, live[name]) for name, a in loaded.state_dict().items())
    # What save_pretrained writes are the published names.
    module.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    published = state_dict(model, "transformers")
    prefix = "vision_model." if name == "clip without projection" else ""  # older versions expect it, all read it
    assert {prefix + key: a.shape for key, a in theirs.items()} == {key: a.shape for key, a in published.items()}
    assert all(np.array_equal(a, published[prefix + key]) for key, a in theirs.items())


def test_real_sizes_have_the_architecture_of_their_name():
    """Not one that is only as large."""
    names = {
        "vit_small_patch14_dinov2": ViTConfig.dinov2("small"),
        "vit_base_patch14_reg4_dinov2": ViTConfig.dinov2("base", 4),
        "vit_giant_patch14_dinov2": ViTConfig.dinov2("giant"),
    }
    assert {name: configs.architecture_of(config) for name, config in names.items()} == {name: name for name in names}


def test_folders(tmp_path, capsys):
    """What is replaced, and what is refused."""
    model, folder = model_of("dino"), tmp_path / "dino"
    export(model, folder, "timm")
    with pytest.raises(ConversionError, match="exists: choose another name, or give --overwrite"):
        export(model, folder, "timm")
    export(model_of("vit"), folder, "timm", overwrite=True)
    assert json.loads((folder / "config.json").read_text())["num_classes"] == 5
    with pytest.raises(ConversionError, match=r"the authors' DINO keeps no config.json beside .*\.safetensors"):
        export(model, tmp_path / "other", "hub")
    strange = from_params(replace(model.config, eps=1e-3), to_params(model))
    with pytest.raises(ConversionError, match=r"no architecture with layer norms of epsilon 0.001 .*\.safetensors"):
        export(strange, tmp_path / "other", "timm")
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ConversionError, match="holds other things, such as thesis.tex"):
        export(model, folder, "timm", overwrite=True)
    own = jaxvit.save(model, tmp_path / "own")
    with pytest.raises(ConversionError, match="is a jaxvit model: choose another folder"):
        export(model, own, "timm", overwrite=True)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["dino", "own"]
    assert main(["export", str(own), str(tmp_path / "again"), "--layout", "timm"]) == 0
    assert "local-dir:" in capsys.readouterr().out


MASKS = {
    ("dinov2 registers", "hub"): "mask_token",
    ("dinov2 registers", "transformers"): "embeddings.mask_token",
    ("dinov2 classifier", "transformers"): "dinov2.embeddings.mask_token",
    ("dinov3 rounded", "hub"): "mask_token",
    ("dinov3", "transformers"): "embeddings.mask_token",
    ("ibot", "hub"): "masked_embed",
}


def with_mask(name):
    model = model_of(name)
    mask = jnp.arange(model.config.width, dtype=jnp.float32) / 7
    return from_params(replace(model.config, mask_token=True), to_params(model) | {"mask_token": mask})


@pytest.mark.parametrize(("name", "layout"), MASKS)
def test_a_mask_token_is_written_as_it_came(name, layout):
    model, tensor = with_mask(name), MASKS[name, layout]
    state = state_dict(model, layout)
    assert np.array_equal(state[tensor].ravel(), to_params(model)["mask_token"])
    again = convert.load(state, config=known(model.config))
    assert again.config.mask_token and np.array_equal(to_params(again)["mask_token"], to_params(model)["mask_token"])
    bare = state_dict(model_of(name), layout)  # where the library has such a token, zeros stand for none
    assert tensor not in bare if name == "ibot" else not bare[tensor].any()
    assert left_out(model, layout) == []


@pytest.mark.parametrize("name", ["dinov2 registers", "dinov3", "ibot"])
def test_timm_has_no_place_for_a_mask_token(name):
    model = with_mask(name)
    state, wanted = state_dict(model, "timm"), state_dict(model_of(name), "timm")
    assert state.keys() == wanted.keys() and all(np.array_equal(state[key], wanted[key]) for key in wanted)
    assert left_out(model, "timm") == ["mask_token"] and left_out(model_of(name), "timm") == []


def test_zero_biases_come_and_go():
    """A CLIP's projection has no bias, timm's head has: the zeros that go there come back as none."""
    clip = model_of("clip")
    by_timm = state_dict(clip, "timm")
    assert by_timm["head.bias"].shape == (9,) and not by_timm["head.bias"].any()
    config = replace(clip.config, classes=9, projection=0)
    biased = from_params(config, to_params(clip) | {"head.linear.bias": jnp.zeros(9)})
    for layout in LAYOUTS:
        one, other = state_dict(clip, layout), state_dict(biased, layout)
        assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    wrong = from_params(config, to_params(clip) | {"head.linear.bias": jnp.ones(9)})
    with pytest.raises(ConversionError, match="has no place for head.linear.bias"):
        state_dict(wrong, "transformers")


ROPE = dict(DINOV3, rope="float32")
REFUSED = {
    "timm: rounded periods": ("timm", dict(DINOV3, rope="bfloat16"), "computes the periods .* in float32"),
    "timm: both pools": ("timm", dict(BASE, pool="cls_mean"), "pool is 'cls_mean', there it is 'cls' or"),
    "timm: distilled with registers": (
        "timm",
        dict(PLAIN, registers=3, pool="distilled"),
        "registers is 3, there it is 1",
    ),
    "timm: biased patches before a norm": ("timm", dict(CLIP, patch_bias=True), "no place for patch_embed.bias"),
    "timm: rotary without registers": ("timm", dict(ROPE, registers=0), "no registers"),
    "timm: key biases": ("timm", ROPE, "keys have a bias"),
    "transformers: key biases": ("transformers", ROPE, "keys have a bias"),
    "transformers: rounded periods": ("transformers", dict(DINOV3, rope="bfloat16"), "computes the periods"),
    "transformers: plain": ("transformers", PLAIN, "use the layout timm"),
    "transformers: classifier on [CLS]": (
        "transformers",
        dict(DINOV2, classes=5),
        "pool is 'cls', there it is 'cls_mean'",
    ),
    "transformers: no class token": (
        "transformers",
        dict(DINOV2, cls=False, pool="mean"),
        "cls is False.*pool is 'mean'",
    ),
    "transformers: no whole ratio": (
        "transformers",
        dict(BASE, hidden=100),
        "hidden is 100, a size that does not occur",
    ),
    "transformers: no square": ("transformers", dict(DINOV2, grid=(2, 3)), "a grid of 2x3, there it is a square"),
    "transformers: DINOv3 classifier": ("transformers", dict(ROPE, classes=5), "classes is 5, there it is 0"),
    "hub: key biases": ("hub", dict(DINOV3, rope="bfloat16"), "keys have a bias"),
    "hub: periods in float32": ("hub", ROPE, "in bfloat16, and this model has them in float32"),
    "hub: DINOv2 classifier": (
        "hub",
        dict(BASE, registers=2, classes=5),
        "Meta's DINOv2 .* classes is 5, there it is 0",
    ),
    "hub: DeiT": ("hub", dict(PLAIN, classes=5), "use the layout timm"),
    "hub: distilled": ("hub", dict(PLAIN, registers=1, pool="distilled"), "use the layout timm"),
    "hub: DINOv2 or iBOT": ("hub", dict(BASE, resampling="bicubic_offset"), "may be either"),
    "hub: no projection": ("hub", CLIP, "no projection"),
    "hub: mean without its norm": (
        "hub",
        dict(BASE, pool="mean"),
        "iBOT .* final_norm is 'tokens', there it is 'pooled'",
    ),
    "hub: norms of queries": ("hub", dict(PLAIN, qk_norm=True), "qk_norm is True, there it is False"),
    "no layout": ("flax", BASE, "no layout 'flax'; there are timm, transformers, transformers5, hub"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_have_reasons(case):
    layout, fields, reason = REFUSED[case]
    with pytest.raises(ConversionError, match=reason):
        state_dict(random_model(ViTConfig(**fields)), layout)


def test_what_does_not_come_back_equal_is_never_written(monkeypatch, tmp_path):
    def wrong(config, params):
        return exporting.write_timm(config, params | {"norm.bias": params["norm.bias"] + 1})

    monkeypatch.setattr(exporting, "TIMM", replace(exporting.TIMM, write=wrong))
    with pytest.raises(ConversionError, match="norm.bias would not come back equal"):
        export(model_of("dino"), tmp_path / "model.safetensors", "timm")
    assert not [*tmp_path.iterdir()]


def test_numbers_that_are_none_are_refused():
    params = to_params(model_of("dino"))
    broken = from_params(CONFIGS["dino"], params | {"norm.bias": params["norm.bias"].at[3].set(jnp.nan)})
    with pytest.raises(ConversionError, match="norm.bias holds NaN or infinity"):
        state_dict(broken, "timm")


def test_files_are_not_overwritten(tmp_path):
    path, model = tmp_path / "model.safetensors", model_of("dino")
    path.write_text("mine")
    with pytest.raises(ConversionError, match="exists: choose another name, or give --overwrite"):
        export(model, path, "timm")
    assert path.read_text() == "mine"
    export(model, path, "timm", overwrite=True)
    assert load_file(path).keys() == state_dict(model, "timm").keys()
    assert path.stat().st_mode & 0o777 == 0o644
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}  # without which some versions of transformers refuse it
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    with pytest.raises(ConversionError, match="exists: choose another name$"):
        export(model, folder, "timm", overwrite=True)
    with pytest.raises(ConversionError, match="must end in .safetensors, for a file, or have no suffix, for a folder"):
        export(model, tmp_path / "model.pth", "timm")
    with pytest.raises(ConversionError, match="cannot write"):
        export(model, path / "below.safetensors", "timm")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["folder.safetensors", "model.safetensors"]


@pytest.mark.parametrize("how", [OSError("No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(how, monkeypatch, tmp_path):
    def interrupted(state, path, **options):
        save_file(state, path, **options)
        raise how

    path = tmp_path / "model.safetensors"
    path.write_text("mine")
    monkeypatch.setattr(exporting, "save_file", interrupted)
    with pytest.raises(ConversionError if isinstance(how, OSError) else KeyboardInterrupt):
        export(model_of("dino"), path, "timm", overwrite=True)
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"] and path.read_text() == "mine"


def test_command(tmp_path, capsys):
    model, folder, path = model_of("dino"), tmp_path / "dino", tmp_path / "dino.safetensors"
    jaxvit.save(model, folder)
    assert main(["export", str(folder), str(path), "--layout", "hub"]) == 0
    assert "wrote" in capsys.readouterr().out
    written, wanted = load_file(path), state_dict(model, "hub")
    assert written.keys() == wanted.keys() and all(np.array_equal(written[name], wanted[name]) for name in wanted)
    jaxvit.save(with_mask("dino"), tmp_path / "masked")
    assert main(["export", str(tmp_path / "masked"), str(tmp_path / "timm.safetensors"), "--layout", "timm"]) == 0
    assert "left out" in (out := capsys.readouterr().out) and "mask_token" in out
    assert main(["export", str(tmp_path / "masked"), str(tmp_path / "of-timm"), "--layout", "timm"]) == 0
    assert "half a pixel" in capsys.readouterr().out
    assert main(["export", str(folder), str(path), "--layout", "hub"]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["export", str(folder), str(path), "--layout", "transformers", "--overwrite"]) == 1
    assert "use the layout timm" in capsys.readouterr().err


UNUSUAL = [
    jaxvit.Preprocess((256, 320), (224, 280), interpolation="bilinear"),
    jaxvit.Preprocess(96, 96, fit="stretch", interpolation="lanczos", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)),
    jaxvit.Preprocess((64, 96), (64, 96), fit="stretch", whole=False),
    jaxvit.Preprocess(72, 64, fit="stretch"),
    jaxvit.Preprocess(64, 64, fit="none"),
    jaxvit.Preprocess(80, 64, fit="contain", fill="mean"),
]


@pytest.mark.parametrize("prepared", UNUSUAL, ids=lambda p: p.in_words())
@pytest.mark.parametrize("layout", ["timm", "transformers"])
def test_a_preparation_is_written_in_full_or_refused(layout, prepared, tmp_path):
    model = model_of("dinov2")
    model = from_params(replace(model.config, preprocess=prepared), to_params(model))
    try:
        folder = export(model, tmp_path / "model", layout)
    except ConversionError as error:
        assert "cannot ask for how images are prepared" in str(error) and not (tmp_path / "model").exists()
        assert (layout, UNUSUAL.index(prepared)) in {("timm", 2), ("timm", 3), ("timm", 4)} | {
            ("transformers", 0), ("transformers", 5)
        }  # fmt: skip
        return
    assert replace(convert.load(folder).config.preprocess, margin="floor") == prepared
