"""The models under study: from a checkpoint, from nothing (random weights), or with test-time registers appended."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvit import Provenance, ViT, ViTConfig, convert
from jaxvit.convert import catalogue
from jaxvit.io.checkpoint import PARITY
from jaxvit.model.params import abstract, from_params, to_params

from ..core.experiment import About, Subject

LETTERS = {192: "Ti", 384: "S", 512: "M", 768: "B", 1024: "L", 1280: "H", 1536: "g", 4096: "7B"}
"""What models of a width are called."""


TRAINED_HERE = "trained here"
"""Kind of source of models that `jaxvit train-matched` wrote."""
SCENES = "scenes"
"""Family of these models."""


@dataclass(frozen=True)
class Spec:
    """How to get a model.

    Attributes:
      source: what `convert.load` takes; for random weights a name.
      name: for people; by default made of the source.
      random: sizes of a model with random weights.
      test_time_registers: how many to append to a model that was trained without.
    """

    source: str
    name: str = ""
    random: dict[str, Any] = field(default_factory=dict)
    test_time_registers: int = 0

    @classmethod
    def parse(cls, text: str) -> Spec:
        """ "SOURCE" or "NAME=SOURCE"."""
        name, equals, source = text.partition("=")
        return cls(source, name) if equals and name and "/" not in name else cls(text)

    @property
    def title(self) -> str:
        name = self.name or Path(self.source).name
        return name + (f" + {self.test_time_registers} test-time registers" if self.test_time_registers else "")

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this model from others: sizes and ages of files, the commit of a hub id.

        A certificate beside the model changes no number of it.
        """
        path = Path(self.source)
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        files = [] if self.random else [p for p in files if p.is_file() and p.name != PARITY]
        stats = {str(p): p.stat() for p in files}
        told = {"files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}}
        return asdict(self) | told | {"revision": "" if self.random or path.exists() else revision_of(self.source)}


def revision_of(repo: str) -> str:
    """The commit that a hub id stands for now, or in the cache if the hub cannot be reached; "" if none is known."""
    try:
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=["config.json"])).name
    except Exception:  # of many types; loading the model tells what is wrong
        return ""


def keys(specs: Sequence[Spec]) -> list[str]:
    """Short names for files and for results.json, all different."""
    found: list[str] = []
    for spec in specs:
        key = re.sub(r"[^a-z0-9]+", "-", spec.title.lower()).strip("-") or "model"
        same = sum(other == key or re.fullmatch(re.escape(key) + r"-\d+", other) is not None for other in found)
        found.append(f"{key}-{same + 1}" if same else key)
    return found


def load(spec: Spec, key: str, dtype: str = "float32", revision: str = "") -> Subject:
    """The model, without its test-time registers, which need images: see `experiments.models.test_time`.

    Args:
      revision: of a hub id.

    Raises:
      convert.ConversionError, jaxvit.CheckpointError: see `convert.load`.
    """
    if spec.random:
        config = ViTConfig(**spec.random)
        model, source = random_weights(config, dtype), {"kind": "random", "seed": 0}
    else:
        model, provenance = convert.load_described(spec.source, dtype=dtype, revision=revision or None)
        source = told(provenance)
    config = model.config
    random = "random" in (source.get("kind"), source.get("weights"))  # as its folder says
    hub = spec.source if source.get("kind") == "hub" else Path(spec.source).name  # and not the folders it is in
    family = "random" if random else family_of([spec.name, hub], config)
    family = SCENES if source.get("kind") == TRAINED_HERE else family
    about = About(
        key=key,
        name=spec.title,
        family=family,
        size=LETTERS.get(config.width, f"{config.width} wide"),
        depth=config.depth,
        width=config.width,
        heads=config.heads,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(model)),
        registers=config.registers,
        registers_are="none" if not config.registers else "random" if random else "trained",
        weights="random" if random else "trained",
        source=source,
        config=config.to_dict(),
    )
    return Subject(about, model)


def told(provenance: Provenance) -> dict[str, Any]:
    """What results.json keeps of a provenance: the source, which weights it gave, and what is to be known of them."""
    source = {**provenance.source, "weights sha256": provenance.weights}
    source |= {"assumed": "; ".join(provenance.assumptions)} if provenance.assumptions else {}
    return source | ({"modified since": "; ".join(provenance.changes)} if provenance.modified else {})


FAMILY_NAMES = {"dinov3": "DINOv3", "dinov2": "DINOv2", "deit3": "DeiT III", "deitiii": "DeiT III"}
FAMILY_NAMES |= {"clip": "CLIP", "ibot": "iBOT", "dino": "DINO", "deit": "DeiT"}


def family_of(names: Sequence[str], config: ViTConfig) -> str:
    """By the first name that tells, a word of its own in it; else by sizes.

    Args:
      names: the name that was given, then those of the source.
    """
    for name in names:
        words = re.split(r"[^a-z0-9]+", name.lower())
        for start, family in FAMILY_NAMES.items():
            if any(word.startswith(start) for word in [*words, "".join(words)]):
                return family
    free = {"grid": (1, 1), "classes": 0, "projection": 0, "preprocess": config.preprocess, "resampling": "bicubic"}
    plain = replace(config, **free)
    for known in catalogue.known():
        if replace(known.config, **free) == plain:
            return known.family
    return "other"


def random_weights(config: ViTConfig, dtype: str = "float32", seed: int = 0) -> ViT:
    """A model of random weights, large enough for attention to be far from uniform; of no value but as a test."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
        noise = rng.normal(size=shape)
        if name.endswith(("scale", "gamma")):
            noise = 1 + 0.2 * noise
        elif name.endswith("kernel"):
            noise *= 1.5 / np.sqrt(shape[-2])
        else:
            noise *= 0.5
        return jnp.asarray(noise, dtype)

    shapes = to_params(abstract(config))
    return from_params(config, {name: draw(name, leaf.shape) for name, leaf in shapes.items()})
