"""Applies a table of rules to the tensors of a checkpoint, totally: every tensor used once, every parameter set once.

A rule says which source tensors become which parameters, and how. Names may hold `{i}`, the number of a block; such a
parameter is stacked over blocks. What is left over on either side is an error, unless the layout ignores it by name and
says why.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from jaxvit import ViTConfig
from jaxvit.params import Params, abstract, to_params

Tensors = Mapping[str, np.ndarray]
Transform = Callable[..., Sequence[np.ndarray]]


class ConversionError(ValueError):
    """A source that cannot be converted as it is; the message says why, and lists every offender."""


@dataclass(frozen=True)
class Rule:
    """`targets = transform(*sources)`."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    transform: Transform


@dataclass(frozen=True)
class Layout:
    """How one library names and shapes the tensors of a family of models.

    Attributes:
      name: family/library.
      anchors: names that every checkpoint of the layout has, none of another layout all; prefixes come before them.
      config: the config that the tensors imply; `hints` are what a file beside them says (heads, eps, preprocess ..).
      rules: the table.
      ignored: patterns of names that are not used -> the reason.
      rename: brings variants of a name to the one in the table.
    """

    name: str
    anchors: tuple[str, ...]
    config: Callable[[Tensors, Mapping[str, Any]], ViTConfig]
    rules: Callable[[ViTConfig], list[Rule]]
    ignored: Mapping[str, str] = field(default_factory=dict)
    rename: Callable[[str], str] = lambda name: name


def copy(source: str, target: str) -> Rule:
    return Rule((source,), (target,), lambda a: [a])


def squeeze(source: str, target: str) -> Rule:
    """Drops the batch axis that PyTorch models keep on their tokens."""
    return Rule((source,), (target,), lambda a: [a.reshape(a.shape[1:])])


def linear(source: str, target: str) -> list[Rule]:
    """torch.nn.Linear [out, in] -> kernel [in, out], and the bias."""
    return [
        Rule((f"{source}.weight",), (f"{target}.kernel",), lambda w: [w.T]),
        copy(f"{source}.bias", f"{target}.bias"),
    ]


def joined_linear(sources: Sequence[str], target: str) -> list[Rule]:
    """Several Linears of equal size -> one, their outputs in this order."""

    def join(*parts: np.ndarray) -> np.ndarray:
        if len({part.shape for part in parts}) > 1:
            raise ValueError("parts of different shapes may add up to the right one, but do not belong together")
        return np.concatenate(parts)

    return [
        Rule(tuple(f"{s}.weight" for s in sources), (f"{target}.kernel",), lambda *w: [join(*w).T]),
        Rule(tuple(f"{s}.bias" for s in sources), (f"{target}.bias",), lambda *b: [join(*b)]),
    ]


def split_linear(source: str, targets: Sequence[str]) -> list[Rule]:
    """One Linear -> several of equal size, from its first rows to its last."""
    n = len(targets)
    return [
        Rule((f"{source}.weight",), tuple(f"{t}.kernel" for t in targets), lambda w: np.split(w.T, n, axis=1)),
        Rule((f"{source}.bias",), tuple(f"{t}.bias" for t in targets), lambda b: np.split(b, n)),
    ]


def norm(source: str, target: str) -> list[Rule]:
    return [copy(f"{source}.weight", f"{target}.scale"), copy(f"{source}.bias", f"{target}.bias")]


def patch_conv(source: str, target: str) -> list[Rule]:
    """A convolution [D, channels, p, p] of stride p -> the matrix [p * p * channels, D] it multiplies each patch by."""
    return [
        Rule((f"{source}.weight",), (f"{target}.kernel",), lambda w: [w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0])]),
        copy(f"{source}.bias", f"{target}.bias"),
    ]


