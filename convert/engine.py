"""Applies a table of rules to the tensors of a checkpoint, totally: every tensor used once, every parameter set once.

A rule says which source tensors become which parameters, and how. Names may hold `{i}`, the number of a block; such a
parameter is stacked over blocks. What is left over on either side is an error, unless the layout ignores it by name and
says why.
"""

from __future__ import annotations

import ctypes
import fnmatch
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from jaxvit import ViTConfig
from jaxvit.io.checkpoint import Put, empty
from jaxvit.io.progress import track
from jaxvit.model.params import Params, abstract, matrix_shape, to_params

from .foreign import describe_foreign, describe_foreign_extras

Tensors = Mapping[str, np.ndarray]
Transform = Callable[..., Sequence[np.ndarray]]


class ConversionError(ValueError):
    """A source that cannot be converted as it is; the message says why.

    Attributes:
      problems: every tensor that is missing, too many, or of the wrong shape. The message names the first.
    """

    problems: tuple[str, ...] = ()


class Decided(NamedTuple):
    """The config of a checkpoint.

    Attributes:
      config: measured, known and assumed fields together.
      assumed: name of each field that neither tensors nor what is known beside them tell -> why it has its value.
    """

    config: ViTConfig
    assumed: Mapping[str, str] = {}

    def assuming(self, fields: Mapping[str, str], hints: Mapping[str, Any]) -> Decided:
        """The same, with those of the fields assumed that `hints` do not give."""
        return self._replace(assumed={name: why for name, why in fields.items() if name not in hints})


def no_inverse(*targets: np.ndarray) -> Sequence[np.ndarray]:
    raise NotImplementedError("this rule only reads")


