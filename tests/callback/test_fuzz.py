"""Random runs of a network that is linear in its weights: distance 0, or one warning and a mark, or a refusal before step 1."""

import os
import random
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler

from lightning_ntk import LinearizationMonitor
from tests.callback.trainer_runs import Task, digits, make, train

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "12"))  # 300 take about five minutes
STEPS = 7
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {}), "momentum": (torch.optim.SGD, {"momentum": 0.8}),
    "Nesterov": (torch.optim.SGD, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    "decay": (torch.optim.SGD, {"weight_decay": 0.1}), "Adam": (torch.optim.Adam, {}), "RMSprop": (torch.optim.RMSprop, {}),
}  # fmt: skip


class Model(nn.Module):
    """Two layers beside each other, so that one of them can be frozen."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, outputs), nn.Linear(6, outputs, bias=False)

    def forward(self, inputs):
        return self.first(inputs) + self.second(inputs.square())


class Run(Task):
    """Does in its hooks what was drawn."""

    plan: dict[str, Any]

    def configure_optimizers(self):
        kind, options = OPTIMIZERS[self.plan["optimizer"]]
        first, second = list(self.body.first.parameters()), list(self.body.second.parameters())
        scale = 0.05 if self.plan["reduction"] == "sum" else 1.0
        groups = [{"params": first}, {"params": second, "lr": self.plan["second rate"] * scale}]
        optimizer = kind(groups, lr=0.03 * scale, **options)
        if not self.plan["schedule"]:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1], reduction=self.plan["reduction"])

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=self.plan["to none"])

    def on_before_optimizer_step(self, optimizer):
        if self.plan["hook"] == "multiply":
            self.multiply(0.5)
        elif self.plan["hook"] == "clip":
            nn.utils.clip_grad_norm_(self.parameters(), 0.05)

    def on_after_backward(self):
        if self.plan["hook"] == "after backward":
            self.multiply(0.5)

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        if self.plan["hook"] == "clamp":
            for parameter in self.parameters():
                parameter.data.clamp_(-0.3, 0.3)

    def multiply(self, factor: float) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


class Event(Callback):
    """Changes the run once."""

    def __init__(self, kind: str, step: int) -> None:
        self.kind, self.step = kind, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step != self.step:
            return
        self.step, (optimizer,) = -1, trainer.optimizers
        group = optimizer.param_groups[1]
        if self.kind == "freeze":
            pl_module.body.first.requires_grad_(False)
        elif self.kind in ("swap to SGD", "swap to Adam"):
            kind = torch.optim.SGD if "SGD" in self.kind else torch.optim.Adam
            trainer.strategy.optimizers = [kind(pl_module.parameters(), lr=0.02)]
        elif self.kind == "clear":
            optimizer.state.clear()
        elif self.kind == "move":
            optimizer.param_groups[0]["params"].append(group["params"].pop())
        elif self.kind in ("momentum", "weight_decay") and isinstance(optimizer, torch.optim.SGD):
            group[self.kind] = 0.5
        elif self.kind == "rate":
            group["lr"] *= 2
        elif self.kind == "accumulate":
            trainer.accumulate_grad_batches = 3
        elif self.kind == "clip":
            trainer.gradient_clip_val = 0.05


EVENTS = (
    "",
    "freeze",
    "swap to SGD",
    "swap to Adam",
    "clear",
    "move",
    "momentum",
    "weight_decay",
    "rate",
    "accumulate",
    "clip",
)
PLANS = st.fixed_dictionaries({
    "dynamics": st.sampled_from(["auto", "gradient_descent", "replay", "twin"]), "optimizer": st.sampled_from(sorted(OPTIMIZERS)),
    "second rate": st.sampled_from([0.03, 0.03, 0.01]), "schedule": st.booleans(),
    "reduction": st.sampled_from(["mean", "mean", "sum"]),
    "to none": st.booleans(), "hook": st.sampled_from(["", "", "", "multiply", "clip", "after backward", "clamp"]),
    "event": st.sampled_from(EVENTS), "event step": st.integers(1, 4), "event first": st.booleans(),
    "batch size": st.sampled_from([2, 4, 11]), "accumulate": st.integers(1, 3), "clip": st.sampled_from([None, None, 0.05]),
    "by value": st.booleans(), "data": st.sampled_from(["ordered", "shuffled", "replacement", "part", "weighted"]),
    "drop last": st.booleans(), "steps": st.sampled_from([1, 2]), "given loss": st.booleans(),
    "capture at": st.sampled_from([0, 0, 2]),
    "resume": st.sampled_from([None, None, 2, 3]),
})  # fmt: skip


# Found by chance: between a late capture and the first step that is followed, part of the network was frozen.
FROZEN_AFTER_CAPTURE = {
    "dynamics": "auto", "optimizer": "Nesterov", "second rate": 0.03, "schedule": False, "reduction": "mean", "to none": False,
    "hook": "", "event": "freeze", "event step": 2, "event first": False, "batch size": 2, "accumulate": 1, "clip": None,
    "by value": False, "data": "ordered", "drop last": False, "steps": 1, "given loss": True, "capture at": 2, "resume": None,
}  # fmt: skip


def loader(plan: dict[str, Any]) -> DataLoader:
    data, size = digits(), plan["batch size"]
    generator = torch.Generator().manual_seed(1)
    sampler = {
        "replacement": RandomSampler(data, replacement=True, generator=generator),
        "part": RandomSampler(data, num_samples=6, generator=generator),
        "weighted": WeightedRandomSampler([1.0] * 11, 11, generator=generator),
    }.get(plan["data"])  # fmt: skip
    return DataLoader(
        data,
        size,
        sampler=sampler,
        shuffle=True if plan["data"] == "shuffled" else None,
        drop_last=plan["drop last"] and plan["data"] != "part",
    )


def follow(plan: dict[str, Any], folder: Path, resume: bool) -> tuple[LinearizationMonitor, str, list[str]]:
    module = make(Model, task=Run).double()
    module.plan = plan
    loss = nn.MSELoss(reduction=plan["reduction"]) if plan["given loss"] else None
    monitor = LinearizationMonitor(
        dynamics=plan["dynamics"], steps=plan["steps"], loss=loss, capture_at=plan["capture at"], reference_samples=None
    )
    event, saved = Event(plan["event"], plan["event step"]), folder / "saved.ckpt"
    callbacks = [event, monitor] if plan["event first"] else [monitor, event]
    options = {"accumulate_grad_batches": plan["accumulate"], "gradient_clip_val": plan["clip"], "max_epochs": -1}
    if plan["clip"] and plan["by value"]:
        options["gradient_clip_algorithm"] = "value"
    steps, start, refusal = STEPS, None, ""
    if resume:
        steps = plan["resume"]
    elif saved.exists():
        start, event.step = saved, event.step if event.step > plan["resume"] else -1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer = train(module, loader(plan), callbacks, max_steps=steps, resume_from=start, **options)
            if resume:
                trainer.save_checkpoint(saved)
        except MisconfigurationException as error:
            refusal = str(error)
    return monitor, refusal, [str(warning.message) for warning in caught]


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=EXAMPLES)
@given(plan=PLANS)
@example(plan=FROZEN_AFTER_CAPTURE)
def test_random_runs_are_followed_marked_or_refused(plan: dict[str, Any]) -> None:
    state = random.getstate()
    told: list[str] = []  # by all parts of the run: a resumed one does not repeat it
    with tempfile.TemporaryDirectory() as folder:
        for resume in (True, False) if plan["resume"] and not plan["event"] else (False,):
            monitor, refusal, messages = follow(plan, Path(folder), resume)
            if refusal:
                assert all(row["step"] == monitor._start for row in monitor.history[-1:]), refusal
                event("refused")
                break
            unmarked = [row for row in monitor.history if row["exact"]]
            wrong = [
                (row["step"], row["relative_weight_distance"])
                for row in unmarked
                if row["relative_weight_distance"] > 1e-9
            ]
            assert not wrong, messages
            told += messages
            said = [m for m in told if "inearized network" in m or "LinearizationMonitor" in m or "goes on" in m]
            last = plan["resume"] if resume else STEPS
            steps = [row["step"] for row in monitor.history]
            waits = not steps and last <= plan["capture at"]  # for the batch after the last one
            assert said or waits or (len(unmarked) == len(steps) and steps[-1] == last)
            was = "lost" if monitor._status.lost else "marked" if len(unmarked) < len(monitor.history) else "said"
            event(was if said else "exact")
    random.setstate(state)
