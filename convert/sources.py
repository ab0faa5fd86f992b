"""Where tensors come from: files, folders, hub ids, live PyTorch modules, state dicts, ONNX exports."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convert.engine import ConversionError, Renamed, Tensors
from convert.onnx_graph import read_onnx
from jaxvit import CheckpointError, Preprocess
from jaxvit.checkpoint import SafetensorsFile

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json"]
WEIGHT_FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin")


@dataclass
class Source:
    """Tensors and what is known about them.

    Attributes:
      tensors: name -> array, as the source names them; read when asked for where the format allows.
      description: where they come from; `sha256` maps each file to its checksum.
      hints: what a config file or a live module says that shapes do not: heads, eps, preprocess.
      ignored: name patterns that only this kind of source has -> why they are not used.
    """

    tensors: Tensors
    description: dict[str, Any]
    hints: dict[str, Any] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)


def open_source(source: Any, revision: str | None = None) -> Source:
    """Recognises a source: a path, a hub id, a PyTorch module, or a mapping of names to tensors.

    Raises:
      ConversionError: nothing of the kind, or it cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        try:
            # os.path takes what cannot be a path, such as one that is too long, for one that does not exist.
            if os.path.isdir(source):  # noqa: PTH112
                return _folder(path)
            if os.path.exists(source):  # noqa: PTH110
                return _file(path)
        except OSError as error:
            raise ConversionError(f"{path} cannot be read: {error.strerror or error}") from error
        if isinstance(source, str) and HUB_ID.fullmatch(source):
            return _hub(source, revision)
        raise ConversionError(f"{source} is neither a file, nor a folder, nor a hub id such as facebook/dinov2-small")
    if isinstance(source, Mapping):
        return Source(_arrays(_state_dict(source)), {"kind": "state dict"})
    if callable(getattr(source, "state_dict", None)):
        return _module(source)
    raise ConversionError(
        f"cannot convert a {type(source).__name__}: expected a path, a hub id, a module, a state dict"
    )


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# Files ----------------------------------------------------------------------------------------------------------------


def _file(path: Path) -> Source:
    description = {"kind": "file", "path": path.name, "sha256": {path.name: sha256(path)}}
    if path.suffix == ".onnx":
        ignored = {"decoder.*": "what the export puts behind the backbone"}
        return Source(read_onnx(path), description, ignored=ignored)
    return Source(_read(path), description)


def _read(path: Path) -> Tensors:
    if path.suffix == ".safetensors":
        try:
            return SafetensorsFile(path)
        except CheckpointError as error:
            raise ConversionError(str(error)) from error
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        return _read_pickle(path)
    raise ConversionError(f"{path} is of no known kind: expected .safetensors, .pth, .pt, .bin, .ckpt or .onnx")


def _read_pickle(path: Path) -> Tensors:
    try:
        import torch
    except ImportError:
        raise ConversionError(
            f"reading {path} needs torch: pip install torch, or convert a .safetensors file"
        ) from None
    with open(path, "rb") as f:
        zipped = f.read(4) == b"PK\x03\x04"  # since PyTorch 1.6; older files cannot be mapped into memory
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of what torch warns of, it then raises
            # weights_only: tensors and plain containers; nothing else in the pickle is executed.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise ConversionError(f"{path} holds {refused[1]}, which is not trusted: expected only tensors") from error
        reason = _first_sentence(str(error).split("WeightsUnpickler error:")[-1])
        raise ConversionError(f"{path} is not a PyTorch file of tensors alone: {reason}") from error
    except Exception as error:  # what a broken pickle makes Python raise has no common class
        reason = _first_sentence(str(error)) if isinstance(error, RuntimeError) else repr(error)
        raise ConversionError(f"{path} is not a complete PyTorch file: {reason}") from error
    if not isinstance(content, Mapping):
        raise ConversionError(f"{path} holds a {type(content).__name__}, expected a state dict")
    return _arrays(_state_dict(content))


def _first_sentence(message: str) -> str:
    return re.split(r"\.\s|\n", message.strip())[0]


