"""timm's plain Vision Transformers: all of its `vision_transformer` and `deit` that are rows of pre-norm blocks.

Names and shapes do not tell everything: the activation, the epsilon, the pooling, often the number of heads. A live
module tells them; a folder or hub id names its architecture, and `architectures.json` holds what timm makes of each.
A bare file is taken where only one published family fits, and else asks for the architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxvit import Preprocess

from .engine import ConversionError, Decided, Layout, Tensors
from .meta import Names, read_config, table
from .published import architectures, kinds

PACKED, SPLIT = Names(), Names(gates=("fc1_g", "fc1_x"))
"""A SwiGLU whose gate and value are one matrix, and one of two."""


SPLIT_GATE = "blocks.0.mlp.fc1_g.weight"
"""Only the second has it."""


def names_of(tensors: Tensors) -> Names:
    return SPLIT if SPLIT_GATE in tensors else PACKED


def config(tensors: Tensors, hints: Mapping[str, Any]) -> Decided:
    if unclear := [words for words, fields in not_told(tensors).items() if not hints.keys() >= set(fields)]:
        fields = dict.fromkeys(f for words in unclear for f in not_told(tensors)[words] if f not in hints)
        raise ConversionError(
            f"names and shapes of this timm checkpoint do not tell {' and '.join(unclear)}: say which architecture it "
            f"is, such as architecture='vit_base_patch16_clip_224' or --architecture vit_base_patch16_clip_224, or say "
            f"{', '.join(fields)} (--set {next(iter(fields))}=..)"
        )
    if "pos_embed" not in tensors and hints.get("positions") is not False:
        raise ConversionError(
            "this timm checkpoint has no positions (pos_embed): a model with rotary positions, such as DINOv3, is "
            "known by its registers (storage_tokens, reg_token); if it really has none, say --set positions=false "
            "(config={'positions': False})"
        )
    # timm gives the embedding of patches a bias just where no norm follows it, and every classifier one.
    always = {"patch_bias": "norm_pre.weight" not in tensors}
    found = read_config(
        tensors,
        hints,
        names_of(tensors),
        families=("timm",),
        alone=False,
        always=always,
        resampling="bicubic_antialias",
    )
    c = found.config
    custom = (c.width, c.depth) not in {kind[1:3] for kind in kinds()}
    guessed = ("mlp", "eps", "final_norm", "pool") if custom else ()
    assumed: dict[str, str] = dict.fromkeys(guessed, "as most of timm's models have it")
    assumed["preprocess"] = "timm's models differ in it, and the file does not tell"
    return found.assuming({**assumed, **found.assumed}, hints)


def not_told(tensors: Tensors) -> dict[str, tuple[str, ...]]:
    """What cannot be known of a checkpoint without its architecture -> the fields of the config that it stands for."""
    unclear: dict[str, tuple[str, ...]] = {}
    if "norm_pre.weight" in tensors:
        unclear["its activation (CLIP's, or the exact GELU)"] = ("mlp", "eps")
    if "cls_token" not in tensors:
        unclear["its activation and pooling"] = ("heads", "mlp", "eps", "pool")
    elif "blocks.0.norm1.bias" not in tensors or "blocks.0.attn.norm.weight" in tensors or "norm.weight" not in tensors:
        unclear["its pooling and epsilon"] = ("pool", "eps")
    return unclear


def is_timm(tensors: Tensors, hints: Mapping[str, Any]) -> bool:
    """DINO's own files have the same names, but no classifier, LayerScale or registers."""
    own = ("head.weight", "blocks.0.ls1.gamma", "reg_token", "norm_pre.weight", "attn_pool.latent", "dist_token")
    if "blocks.0.attn.q_bias" in tensors:  # an EVA's or a BEiT's
        return False
    return hints.get("library") == "timm" or "cls_token" not in tensors or any(name in tensors for name in own)


LAYOUT = Layout(
    name="timm",
    anchors=("patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc2.weight"),
    config=config,
    rules=lambda config, tensors: table(config, tensors, names_of(tensors)),
    accepts=is_timm,
)


# What is known beside tensors -----------------------------------------------------------------------------------------

FACTS = ("heads", "mlp", "eps", "final_norm", "pool", "pool_prefix")
"""Fields of a config that an architecture decides, and tensors do not show."""


SIZES = {"depth": "depth", "width": "embed_dim", "cls": "class_token"}
"""Fields of a config that an architecture has too, and timm's arguments that change them. Tensors must agree."""


