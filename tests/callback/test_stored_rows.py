"""A twin along stored rows of the Jacobian: the numbers of one that takes passes, for runs that have such rows."""

import warnings
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_ntk import LinearizationMonitor
from tests.callback import trainer_runs
from tests.callback.test_dynamics import Classifier, assert_same, classes, classifier
from tests.callback.test_monitor import digits, fit
from tests.problems import LinearModel, flatten, mlp, relative_error

ADAMW: dict[str, Any] = {"lr": 0.02, "optimizer": torch.optim.AdamW, "weight_decay": 0.1}
RUN: dict[str, Any] = {
    "batch_size": 7, "shuffle": True, "max_steps": 13, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5,
    "precision": "64-true",
}  # fmt: skip


def watch(jacobian: str, module: Classifier, data: Dataset | None = None, run: dict[str, Any] = RUN, **options: Any):
    """A monitor of a run with its twin, and the warnings that it gave."""
    monitor = LinearizationMonitor(dynamics="twin", jacobian=jacobian, **({"steps": 3, "strict": True} | options))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(monitor, module, classes() if data is None else data, **run)
    return monitor, [str(w.message) for w in caught if "LinearizationMonitor" in str(w.message)]


class Batches(Callback):
    """Keeps the inputs of every batch."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.inputs.append(batch[0].clone())


@pytest.mark.tested("stored Jacobian", "twin")
def test_equals_passes_and_the_optimizer_on_the_explicit_linear_model() -> None:
    data, module, seen = classes(), classifier(**ADAMW), Batches()
    model = LinearModel(module.body, data.tensors[0])
    stored, said = watch("stored", module, run=RUN | {"callbacks": [seen]})
    streamed, _ = watch("streamed", classifier(**ADAMW))
    assert "stored rows" in stored.reason
    assert not said
    assert_same(stored.history, streamed.history, 1e-9)
    rows = [(data.tensors[0] == row).all(1).nonzero()[0] for batch in seen.inputs for row in batch]
    batches, sizes = torch.cat(rows), [len(batch) for batch in seen.inputs]
    assert sizes[4] == 3  # the last one of an epoch
    micro = list(batches.split(sizes))
    steps = [
        part for epoch in range(0, len(micro), 5) for part in (micro[epoch : epoch + 5][i : i + 2] for i in (0, 2, 4))
    ]
    weights = model.start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([weights], lr=0.02, weight_decay=0.1)
    for step in steps[:13]:
        optimizer.zero_grad()
        for batch in step:  # Lightning divides by two where an epoch has one batch left, too
            (nn.functional.cross_entropy(model.predict(weights)[batch], data.tensors[1][batch]) / 2).backward()
        nn.utils.clip_grad_norm_([weights], 0.5)
        optimizer.step()
    displacement = flatten(dict(stored.comparison.online.displacement()))
    assert relative_error(displacement, (weights - model.start).detach()) < 1e-9


@pytest.mark.tested("stored Jacobian", "twin")
@pytest.mark.parametrize("options", [{"capture_at": 4}, {"loss": nn.CrossEntropyLoss()}], ids=["late", "given loss"])
def test_of_a_late_capture_and_of_a_given_loss(options: dict[str, Any]) -> None:
    (first, _), (second, _) = (watch(kind, classifier(**ADAMW), **options) for kind in ("stored", "streamed"))
    assert first.history[-1]["relative_weight_distance"] > 1e-4
    assert_same(first.history, second.history, 1e-9)


@pytest.mark.tested("weights bit by bit those of a plain run", "twin")
def test_the_run_is_the_same_bit_by_bit() -> None:
    def run(callbacks: list[Callback]) -> Classifier:
        module = classifier(**ADAMW)
        trainer_runs.train(module, DataLoader(classes(), batch_size=7, shuffle=True), callbacks)
        return module

    trainer_runs.assert_trains_alike(run, trainer_runs.watch(["twin"], jacobian="stored"))


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Samples that are drawn anew whenever they are read."""

    def __len__(self) -> int:
        return 31

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        image, label = classes()[row]
        return image + 0.1 * torch.randn(6).double(), label


