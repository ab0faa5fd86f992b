"""One model of a run: what of it is on disk already, and how the rest comes about.

    progress/MODEL/about.json        what is known of it, so that a finished one need not be loaded
    progress/MODEL/PASS-HASH/        one pass over the images for some experiments, see `experiments.runner.store`
    progress/MODEL/numbers-ID-HASH.json the numbers of one experiment

Other settings have another hash: nothing that was finished is ever replaced. What was measured for an experiment serves
it in every later run, with whatever others it was measured; only what is missing is measured.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxvit import CheckpointError, ImageError, ViTConfig, convert
from jaxvit.io import parallel
from jaxvit.io.checkpoint import replacing_file

from ..core import examples
from ..core.examples import Example
from ..core.experiment import About, Experiment, Found, Subject, readable
from ..core.passes import Pass, Request
from ..models import test_time
from ..models.subjects import Spec, load
from . import source
from .parts import parts_of, run_parts
from .registry import PASSES
from .store import Store, run_pass

VERSION = 4
"""Of what is kept of a pass."""


@dataclass(frozen=True)
class Place:
    """Where a run happens.

    Attributes:
      out: the folder of results.
      folder: of the images, for their names.
      show: numbers of the images to show.
      dtype: of the models.
      devices: over which batches are spread.
    """

    out: Path
    folder: Path
    show: Sequence[int]
    dtype: str
    devices: Sequence[jax.Device]

    def name(self, source: Any) -> str:
        """Of an image, below the folder."""
        if isinstance(source, str | Path):
            path = Path(source)
            source = path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else source
        return readable(str(source))

    def digest(self, sources: Sequence[Any], *, ages: bool = False) -> str:
        """Of names and sizes of files, in order, and of their ages; of other images of their descriptions."""
        whole = hashlib.sha256()
        for image in sources:
            told = [self.name(image)]
            if isinstance(image, Path):
                stat = image.stat()
                told += [str(stat.st_size), *([str(stat.st_mtime_ns)] if ages else [])]
            whole.update((" ".join(told) + "\n").encode())
        return whole.hexdigest()


Stores = dict[str, Store]
"""Of one pass: id of an experiment -> where its measurements are; several may share one."""
UNUSABLE = (convert.ConversionError, CheckpointError, ImageError, MemoryError, jax.errors.JaxRuntimeError)
"""What a model may raise that cannot be run; others are run without it."""


class Taken(NamedTuple):
    """What the passes of a model gave.

    Attributes:
      stores: pass -> where measurements are.
      reasons: id of an experiment that says nothing about the model -> why.
      failed: id of an experiment that should have been run -> what went wrong.
    """

    stores: dict[str, Stores]
    reasons: dict[str, str]
    failed: dict[str, str]

    def running(self, experiments: Sequence[Experiment]) -> list[Experiment]:
        """Those that can have numbers."""
        of = {e.id: [name for name in needed(e) if e.id not in self.stores.get(name, {})] for e in experiments}
        return [e for e in experiments if e.id not in self.reasons and not of[e.id]]


class Model:
    """One model in a run: loaded only if something of it is not on disk yet."""

    def __init__(self, place: Place, request: Request, key: str, spec: Spec):
        self.place, self.request, self.key, self.spec = place, request, key, spec
        self.folder = place.out / "progress" / key
        identity = spec.identity | {"dtype": place.dtype, "versions": source.versions(), "library": source.library()}
        identity["code"] = source.of_modules(load.__module__, test_time.__name__)
        if spec.test_time_registers:  # which are made of the images
            identity["test-time registers"] = test_time.made_of(request)
        self.identity = json.loads(json.dumps(identity))
        self.loaded: Subject | None = None
        self.seconds: dict[str, float] = {}

    @property
    def about(self) -> About:
        """Of the model that was run before, if it is the same; else of the one that is loaded."""
        if self.loaded is None:
            try:
                known = json.loads((self.folder / "about.json").read_text())
                if known.pop("identity") == self.identity:
                    return About(**known)
            except (OSError, ValueError, KeyError, TypeError):
                pass
        return self.subject.about

    @property
    def subject(self) -> Subject:
        if self.loaded is None:
            started = time.perf_counter()
            subject = load(self.spec, self.key, self.place.dtype, self.identity["revision"])
            if count := self.spec.test_time_registers:
                subject = test_time.appended(subject, self.request, count)
            self.loaded = subject
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing_file(self.folder / "about.json") as temporary:
                temporary.write_text(json.dumps(subject.about.to_dict() | {"identity": self.identity}, indent=1))
            self.seconds["loading"] = round(time.perf_counter() - started, 1)
        return self.loaded

    def passes(self) -> Taken:
        """All passes that an experiment reads.

        Raises:
          ImageError: not one image can be used.
        """
        request, about = self.request, self.about
        reasons = {e.id: reason for e in request.experiments if (reason := unfit(about) or e.refuses(about))}
        taken = Taken({}, reasons, {})
        for each in PASSES:
            reading = [e for e in request.experiments if each.name in e.passes and e.id not in reasons]
            if not reading:
                continue
            if reason := each.refuses(request, about):
                reasons |= {e.id: reason for e in reading if each.name in needed(e)}
                continue
            try:
                taken.stores[each.name] = self.run(each, reading, taken)
            except ImageError as error:
                if each.name == "clean":
                    raise
                taken.failed.update({e.id: f"{each.name}: {reason_of(error)}" for e in reading})
        return taken

    def run(self, each: Pass, reading: Sequence[Experiment], taken: Taken) -> Stores:
        """A pass: what was measured of each experiment, and now what was not."""
        parallel.wait("a pass: nothing is being written")
        common = self.settings(each, taken)
        wanted = json.loads(json.dumps({e.id: measured(e, self.request) for e in reading}))
        stores: Stores = {}
        begun = []
        for path in sorted(self.folder.glob(f"{each.name}-*/settings.json")):
            try:
                settings = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            held = settings.pop("experiments", {})
            if settings != common or not any(wanted.get(id) == held[id] for id in held.keys() - stores.keys()):
                continue
            store = Store(path.parent, {**settings, "experiments": held})
            if store.done:
                stores |= {id: store for id in held if wanted.get(id) == held[id] and id not in stores}
            elif held.items() <= wanted.items():  # what a run was stopped at
                begun.append(held)
        parallel.wait("a pass: all have seen what there is")
        for held in [*begun, wanted]:
            self.measure(each, {**common, "experiments": held}, stores, taken)
        if len({store.digest for store in stores.values()}) > 1:
            raise ImageError(
                f"images could be read at one time and not at another: remove {self.folder}, and run again"
            )
        return stores

    def measure(self, each: Pass, settings: Mapping[str, Any], stores: Stores, taken: Taken) -> None:
        """Measures experiments together; where that fails, each half of them by itself, down to the one that fails."""
        missing = {id: what for id, what in settings["experiments"].items() if id not in stores}
        if not missing:
            return
        settings = {**settings, "experiments": missing}
        subject, store = self.subject, Store(self.folder / f"{each.name}-{hashed(settings)}", settings)
        try:
            self.stream(each, subject, store, taken)
        except (*UNUSABLE, OSError):
            raise
        except Exception as error:
            parallel.wait("a pass that failed")
            if jax.process_index() == 0:
                shutil.rmtree(store.folder)
            parallel.wait("a pass that failed is removed")
            if len(missing) == 1:
                taken.failed.update(dict.fromkeys(missing, f"{each.name}: {reason_of(error)}"))
                return
            ids = list(missing)
            for half in (ids[: len(ids) // 2], ids[len(ids) // 2 :]):
                some = {id: missing[id] for id in half}
                self.measure(each, {**settings, "experiments": some}, stores, taken)
        else:
            stores |= dict.fromkeys(missing, store)

    def settings(self, each: Pass, taken: Taken) -> dict[str, Any]:
        """What all measurements of a pass depend on."""
        request, place = self.request, self.place
        before = [first(stores).settings for stores in taken.stores.values()] if each.reads_earlier else []
        settings = {
            "version": VERSION,
            "model": self.identity,
            "images": place.digest(each.sources(request), ages=True),
            "pass": {option.name: request.options[each.name][option.name] for option in each.options},
            "more": dict(each.settings(request)),
            "after": [hashed({name: s[name] for name in s if name != "experiments"}) for s in before],
            "size": request.size,
            "batch_size": request.batch_size,
            "devices": f"{len(place.devices)} x {place.devices[0].device_kind}",
            "precision": str(jax.config.jax_default_matmul_precision),
            "flags": os.environ.get("XLA_FLAGS", ""),
            "code": source.of_modules(run_pass.__module__, run_parts.__module__, type(each).__module__),
        }
        return json.loads(json.dumps(settings))

    def stream(self, each: Pass, subject: Subject, store: Store, taken: Taken) -> None:
        """A pass for the experiments of a store, as far as it is not done yet."""
        held = store.settings["experiments"]
        request = replace(self.request, experiments=[e for e in self.request.experiments if e.id in held])
        started = time.perf_counter()
        earlier = {name: first(stores).found() for name, stores in taken.stores.items()}
        extra = each.extra(request, subject, earlier)
        measure, sources = each.measure(request, subject.about), each.sources(request)
        go = partial(
            run_pass,
            measure=lambda arguments, images, position: measure(*arguments, images, position),
            arguments=(subject.model, subject.edits, extra),
            sources=sources,
            config=subject.model.config,
            batch_size=request.batch_size,
            size=request.size,
            known=each.known(request),
            devices=self.place.devices,
            label=f"{self.key}: {each.name}",
            progress=request.progress,
            save_every=request.save_every,
        )
        if jax.process_count() > 1 or parts_of(store):
            usable = earlier["clean"].per_image["image"] if each.reads_earlier else np.arange(len(sources))

            def one(part: Store, which: tuple[int, int]) -> None:
                go(part, part=which, before=int((usable < which[0]).sum()))

            run_parts(store, len(sources), one)
        else:
            go(store)
        self.seconds[each.name] = round(self.seconds.get(each.name, 0) + time.perf_counter() - started, 1)

    def numbers(self, e: Experiment, taken: Taken) -> dict[str, Any]:
        """The numbers of an experiment, and under "controls" the same under each control."""
        found = found_for(e, taken)
        passes = {name: taken.stores[name][e.id].folder.name for name in found}
        asked = {"passes": passes, "options": dict(self.request.options[e.id]), "code": code_of(e)}
        path = self.folder / f"numbers-{e.id}-{hashed(asked)}.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            pass
        started = time.perf_counter()
        numbers = self.counted(e, found)
        numbers = json.loads(json.dumps(self.with_names(plain(numbers))))  # as they are read the next time
        with replacing_file(path) as temporary:
            temporary.write_text(json.dumps(numbers))
        self.seconds["numbers"] = round(self.seconds.get("numbers", 0) + time.perf_counter() - started, 1)
        return numbers

    def counted(self, e: Experiment, found: Mapping[str, Found]) -> dict[str, Any]:
        options = self.request.options[e.id]
        numbers = e.numbers(found, self.about, options)
        if e.controlled and "controls" in found:
            under = found["controls"]
            names = dict.fromkeys(name.split("/")[0] for kind in under[1:] for name in kind if name != "image")
            numbers["controls"] = {
                name: e.numbers({"clean": under.of(f"{name}/")}, self.about, options) for name in names
            }
        return numbers

    def with_names(self, value: Any) -> Any:
        """Images by their names instead of their numbers."""
        if isinstance(value, dict):
            named = {key: self.with_names(item) for key, item in value.items()}
            if isinstance(named.get("image"), int):
                named["image"] = self.place.name(self.request.images[named["image"]])
            return named
        return [self.with_names(item) for item in value] if isinstance(value, list) else value

    def examples(self) -> list[Example]:
        """The images to show, explained."""
        place, size = self.place, self.request.size
        if unfit(self.about):
            return []
        path = place.out / "examples" / f"{self.key}.npz"
        paths = [self.request.images[i] for i in place.show]
        how: dict[str, Any] = {}
        for e in self.request.experiments:
            how |= e.explained(self.request.options[e.id])
        asked = {"version": VERSION, "model": self.identity, "images": place.digest(paths, ages=True), "size": size}
        asked |= {"code": source.of_modules(examples.__name__), **how}
        note = self.folder / "examples.json"
        try:
            if json.loads(note.read_text()) == json.loads(json.dumps(asked)):
                return examples.load(path)
        except (OSError, ValueError, KeyError):
            pass
        found = examples.explain(self.subject, paths, list(map(place.name, paths)), size, **how)
        path.parent.mkdir(parents=True, exist_ok=True)
        examples.save(found, path)
        with replacing_file(note) as temporary:
            temporary.write_text(json.dumps(asked))
        return found


def first(stores: Stores) -> Store:
    """The one that others read what is common to all from."""
    return min(stores.values(), key=lambda store: store.folder.name)


def unfit(about: About) -> str | None:
    """Why a model has no update of [CLS] that splits into parts, or None."""
    config = ViTConfig.from_dict(about.config)
    if not config.cls:
        return "the model has no [CLS]"
    return "the model normalises what its heads write together" if config.branch_norms else None


def found_for(e: Experiment, taken: Taken) -> dict[str, Found]:
    """Pass -> what it found for an experiment."""
    stores = {name: taken.stores.get(name, {}) for name in e.passes}
    return {name: narrowed(of[e.id].found(), e) for name, of in stores.items() if e.id in of}


def needed(e: Experiment) -> list[str]:
    """The passes without which an experiment has no numbers: controls come on top of what they control."""
    return [name for name in e.passes if not (e.controlled and name == "controls")]


def reason_of(error: Exception) -> str:
    """In one sentence; of what no one foresaw also its type, and where it was raised."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "out of memory: take a smaller --batch-size or --size"
    told = " ".join(str(error).split())
    if isinstance(error, (*UNUSABLE, OSError)):
        return told
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {told} ({Path(at.filename).name}, line {at.lineno})"


