"""Real Trainer runs, with monitors and without: whether they train alike, and how far the linearized networks are."""

import inspect
import random
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from lightning_ntk import LinearizationMonitor
from tests.callback import test_monitor as test_monitor
from tests.callback.test_monitor import Regression

digits = cache(test_monitor.digits)
DYNAMICS = ("gradient_descent", "replay", "twin")
MINIBATCH = ("replay", "twin")
EXACT = 1e-12
# Lightning 2.6 made this an argument of Trainer.fit.
WEIGHTS_ONLY: dict[str, Any] = (
    {"weights_only": True} if "weights_only" in inspect.signature(Trainer.fit).parameters else {}
)


def linear(outputs: int) -> nn.Module:
    """A network that is its own linearization, so that every distance is an error of the package."""
    return nn.Linear(6, outputs)


class Wobbly(nn.Module):
    """Dropout and BatchNorm: forward passes in train mode draw random numbers and change buffers."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, outputs)
        )

    def forward(self, inputs):
        return self.layers(inputs)


class Task(Regression):
    """A regression with all that a run may have besides: validation, test, a scheduler of any kind."""

    def __init__(self, body: nn.Module | None = None, scheduler: Callable[..., Any] | None = None, **options) -> None:
        super().__init__(linear(3) if body is None else body, **options)
        self.scheduler = scheduler

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters(), lr=self.lr, **self.options)
        return (
            optimizer if self.scheduler is None else {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}
        )


def make(body: Callable[[int], nn.Module] = linear, task: type[Task] = Task, **options: Any) -> Task:
    """A LightningModule with the same weights every time."""
    torch.manual_seed(0)
    return task(body(3), **options)


def watch(dynamics: Sequence[str] = DYNAMICS, **options: Any) -> list[LinearizationMonitor]:
    """Monitors of these dynamics that measure every step and let no error pass; a mismatch is for the test to judge."""
    defaults = {"steps": 1, "strict": True, "mismatch": "log"}
    return [LinearizationMonitor(dynamics=name, name=name, **(defaults | options)) for name in dynamics]


def loader(batch_size: int = 4, **options: Any) -> DataLoader:
    return DataLoader(digits(), batch_size=batch_size, **options)


def train(
    module: LightningModule,
    data: Any,
    callbacks: Sequence[Callback] = (),
    *,
    val: Any = None,
    resume_from: Any = None,
    **options: Any,
) -> Trainer:
    """A fit from a fixed seed, with warnings left to whoever asks for them."""
    seed_everything(1, verbose=False)
    defaults = {
        "max_epochs": 4, "accelerator": "cpu", "precision": "64-true", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    trainer = Trainer(**(defaults | options | {"callbacks": list(callbacks) + options.pop("callbacks", [])}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of training batches|The '.*_dataloader' does not have")
        if isinstance(data, DataLoader | list | dict) or not hasattr(data, "train_dataloader"):
            trainer.fit(module, data, val, ckpt_path=resume_from, **WEIGHTS_ONLY)
        else:
            trainer.fit(module, datamodule=data)
    return trainer


def random_state() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()


def assert_trains_alike(
    run: Callable[[list[Callback]], LightningModule], monitors: list[LinearizationMonitor], *, follows: bool = True
) -> LightningModule:
    """The golden test: weights, buffers, modes and random states after a run with monitors are those of one without.

    And with `follows` the gradient of its first step is the one that is linearized.
    """
    expected = run([])
    drawn = random_state()
    modes = [m.training for m in expected.modules()]
    weights = {name: value.clone() for name, value in expected.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = run(list(monitors))
    assert random_state() == drawn
    assert not (follows and [w for w in caught if "does not follow" in str(w.message)])
    assert [m.training for m in actual.modules()] == modes
    assert actual.state_dict().keys() == weights.keys()
    for name, value in actual.state_dict().items():
        assert torch.equal(value, weights[name]), name
    for monitor in monitors:
        assert len(monitor.history) > 1
        assert monitor.history[-1]["displacement"] > 0
    return actual


def distance(monitor: LinearizationMonitor) -> float:
    return max(row["relative_weight_distance"] for row in monitor.history)


def check(monitors: list[LinearizationMonitor], exact=DYNAMICS, steps: int | None = None) -> None:
    for monitor in monitors:
        if steps is not None:
            assert [row["step"] for row in monitor.history] == list(range(steps + 1))
        if monitor.name in exact:
            assert distance(monitor) < EXACT, monitor.name
        else:
            assert distance(monitor) > 1e-6, f"{monitor.name} has no reason to be exact here"
