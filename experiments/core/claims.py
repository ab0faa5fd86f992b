"""The paper's statements about model sizes, as functions of numbers; every experiment states its own.

The paper's orderings are of the families it studied (`PAPER`). On others, and on random weights, the same is tested and
reported as no ordering of the paper's.

One rule decides everywhere (`lacking`, `decide`). A statement over sizes needs a small model and all sizes that the
paper calls large; one about the largest needs that size. No statement is decided on fewer than 30 images, or where a
number is undefined. What is not decided says what was missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from .charts import listed
from .experiment import About, Claim, Option, Results

PAPER = {1: ("DINOv2",), 2: ("DINOv2",), 3: ("DINOv2",), 4: ("DINOv2",), 5: ("DINOv2", "CLIP", "iBOT")}
"""Of which families the paper states an ordering; that DeiT III has no trend is A8's to tell."""
LARGE = {"DINOv2": ("L", "g"), "CLIP": ("L",), "iBOT": ("L",), "DeiT III": ("L", "H")}
"""Which sizes the paper calls large, by family, the largest last; in others, the largest of those given."""
RANDOM = "random weights"
"""What models of random weights are called, which are one family."""
FEWEST = 30
"""Images below which no statement is decided."""
FAR = 1.5
"""The paper gives no number for `far` larger: at least so many times."""
TWO = "needs a small and a large model of one family"


class Verdict(NamedTuple):
    """Of `Claim`: whether it holds, and by how much or what was missing."""

    holds: bool | None
    by: str


def by_family(models: Mapping[str, About], *, registers: bool, among: Sequence[str]) -> dict[str, list[About]]:
    """Families with or without trained registers, each from small to large; models with random weights form one family
    of their own, and those with test-time registers none.

    Args:
      among: keys of the models that have numbers.
    """
    found: dict[str, list[About]] = {}
    for about in models.values():
        kinds = ("trained", "random") if registers else ("none",)
        if about.key in among and about.registers_are in kinds:
            found.setdefault(RANDOM if about.weights == "random" else about.family, []).append(about)
    return {family: sorted(each, key=lambda a: a.parameters) for family, each in found.items()}


def tested(
    ordering: int,
    experiment: str,
    text: str,
    test: Callable[[list[About]], Verdict],
    results: Results,
    models: Mapping[str, About],
    *,
    registers: bool,
    options: Sequence[Option] = (),
    paper: Sequence[str] | None = None,
    others: bool = True,
    without: Sequence[str] = (),
    more: str = "",
) -> list[Claim]:
    """A statement, tested on every family that was given; and one claim that is not tested, on those of the paper's
    families that were not.

    Args:
      text: one sentence, with its full stop.
      test: of the models of a family, from small to large, see `comparable`.
      results: `reading` of each says the options that were taken; those that are not the default are told.
      registers: whether it is of models with registers, or of those without.
      options: of the experiment; those that have a say in the statement.
      paper: families of which the paper states it, if not those of the ordering.
      others: whether it is tested on other families too, as no ordering of the paper's.
      without: families it is not tested on.
      more: what it needs beside the models.
    """
    paper = PAPER[ordering] if paper is None else paper
    given, claims = by_family(models, registers=registers, among=list(results)), []
    for family, members in given.items():
        own = family in paper
        if family in without or not (own or others):
            continue
        members = comparable(members)
        said = text if own else f"As the paper states of {listed(paper)}: {text}"
        said = with_reading(said, options, results[members[0].key].get("reading", {}))
        on = f"{family}: {', '.join(a.name for a in members)}"
        claims.append(Claim(ordering if own else 0, experiment, said, *test(members), on))
    present = by_family(models, registers=registers, among=list(models))
    numberless = [family for family in paper if family in present and family not in given]
    missing = [family for family in paper if family not in present]
    for families, needed in (
        (numberless, f"no numbers of {listed([a.name for family in numberless for a in present[family]])}{more}"),
        (missing, f"needs trained models {'with' if registers else 'without'} registers{more}"),
    ):
        if families:
            claims.append(Claim(ordering, experiment, text, None, needed, ", ".join(families)))
    return claims


def with_reading(text: str, options: Sequence[Option], reading: Mapping[str, Any] | str) -> str:
    """The sentence, with the options that are not at their default."""
    chosen = {"reading": reading} if isinstance(reading, str) else reading
    told = []
    for option in options:
        value = chosen.get(option.name, option.default)
        if value != option.default:
            name = option.name.replace("_", " ")
            if isinstance(value, bool):
                told.append(name if value else f"no {name}")
            else:
                told.append(str(value) if option.name == "reading" else f"{name} {value}")
    return f"{text.removesuffix('.')} (read: {', '.join(told)})." if told else text


def groups(models: Sequence[About]) -> list[list[About]]:
    """Models of one size together, from the smallest size to the largest."""
    sizes: dict[str, list[About]] = {}
    for about in sorted(models, key=lambda a: a.parameters):
        sizes.setdefault(about.size, []).append(about)
    return list(sizes.values())


