"""Many images, where they lie: a folder, a list, tar shards, a Hugging Face dataset. Names and labels come along.

    photographs                     a folder, at any depth
    list.txt                        a path in each line, from where the list lies
    'shards/*.tar'                  WebDataset's shards; shards/{000..009}.tar too
    datasets:NAME[:SPLIT]           a dataset of the hub, or a folder: one that `save_to_disk` wrote, or one that
                                    `datasets.load_dataset` can read

Reading datasets needs the package: pip install datasets. It downloads all splits of a dataset of the hub, whichever is
asked for. Without SPLIT it is the first there is of validation, val, valid, train, test: many a test split has no
labels.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jaxvit.io.images import SUFFIXES, ImageError, Item, Source, find_images

PREFIX = "datasets:"
SPLITS = ("validation", "val", "valid", "train", "test")
IMAGES = ("image", "img", "jpg", "png", "pixels", "picture")
LABELS = ("label", "labels", "fine_label", "class", "target", "cls", "y")
"""How columns are called that are taken where the types of a dataset's columns leave a choice, in this order."""


@dataclass(frozen=True)
class ImageSet:
    """Images in an order that stays, with names, and labels where there are any.

    Attributes:
      title: where they come from.
      identity: of another text where names, labels or their order are others; "" where that is not known.
      start: gives the images from one of these numbers on.
      length: how many, if that is known beforehand.
      classes: what the labels 0, 1 .. are called; empty where labels are what the source says, or there are none.
      labels: of all images, where they are known before any is read.
    """

    title: str
    identity: str
    start: Callable[[int], Iterator[Item]]
    length: int | None = None
    classes: tuple[str, ...] = ()
    labels: Sequence[Any] | None = None

    def part(self, begin: int, end: int) -> ImageSet:
        """Only the images from number `begin` to the one before `end`."""

        def start(first: int) -> Iterator[Item]:
            return islice(self.start(begin + first), end - begin - first)

        identity = self.identity and f"{self.identity} {begin} {end}"
        labels = None if self.labels is None else self.labels[begin:end]
        return ImageSet(f"{self.title} from {begin} to {end - 1}", identity, start, end - begin, self.classes, labels)


def open_images(place: str | os.PathLike[str], *, labelled: bool = False) -> ImageSet:
    """Opens a folder, a list, tar shards or a dataset; see the top of `jaxvit.io.image_sets`.

    Args:
      labelled: the first subfolders of a folder are classes. Shards (`.cls`) and datasets have labels of their own.

    Raises:
      ImageError: there is no such thing, or it holds no image; a package is missing.

    Example:

        images = open_images("photographs", labelled=True)
        next(images.start(0))  # Item(name='cat/0.jpg', source=PosixPath('photographs/cat/0.jpg'), label=0)
    """
    text = os.fspath(place)
    if text.startswith(PREFIX):
        return open_dataset(*dataset_name(text))
    path = Path(text).expanduser()
    if path.is_dir():
        return of_folder(path, labelled)
    if labelled:
        why = "no folder: only its subfolders can be classes" if path.exists() else "not there: expected a folder"
        raise ImageError(f"{text} is {why}")
    if tars := shards(str(path)):
        return of_shards(text, tars)
    if not path.is_file():
        raise ImageError(f"{text} is not there: expected a folder, a list of paths (.txt), .tar files or {PREFIX}NAME")
    return of_list(path) if path.suffix.lower() == ".txt" else of_sources([path])


