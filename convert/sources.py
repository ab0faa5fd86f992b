"""Where tensors come from: files, folders, hub ids, live PyTorch modules, state dicts, ONNX exports."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jaxvit import CheckpointError
from jaxvit.io.checkpoint import SafetensorsFile, sha256
from jaxvit.io.provenance import versions

from .clip import OPENAI
from .engine import WRAPPED, ConversionError, Renamed, Tensors, tensor_shape
from .files import first_sentence, is_torchscript, kind_of
from .foreign import describe_foreign
from .onnx_graph import read_onnx
from .pickles import Inert, load_pickle
from .preparation import of_open_clip, of_transformers
from .timm import POOLS, architecture_hints, folder_hints, module_hints, pixels
from .torchscript import read_torchscript

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
OPEN_CLIP, OPEN_CLIP_CONFIG = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"), "open_clip_config.json"
INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
WEIGHT_FILES = (INDEX, "model.safetensors", OPEN_CLIP[0], BIN_INDEX, "pytorch_model.bin", OPEN_CLIP[1])
"""Of a folder, the first of these that is there is taken; and if there is none, the first of `VARIANTS`."""
VARIANTS = re.compile(
    r"model\.safetensors\.index\.(\w+)\.json|model\.(\w+)\.safetensors|"
    r"pytorch_model\.bin\.index\.(\w+)\.json|pytorch_model\.(\w+)\.bin"
)
"""The names that transformers' `save_pretrained(.., variant="fp16")` gives."""
PRECISIONS = ("fp32", "fp16", "bf16")
"""Safetensors come before pickles. Of several variants of a kind these come first, then others by name."""
CONFIG_FILES = ["config.json", "preprocessor_config.json", OPEN_CLIP_CONFIG]
VARIANT_ORDER = (*PRECISIONS, "*")
HUB_FILES = (
    ["model.safetensors", "model-*.safetensors", INDEX],
    [OPEN_CLIP[0]],
    ["pytorch_model.bin", "pytorch_model-*.bin", BIN_INDEX],
    [OPEN_CLIP[1]],
    *(
        [f"model.{v}.safetensors", f"model.{v}-*.safetensors", f"model.safetensors.index.{v}.json"]
        for v in VARIANT_ORDER
    ),
    ["pytorch_model.*.bin", "pytorch_model.bin.index.*.json"],
)
"""Of a hub id, the first of these that is there is fetched: repositories hold the same weights several times."""


def weights_in(folder: Path) -> list[str]:
    """The names of all files of weights in a folder, or of their indices; the first of them is taken."""
    plain = [name for name in WEIGHT_FILES if (folder / name).is_file()]
    found = [(match, path.name) for path in folder.glob("*") if (match := VARIANTS.fullmatch(path.name))]

    def order(each: tuple[re.Match[str], str]) -> tuple[bool, int, str, bool]:
        match, name = each
        variant = next(filter(None, match.groups()))
        rank = PRECISIONS.index(variant) if variant in PRECISIONS else len(PRECISIONS)
        return name.startswith("pytorch"), rank, variant, not name.endswith(".json")

    return plain + [name for _, name in sorted(found, key=order)]


@dataclass
class Source:
    """Tensors and what is known about them.

    Attributes:
      tensors: name -> array, as the source names them; read when asked for where the format allows.
      description: where they come from; `sha256` maps each file to its checksum.
      hints: what a config file or a live module says that shapes do not: heads, eps, preprocess.
      ignored: name patterns that only this kind of source has -> why they are not used.
      assumed: once its layout is recognised, fields of the config that nothing tells -> why they have their value.
    """

    tensors: Tensors
    description: dict[str, Any]
    hints: dict[str, Any] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    assumed: dict[str, str] = field(default_factory=dict)


Branch = Literal["teacher", "student", "ema", "raw"]
"""Which weights of a training checkpoint to take: of self-distillation the teacher's or the student's; the moving
average of weights, or the weights that were optimised."""


