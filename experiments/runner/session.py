"""Runs experiments on models: one model after another, one pass after another, each of which survives its process.

A folder of results holds

    results.json          every number, choice, version and checksum, and no time or date: the same for the same run
    report.html           for people; explorer.html and explorer/ beside it
    figures/              every figure as .png and .svg
    per_image/MODEL.npz   what was measured of every image
    examples/MODEL.npz    maps of the images that are shown
    timings.json          how long what took
    progress/             what `--resume` goes on with
"""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from tqdm import tqdm

from jaxvit import ViTConfig
from jaxvit.io import parallel
from jaxvit.io.checkpoint import replacing_file

from ..core.charts import styled, write_figure
from ..core.examples import Example
from ..core.experiment import About, Experiment, Found, Results, View
from ..core.passes import Request
from ..models.subjects import Spec, keys, load
from ..report.explorer import write_explorer
from ..report.report import write_report
from .folder import empty
from .progress import UNUSABLE, Model, Place, Stores, Taken, first, found_for, plain, reason_of
from .registry import PASSES

Made = TypeVar("Made")
SCHEMA = 1
TIMING = "timings.json"


class Session:
    """One folder of results; see `Place` and `Request`."""

    def __init__(self, place: Place, specs: Sequence[Spec], request: Request, command: str):
        self.place, self.specs, self.request, self.command = place, list(specs), request, command
        self.out = place.out
        self.models: dict[str, Finished] = {}
        self.failed: dict[str, dict[str, str]] = {}
        self.broken: dict[str, list[str]] = {}

    def overwrite(self) -> None:
        """Removes what earlier runs left, once all models of this run are known to load.

        Raises:
          ValueError: one of them does not; nothing is removed.
        """
        for key, spec in zip(keys(self.specs), self.specs, strict=True):
            try:
                load(spec, key, self.place.dtype)
            except UNUSABLE as error:
                reason = f"{spec.title} cannot be run: {reason_of(error)}"
                raise ValueError(f"{reason}; nothing in {self.out} was overwritten") from error
        empty(self.out)

    @property
    def complete(self) -> bool:
        """Whether nothing failed."""
        return not (self.failed or self.broken or any(model.taken.failed for model in self.models.values()))

    def guarded(self, e: Experiment, what: str, make: Callable[[], Made], default: Made) -> Made:
        """What an experiment makes of all models, or the default where it fails, which is told in the results."""
        try:
            return make()
        except OSError:
            raise
        except Exception as error:
            self.broken.setdefault(e.id, []).append(f"{what}: {reason_of(error)}")
            print(f"{e.id} failed: {self.broken[e.id][-1]}", file=sys.stderr)
            return default

    def run(self) -> dict[str, Any]:
        """Everything; returns what is in results.json. What fails of a model, or of an experiment, is told there, and
        does not cost the others. All processes of a run call this, and process 0 writes what comes of it.

        Raises:
          ValueError: not one model can be run.
          OSError, jaxvit.CheckpointError: results cannot be written; what was finished before is there.
        """
        for key, spec in zip(keys(self.specs), self.specs, strict=True):
            if spec.test_time_registers and self.has_registers(spec):
                continue
            try:
                self.models[key] = self.finish(key, spec)
            except Exception as error:
                if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
                    raise
                self.failed[key] = {"name": spec.title, "reason": reason_of(error)}
                print(f"{spec.title} cannot be run: {reason_of(error)}", file=sys.stderr)
        if not self.models:
            one = next(iter(self.failed.values()))
            raise ValueError(f"no model could be run; {one['name']}: {one['reason']}")
        if jax.process_index():  # which has done its part
            parallel.wait("results")
            return {}
        results = self.results()
        with styled():
            self.write(results)
        parallel.wait("results")
        return results

    def finish(self, key: str, spec: Spec) -> Finished:
        """All of one model, after which it needs no memory."""
        model = Model(self.place, self.request, key, spec)
        taken, numbers = model.passes(), {}
        if jax.process_index():
            return Finished(model.about, {}, {}, taken, [])
        for e in taken.running(self.request.experiments):
            try:
                numbers[e.id] = model.numbers(e, taken)
            except OSError:
                raise
            except Exception as error:
                taken.failed[e.id] = f"numbers: {reason_of(error)}"
        for id, reason in taken.failed.items():
            print(f"{id} failed for {spec.title}: {reason}", file=sys.stderr)
        for stores in taken.stores.values():
            for store in stores.values():
                store.forget_moments()
        found = {e.id: found_for(e, taken) for e in self.request.experiments if e.id in numbers}
        shown = model.examples()
        self.write_per_image(key, found, taken.stores)
        self.time(key, model.seconds)
        return Finished(model.about, numbers, found, taken, shown)

    def has_registers(self, spec: Spec) -> bool:
        """Whether the model, as it was run before, was trained with registers and needs none."""
        without = replace(spec, test_time_registers=0)
        names = [key for key, other in zip(keys(self.specs), self.specs, strict=True) if other == without]
        return any(name in self.models and self.models[name].about.registers > 0 for name in names)

    def time(self, key: str, seconds: Mapping[str, float]) -> None:
        """Notes how long what took, beside what was noted before."""
        path = self.out / TIMING
        known = json.loads(path.read_text()) if path.is_file() else {}
        if seconds:
            known[key] = known.get(key, {}) | seconds
            with replacing_file(path) as temporary:
                temporary.write_text(json.dumps(known, indent=1) + "\n")

    # --- results

    def results(self) -> dict[str, Any]:
        request, place = self.request, self.place
        models = {key: each.about for key, each in self.models.items()}
        by_experiment, claims = {}, []
        for e in request.experiments:
            each = {key: model.numbers[e.id] for key, model in self.models.items() if e.id in model.numbers}
            by_experiment[e.id] = {"title": e.title, "figure": e.figure, "results": each}
            claims += self.guarded(e, "claims", lambda e=e, each=each: e.claims(each, models), [])
            self.guarded(e, "table", lambda e=e, each=each: tables(e, each, models), None)
        labelled = request.labelled
        return {
            "schema": SCHEMA,
            "command": self.command,
            "images": {"folder": str(place.folder), "n": len(request.images), "sha256": place.digest(request.images)},
            "labelled": labelled
            and {"name": labelled.name, "n": len(labelled.sources), "classes": len(labelled.classes)},
            "request": {
                "size": request.size,
                "batch_size": request.batch_size,
                "control_images": request.control_images,
                "dtype": place.dtype,
                "devices": len(place.devices),
                "matmul precision": str(jax.config.jax_default_matmul_precision or "backend's default"),
            },
            "options": {name: dict(values) for name, values in request.options.items()},
            "models": {key: self.of_model(model) for key, model in self.models.items()},
            "failed": self.failed,
            "experiments": by_experiment,
            "claims": [claim._asdict() for claim in claims],
            "versions": self.versions(),
            "device": f"{place.devices[0].device_kind} ({jax.default_backend()}), {len(place.devices)} used",
        }

    def versions(self) -> dict[str, str]:
        """Those that measured; several of a package side by side."""
        found: dict[str, dict[str, None]] = {}
        for model in self.models.values():
            for store in (store for stores in model.taken.stores.values() for store in stores.values()):
                for name, version in store.settings["model"]["versions"].items():
                    found.setdefault(name, {})[version] = None
        return {name: ", ".join(each) for name, each in found.items()}

    def of_model(self, model: Finished) -> dict[str, Any]:
        config = ViTConfig.from_dict(model.about.config)
        height, width = config.preprocess.at(self.request.size).size
        passes = {
            name: {
                "n": store.n,
                "skipped": [{"image": self.place.name(s["image"]), "error": s["error"]} for s in store.skipped],
                "sha256 of the prepared pixels": store.digest,
            }
            for name, store in ((name, first(stores)) for name, stores in model.taken.stores.items())
        }
        none = {"n": 0, "skipped": [], "sha256 of the prepared pixels": ""}
        return model.about.to_dict() | {
            "pixels": height if height == width else [height, width],
            "patches": list(config.layout(height, width).grid),
            "images": passes.pop("clean", none),
            "other passes": passes,
            "not run": dict(model.taken.reasons),
            "failed": dict(model.taken.failed),
        }

    def write_per_image(self, key: str, found: Mapping[str, Mapping[str, Found]], taken: Mapping[str, Stores]) -> None:
        """PASS/ID/NAME for each experiment, one column after another: memory for one of them is all that is needed.

        Args:
          found: id of an experiment -> pass -> what it found.
        """
        folder = self.out / "per_image"
        folder.mkdir(parents=True, exist_ok=True)
        with (
            replacing_file(folder / f"{key}.npz") as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as file,
        ):

            def put(name: str, array: np.ndarray) -> None:
                entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: the same bytes for the same run
                with file.open(entry, "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, np.ascontiguousarray(array))

            for each in (each for each in PASSES if each.name in taken):
                sources, places = each.sources(self.request), first(taken[each.name]).found().per_image["image"]
                put(f"{each.name}/image", np.asarray([self.place.name(sources[i]) for i in places]))
                for id, of in found.items():
                    columns = of[each.name].per_image if each.name in of and not each.private else {}
                    for column in (name for name in columns if name != "image"):
                        put(f"{each.name}/{id}/{column}", columns[column])

    def write(self, results: dict[str, Any]) -> None:
        models = {key: each.about for key, each in self.models.items()}
        shown = {key: each.shown for key, each in self.models.items()}
        figures: dict[str, dict[str, Any]] = {}
        # What an earlier run with other models or experiments left would pass for a result of this one.
        for name in ("figures", "explorer"):
            shutil.rmtree(self.out / name, ignore_errors=True)
        for path in [*self.out.glob("per_image/*.npz"), *self.out.glob("examples/*.npz")]:
            if path.stem not in models:
                path.unlink()
        for e in tqdm(self.request.experiments, "figures", disable=not self.request.progress):
            found = {key: model.found.get(e.id, {}) for key, model in self.models.items()}
            view = View(results["experiments"][e.id]["results"], models, found, shown)
            figures[e.id] = self.guarded(e, "figures", lambda e=e, view=view: self.draw(e, view), {})
            results["experiments"][e.id]["failed"] = self.broken.get(e.id, [])
        with replacing_file(self.out / "results.json") as temporary:
            temporary.write_text(json.dumps(plain(results, finite=True), indent=1, allow_nan=False) + "\n")
        write_explorer(self.out, shown, models)
        write_report(self.out, plain(results), self.request.experiments, figures, "explorer.html", PASSES)

    def draw(self, e: Experiment, view: View) -> dict[str, Any]:
        """Its figures, written."""
        figures = e.figures(view) if view.results else {}
        for name, figure in figures.items():
            write_figure(figure, self.out / "figures", name)
        return figures


def tables(e: Experiment, each: Results, models: Mapping[str, About]) -> None:
    """Makes the tables that the report will ask for."""
    controls = dict.fromkeys(name for numbers in each.values() for name in numbers.get("controls", {}))
    for name in controls:
        e.table({key: of["controls"][name] for key, of in each.items() if name in of.get("controls", {})}, models)
    if each:
        e.table(each, models)


class Finished(NamedTuple):
    """A model that was run; of all its images only names are in memory."""

    about: About
    numbers: dict[str, dict[str, Any]]
    found: dict[str, dict[str, Found]]
    taken: Taken
    shown: list[Example]
