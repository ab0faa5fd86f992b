"""Takes the figures that pages of experiments show from a run: `make docs-data`.

    python docs/figures.py OUT      OUT: what `jaxvit run --preset embedded --out OUT` wrote

Beside them it writes which code they were made by. A test fails when that is no longer the code of the repository.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from PIL import Image

from jaxvit.experiments.runner.registry import EVERY
from jaxvit.experiments.runner.source import of_modules

DOCS = Path(__file__).parent
FIGURES, CODE = DOCS / "figures", "code.json"


def shown() -> dict[str, list[str]]:
    """Experiment -> names of the figures that its page shows."""
    return {
        id: re.findall(r"\(\.\./figures/([\w-]+)\.png\)", page.read_text(encoding="utf-8"))
        for id in EVERY
        for page in [DOCS / "experiments" / f"{id.lower()}.md"]
        if page.is_file()
    }


def code() -> dict[str, str]:
    """Experiment -> checksum of the code that measures and draws it."""
    return {id: of_modules(type(EVERY[id]).__module__) for id in shown()}


def take(out: Path) -> None:
    """Copies the figures, in 256 colours, which is a third of their size."""
    FIGURES.mkdir(exist_ok=True)
    wanted = {name for names in shown().values() for name in names}
    for path in FIGURES.glob("*.png"):
        if path.stem not in wanted:
            path.unlink()
    for name in sorted(wanted):
        with Image.open(out / "figures" / f"{name}.png") as picture:
            picture.convert("RGB").quantize(256).save(FIGURES / f"{name}.png", optimize=True)
    (FIGURES / CODE).write_text(json.dumps(code(), indent=1) + "\n")


if __name__ == "__main__":
    take(Path(sys.argv[1]))