def open_source(
    source: Any,
    revision: str | None = None,
    architecture: str | None = None,
    branch: Branch | None = None,
    prefix: str | None = None,
) -> Source:
    """Recognises a source: a path, a hub id, a PyTorch module, or a mapping of names to tensors.

    Args:
      revision: of a hub id.
      architecture: timm's name of the model, for tensors that do not tell.
      branch: of a training checkpoint; by default the teacher, else the moving average, else the weights themselves.
      prefix: of an encoder inside a larger model, whose other tensors are not taken.

    Raises:
      ConversionError: nothing of the kind, or it cannot be read.
    """
    if prefix and is_module(source):
        opened = _open(submodule(source, prefix), revision, branch)
        opened.description["prefix"] = dotted(prefix)
    else:
        opened = _open(source, revision, branch)
        opened = within(opened, dotted(prefix)) if prefix else opened
    if architecture is not None:
        hints = architecture_hints(architecture)
        if "unsure" in hints and "preprocess" in opened.hints:  # a file beside the tensors tells what a tag would
            for name in ("preprocess", "preparation", "unsure"):
                del hints[name]
        opened.hints = {**opened.hints, **hints}
        opened.description["architecture"] = architecture
    return opened


def dotted(prefix: str) -> str:
    return prefix.rstrip(".") + "."


def is_module(source: Any) -> bool:
    return callable(getattr(source, "state_dict", None)) and not isinstance(source, Mapping)


def submodule(module: Any, prefix: str) -> Any:
    """The module inside another one.

    Raises:
      ConversionError: there is none.
    """
    module = unwrapped(module)
    try:
        return module.get_submodule(dotted(prefix)[:-1])
    except AttributeError:
        inside = ", ".join(name for name, _ in module.named_children())
        raise ConversionError(f"the module holds no {dotted(prefix)[:-1]}; it holds {inside}") from None


def within(source: Source, prefix: str) -> Source:
    """The tensors whose names start with a prefix, without it; says that the others were not taken.

    Raises:
      ConversionError: there are none.
    """
    plain = {WRAPPED.sub(r"\1", name): name for name in source.tensors}
    inside = {name.removeprefix(prefix): own for name, own in plain.items() if name.startswith(prefix)}
    if not inside:
        starts = list(dict.fromkeys(name.partition(".")[0] for name in plain))
        some = ", ".join(f"{start}." for start in starts[:10]) + (" .." if starts[10:] else "")
        raise ConversionError(f"no tensor has a name that starts with {prefix}; their names start with {some}")
    source.description["prefix"] = f"{prefix}; {len(plain) - len(inside)} tensors outside it not taken"
    source.tensors, source.hints = Renamed(source.tensors, inside), {**source.hints, "within": prefix}
    return source


def _open(source: Any, revision: str | None, branch: Branch | None) -> Source:
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        try:
            # os.path takes what cannot be a path, such as one that is too long, for one that does not exist.
            if os.path.isdir(source):  # noqa: PTH112
                return _folder(path, branch)
            if os.path.exists(source):  # noqa: PTH110
                return _file(path, branch)
            if isinstance(source, str) and HUB_ID.fullmatch(source):
                return _hub(source, revision, branch)
        except OSError as error:
            raise ConversionError(f"{path} cannot be read: {error.strerror or error}") from error
        raise ConversionError(f"{source} is neither a file, nor a folder, nor a hub id such as facebook/dinov2-small")
    if isinstance(source, Mapping):
        state, taken = _state_dict(source, branch)
        return _taken(Source(_arrays(state), {"kind": "state dict"}), taken)
    if is_module(source):
        return _module(source)
    raise ConversionError(
        f"cannot convert a {type(source).__name__}: expected a path, a hub id, a module, a state dict"
    )


# Files ----------------------------------------------------------------------------------------------------------------


def _file(path: Path, branch: Branch | None) -> Source:
    description = {"kind": "file", "path": path.name, "sha256": {path.name: _checked(path)}}
    tensors, taken = _read(path, branch)
    ignored = {"decoder.*": "what the export puts behind the backbone"} if kind_of(path) == "onnx" else {}
    return _taken(Source(tensors, description, ignored=ignored), taken)


def _taken(source: Source, taken: str) -> Source:
    """The source, which says which weights of its checkpoint were taken."""
    if taken:
        source.description["branch"] = taken
        source.hints["branch"] = branch = taken.partition(",")[0]
        source.ignored[f"{branch}_*head* (outside *"] = "a head that pretraining puts on top of the backbone"
    return source


