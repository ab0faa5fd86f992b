"""Every plain Vision Transformer of timm: which convert, and how equal they are.

    python -m benchmarks architectures            measure, print the table
    python -m benchmarks architectures --write    and write docs/architectures.md and convert/architectures.json
    python -m benchmarks architectures --facts    write convert/architectures.json alone, in seconds

Each name of timm's `vision_transformer` and `deit` is built by timm with random weights, one block deep and at its own
width up to 768 (above, heads are cut to 32 channels), converted, and compared at every site in float64 and float32, on
images of 2 x 3 patches. Takes a quarter of an hour on two cores.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch

import convert
import convert.timm as plain
from benchmarks.originals import randomise
from convert.engine import ConversionError
from convert.originals import original_of
from convert.verify import Comparison, Size, compare, random_images

DOCS, FACTS = Path("docs/architectures.md"), Path("convert/architectures.json")
WIDEST = 768
"""Width of a token that is compared as it is."""


def names() -> list[str]:
    """All of timm's names that its two files of Vision Transformers define."""
    return [*timm.list_models(module="vision_transformer"), *timm.list_models(module="deit")]


def build(name: str, **changes: Any) -> Any:
    """timm's model of this name, without weights of its own."""
    return timm.create_model(name, pretrained=False, dynamic_img_size=True, **changes)


def facts(name: str, **changes: Any) -> dict[str, Any]:
    """What `convert.timm.architectures` holds of a name."""
    with torch.device("meta"):
        try:
            module = build(name, **changes)
        except Exception as error:  # timm's builders raise what they please
            return {"refused": f"timm does not build it for images of several sizes: {error}"}
    if reason := plain.refusal(module):
        return {"refused": reason}
    hints = plain.module_hints(module)
    return {field: hints[field] for field in plain.FACTS} | {
        "prepared": prepared(name),
        "shape": [len(module.blocks), module.embed_dim, getattr(module, "cls_token", None) is not None],
    }


PREPARATION = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
"""What timm's transforms of evaluation depend on."""


def prepared(name: str) -> list[dict[str, Any]]:
    """How timm prepares images for the weights of each tag of a name; tags that share it stand together, the default
    first."""
    found: list[dict[str, Any]] = []
    for tag, cfg in tags_of(name).items():
        resolved = timm.data.resolve_data_config(pretrained_cfg=cfg)
        same = next((each for each in found if all(each[key] == resolved[key] for key in PREPARATION)), None)
        if same is None:
            same = {"tags": [], **{key: resolved[key] for key in PREPARATION}}
            found.append(same)
        same["tags"] += [tag] if tag else []
    return found


def tags_of(name: str) -> dict[str, dict[str, Any]]:
    """The tags of a name -> timm's configs of their weights, the default first."""
    default = timm.get_pretrained_cfg(name)
    tags = {default.tag or "": default}
    for each in timm.list_pretrained(f"{name}.*"):
        tags[each.partition(".")[2]] = timm.get_pretrained_cfg(each)
    return {tag: cfg.to_dict() for tag, cfg in tags.items()}


def write_facts(known: dict[str, dict[str, Any]]) -> None:
    lines = (f"{json.dumps(name)}: {json.dumps(about)}" for name, about in known.items())
    FACTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    plain.architectures.cache_clear()


def measure(name: str) -> Comparison:
    """Compares a model of this name, one block deep and not too wide, in both precisions."""
    with torch.device("meta"):
        whole = build(name, depth=1)
    heads = whole.blocks[0].attn.num_heads
    narrow = {"embed_dim": 32 * heads, "num_heads": heads} if whole.embed_dim > WIDEST else {}
    module = randomise(build(name, depth=1, **narrow))
    model, original = convert.load(module), original_of(module)
    patch = model.config.patch
    return compare(model, original, random_images(model, Size(2 * patch, 3 * patch), tokens=100), defaults=False)


def rows(known: dict[str, dict[str, Any]]) -> Iterator[str]:
    for name, facts in known.items():
        if "refused" in facts:
            yield f"| {name} | refused | {facts['refused']} |"
            continue
        try:
            found = measure(name)
        except ConversionError as error:
            yield f"| {name} | **failed** | {error} |"
            continue
        verdict = "equal" if found.passed else "**not equal**"
        yield f"| {name} | {verdict} | {found.worst64():.0e} | {found.worst_ratio():.2f} |"


def main(write: bool, only_facts: bool = False) -> None:
    known = {name: facts(name) for name in names()}
    if write or only_facts:
        write_facts(known)
    if only_facts:
        return
    lines = []
    for i, line in enumerate(rows(known)):
        print(f"{i + 1}/{len(known)} {line}", file=sys.stderr, flush=True)
        lines.append(line)
    converted = [line for line in lines if "| equal |" in line]
    refused = [line for line in lines if "| refused |" in line]
    text = f"""# timm's plain Vision Transformers

Every name of `timm.models.vision_transformer` and `timm.models.deit` in timm {timm.__version__}: {len(lines)} names, of
which {len(converted)} convert and are equal, and {len(refused)} are refused. Written by
`python -m benchmarks architectures --write`, which builds each with random weights, one block deep and at its own width
up to {WIDEST} (above, heads are cut to 32 channels), and compares all values inside.

## Equal

The float64 error is the worst of all sites and layers, max |difference| / max |value|; the float32 error is that of
jaxvit against timm in float64, divided by timm's own, at the worst layer of the residual stream, the attention pattern
and the output.

| name | | float64 error | float32 error ÷ timm's |
|---|---|---|---|
{chr(10).join(converted)}

## Refused

| name | | why |
|---|---|---|
{chr(10).join(refused)}
"""
    if others := [line for line in lines if line not in converted and line not in refused]:
        text += "\n## Not equal\n\n" + "\n".join(others) + "\n"
    print(text)
    if write:
        DOCS.write_text(text)
