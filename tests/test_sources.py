"""Every kind of file that users have: the rows of docs/sources.md, each built, converted and compared."""

import copy
from pathlib import Path

import pytest

pytest.importorskip("open_clip")

from benchmarks.sources import ROWS, outcome

CASES = {what: make for rows in ROWS.values() for what, make in rows.items()}
ONCE = 7
"""Every seventh in each run of the suite: tests of their own cover the parts. `make test-all` runs all."""


@pytest.mark.parametrize(
    "what", [pytest.param(w, marks=pytest.mark.long if i % ONCE else ()) for i, w in enumerate(CASES)]
)
def test_what_comes_of_a_file(what):
    found = outcome(CASES[what])
    assert found.holds, found


def test_the_page_has_all_of_them():
    page = (Path(__file__).parents[1] / "docs/sources.md").read_text()
    assert [what for what in CASES if f"\n| {what} | " not in page] == []


def test_a_wrong_model_and_a_wrong_refusal_do_not_hold():
    from benchmarks import sources

    other = sources.plain()
    one = copy.deepcopy(other)
    one.blocks[0].norm1.weight.data[0] += 1e-6
    state = sources.state_of(other)
    wrong = outcome(lambda folder: sources.Made(state, one, {"config": {"heads": 6}}))
    assert not wrong.holds and 1e-12 < wrong.error < 1e-3
    assert not outcome(lambda folder: sources.Made(state, None)).holds
    assert not outcome(lambda folder: sources.Made({"a": 1}, None, {}, ("words that are not there",))).holds
