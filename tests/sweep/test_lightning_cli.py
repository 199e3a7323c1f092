"""An existing LightningCLI project as the objective, without new code in it."""

import re
from pathlib import Path

import pytest
import yaml

from lightning_ntk import LinearizationMonitor
from lightning_ntk.sweep import Sweep
from lightning_ntk.sweep.lightning_cli import CommandLineObjective

PROJECT = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    def __init__(self, width: int = 4, activation: str = "Tanh"):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), getattr(nn, activation)(), nn.Linear(width, 2))

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, index):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(LightningDataModule):
    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(7, 3, generator=generator)
        return DataLoader(TensorDataset(x, torch.stack([x[:, 0], x[:, 1] * x[:, 2]], 1)), batch_size=7)
"""
TRAINER = {
    "max_steps": 5, "max_epochs": -1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
    "enable_model_summary": False, "enable_progress_bar": False,
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "a_project.py").write_text(PROJECT)
    config = {
        "seed_everything": 0,
        "trainer": TRAINER,
        "model": {"class_path": "a_project.Net", "init_args": {"width": 4}},
        "data": {"class_path": "a_project.Data"},
        "ckpt_path": None,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "plain.yaml").write_text(
        yaml.safe_dump({"seed_everything": 0, "trainer": TRAINER, "model": {"width": 4}})
    )
    return tmp_path


@pytest.fixture(autouse=True)
def forget_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    monkeypatch.delitem(__import__("sys").modules, "a_project", raising=False)


def test_parameters_are_overrides_of_the_configuration(project: Path) -> None:
    objective = CommandLineObjective(config=("config.yaml",), search=str(project))
    monitor = objective({"model.init_args.width": 6, "model.init_args.activation": "ReLU", "seed_everything": 3})
    assert isinstance(monitor, LinearizationMonitor)
    assert [row["step"] for row in monitor.history] == [0, 1, 2, 3, 4, 5]
    weights = monitor.training.initial_weights
    assert weights["layers.0.weight"].shape == (6, 3)
    again = objective({"model.init_args.width": 6, "model.init_args.activation": "ReLU", "seed_everything": 3})
    assert again.history == monitor.history
    other = objective({"model.init_args.width": 6, "model.init_args.activation": "ReLU", "seed_everything": 4})
    assert other.history != monitor.history


def test_classes_that_the_project_gives_its_command_line_are_named(project: Path) -> None:
    objective = CommandLineObjective(
        config=("plain.yaml",), model="a_project.Net", data="a_project.Data", search=str(project)
    )
    assert objective({"model.width": 5}).training.initial_weights["layers.0.weight"].shape == (5, 3)


def test_a_command_line_class_of_the_project_is_used(project: Path) -> None:
    with (project / "a_project.py").open("a") as file:
        file.write(
            "\n\nfrom lightning.pytorch.cli import LightningCLI\n\n\nclass CLI(LightningCLI):\n"
            "    def add_arguments_to_parser(self, parser):\n        parser.add_argument('--size', default=1)\n"
            "        parser.link_arguments('size', 'model.width')\n"
        )
    (project / "plain.yaml").write_text(yaml.safe_dump({"seed_everything": 0, "trainer": TRAINER}))
    objective = CommandLineObjective(
        config=("plain.yaml",), model="a_project.Net", data="a_project.Data", cli="a_project.CLI", search=str(project)
    )
    assert objective({"size": 9}).training.initial_weights["layers.0.weight"].shape == (9, 3)


def test_a_monitor_of_the_configuration_is_the_one_that_counts(project: Path) -> None:
    extra = {
        "trainer": {"callbacks": [{"class_path": "lightning_ntk.LinearizationMonitor", "init_args": {"steps": 4}}]}
    }
    (project / "extra.yaml").write_text(yaml.safe_dump(extra))
    objective = CommandLineObjective(config=("config.yaml", "extra.yaml"), search=str(project))
    assert [row["step"] for row in objective({}).history] == [0, 4, 5]
    two = [{"class_path": "lightning_ntk.LinearizationMonitor", "init_args": {"name": name}} for name in "ab"]
    with pytest.raises(ValueError, match=r"Expected at most one LinearizationMonitor .* but there are 2"):
        objective({"trainer.callbacks": two})


def test_each_configuration_has_a_directory_of_its_own(project: Path) -> None:
    objective = CommandLineObjective(config=("config.yaml",), search=str(project))
    objective({"trainer.logger": True})
    (log,) = project.rglob("hparams.yaml")
    assert log.is_relative_to(objective.root({"trainer.logger": True}))
    assert objective.root({"a": 1}) != objective.root({"a": 2})
    name = objective.root({"model.init_args.width": 64, "optimizer.lr": 0.2, "data.path": "a/b c"}).name
    assert re.fullmatch("width=64,lr=0.2,path=a_b_c-[0-9a-f]{8}", name)  # as TensorBoard shows the run
    assert len(objective.root({"a": "x" * 999}).name) < 120


def test_a_model_without_a_class_is_a_failure_that_says_where_to_name_it(project: Path) -> None:
    objective = CommandLineObjective(config=("plain.yaml",), search=str(project))
    with pytest.raises(ValueError, match="no class of the model is named, by `class_path` in it or as `model`"):
        objective({"model.init_args.width": 3})


def test_an_option_that_does_not_exist_is_a_failure_that_names_it(project: Path, tmp_path: Path) -> None:
    objective = CommandLineObjective(config=("config.yaml",), search=str(project))
    sweep = Sweep(objective, {"model.init_args.widht": [3]}, storage=tmp_path / "j")
    with pytest.warns(UserWarning, match="1 of 1 configurations failed"):
        sweep.run(workers=0, progress=False)
    (entry,) = sweep.queue.entries().values()
    assert (
        "Expected a configuration and parameters that the LightningCLI knows but got {'model.init_args.widht': 3}"
        in entry.error
    )


def test_a_missing_configuration_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Expected a configuration file of LightningCLI at .*config\.yaml"):
        CommandLineObjective(config=("config.yaml",), search=str(tmp_path))
    with pytest.raises(ValueError, match="Expected at least one configuration file"):
        CommandLineObjective(config=())