@dataclass(frozen=True)
class Rule:
    """`targets = transform(*sources)` and, for export, `sources = inverse(*targets)`.

    Both are given what belongs to one block, where names hold `{i}`. `inverse` raises a ValueError for parameters that
    the sources have no place for.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    transform: Transform
    inverse: Transform = no_inverse


@dataclass(frozen=True)
class Layout:
    """How one library names and shapes the tensors of a family of models.

    Attributes:
      name: family/library.
      anchors: tensor names that together identify this layout; prefixes may stand before them.
      config: the config that the tensors imply, and what was assumed; `hints` are what a file beside them says (heads,
        eps, preprocess ..), and `prefix`, which stood before the names.
      rules: the table, for a config and a checkpoint, of which it reads names and shapes alone.
      ignored: patterns of names that are not used -> the reason.
      rename: brings variants of a name to the one in the table.
      outside: names that stand beside the wrapped model, without its prefix, and belong to it: classifiers.
      accepts: whether tensors, and what is known beside them, are of this layout, where anchors do not tell.
    """

    name: str
    anchors: tuple[str, ...]
    config: Callable[[Tensors, Mapping[str, Any]], Decided]
    rules: Callable[[ViTConfig, Tensors], list[Rule]]
    ignored: Mapping[str, str] = field(default_factory=dict)
    rename: Callable[[str], str] = lambda name: name
    outside: Collection[str] = ()
    accepts: Callable[[Tensors, Mapping[str, Any]], bool] = lambda tensors, hints: True


# Constructors of rules. Each says how to read and how to write, so that every name stands in one table.


def copy(source: str, target: str) -> Rule:
    return Rule((source,), (target,), lambda a: [a], lambda a: [a])


def squeeze(source: str, target: str, axes: int = 1) -> Rule:
    """Drops the axes of size 1 that PyTorch models keep before those of their tokens."""

    def add(a: np.ndarray) -> list[np.ndarray]:
        return [a.reshape(*[1] * axes, *a.shape)]

    return Rule((source,), (target,), lambda a: [a.reshape(a.shape[axes:])], add)


def matrix(source: str, target: str) -> Rule:
    """[out, in] -> [in, out]."""
    return Rule((source,), (target,), lambda w: [w.T], lambda w: [w.T])


def linear(source: str, target: str, bias: bool = True) -> list[Rule]:
    """torch.nn.Linear [out, in] -> kernel [in, out], and the bias."""
    weight = matrix(f"{source}.weight", f"{target}.kernel")
    return [weight, copy(f"{source}.bias", f"{target}.bias")] if bias else [weight]


def joined_linear(sources: Sequence[str], target: str) -> list[Rule]:
    """Several Linears of equal size -> one, their outputs in this order."""
    n = len(sources)

    def join(*parts: np.ndarray) -> np.ndarray:
        if len({part.shape for part in parts}) > 1:
            raise ValueError("parts of different shapes may add up to the right one, but do not belong together")
        return np.concatenate(parts)

    weights, biases = (tuple(f"{source}.{leaf}" for source in sources) for leaf in ("weight", "bias"))
    return [
        Rule(weights, (f"{target}.kernel",), lambda *w: [join(*w).T], lambda k: np.split(k.T, n)),
        Rule(biases, (f"{target}.bias",), lambda *b: [join(*b)], lambda b: np.split(b, n)),
    ]


def split_linear(source: str, targets: Sequence[str], bias: bool = True) -> list[Rule]:
    """One Linear -> several of equal size, from its first rows to its last."""
    n = len(targets)
    kernels, biases = (tuple(f"{target}.{leaf}" for target in targets) for leaf in ("kernel", "bias"))
    weight = Rule(
        (f"{source}.weight",),
        kernels,
        lambda w: np.split(w.T, n, axis=1),
        lambda *k: [np.concatenate([each.T for each in k])],
    )
    if not bias:
        return [weight]
    return [weight, Rule((f"{source}.bias",), biases, lambda b: np.split(b, n), lambda *b: [np.concatenate(b)])]


def norm(source: str, target: str, kind: str = "layer") -> list[Rule]:
    scale = copy(f"{source}.weight", f"{target}.scale")
    return [scale, copy(f"{source}.bias", f"{target}.bias")] if kind == "layer" else [scale]


def patch_conv(source: str, target: str, bias: bool = True, channels: int = 3) -> list[Rule]:
    """A convolution [D, channels, p, p] of stride p -> the matrix [p * p * channels, D] it multiplies each patch by."""

    def to_convolution(kernel: np.ndarray) -> list[np.ndarray]:
        side = math.isqrt(len(kernel) // channels)
        return [kernel.reshape(side, side, channels, -1).transpose(3, 2, 0, 1)]

    weight = Rule(
        (f"{source}.weight",),
        (f"{target}.kernel",),
        lambda w: [w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0])],
        to_convolution,
    )
    return [weight, copy(f"{source}.bias", f"{target}.bias")] if bias else [weight]


def tensor_shape(tensors: Tensors, name: str) -> tuple[int, ...]:
    """The shape of a tensor, which is not read where the mapping knows it: those of files do, and `Renamed`."""
    known = getattr(tensors, "shape", None)
    return tuple(known(name) if known else tensors[name].shape)


class Renamed(Mapping[str, np.ndarray]):
    """Tensors under other names, read when they are asked for.

    Half precision is widened to float32, exactly: sums of tensors then round once, whatever kind of file held them.
    """

    def __init__(self, tensors: Tensors, names: Mapping[str, str], prefix: str = ""):
        self.tensors, self.names, self.prefix = tensors, names, prefix

    def __getitem__(self, name: str) -> np.ndarray:
        array = self.tensors[self.names[name]]
        return array.astype(np.float32) if array.dtype.name in ("bfloat16", "float16") else array

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""
        return tensor_shape(self.tensors, self.names[name])

    def __contains__(self, name: object) -> bool:
        return name in self.names  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


WRAPPED = re.compile(r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
"""What torch.compile, FSDP and activation checkpointing put into names, before a model or before each block."""


AVERAGED = "n_averaged"
"""How many models torch.optim.swa_utils.AveragedModel has averaged: a number beside its `module`."""


def locate(
    layouts: Sequence[Layout], tensors: Tensors, hints: Mapping[str, Any] | None = None
) -> tuple[Layout, Renamed]:
    """Which layout the tensors have, and the tensors under its names: without the prefix a wrapper put before them.

    Tensors outside the wrapper keep their whole name and say so; they too must be ignored, or are an error.

    Raises:
      ConversionError: none of the layouts, or one in which two tensors have the same name.
    """
    keys = [WRAPPED.sub(r"\1", key) for key in tensors]
    shared = common_prefix(keys)
    for layout in layouts:
        first = layout.anchors[0]
        for prefix in sorted((key[: -len(first)] for key in keys if key.endswith(first)), key=_preference):
            names = [name_in(layout, key, prefix, shared) for key in keys]
            renamed = Renamed(tensors, dict(zip(names, tensors, strict=True)), prefix)
            if all(anchor in renamed for anchor in layout.anchors) and layout.accepts(renamed, hints or {}):
                if len(renamed) < len(names):
                    twice = sorted({name for name in names if names.count(name) > 1})
                    raise ConversionError(
                        f"not a {layout.name} checkpoint: two tensors have the name {', '.join(twice)}"
                    )
                return layout, renamed
    if not tensors:
        raise ConversionError("the checkpoint holds no tensors")
    some = ", ".join(list(tensors)[:5])
    like = describe_foreign(tensors)
    names = f"its {len(tensors)} tensors are named {some}{', ..' if len(tensors) > 5 else ''}"
    if like:
        raise ConversionError(f"not a checkpoint of a known layout: it looks like {like}; {names}")
    known = ", ".join(layout.name for layout in layouts)
    raise ConversionError(f"not a checkpoint of a known layout ({known}): {nearest(layouts, tensors)}{names}")


def common_prefix(keys: Iterable[str]) -> str:
    """What stands before all names, up to a dot: `module.` of DataParallel, or the name of an attribute."""
    paths = [key.split(".")[:-1] for key in keys if key != AVERAGED]
    first, last = (min(paths), max(paths)) if paths else ([], [])
    n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return "".join(f"{part}." for part in first[:n])


def name_in(layout: Layout, key: str, prefix: str, shared: str) -> str:
    """The name that a tensor has in a layout, whose names stand behind `prefix`.

    Outside of it, `norm.weight` is another model's: it must neither replace that of the layout nor stand in for it.
    What stands before all names is no part of either.
    """
    if key.startswith(prefix):
        return layout.rename(key.removeprefix(prefix))
    outside = key.removeprefix(shared)
    return outside if outside in layout.outside else f"{outside} (outside {prefix.removeprefix(shared) or prefix})"


def nearest(layouts: Sequence[Layout], tensors: Tensors) -> str:
    """The layout of whose anchors a checkpoint lacks the fewest, and which; empty if no layout is near."""
    best, lacking = "", []
    for layout in layouts:
        names = [f".{layout.rename(key)}" for key in tensors]
        absent = [a for a in layout.anchors if not any(name.endswith(f".{a}") for name in names)]
        if 2 * len(absent) <= len(layout.anchors) and (not best or len(absent) < len(lacking)):
            best, lacking = layout.name, absent
    return f"it is nearest to {best}, but lacks {', '.join(lacking)}; " if lacking else ""


def _preference(prefix: str) -> tuple[bool, int]:
    """Of a teacher and a student, published features come from the teacher; otherwise the outermost model."""
    return ("teacher" not in prefix, len(prefix))


def convert_tensors(
    layout: Layout, tensors: Tensors, config: ViTConfig, dtype: DTypeLike, ignored: Mapping[str, str] | None = None
) -> Params:
    """The parameters of a model of `config`, from the tensors of `layout` as `locate` returns them.

    `ignored` adds to what the layout ignores.

    Raises:
      ConversionError: tensors missing, left over, of a wrong shape or type, or not finite; all of them are listed.
    """
    params: Params = {name: empty(a.shape, dtype) for name, a in to_params(abstract(config)).items()}

    def put(name: str, start: int, values: np.ndarray) -> None:
        params[name].reshape(-1)[start : start + values.size] = values.reshape(-1)

    stream_tensors(put, layout, tensors, config, dtype, ignored)
    return params


def stream_tensors(
    put: Put,
    layout: Layout,
    tensors: Tensors,
    config: ViTConfig,
    dtype: DTypeLike,
    ignored: Mapping[str, str] | None = None,
    progress: bool = False,
) -> None:
    """Does what `convert_tensors` does, but hands the parameters to `put` as soon as they are known.

    Tensors are read for one block of one rule at a time, and dropped; of parameters no more than `PIECE` is held. What
    was put is worth nothing if this raises.
    """
    shapes = {name: matrix_shape(name, a.shape) for name, a in to_params(abstract(config)).items()}
    rules = layout.rules(config, tensors)
    steps = [
        (rule, block) for rule in rules for block in (range(config.depth) if "{i}" in rule.sources[0] else (None,))
    ]
    targets = {target for rule in rules for target in rule.targets}
    problems = [f"{name} is set by no rule" for name in shapes if name not in targets]
    used: set[str] = set()
    for rule, block in track(steps, "converting", progress):
        sources = [source.format(i=block) for source in rule.sources]
        used.update(sources)
        problems += _step(put if not problems else _drop, rule, sources, block, tensors, shapes, dtype)
        if sum(math.prod(shapes[target][1:]) for target in rule.targets) > 2**20:
            _give_back()
    left = unused(layout, tensors, ignored or {}, used)
    problems += [f"{name} is not expected" for name in left]
    if problems:
        like = describe_foreign_extras(left)
        advice = f"it looks like {like}" if like else larger_model(tensors, left)
        error = ConversionError(f"not a complete {layout.name} checkpoint: {listed(problems, advice)}")
        error.problems = tuple(problems)
        raise error


def listed(problems: Sequence[str], advice: str) -> str:
    """What to do, if it is known, and then what is wrong: not more than a terminal shows."""
    most = 3 if advice else 12
    more = [f"and {len(problems) - most} more of this kind"] if len(problems) > most else []
    return "; ".join([*([advice] if advice else []), *problems[:most], *more])


def unused(layout: Layout, tensors: Tensors, ignored: Mapping[str, str], used: Collection[str] = ()) -> list[str]:
    """Names that no rule uses, and that neither the layout nor `ignored` gives a reason for."""
    patterns = [*layout.ignored, *ignored]
    left = [name for name in tensors if name not in used]
    return [name for name in left if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def larger_model(tensors: Tensors, left: Sequence[str]) -> str:
    """What to do about an encoder inside a larger model, if tensors are left outside of its prefix; else empty."""
    prefix = getattr(tensors, "prefix", "")
    outside = [name for name in left if " (outside " in name and prefix.endswith(name.rpartition("outside ")[2][:-1])]
    if not outside or not prefix:
        return ""
    first = outside[0].partition(" ")[0]
    which = f"{len(outside)} tensors, such as {first}, stand" if len(outside) > 1 else f"{first} stands"
    return (
        f"{which} beside {prefix}*: if this is an "
        f"encoder inside a larger model, say --prefix {prefix} (prefix='{prefix}') to take it alone"
    )


def _step(
    put: Put,
    rule: Rule,
    sources: Sequence[str],
    block: int | None,
    tensors: Tensors,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: DTypeLike,
) -> list[str]:
    """Applies a rule to one block, or to what is no block's; returns what is wrong.

    A function of its own: what it holds is gone before the next step reads anything.
    """
    if absent := [source for source in sources if source not in tensors]:
        return [f"{source} is missing" for source in absent]
    values = [tensors[source] for source in sources]
    unsound = []
    for source, value in zip(sources, values, strict=True):
        if not np.issubdtype(value.dtype, np.floating):
            unsound.append(f"{source} holds {value.dtype}, expected floating-point numbers")
        elif not all(np.isfinite(piece).all() for piece in _pieces(value)):
            unsound.append(f"{source} holds NaN or infinity")
    if unsound:
        return unsound
    wanted = [shapes[target] if block is None else shapes[target][1:] for target in rule.targets]
    try:
        with np.errstate(over="ignore"):  # found below
            results = rule.transform(*values)
    except (ValueError, IndexError):
        results = ()
    if [r.shape for r in results] != wanted:
        found = ", ".join(f"{s} {list(v.shape)}" for s, v in zip(sources, values, strict=True))
        becomes = ", ".join(f"{t} {list(w)}" for t, w in zip(rule.targets, wanted, strict=True))
        return [f"wrong shape: {found} cannot become {becomes}"]
    problems = []
    for target, result in zip(rule.targets, results, strict=True):
        start = (block or 0) * result.size
        for piece in _pieces(result):
            with np.errstate(over="ignore"):
                numbers = np.ascontiguousarray(piece, dtype)
            if not np.isfinite(numbers).all():
                problems.append(f"{' + '.join(sources)} exceeds what {np.dtype(dtype)} can hold")
                break
            put(target, start, numbers)
            start += numbers.size
    return problems


def invert(layout: Layout, config: ViTConfig, params: Params, shapes: Mapping[str, Sequence[int]]) -> Params:
    """The tensors of `layout` that convert to these parameters: its table read backwards.

    Args:
      params: with matrices as rules see them, `matrix_shape`.
      shapes: of the tensors whose presence or shape decides between variants of the layout: of all tokens and their
        positions, and of those that the layout's rules look for.

    Raises:
      ValueError: parameters that the layout has no place for.
    """
    # Of tensors the rules see names and shapes alone: these take no memory.
    variant = {name: np.broadcast_to(np.zeros((), np.float32), tuple(shape)) for name, shape in shapes.items()}
    rules = layout.rules(config, variant)
    if lost := sorted(set(params) - {target for rule in rules for target in rule.targets}):
        raise ValueError(f"there is no place for {', '.join(lost)}")
    tensors: Params = {}
    for rule in rules:
        values = [params[target] for target in rule.targets]
        if "{i}" not in rule.sources[0]:
            tensors |= zip(rule.sources, rule.inverse(*values), strict=True)
            continue
        for i in range(config.depth):
            sources = [source.format(i=i) for source in rule.sources]
            tensors |= zip(sources, rule.inverse(*(value[i] for value in values)), strict=True)
    return tensors


PIECE = 2**21
"""Bytes of a tensor that are looked at, and written, at once: a transposed matrix is never copied as a whole."""


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    array = np.atleast_1d(array)
    rows = max(PIECE * len(array) // max(array.nbytes, 1), 1)
    return (array[i : i + rows] for i in range(0, len(array), rows))


def _drop(name: str, start: int, values: np.ndarray) -> None:
    pass


def _give_back() -> None:
    """Returns freed memory to the system. glibc keeps it for the next tensor, which may be too large to lie there."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def check_table(layout: Layout, config: ViTConfig, tensors: Tensors) -> None:
    """Raises a ConversionError unless the table itself sets every parameter once and uses every source once."""
    rules = layout.rules(config, tensors)
    targets = [target for rule in rules for target in rule.targets]
    sources = [source for rule in rules for source in rule.sources]
    expected = set(to_params(abstract(config)))
    if sorted(targets) != sorted(expected) or len(set(sources)) != len(sources):
        raise ConversionError(
            f"the table of {layout.name} is not total: not set {sorted(expected - set(targets))}, "
            f"unknown {sorted(set(targets) - expected)}, "
            f"twice {sorted({t for t in targets + sources if (targets + sources).count(t) > 1})}"
        )
