"""Whatever a run does besides plain steps, a linear network is 0 away from its linearization, or its rows are marked.

A network that is linear in its weights is its own linearization, so that every distance is a difference that was not followed.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_ntk import LinearizationMonitor
from lightning_ntk.plots import plot_history
from tests.callback.trainer_runs import Task, digits, make, train, watch

KERNEL = ("gradient_descent", "replay")
EVERY = (*KERNEL, "twin")


def at(step: int, change: Callable[[Any, Any], Any], hook: str = "on_train_batch_end") -> Callback:
    """Changes a run once, after a step."""
    callback = Callback()

    def act(trainer, module, *_) -> None:
        if trainer.global_step == step:
            change(trainer, module)

    setattr(callback, hook, act)
    return callback


def in_group(number: int, **settings: Any) -> Callback:
    return at(3, lambda trainer, module: trainer.optimizers[0].param_groups[number].update(settings))


def every_group(**settings: Any) -> Callback:
    return at(3, lambda trainer, module: [g.update(settings) for g in trainer.optimizers[0].param_groups])


def swap(kind: type) -> Callback:
    return at(3, lambda t, m: setattr(t.strategy, "optimizers", [kind(m.parameters(), lr=0.05)]))


def move(trainer, module) -> None:
    first, second = trainer.optimizers[0].param_groups
    second["params"].append(first["params"].pop())


def multiply(module: nn.Module, factor: float) -> None:
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


class Groups(Task):
    rates = (0.1, 0.1)

    def configure_optimizers(self):
        weight, bias = self.parameters()
        groups = [{"params": [p], "lr": lr} for p, lr in zip((weight, bias), self.rates, strict=True)]
        return self.optimizer(groups, **self.options)


class TwoRates(Groups):
    rates = (0.1, 0.02)


class Clipping(Task):
    def on_before_optimizer_step(self, optimizer):
        nn.utils.clip_grad_norm_(self.parameters(), 0.05)


class Scaling(Task):
    def on_before_optimizer_step(self, optimizer):
        multiply(self, 0.1)


class Signs(Task):
    def on_before_optimizer_step(self, optimizer):
        for parameter in self.parameters():
            parameter.grad.sign_()


class AcrossBatches(Task):
    """Shrinks what it has accumulated so far, after the first step."""

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step > 1:
            multiply(self, 0.5)


class OwnStep(Task):
    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        closure()
        multiply(self, 0.5)
        optimizer.step()


class ClampingHook(Task):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: [p.data.clamp_(-0.1, 0.1) for p in self.parameters()] and None)
        return optimizer


class KeepsZeros(Task):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


class TwoPasses(Task):
    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        closure()
        optimizer.step(closure=closure)


class Reloads(Task):
    after: Any = None

    def train_dataloader(self):
        return DataLoader(digits(), 11) if self.trainer.current_epoch < 3 else self.after


class FewSamples(RandomSampler):
    def __iter__(self):
        return iter([0, 1, 2] + 8 * [3])


class Summed(Task):
    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1], reduction="sum")


def reloads(after: DataLoader) -> type[Task]:
    return type("Reloading", (Reloads,), {"after": after})


class Run(NamedTuple):
    """A run; the dynamics that are told of a difference, with a word of the warning. All others follow it."""

    word: str  # "nothing" where all is followed
    marked: tuple[str, ...]
    callbacks: tuple[Callback, ...] = ()
    before: tuple[Callback, ...] = ()
    task: type[Task] = Task
    module: dict[str, Any] | None = None
    data: Any = None
    options: dict[str, Any] | None = None
    lost: tuple[str, ...] = ()


MOMENTUM = {"momentum": 0.9}
RELOADED = {"reload_dataloaders_every_n_epochs": 1}
clamp = at(3, lambda t, m: [p.data.clamp_(-0.1, 0.1) for p in m.parameters()])
freeze = at(3, lambda t, m: m.body.bias.requires_grad_(False))
RUNS = {
    "a sampler that repeats samples": Run("saw 4 of 11 different samples", KERNEL[:1], data=DataLoader(
        digits(), 11, sampler=FewSamples(digits()))),
    "a sum over accumulated parts": Run("0.5 times the factor", KERNEL[:1], task=Summed, module={"lr": 0.01}, data=DataLoader(
        TensorDataset(*digits(12).tensors), 6), options={"accumulate_grad_batches": 2}),
    "data that grow": Run("saw samples that are not in the reference", KERNEL[:1], lost=("replay",), options=RELOADED,
        task=reloads(DataLoader(digits(25), 25))),
    "smaller batches": Run("saw 4 of 11", KERNEL[:1], task=reloads(DataLoader(digits(), 4)), options=RELOADED),
    "other accumulation": Run("saw 6 of 12", KERNEL[:1], (at(3, lambda t, m: setattr(t, "accumulate_grad_batches", 1)),),
        data=DataLoader(digits(12), 6), options={"accumulate_grad_batches": 2}),
    "clipping that begins": Run("began to clip", KERNEL[:1], (at(3, lambda t, m: setattr(t, "gradient_clip_val", 0.01)),)),
    "momentum of one group": Run("changed the momentum of a part", KERNEL, (in_group(1, momentum=0.9),), task=Groups),
    "momentum of all groups": Run("nothing", (), (every_group(momentum=0.9),), task=Groups),
    "a hook that multiplies": Run("multiplied its gradient", KERNEL[:1], task=Scaling),
    "a hook that clips": Run("changed its gradients after its backward pass", EVERY, task=Clipping),
    "a hook that takes signs": Run("changed its gradients after its backward pass", EVERY, task=Signs),
    "a later callback that multiplies": Run("changed its gradients after", EVERY, (
        at(3, lambda t, m: multiply(m, 0.3), "on_before_optimizer_step"),)),
    "gradients changed between batches": Run("between the batches", EVERY, task=AcrossBatches, data=DataLoader(digits(12), 6),
        options={"accumulate_grad_batches": 2}),
    "clamped weights": Run("weights of the run changed after step 3", EVERY, (clamp,)),
    "weights clamped by a hook": Run("weights of the run changed after step 1", EVERY, task=ClampingHook),
    "another optimizer": Run("replaced its optimizer", KERNEL, (swap(torch.optim.Adam),)),
    "momentum lost with the optimizer": Run("replaced its optimizer", KERNEL, (swap(torch.optim.SGD),), module=MOMENTUM),
    "a state that is cleared": Run("changed what its optimizer remembers", KERNEL, (
        at(3, lambda t, m: t.optimizers[0].state.clear()),), module=MOMENTUM),
    "a state that is written": Run("changed what its optimizer remembers", EVERY, (
        at(3, lambda t, m: [s["momentum_buffer"].zero_() for s in t.optimizers[0].state.values()]),), module=MOMENTUM),
    "a parameter that moves": Run("ratio of the learning rates", KERNEL, (at(3, move),), task=TwoRates, module=MOMENTUM),
    "frozen with a gradient of zero": Run("began or ceased to train", KERNEL, (freeze,),
        module=MOMENTUM, task=KeepsZeros),
    "two passes for a step": Run("several backward passes", EVERY, task=TwoPasses),
}  # fmt: skip


def follow(run: Run, *dynamics: str) -> tuple[list[LinearizationMonitor], list[str]]:
    monitors = watch(dynamics, strict=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = DataLoader(digits(), 11) if run.data is None else run.data
        train(
            make(task=run.task, **(run.module or {})).double(), None if issubclass(run.task, Reloads) else data,
            [*run.before, *monitors, *run.callbacks], max_epochs=6, **(run.options or {}),
        )  # fmt: skip
    said = ("the run", "The run", "The weights", "linearized network is lost", "compares this run")
    return monitors, [m for w in caught if any(phrase in (m := str(w.message)) for phrase in said)]


@pytest.mark.tested("what a run does besides plain steps: followed or marked", "gradient_descent", "replay", "twin")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_followed_or_its_rows_are_marked(name: str) -> None:
    run = RUNS[name]
    monitors, messages = follow(run, *EVERY)
    for monitor in monitors:
        steps = [row["step"] for row in monitor.history]
        wrong = {row["step"] for row in monitor.history if row["relative_weight_distance"] > 1e-9}
        marked = [row["step"] for row in monitor.history if not row["exact"]]
        assert wrong <= set(marked), monitor.name
        if monitor.name in run.lost:
            assert steps[-1] == 3
        else:
            assert len(steps) > 5
            assert marked == (steps[-len(marked) :] if monitor.name in run.marked else []), messages
            assert bool(marked) == (monitor.name in run.marked)
    assert sum(run.word in message for message in messages) == len(run.marked)
    assert len(run.marked) <= len(messages) - len(run.lost) <= 2 * len(run.marked), messages


@pytest.mark.parametrize(
    ("name", "dynamics"), [("a hook that multiplies", "twin"), ("a sum over accumulated parts", "replay")]
)
def test_the_choice_gives_way_to_dynamics_that_follow(name: str, dynamics: str) -> None:
    (monitor,), _ = follow(RUNS[name], "auto")
    assert monitor.dynamics_used == dynamics
    assert all(row["relative_weight_distance"] < 1e-12 and row["exact"] for row in monitor.history)


def test_gradients_that_lightning_does_not_set_to_zero_are_found() -> None:
    """It does so before batches whose number in the epoch is a multiple of `accumulate_grad_batches`."""
    longer = at(2, lambda trainer, module: setattr(trainer, "accumulate_grad_batches", 3))
    monitors, messages = follow(Run("", (), (longer,), data=DataLoader(digits(), 2)), "replay", "twin")
    assert sum("adds to gradients of an earlier step" in message for message in messages) == 2
    for monitor in monitors:
        assert {row["step"] for row in monitor.history if row["exact"]} == {0, 1, 2}
        assert all(row["relative_weight_distance"] < 1e-12 for row in monitor.history if row["exact"])


def test_modes_that_the_twin_cannot_log_are_named_when_it_takes_over() -> None:
    monitor = LinearizationMonitor(closest=True, modes=2, steps=1)
    with pytest.warns(UserWarning, match="logs nothing for `closest` and `modes`") as record:
        train(make(task=Scaling).double(), DataLoader(digits(), 11), [monitor])
    assert sum("logs nothing" in str(warning.message) for warning in record) == 1
    assert monitor.dynamics_used == "twin"
    assert not any(tag.startswith(("mode/", "closest")) for row in monitor.history[1:] for tag in row)


def test_marked_rows_have_hollow_markers() -> None:
    (monitor,), _ = follow(RUNS["clamped weights"], "twin")
    _, (axis, *_) = plot_history(monitor.history)
    (hollow,) = (line for line in axis.lines if line.get_markerfacecolor() == "white" and line.get_marker() == "o")
    assert list(hollow.get_xdata()) == [row["step"] for row in monitor.history if not row["exact"]] == [4, 5, 6]
