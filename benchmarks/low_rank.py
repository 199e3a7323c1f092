"""What the twin of a LoRA run costs: along stored rows of the Jacobian, and by passes through the network."""

import copy
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from peft import LoraConfig, get_peft_model
from timing import Comparison, interleaved
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training_step import fit, high_water
from transformers import BertConfig, BertForSequenceClassification

from lightning_ntk import LinearizationMonitor
from lightning_ntk.linearization import StepLinearization
from lightning_ntk.linearization.batch_loss import PairLoss
from lightning_ntk.linearization.labels_of_step import labeled_pair
from lightning_ntk.linearization.parameters import trainable_parameters
from lightning_ntk.training import LinearizedProblem
from lightning_ntk.training.base import StepSettings
from lightning_ntk.training.stored_loss import StoredLoss
from lightning_ntk.training.twin import Twin

_SAMPLES, _BATCH, _TOKENS = 32, 16, 64


def adapted() -> nn.Module:
    """A network of the size of MiniLM-L6 with random weights and adapters of rank 8, without dropout."""
    torch.manual_seed(0)
    config = BertConfig(  # type: ignore[call-arg]
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    adapters = LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network: nn.Module = get_peft_model(BertForSequenceClassification(config), adapters)
    return network


def sentences(samples: int = _SAMPLES) -> list[dict[str, Tensor]]:
    """Random tokens with random labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (samples, _TOKENS), generator=generator)
    labels = torch.randint(0, 2, (samples,), generator=generator)
    mask = torch.ones(_TOKENS, dtype=torch.long)
    return [{"input_ids": row, "attention_mask": mask, "labels": label} for row, label in zip(ids, labels, strict=True)]


class Classifier(LightningModule):
    """A model that computes its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = adapted()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of the model."""
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-4)


def per_step(repeats: int = 12) -> Iterator[Comparison]:
    """A training step together with that of its twin, side by side; what making the rows takes is a line of its own."""
    module = Classifier()
    live = trainable_parameters(module)
    optimizer = torch.optim.AdamW(live.values(), lr=1e-6)  # so small that the repeats see the same weights
    shadow = copy.deepcopy(module)
    step = StepLinearization(shadow, partial(shadow.training_step, batch_idx=0))
    data: DataLoader[Any] = DataLoader(sentences(), batch_size=_BATCH)  # type: ignore[arg-type]
    batch = next(iter(data))

    started = time.perf_counter()
    pair = labeled_pair(step, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem = LinearizedProblem(
            shadow, data, loss=pair.loss, predict=pair.predict, unpack=pair.unpack, jacobian="stored", batch_size=_BATCH
        )
    stored = StoredLoss(problem, PairLoss(problem.linearization, pair.loss, unpack=pair.unpack), step)
    making = time.perf_counter() - started

    twins = {"stored": Twin(stored, optimizer, live), "streamed": Twin(step, optimizer, live)}

    def plain() -> None:
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def followed(twin: Twin) -> None:
        twin.accumulate(batch)
        plain()
        twin.step(StepSettings(optimizer.param_groups))

    ways: dict[str, Callable[[], object]] = {"plain": plain}
    ways |= {name: partial(followed, twin) for name, twin in twins.items()}
    times = interleaved(ways, repeats)
    floor = times["plain"]
    size = "MiniLM's size, LoRA r=8, AdamW, batch 16 x 64 tokens"
    for name in twins:
        notes = {"time over the floor": times[name] / floor}
        yield Comparison(f"step with its twin, {name}, {size}", times[name], "floor: the plain step", floor, notes)
    numbers = problem.predictions.numel() * problem.linearization.num_parameters
    notes = {
        "MiB": numbers * 4 / 2**20,
        "parameters": problem.linearization.num_parameters,
        "in plain steps": making / floor,
    }
    epoch = floor * _SAMPLES / _BATCH
    yield Comparison(f"making the rows of {_SAMPLES} samples, K = 2", making, "a plain epoch", epoch, notes)


def memory() -> Iterator[Comparison]:
    """The peak memory of a run with its twin above what is there before it, next to that of the plain run."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18)}

    def peak(kind: str) -> float:
        command = [sys.executable, __file__, kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return float(done.stdout.split()[-1])

    plain = peak("plain")
    for kind in ("stored", "streamed"):
        monitored = peak(kind)
        notes = {"peak over the plain run": monitored / plain, "MiB": monitored, "plain MiB": plain}
        yield Comparison(f"peak memory of a LoRA run with its twin, {kind}", monitored, "the plain run", plain, notes)


def _peak(kind: str, steps: int = 3) -> float:
    """MiB that a run takes above what the process had before."""
    before = high_water()
    monitors: list[Callback] = []
    if kind != "plain":
        jacobian: Any = kind
        monitors = [
            LinearizationMonitor(steps=[steps + 1], reference_samples=_BATCH, jacobian=jacobian, progress=False)
        ]
    fit(Classifier(), sentences(), monitors, steps, _BATCH)  # type: ignore[arg-type]
    return (high_water() - before) / 2**10


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    print(_peak(sys.argv[1]))