class Renamed(Mapping[str, np.ndarray]):
    """Tensors under other names, read when they are asked for.

    Half precision is widened to float32, exactly: sums of tensors then round once, whatever kind of file held them.
    """

    def __init__(self, tensors: Tensors, names: Mapping[str, str]):
        self.tensors, self.names = tensors, names

    def __getitem__(self, name: str) -> np.ndarray:
        array = self.tensors[self.names[name]]
        return array.astype(np.float32) if array.dtype.name in ("bfloat16", "float16") else array

    def __contains__(self, name: object) -> bool:
        return name in self.names  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def locate(layouts: Sequence[Layout], tensors: Tensors) -> tuple[Layout, Tensors]:
    """Which layout the tensors have, and the tensors under its names: without the prefix a wrapper put before them.

    Tensors outside the wrapper keep their whole name and say so; they too must be ignored, or are an error.

    Raises:
      ConversionError: none of the layouts, or one in which two tensors have the same name.
    """
    for layout in layouts:
        first = layout.anchors[0]
        for prefix in sorted((key[: -len(first)] for key in tensors if key.endswith(first)), key=_preference):
            # Outside a wrapper, `norm.weight` is not the wrapped model's: it must neither replace that nor stand in.
            names = [
                layout.rename(key.removeprefix(prefix)) if key.startswith(prefix) else f"{key} (outside {prefix})"
                for key in tensors
            ]
            if all(anchor in names for anchor in layout.anchors):
                if twice := sorted({name for name in names if names.count(name) > 1}):
                    raise ConversionError(f"not a {layout.name} checkpoint: it holds two of {', '.join(twice)}")
                return layout, Renamed(tensors, dict(zip(names, tensors, strict=True)))
    if not tensors:
        raise ConversionError("the checkpoint holds no tensors")
    some = ", ".join(list(tensors)[:5])
    raise ConversionError(
        f"not a checkpoint of a known layout ({', '.join(layout.name for layout in layouts)}): "
        f"its {len(tensors)} tensors are named {some}{', ..' if len(tensors) > 5 else ''}"
    )


def _preference(prefix: str) -> tuple[bool, int]:
    """Of a teacher and a student, published features come from the teacher; otherwise the outermost model."""
    return ("teacher" not in prefix, len(prefix))


def convert_tensors(
    layout: Layout, tensors: Tensors, config: ViTConfig, dtype: DTypeLike, ignored: Mapping[str, str] | None = None
) -> Params:
    """The parameters of a model of `config`, from the tensors of `layout` as `locate` returns them.

    Tensors are read one rule at a time, so a lazy mapping never holds more than one rule's. `ignored` adds to what the
    layout ignores.

    Raises:
      ConversionError: tensors missing, left over, of a wrong shape or type, or not finite; all of them are listed.
    """
    expected = to_params(abstract(config))
    params: Params = {name: np.empty(a.shape, dtype) for name, a in expected.items()}
    problems: list[str] = []
    used: set[str] = set()
    for rule in layout.rules(config):
        stacked = "{i}" in rule.sources[0]
        for i in range(config.depth) if stacked else (0,):
            sources = [source.format(i=i) for source in rule.sources]
            used.update(sources)
            if absent := [source for source in sources if source not in tensors]:
                problems += [f"{source} is missing" for source in absent]
                continue
            values = [tensors[source] for source in sources]
            unsound = []
            for source, value in zip(sources, values, strict=True):
                if not np.issubdtype(value.dtype, np.floating):
                    unsound.append(f"{source} holds {value.dtype}, expected floating-point numbers")
                elif not np.isfinite(value).all():
                    unsound.append(f"{source} holds NaN or infinity")
            if unsound:
                problems += unsound
                continue
            wanted = [expected[target].shape[1:] if stacked else expected[target].shape for target in rule.targets]
            try:
                with np.errstate(over="ignore"):  # found below
                    results = rule.transform(*values)
            except (ValueError, IndexError):
                results = ()
            if [r.shape for r in results] != wanted:
                shapes = ", ".join(f"{s} {list(v.shape)}" for s, v in zip(sources, values, strict=True))
                becomes = ", ".join(f"{t} {list(w)}" for t, w in zip(rule.targets, wanted, strict=True))
                problems.append(f"wrong shape: {shapes} cannot become {becomes}")
                continue
            for target, result in zip(rule.targets, results, strict=True):
                at = i if stacked else ...
                with np.errstate(over="ignore"):
                    params[target][at] = result
                if not np.isfinite(params[target][at]).all():
                    problems.append(f"{' + '.join(sources)} exceeds what {np.dtype(dtype)} can hold")
    patterns = [*layout.ignored, *(ignored or ())]
    for name in tensors:
        if name not in used and not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            problems.append(f"{name} is not expected")
    if problems:
        raise ConversionError(f"not a complete {layout.name} checkpoint: " + "; ".join(problems))
    return params


def check_table(layout: Layout, config: ViTConfig) -> None:
    """Raises a ConversionError unless the table itself sets every parameter once and uses every source once."""
    rules = layout.rules(config)
    targets = [target for rule in rules for target in rule.targets]
    sources = [source for rule in rules for source in rule.sources]
    expected = set(to_params(abstract(config)))
    if sorted(targets) != sorted(expected) or len(set(sources)) != len(sources):
        raise ConversionError(
            f"the table of {layout.name} is not total: not set {sorted(expected - set(targets))}, "
            f"unknown {sorted(set(targets) - expected)}, "
            f"twice {sorted({t for t in targets + sources if (targets + sources).count(t) > 1})}"
        )
