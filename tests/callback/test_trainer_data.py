"""The data that a Trainer can train on, with monitors of all dynamics beside it: the reference is what training sees."""

import warnings
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_ntk import LinearizationMonitor
from tests.callback.trainer_runs import (
    DYNAMICS,
    EXACT,
    MINIBATCH,
    Task,
    assert_trains_alike,
    check,
    digits,
    distance,
    loader,
    make,
    train,
    watch,
)  # fmt: skip


@pytest.mark.tested("overfit_batches", "gradient_descent", "replay", "twin")
def test_overfit_batches_are_the_reference() -> None:
    """Training sees the same first samples in every epoch, and as one batch they are gradient descent."""

    def run(callbacks, batches):
        module = make()
        train(module, loader(4, shuffle=True), callbacks, overfit_batches=batches, max_epochs=6)
        return module

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You requested to overfit but enabled train dataloader shuffling")
        monitors = watch()
        assert_trains_alike(lambda callbacks: run(callbacks, 2), monitors)
        check(monitors, MINIBATCH, steps=12)
        assert all(len(monitor.comparison.reference) == 8 for monitor in monitors)
        whole = LinearizationMonitor(steps=1, strict=True)
        run([whole], 1)
        assert whole.dynamics_used == "gradient_descent"
        assert len(whole.comparison.reference) == 4
        assert distance(whole) < EXACT
        said = watch(("gradient_descent",), reference=digits(11))
        with pytest.warns(UserWarning, match="it trains on 4 samples while the reference has 11"):
            run(said, 1)


@pytest.mark.parametrize(("options", "samples"), [
    ({"limit_train_batches": 2}, 8), ({"limit_train_batches": 1}, 4), ({"limit_train_batches": 0.7}, 8), ({}, 11),
])  # fmt: skip
def test_the_reference_is_what_training_sees(options: dict, samples: int) -> None:
    ordered, shuffled = watch(("replay",)), watch(("replay",))
    train(make(), loader(4), ordered, **options)
    train(make(), loader(4, shuffle=True), shuffled, **options)
    assert len(ordered[0].comparison.reference) == samples
    assert len(shuffled[0].comparison.reference) == 11
    check(ordered + shuffled)
    outputs = ordered[0].comparison.reference.problem.predictions
    assert outputs.shape == (samples, 3)


def test_drop_last_in_order_leaves_the_last_samples_out_of_the_reference() -> None:
    ordered, shuffled = watch(("twin",)), watch(("twin",))
    train(make(), loader(4, drop_last=True), ordered)
    train(make(), loader(4, drop_last=True, shuffle=True), shuffled)
    assert len(ordered[0].comparison.reference) == 8
    assert len(shuffled[0].comparison.reference) == 11


@pytest.mark.tested("fast_dev_run", "gradient_descent", "replay", "twin")
@pytest.mark.parametrize("batches", [True, 3])
def test_fast_dev_run(batches, tmp_path: Path) -> None:
    monitors = watch()
    trainer = train(make(), loader(4), monitors, fast_dev_run=batches, logger=CSVLogger(tmp_path), val=loader())
    assert trainer.global_step == int(batches)
    check(monitors, DYNAMICS if batches is True else MINIBATCH, steps=int(batches))
    assert not list(tmp_path.rglob("*.csv"))


class Standardized(LightningDataModule):
    """A data module whose hooks change every batch."""

    def __init__(self, shuffle: bool = True) -> None:
        super().__init__()
        self.shuffle = shuffle

    def train_dataloader(self):
        inputs, targets = digits().tensors
        return DataLoader(TensorDataset((inputs * 255).to(torch.uint8), targets), batch_size=4, shuffle=self.shuffle)

    def val_dataloader(self):
        return self.train_dataloader()

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0].double() / 255, batch[1]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (batch[0] - 0.5) * 2, batch[1]


@pytest.mark.tested("datamodule", "replay", "twin")
@pytest.mark.tested("batch transfer hooks", "replay", "twin")
@pytest.mark.tested("evaluation set", "replay", "twin")
def test_the_hooks_of_a_datamodule_are_part_of_the_reference() -> None:
    def run(callbacks):
        module = make()
        train(module, Standardized(), callbacks)
        return module

    evaluation = TensorDataset((digits().tensors[0] * 255).to(torch.uint8), digits().tensors[1])
    monitors = watch(evaluation=evaluation)
    assert_trains_alike(run, monitors)
    check(monitors, MINIBATCH)
    for monitor in monitors:
        assert monitor.history[-1]["loss"] == pytest.approx(monitor.history[-1]["evaluation/loss"], rel=1e-12)


def test_the_hooks_of_the_module_are_part_of_the_reference() -> None:
    class Hooks(Task):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch["x"] * 2, batch["y"]

    class Dicts(Dataset):
        def __len__(self):
            return 11

        def __getitem__(self, index):
            inputs, targets = digits()[index]
            return {"x": inputs, "y": targets}

    monitors = watch(MINIBATCH)
    train(make(task=Hooks), DataLoader(Dicts(), batch_size=4, shuffle=True), monitors)
    check(monitors)


class Stream(IterableDataset):
    def __iter__(self):
        yield from (digits()[i] for i in (5, 2, 9, 0, 7, 1, 10))


@pytest.mark.tested("augmented or streamed data", "twin")
def test_iterable_data_is_followed_by_the_twin_and_refused_by_the_kernel() -> None:
    def run(callbacks):
        module = make(momentum=0.9)
        train(module, DataLoader(Stream(), batch_size=3), callbacks)
        return module

    monitors = [*watch(("twin",)), LinearizationMonitor(dynamics="auto", name="auto", steps=1, strict=True)]
    assert_trains_alike(run, monitors)
    check(monitors, exact=("twin", "auto"), steps=12)
    assert monitors[1].dynamics_used == "twin"
    for dynamics in ("gradient_descent", "replay"):
        with pytest.raises(MisconfigurationException, match=r"Stream can only be iterated. Give a map-style data set"):
            run([LinearizationMonitor(dynamics=dynamics)])


class Several(Task):
    """Trains on the first of two loaders, whose batches come together."""

    def training_step(self, batch, batch_idx):
        return super().training_step(first_of(batch), batch_idx)


def first_of(batch):
    batch = batch["a"] if isinstance(batch, dict) else batch[0] if isinstance(batch[0], list | tuple) else batch
    return tuple(batch)


@pytest.mark.tested("several training loaders", "replay", "twin")
@pytest.mark.parametrize("combine", [
    lambda a, b: {"a": a, "b": b}, lambda a, b: [a, b], lambda a, b: CombinedLoader({"a": a, "b": b}, "max_size_cycle"),
], ids=["dict", "list", "CombinedLoader"])  # fmt: skip
def test_several_train_loaders(combine) -> None:
    def run(callbacks):
        module = make(task=Several, momentum=0.9)
        train(module, combine(loader(4, shuffle=True), loader(3, shuffle=True)), callbacks)
        return module

    twin = LinearizationMonitor(dynamics="auto", name="auto", unpack=first_of, steps=1, strict=True)
    replay = LinearizationMonitor(digits(), name="replay", dynamics="replay", unpack=first_of, steps=1, strict=True)
    assert_trains_alike(run, [twin, replay])
    assert twin.dynamics_used == "twin"
    check([twin, replay], exact=("auto", "replay"))
    with pytest.raises(MisconfigurationException, match=r"Expected one training DataLoader .* but got 2 of them"):
        run([LinearizationMonitor(dynamics="replay", unpack=first_of)])
