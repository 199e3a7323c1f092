"""A run that is interrupted and resumed has the history, the weights and the distances of one that is not."""

import warnings
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ntk import LinearizationMonitor
from tests.callback.test_monitor import Regression, digits, fit, make_module
from tests.callback.trainer_runs import WEIGHTS_ONLY

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
    "twin, stored rows": (
        {"dynamics": "twin", "jacobian": "stored", "capture_at": 5},
        {"lr": 1e-2, "optimizer": torch.optim.AdamW},
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
            module, loader, ckpt_path=path / "interrupted.ckpt", **WEIGHTS_ONLY
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
        trainer(monitor, enable_checkpointing=False).fit(module, loader, ckpt_path=checkpoint, **WEIGHTS_ONLY)

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


class Saves(Callback):
    """Saves in a hook of its own, before or after the monitor's."""

    def __init__(self, path: Path, step: int, hook: str) -> None:
        self.path, self.step = path, step
        setattr(self, hook, self.save)

    def save(self, trainer, *_) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


class Fails(Regression):
    """A linear network whose run ends where it is told to."""

    where, at, kind = "", 0, RuntimeError

    def fail(self, where: str) -> None:
        if (
            self.where == where
            and self.trainer.lightning_module is self
            and self.trainer.global_step >= self.at
            and self.trainer.fit_loop.batch_idx % 3 == 1
        ):
            raise self.kind("the power is gone")

    def training_step(self, batch, batch_idx):
        self.fail("training_step")
        return super().training_step(batch, batch_idx)

    def lr_scheduler_step(self, scheduler, metric):
        self.fail("lr_scheduler_step")
        super().lr_scheduler_step(scheduler, metric)

    def on_train_batch_end(self, *args):
        self.fail("on_train_batch_end")

    def optimizer_step(self, *args):
        super().optimizer_step(*args)
        self.fail("optimizer_step")


def linear_run(
    monitor, path: Path | None, batch_size: int, *callbacks: Callback, module=None, **options
) -> list[float]:
    seed_everything(2, verbose=False)
    module = (
        Fails(nn.Linear(6, 3), lr=0.1, momentum=0.9, schedule=lambda step: 0.97**step) if module is None else module
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            max_steps=14, max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False, precision="64-true",
            enable_model_summary=False, callbacks=list(callbacks) or [monitor],
            enable_checkpointing=any(isinstance(c, OnExceptionCheckpoint) for c in callbacks), **options,
        ).fit(module.double(), DataLoader(digits(), batch_size=batch_size), ckpt_path=path, **WEIGHTS_ONLY)  # fmt: skip
    return [row["step"] for row in monitor.history]


def exact(monitor: LinearizationMonitor) -> bool:
    return all(row["relative_weight_distance"] < 1e-12 and row["exact"] for row in monitor.history)


@pytest.mark.tested("checkpoint in any hook", "gradient_descent", "replay", "twin")
@pytest.mark.parametrize(("dynamics", "hook", "first"), [
    ("gradient_descent", "on_train_batch_end", True), ("replay", "on_before_zero_grad", True),
    ("twin", "on_train_batch_end", True), ("twin", "on_train_batch_start", False),
])  # fmt: skip
def test_state_and_step_belong_together_in_every_hook(tmp_path: Path, dynamics: str, hook: str, first: bool) -> None:
    path, options = tmp_path / "saved.ckpt", {"dynamics": dynamics, "steps": 1, "strict": True}
    size = 11 if dynamics == "gradient_descent" else 4
    monitor, resumed = LinearizationMonitor(**options), LinearizationMonitor(**options)
    saves = Saves(path, 5, hook)
    steps = linear_run(monitor, None, size, *([saves, monitor] if first else [monitor, saves]))
    assert linear_run(resumed, path, size) == steps == list(range(15))
    assert exact(monitor)
    assert exact(resumed)


@pytest.mark.tested("checkpoint after an exception", "replay", "twin")
@pytest.mark.parametrize(("where", "dynamics", "kind", "accumulated"), [
    ("training_step", "twin", KeyboardInterrupt, 2), ("lr_scheduler_step", "replay", RuntimeError, 1),
    ("on_train_batch_end", "twin", RuntimeError, 1), ("optimizer_step", "twin", RuntimeError, 2),
])  # fmt: skip
def test_a_run_that_ended_by_an_exception_goes_on(tmp_path: Path, dynamics, kind, where: str, accumulated: int) -> None:
    class Keeps(OnExceptionCheckpoint):
        def teardown(self, *args):
            pass  # which would remove the checkpoint

    options = {"dynamics": dynamics, "steps": 1, "strict": True}
    monitor, resumed, saving = LinearizationMonitor(**options), LinearizationMonitor(**options), Keeps(tmp_path)
    module = Fails(nn.Linear(6, 3), lr=0.1, momentum=0.9, schedule=lambda step: 0.97**step)
    module.where, module.at, module.kind = where, 6, kind
    with pytest.raises((kind, SystemExit)):
        linear_run(monitor, None, 2, monitor, saving, module=module, accumulate_grad_batches=accumulated)
    saved = tmp_path / "on_exception.ckpt"
    if where == "optimizer_step":  # before Lightning has counted the step
        with pytest.raises(MisconfigurationException, match="saved in the middle of an optimizer step"):
            linear_run(resumed, saved, 2)
        return
    steps = linear_run(resumed, saved, 2, accumulate_grad_batches=accumulated)
    assert steps == sorted(set(steps))
    assert steps[-1] == 14
    assert exact(resumed)


@pytest.mark.filterwarnings("ignore")
def test_what_defines_the_comparison_must_stay_and_the_rest_may_change(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    began = {"loss": nn.MSELoss(), "dynamics": "replay", "steps": 1}
    first = LinearizationMonitor(**began)
    linear_run(first, None, 4, first, Saves(path, 5, "on_train_batch_end"))
    changed = {
        "loss": {"loss": nn.SmoothL1Loss()}, "predict": {"predict": lambda module, x: module(x)}, "dtype": {"dtype": "float32"},
        "unpack": {"unpack": lambda batch: batch}, "capture_at": {"capture_at": 2}, "dynamics": {"dynamics": "twin"},
    }  # fmt: skip
    for name, options in changed.items():
        with pytest.raises(MisconfigurationException, match=f"expects argument `{name}` as the run began with it"):
            linear_run(LinearizationMonitor(**(began | options)), path, 4)
    free = {
        "steps": 3,
        "batch_size": 2,
        "taylor": False,
        "per_parameter": True,
        "dynamics": "auto",
        "strict": True,
        "progress": False,
    }
    resumed = LinearizationMonitor(**(began | free))
    linear_run(resumed, path, 4)
    assert exact(resumed)
    plain, other = (Regression(nn.Linear(6, 3), optimizer=kind) for kind in (torch.optim.SGD, torch.optim.Adam))
    monitor, path = LinearizationMonitor(**began), tmp_path / "plain.ckpt"
    linear_run(monitor, None, 4, monitor, Saves(path, 5, "on_train_batch_end"), module=plain)
    with pytest.raises(MisconfigurationException, match="with which the run was saved, SGD, but got Adam"):
        linear_run(LinearizationMonitor(**began), path, 4, module=other)


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_that_lack_something_are_refused_in_a_sentence(tmp_path: Path) -> None:
    path, options = tmp_path / "saved.ckpt", {"dynamics": "twin", "steps": 1}
    monitor = LinearizationMonitor(**options)
    linear_run(monitor, None, 4, monitor, Saves(path, 5, "on_train_batch_end"))

    def without(*keys: str) -> None:
        checkpoint = torch.load(path, weights_only=True)
        (key,) = checkpoint["callbacks"]
        state = checkpoint["callbacks"][key]
        for name in keys[:-1]:
            state = state[name]
        del state[keys[-1]]
        torch.save(checkpoint, tmp_path / "less.ckpt")

    state = next(iter(torch.load(path, weights_only=True)["callbacks"].values()))
    top = [(key,) for key in state if key not in ("started", "history", "start", "reported")]
    inner = [("capture", key) for key in state["capture"]]
    inner += [("capture", "comparison", key) for key in state["capture"]["comparison"] if key != "kernel_probe"]
    for keys in (*top, *inner[::3]):
        without(*keys)
        with pytest.raises(MisconfigurationException, match=f"this one lacks '{keys[-1]}'"):
            linear_run(LinearizationMonitor(**options), tmp_path / "less.ckpt", 4)


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
