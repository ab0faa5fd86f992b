"""A page to look at single images: attention and contribution maps of every layer, head and prefix query.

explorer.html holds the page and a list of what there is; the maps lie beside it, one file a model and image, and are
loaded as scripts when they are asked for: a page opened as a file may load scripts, and nothing else.

Maps are rounded to 8 bits, each with its own scale: attention to 1/255 of its largest value, contributions to 1/127.
All other numbers are float32. Before the heads stand all of them together: mean attention, and contributions summed. On
the page layers, heads, registers, and rows and columns of patches count from 0.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image

from jaxvit.io.checkpoint import replacing_file

from ..core.charts import COLOURS, LABELS, SIGNED, ordered, short
from ..core.examples import SUMMANDS, Example
from ..core.experiment import About

TEMPLATE = Path(__file__).with_name("explorer.html")
FOLDER = "explorer"
MAX_SIDE = 448  # of an embedded photograph, in pixels
THUMBNAIL = 64

_warm = colormaps["inferno"](np.linspace(0.45, 1, 256))
_warm[:, 3] = 0.9 * np.linspace(0, 1, 256) ** 1.2
ATTENTION = (_warm * 255).round().astype(np.uint8)
"""[256, RGBA], from 0 to the largest: over a dimmed photograph, transparent to bright."""
CONTRIBUTION = (colormaps[SIGNED](np.linspace(0, 1, 255)) * 255).round().astype(np.uint8)
"""[255, RGBA], from -largest over 0 to largest."""


def write_explorer(out: Path, examples: Mapping[str, Sequence[Example]], models: Mapping[str, About]) -> None:
    """Writes explorer.html and explorer/KEY-NUMBER.js into `out`: the same bytes for the same input.

    Args:
      examples: key of a model -> its images; models without any are left out.
    """
    shown = [about for about in ordered(models) if examples.get(about.key)]
    index = {
        "models": [entry(about, examples[about.key]) for about in shown],
        "summands": SUMMANDS,
        "colours": COLOURS,
        "labels": LABELS,
        "attention": encoded(ATTENTION),
        "contribution": encoded(CONTRIBUTION),
    }
    for about in shown:
        for i, example in enumerate(examples[about.key]):
            name = file_name(about, i)
            with replacing_file(out / FOLDER / f"{name}.js") as temporary:
                temporary.write_text(f"explorerTake({json.dumps(name)}, {json.dumps(data(example))});\n")
    fragments = {
        # "<" never appears in it: no text in it can end the script element
        "index": json.dumps(index).replace("<", "\\u003c"),
        "colours": "; ".join(f"--{name}: {colour}" for name, colour in COLOURS.items()),
        "attention_bar": gradient(ATTENTION),
        "contribution_bar": gradient(CONTRIBUTION),
    }
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(fragments)
    with replacing_file(out / "explorer.html") as temporary:
        temporary.write_text(text, encoding="utf-8")


def file_name(about: About, i: int) -> str:
    return f"{about.key}-{i}"


def entry(about: About, examples: Sequence[Example]) -> dict[str, Any]:
    """What the page knows of a model before it loads anything."""
    return {
        "key": about.key,
        "name": about.name,
        "short": short(about).replace("\n", " "),
        "depth": about.depth,
        "heads": about.heads,
        "registers": about.registers,
        "random": about.weights == "random",
        "appended": about.registers_are == "test-time",
        "images": [
            {"name": e.name, "file": file_name(about, i), "thumbnail": picture(e.pixels, THUMBNAIL)}
            for i, e in enumerate(examples)
        ],
    }


def data(example: Example) -> dict[str, Any]:
    """One image under one model: arrays in C order, as base64 of uint8, int8 or little-endian float32."""
    attention, contribution = with_all_heads(example.attention, "mean"), with_all_heads(example.contribution, "sum")
    mass, parts = with_all_heads(example.mass, "mean"), with_all_heads(example.parts, "sum")
    return {
        "photograph": picture(example.pixels, MAX_SIDE),
        "grid": list(example.grid),
        "shape": list(attention.shape),
        "attention": quantised(attention, np.uint8),
        "contribution": quantised(contribution, np.int8),
        "mass": encoded(mass.astype("<f4")),
        "parts": encoded(parts.astype("<f4")),
        "shares": encoded(example.shares.astype("<f4")),
    }


def with_all_heads(maps: np.ndarray, together: str) -> np.ndarray:
    """[L, H, ..] -> [L, 1 + H, ..]: first that of all heads together."""
    maps = maps.astype(np.float64)
    return np.concatenate([getattr(maps, together)(axis=1, keepdims=True), maps], axis=1)


def quantised(maps: np.ndarray, dtype: type[np.integer]) -> dict[str, str]:
    """Maps [.., N] as integers times a scale for each."""
    steps = np.iinfo(dtype).max
    scale = np.abs(maps).max(axis=-1) / steps
    levels = np.rint(maps / np.where(scale > 0, scale, 1)[..., None]).astype(dtype)
    return {"levels": encoded(levels), "scale": encoded(scale.astype("<f4"))}


def encoded(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def picture(pixels: np.ndarray, side: int) -> str:
    """As a data URI, no larger than `side`."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def gradient(colours: np.ndarray) -> str:
    """The colours as a CSS background, transparent ones over the grey of a dimmed photograph."""
    picked = colours[np.linspace(0, len(colours) - 1, 9).round().astype(int)]
    stops = ", ".join("rgba({}, {}, {}, {:.2f})".format(*c[:3], c[3] / 255) for c in picked)
    return f"linear-gradient(90deg, {stops}), #4a4a4a"
