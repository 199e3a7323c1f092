"""The run's own training step as the loss: what is linearized, what is measured, and what is found to be wrong."""

import copy
import warnings
from collections import UserDict
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_ntk import LinearizationMonitor

EXACT = 1e-12


def digits(samples: int = 40, dtype: torch.dtype = torch.float64) -> TensorDataset:
    data = load_digits()
    return TensorDataset(torch.tensor(data.data[:samples] / 16, dtype=dtype), torch.tensor(data.target[:samples]))


class Classifier(LightningModule):
    """A classifier as in every tutorial: cross-entropy of its own forward."""

    def __init__(self, net: nn.Module | None = None, lr: float = 0.1, optimizer: Any = torch.optim.SGD, **options: Any):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)) if net is None else net
        self.lr, self.optimizer, self.options = lr, optimizer, options

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch, batch_idx):
        loss = Classifier.training_step(self, batch, batch_idx)
        self.log("val_loss", loss)
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.lr, **self.options)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
        nn.Linear(144, 10),
    )  # fmt: skip


def fit(
    module: LightningModule,
    monitor: Callback | list[Callback],
    data: Any = None,
    *,
    batch_size: int = 16,
    **options: Any,
) -> Trainer:
    seed_everything(1, verbose=False)
    defaults = {
        "max_steps": 4, "max_epochs": -1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "precision": "64-true",
    }  # fmt: skip
    trainer = Trainer(**(defaults | options), callbacks=monitor)
    loader = data if isinstance(data, DataLoader) else DataLoader(data or digits(), batch_size, shuffle=True)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The number of training batches|The '.*_dataloader' does not have|.*val_dataloader"
        )
        trainer.fit(module, loader)
    return trainer


