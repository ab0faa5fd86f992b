"""The files that transformers and timm keep beside weights, and build a model from: what a state dict does not tell.

Written without either library. `convert.export` puts them into the folders that it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxvit import ViTConfig

from .engine import ConversionError
from .preparation import to_timm, to_transformers
from .published import architectures

Json = dict[str, Any]
Beside = Callable[[ViTConfig, str], Mapping[str, Json]]
"""For a config and the type of the weights, such as "float32": name of a file -> its content."""


# transformers ---------------------------------------------------------------------------------------------------------

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}


def transformers_files(kind: str, own: Json, processor: str, c: ViTConfig, dtype: str) -> Mapping[str, Json]:
    """config.json and preprocessor_config.json for the class `kind`; `own` is what its family alone has."""
    config = dict(
        architectures=[kind],
        dtype=dtype,
        hidden_size=c.width,
        num_hidden_layers=c.depth,
        num_attention_heads=c.heads,
        image_size=c.grid[0] * c.patch,
        patch_size=c.patch,
        num_channels=c.channels,
        layer_norm_eps=c.eps,
    )
    if c.channels != len(c.preprocess.mean):
        return {"config.json": config | own}  # its images are arrays that users normalise
    return {"config.json": config | own, "preprocessor_config.json": to_transformers(c.preprocess, processor)}


def transformers_dinov2(c: ViTConfig, dtype: str) -> Mapping[str, Json]:
    family = "Dinov2WithRegisters" if c.registers else "Dinov2"
    own: Json = dict(
        model_type="dinov2_with_registers" if c.registers else "dinov2",
        hidden_act="gelu",
        mlp_ratio=ratio_of(c),
        use_swiglu_ffn=c.mlp == "swiglu",
        qkv_bias=True,
    )
    if c.registers:
        own["num_register_tokens"] = c.registers
    if c.classes:
        own["id2label"] = {str(i): f"LABEL_{i}" for i in range(c.classes)}
        own["label2id"] = {f"LABEL_{i}": i for i in range(c.classes)}
    kind = f"{family}{'ForImageClassification' if c.classes else 'Model'}"
    return transformers_files(kind, own, "Bit", c, dtype)


def ratio_of(c: ViTConfig) -> int | None:
    """What transformers' DINOv2 derives the size of the MLP from: a whole multiple of the width; None if none fits."""
    gated = c.mlp == "swiglu"
    sizes = {n: (int(n * c.width * 2 / 3) + 7) // 8 * 8 if gated else n * c.width for n in range(32, 0, -1)}
    return {size: n for n, size in sizes.items()}.get(c.hidden)


def transformers_dinov3(c: ViTConfig, dtype: str) -> Mapping[str, Json]:
    gated = c.mlp == "swiglu"
    own = dict(
        model_type="dinov3_vit",
        hidden_act="silu" if gated else "gelu",
        intermediate_size=c.hidden,
        use_gated_mlp=gated,
        num_register_tokens=c.registers,
        query_bias=c.qkv_bias,
        key_bias=False,
        value_bias=c.qkv_bias,
        proj_bias=True,
        mlp_bias=True,
        rope_theta=c.rope_base,
    )
    return transformers_files("DINOv3ViTModel", own, "Bit", c, dtype)


def transformers_clip(c: ViTConfig, dtype: str) -> Mapping[str, Json]:
    own: Json = dict(model_type="clip_vision_model", hidden_act=ACTIVATIONS[c.mlp], intermediate_size=c.hidden)
    own |= {"projection_dim": c.projection} if c.projection else {}
    kind = f"CLIPVisionModel{'WithProjection' if c.projection else ''}"
    return transformers_files(kind, own, "CLIP", c, dtype)


# timm -----------------------------------------------------------------------------------------------------------------

DINOV3 = "vit_small_patch16_dinov3"
POOLS = {"cls": "token", "distilled": "token", "mean": "avg", "attention": "map"}


def timm_files(c: ViTConfig, patches_alone: bool) -> Mapping[str, Json]:
    """config.json for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    An architecture brings what JSON cannot say: kinds of norms, with their epsilon, and of gated MLPs. Arguments say
    all the rest.

    Args:
      patches_alone: whether positions are those of the patches, and of no other tokens.

    Raises:
      ConversionError: timm has no architecture with these norms and this MLP.
    """
    args: Json = dict(
        img_size=[n * c.patch for n in c.grid],
        patch_size=c.patch,
        in_chans=c.channels,
        embed_dim=c.width,
        depth=c.depth,
        num_classes=c.classes,
        init_values=1e-5 if c.layer_scale else None,
        dynamic_img_size=True,
        qkv_bias=c.qkv_bias,
    )
    if c.rope:
        if c.eps != 1e-5:
            raise no_architecture(c)
        base = DINOV3
        args |= dict(num_heads=c.heads, mlp_ratio=c.hidden / c.width, num_reg_tokens=c.registers)
        args |= dict(img_size=c.grid[0] * c.patch, global_pool=POOLS[c.pool])
        if c.mlp == "swiglu":
            args |= dict(swiglu_mlp=True, swiglu_align_to=1)  # timm's way to ask for gate and value apart
    else:
        base = architecture_of(c)
        args |= dict(
            # A gate and a value in one matrix count twice; AIMv2 has them apart.
            mlp_ratio=(2 if c.mlp == "swiglu" and c.norm == "layer" else 1) * c.hidden / c.width,
            class_token=c.cls,
            reg_tokens=c.registers - (c.pool == "distilled"),
            no_embed_class=patches_alone,
            pos_embed="learn" if c.positions else "none",
            proj_bias=c.proj_bias,
            qk_norm=c.qk_norm,
            scale_attn_norm=c.branch_norms,
            scale_mlp_norm=c.branch_norms,
            pre_norm=c.pre_norm,
        )
        args |= {} if c.patch_norm else {"embed_norm_layer": None}
        args |= told_apart(c, architectures()[base])
    pretrained = to_timm(c.preprocess) | dict(
        fixed_input_size=False,
        num_classes=c.classes,
        pool_size=None,
        first_conv="patch_embed.proj",
        classifier=["head", "head_dist"] if c.pool == "distilled" else "head",
    )
    if c.channels != len(c.preprocess.mean):  # its images are arrays that users normalise
        pretrained["input_size"] = [c.channels, *c.preprocess.size]
        del pretrained["mean"], pretrained["std"]
    config = dict(architecture=base, num_classes=c.classes, num_features=c.width)
    return {"config.json": config | {"model_args": args, "pretrained_cfg": pretrained}}


def told_apart(c: ViTConfig, known: Mapping[str, Any]) -> Json:
    """Arguments for what an architecture decides and tensors do not show, where the model differs from it."""
    args: Json = {} if known["heads"] == c.heads else {"num_heads": c.heads}
    if known["mlp"] != c.mlp:
        args["act_layer"] = c.mlp
    if (known["final_norm"], known["pool"]) != (c.final_norm, c.pool):
        args |= dict(global_pool=POOLS[c.pool], fc_norm=c.final_norm == "pooled", final_norm=c.final_norm != "none")
    if known["pool_prefix"] != c.pool_prefix:
        args["pool_include_prefix"] = c.pool_prefix
    return args


def architecture_of(c: ViTConfig) -> str:
    """The architecture of timm that is most like this model, of those with its norms and kind of MLP."""

    def likeness(name: str) -> tuple[int, ...]:
        known = architectures()[name]
        facts = sum(known[field] == getattr(c, field) for field in ("heads", "mlp", "final_norm", "pool"))
        marks = (f"patch{c.patch}_" in name, ("_reg" in name) == (c.registers > 0), ("clip" in name) == c.pre_norm)
        crop = known["prepared"][0]["input_size"][1] == c.grid[0] * c.patch
        return facts, known["shape"] == [c.depth, c.width, c.cls], sum(marks), crop, -len(name)

    fit = [
        name
        for name, known in architectures().items()
        if "refused" not in known
        and not name.startswith("test_")  # timm's own tests use them
        and known["eps"] == c.eps
        and (known["mlp"] == "swiglu") == (c.mlp == "swiglu")
        and (known["pool"] == "distilled") == (c.pool == "distilled")
        and name.startswith("aimv2") == (c.norm == "rms")
    ]
    if not fit or (c.patch_norm and c.norm != "rms"):
        raise no_architecture(c)
    return max(fit, key=likeness)


def no_architecture(c: ViTConfig) -> ConversionError:
    return ConversionError(
        f"timm has no architecture with {c.norm} norms of epsilon {c.eps:g}{' after patches' * c.patch_norm} and a "
        f"{c.mlp} MLP, and a config.json cannot ask for them: export a single file, which ends in .safetensors"
    )