def _state_dict(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Training checkpoints keep the state dict one level down, among optimiser states and counters."""
    for name in ("teacher", "state_dict", "model"):
        if isinstance(content.get(name), Mapping):
            return content[name]
    return content


def _arrays(state: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    if foreign := [name for name, value in state.items() if not (isinstance(name, str) and hasattr(value, "shape"))]:
        raise ConversionError(f"not a state dict of names and tensors: {', '.join(map(repr, foreign[:10]))}")
    arrays, problems = {}, []
    for name, value in state.items():
        try:
            arrays[name] = _array(value)
        except (TypeError, RuntimeError) as error:  # quantised, sparse, on no device ..
            problems.append(f"{name} ({_first_sentence(str(error))})")
    if problems:
        raise ConversionError(f"these tensors are no plain arrays: {', '.join(problems)}")
    return arrays


def _array(tensor: Any) -> np.ndarray:
    if "torch" in sys.modules:
        import torch

        if isinstance(tensor, torch.Tensor):
            tensor = tensor.detach().cpu()
            # NumPy has no bfloat16 of its own; float32 holds every bfloat16 exactly.
            return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return np.asarray(tensor)


# Folders and hubs -----------------------------------------------------------------------------------------------------


def _folder(folder: Path) -> Source:
    """A folder as transformers and timm write them: weights, perhaps in shards, and their config."""
    present = [name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not present:
        raise ConversionError(f"{folder} holds none of {', '.join(WEIGHT_FILES)}")
    weights = folder / present[0]
    files = [weights]
    if weights.suffix == ".json":
        where = _json(weights).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise ConversionError(f"{weights} has no weight_map from names of tensors to names of files")
        files = [folder / name for name in sorted(set(where.values()))]
        if absent := [file.name for file in files if not file.is_file()]:
            raise ConversionError(f"{folder} lacks the shards {', '.join(absent)} that {weights.name} names")
    parts = [_read(file) for file in files]
    tensors = parts[0] if len(parts) == 1 else _Joined(parts)
    description = {"kind": "folder", "path": folder.name, "sha256": {file.name: sha256(file) for file in files}}
    return Source(tensors, description, _config_hints(folder))


class _Joined(Renamed):
    """Several mappings as one."""

    def __init__(self, parts: list[Tensors]):
        self.where = {name: part for part in parts for name in part}
        super().__init__({}, {name: name for name in self.where})

    def __getitem__(self, name: str) -> np.ndarray:
        return self.where[name][name]


def _config_hints(folder: Path) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        hints |= transformers_hints(_json(folder / "config.json"))
    if (folder / "preprocessor_config.json").is_file():
        p = _json(folder / "preprocessor_config.json")
        size, crop = p.get("size"), p.get("crop_size")
        if isinstance(size, dict) and "shortest_edge" in size and isinstance(crop, dict) and "height" in crop:
            try:
                hints["preprocess"] = Preprocess(
                    size["shortest_edge"], crop["height"], tuple(p["image_mean"]), tuple(p["image_std"])
                )
            except (KeyError, TypeError, ValueError) as error:
                raise ConversionError(f"{folder / 'preprocessor_config.json'} makes no sense: {error!r}") from error
    return hints


def transformers_hints(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a transformers config says that shapes do not; empty for the config.json of a timm folder."""
    if "model_type" not in config:
        return {}
    if config.get("hidden_act", "gelu") != "gelu":
        raise ConversionError(f"the config's activation is {config['hidden_act']!r}; DINOv2 has the exact GELU, 'gelu'")
    names = {"heads": "num_attention_heads", "eps": "layer_norm_eps"}
    names |= {"depth": "num_hidden_layers", "registers": "num_register_tokens"}
    hints = {ours: config[theirs] for ours, theirs in names.items() if theirs in config}
    if wrong := [names[name] for name, value in hints.items() if not isinstance(value, int | float)]:
        raise ConversionError(f"the config's {', '.join(wrong)} should be numbers")
    return hints


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def _hub(repo: str, revision: str | None) -> Source:
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
    except ImportError:
        raise ConversionError(
            f"{repo} is no path here; to fetch it from the hub, pip install 'jaxvit[convert]'"
        ) from None
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES))
        if not any((folder / name).is_file() for name in WEIGHT_FILES):
            huggingface_hub.hf_hub_download(repo, "pytorch_model.bin", revision=folder.name)
    except (HfHubHTTPError, EntryNotFoundError, RevisionNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConversionError(f"{repo} is no path here, and the hub did not give it: {reason}") from error
    source = _folder(folder)
    # A snapshot's folder is named after its commit.
    source.description |= {"kind": "hub", "path": repo, "revision": folder.name}
    return source


# Live modules ---------------------------------------------------------------------------------------------------------


def _module(module: Any) -> Source:
    kind = type(module)
    config = getattr(module, "config", None)
    hints = transformers_hints(config.to_dict()) if config is not None and hasattr(config, "to_dict") else {}
    if hasattr(module, "blocks") and hasattr(module.blocks[0], "attn"):
        block = module.blocks[0]
        hints = {"heads": block.attn.num_heads, "eps": block.norm1.eps, "depth": len(module.blocks)}
        # Of activations, a state dict says nothing. timm's gated MLPs have a gate_last; Meta's have no module `act`.
        act, gated = getattr(block.mlp, "act", None), hasattr(block.mlp, "gate_last")
        exact = type(act).__name__ == ("SiLU" if gated else "GELU") and getattr(act, "approximate", "none") == "none"
        if (act is not None and not exact) or getattr(block.mlp, "gate_last", False):
            raise ConversionError(
                f"the module's MLP has {act}: expected the exact GELU, or SiLU on the first half of fc1"
            )
    description = {"kind": "module", "path": f"{kind.__module__}.{kind.__qualname__}"}
    return Source(_arrays(module.state_dict()), description, hints)
