"""A model without registers as a subject with test-time registers (Jiang et al. 2025), which are made of the images.

B5 compares such a model with the same as it is, and explains the options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import jaxvit
from jaxvit import Batch, Neurons, Take, ViT, find_register_neurons, over_images
from jaxvit.model.edits import Edits

from ..core.experiment import Option, Subject
from ..core.passes import Request

AT_ONCE = 4
"""Images at a time while neurons are sought: the activations of all neurons of all layers are held."""
OPTIONS = (
    Option("neurons", 20, "how many neurons are moved", least=1),
    Option("images", 64, "on how many images they are found", least=1),
    Option("layer", -1, "after which block, from 0, norms tell outliers; negative: from the end"),
    Option("top_layer", -1, "neurons are sought up to this layer, from 0, and not beyond `layer`"),
    Option("quantile", 0.995, "if no patch is an outlier, take those with norms above this quantile", least=0),
)
"""How the neurons are found; the command line has them as --test-time-registers-neurons and so on."""
NAME = "test-time registers"
"""Whose options these are: the name of B5's pass."""


class Chosen(NamedTuple):
    """Neurons, and how they were found.

    Attributes:
      threshold: the norm above which a patch counted as an outlier; NaN: mean + 3 standard deviations of its image.
    """

    neurons: Neurons
    threshold: float

    @property
    def no_outliers(self) -> bool:
        return not np.isnan(self.threshold)


def find(
    model: ViT,
    batches: Sequence[Batch | Array],
    count: int = 20,
    *,
    layer: int = -1,
    top_layer: int = -1,
    quantile: float = 0.995,
) -> Chosen:
    """Register neurons, of any model: where no patch is an outlier, of the patches whose norm is above a quantile of
    the norms of all patches of all images.

    Args:
      batches: is gone through up to three times.
      layer, top_layer, quantile: as the options.

    Raises:
      ValueError: no images, or no layer of these numbers.
    """
    depth = model.config.depth
    layers = range(min(top_layer % depth, layer % depth) + 1)
    search = dict(outliers_at=layer, layers=layers, progress=False)

    def norms(model: ViT, images: Array) -> Array:
        stream = model(images, record={"resid_post": Take(layers=layer)}).trace["resid_post"][0]
        return jnp.linalg.norm(stream[:, model.prefix :], axis=-1)

    every = over_images(norms, model, batches, progress=False)
    limits = every.mean(axis=1) + 3 * every.std(axis=1)
    if (every > limits[:, None]).any():
        try:
            return Chosen(find_register_neurons(model, batches, count, **search), float("nan"))
        except ValueError as error:  # one patch, at the limit to the last bit
            if "has a patch whose norm is above" not in str(error):
                raise
    # Below the largest norm even where all are alike.
    threshold = min(float(np.quantile(every, quantile)), float(np.nextafter(every.max(), np.float32(0))))
    return Chosen(find_register_neurons(model, batches, count, threshold=threshold, **search), threshold)


def with_test_time_registers(
    model: ViT, batches: Sequence[Batch | Array], count: int = 1, neurons: int = 20, **how: Any
) -> tuple[ViT, Edits, Chosen]:
    """The model with `count` appended registers, the edits that make them test-time registers, and the neurons.

    Args:
      how: as of `find`, which also finds neurons in models without outliers.
    """
    chosen = find(model, batches, neurons, **how)
    return *jaxvit.test_time_registers(model, chosen.neurons, count), chosen


def appended(subject: Subject, request: Request, count: int = 1) -> Subject:
    """The same model with `count` test-time registers, as a subject of its own; how it was made is in its source.

    Raises:
      ValueError: a model with registers; no image.
    """
    if subject.model.config.registers:
        raise ValueError(f"{subject.about.name} has registers; test-time registers are for models trained without")
    options = options_of(request)
    batches = batches_of(request, subject.model)
    wider, edits, chosen = with_test_time_registers(
        subject.model, batches, count, options["neurons"], **how_of(options)
    )
    told = {
        "count": count,
        "images": sum(int(batch.valid.sum()) for batch in batches),
        "options": options,
        "no outliers": chosen.no_outliers,
        "threshold": None if np.isnan(chosen.threshold) else chosen.threshold,
        "neurons": in_words(chosen.neurons),
    }
    about = replace(
        subject.about,
        registers=wider.config.registers,
        registers_are="test-time",
        config=wider.config.to_dict(),
        source={**subject.about.source, "test-time registers": told},
    )
    return Subject(about, wider, edits)


def options_of(request: Request) -> dict[str, Any]:
    given = request.options.get(NAME, {})
    return {option.name: given.get(option.name, option.default) for option in OPTIONS}


def made_of(request: Request) -> dict[str, Any]:
    """What the neurons depend on, beside the model."""
    images = request.images[: options_of(request)["images"]]
    return {"options": options_of(request), "images": list(map(str, images)), "size": request.size}


def how_of(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("layer", "top_layer", "quantile")}


def batches_of(request: Request, model: ViT) -> list[Batch]:
    """The images on which neurons are found."""
    sources = request.images[: options_of(request)["images"]]
    size = min(request.batch_size, AT_ONCE)
    skipped: list[str] = []
    batches = list(
        jaxvit.stream(sources, model.config, size, request.size, on_error=lambda _, error: skipped.append(str(error)))
    )
    if not batches:
        raise jaxvit.ImageError(
            f"none of the {len(sources)} images that neurons are sought on can be used: {skipped[0]}"
        )
    return batches


def in_words(neurons: Neurons) -> list[dict[str, Any]]:
    rows = zip(*(np.asarray(a).tolist() for a in neurons), strict=True)
    return [{"layer": layer, "channel": channel, "score": score} for layer, channel, score in rows]
