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
from jaxvit.model.edits import Edits

from .experiment import About, Measured, Option
from .passes import Labelled, Pass, Request, measure_all, sites_of
from .trace import observe

PREFIX = "datasets:"
SPLITS = ("validation", "val", "valid", "train", "test")
IMAGES = ("image", "img", "jpg", "png", "pixels", "picture")
LABELS = ("label", "labels", "fine_label", "class", "target", "cls", "y")
"""How columns are called that are taken where the types of a dataset's columns leave a choice, in this order."""


def parse(spec: str) -> Labelled:
    """Opens what --labelled asks for.

    Raises:
      ImageError: there is no such thing, or it has no two classes of two images.
    """
    if not spec.startswith(PREFIX):
        return labelled_folder(Path(spec).expanduser())
    name, split = spec.removeprefix(PREFIX), ""
    if not Path(name).expanduser().exists():
        name, _, split = name.partition(":")  # the first colon: there may be others in train[:10%]
    if not name:
        raise ImageError(f"{spec} names no dataset; expected {PREFIX}NAME or {PREFIX}NAME:SPLIT")
    return labelled_dataset(name, split or None)


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
      image, label: names of columns, where their types and names (`IMAGES`, `LABELS`) leave a doubt.

    Raises:
      ImageError: the package is missing, the dataset cannot be loaded, it has no such split or columns, or it has no
        two classes of two images.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImageError(f"{PREFIX}{name} needs the package datasets: pip install datasets") from error
    dataset, split = _load(datasets, name, split)
    features = dataset.features or {}
    image = image or _column(
        name, "image", [c for c, kind in features.items() if isinstance(kind, datasets.Image)], features, IMAGES
    )
    kinds = [c for c, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    plain = [c for c, kind in features.items() if c in LABELS and isinstance(kind, datasets.Value)]
    label = label or _column(name, "label", kinds or plain, features, LABELS)
    for column in (image, label):
        if column not in features:
            raise ImageError(f"{name} has no column {column!r}; it has {', '.join(features)}")
    values = dataset.select_columns([label])[:][label]
    if isinstance(features[label], datasets.ClassLabel):
        classes = list(features[label].names)
        known = {i: i for i in range(len(classes))}  # test splits mark what is secret by -1
    else:
        distinct = sorted({value for value in values if value is not None})
        classes = [str(value) for value in distinct]
        known = {value: i for i, value in enumerate(distinct)}
    numbers = [i for i, value in enumerate(values) if value in known]
    title = f"{PREFIX}{name}:{split}"
    rows = Rows(dataset.select_columns([image]), image, numbers, f"{title} {dataset._fingerprint}")
    return _checked(Labelled(rows, [known[values[i]] for i in numbers], classes, title))


class Rows(Sequence):
    """The images of a dataset; items are small, see `Row`.

    Args:
      numbers: of the rows that count.
      name: tells the dataset, its split and its content.
    """

    def __init__(self, dataset: Any, column: str, numbers: Sequence[int], name: str):
        import datasets

        # Undecoded: jaxvit decodes in threads of its own, and its errors name the image.
        self.dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self.column, self.numbers, self.name = column, numbers, name

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [Row(self, number) for number in self.numbers[at]]
        return Row(self, self.numbers[at])


class Row:
    """One image of a dataset, read when `fetch` is called; as text it is its name."""

    def __init__(self, rows: Rows, number: int):
        self.rows, self.number = rows, number

    def __repr__(self) -> str:
        return f"{self.rows.name} row {self.number}"

    def fetch(self) -> bytes:
        """The image file; empty if it is missing, which is then told like any other image that cannot be used."""
        value = self.rows.dataset[self.number][self.rows.column] or {}
        if value.get("bytes") or not value.get("path"):
            return value.get("bytes") or b""
        try:
            return Path(value["path"]).read_bytes()
        except OSError:
            return b""


def _load(datasets: Any, name: str, split: str | None) -> tuple[Any, str]:
    """The dataset and the name of its split."""
    folder = Path(name).expanduser()
    saved = any((folder / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(str(folder) if folder.exists() else name, split=split)
    except Exception as error:  # the hub, the network, the package and the files have errors of many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(
            f"the dataset {name}{f', split {split},' if split else ''} cannot be loaded: {reason}"
        ) from error
    if not isinstance(found, dict):
        own = str(found.split or "all")
        if saved and split not in (None, own):
            raise ImageError(f"{name} holds one split, {own}, and not {split}")
        return found, split or own
    split = split or next((each for each in SPLITS if each in found), next(iter(found)))
    if split not in found:
        raise ImageError(f"{name} has no split {split}; it has {', '.join(found)}")
    return found[split], split


def _column(
    name: str, what: str, candidates: Sequence[str], features: Mapping[str, Any], preferred: Sequence[str]
) -> str:
    if len(candidates) == 1:
        return candidates[0]
    if chosen := [column for column in preferred if column in candidates]:
        return chosen[0]
    found = f"several: {', '.join(candidates)}" if candidates else "none"
    raise ImageError(
        f"{name} needs one {what} column and has {found}; its columns are {', '.join(features)}. Expected a column of "
        f"the type {'Image' if what == 'image' else 'ClassLabel'}, or several of which one is {' or '.join(preferred)}"
    )


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
