"""The sixteen runs of known regime get the right verdict at a small size, and did so at full size."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))
from labeled_runs import RESULTS, RUNS, SMALL, judged  # noqa: E402


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_verdict_is_right(run) -> None:
    row = judged(run, SMALL, seed=0)
    assert row["verdict"] == run.label, row
    changed = row["kernel_change"]
    if changed is not None and run.label != "undecided":  # what the label says, measured apart from the verdict
        low, high = {"lazy": (0, 0.1), "intermediate": (0.1, 0.5), "rich": (0.5, 10)}[run.label]
        assert low <= changed < high


def test_the_committed_verdicts_are_right() -> None:
    rows = json.loads(RESULTS.read_text())["runs"]
    assert {(row["run"], row["label"]) for row in rows} == {(run.name, run.label) for run in RUNS}
    assert [row for row in rows if row["verdict"] != row["label"]] == []
