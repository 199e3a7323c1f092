"""The callback from YAML, through the real LightningCLI."""

import csv
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_ntk import LinearizationMonitor

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
CONFIGS = {path.stem: path for path in (EXAMPLES / "configs").glob("*.yaml")}
SMALL = ["--model.width=8", "--data.samples=40"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have|The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


def double(module: nn.Module, inputs: Tensor) -> Tensor:
    """For `predict`."""
    return 2 * module(inputs)


def swap(batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    """For `unpack`."""
    return batch[0], batch[1]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LightningCLI]:
    """Runs examples/cli.py with its directory as Python would have it, and the working directory empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "cli", raising=False)

    def main(*arguments: str) -> LightningCLI:
        import cli

        return cli.main([*arguments])

    return main


def monitors(trainer: Trainer) -> list[LinearizationMonitor]:
    return [callback for callback in trainer.callbacks if isinstance(callback, LinearizationMonitor)]


def fit(run: Callable[..., LightningCLI], name: str, *options: str) -> tuple[LinearizationMonitor, LightningCLI]:
    done = run("fit", f"--config={CONFIGS[name]}", *SMALL, *options)
    return monitors(done.trainer)[0], done


@pytest.mark.tested("LightningCLI", "gradient_descent")
def test_gradient_descent(run: Callable[..., LightningCLI]) -> None:
    monitor, _ = fit(run, "gradient_descent", "--trainer.max_steps=20")
    assert monitor.training.dynamics == "gradient_descent"
    assert len(monitor.training.eigenvalues) == 400
    assert monitor.history[-1].keys() >= {"mode/1/residual", "mode/3/linearized_residual"}
    assert 0 < monitor.history[-1]["relative_weight_distance"] < 1


@pytest.mark.tested("LightningCLI", "replay")
def test_replay(run: Callable[..., LightningCLI]) -> None:
    monitor, _ = fit(run, "replay", "--trainer.max_steps=45")
    assert monitor.dynamics_used == "replay"
    assert monitor.loss is None
    assert [name for name, _ in monitor.linearized_outputs] == ["layers.4"]
    assert [row["step"] for row in monitor.history] == [0, 20, 40, 45]
    assert monitor.history[-1]["linearized_loss"] < monitor.history[0]["linearized_loss"]
    with next(Path().rglob("metrics.csv")).open() as file:
        logged = [float(row["ntk/linearized_loss"]) for row in csv.DictReader(file) if row["ntk/linearized_loss"]]
    assert logged == [row["linearized_loss"] for row in monitor.history]


@pytest.mark.tested("LightningCLI", "twin")
def test_twin(run: Callable[..., LightningCLI]) -> None:
    monitor, done = fit(run, "twin", "--trainer.max_steps=12", "--data.batch_size=16")
    assert monitor.dynamics_used == "twin"
    assert isinstance(done.trainer.optimizers[0], torch.optim.AdamW)
    assert [row["step"] for row in monitor.history] == [0, 1, 10, 12]
    assert monitor.comparison.initial_weights["layers.0.weight"].dtype == torch.float64


def test_late_capture(run: Callable[..., LightningCLI]) -> None:
    _, done = fit(run, "late_capture", "--trainer.max_steps=120")
    early, late = monitors(done.trainer)
    assert [row["step"] for row in early.history] == [0, 50, 100, 120]
    assert [row["step"] for row in late.history] == [100, 120]
    assert 0 < late.history[-1]["weight_distance"] < early.history[-1]["weight_distance"]


def test_figures(run: Callable[..., LightningCLI]) -> None:
    monitor, done = fit(run, "figures", "--trainer.max_steps=10")
    assert monitor.history[-1].keys() >= {"kernel_distance", "evaluation/loss", "parameter/layers.4.bias"}
    assert monitor.comparison.evaluation.problem.predictions.shape == (100, 10)
    events = EventAccumulator(done.trainer.logger.log_dir)
    events.Reload()
    expected = {"relative_weight_distance", "loss", "accuracy", "kernel_distance", "kernel_change", "kernel_velocity",
                "parameters", "spectrum", "predictions"}  # fmt: skip
    assert set(events.Tags()["images"]) == {f"ntk/figure/{name}" for name in expected}


def test_sweep(run: Callable[..., LightningCLI], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--trainer.max_steps=5", "--model.width=6", "--optimizer.init_args.lr=0.1"]
    first, _ = fit(run, "sweep", *options, "--seed_everything=1")
    again, _ = fit(run, "sweep", *options, "--seed_everything=1")
    other, done = fit(run, "sweep", *options, "--seed_everything=2")
    assert first.history == again.history != other.history
    assert first.training.initial_weights["layers.0.weight"].shape == (6, 64)
    assert done.trainer.progress_bar_callback is None
    assert "it/s" not in capsys.readouterr().out
    hyperparameters = yaml.safe_load((Path(done.trainer.logger.log_dir) / "hparams.yaml").read_text())
    assert hyperparameters["width"] == 6


def test_every_example_has_its_test_and_says_how_it_is_run() -> None:
    assert CONFIGS.keys() == {name.removeprefix("test_") for name in globals() if name.removeprefix("test_") in CONFIGS}
    assert len(CONFIGS) == 6
    for name, path in CONFIGS.items():
        assert f"#     python examples/cli.py fit --config examples/configs/{name}.yaml" in path.read_text()


def test_the_command_that_is_documented(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "cli.py"), "fit", "--config", str(CONFIGS["replay"])]
    done = subprocess.run(
        [*command, "--trainer.max_steps=25"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "`max_steps=25` reached" in done.stderr
    assert len(list(tmp_path.rglob("metrics.csv"))) == 1
    assert len(list(tmp_path.rglob("config.yaml"))) == 1


def test_every_option_from_yaml(run: Callable[..., LightningCLI], tmp_path: Path) -> None:
    data = {"class_path": "cli.DigitImages", "init_args": {"samples": 12, "one_hot": True}}
    options = {
        "reference": data, "steps": [1, 2], "dynamics": "gradient_descent", "loss": {"class_path": "torch.nn.MSELoss"},
        "predict": "tests.callback.test_cli.double", "unpack": "tests.callback.test_cli.swap", "evaluation": data,
        "reference_samples": 10, "capture_at": 1, "mismatch": "log",
        "solver": "lanczos", "jacobian": "stored", "batch_size": 5, "dtype": "float64",
        "name": "everything", "per_parameter": True, "taylor": False, "modes": 1, "closest": True,
        "device": "cpu", "kernel_probe": 2, "regime": True, "kernels": ["before", "after"], "figures": True, "prog_bar": True,
        "save_state": False, "strict": True, "progress": False,
    }  # fmt: skip
    parameters = inspect.signature(LinearizationMonitor).parameters
    unknown_here = parameters.keys() - options.keys() - {"network"}  # which stands in the place of these
    assert not unknown_here, f"options without a value in this test: {unknown_here}"
    for name, value in options.items():
        assert value != parameters[name].default, name
    config = yaml.safe_load(CONFIGS["gradient_descent"].read_text())
    config["trainer"] |= {"max_steps": 3, "logger": False}
    config["trainer"]["callbacks"][0]["init_args"] = options
    config["data"] = {"samples": 12, "one_hot": True}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(config))
    with pytest.warns(UserWarning, match="does not follow the loss of this run"):  # predictions are doubled
        (monitor,) = monitors(run("fit", f"--config={tmp_path / 'all.yaml'}").trainer)
    for name, value in options.items():
        given: Any = getattr(monitor, name)
        if name in ("reference", "evaluation"):
            assert len(given) == 12
        elif name in ("predict", "unpack"):
            assert given.__name__ == value.rpartition(".")[2]
        elif name == "loss":
            assert isinstance(given, nn.MSELoss)
        else:
            assert given == value, name
    assert [row["step"] for row in monitor.history] == [1, 2, 3]


def test_the_help_explains_every_option(run: Callable[..., LightningCLI], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("fit", "--trainer.callbacks.help", "lightning_ntk.LinearizationMonitor")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    described = text.partition("Logs how far a training run leaves the path")[2]
    described = re.sub(r", --trainer.callbacks.(\w+)\+ \S+", "", described)  # how to append to a list
    for name, parameter in inspect.signature(LinearizationMonitor).parameters.items():
        option = f"--trainer.callbacks.{name} "
        assert option in described, name
        explained = described.partition(option)[2].partition("--trainer.callbacks.")[0]
        assert len(explained) > 50, name
        default = "null" if parameter.default is None else parameter.default
        assert f"default: {default}" in explained, name
    assert "The loss to follow instead of `training_step`'s, as a function of outputs and targets." in described
    assert "known subclasses: torch.Tensor" not in described


@pytest.mark.parametrize(
    ("option", "message"),
    [("dynamics: fastest", "fastest"), ("steps: 0", "positive integer"), ("no_such_option: 1", "no_such_option")],
)
def test_a_wrong_option_is_refused_by_name(
    run: Callable[..., LightningCLI], tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    config = yaml.safe_load(CONFIGS["sweep"].read_text())
    config["trainer"]["callbacks"][0]["init_args"] = yaml.safe_load(option)
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises((SystemExit, ValueError)) as refused:
        run("fit", f"--config={tmp_path / 'wrong.yaml'}", *SMALL)
    assert message in capsys.readouterr().err + str(refused.value)
