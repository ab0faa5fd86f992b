"""What a model on disk is, in words: its sizes, where its weights come from, and how equal they were found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxvit.model.config import ViTConfig


def in_words(c: ViTConfig) -> str:
    """A config as one line."""
    parts = [f"{c.depth} blocks of width {c.width}", f"{c.heads} heads", f"{c.mlp} MLP"]
    parts += [f"{c.registers} registers" if c.registers else "no registers"]
    parts += ["no class token"] * (not c.cls)
    parts += [f"patches of {c.patch} px", f"a grid of {c.grid[0]}x{c.grid[1]}"]
    parts += [f"{c.classes} outputs"] * (c.classes > 0)
    return ", ".join(parts)


def origin(source: Mapping[str, Any], parity: Mapping[str, Any] | None) -> str:
    """Where weights come from, and what a certificate says of them, as lines."""
    return "\n".join([*of_source(source), *of_parity(parity)])


def of_source(source: Mapping[str, Any]) -> Iterable[str]:
    if not source:
        yield "source: not known"
        return
    what = " ".join(str(source[name]) for name in ("kind", "path") if name in source)
    revision = f" at revision {source['revision']}" if "revision" in source else ""
    layout = f", in the layout {source['layout']}" if "layout" in source else ""
    yield f"source: {what}{revision}{layout}"
    for name in ("revision given", "architecture", "config given"):
        if name in source:
            yield f"  {name}: {source[name]}"
    for file, digest in {**source.get("sha256", {}), **source.get("config sha256", {})}.items():
        yield f"  {file}: sha256 {digest}"
    if versions := source.get("versions"):
        yield f"  converted with {named_versions(versions)}"


def of_parity(parity: Mapping[str, Any] | None) -> Iterable[str]:
    if parity is None:
        yield "parity: not verified; python -m convert verify compares it with its original"
        return
    verdict = "equal within the limits" if parity["passed"] else "NOT EQUAL within the limits"
    yield f"parity: {verdict}, compared with {parity['original']}"
    for size, found in parity["sizes"].items():
        yield (
            f"  {size} px: float64 error {found['worst float64']:.1e}, "
            f"float32 error {found['worst float32 ratio']:.2f} times the original's own"
        )
    for file, digest in (parity["sha256"] | parity["sha256 of the original"]).items():
        yield f"  {file}: sha256 {digest}"
    yield f"  with {named_versions(parity['versions'])}"


def named_versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
