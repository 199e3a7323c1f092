"""A run that is interrupted and resumed has the history, the weights and the distances of one that is not."""

from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ntk import LinearizationMonitor
from tests.callback.test_monitor import Regression, digits, fit, make_module

SGD = {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.01}
CASES = {
    "gradient descent, eigh": ({"dynamics": "gradient_descent", "solver": "eigh"}, SGD, 11),
    "gradient descent, Lanczos": ({"dynamics": "gradient_descent", "solver": "lanczos"}, SGD, 11),
    "gradient flow": ({"dynamics": "gradient_flow"}, {"lr": 0.05}, 11),
    "replay": ({"dynamics": "replay"}, SGD, 4),
    "twin, AdamW": ({"dynamics": "twin"}, {"lr": 1e-2, "optimizer": torch.optim.AdamW}, 4),
    "twin, batch statistics": (
        {"dynamics": "twin", "evaluation": digits(5)},
        {"lr": 1e-2, "body": lambda outputs: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, outputs))},
        4,
    ),
    "captured late": ({"dynamics": "replay", "capture_at": 5}, SGD, 4),
    "not captured yet": ({"dynamics": "twin", "capture_at": 25}, SGD, 4),
    "with evaluation": ({"dynamics": "replay", "evaluation": digits(5)}, SGD, 4),
}
INTERRUPTED, LAST = 18, 40


def trainer(monitor: LinearizationMonitor, **options) -> Trainer:
    callbacks = [monitor, *options.pop("callbacks", [])]
    return Trainer(
        max_steps=LAST, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        precision="64-true", callbacks=callbacks, **options,
    )  # fmt: skip


def run(monitor: LinearizationMonitor, module: LightningModule, batch_size: int, path: Path, resume: bool) -> None:
    seed_everything(2, verbose=False)
    loader = DataLoader(digits(), batch_size=batch_size)
    if resume:
        trainer(monitor, enable_checkpointing=False).fit(
            module, loader, ckpt_path=path / "interrupted.ckpt", weights_only=True
        )
        return
    saving = ModelCheckpoint(path, "interrupted", every_n_train_steps=INTERRUPTED, save_top_k=1, monitor=None)
    original = saving._save_checkpoint
    saving._save_checkpoint = lambda t, p: original(t, p) if t.global_step == INTERRUPTED else None  # type: ignore[method-assign]
    trainer(monitor, callbacks=[saving]).fit(module, loader)


@pytest.mark.tested("resume", "gradient_descent", "gradient_flow", "replay", "twin")
@pytest.mark.tested("resume before capture_at", "twin")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_run(name: str, tmp_path: Path) -> None:
    monitor, options, batch_size = CASES[name]
    whole, resumed = (LinearizationMonitor(steps=7, strict=True, **monitor) for _ in range(2))
    # In double precision from the start: Lightning restores weights before it converts the module.
    expected, actual = make_module(**options).double(), make_module(**options).double()
    with torch.no_grad():
        actual.body[0].weight.add_(1.0)  # other weights at construction: those of the checkpoint count
    run(whole, expected, batch_size, tmp_path, resume=False)
    run(resumed, actual, batch_size, tmp_path, resume=True)
    for (parameter, value), other in zip(expected.named_parameters(), actual.parameters(), strict=True):
        assert torch.equal(value, other), parameter
    assert len(whole.history) >= 3
    assert [row["step"] for row in resumed.history] == [row["step"] for row in whole.history]
    for row, other in zip(whole.history, resumed.history, strict=True):
        assert row.keys() == other.keys()
        for tag, value in row.items():
            assert other[tag] == pytest.approx(value, rel=1e-12, abs=1e-13), (tag, row["step"])
    assert whole.history[-1]["relative_weight_distance"] > 1e-4


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "interrupted.ckpt"

    def resume(monitor: LinearizationMonitor, module: LightningModule | None = None, data=None) -> None:
        module = make_module().double() if module is None else module
        loader = DataLoader(digits() if data is None else data, batch_size=11)
        trainer(monitor, enable_checkpointing=False).fit(module, loader, ckpt_path=checkpoint, weights_only=True)

    first, _ = fit(None, make_module(), max_steps=2, precision="64-true")
    first.save_checkpoint(checkpoint)
    with pytest.raises(MisconfigurationException, match="does not hold the weights at which to linearize"):
        resume(LinearizationMonitor())
    first, _ = fit(LinearizationMonitor(save_state=False), make_module(), max_steps=2, precision="64-true")
    first.save_checkpoint(checkpoint)
    (state,) = torch.load(checkpoint, weights_only=True)["callbacks"].values()
    assert state["capture"] is None
    with pytest.raises(MisconfigurationException, match="save_state=True"):
        resume(LinearizationMonitor())
    first, _ = fit(LinearizationMonitor(), make_module(), max_steps=2, precision="64-true")
    first.save_checkpoint(checkpoint)
    inputs, targets = digits().tensors
    with pytest.raises(MisconfigurationException, match="reference set with which the run began"):
        resume(LinearizationMonitor(), data=TensorDataset(inputs.flip(0), targets.flip(0)))
    with pytest.raises(MisconfigurationException, match="evaluation set with which the run began"):
        resume(LinearizationMonitor(evaluation=digits(3)))
    frozen = make_module().double()
    frozen.body[0].bias.requires_grad_(False)
    with pytest.raises((MisconfigurationException, ValueError), match=r"these names differ: \['body.0.bias'\]"):
        resume(LinearizationMonitor(), frozen)


@pytest.mark.tested("exception during the run", "gradient_descent")
@pytest.mark.filterwarnings("ignore")
def test_an_exception_loses_no_history() -> None:
    class Interrupted(Regression):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.global_step == 9:
                raise RuntimeError("the power is gone")

    monitor = LinearizationMonitor(steps=2)
    with pytest.raises(RuntimeError, match="power"):
        fit(monitor, Interrupted(nn.Linear(6, 3)), max_steps=20)
    assert [row["step"] for row in monitor.history] == [0, 2, 4, 6, 8]
