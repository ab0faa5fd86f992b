"""Which runs of a model the experiments read: each pass streams images once for all experiments that name it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from jaxvit import ViT
from jaxvit.model.edits import Edits

from .experiment import About, Experiment, Found, Measured, Option, Subject
from .trace import Trace, observe, widened

Options = Mapping[str, Mapping[str, Any]]
"""Id of an experiment, or of a pass, -> name of an option -> value."""


@dataclass(frozen=True)
class Labelled:
    """Images with classes.

    Attributes:
      sources: paths, or small objects that read an image of a dataset, see `experiments.core.labelled.Row`.
      labels: index into `classes` of each.
      name: where they come from, for results.json.
    """

    sources: Sequence[Any]
    labels: Sequence[int]
    classes: Sequence[str]
    name: str


@dataclass(frozen=True)
class Request:
    """What is to be run on every model.

    Attributes:
      images: files, in order.
      experiments: those to run.
      options: of experiments and passes.
      labelled: images with classes, for A4; None without.
      size: side of the crops in pixels; None is each checkpoint's own.
      control_images: how many of the images are run under each control and with test-time registers.
    """

    images: Sequence[Path]
    experiments: Sequence[Experiment]
    options: Options
    labelled: Labelled | None = None
    size: int | None = None
    batch_size: int = 16
    control_images: int = 256
    progress: bool = True
    save_every: float = 30.0

    def reading(self, name: str, about: About) -> list[Experiment]:
        """The experiments that read a pass of this model."""
        return [e for e in self.experiments if name in e.passes and e.refuses(about) is None]


class Pass:
    """One streaming of images through a model.

    Attributes:
      name: by which experiments ask for it.
      private: what it keeps of every image is for its own use, such as features, and not for per_image/.
      reads_earlier: whether it needs what passes before it found.
      options: of the pass itself.
    """

    name: ClassVar[str]
    private: ClassVar[bool] = False
    reads_earlier: ClassVar[bool] = False
    options: ClassVar[tuple[Option, ...]] = ()

    def sources(self, request: Request) -> Sequence[Any]:
        return request.images

    def refuses(self, request: Request, about: About) -> str | None:
        """Why this pass cannot be made of this model, or None."""
        return None

    def settings(self, request: Request) -> Mapping[str, Any]:
        """What else the pass depends on, for its settings.json."""
        return {}

    def known(self, request: Request) -> Mapping[str, Any]:
        """What is known of each source beforehand, as `known` of `experiments.runner.store.run_pass`."""
        return {}

    def extra(self, request: Request, subject: Subject, found: Mapping[str, Found]) -> Any:
        """A pytree of arrays for `measure`, out of earlier passes."""
        return ()

    def measure(self, request: Request, about: About) -> Callable[[ViT, Edits | None, Any, Array, Array], Measured]:
        """A pure function (model, edits, extra, images, position [B]) -> Measured, whose names begin with an
        experiment's id and a slash.
        """
        raise NotImplementedError


def sites_of(experiments: Sequence[Experiment]) -> frozenset[str]:
    """What they ask for beside what all read."""
    return frozenset(site for e in experiments for site in e.sites)


def measure_all(experiments: Sequence[Experiment], trace: Trace, model: ViT, options: Options) -> Measured:
    """What all experiments measure of one run, under their ids."""
    model = widened(model)
    whole = Measured({}, {}, {}, {})
    for e in experiments:
        whole.update(e.measure(trace, model, options[e.id]).prefixed(f"{e.id}/"))
    return whole


class Clean(Pass):
    """The model as it is."""

    name = "clean"

    def measure(self, request: Request, about: About) -> Callable[..., Measured]:
        experiments = request.reading(self.name, about)
        wants = frozenset().union(*(e.wants for e in experiments))

        def measure(model: ViT, edits: Edits | None, extra: Any, images: Array, position: Array) -> Measured:
            trace = observe(model, images, edits, wants, sites=sites_of(experiments))
            m = measure_all(experiments, trace, model, request.options)
            prefix = jnp.moveaxis(trace.prefix, 0, 1)  # B L P D: what the controls put in place of tokens
            m.keep["prefix"] = prefix
            m.sums["prefix"], m.sums["prefix squared"] = prefix, prefix**2
            return m

        return measure