def of_sources(sources: Iterable[Source], labels: Iterable[Any] | None = None) -> ImageSet:
    """Images in a list or in any iterable, which can be gone through only once if it is a generator."""

    def start(first: int) -> Iterator[Item]:
        beside = iter(labels) if labels is not None else None
        for index, source in enumerate(sources):
            try:
                label = None if beside is None else next(beside)
            except StopIteration:
                raise ValueError(f"there are more images than labels: no label for image {index}") from None
            if index >= first:
                name = os.fspath(source) if isinstance(source, str | os.PathLike) else f"image {index}"
                yield Item(name, source, label)
        if beside is not None and next(beside, beside) is not beside:
            raise ValueError("there are more labels than images")

    length = len(sources) if hasattr(sources, "__len__") else None  # pyright: ignore[reportArgumentType]
    identity = ""
    if isinstance(sources, Sequence) and (labels is None or isinstance(labels, Sequence)):  # they stay as they are
        names = [os.fspath(each) for each in sources if isinstance(each, str | os.PathLike)]
        identity = digest(names, map(str, labels or ())) if len(names) == len(sources) else ""
    return ImageSet("images", identity, start, length)


def of_folder(folder: Path, labelled: bool) -> ImageSet:
    paths = find_images(folder)
    names = [path.relative_to(folder).as_posix() for path in paths]
    classes: tuple[str, ...] = ()
    labels: list[int | None] = [None] * len(names)
    if labelled:
        if loose := [name for name in names if "/" not in name]:
            raise ImageError(f"{folder / loose[0]} lies in no subfolder, so it has no class")
        numbers: dict[str, int] = {}
        labels = [numbers.setdefault(name.split("/")[0], len(numbers)) for name in names]
        classes = tuple(numbers)
    items = [Item(*each) for each in zip(names, paths, labels, strict=True)]
    known = labels if labelled else None
    return ImageSet(str(folder), digest(names, classes), lambda first: iter(items[first:]), len(items), classes, known)


def of_list(path: Path) -> ImageSet:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(f"{path} cannot be read as a list of paths, one in each line: {error}") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ImageError(f"{path} is empty: expected the path of an image in each line")
    items = [Item(name, path.parent / Path(name).expanduser(), None) for name in names]
    return ImageSet(str(path), digest(names), lambda first: iter(items[first:]), len(items))


def digest(*texts: Iterable[str]) -> str:
    whole = hashlib.sha256()
    for group in texts:
        for text in group:
            whole.update(text.encode("utf-8", "surrogateescape") + b"\0")
        whole.update(b"\1")
    return whole.hexdigest()


# Tar shards -----------------------------------------------------------------------------------------------------------


