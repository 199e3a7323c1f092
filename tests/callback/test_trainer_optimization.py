"""Schedules, clipping, accumulation and optimizers of a Trainer, with monitors of all dynamics beside them.

Most networks here are linear, their own linearization: whatever the Trainer does, every distance of dynamics that follow it is
rounding.
"""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

from lightning_ntk import LinearizationMonitor
from tests.callback.trainer_runs import (
    EXACT,
    MINIBATCH,
    Task,
    Wobbly,
    assert_trains_alike,
    check,
    distance,
    linear,
    loader,
    make,
    train,
    watch,
)  # fmt: skip

SCHEDULES = {
    "step of epochs": lambda o: {"scheduler": StepLR(o, 3, 0.5), "interval": "epoch"},
    "cosine of steps": lambda o: {"scheduler": CosineAnnealingLR(o, 5), "interval": "step"},
    "warm-up from nothing": lambda o: {"scheduler": LambdaLR(o, lambda step: min(1, step / 4)), "interval": "step"},
    "one cycle": lambda o: {"scheduler": OneCycleLR(o, 0.5, total_steps=9), "interval": "step"},
    "every second epoch": lambda o: {"scheduler": StepLR(o, 1, 0.7), "interval": "epoch", "frequency": 2},
    "plateau": lambda o: {"scheduler": ReduceLROnPlateau(o, patience=0, threshold=0.9), "monitor": "train_loss"},
}


class Rates(Callback):
    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.tested("learning-rate schedule", "gradient_descent", "replay", "twin")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rates_are_followed_as_they_are_used(schedule: str) -> None:
    rates = Rates()

    def run(callbacks):
        module = make(momentum=0.6, lr=0.3, scheduler=SCHEDULES[schedule])
        train(module, loader(11), [*callbacks, rates], max_epochs=8)
        return module

    monitors = watch()
    assert_trains_alike(run, monitors)
    assert len(set(rates.rates)) > 1
    check(monitors, steps=8)


SETTINGS = {
    "plain": ({}, {}, {}),
    "accumulation with a remainder": ({}, {"accumulate_grad_batches": 2}, {}),
    "scheduled accumulation": ({}, {"callbacks": [(GradientAccumulationScheduler, {"scheduling": {0: 1, 2: 3}})]}, {}),
    "clipping by norm": ({"momentum": 0.9, "weight_decay": 0.1}, {"gradient_clip_val": 0.3}, {}),
    "fewer batches": ({"momentum": 0.9}, {"limit_train_batches": 2}, {}),
    "validation between steps": (
        {"momentum": 0.9}, {"val_check_interval": 1, "val": True, "num_sanity_val_steps": 1}, {},
    ),
    "workers": ({}, {"max_epochs": 2}, {"num_workers": 1, "persistent_workers": True}),
    "drop_last": ({"nesterov": True, "momentum": 0.9}, {}, {"drop_last": True}),
    "inference between epochs": ({}, {"val": True, "inference_mode": True, "check_val_every_n_epoch": 2}, {}),
    "deterministic and profiled": ({}, {"deterministic": True, "profiler": "simple", "detect_anomaly": True}, {}),
}  # fmt: skip


@pytest.mark.tested("minibatches", "replay", "twin")
@pytest.mark.tested("gradient accumulation", "replay", "twin")
@pytest.mark.tested("clipping by norm", "replay", "twin")
@pytest.mark.tested("limit_train_batches", "replay", "twin")
@pytest.mark.tested("validation between steps", "replay", "twin")
@pytest.mark.parametrize("setting", SETTINGS)
def test_minibatches_are_followed(setting: str) -> None:
    of_module, of_trainer, of_loader = SETTINGS[setting]

    def run(callbacks):
        module = make(**of_module)
        options = dict(of_trainer)
        val = loader() if options.pop("val", False) else None
        callbacks = [*callbacks, *(kind(**arguments) for kind, arguments in options.pop("callbacks", []))]
        train(module, loader(4, shuffle=True, **of_loader), callbacks, val=val, **options)
        return module

    monitors = watch()
    assert_trains_alike(run, monitors)
    check(monitors, MINIBATCH)


@pytest.mark.tested("Adam and other optimizers", "twin")
@pytest.mark.tested("clipping by value", "twin")
def test_any_optimizer_is_followed_by_the_twin() -> None:
    for optimizer in (torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam):

        def run(callbacks, optimizer=optimizer):
            module = make(optimizer=optimizer, lr=0.01)
            options = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2}
            train(module, loader(4, shuffle=True), callbacks, **options)
            return module

        monitors = watch(("twin",))
        assert_trains_alike(run, monitors)
        check(monitors, steps=8)


def test_a_run_that_maximizes_its_loss_gets_the_twin() -> None:
    monitor = LinearizationMonitor(steps=1, strict=True)
    train(make(maximize=True, lr=0.01), loader(11), [monitor])
    assert monitor.dynamics_used == "twin"
    assert "it maximizes its loss" in monitor.reason
    assert distance(monitor) < EXACT


def test_scheduled_accumulation_is_no_gradient_descent() -> None:
    """Gradients of a full batch are divided by two from the third epoch on."""
    monitor = LinearizationMonitor(steps=1, strict=True)
    train(make(), loader(11), [monitor, GradientAccumulationScheduler({2: 2})])
    assert monitor.dynamics_used == "replay"
    assert distance(monitor) < EXACT
    with pytest.warns(UserWarning, match="it changes over how many batches it accumulates gradients"):
        train(make(), loader(11), [*watch(("gradient_descent",)), GradientAccumulationScheduler({2: 2})])


