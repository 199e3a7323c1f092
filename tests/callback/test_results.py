"""What a monitor says when a fit has ended."""

import logging

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ntk import LinearizationMonitor


class Classifier(LightningModule):
    def __init__(self, *, linear: bool = False) -> None:
        super().__init__()
        self.network = nn.Linear(4, 3) if linear else nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(module: LightningModule, monitor: LinearizationMonitor, steps: int = 20) -> Trainer:
    seed_everything(0, verbose=False)
    data = TensorDataset(torch.randn(24, 4), torch.arange(24) % 3)
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, callbacks=[monitor], logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, 8))
    return trainer


def test_the_last_line_of_a_fit_is_the_verdict(caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    monitor = LinearizationMonitor()
    with caplog.at_level(logging.INFO):
        fit(Classifier(linear=True), monitor)
    assert monitor.verdict.word == "lazy"
    assert monitor.verdict.describe() in caplog.messages[-1]
    assert repr(monitor) == "LinearizationMonitor('ntk': lazy after 20 steps)"
    assert monitor.summary().splitlines()[-1].split()[0] == "20"


def test_nothing_is_said_of_a_run_that_has_not_begun() -> None:
    monitor = LinearizationMonitor(name="mine")
    assert monitor.verdict.word == "undecided"
    assert repr(monitor) == "LinearizationMonitor('mine': nothing measured)"
    assert monitor.summary() == "Undecided: nothing was measured."


def test_weights_that_hardly_move_decide_nothing() -> None:
    module = Classifier().double()
    monitor = LinearizationMonitor(reference=None)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1e-14)
    seed_everything(0, verbose=False)
    data = TensorDataset(torch.randn(24, 4).double(), torch.arange(24) % 3)
    trainer = Trainer(max_steps=12, max_epochs=-1, callbacks=[monitor], logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")  # fmt: skip
    trainer.fit(module, DataLoader(data, 8))
    assert "rounding" in monitor.verdict.reason


def test_the_page_has_the_warnings_and_the_spectrum(tmp_path) -> None:
    monitor = LinearizationMonitor(loss=nn.MSELoss(), mismatch="log", dynamics="gradient_descent")
    module = Classifier()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match="does not follow"):
        fit(module, monitor)
    page = monitor.report(tmp_path / "run.html").read_text()
    assert "Undecided" in page
    assert "does not follow the loss of this run" in page
    assert "<h2>The spectrum</h2>" in page


def test_the_progress_bar_has_the_distance() -> None:
    monitor = LinearizationMonitor(prog_bar=True)
    trainer = fit(Classifier(), monitor)
    assert trainer.progress_bar_metrics["ntk/relative_weight_distance"] == pytest.approx(
        monitor.history[-1]["relative_weight_distance"]
    )


def test_the_history_as_a_table() -> None:
    monitor = LinearizationMonitor()
    fit(Classifier(), monitor)
    table = pytest.importorskip("pandas").DataFrame(monitor.history)
    assert monitor.to_pandas().equals(table)