def comparable(models: Sequence[About]) -> list[About]:
    """Leaves out a largest model whose training resolution no smaller model shares, unless it is alone in its size."""

    def native(about: About) -> tuple[int, ...]:
        return tuple(side * about.config["patch"] for side in about.config["grid"])

    *smaller, largest = groups(models)
    known = {native(about) for group in smaller for about in group}
    alike = [about for about in largest if native(about) in known] or largest
    return [about for about in models if about not in largest or about in alike]


def sides(models: Sequence[About]) -> tuple[list[About], list[About]]:
    """The small ones and the large ones of a family."""
    if not models:
        return [], []
    if sizes := large_sizes(models):
        large = [a for a in models if a.size in sizes]
    else:
        each = groups(models)
        large = each[-1] if len(each) > 1 else []
    return [a for a in models if a not in large], large


def large_sizes(models: Sequence[About]) -> tuple[str, ...]:
    """Those the paper calls large; none of a family it does not know, or of random weights."""
    about = models[0]
    return () if about.weights == "random" else LARGE.get(about.family, ())


def largest_of(models: Sequence[About]) -> tuple[list[About], str]:
    """All of the size the paper calls the largest of this family, and what is missing if there are none; of other
    families, all of the largest size that was given.
    """
    if sizes := large_sizes(models):
        return [a for a in models if a.size == sizes[-1]], f"needs {models[0].family} {sizes[-1]}"
    return groups(models)[-1], ""


def names(models: Sequence[About]) -> dict[str, str]:
    """Key -> the size; the whole name of those that share their size with others."""
    return {a.key: a.size if len(group) == 1 else a.name for group in groups(models) for a in group}


def counted(images: Sequence[int]) -> str:
    low, high = min(images), max(images)
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def lacking(models: Sequence[About]) -> str:
    """What a family lacks for a statement over its sizes, or ""."""
    wanted, given = large_sizes(models), {about.size for about in models}
    if missing := [size for size in wanted if size not in given]:
        return f"needs {models[0].family} {' and '.join(missing)}"
    return "" if all(sides(models)) else TWO


def decide(told: str, images: Sequence[int], values: Iterable[float], test: Callable[[], bool]) -> Verdict:
    """Whether a statement holds, on enough images and numbers that are defined.

    Args:
      told: the numbers, in words.
      images: how many each is of.
      values: the numbers that the test reads.
    """
    told = f"{told}; {counted(images)}"
    if min(images) < FEWEST:
        return Verdict(None, f"needs at least {FEWEST} images: {told}")
    if not all(map(math.isfinite, values)):
        return Verdict(None, f"undefined: {told}")
    return Verdict(test(), told)


def images_of(summary: Mapping[str, Any] | None) -> int:
    """How many images are in what `experiment.summary`, or a CKA, gave."""
    return 0 if summary is None else int(summary.get("n") or 0)


def mean_of(summary: Mapping[str, Any] | None) -> float:
    """The mean in what `experiment.summary` gave; NaN where it is undefined, which results.json has as null."""
    return stated(summary, "mean")


def stated(summary: Mapping[str, Any] | None, name: str) -> float:
    """A number of what `experiment.summary` gave; NaN where it is undefined, which results.json has as null."""
    value = None if summary is None else summary.get(name)
    return math.nan if value is None else value


def median_of(summary: Mapping[str, Any] | None) -> float:
    """The same of the median."""
    return stated((summary or {}).get("quantiles"), "0.5")


def compare(
    models: Sequence[About],
    value: Callable[[About], float],
    images: Callable[[About], int],
    *,
    digits: int = 3,
    largest: bool = False,
    times: float = 1,
    more: float = 0,
) -> Verdict:
    """That `value` is larger in every large model of a family than in every small one.

    Args:
      images: how many it is of.
      largest: compare all of the largest size with all of other sizes.
      times: at least so many times as large; 1 to ask only that it is larger.
      more: at least larger by so much; 0 to ask only that it is larger.
    """
    if largest:
        large, missing = largest_of(models)
        small = [a for a in models if a.size != large[0].size] if large else []
        if not large:
            return Verdict(None, missing)
        if not small:
            return Verdict(None, f"needs a model smaller than {large[0].size}")
    else:
        small, large = sides(models)
        if missing := lacking(models):
            return Verdict(None, missing)
    called, values = names(models), {a.key: value(a) for a in models}
    told = ", ".join(f"{called[key]} {x:.{digits}f}" for key, x in values.items())
    low, high = min(values[a.key] for a in large), max(values[a.key] for a in small)
    if math.isfinite(low - high):
        told += f"; {low / high:.2f} times" if times != 1 and high > 0 else f"; gap {low - high:+.{digits}f}"

    def test() -> bool:
        return low > high and low - high >= more and (times == 1 or low >= times * high)

    return decide(told, [images(a) for a in models], values.values(), test)


def falls(levels: Sequence[Sequence[float]], rise: float = 0) -> bool:
    """Whether every value of a level is below all of the level before it, or above them by no more than `rise`; and in
    the end all are below all of the first by more than that.
    """
    down = all(
        max(after) <= min(before) + rise if rise else max(after) < min(before) for before, after in pairwise(levels)
    )
    return down and max(levels[-1]) < min(levels[0]) - rise