def _read(path: Path, branch: Branch | None = None) -> tuple[Tensors, str]:
    """The tensors of a file, and which of the weights it holds they are, as `_state_dict` says it."""
    kind = kind_of(path)
    if kind == "safetensors":
        try:
            file = SafetensorsFile(path)
        except CheckpointError as error:
            raise ConversionError(str(error)) from error
        if branch is None:
            return file, ""
        return Renamed(file, {name: name for name in of_branch(file, branch)}), branch
    if kind == "onnx":
        return read_onnx(path), ""
    if kind == "zip" and is_torchscript(path):
        return read_torchscript(path), ""
    content = load_pickle(path, mapped=kind == "zip")  # older files cannot be mapped into memory
    if not isinstance(content, Mapping):
        what = "settings alone" if isinstance(content, Inert) else f"a {type(content).__name__}"
        raise ConversionError(f"{path} holds {what}, expected a state dict")
    state, taken = _state_dict(content, branch)
    return _arrays(_bounded(path, state)), taken


def _bounded(path: Path, state: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The state, unless a tensor repeats a few bytes of the file: such a one may claim any size."""
    import torch

    size = path.stat().st_size
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if large := [name for name, value in tensors.items() if value.numel() * value.element_size() > size]:
        raise ConversionError(f"{path} has {size:,} bytes, but these tensors claim more: {', '.join(map(str, large))}")
    return state


NETWORKS: dict[str, tuple[str, ...]] = {
    "teacher": ("teacher",),
    "ema": ("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    "raw": ("state_dict", "model"),
    "student": ("student",),
}
"""Branch -> where training checkpoints keep its state dict, among optimiser states and counters."""


def has_tensors(content: Mapping[Any, Any], levels: int) -> bool:
    """Whether this is a state dict, or holds one so many levels down."""
    return any(
        hasattr(value, "shape") or (levels > 1 and isinstance(value, Mapping) and has_tensors(value, levels - 1))
        for name, value in content.items()
        if isinstance(name, str)
    )


def _state_dict(content: Mapping[Any, Any], branch: Branch | None, levels: int = 2) -> tuple[Mapping[Any, Any], str]:
    """The state dict of a training checkpoint, and where it was; nothing if `content` is a state dict itself.

    It may be so many levels down, under a name that is not known if nothing else of its level holds tensors.

    The rule: of a self-distillation the teacher, else the moving average of weights, as timm does, else the weights
    that were optimised. `branch` asks for one of them.
    """
    held = {
        each: name
        for each, names in NETWORKS.items()
        for name in reversed(names)
        if isinstance(content.get(name), Mapping)
    }
    wanted = [branch] if branch else ["teacher", "ema", "raw"]
    for each in wanted:
        if each in held:
            others = ", ".join(name for other, name in held.items() if other != each)
            state = content[held[each]]
            if levels and each == "raw" and not any(hasattr(value, "shape") for value in state.values()):
                state = _state_dict(state, branch, levels - 1)[0]
            return state, f"{each}, from {held[each]}" + (f"; {others} not taken" if others else "")
    inside = [name for name, value in content.items() if isinstance(value, Mapping) and has_tensors(value, levels)]
    if levels and len(inside) == 1 and not held and not any(hasattr(value, "shape") for value in content.values()):
        state, taken = _state_dict(content[inside[0]], branch, levels - 1)
        return state, taken or f"raw, from {inside[0]}"
    if branch is None:
        return content, ""
    inner = content[held["raw"]] if "raw" in held else content
    return {name: inner[name] for name in of_branch(inner, branch)}, branch


def of_branch(names: Iterable[Any], branch: Branch) -> list[str]:
    """Those of the names that belong to one network of two."""
    every = [*map(str, names)]
    starts = (f"{branch}_", *(f"{name}." for name in (branch, *NETWORKS[branch])))  # student_backbone.., student_head..
    chosen = [name for name in every if name.startswith(starts)]
    if not chosen:
        raise ConversionError(f"the checkpoint holds no {branch}: it holds {', '.join(every[:5])} ..")
    return chosen


def _arrays(state: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    if foreign := [name for name, value in state.items() if not (isinstance(name, str) and hasattr(value, "shape"))]:
        like = describe_foreign(map(str, state))
        raise ConversionError(
            f"not a state dict of names and tensors: {', '.join(map(repr, foreign[:10]))}"
            f"{f'; it looks like {like}' if like else ''}"
        )
    arrays, problems = {}, []
    for name, value in state.items():
        try:
            arrays[name] = _array(value)
        except (TypeError, RuntimeError) as error:  # quantised, sparse, on no device ..
            problems.append(f"{name} ({first_sentence(str(error))})")
    if problems:
        raise ConversionError(f"these tensors are no plain arrays: {', '.join(problems)}")
    return arrays


def _array(tensor: Any) -> np.ndarray:
    if "torch" in sys.modules:
        import torch

        if isinstance(tensor, torch.Tensor):
            tensor = tensor.detach().cpu()
            if tensor.dtype != torch.bfloat16:
                return tensor.numpy()
            # NumPy has no bfloat16 of its own. No copy is made: the tensor may be a part of a file that is only mapped.
            return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return np.asarray(tensor)


# Folders and hubs -----------------------------------------------------------------------------------------------------


def _folder(folder: Path, branch: Branch | None = None) -> Source:
    """A folder as transformers, timm and OpenCLIP write them: weights, perhaps in shards, and their config."""
    present = weights_in(folder)
    if not present:
        raise ConversionError(f"{folder} holds none of {', '.join(WEIGHT_FILES)}{instead(folder)}")
    weights = folder / present[0]
    files, where = [weights], {}
    if weights.suffix == ".json":
        where = _json(weights).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise ConversionError(f"{weights} has no weight_map from names of tensors to names of files")
        if elsewhere := sorted(name for name in set(where.values()) if name != Path(name).name):
            raise ConversionError(f"{weights} names files outside its folder: {', '.join(elsewhere)}")
        files = [folder / name for name in sorted(set(where.values()))]
        if absent := [file.name for file in files if not file.is_file()]:
            raise ConversionError(f"{folder} lacks the shards {', '.join(absent)} that {weights.name} names")
    open_clip = weights.name in OPEN_CLIP
    configs = [folder / name for name in CONFIG_FILES if (name == OPEN_CLIP_CONFIG) == open_clip]
    # Before anything is read: of a file that is not what the hub says it is, nothing is.
    description = {"kind": "folder", "path": folder.name, "sha256": {file.name: _checked(file) for file in files}}
    if beside := {file.name: _checked(file) for file in configs if file.is_file()}:
        description["config sha256"] = beside
    if present[1:] or present[0] not in WEIGHT_FILES:
        description["weights"] = present[0] + (f"; {', '.join(present[1:])} not taken" if present[1:] else "")
    hints = open_clip_hints(folder / OPEN_CLIP_CONFIG) if open_clip else _config_hints(folder)
    if not where:
        tensors, taken = _read(weights, branch)
    else:
        tensors, taken = _Joined({file.name: _read(file)[0] for file in files}, where, weights), ""
        if branch:
            tensors, taken = Renamed(tensors, {name: name for name in of_branch(tensors, branch)}), branch
    return _taken(Source(tensors, description, hints, dict(OPENAI.ignored) if open_clip else {}), taken)


def instead(folder: Path) -> str:
    """What to do about a folder without weights of a known name, if it holds something like it."""
    if (folder / ".metadata").is_file():
        return (
            "; it is a distributed checkpoint of PyTorch: join it to one file first, python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE.pth"
        )
    suffixes = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".onnx")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.is_file())
    return f"; to convert {files[0].name}, give the file itself: {files[0]}" if files else ""


def _checked(file: Path) -> str:
    """The sha256 of a file. In the cache of the hub's client it must be the one that the hub gave for it.

    There, files of snapshots are links to blobs/<checksum>. Of large files that is the sha256, of small ones git's own,
    which is shorter; where the system has no links, none is known. Only the first link counts: what it leads to may be
    a link in turn, to a store in which names have another meaning.

    Raises:
      ConversionError: it is another.
    """
    found = sha256(file)
    blob = file.readlink() if file.is_symlink() else file
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name) and blob.name != found:
        raise ConversionError(
            f"{file.name} from the hub is damaged or was replaced, its sha256 starts with {found[:12]} instead of "
            f"{blob.name[:12]}: delete {file.resolve()} and load again to fetch it anew"
        )
    return found


class _Joined(Renamed):
    """Shards as one mapping. Each tensor comes from the file that the index names for it.

    Raises:
      ConversionError: the index and the shards do not hold the same tensors.
    """

    def __init__(self, parts: Mapping[str, Tensors], where: Mapping[str, str], index: Path):
        if absent := [name for name, file in where.items() if name not in parts[file]]:
            raise ConversionError(f"the shards of {index} lack tensors that it names: {', '.join(absent[:10])}")
        if more := sorted({name for part in parts.values() for name in part} - set(where)):
            raise ConversionError(f"the shards of {index} hold tensors that it does not name: {', '.join(more[:10])}")
        self.where = {name: parts[file] for name, file in where.items()}
        super().__init__({}, {name: name for name in self.where})

    def __getitem__(self, name: str) -> np.ndarray:
        return self.where[name][name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tensor_shape(self.where[name], name)


def _config_hints(folder: Path) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        config = _json(folder / "config.json")
        hints |= folder_hints(config) if "architecture" in config else transformers_hints(config)
    if (folder / "preprocessor_config.json").is_file():
        said = _json(folder / "preprocessor_config.json")
        hints |= {"preprocess": of_transformers(said), "preparation": "its preprocessor_config.json"}
        hints.pop("unsure", None)
    return hints


ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
"""transformers' names of activations, and the config's."""


CLIP_DEFAULTS = {"hidden_act": "quick_gelu", "num_attention_heads": 12, "layer_norm_eps": 1e-5}
DINOV2_DEFAULTS = {"hidden_act": "gelu", "num_attention_heads": 12, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False}
DEFAULTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("clip", "metaclip_2", "chinese_clip", "altclip", "clipseg"), CLIP_DEFAULTS),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), DINOV2_DEFAULTS),
    "dinov3_vit": {"hidden_act": "gelu", "num_attention_heads": 6, "layer_norm_eps": 1e-5, "rope_theta": 100.0},
}
"""transformers' model types, without `_vision_model` -> their defaults: files may leave out values that equal them."""
NAMES = {"heads": "num_attention_heads", "eps": "layer_norm_eps", "depth": "num_hidden_layers"}
NAMES |= {"registers": "num_register_tokens", "rope_base": "rope_theta"}
"""Fields of our config -> of transformers' configs."""


def transformers_hints(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a transformers config says that shapes do not; empty for the config.json of another library.

    A config around the config of an image encoder is looked into. Where the model type is not known, the hints hold it
    as "model type", and what it leaves out cannot be known.
    """
    if "model_type" not in config:
        return {}
    kind = str(config["model_type"])
    for inner in ("vision_config", "backbone_config"):  # a CLIP of both sides; a head on a backbone
        if isinstance(config.get(inner), Mapping):
            own = {**config[inner], **(config.get(f"{inner}_dict") or {})}  # the second wins, as in transformers
            kind, config = str(own.get("model_type", kind)), own
            break
    kind = kind.removesuffix("_vision_model")
    if kind not in DEFAULTS:
        return {"model type": kind}
    config = {**DEFAULTS[kind], **config}
    act = config["hidden_act"]
    if act not in ACTIVATIONS and not (act == "silu" and config.get("use_gated_mlp")):
        raise ConversionError(f"the config's activation is {act!r}; known: {', '.join(ACTIVATIONS)}")
    if kind.startswith("dinov2") and act != "gelu":
        raise ConversionError(f"the config's activation is {act!r}; DINOv2 has the exact GELU, 'gelu'")
    hints = {ours: config[theirs] for ours, theirs in NAMES.items() if theirs in config}
    if wrong := [NAMES[name] for name, value in hints.items() if not isinstance(value, int | float)]:
        raise ConversionError(f"the config's {', '.join(wrong)} should be numbers")
    if isinstance(size := config.get("image_size"), int):
        hints["image"] = (size, size)
    hints["fixed"] = kind in ("clip", "metaclip_2", "chinese_clip", "altclip")  # others resample their positions
    gated = config.get("use_swiglu_ffn") or config.get("use_gated_mlp")
    return hints if gated else {**hints, "mlp": ACTIVATIONS[act]}


def open_clip_hints(path: Path) -> dict[str, Any]:
    """What an open_clip_config.json says that shapes do not; nothing if there is none.

    Raises:
      ConversionError: it makes no sense, or sets what is not known here and no tensor shows.
    """
    if not path.is_file():
        return {}
    content = _json(path)
    try:
        model, prepare = content["model_cfg"], content.get("preprocess_cfg") or {}
        vision = model["vision_cfg"]
        hints = architecture_hints(vision["timm_model_name"]) if vision.get("timm_model_name") else {}
        if vision.get("timm_pool"):
            hints["pool"] = POOLS[vision["timm_pool"]]
        hints["image"] = pixels(vision.get("image_size", 224))
        if not vision.get("timm_model_name"):
            pooled = vision.get("pool_type", "tok") != "tok" or vision.get("final_ln_after_pool")
            if pooled or vision.get("attentional_pool") or set(vision.get("act_kwargs") or {}) - {"approximate"}:
                raise ConversionError(f"{path} asks for a pooling or activation that is not known here")
            tanh = (vision.get("act_kwargs") or {}).get("approximate") == "tanh"
            hints["mlp"] = "quick_gelu" if model.get("quick_gelu") else "gelu_tanh" if tanh else "gelu"
            hints["heads"] = vision["width"] // vision.get("head_width", 64)
            hints["eps"] = float((vision.get("norm_kwargs") or {}).get("eps", 1e-5))
        if "mean" in prepare:
            hints |= {"preprocess": of_open_clip(prepare, hints["image"]), "preparation": "its preprocess_cfg"}
            hints.pop("unsure", None)
    except ConversionError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConversionError(f"{path} makes no sense: {error!r}") from error
    return hints


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def _hub(repo: str, revision: str | None, branch: Branch | None) -> Source:
    try:
        import huggingface_hub
    except ImportError:
        raise ConversionError(
            f"{repo} is no path here; to fetch it from the hub, pip install 'jaxvit[convert]'"
        ) from None

    def fetch(*names: str) -> Path:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(names)))

    try:
        folder = fetch(*CONFIG_FILES)
        for weights in HUB_FILES:
            held = weights_in(folder)
            # Of shards, some may be here from a download that broke off.
            if not held or held[0].endswith(".json"):
                held = weights_in(folder := fetch(*CONFIG_FILES, *weights))
            if held and any(fnmatchcase(held[0], pattern) for pattern in weights):
                break
    except Exception as error:  # the client's, its HTTP library's and the system's have no common class
        raise ConversionError(
            f"{repo} is no path here, and the hub did not give it: {_refusal(error, revision)}"
        ) from error
    if not weights_in(folder):
        raise ConversionError(f"{repo} on the hub holds none of {', '.join(WEIGHT_FILES)}")
    source = _folder(folder, branch)
    # A snapshot's folder is named after its commit.
    source.description |= {"kind": "hub", "path": repo, "revision": folder.name}
    if revision is not None and revision != folder.name:
        source.description["revision given"] = revision
    return source


def _refusal(error: Exception, revision: str | None) -> str:
    """Why the hub's client gave up. The first lines of its own messages are often only a status and a request's id."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError too
        return "it is gated: accept its terms on its page there, and set HF_TOKEN to a token of yours"
    if isinstance(error, RepositoryNotFoundError):
        return "it has no such repository, or a private one that needs HF_TOKEN set to a token that may read it"
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no revision {revision}"
    return first_sentence(str(error)).removeprefix("Got: ") or type(error).__name__


# Live modules ---------------------------------------------------------------------------------------------------------


WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Where torch.compile, DataParallel, FSDP and activation checkpointing keep the model that they wrap."""


def unwrapped(module: Any) -> Any:
    """The model within wrappers that change neither its weights nor what it computes."""
    while True:
        inner = (getattr(module, name, None) for name in WRAPPERS if name in getattr(module, "_modules", ()))
        inside = next(inner, None)
        if inside is None or len(module._modules) > 1:
            return module
        module = inside


def _module(module: Any) -> Source:
    module = unwrapped(module)
    kind = type(module)
    config = getattr(module, "config", None)
    hints = transformers_hints(config.to_dict()) if config is not None and hasattr(config, "to_dict") else {}
    if kind.__module__.startswith("timm.") and hasattr(module, "blocks"):
        hints = module_hints(module)
    elif hasattr(module, "blocks") and hasattr(module.blocks[0], "attn"):
        block = module.blocks[0]
        hints = {"heads": block.attn.num_heads, "eps": block.norm1.eps, "depth": len(module.blocks)}
        # Of activations, a state dict says nothing. Meta's gated MLPs have no module `act`.
        act = getattr(block.mlp, "act", None)
        if act is not None and (type(act).__name__ != "GELU" or getattr(act, "approximate", "none") != "none"):
            raise ConversionError(f"the module's MLP has {act}: expected the exact GELU")
    library = kind.__module__.partition(".")[0]
    description = {"kind": "module", "path": f"{kind.__module__}.{kind.__qualname__}"}
    if (installed := versions(library)[library]) != "not installed":
        description["library"] = f"{library} {installed}"
    return Source(_arrays(module.state_dict()), description, hints)