def shards(pattern: str) -> list[Path]:
    """The tar files that a name, a pattern or a range in braces stands for, in order."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match:
        first, last = match.groups()
        numbers = (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
        return [path for i in numbers for path in shards(pattern[: match.start()] + i + pattern[match.end() :])]
    if not re.search(r"\.(tar|tgz|tar\.gz)$", pattern.lower()):
        return []
    found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) and not Path(pattern).exists() else [pattern]  # noqa: PTH207
    return [Path(path) for path in found]


def of_shards(title: str, tars: Sequence[Path]) -> ImageSet:
    """Images of tars, each with the label in the .cls file of the same name, as WebDataset has it."""
    if missing := [path for path in tars if not path.is_file()]:
        raise ImageError(f"{missing[0]} is not there")

    def start(first: int) -> Iterator[Item]:
        return islice((item for path in tars for item in of_tar(path)), first, None)

    if next(start(0), None) is None:
        raise ImageError(f"{title} holds no image; looked for {', '.join(sorted(SUFFIXES))}")
    return ImageSet(title, digest(f"{path.name} {path.stat().st_size}" for path in tars), start)


def of_tar(path: Path) -> Iterator[Item]:
    try:
        with tarfile.open(path) as tar:
            key, image, label = None, None, None
            for member in tar:
                if not member.isfile() or Path(member.name).name.startswith("."):
                    continue
                folder, name = os.path.split(member.name)
                stem, dot, suffix = name.partition(".")
                if (folder, stem) != key:  # the files of a sample follow each other
                    if image is not None:
                        yield Item(*image, label)
                    key, image, label = (folder, stem), None, None
                read = tar.extractfile(member)
                assert read is not None, "a file, see above"
                if suffix.lower() == "cls":
                    text = read.read().decode("utf-8", "replace").strip()
                    label = int(text) if re.fullmatch(r"-?\d+", text) else text
                elif f"{dot}{suffix.split('.')[-1].lower()}" in SUFFIXES:
                    if image is not None:
                        raise ImageError(f"{path}: {image[0]} and {member.name} are two images of one sample")
                    image = f"{path.name}/{member.name}", read.read()
            if image is not None:
                yield Item(*image, label)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ImageError(f"{path} cannot be read as a tar file: {error}") from error


# Hugging Face datasets ------------------------------------------------------------------------------------------------


def dataset_name(spec: str) -> tuple[str, str | None]:
    """The name and the split in datasets:NAME[:SPLIT].

    Raises:
      ImageError: it names no dataset.
    """
    name, split = spec.removeprefix(PREFIX), ""
    if not Path(name).expanduser().exists():
        name, _, split = name.partition(":")  # the first colon: there may be others in train[:10%]
    if not name:
        raise ImageError(f"{spec} names no dataset; expected {PREFIX}NAME or {PREFIX}NAME:SPLIT")
    return name, split or None


def open_dataset(
    name: str,
    split: str | None = None,
    *,
    image: str | None = None,
    label: str | None = None,
    needs_labels: bool = False,
) -> ImageSet:
    """A split of a Hugging Face dataset; images stay encoded, and on disk, until they are needed.

    Args:
      name: of the hub, or a folder.
      image, label: names of columns, where their types and names (`IMAGES`, `LABELS`) leave a doubt.
      needs_labels: a dataset without labels is an error; images without one are left out.

    Raises:
      ImageError: the package is missing, the dataset cannot be loaded, or it has no such split or columns.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImageError(f"{PREFIX}{name} needs the package datasets: pip install datasets") from error
    dataset, split = load_dataset(datasets, name, split)
    features = dataset.features or {}
    images = [c for c, kind in features.items() if isinstance(kind, datasets.Image)]
    image = image or one_column(name, "image", images, features, IMAGES)
    kinds = [c for c, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    plain = [c for c, kind in features.items() if c in LABELS and isinstance(kind, datasets.Value)]
    if needs_labels or label or kinds or plain:
        label = label or one_column(name, "label", kinds or plain, features, LABELS)
    for column in filter(None, (image, label)):
        if column not in features:
            raise ImageError(f"{name} has no column {column!r}; it has {', '.join(features)}")
    title = f"{PREFIX}{name}:{split}"
    numbers, labels, classes = range(len(dataset)), None, ()
    if label:
        values = dataset.select_columns([label])[:][label]
        if isinstance(features[label], datasets.ClassLabel):
            classes = tuple(features[label].names)
            known: dict[Any, int] = {i: i for i in range(len(classes))}  # test splits mark what is secret by -1
        else:
            distinct = sorted({value for value in values if value is not None})
            classes, known = tuple(map(str, distinct)), {value: i for i, value in enumerate(distinct)}
        if needs_labels:
            numbers = [i for i, value in enumerate(values) if value in known]
        labels = [known.get(values[i], -1) for i in numbers]
    rows = Rows(dataset.select_columns([image]), image, numbers, f"{title} {dataset._fingerprint}")
    return ImageSet(title, digest([rows.name], map(str, labels or ())), Start(rows, labels), len(rows), classes, labels)


@dataclass(frozen=True)
class Start:
    """The images of a dataset from one on."""

    rows: Rows
    labels: Sequence[int] | None

    def __call__(self, first: int) -> Iterator[Item]:
        for at in range(first, len(self.rows)):
            row = self.rows[at]
            yield Item(str(row), row.fetch(), None if self.labels is None else self.labels[at])


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


def load_dataset(datasets: Any, name: str, split: str | None) -> tuple[Any, str]:
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


def one_column(
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
