"""The examples run, and say what they claim."""

import csv
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_ntk import empirical_ntk
from lightning_ntk.plots import read_history

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--width", "16", "--steps", "12", "--samples", "60", "--output-scale", "2", "--regime"]
    options += ["--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["digits.py", *options])
    runpy.run_path(str(EXAMPLES / "digits.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "After 12 steps the trained weights are" in printed
    assert "step  distance" in printed
    (figure,) = tmp_path.rglob("*.png")
    assert figure.stat().st_size > 10_000
    assert (figure.parent / "regimes.svg").stat().st_size > 10_000
    events = EventAccumulator(str(figure.parent))
    events.Reload()
    assert [event.step for event in events.Scalars("ntk/weight_distance")] == [0, 1, 2, 3, 4, 6, 7, 10, 12]


def test_digits_in_minibatches_are_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["--width", "8", "--steps", "6", "--samples", "50", "--batch-size", "20", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["digits.py", *options])
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        runpy.run_path(str(EXAMPLES / "digits.py"), run_name="__main__")
    assert any("Replay of the run's minibatches" in message for message in caplog.messages)


def test_three_optimizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--width", "16", "--steps", "6", "--samples", "100", "--output", str(tmp_path / "optimizers.svg")]
    monkeypatch.setattr(sys, "argv", ["optimizers.py", *options])
    runpy.run_path(str(EXAMPLES / "optimizers.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "AdamW" in printed
    assert (tmp_path / "optimizers.svg").stat().st_size > 10_000


def test_a_sweep_of_widths_and_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--widths", "8", "32", "--seeds", "0", "1", "--steps", "20", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *options])
    for _ in range(2):  # the second time from the storage
        runpy.run_path(str(EXAMPLES / "sweep.py"), run_name="__main__")
        printed = capsys.readouterr().out
        assert "| width | seed | step | ntk/relative_weight_distance |" in printed
        assert "width 32: " in printed
        assert float(printed.rpartition("over width: ")[2].split()[0]) < 0  # wider is lazier
    assert (tmp_path / "sweep.journal").exists()


def scaled(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / "reproductions" / "ntk_parametrization.py"))[name]


def test_both_parametrizations_are_one_function_at_initialization() -> None:
    inputs = torch.randn(5, 7, dtype=torch.float64)
    outputs = []
    for parametrization in ("ntk", "standard"):
        torch.manual_seed(0)
        network = scaled("mlp")([7, 33, 20, 3], torch.nn.ReLU, parametrization, sigma_w=1.4, sigma_b=0.3).double()
        outputs.append(network(inputs))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-7)  # drawn in float32


def test_a_scaled_layer_is_its_formula() -> None:
    layer = scaled("ScaledLinear")(6, 4, sigma_w=1.5, sigma_b=0.2).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = 1.5 / math.sqrt(6) * x @ layer.linear.weight.T + 0.2 * layer.bias.weight[:, 0]
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert scaled("ScaledLinear")(6, 4).bias is None
    torch.manual_seed(0)
    assert scaled("ScaledLinear")(100, 400).linear.weight.std().item() == pytest.approx(1, abs=0.02)
    with pytest.raises(
        ValueError, match='Expected argument `parametrization` to be "ntk" or "standard" but got \'mup\''
    ):
        scaled("ScaledLinear")(6, 4, "mup")


def test_the_kernel_of_the_ntk_parametrization_does_not_grow_with_width() -> None:
    inputs = torch.randn(6, 5)
    traces: dict[str, list[float]] = {"ntk": [], "standard": []}
    for parametrization, found in traces.items():
        for width in (256, 1024):
            torch.manual_seed(1)
            network = scaled("mlp")([5, width, width, 2], torch.nn.Tanh, parametrization, sigma_b=0.1)
            found.append(empirical_ntk(network, inputs).trace().item())
    assert traces["ntk"][1] / traces["ntk"][0] == pytest.approx(1, abs=0.1)
    assert traces["standard"][1] / traces["standard"][0] == pytest.approx(4, abs=0.4)


def test_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--layers", "2", "--heads", "2", "--width", "8", "--block", "9", "--samples", "20"]
    monkeypatch.setattr(sys, "argv", ["language_model.py", *size, "--steps", "12", "--output", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "language_model.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "layer 2: norm 1" in printed
    (figure,) = tmp_path.rglob("*.svg")
    assert figure.stat().st_size > 10_000
    history = read_history(figure.parent)
    last = history[-1]
    assert last["step"] == 12
    assert last["evaluation/perplexity"] < history[0]["evaluation/perplexity"]  # and it has learned something
    assert 0 < last["relative_weight_distance"] < 1


def test_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--samples", "4", "6", "--epochs", "2", "1", "--seeds", "0", "1", "--test", "10", "--length", "5"]
    monkeypatch.setattr(sys, "argv", ["fine_tuning.py", "--tiny", *size, "--output", str(tmp_path)])
    for _ in range(2):  # the second time from the storage
        runpy.run_path(str(EXAMPLES / "fine_tuning.py"), run_name="__main__")
        printed = capsys.readouterr().out
        assert "| LoRA | 6 | " in printed
    assert (tmp_path / "fine_tuning.svg").stat().st_size > 10_000
    rows = list(csv.DictReader((tmp_path / "fine_tuning.csv").open()))
    (probe,) = (row for row in rows if row["method"] == "linear probe" and row["samples"] == "4" and row["seed"] == "0")
    # A linear network is its own linearization.
    assert float(probe["relative_weight_distance"]) < 1e-5
    assert probe["accuracy"] == probe["linearized_accuracy"] == probe["taylor_accuracy"]