def architecture_hints(name: str) -> dict[str, Any]:
    """What is known of a timm architecture, its sizes among it; "vit_base_patch16_224.augreg_in1k" is one with a tag.

    Raises:
      ConversionError: none of timm's plain Vision Transformers.
    """
    known = architectures().get(name.split(".")[0])
    if known is None:
        raise ConversionError(f"{name} is none of timm's plain Vision Transformers; docs/architectures.md lists them")
    if "refused" in known:
        raise ConversionError(f"{name} cannot be converted: {known['refused']}")
    resize, crop, mean, std = known["preprocess"]
    preprocess = Preprocess(resize, crop, tuple(mean), tuple(std))
    facts = {field: known[field] for field in FACTS} | dict(zip(SIZES, known["shape"], strict=True))
    return {"library": "timm", "architecture": name, **facts, "preprocess": preprocess}


POOLS = {"token": "cls", "avg": "mean", "map": "attention"}


def folder_hints(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config.json of a timm folder tells: architecture, changes to it, how images are prepared."""
    hints = architecture_hints(str(config["architecture"]))
    changed = {name: value for name, value in (config.get("model_args") or {}).items() if name not in SHAPES}
    if changed:
        raise ConversionError(f"the config.json changes the architecture by {changed}, which is not known here")
    if pool := config.get("global_pool"):  # "" leaves tokens as they are
        if pool not in POOLS:
            raise ConversionError(f"the config.json asks for the pooling {pool!r}; known: {', '.join(POOLS)}")
        hints["pool"] = hints["pool"] if hints["pool"] == "distilled" and pool == "token" else POOLS[pool]
    declared = config.get("model_args") or {}
    hints |= {field: declared[argument] for field, argument in SIZES.items() if argument in declared}
    if declared.get("pos_embed") == "none":
        hints["positions"] = False
    if size := (config.get("model_args") or {}).get("img_size") or (config.get("pretrained_cfg") or {}).get(
        "input_size"
    ):
        hints["image"] = pixels(size)
    return hints | preprocess_hints(config.get("pretrained_cfg") or {})


def pixels(size: Any) -> tuple[int, int]:
    """Height and width from one number, both, or those behind a number of channels."""
    try:
        height, width = (size, size) if isinstance(size, int) else size[-2:]
        return int(height), int(width)
    except (TypeError, ValueError) as error:
        raise ConversionError(f"the config makes no sense: {size!r} is no size of images") from error


SHAPES = ("img_size", "patch_size", "dynamic_img_size", "dynamic_img_pad", "num_classes", "reg_tokens", "class_token")
SHAPES += ("init_values", "depth", "embed_dim", "mlp_ratio", "no_embed_class", "qkv_bias", "proj_bias", "qk_norm")
SHAPES += ("scale_attn_norm", "scale_mlp_norm", "pre_norm", "embed_norm_layer", "pos_embed", "in_chans")
"""Arguments of timm's models that tensors show, or that do not matter."""


def preprocess_hints(pretrained: Mapping[str, Any]) -> dict[str, Any]:
    size, crop = pretrained.get("input_size"), pretrained.get("crop_pct", 1.0)
    if not size:
        return {}
    try:
        side = min(map(int, size[-2:]))
        mean, std = (tuple(float(x) for x in pretrained[name]) for name in ("mean", "std"))
        hints: dict[str, Any] = {"preprocess": Preprocess(int(side // crop), side, mean, std)}  # type: ignore[arg-type]
        if size[-1] != size[-2]:
            trained = f"squares, as jaxvit.prepare makes them; the model was trained on {size[-2]}x{size[-1]}"
            hints["unsure"] = {"preprocess": trained}
        return hints
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConversionError(f"the pretrained_cfg in config.json makes no sense: {error!r}") from error


def module_hints(module: Any) -> dict[str, Any]:
    """What a live timm model tells.

    Raises:
      ConversionError: it is not a row of plain blocks; the message says where it differs.
    """
    block = module.blocks[0]
    if type(module).__name__ == "Eva":
        return dinov3_hints(module)
    if reason := refusal(module):
        raise ConversionError(f"this {type(module).__name__} cannot be converted: {reason}")
    distilled = hasattr(module, "head_dist") or hasattr(module, "dist_token")
    final = "none" if is_identity(module.norm) else "tokens"
    hints: dict[str, Any] = {
        "library": "timm",
        "heads": block.attn.num_heads,
        "depth": len(module.blocks),
        "eps": block.norm1.eps,
        "mlp": activation_of(block.mlp),
        "final_norm": final if is_identity(module.fc_norm) else "pooled",
        "pool": "distilled" if distilled else POOLS[module.global_pool],
        "pool_prefix": bool(module.global_pool == "map" and module.pool_include_prefix),
    }
    if getattr(module, "pos_embed", None) is not None:
        hints["grid"] = tuple(module.patch_embed.grid_size)
    hints["positions"] = "grid" in hints
    return hints | preprocess_hints(getattr(module, "pretrained_cfg", None) or {})


def is_identity(module: Any) -> bool:
    return type(module).__name__ == "Identity"


def activation_of(mlp: Any) -> str:
    """The config's name of an MLP; empty if it is none of those known."""
    act = mlp.act
    kind = type(act).__name__
    gated = hasattr(mlp, "fc1_g") or getattr(mlp, "gate_last", None) is False
    if gated:
        return "swiglu" if kind in ("SiLU", "Swish") else ""
    if hasattr(mlp, "gate_last"):
        return ""
    tanh = kind == "GELUTanh" or (kind == "GELU" and getattr(act, "approximate", "none") == "tanh")
    return "gelu_tanh" if tanh else {"GELU": "gelu", "QuickGELU": "quick_gelu"}.get(kind, "")


KINDS = {
    "ParallelScalingBlock": "its blocks run attention and MLP side by side on one input",
    "DiffParallelScalingBlock": "its blocks run differential attention and the MLP side by side",
    "ParallelThingsBlock": "its blocks run several attentions and MLPs side by side",
    "ResPostBlock": "its blocks normalise what a branch returns, not what it reads",
    "DiffAttention": "its attention is the difference of two softmaxes",
}


def refusal(module: Any) -> str:
    """Why a timm model is not a row of plain pre-norm blocks; empty if it is."""
    if type(module).__name__ not in ("VisionTransformer", "VisionTransformerDistilled"):
        return f"a {type(module).__name__} is not a plain Vision Transformer"
    block = module.blocks[0]
    kind, attention = type(block).__name__, type(block.attn).__name__ if hasattr(block, "attn") else ""
    if kind != "Block":
        return KINDS.get(kind, f"its blocks are {kind}s")
    if attention != "Attention":
        return KINDS.get(attention, f"its attention is {attention}")
    if getattr(block.attn, "gate", None) is not None:
        return "its attention has a gate"
    if block.attn.head_dim * block.attn.num_heads != module.embed_dim:
        return "its heads are not a partition of the width"
    if type(module.patch_embed).__name__ != "PatchEmbed":
        return f"it embeds patches with a {type(module.patch_embed).__name__}"
    if not activation_of(block.mlp):
        return f"its MLP is a {type(block.mlp).__name__} with {block.mlp.act}"
    if module.global_pool not in POOLS:
        return f"its pooling is {module.global_pool!r}"
    if module.global_pool == "avg" and module.pool_include_prefix and module.num_prefix_tokens:
        return "its average pooling includes the tokens before the patches"
    if len({(type(b).__name__, b.attn.num_heads, b.norm1.eps, activation_of(b.mlp)) for b in module.blocks}) > 1:
        return "its blocks differ"
    norms = {type(norm).__name__ for norm in (block.norm1, block.norm2)}
    if not norms <= {"LayerNorm", "LayerNormFp32", "RmsNorm"}:
        return f"its norms are {', '.join(sorted(norms))}"
    return ""


def dinov3_hints(module: Any) -> dict[str, Any]:
    """What a live timm `Eva` tells, if it is a DINOv3."""
    block, rope = module.blocks[0], module.rope
    kinds = [type(part).__name__ for part in (block, block.attn, rope)]
    plain = block.attn.rotate_half and block.attn.gate is None if kinds[1] == "EvaAttention" else False
    if kinds != ["EvaBlock", "EvaAttention", "RotaryEmbeddingDinoV3"] or not plain or rope.temperature != 100.0:
        raise ConversionError(f"this Eva is no DINOv3: it is made of {', '.join(kinds)}")
    return {
        "library": "timm",
        "heads": block.attn.num_heads,
        "depth": len(module.blocks),
        "eps": block.norm1.eps,
        "mlp": activation_of(block.mlp),
        "pool": POOLS[module.global_pool],
    } | preprocess_hints(getattr(module, "pretrained_cfg", None) or {})
