"""The gate of the speed tables: what has become slower than what is kept of the same processor is named."""

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("timm")

from benchmarks import speed
from benchmarks.speed import Row


def row(batch, ratio, task="forward"):
    return Row("small", 224, batch, task, "timm, eager", 1.0, 1.0, ratio, 5)


def test_what_is_slower_is_named_and_noise_is_not():
    kept = [row(1, 1.0), row(8, 1.0), row(32, 1.0)]
    new = [row(1, 1.1), row(8, 1.2), row(32, 0.5), row(64, 9.0), row(1, 9.0, "head sweep")]
    assert speed.worse(new, kept) == ["ViT-S, 224, 8, forward: 1.20 of timm, eager, was 1.00"]
    assert speed.worse(new, []) == []


def test_only_what_is_kept_of_the_same_processor_counts(tmp_path):
    here = {"device": "a chip", "precision": "float32", "XLA_FLAGS": ""}
    for i, changed in enumerate(({}, {"device": "another"}, {"precision": "bfloat16"}, {"XLA_FLAGS": "--fast"})):
        rows = [row(i + 1, 1.0)._asdict()]
        (tmp_path / f"{i}.json").write_text(json.dumps(here | changed | {"rows": rows}))
    assert speed.kept_like(here, tmp_path) == [row(1, 1.0)]


def test_aims_of_forward_passes_depend_on_the_case():
    assert [row(batch, 1.0).target for batch in (1, 8, 32, 64)] == [1.05, 1.10, 0.85, 1.15]
    assert row(1, 1.0, "no such task").target is None
