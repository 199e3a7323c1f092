"""What data sets, hooks and modules keep of their own is the same with a monitor and without: the golden test for it."""

import itertools
import os
import random
import warnings
from collections import deque
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_ntk import LinearizationMonitor
from lightning_ntk.utilities.preserved_objects import preserved_objects
from tests.callback.trainer_runs import Task, assert_trains_alike, digits, distance, make, train


def noise(generator: Any) -> Tensor:
    if isinstance(generator, numpy.random.Generator | numpy.random.RandomState):
        return torch.tensor(generator.normal(size=6)).float()
    if isinstance(generator, random.Random):
        return torch.tensor([generator.gauss(0, 1) for _ in range(6)])
    return torch.randn(6, generator=generator)


class Noisy(Dataset):
    """Augments with a generator of its own, and counts how often it is read."""

    def __init__(self, generator: Any) -> None:
        self.generator, self.reads, self.last = generator, 0, deque(maxlen=3)

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index):
        self.reads += 1
        self.last.append(index)
        inputs, targets = digits()[index]
        return inputs + noise(self.generator) / 10 + self.reads / 1000 + sum(self.last) / 100, targets


class Collate:
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self, samples):
        inputs, targets = default_collate(samples)
        return inputs + noise(self.generator), targets


class Module(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.generator, self.calls = numpy.random.default_rng(1), itertools.count()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(digits(), batch_size=4, shuffle=True)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + noise(self.generator).double(), batch[1]


class Remembering(Task):
    """Keeps numbers, tensors and lists of its forward passes, which change the next one."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.calls, self.hidden, self.log_of_calls = 0, torch.zeros(3, dtype=torch.float64), []

    def forward(self, inputs):
        self.calls += 1
        self.log_of_calls.append(self.calls)
        outputs = super().forward(inputs) + self.hidden.mean() + len(self.log_of_calls) / 100
        self.hidden = outputs.detach().mean(0) / 10
        return outputs


class Drawing(Task):
    shared = torch.Generator()

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.own = numpy.random.RandomState(3)
        self.shared.manual_seed(3)

    def forward(self, inputs):
        return super().forward(inputs + noise(self.shared).double() + noise(self.own).double())


def shuffled(data: Dataset, **options: Any) -> DataLoader:
    return DataLoader(data, batch_size=4, shuffle=True, **options)


DATA = {
    "NumPy": lambda: shuffled(Noisy(numpy.random.default_rng(0))),
    "random.Random": lambda: shuffled(Noisy(random.Random(0))),
    "torch": lambda: shuffled(Noisy(torch.Generator().manual_seed(0))),
    "collate_fn": lambda: shuffled(digits(), collate_fn=Collate()),
    "datamodule": Module,
}


@pytest.mark.tested("data with generators of their own, training bitwise unchanged", "twin")
@pytest.mark.parametrize("name", DATA)
def test_generators_and_counters_of_data_are_left_as_they_are(name: str) -> None:
    def run(callbacks):
        module = make()
        train(module, DATA[name](), callbacks, max_epochs=2)
        return module

    monitor = LinearizationMonitor(steps=1, strict=True)
    assert_trains_alike(run, [monitor])
    assert distance(monitor) < 1e-12


def test_data_that_reading_would_use_up_are_not_read() -> None:
    class Stream(Noisy):
        def __init__(self) -> None:
            super().__init__(torch.Generator())
            self.numbers = (number / 1000 for number in itertools.count())

        def __getitem__(self, index):
            return digits()[index][0] + next(self.numbers), digits()[index][1]

    def run(callbacks):
        module = make()
        train(module, shuffled(Stream()), callbacks, max_epochs=2)
        return module

    monitor = LinearizationMonitor(steps=1, strict=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run([monitor])
    assert sum("compares weights only" in str(warning.message) for warning in caught) == 1
    assert_trains_alike(run, [again := LinearizationMonitor(steps=1, strict=True)])
    assert "loss" not in again.history[-1]
    assert distance(again) < 1e-12


@pytest.mark.parametrize("options", [{}, {"loss": nn.MSELoss(), "dynamics": "twin"}])
def test_what_a_forward_keeps_is_left_as_it_is(options: dict) -> None:
    def run(callbacks):
        module = make(task=Remembering)
        train(module, shuffled(digits()), callbacks, max_epochs=2)
        return module

    assert_trains_alike(run, [LinearizationMonitor(steps=1, mismatch="log", reference=None, **options)], follows=False)


def test_generators_of_a_module_are_followed() -> None:
    def run(callbacks):
        module = make(task=Drawing)
        train(module, shuffled(digits()), callbacks, max_epochs=2)
        return module

    assert_trains_alike(run, [monitor := LinearizationMonitor(steps=1, strict=True, reference=None)])
    assert distance(monitor) < 1e-12
    assert all(row["exact"] for row in monitor.history)


@pytest.mark.parametrize("dynamics", ["replay", "twin"])
def test_an_unpack_that_draws_random_numbers_changes_nothing(dynamics: str) -> None:
    def unpack(batch):
        torch.rand(2)
        return batch

    def run(callbacks):
        module = make()
        train(module, shuffled(digits()), callbacks, max_epochs=2)
        return module

    assert_trains_alike(run, [LinearizationMonitor(steps=1, strict=True, unpack=unpack, dynamics=dynamics)])


class FullDisk(Logger):
    name, version = "full", 0

    def log_metrics(self, metrics, step=None):
        if any(tag.startswith("ntk/") for tag in metrics):
            raise OSError("no space left on device")

    def log_hyperparams(self, *args): ...


class Clock(LinearizationMonitor):
    def should_measure(self, step: int) -> bool:
        if step > 2:
            raise RuntimeError("the clock is gone")
        return True


def after_step(step: int, act: Any) -> Callback:
    callback = Callback()
    callback.on_train_batch_end = lambda trainer, module, *_: (
        act(trainer, module) if trainer.global_step == step else None
    )
    return callback


def prune_weight(trainer, module) -> None:
    prune.l1_unstructured(module.body, "weight", amount=0.3)


def merge(trainer, module) -> None:
    weight = module.body.weight.detach()
    del module.body.weight
    module.body.register_buffer("weight", weight)


def save_what_cannot_be_saved(trainer, module) -> None:
    trainer.callbacks[0]._capture.state_dict = lambda: 1 / 0
    trainer.save_checkpoint(os.devnull)


ENDS = {
    "pruning": (
        {},
        lambda: ModelPruning("l1_unstructured", amount=0.3, parameters_to_prune=None),
        "merged, renamed or removed",
    ),
    "pruned weights": ({}, lambda: after_step(3, prune_weight), "merged, renamed or removed"),
    "merged weights": ({}, lambda: after_step(3, merge), "merged, renamed or removed"),
    "a full disk": ({"logger": FullDisk()}, Callback, "FullDisk cannot log step 0"),
    "a schedule": ({"kind": Clock}, Callback, "the clock is gone"),
    "a checkpoint": ({}, lambda: after_step(3, save_what_cannot_be_saved), "holds nothing to resume from"),
}


@pytest.mark.parametrize("name", ENDS)
def test_measurements_and_logs_end_a_run_only_if_they_are_to(name: str) -> None:
    options, make_callback, phrase = ENDS[name]
    kind, logger = options.get("kind", LinearizationMonitor), {k: v for k, v in options.items() if k == "logger"}
    for strict in (False, True):
        monitor = kind(steps=1, strict=strict)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                trainer = train(
                    make().double(), DataLoader(digits(), 11), [monitor, make_callback()], max_epochs=6, **logger
                )
            except (ValueError, OSError, RuntimeError, ZeroDivisionError):
                assert strict
            else:
                assert not strict
                assert trainer.global_step == 6
        if not strict:
            assert sum(phrase in str(warning.message) for warning in caught) == 1
            assert len(monitor.history) > 1


def test_objects_are_put_back_through_closures_and_after_errors() -> None:
    generator, counts = torch.Generator(), {"calls": 0, "seen": [1]}

    def draw() -> None:
        counts["calls"] += 1
        counts["seen"].append(torch.rand(1, generator=generator).item())

    def fail() -> None:
        with preserved_objects(draw):
            draw()
            raise ValueError("later")

    before = generator.get_state()
    with pytest.raises(ValueError, match="later"):
        fail()
    assert torch.equal(generator.get_state(), before)
    assert counts == {"calls": 0, "seen": [1]}
