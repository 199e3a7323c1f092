"""The examples run, and say what they claim."""

import runpy
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--width", "16", "--steps", "12", "--samples", "60", "--output-scale", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["digits.py", *options])
    runpy.run_path(str(EXAMPLES / "digits.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "After 12 steps the weights are" in printed
    assert "relative_weight_distance" in printed
    (figure,) = tmp_path.rglob("*.png")
    assert figure.stat().st_size > 10_000
    events = EventAccumulator(str(figure.parent))
    events.Reload()
    assert [event.step for event in events.Scalars("ntk/weight_distance")] == [0, 1, 2, 3, 4, 6, 7, 10, 12]


def test_digits_in_minibatches_says_what_is_not_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--width", "8", "--steps", "6", "--samples", "50", "--batch-size", "20", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["digits.py", *options])
    with pytest.warns(UserWarning, match="each step sees 20 of 50 samples"):
        runpy.run_path(str(EXAMPLES / "digits.py"), run_name="__main__")
