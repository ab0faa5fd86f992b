"""timm's plain Vision Transformers: all of its `vision_transformer` and `deit` that are rows of pre-norm blocks.

Names and shapes do not tell everything: the activation, the epsilon, the pooling, often the number of heads. A live
module tells them; a folder or hub id names its architecture, and `architectures.json` holds what timm makes of each.
A bare file is taken where only one published family fits, and else asks for the architecture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .engine import ConversionError, Decided, Layout, Tensors
from .meta import Names, field_of, read_config, table
from .preparation import of_timm
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
    hints, repooled = as_shown(tensors, hints)
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
    assumed["preprocess"] = "timm's models differ in it, and the file does not tell; --architecture NAME does"
    if c.final_norm == "pooled" and c.cls and hints.get("library") != "timm":
        both = "as timm and MAE have it where the last norm reads what is pooled"
        assumed |= {"pool": both, "eps": both}
        assumed["resampling"] = "timm's rule; MAE's own code interpolates without antialiasing, which is bicubic"
    return found.assuming({**assumed, **found.assumed, **repooled}, hints)


def as_shown(tensors: Tensors, hints: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """The hints, with the final norm that the tensors have, and what about that is an assumption.

    An architecture names its usual pooling. With another, `create_model(.., global_pool="avg")`, the last norm stands
    elsewhere; the pooling is then the usual one of that place, unless it was told.
    """
    shown = last_norm(tensors)
    told = hints.get("told", ())
    if not shown or hints.get("final_norm", shown) == shown or "final_norm" in told:
        return hints, {}
    hints = {**hints, "final_norm": shown}
    if "pool" in told:
        return hints, {}
    del hints["pool"]
    return hints, {"pool": f"its last norm does not stand where it does in {hints['architecture']}"}


def last_norm(tensors: Tensors) -> str:
    """Where the tensors have the last norm; empty if nowhere."""
    return "tokens" if "norm.weight" in tensors else "pooled" if "fc_norm.weight" in tensors else ""


def not_told(tensors: Tensors) -> dict[str, tuple[str, ...]]:
    """What cannot be known of a checkpoint without its architecture -> the fields of the config that it stands for."""
    unclear: dict[str, tuple[str, ...]] = {}
    if "norm_pre.weight" in tensors:
        unclear["its activation (CLIP's, or the exact GELU)"] = ("mlp", "eps")
    if "cls_token" not in tensors:
        unclear["its activation and pooling"] = ("heads", "mlp", "eps", "pool")
    elif "blocks.0.norm1.bias" not in tensors or "blocks.0.attn.norm.weight" in tensors or not last_norm(tensors):
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


DINOV3 = re.compile(r"vit_(tiny|small|small_plus|base|large|huge_plus|7b)_patch16_dinov3(_qkvb)?")
"""timm's names of `convert.dinov3`'s models, whose class is another one."""
SIZES = ("depth", "width", "cls")
"""Fields of a config that an architecture decides too; tensors must agree."""


def architecture_hints(name: str) -> dict[str, Any]:
    """What is known of a timm architecture, its sizes among it; "vit_base_patch16_224.augreg_in1k" is one with a tag.

    Raises:
      ConversionError: none of timm's plain Vision Transformers.
    """
    base, _, tag = name.partition(".")
    if DINOV3.fullmatch(base):  # its tensors tell the rest
        return {"library": "timm", "architecture": name, "pool": "mean"}
    known = architectures().get(base)
    if known is None:
        raise ConversionError(f"{name} is none of timm's plain Vision Transformers; docs/architectures.md lists them")
    if "refused" in known:
        raise ConversionError(f"{name} cannot be converted: {known['refused']}")
    facts = {field: known[field] for field in FACTS} | dict(zip(SIZES, known["shape"], strict=True))
    return {"library": "timm", "architecture": name, "fixed": True, **facts, **tag_hints(base, tag, known["prepared"])}


def tag_hints(name: str, tag: str, prepared: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How images are prepared for the weights of a tag; without one, as for timm's default, and whether others differ.

    Raises:
      ConversionError: timm has no such tag.
    """
    tags = [each for cfg in prepared for each in cfg["tags"]]
    if tag and tag not in tags:
        raise ConversionError(f"timm has no weights {name}.{tag}; it has {', '.join(tags) or 'none'} (give no tag)")
    cfg = next((cfg for cfg in prepared if tag in cfg["tags"]), prepared[0])
    hints = {"preprocess": of_timm(cfg), "preparation": f"timm's for {name}{f'.{tag}' if tag else ''}"}
    if not tag and len(prepared) > 1:
        others = ", ".join(cfg["tags"][0] for cfg in prepared[1:])
        first = f"as for {name}.{cfg['tags'][0]}" if cfg["tags"] else "timm's default"
        hints["unsure"] = {"preprocess": f"{first}; other weights of this name, such as {others}, have another"}
    return hints


