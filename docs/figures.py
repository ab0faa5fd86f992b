"""Takes from a run what pages of experiments show: figures, tables and verdicts. `make docs-data` does the run, too.

    python docs/figures.py OUT      OUT: what `jaxvit run --preset embedded --out OUT` wrote

Beside them it writes which code they were made by. A test fails when that is no longer the code of the repository.
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image

from jaxvit.experiments.core.experiment import About
from jaxvit.experiments.runner.registry import EXPERIMENTS
from jaxvit.experiments.runner.source import of_modules

FIGURES = Path(__file__).parent / "figures"
TOLD = FIGURES / "demo.json"
SHOWN = {
    "A1": ["2a"],
    "A2": ["2b"],
    "A3": ["3a", "3a-controls"],
    "A4": ["3b"],
    "A5": ["4-cosines"],
    "A6": ["eq5"],
    "A7": ["5a", "7-shares"],
    "A8": ["5b"],
    "A9": ["6", "6-controls"],
    "B1": ["b1"],
    "B2": ["b2"],
    "B3": ["b3-heads"],
    "B4": ["b4-norms", "b4-massive"],
    "B5": ["b5"],
    "B6": ["b6"],
    "B7": ["b7-images", "b7-directions"],
}
"""Experiment -> figures of its page."""


def code() -> dict[str, str]:
    """Experiment -> checksum of the code that measures and draws it."""
    return {id: of_modules(type(e).__module__) for id, e in EXPERIMENTS.items()}


def told(results: dict[str, Any]) -> dict[str, Any]:
    """Tables, verdicts and versions of a run, and the code."""
    names = [field.name for field in fields(About)]
    models = {key: About(**{name: entry[name] for name in names}) for key, entry in results["models"].items()}
    tables = {id: e.table(results["experiments"][id]["results"], models) for id, e in EXPERIMENTS.items()}
    return {
        "command": "make docs-data",
        "images": results["images"]["n"],
        "models": [about.name for about in models.values()],
        "versions": results["versions"],
        "tables": {id: table._asdict() for id, table in tables.items() if table is not None},
        "claims": {id: [claim for claim in results["claims"] if claim["experiment"] == id] for id in EXPERIMENTS},
        "code": code(),
    }


def take(out: Path) -> None:
    """Copies the figures, in 256 colours, which is a third of their size, and writes what was told."""
    FIGURES.mkdir(exist_ok=True)
    wanted = {name for names in SHOWN.values() for name in names}
    for path in FIGURES.glob("*.png"):
        if path.stem not in wanted:
            path.unlink()
    for name in sorted(wanted):
        with Image.open(out / "figures" / f"{name}.png") as picture:
            picture.convert("RGB").quantize(256).save(FIGURES / f"{name}.png", optimize=True)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    TOLD.write_text(json.dumps(told(results), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    take(Path(sys.argv[1]))
