"""Where the weights of a model come from: a value that is kept beside the model, never inside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from jaxvit.model.config import Preprocess, ViTConfig


@dataclass(frozen=True)
class Provenance:
    """What was loaded, which weights that gave, and how equal to their original these were found.

    A provenance speaks of one set of weights and one config. It says nothing of a model that was made from them:
    `jaxvit.save` compares, and writes down what has changed. `str(provenance)` gives all of it as lines.

    Example:

        model, provenance = convert.load_described("facebook/dinov2-with-registers-base")
        jaxvit.save(model, "base", provenance)
        jaxvit.save(jaxvit.add_registers(model), "wider", provenance)
        print(jaxvit.describe("wider"))  # modified since: the weights are not the ones this source gave; ..

    Attributes:
      source: kind, path, revision, checksums, layout and versions, as far as they are known; empty if nothing is.
      weights: sha256 of the weights that this source gave, in a file as `jaxvit.save` writes it; `sha256sum` of
        model.safetensors gives the same. Empty where no weights were named yet: `save` then takes those it writes.
      dtype: type of these weights.
      config: the config of the model that this source gave, but for `preprocess`; None where `weights` is empty.
      assumptions: what the source did not tell and was assumed.
      parity: the certificate of `jaxvit verify` for these weights, or None.
      changes: in which way the weights and the config at hand are not the ones that this source gave.
    """

    source: Mapping[str, Any] = field(default_factory=dict)
    weights: str = ""
    dtype: str = ""
    config: ViTConfig | None = None
    assumptions: tuple[str, ...] = ()
    parity: Mapping[str, Any] | None = None
    changes: tuple[str, ...] = ()

    @property
    def modified(self) -> bool:
        """Whether the weights or the config at hand are not the ones that this source gave."""
        return bool(self.changes)

    def compared(self, weights: str, dtype: str, config: ViTConfig) -> Provenance:
        """The same provenance beside the weights and the config at hand.

        `changes` says what differs. The certificate is dropped unless it was made for these weights and this config.
        How images are prepared is not compared: it changes no number that the model computes.

        Args:
          weights: their sha256, as `jaxvit.io.checkpoint.checksum` gives it.
          dtype: their type.

        Example:

            provenance.compared(checksum(model), "float32", model.config).modified
        """
        told = self if self.weights else replace(self, weights=weights, dtype=dtype)
        told = told if told.config is not None else replace(told, config=replace(config, preprocess=Preprocess()))
        changes = []
        if weights != told.weights:
            cast = f": they are {dtype}, those were {told.dtype}" if dtype != told.dtype else ""
            changes.append(f"the weights are not the ones this source gave{cast}")
        if differ := differing(config, told.config):
            changes.append(f"the config is not the one this source gave: {differ}")
        proven = is_of(self.parity, weights, config, bool(changes))
        return replace(told, changes=tuple(changes), parity=self.parity if proven else None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the certificate, which is a file of its own."""
        values: dict[str, Any] = {"source": dict(self.source), "assumptions": list(self.assumptions)}
        values |= {"weights": self.weights, "dtype": self.dtype}
        values["config"] = None if self.config is None else without_preparation(self.config)
        return values | {"modified": list(self.changes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], parity: Mapping[str, Any] | None = None) -> Provenance:
        """The inverse of `to_dict`. Only `source` must be there.

        Raises:
          KeyError, TypeError, ValueError: values that make no sense.
        """
        config = values.get("config")
        return cls(
            dict(values["source"]),
            str(values.get("weights", "")),
            str(values.get("dtype", "")),
            None if config is None else ViTConfig.from_dict(config),
            tuple(map(str, values.get("assumptions", ()))),
            parity,
            tuple(map(str, values.get("modified", ()))),
        )

    def __str__(self) -> str:
        lines = [*of_source(self.source)]
        if self.weights:
            lines.append(f"  gave {self.dtype} weights of sha256 {self.weights}")
        lines += [f"assumed: {assumption}" for assumption in self.assumptions]
        if self.changes:
            lines.append(f"modified since: {'; '.join(self.changes)}")
        return "\n".join([*lines, *of_parity(self.parity)])


def without_preparation(config: ViTConfig) -> dict[str, Any]:
    """The fields of a config that the model's numbers depend on."""
    values = config.to_dict()
    del values["preprocess"]
    return values


def differing(ours: ViTConfig, theirs: ViTConfig | None) -> str:
    """The fields that differ, apart from the preparation of images, in words."""
    if theirs is None or replace(ours, preprocess=Preprocess()) == replace(theirs, preprocess=Preprocess()):
        return ""
    pairs = [(f.name, getattr(ours, f.name), getattr(theirs, f.name)) for f in fields(ViTConfig)]
    return ", ".join(f"{name} {a}, was {b}" for name, a, b in pairs if name != "preprocess" and a != b)


def is_of(parity: Mapping[str, Any] | None, weights: str, config: ViTConfig, changed: bool) -> bool:
    """Whether a certificate was made for these weights and this config; older ones do not name their config."""
    if parity is None or weights not in parity["sha256"].values():
        return False
    return not changed if "config" not in parity else not differing(config, ViTConfig.from_dict(parity["config"]))


def of_source(source: Mapping[str, Any]) -> Iterable[str]:
    if not source:
        yield "source: not known"
        return
    what = " ".join(str(source[name]) for name in ("kind", "path") if name in source)
    library = f" of {source['library']}" if "library" in source else ""
    revision = f" at revision {source['revision']}" if "revision" in source else ""
    layout = f", in the layout {source['layout']}" if "layout" in source else ""
    yield f"source: {what}{library}{revision}{layout}"
    for name in ("weights", "revision given", "branch", "prefix", "architecture", "config given", "preparation"):
        if name in source:
            yield f"  {name}: {source[name]}"
    for file, digest in {**source.get("sha256", {}), **source.get("config sha256", {})}.items():
        yield f"  {file}: sha256 {digest}"
    if versions := source.get("versions"):
        yield f"  converted with {named_versions(versions)}"


def of_parity(parity: Mapping[str, Any] | None) -> Iterable[str]:
    if parity is None:
        yield "parity: not verified; jaxvit verify compares it with its original"
        return
    yield f"parity: {verdict(parity)}, compared with {parity['original']}"
    for size, found in parity["sizes"].items():
        yield (
            f"  {size} px: float64 error {found['worst float64']:.1e}, "
            f"float32 error {found['worst float32 ratio']:.2f} times the original's own"
        )
    for file, digest in (parity["sha256"] | parity["sha256 of the original"]).items():
        yield f"  {file}: sha256 {digest}"
    yield f"  with {named_versions(parity['versions'])}"


def verdict(parity: Mapping[str, Any]) -> str:
    """What a certificate says. Assumptions that the original was built on too are not proven by comparing with it."""
    equal = "equal within the limits" if parity["passed"] else "NOT EQUAL within the limits"
    shared = parity.get("assumptions")
    return f"{equal}, if the assumptions hold: {', '.join(shared)}" if shared and parity["passed"] else equal


def versions(*packages: str) -> dict[str, str]:
    """The versions of installed packages, for a provenance."""

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    return {package: of(package) for package in packages}


def named_versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
