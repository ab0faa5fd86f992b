"""Images with classes, from a folder or from a Hugging Face dataset, and the pass of a model over them.

    --labelled FOLDER                 a subfolder for each class, named after it; its images may lie deeper
    --labelled datasets:NAME[:SPLIT]  a dataset of the hub, or a folder: one that `save_to_disk` wrote, or one that
                                      `datasets.load_dataset` can read, such as a subfolder of images for each class

Reading datasets needs the package: pip install datasets. It downloads all splits of a dataset of the hub, whichever is
asked for. Without SPLIT it is the first there is of validation, val, valid, train, test: many a test split has no
labels.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from jaxvit import ImageError, ViT, find_images
from jaxvit.io.image_sets import PREFIX, dataset_name, open_dataset
from jaxvit.model.edits import Edits

from .experiment import About, Measured, Option
from .passes import Labelled, Pass, Request, measure_all, sites_of
from .trace import observe


def parse(spec: str) -> Labelled:
    """Opens what --labelled asks for.

    Raises:
      ImageError: there is no such thing, or it has no two classes of two images.
    """
    if not spec.startswith(PREFIX):
        return labelled_folder(Path(spec).expanduser())
    return labelled_dataset(*dataset_name(spec))


def labelled_folder(path: Path) -> Labelled:
    """The images of a folder that has a subfolder for each class; hidden ones are left out.

    Raises:
      ImageError: there is no such folder, it has no subfolders, or not two of them hold two images or more.
    """
    path = Path(path)
    if not path.is_dir():
        raise ImageError(f"{path} is {'a file, not a folder' if path.exists() else 'not there'}; expected a folder")
    folders = sorted(p for p in path.iterdir() if p.is_dir() and p.name[0] != ".")
    if not folders:
        raise ImageError(f"{path} has no subfolders; expected one for each class, named after it, with its images")
    sources: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        try:
            images = find_images(folder)
        except ImageError:  # a class without images, which is left out and counted like one with a single image
            continue
        sources += images
        labels += [label] * len(images)
    return _checked(Labelled(sources, labels, [folder.name for folder in folders], str(path)))


def labelled_dataset(
    name: str, split: str | None = None, *, image: str | None = None, label: str | None = None
) -> Labelled:
    """A split of a Hugging Face dataset; images stay encoded, and on disk, until they are needed.

    Args:
      name: of the hub, or a folder.
      image, label: names of columns, where their types and names leave a doubt; see `jaxvit.io.image_sets`.

    Raises:
      ImageError: the package is missing, the dataset cannot be loaded, it has no such split or columns, or it has no
        two classes of two images.
    """
    found = open_dataset(name, split, image=image, label=label, needs_labels=True)
    start: Any = found.start
    return _checked(Labelled(start.rows, found.labels or [], list(found.classes), found.title))


def _checked(labelled: Labelled) -> Labelled:
    usable = sum(size > 1 for size in Counter(labelled.labels).values())
    if usable < 2:
        raise ImageError(
            f"{labelled.name}: {usable} of {len(labelled.classes)} classes have two images or more; at least two are "
            "needed, each with one image to learn from and one to test on"
        )
    return labelled


def choose(labels: Sequence[int], per_class: int, seed: int) -> np.ndarray:
    """Which images to read, in order: `per_class` of each class drawn at random; all, where a class has no more; none
    of a class with a single one.
    """
    labels = np.asarray(labels)
    by_class = np.argsort(labels, kind="stable")
    values, starts = np.unique(labels[by_class], return_index=True)
    chosen = []
    for label, members in zip(values, np.split(by_class, starts[1:]), strict=True):
        if len(members) > 1:
            chosen.append(np.random.default_rng([seed, int(label)]).permutation(members)[:per_class])
    return np.sort(np.concatenate(chosen))


class LabelledImages(Pass):
    """The model as it is, on images with classes. Beside what was measured, every row has `label` and `classes`, the
    number of all classes.
    """

    name = "labelled"
    private = True
    options = (
        Option("per_class", 20, "how many images of each class to read; half as many draws can be disjoint", least=2),
        Option("seed", 0, "of the choice of images", least=0),
    )

    def refuses(self, request: Request, about: About) -> str | None:
        if request.labelled is None:
            return f"needs images with classes: --labelled FOLDER or --labelled {PREFIX}NAME"
        return None

    def chosen(self, request: Request) -> np.ndarray:
        """Numbers of the images to read."""
        assert request.labelled is not None, "see `refuses`"
        options = request.options[self.name]
        return choose(request.labelled.labels, options["per_class"], options["seed"])

    def sources(self, request: Request) -> Sequence[Any]:
        assert request.labelled is not None, "see `refuses`"
        return [request.labelled.sources[i] for i in self.chosen(request)]

    def known(self, request: Request) -> dict[str, np.ndarray]:
        known = self.labels(request)
        readers = [e.id for e in request.experiments if self.name in e.passes]
        return {f"{reader}/{name}": values for reader in readers for name, values in known.items()}

    def labels(self, request: Request) -> dict[str, np.ndarray]:
        """Of each image that is read: its label, and the number of classes."""
        assert request.labelled is not None, "see `refuses`"
        labels = np.asarray(request.labelled.labels, np.int32)[self.chosen(request)]
        return {"label": labels, "classes": np.full_like(labels, len(request.labelled.classes))}

    def settings(self, request: Request) -> Mapping[str, Any]:
        assert request.labelled is not None, "see `refuses`"
        labels = self.labels(request)
        whole = hashlib.sha256(repr(list(request.labelled.classes)).encode())
        for name in sorted(labels):
            whole.update(labels[name].tobytes())
        return {"labelled": request.labelled.name, "labels": whole.hexdigest()}

    def measure(self, request: Request, about: About) -> Callable[..., Measured]:
        experiments = request.reading(self.name, about)
        wants = frozenset().union(*(e.wants for e in experiments))

        def measure(model: ViT, edits: Edits | None, extra: Any, images: Array, position: Array) -> Measured:
            return measure_all(
                experiments, observe(model, images, edits, wants, sites=sites_of(experiments)), model, request.options
            )

        return measure