def narrowed(found: Found, e: Experiment) -> Found:
    """Only what belongs to an experiment, without its id: of "A1/mass" and of "zero/A1/mass"."""
    start, middle = f"{e.id}/", f"/{e.id}/"

    def rename(name: str) -> str | None:
        if name.startswith(start):
            return name.removeprefix(start)
        return name.replace(middle, "/", 1) if middle in name else name if name == "image" else None

    return found.renamed(rename)


def measured(e: Experiment, request: Request) -> dict[str, Any]:
    """What the measurements of an experiment depend on: options, and code."""
    late = {option.name for option in e.options if option.late}
    early = {name: value for name, value in request.options[e.id].items() if name not in late}
    return {"options": early, "code": code_of(e)}


def code_of(e: Experiment) -> str:
    """sha256 of the code of an experiment."""
    return source.of_modules(type(e).__module__)


def hashed(settings: Any) -> str:
    """A short name of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def plain(value: Any, *, finite: bool = False) -> Any:
    """Python's own numbers, lists and dicts.

    Args:
      finite: None for numbers that are not: JSON has no NaN.
    """
    if isinstance(value, Mapping):
        return {readable(str(key)): plain(item, finite=finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, finite=finite) for item in value]
    value = value.item() if hasattr(value, "item") else readable(value) if isinstance(value, str) else value
    return None if finite and isinstance(value, float) and not math.isfinite(value) else value