POOLS = {"token": "cls", "avg": "mean", "map": "attention"}
UNPOOLED = "timm's model pools nothing (global_pool='') and returns all tokens"
"""Why a pooling is an assumption, for a model that has none."""


def folder_hints(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config.json of a timm folder tells: architecture, changes to it, how images are prepared."""
    pretrained = config.get("pretrained_cfg") or {}
    name = str(config["architecture"])
    hints = architecture_hints(name.split(".")[0] if preprocess_hints(pretrained) else name)
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, Mapping):
        raise ConversionError(f"the config.json has model_args {arguments!r}: expected names and values")
    hints |= argument_hints(arguments, hints)
    pools = {str(pool) for pool in (config.get("global_pool"), arguments.get("global_pool")) if pool is not None}
    if len(pools) > 1:
        raise ConversionError(f"the config.json asks for several poolings: {', '.join(map(repr, sorted(pools)))}")
    unsure: dict[str, str] = {}
    for pool in pools:
        if pool and pool not in POOLS:
            raise ConversionError(f"the config.json asks for the pooling {pool!r}; known: {', '.join(POOLS)}")
        if not pool:
            unsure["pool"] = UNPOOLED
        elif hints["pool"] != "distilled" or pool != "token":
            hints["pool"] = POOLS[pool]
    if pools or "fc_norm" in arguments:
        hints["told"] = (*hints.get("told", ()), "pool")
    if arguments.get("pool_include_prefix") and hints["pool"] == "mean":
        raise ConversionError("the config.json asks for an average that includes the tokens before the patches")
    if arguments.get("pos_embed") == "none":
        hints["positions"] = False
    resamples = arguments.get("dynamic_img_size") or not arguments.get("strict_img_size", True)
    hints["fixed"] = bool(hints.get("fixed") and pretrained.get("fixed_input_size", True) and not resamples)
    if size := arguments.get("img_size") or pretrained.get("input_size"):
        hints["image"] = pixels(size)
    if "pool_prefix" in hints:
        hints["pool_prefix"] = hints["pool_prefix"] and hints["pool"] == "attention"
    images = preprocess_hints(pretrained)
    unsure |= {} if images else hints.get("unsure", {})
    return hints | images | {"unsure": unsure}


def pixels(size: Any) -> tuple[int, int]:
    """Height and width from one number, both, or those behind a number of channels."""
    try:
        height, width = (size, size) if isinstance(size, int) else size[-2:]
        return int(height), int(width)
    except (TypeError, ValueError) as error:
        raise ConversionError(f"the config makes no sense: {size!r} is no size of images") from error


SHOWN = (
    "patch_size",
    "in_chans",
    "num_classes",
    "reg_tokens",
    "init_values",
    "mlp_ratio",
    "no_embed_class",
    "pos_embed",
    "embed_norm_layer",
)
SHOWN += ("scale_attn_norm", "scale_mlp_norm", "fc_norm")
IDLE = (
    "img_size",
    "dynamic_img_size",
    "dynamic_img_pad",
    "strict_img_size",
    "weight_init",
    "fix_init",
    "head_init_scale",
)
IDLE += ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
IDLE += ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable")
IDLE += ("exportable", "no_jit", "device", "dtype", "global_pool")
"""Arguments of timm's models that tensors show, and those that change nothing of a trained model; the pooling is read
by `folder_hints`."""
FIELDS = {"embed_dim": "width", "class_token": "cls", "num_heads": "heads", "pool_include_prefix": "pool_prefix"}
FIELDS |= {name: name for name in ("depth", "qkv_bias", "proj_bias", "qk_norm", "pre_norm")}
"""Arguments -> fields of a config. Where tensors show them too, both must agree."""
OF_DINOV3 = {"num_heads": "heads", "rope_temperature": "rope_base"}
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
"""timm's names, and the config's."""


def argument_hints(arguments: Mapping[str, Any], of: Mapping[str, Any]) -> dict[str, Any]:
    """What `model_args` change of an architecture, of which `of` tells what is known.

    Raises:
      ConversionError: some of them are not known; the message lists these.
    """
    rotary = bool(DINOV3.fullmatch(of["architecture"].split(".")[0]))
    known = OF_DINOV3 if rotary else FIELDS
    shown = (*SHOWN, *FIELDS, "num_reg_tokens", "swiglu_mlp", "swiglu_align_to") if rotary else SHOWN
    hints: dict[str, Any] = {}
    unknown: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in known:
            hints[known[name]] = value
        elif name == "act_layer" and value in ACTIVATIONS and of.get("mlp") in ACTIVATIONS:
            hints["mlp"] = value
        elif name == "final_norm" and isinstance(value, bool) and not rotary:
            hints |= {} if value else {"final_norm": "none", "told": ("final_norm",)}
        elif name not in shown and name not in IDLE:
            unknown[name] = value
    if unknown:
        raise ConversionError(f"the config.json changes the architecture by {unknown}, which is not known here")
    told = hints.pop("told", ())
    hints = {name: field_of(name, value) for name, value in hints.items() if value is not None}
    return hints | ({"told": told} if told else {})


def preprocess_hints(pretrained: Mapping[str, Any]) -> dict[str, Any]:
    """How images are prepared, as a `pretrained_cfg` says it; nothing if it says no size."""
    if not pretrained.get("input_size"):
        return {}
    return {"preprocess": of_timm(pretrained), "preparation": "its pretrained_cfg"}


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
        **({"pool": "distilled"} if distilled else pool_hints(module)),
        "pool_prefix": bool(module.global_pool == "map" and module.pool_include_prefix),
    }
    if getattr(module, "pos_embed", None) is not None:
        hints["grid"] = tuple(module.patch_embed.grid_size)
    hints["positions"] = "grid" in hints
    hints["fixed"] = bool(module.patch_embed.strict_img_size and not module.dynamic_img_size)
    return hints | preprocess_hints(getattr(module, "pretrained_cfg", None) or {})


def pool_hints(module: Any) -> dict[str, Any]:
    """The pooling of a live timm model; that of one that pools nothing is an assumption.

    Raises:
      ConversionError: it is not known.
    """
    if module.global_pool in POOLS:
        return {"pool": POOLS[module.global_pool]}
    if module.global_pool:
        raise ConversionError(
            f"this {type(module).__name__} cannot be converted: its pooling is {module.global_pool!r}; known: "
            f"{', '.join(POOLS)}, and '' for none"
        )
    return {"pool": "mean" if module.cls_token is None else "cls", "unsure": {"pool": UNPOOLED}}


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
    hints = {
        "library": "timm",
        "heads": block.attn.num_heads,
        "depth": len(module.blocks),
        "eps": block.norm1.eps,
        "mlp": activation_of(block.mlp),
        **pool_hints(module),
    }
    return hints | preprocess_hints(getattr(module, "pretrained_cfg", None) or {})
