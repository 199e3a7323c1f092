"""What it costs to follow a run's own training step: per step, in memory, and for a whole monitored run."""

import copy
import logging
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from models import STEP_MODELS, digits
from timing import Comparison, interleaved
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_ntk import LinearizationMonitor
from lightning_ntk.linearization import StepLinearization
from lightning_ntk.linearization.parameters import trainable_parameters
from lightning_ntk.training.base import StepSettings
from lightning_ntk.training.twin import Twin

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from language_model import BATCH_SIZE, GPT, LanguageModel, Windows, load_text

# Of a network whose weights and activations are larger than what Python and its libraries take anyway.
_MEMORY_WIDTH, _MEMORY_STEPS = 2048, 6


class Classifier(LightningModule):
    """A classifier as in every tutorial."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the classes."""
        scores: Tensor = self.network(images)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def per_step(batch_size: int = 256, repeats: int = 30) -> Iterator[Comparison]:
    """A training step in train mode together with that of its twin."""
    for name, make in STEP_MODELS.items():
        torch.manual_seed(0)
        module = Classifier(make())
        inputs, one_hot = digits(name, batch_size)
        # So small a rate that the repeats see the same weights.
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6)
        case = f"training step with its twin, {name}, batch {batch_size}"
        yield _beside_twin(case, module, (inputs, one_hot.argmax(1)), optimizer, repeats)


def language_model(repeats: int = 30) -> Comparison:
    """A step of examples/language_model.py, its clipping included, together with that of its twin."""
    module, data = _language_model()
    module.lr = 1e-6
    batch = next(iter(DataLoader(data, BATCH_SIZE, shuffle=True)))
    case = f"training step with its twin, GPT of 4 layers, batch {BATCH_SIZE} x 64"
    return _beside_twin(case, module, batch, module.configure_optimizers()["optimizer"], repeats, clip=1.0)


def _language_model() -> tuple[LanguageModel, Windows]:
    """The network and the text of examples/language_model.py."""
    seed_everything(0, verbose=False)
    text, _, characters = load_text()
    module = LanguageModel(GPT(characters, 64, 4, 4, 128), 2000)
    module.log = _ignore  # type: ignore[method-assign]  # there is no Trainer
    return module, Windows(text, 64, 1)


def _ignore(*_: Any, **__: Any) -> None:
    """A log that keeps nothing."""


def _beside_twin(
    case: str,
    module: LightningModule,
    batch: Any,
    optimizer: torch.optim.Optimizer,
    repeats: int,
    clip: float | None = None,
) -> Comparison:
    live = trainable_parameters(module)
    shadow = copy.deepcopy(module)
    training_step: Callable[..., Any] = shadow.training_step
    step = StepLinearization(shadow, partial(training_step, batch_idx=0))
    twin = Twin(step, optimizer, live)
    tangent = {key: 1e-3 * torch.randn_like(value) for key, value in live.items()}

    def plain() -> None:
        optimizer.zero_grad()
        loss: Any = module.training_step(batch, 0)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(live.values(), clip)
        optimizer.step()

    def followed() -> None:
        twin.accumulate(batch)
        plain()
        twin.step(StepSettings(optimizer.param_groups, clip_norm=clip))

    def gradient() -> None:
        step.gradient(batch, tangent)

    times = interleaved({"plain": plain, "followed": followed, "gradient": gradient}, repeats)
    floor = times["plain"]
    notes = {
        "time over the floor": times["followed"] / floor,
        "twin's gradient over the floor": times["gradient"] / floor,
    }
    return Comparison(case, times["followed"], "floor: the plain training step", floor, notes)


def whole_runs(steps: tuple[int, ...] = (100, 500), samples: int = 1797) -> Iterator[Comparison]:
    """A monitored run with default arguments next to the plain run: a CNN with BatchNorm, Adam, batches of 64."""
    for count in steps:
        times = {kind: _run_seconds(kind, count, samples) for kind in ("plain", "default", "weights only")}
        plain = times.pop("plain")
        notes = {f"{kind} over the plain run": value / plain for kind, value in times.items()}
        yield Comparison(f"monitored run of {count} steps, batch 64", times["default"], "the plain run", plain, notes)


def _run_seconds(kind: str, steps: int, samples: int) -> float:
    callbacks = {
        "plain": [],
        "default": [LinearizationMonitor()],
        "weights only": [LinearizationMonitor(reference=None)],
    }[kind]
    started = time.perf_counter()
    data = labeled(digits("BatchNorm CNN", samples))
    fit(Classifier(STEP_MODELS["BatchNorm CNN"]()), data, list(callbacks), steps, 64)
    return time.perf_counter() - started


def labeled(data: tuple[Tensor, Tensor]) -> TensorDataset:
    """Inputs with class labels in the place of one-hot rows."""
    return TensorDataset(data[0], data[1].argmax(1))


def fit(module: LightningModule, data: Dataset[Any], callbacks: list[Callback], steps: int, batch: int) -> None:
    """Trains for some steps, and prints nothing."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, callbacks=callbacks, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(data, batch, shuffle=True))


def memory(name: str = "MLP") -> Comparison:
    """The peak memory of a monitored run above what is there before it, next to that of the plain run."""
    # Tensors that are freed go back to the system at once, or the peak would be that of the allocator's history.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18)}

    def peak(kind: str) -> float:
        command = [sys.executable, __file__, name, kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return float(done.stdout.split()[-1])

    described = {"MLP": "MLP of 8.5 million weights, Adam", "GPT": f"GPT of 4 layers, AdamW, batch {BATCH_SIZE} x 64"}
    plain, monitored = peak("plain"), peak("monitored")
    notes = {"peak over the plain run": monitored / plain, "MiB": monitored, "plain MiB": plain}
    return Comparison(
        f"peak memory of a run with its twin, {described[name]}", monitored, "the plain run", plain, notes
    )


def _peak(name: str, kind: str) -> float:
    """MiB that a run takes above what the process had before."""
    module: LightningModule
    data: Dataset[Any]
    if name == "GPT":
        module, data = _language_model()
        batch = BATCH_SIZE
    else:
        width = _MEMORY_WIDTH
        module = Classifier(nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, 10),
        ))  # fmt: skip
        data, batch = labeled(digits("MLP", 512)), 256
    fit(Classifier(nn.Linear(64, 10)), labeled(digits("MLP", 512)), [], 1, 256)  # imports and thread pools
    before = high_water()
    weights = sum(p.numel() * p.element_size() for p in module.parameters()) / 2**10
    callbacks: list[Callback] = (
        [LinearizationMonitor(reference=None, steps=[_MEMORY_STEPS + 1])] if kind == "monitored" else []
    )
    fit(module, data, callbacks, _MEMORY_STEPS, batch)
    # The weights were there before.
    return (high_water() - before + weights) / 2**10


def high_water() -> int:
    """KiB. Of this program alone: `getrusage` counts what its parent had, too."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


if __name__ == "__main__":
    print(_peak(*sys.argv[1:]))