class TwoLosses(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 1e-3 * self(batch[0]).square().mean()


def noisy(*layers: nn.Module) -> Any:
    return lambda outputs: nn.Sequential(nn.Linear(6, 8), *layers, nn.Tanh(), nn.Linear(8, outputs))


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "dropout": (lambda: classifier(noisy(nn.Dropout(0.2)), **ADAMW), {}, "as with dropout"),
    "batch statistics": (lambda: classifier(noisy(nn.BatchNorm1d(8)), **ADAMW), {}, "batch statistics"),
    "augmentation": (lambda: classifier(**ADAMW), {"data": Noisy()}, "two reads of the same samples differ"),
    "two losses": (lambda: TwoLosses(mlp(3), **ADAMW).double(), {}, "does not return one loss function"),
    "no reference": (lambda: classifier(**ADAMW), {"reference": None}, "there is no reference set"),
    "named outputs": (lambda: classifier(**ADAMW), {"network": "body"}, "the user has named the network"),
    "other samples": (lambda: classifier(**ADAMW), {"reference": classes(9)}, "samples are not in it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_says_why_a_run_has_no_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, options, phrase = REFUSED[name]
    with pytest.raises(MisconfigurationException, match=f'jacobian="stored" but .*{phrase}.*Use jacobian="streamed"'):
        watch("stored", make(), **options)
    monkeypatch.setattr("lightning_ntk.callback.stored_rows.require_worth", lambda *_: None)  # too small to be worth it
    monitor, _ = watch("auto", make(), **options)
    assert "takes passes through the network" in monitor.reason
    assert phrase in monitor.reason
    assert monitor.comparison.loss is monitor._capture.step


@pytest.mark.parametrize(
    ("run", "phrase"),
    [({}, "cost more than they save in 26 batches"), ({"max_steps": -1, "max_time": {"seconds": 1}}, "no known number of steps")],
    ids=["cost", "length"],
)  # fmt: skip
def test_passes_where_rows_are_not_worth_it(run: dict[str, Any], phrase: str) -> None:
    monitor, _ = watch("auto", classifier(**ADAMW), run=RUN | run, reference_samples=8)
    assert phrase in monitor.reason


def test_an_unknown_sample_later_takes_a_pass_and_is_said_once() -> None:
    data = classes()
    known = TensorDataset(*(tensor[:14] for tensor in data.tensors))
    run = RUN | {"shuffle": False}
    stored, said = watch("stored", classifier(**ADAMW), data, run, reference=known)
    streamed, _ = watch("streamed", classifier(**ADAMW), data, run, reference=known)
    assert ["slower, and as exact" in message for message in said] == [True]
    assert_same(stored.history, streamed.history, 1e-9)


def test_a_loss_that_changes_is_seen_by_its_gradient() -> None:
    class Smoothed(Classifier):
        def training_step(self, batch, batch_idx):
            smoothing = 0.1 if self.global_step >= 6 else 0.0
            return nn.functional.cross_entropy(self(batch[0]), batch[1], label_smoothing=smoothing)

    torch.manual_seed(0)
    monitor, said = watch("stored", Smoothed(mlp(3), **ADAMW).double(), steps=1)
    assert [row["gradient_mismatch"] > 1e-3 for row in monitor.history[1:]] == [False] * 6 + [True] * 7
    assert ["does not follow the loss" in message for message in said] == [True]


def test_regression_with_a_hand_written_loss() -> None:
    data = TensorDataset(*(tensor.double() for tensor in digits().tensors))

    def run(jacobian: str) -> list[dict[str, float]]:
        class ByHand(Classifier):
            def training_step(self, batch, batch_idx):
                return (self(batch[0]) - batch[1]).square().mean()

        torch.manual_seed(0)
        return watch(jacobian, ByHand(mlp(3), **ADAMW).double(), data, RUN | {"batch_size": 4})[0].history

    assert_same(run("stored"), run("streamed"), 1e-9)


def test_an_unknown_sample_in_the_first_step_is_refused_where_rows_are_wanted() -> None:
    known = TensorDataset(*(tensor[:9] for tensor in classes().tensors))
    options: dict[str, Any] = {"loss": nn.CrossEntropyLoss(), "reference": known, "run": RUN | {"shuffle": False}}
    with pytest.raises(MisconfigurationException, match=r"no stored rows for this run\. .*5 of its 7 samples"):
        watch("stored", classifier(**ADAMW), **options)