class Absent(Task):
    """Some batches are left out, the first one among them."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if (self.trainer.current_epoch + batch_idx) % 3 == 0 else loss


@pytest.mark.tested("batches left out by training_step", "gradient_descent", "replay", "twin")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_that_training_step_leaves_out(accumulate: int) -> None:
    def run(callbacks):
        module = make(task=Absent, momentum=0.9, weight_decay=0.1)
        train(module, loader(4), callbacks, accumulate_grad_batches=accumulate)
        return module

    monitors = [*watch(("replay",), loss=nn.MSELoss()), *watch(("twin",))]
    assert_trains_alike(run, monitors)
    check(monitors)
    if accumulate == 1:
        descent = watch(("gradient_descent",), loss=nn.MSELoss())
        train(make(task=Absent, momentum=0.9), loader(11), descent, max_epochs=9)
        check(descent, steps=9)


def test_a_constant_factor_of_ones_own_is_followed() -> None:
    class Clipping(Task):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(0.5)

    monitors = watch(("twin",))
    train(make(task=Clipping), loader(), monitors)
    check(monitors)
    assert all(row["exact"] for row in monitors[0].history)


class Manual(Task):
    """Manual optimization, with a step after every second batch if `every` is 2."""

    every = 1

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(nn.functional.mse_loss(self(batch[0]), batch[1]))
        if (batch_idx + 1) % self.every == 0:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.tested("manual optimization", "replay", "twin")
@pytest.mark.parametrize("every", [1, 2])
def test_manual_optimization_with_one_optimizer(every: int) -> None:
    def run(callbacks):
        module = make(task=Manual, momentum=0.9, lr=0.05)
        module.every = every
        train(module, loader(4, shuffle=True, drop_last=every == 2), callbacks)
        return module

    monitors = watch(MINIBATCH, loss=nn.MSELoss())
    assert_trains_alike(run, monitors)
    check(monitors)
    with pytest.warns(UserWarning, match="it optimizes manually"):
        train(make(task=Manual), loader(), watch(("twin",), loss=nn.MSELoss()), max_epochs=1)


def test_manual_optimization_is_refused_without_a_loss() -> None:
    with pytest.raises(MisconfigurationException, match=r"the module optimizes manually.*Give `loss`"):
        train(make(task=Manual), loader(), [LinearizationMonitor()])


def test_two_steps_in_a_batch_are_not_followed() -> None:
    class Twice(Manual):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            super().training_step(batch, batch_idx)

    monitor = LinearizationMonitor(dynamics="twin", steps=1, loss=nn.MSELoss(), mismatch="log")
    with pytest.warns(UserWarning, match="at most one optimizer step in a batch but `training_step` took 2"):
        trainer = train(make(task=Twice), loader(), [monitor])
    assert trainer.global_step == 24
    assert [row["step"] for row in monitor.history] == [0]


class SAM(torch.optim.SGD):
    def first_step(self):
        pass

    def second_step(self):
        pass


@pytest.mark.parametrize(("optimizer", "phrase"), [
    (torch.optim.LBFGS, "LBFGS evaluates the loss several times"), (SAM, "SAM takes the gradient at two points"),
])  # fmt: skip
@pytest.mark.parametrize("dynamics", ["auto", "twin", "replay"])
def test_optimizers_of_several_gradients_are_refused(optimizer, phrase: str, dynamics: str) -> None:
    with pytest.raises(MisconfigurationException, match=phrase):
        train(make(optimizer=optimizer), loader(), [LinearizationMonitor(dynamics=dynamics)])


# --- Weights that are averaged


# WeightAveraging and EMAWeightAveraging came with Lightning 2.6.
averages_weights = pytest.mark.skipif(
    not hasattr(lightning_callbacks, "WeightAveraging"), reason="this Lightning has no WeightAveraging"
)


class EveryStep(getattr(lightning_callbacks, "WeightAveraging", Callback)):
    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None


@pytest.mark.tested("WeightAveraging and StochasticWeightAveraging", "replay", "twin")
@pytest.mark.parametrize("body", [linear, Wobbly])
@pytest.mark.parametrize("averaging", [
    pytest.param(EveryStep, marks=averages_weights),
    pytest.param(getattr(lightning_callbacks, "EMAWeightAveraging", None), marks=averages_weights, id="EMAWeightAveraging"),
    StochasticWeightAveraging,
])  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_the_weights_compared_are_those_of_the_run_not_their_average(averaging, body, first: bool) -> None:
    """StochasticWeightAveraging adds an epoch, in which BatchNorm sees the averaged weights."""

    def run(callbacks):
        module = make(body, lr=0.2).double()  # whose copy Lightning makes before it converts the weights
        average = averaging(swa_lrs=0.1) if averaging is StochasticWeightAveraging else averaging()
        train(
            module, loader(4), [*callbacks, average] if first else [average, *callbacks], max_epochs=6, val=loader(11)
        )
        return module

    monitors = watch()
    last = LinearizationMonitor(dynamics="twin", name="last", steps=100, strict=True)
    assert_trains_alike(run, [*monitors, last], follows=body is linear)
    for monitor in monitors:
        assert [row["step"] for row in monitor.history] == list(range(19))
    assert [row["step"] for row in last.history] == [0, 18]
    if body is linear:
        check([*monitors, last], (*MINIBATCH, "last"))


@averages_weights
def test_the_last_weights_of_a_run_that_was_stopped_are_measured_before_they_are_averaged() -> None:
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    for order, last in (([0, 1], 3), ([1, 0], 0)):
        monitor = LinearizationMonitor(dynamics="twin", steps=100, strict=True)
        callbacks = [monitor, EveryStep()]
        train(make(), loader(), [Stop(), *(callbacks[i] for i in order)])
        assert monitor.history[-1]["step"] == last
        assert distance(monitor) < EXACT