def make(kind: type[LightningModule] = Classifier, *args: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(*args, **options)


def distances(monitor: LinearizationMonitor) -> list[float]:
    return [row["relative_weight_distance"] for row in monitor.history]


def said(record: Any, phrase: str) -> int:
    return sum(phrase in str(warning.message) for warning in record)


def test_what_is_linearized_is_said_and_readable(caplog: pytest.LogCaptureFixture) -> None:
    monitor = LinearizationMonitor(strict=True)
    assert monitor.linearized_outputs == []
    with caplog.at_level("INFO"):
        fit(make(net=convolutional(), optimizer=torch.optim.Adam, lr=1e-3), monitor)
    assert monitor.linearized_outputs == [("net.6", (16, 10))]
    assert "Linearizing the outputs of `net.6`, (16, 10)." in caplog.text
    assert monitor.dynamics_used == "twin"
    assert distances(monitor)[1] < EXACT


@pytest.mark.parametrize("samples", [40, 37])
def test_losses_and_accuracies_are_those_of_validation(samples: int) -> None:
    """With dropout and batch statistics in training, in eval mode with the run's own buffers."""
    data = digits(samples)
    monitor = LinearizationMonitor(steps=3, evaluation=digits(50), strict=True)
    module = make(net=convolutional(), lr=0.05)
    trainer = fit(module, monitor, data, max_steps=12)
    for given, prefix in ((data, ""), (digits(50), "evaluation/")):
        (expected,) = trainer.validate(module, DataLoader(given, 16), verbose=False)
        row = monitor.history[-1]
        assert row[f"{prefix}loss"] == pytest.approx(expected["val_loss"], rel=1e-6)
        assert row[f"{prefix}accuracy"] == pytest.approx(expected["val_accuracy"], rel=1e-6)
    assert 0 < monitor.history[-1]["linearized_accuracy"] <= 1
    assert monitor.history[-1]["taylor_gap"] > 0


def test_a_linear_network_with_batch_statistics_in_front_has_no_taylor_gap() -> None:
    """What is not linear in the weights here is not trained: the expansion uses the run's buffers on both sides."""
    net = nn.Sequential(nn.BatchNorm1d(64, affine=False), nn.Linear(64, 10))
    monitor = LinearizationMonitor(steps=1, strict=True)
    fit(make(net=net), monitor, max_steps=8)
    for row in monitor.history[1:]:
        assert row["relative_weight_distance"] < EXACT
        assert row["taylor_gap"] < EXACT
        assert row["prediction_rmse"] < EXACT
        assert row["loss"] == pytest.approx(row["linearized_loss"], rel=1e-9)


class Language(LightningModule):
    """A language model whose loss leaves out padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(17, 6), nn.Linear(6, 17)

    def training_step(self, batch, batch_idx):
        scores = self.head(torch.tanh(self.embedding(batch["ids"])))
        return nn.functional.cross_entropy(
            scores[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-7
        )

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Sentences(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = (torch.arange(9) * (index + 2)) % 17
        return {"ids": ids, "labels": ids.masked_fill(torch.arange(9) > 5, -7)}


def test_language_models_are_counted_by_token() -> None:
    monitor = LinearizationMonitor(strict=True)
    module = make(Language)
    fit(module, monitor, Sentences(), batch_size=5, max_steps=6)
    assert distances(monitor)[1] < 1e-9  # Adam makes full steps of gradients that are zero but for rounding
    assert monitor.linearized_outputs == [("head", (2, 9, 17))]
    batch = {name: torch.stack([Sentences()[i][name] for i in range(12)]) for name in ("ids", "labels")}
    with torch.no_grad():
        scores = module.head(torch.tanh(module.embedding(batch["ids"])))[:, :-1]
    labels = batch["labels"][:, 1:]
    counts = labels != -7
    expected = ((scores.argmax(-1) == labels) & counts).sum() / counts.sum()
    assert monitor.history[-1]["accuracy"] == pytest.approx(expected.item(), rel=1e-6)
    assert monitor.history[-1]["loss"] == pytest.approx(
        nn.functional.cross_entropy(scores[counts], labels[counts]).item(), rel=1e-9
    )


def test_functions_are_compared_on_some_samples_by_default() -> None:
    data = digits(60)
    some = LinearizationMonitor(name="some", reference_samples=20, steps=2, strict=True)
    whole = LinearizationMonitor(name="whole", reference_samples=None, steps=2, strict=True)
    fit(make(optimizer=torch.optim.Adam), [some, whole], data)
    assert (len(some.comparison.reference), len(whole.comparison.reference)) == (20, 60)
    assert distances(some) == distances(whole)
    module = make(optimizer=torch.optim.Adam)
    spaced = TensorDataset(*(tensor[::3] for tensor in data.tensors))
    own = LinearizationMonitor(spaced, steps=2, strict=True)
    fit(module, own, data)
    for one, other in zip(own.history, some.history, strict=True):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("steps", "samples"), [(100, 256), (600, 369), (3000, 1024)])
def test_short_runs_are_compared_on_fewer_samples(steps: int, samples: int) -> None:
    class Ended(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = True

    monitor = LinearizationMonitor(steps=steps // 12, strict=True, dynamics="twin")
    fit(make(), [monitor, Ended()], digits(1797, torch.float32), max_steps=steps, precision="32-true")
    assert len(monitor.comparison.reference) == samples


@pytest.mark.parametrize(
    ("loss", "dynamics", "reason"),
    [
        (
            lambda self, b: nn.functional.cross_entropy(self(b[0]), b[1], label_smoothing=0.1),
            "replay",
            "not a squared one",
        ),
        (
            lambda self, b: nn.functional.mse_loss(self(b[0])[:, 0], b[1].double()),
            "twin",
            "transformation of the outputs",
        ),
        (lambda self, b: 2 * nn.functional.cross_entropy(self(b[0]), b[1]), "twin", "more than one loss function"),
        (lambda self, b: nn.functional.cross_entropy(2 * self(b[0]), b[1]), "twin", "does not use the outputs"),
        (lambda self, b: nn.functional.cross_entropy(self(b[0] + 0.1), b[1]), "twin", "does not use the outputs"),
        (
            lambda self, b: nn.functional.cross_entropy(self(b[0]), (b[1] + 1) % 10),
            "twin",
            "transformation of the targets",
        ),
    ],
)
def test_the_dynamics_are_chosen_from_what_the_step_computes(loss, dynamics: str, reason: str) -> None:
    class Own(Classifier):
        def training_step(self, batch, batch_idx):
            return loss(self, batch)

    monitor, twin = (LinearizationMonitor(steps=1, strict=True, dynamics=name, name=name) for name in ("auto", "twin"))
    fit(make(Own), [monitor, twin], max_steps=9)
    assert monitor.dynamics_used == dynamics
    assert reason in monitor.reason
    assert distances(monitor) == pytest.approx(distances(twin), rel=1e-8, abs=1e-12)
    assert distances(monitor)[1] < EXACT


@pytest.mark.parametrize("squeeze", [True, False])
@pytest.mark.parametrize("batch_size", [16, 40])
def test_a_single_output_and_a_squared_loss_need_no_argument(squeeze: bool, batch_size: int) -> None:
    class Regression(Classifier):
        def training_step(self, batch, batch_idx):
            outputs = self(batch[0])
            return nn.functional.mse_loss(outputs.squeeze(1) if squeeze else outputs, batch[1])

    images, labels = digits().tensors
    targets = labels / 9 if squeeze else labels[:, None] / 9
    monitor, twin = (LinearizationMonitor(steps=1, strict=True, dynamics=name, name=name) for name in ("auto", "twin"))
    net = nn.Sequential(nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 1))
    fit(make(Regression, net=net), [monitor, twin], TensorDataset(images, targets), batch_size=batch_size, max_steps=9)
    assert monitor.dynamics_used == ("gradient_descent" if batch_size == 40 else "replay")
    assert distances(monitor) == pytest.approx(distances(twin), rel=1e-8, abs=1e-12)


def test_weights_of_classes_and_binary_targets_are_part_of_the_loss() -> None:
    class Weighted(Classifier):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.register_buffer("positive", torch.tensor([3.0]))

        def training_step(self, batch, batch_idx):
            return nn.functional.binary_cross_entropy_with_logits(
                self(batch[0]), batch[1].double(), pos_weight=self.positive
            )

    images, labels = digits().tensors
    data = TensorDataset(images, (labels[:, None] > 4).long())
    monitor, twin = (LinearizationMonitor(steps=1, strict=True, dynamics=name, name=name) for name in ("auto", "twin"))
    fit(
        make(Weighted, net=nn.Sequential(nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 1))),
        [monitor, twin],
        data,
        max_steps=9,
    )
    assert monitor.dynamics_used == "replay"
    assert distances(monitor) == pytest.approx(distances(twin), rel=1e-8, abs=1e-12)
    assert monitor.history[-1]["accuracy"] == twin.history[-1]["accuracy"]


def test_the_network_can_be_named() -> None:
    class Normalized(Classifier):
        def training_step(self, batch, batch_idx):
            return 10 * nn.functional.mse_loss(
                nn.functional.normalize(self.net(batch[0])), nn.functional.one_hot(batch[1], 10).double()
            )

    found = LinearizationMonitor(name="found", strict=True)
    inner = LinearizationMonitor(name="inner", network="net.0", strict=True)
    fit(make(Normalized, net=nn.Sequential(nn.Linear(64, 10), nn.Tanh())), [found, inner], max_steps=20)
    assert found.linearized_outputs == inner.linearized_outputs == [("net.0", (16, 10))]
    whole = LinearizationMonitor(network=["net"], strict=True)
    fit(make(Normalized, net=nn.Sequential(nn.Linear(64, 10), nn.Tanh())), whole, max_steps=20)
    assert whole.linearized_outputs == [("net.1", (16, 10))]
    assert distances(whole)[1] < EXACT
    assert distances(whole)[-1] > 1e-4 > distances(found)[-1] * 1e6
    with pytest.raises(MisconfigurationException, match=r"to name submodules but got \['head'\]. The module has net"):
        fit(make(), LinearizationMonitor(network="head"))
    with pytest.raises(ValueError, match="either argument `network`"):
        LinearizationMonitor(network="net", loss=nn.MSELoss())


def test_batches_that_the_step_changes_are_seen_as_they_came() -> None:
    class Popping(Classifier):
        def training_step(self, batch, batch_idx):
            labels = batch.pop("labels")
            batch["images"].sub_(0.5)
            return nn.functional.cross_entropy(self(batch["images"]), labels)

    class Images(Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            images, labels = digits()[index]
            return {"images": images.clone(), "labels": labels}

    monitor = LinearizationMonitor(steps=1, strict=True)
    fit(make(Popping), monitor, Images())
    assert distances(monitor)[1] < EXACT
    assert monitor.history[-1]["gradient_mismatch"] < EXACT


class Encoding(UserDict):
    """A mapping that is no dict and no node of a tree of tensors, as tokenizers return."""


def test_samples_in_mappings_that_are_no_dicts_are_told_apart() -> None:
    def collate(samples):
        images, labels = zip(*samples, strict=True)
        return Encoding(images=torch.stack(images), labels=torch.stack(labels))

    def run(collate):
        options = {
            "unpack": lambda batch: (batch, batch["labels"]), "predict": lambda module, batch: module(batch["images"]),
            "loss": nn.CrossEntropyLoss(), "steps": 1, "strict": True,
        }  # fmt: skip
        replay, twin = (LinearizationMonitor(dynamics=d, name=d, **options) for d in ("auto", "twin"))

        class Own(Classifier):
            def training_step(self, batch, batch_idx):
                return nn.functional.cross_entropy(self(batch["images"]), batch["labels"])

        fit(make(Own), [replay, twin], DataLoader(digits(), 16, shuffle=True, collate_fn=collate), max_steps=9)
        assert replay.dynamics_used == "replay"
        assert distances(replay) == pytest.approx(distances(twin), rel=1e-8, abs=1e-12)
        return distances(replay)

    assert run(collate) == pytest.approx(run(lambda samples: dict(collate(samples))), rel=1e-8, abs=1e-12)


# What is wrong although the first gradient is right, or nearly.


def test_a_regularizer_that_is_warmed_up_is_followed_and_missed_by_a_given_loss() -> None:
    class Warmed(Classifier):
        def training_step(self, batch, batch_idx):
            penalty = sum(p.square().sum() for p in self.parameters())
            return super().training_step(batch, batch_idx) + 0.05 * min(self.global_step, 3) * penalty

    followed = LinearizationMonitor(steps=1, name="followed", strict=True)
    given = LinearizationMonitor(steps=1, name="given", loss=nn.CrossEntropyLoss(), dynamics="twin", strict=True)
    with pytest.warns(UserWarning, match="does not follow the loss of this run in step 2") as record:
        fit(make(Warmed), [followed, given], max_steps=6)
    assert said(record, "does not follow") == 1
    assert max(row["gradient_mismatch"] for row in followed.history[1:]) < EXACT
    assert [row["gradient_mismatch"] > 0.05 for row in given.history[1:]] == [False] + 5 * [True]


def test_gradients_clipped_in_a_hook_are_found() -> None:
    class Clipping(Classifier):
        def on_before_optimizer_step(self, optimizer):
            torch.nn.utils.clip_grad_norm_(self.parameters(), 0.01)

    for optimizer in (torch.optim.SGD, torch.optim.Adam):
        with pytest.warns(
            UserWarning, match=r"changed its gradients after its backward pass, from a norm of .* to 0.01"
        ):
            fit(make(Clipping, optimizer=optimizer), LinearizationMonitor())


@pytest.mark.parametrize(
    "clip", [{}, {"gradient_clip_val": 0.1}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}]
)
def test_clipping_of_the_trainer_is_no_surprise(clip: dict) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*gradients.*|.*first step.*|.*weights.*")
        monitor = LinearizationMonitor(strict=True, dynamics="twin")
        fit(make(), monitor, **clip)
    assert distances(monitor)[1] < EXACT


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_batch_start", "optimizer_step"])
def test_weights_that_are_clamped_are_found(hook: str) -> None:
    class Clamped(Classifier):
        def clamp(self):
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.clamp_(-0.05, 0.05)

    def before(self, *args, **kwargs):
        if self.global_step:
            self.clamp()

    def step(self, epoch, batch_idx, optimizer, closure):
        Classifier.optimizer_step(self, epoch, batch_idx, optimizer, closure)
        self.clamp()

    setattr(Clamped, hook, step if hook == "optimizer_step" else before)
    phrase = {
        "on_train_batch_end": "weights of the run changed after step 1", "on_train_batch_start": "changed before step 2",
        "optimizer_step": "weights of the run changed after step 1",
    }[hook]  # fmt: skip
    with pytest.warns(UserWarning, match=phrase):
        fit(make(Clamped), LinearizationMonitor(steps=1, dynamics="twin"), max_steps=6)


def test_forgotten_label_smoothing_is_refused_in_bfloat16() -> None:
    class Smoothed(Classifier):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1)

    data, options = digits(dtype=torch.float32), {"precision": "bf16-mixed"}
    with pytest.raises(MisconfigurationException, match="does not follow the loss of this run in the first step"):
        fit(make(Smoothed), LinearizationMonitor(loss=nn.CrossEntropyLoss()), data, **options)
    right = LinearizationMonitor(loss=nn.CrossEntropyLoss(label_smoothing=0.1), strict=True)
    fit(make(Smoothed), right, data, **options)
    assert right.history[-1]["gradient_mismatch"] < 0.09


def test_a_given_loss_that_is_not_that_of_the_run_is_told_what_is() -> None:
    for loss in (nn.MSELoss(), nn.MultiMarginLoss()):
        with pytest.raises(
            MisconfigurationException, match=r"step computes torch.nn.functional.cross_entropy. Leave out"
        ):
            fit(make(), LinearizationMonitor(loss=loss))


def test_a_state_that_changes_the_loss_is_found_later() -> None:
    class Queue(Classifier):
        """Negatives of earlier batches, as in momentum contrast."""

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.queue = torch.zeros(0, 10, dtype=torch.float64)

        def training_step(self, batch, batch_idx):
            outputs = self(batch[0])
            loss = nn.functional.cross_entropy(outputs, batch[1]) + (outputs @ self.queue.T).square().sum() / 100
            self.queue = outputs.detach()[:4]
            return loss

    with pytest.raises(MisconfigurationException, match="keeps state that changes its loss"):
        fit(make(Queue), LinearizationMonitor(), max_steps=6)

    class Teacher(Classifier):
        """A moving average of the network itself."""

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)

        def training_step(self, batch, batch_idx):
            return nn.functional.mse_loss(self(batch[0]), self.teacher(batch[0]) + 1)

        def on_train_batch_end(self, *args):
            for own, other in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                own.lerp_(other.detach(), 0.3)

    with pytest.warns(UserWarning, match="does not follow the loss of this run in step 3"):
        fit(make(Teacher), LinearizationMonitor(steps=[3], reference=None), max_steps=6)


# What cannot be followed.


def refused(kind: type[LightningModule], phrase: str, **options: Any) -> None:
    module = make(kind)
    with pytest.raises(MisconfigurationException, match=phrase):
        fit(module, LinearizationMonitor(), **options)
    assert module.trainer.global_step == 0


def test_steps_that_cannot_be_followed_are_refused_before_training() -> None:
    class Penalized(Classifier):
        def training_step(self, batch, batch_idx):
            images = batch[0].requires_grad_()
            outputs = self(images)
            (gradient,) = torch.autograd.grad(outputs.sum(), images, create_graph=True)
            return nn.functional.cross_entropy(outputs, batch[1]) + gradient.square().sum()

    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            raise KeyError("images")

    class Constant(Classifier):
        def training_step(self, batch, batch_idx):
            return sum(p.square().sum() for p in self.parameters())

    class Vector(Classifier):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none")

    class Score(Classifier):
        def training_step(self, batch, batch_idx):
            return torch.dot(batch[0].mean(0), self.net[0].weight[0])

    class Uncopyable(Classifier):
        def __init__(self):
            super().__init__()
            self.stream = (number for number in range(3))

    refused(Penalized, "it differentiates its network, as a gradient penalty does")
    refused(Failing, "The pass of the linearized network through the training step failed. KeyError: 'images'")
    refused(Constant, "parameters meet the batch but none does")
    refused(Vector, r"to return a loss, one number, but got shape \(16,\)")
    refused(Score, "a parameter meets data last in the loss itself")
    refused(Uncopyable, "can be copied but it cannot: TypeError")


def test_a_kernel_needs_a_loss_of_outputs_and_targets() -> None:
    class Twice(Classifier):
        def training_step(self, batch, batch_idx):
            return 2 * super().training_step(batch, batch_idx)

    for dynamics in ("replay", "gradient_descent"):
        with pytest.raises(MisconfigurationException, match=r"the loss is more than one loss function.*Give `loss`"):
            fit(make(Twice), LinearizationMonitor(dynamics=dynamics))
    with pytest.raises(MisconfigurationException, match='Use dynamics="twin", which follows the network in train'):
        fit(make(net=convolutional()), LinearizationMonitor(dynamics="replay"))
    with pytest.raises(MisconfigurationException, match="`kernel_probe` but the loss is more than one"):
        fit(make(Twice), LinearizationMonitor(kernel_probe=4))
