"""What it costs to follow a run, next to the training step that is followed."""

import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from models import MODELS, digits
from timing import Comparison, interleaved
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ntk import Linearization, LinearizationMonitor, empirical_ntk
from lightning_ntk.data.reference import Reference
from lightning_ntk.data.sample_index import SampleIndex
from lightning_ntk.dynamics.sgd import SGDSettings
from lightning_ntk.linearization.batch_loss import PairLoss
from lightning_ntk.linearization.objective import Objective
from lightning_ntk.linearization.parameters import trainable_parameters
from lightning_ntk.training.base import StepSettings
from lightning_ntk.training.function_space import FunctionSpaceSGD
from lightning_ntk.training.twin import Twin

BATCH, OUTPUTS = 64, 10


def twin(batch_sizes: tuple[int, ...] = (64, 256), repeats: int = 40) -> Iterator[Comparison]:
    """A training step together with that of its twin, AdamW on cross-entropy."""
    for name in MODELS:
        for batch_size in batch_sizes:
            times = _twin(name, batch_size, repeats)
            plain, followed = times.pop("plain"), times.pop("followed")
            parts = {f"{part} over the floor": value / plain for part, value in times.items()}
            case = f"step with its twin, {name}, batch {batch_size}"
            yield Comparison(
                case,
                followed,
                "floor: the plain training step",
                plain,
                {"time over the floor": followed / plain} | parts,
            )


def _twin(name: str, batch_size: int, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    module = MODELS[name]()
    inputs, one_hot = digits(name, batch_size)
    labels = one_hot.argmax(1)
    loss = nn.CrossEntropyLoss()
    live = trainable_parameters(module)
    # So small a rate that the repeats see the same weights.
    optimizer = torch.optim.AdamW(live.values(), lr=1e-6)
    linearization = Linearization(module)
    objective = Objective(loss, linearization.predict(inputs), labels)
    follower = Twin(PairLoss(linearization, loss), optimizer, live)
    cotangent = objective.gradient(linearization.predict(inputs), labels)
    tangent = {key: 1e-3 * torch.randn_like(value) for key, value in live.items()}

    def plain() -> None:
        optimizer.zero_grad()
        loss(module(inputs), labels).backward()
        optimizer.step()

    def followed() -> None:
        plain()
        follower.accumulate((inputs, labels))
        follower.step(StepSettings(optimizer.param_groups))

    def products(direction: dict[str, Tensor] | None) -> None:
        linearization.predict_jvp_and_vjp(direction, inputs, lambda outputs, derivative: cotangent)

    return interleaved(
        {
            "plain": plain,
            "followed": followed,
            "J^T u": lambda: products(None),
            "J v and J^T u": lambda: products(tangent),
        },
        repeats,
    )


def replay(samples: tuple[int, ...] = (500, 1797), repeats: int = 40) -> Iterator[Comparison]:
    """A replayed step on minibatches of 64, next to reading its kernel rows and to the training step that it replays."""
    for count in samples:
        torch.manual_seed(0)
        module = MODELS["MLP"]()
        inputs, targets = digits("MLP", count)
        labels = targets.argmax(1)
        with torch.no_grad():
            outputs = module(inputs)
        kernel = empirical_ntk(module, inputs)
        replayed = FunctionSpaceSGD(kernel, outputs, Objective(nn.CrossEntropyLoss(), outputs, labels))
        index = SampleIndex(Reference((inputs, labels)).batches())
        gradient = torch.randn(BATCH * OUTPUTS)
        functions: dict[str, Callable[[], object]] = {
            "replay": partial(_replayed, replayed, index, inputs, labels),
            "limit": partial(torch.mv, kernel[: len(gradient)].T, gradient),
        }
        functions |= {f"plain step, {name}": _plain_step(name, count) for name in MODELS}
        times = interleaved(functions, repeats)
        own, limit = times.pop("replay"), times.pop("limit")
        notes = {f"over a {name}": own / value for name, value in times.items()}
        case = f"replayed step, N = {count}, batch {BATCH}"
        yield Comparison(case, own, "floor: reading the kernel rows of the batch", limit, notes)


def _replayed(replayed: FunctionSpaceSGD, index: SampleIndex, inputs: Tensor, labels: Tensor) -> None:
    rows = torch.randperm(len(labels))[:BATCH]
    replayed.accumulate(index.rows(inputs[rows], labels[rows]), labels[rows])
    replayed.step(SGDSettings(lr=0.02, momentum=0.9), clip_norm=1.0)


def _plain_step(name: str, samples: int) -> Callable[[], None]:
    torch.manual_seed(0)
    module = MODELS[name]()
    inputs, targets = digits(name, samples)
    labels = targets.argmax(1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)

    def step() -> None:
        rows = torch.randperm(samples)[:BATCH]
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(inputs[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    return step


class _Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = MODELS["MLP"]()

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.network(images)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def between_measurements(samples: int = 1797, steps: int = 60, repeats: int = 5) -> Comparison:
    """Seconds of a full-batch step of a whole fit, with the monitor on the modes and without, measurements left out."""
    data = TensorDataset(*digits("MLP", samples))
    captured: list[float] = []

    def fit(monitor: LinearizationMonitor | None) -> float:
        options: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(
            max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_model_summary=False,
            callbacks=[] if monitor is None else [monitor], **options,
        )  # fmt: skip
        torch.manual_seed(0)
        started = time.perf_counter()
        trainer.fit(_Regression(), DataLoader(data, batch_size=samples))
        elapsed = time.perf_counter() - started
        return elapsed if monitor is None else elapsed - sum(monitor.seconds.values())

    plain, followed = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(repeats):
            plain.append(fit(None) / steps)
            monitor = LinearizationMonitor(steps=[steps], progress=False)
            followed.append(fit(monitor) / steps)
            captured.append(monitor.seconds["capture"])
    own, floor = sorted(followed)[repeats // 2], sorted(plain)[repeats // 2]
    notes = {"time over the floor": own / floor, "capture [s]": sorted(captured)[repeats // 2]}
    return Comparison(f"step of a fit on the modes, N = {samples}", own, "floor: without the monitor", floor, notes)
