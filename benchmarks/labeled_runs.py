"""Sixteen runs whose regime is known beforehand, and the verdicts on them.

    python benchmarks/labeled_runs.py [--seeds 0] [--output benchmarks/results/labeled_runs.json]

The labels do not come from the distance on which a verdict rests, but from how a run is made. Lazy are networks whose centered
output is multiplied by a large number (Chizat et al., 2019), very wide ones, and a short way from trained weights. Rich are
networks of ordinary size that learn features: standard scale, Adam, BatchNorm and dropout. In between is a scale in between.
Refused are runs on which no number means what it says: two steps, another loss, a learning rate beyond the edge of stability,
weights that move by their rounding. `kernel_change` says how far the kernel of 32 samples has changed, where there is one:
below 0.1 in the lazy runs, above 0.5 in the rich ones, between in the others.
"""

import argparse
import copy
import itertools
import json
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_breast_cancer, load_digits
from timing import machine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ntk import LinearizationMonitor, LinearizedTraining
from lightning_ntk.functional.verdict import Word

RESULTS = Path(__file__).parent / "results" / "labeled_runs.json"
Loss = Callable[[Tensor, Tensor], Tensor]
PROBE = 32  # samples of the kernel that is followed
CONTEXT = 8  # characters from which the next is told


class Size(NamedTuple):
    """How large the runs are."""

    samples: int = 256
    steps: int = 1000
    minibatches: int = 300
    width: int = 128
    measured: Literal["log"] | tuple[int, ...] = "log"


SMALL = Size(samples=64, steps=200, minibatches=60, width=32, measured=(0,))


class LabeledRun(NamedTuple):
    """A run and what it is known to be.

    Attributes:
        name: What is special about it.
        label: The word that is right.
        fit: Trains and returns the monitor.
    """

    name: str
    label: Word
    fit: Callable[[Size], LinearizationMonitor]


class Scaled(nn.Module):
    """alpha (h(w) - h(w0)), the centered model of Chizat et al. (2019)."""

    def __init__(self, network: nn.Module, alpha: float) -> None:
        super().__init__()
        self.trained, self.alpha = network, alpha
        self.initial = copy.deepcopy(network).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Scaled outputs."""
        outputs: Tensor = self.alpha * (self.trained(inputs) - self.initial(inputs))
        return outputs


class Run(LightningModule):
    """A network that an optimizer trains."""

    def __init__(self, network: nn.Module, loss: Loss, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.network, self.loss, self.optimizer = network, loss, optimizer

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs of the network."""
        outputs: Tensor = self.network(inputs)
        return outputs

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self.loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer on all that is trained."""
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


def digits(samples: int, *, one_hot: bool = True) -> TensorDataset:
    """Images of scikit-learn's digits, centered and of unit mean square: `(N, 64)`, `(N, 10)` or `(N,)`."""
    data = load_digits()
    images = torch.tensor(data.data[:samples], dtype=torch.float32)
    images = images - images.mean()
    labels = torch.tensor(data.target[:samples])
    targets = nn.functional.one_hot(labels, 10).float() if one_hot else labels
    return TensorDataset(images / images.square().mean().sqrt(), targets)


def text(samples: int) -> tuple[TensorDataset, int]:
    """Eight characters of a description of scikit-learn, `(N, 8)`, the next one, `(N,)`, and how many there are."""
    characters = load_breast_cancer().DESCR
    known = sorted(set(characters))
    numbers = torch.tensor([known.index(character) for character in characters])
    windows = numbers.unfold(0, CONTEXT + 1, 1)[:samples]
    return TensorDataset(windows[:, :CONTEXT], windows[:, CONTEXT]), len(known)


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers = [layer for i, o in itertools.pairwise(widths) for layer in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class Reader(nn.Module):
    """A transformer of one layer, with dropout, on characters."""

    def __init__(self, characters: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.places = nn.Parameter(torch.randn(CONTEXT, width) / 10)
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, characters)

    def forward(self, characters: Tensor) -> Tensor:
        """Scores of the next character."""
        scores: Tensor = self.head(self.layer(self.embedding(characters) + self.places).mean(1))
        return scores


def train(
    size: Size, module: Run, data: TensorDataset, *, steps: int | None = None, batch: int | None = None, **options: Any
) -> LinearizationMonitor:
    """Trains with a monitor, which no sentence of the Trainer interrupts."""
    monitor = LinearizationMonitor(steps=size.measured, progress=False, **options)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    trainer = Trainer(
        max_steps=steps or size.steps, max_epochs=-1, accelerator="cpu", callbacks=[monitor], logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(data, batch or len(data), shuffle=batch is not None))
    return monitor


def edge(network: nn.Module, data: TensorDataset) -> float:
    """The largest learning rate of gradient descent on the squared loss for which the linearized network is stable."""
    return LinearizedTraining(network, data, lr=1e-30, solver="lanczos", horizon=1, progress=False).max_learning_rate


def squared(
    size: Size, network: nn.Module, *, fraction: float = 0.5, double: bool = True, **options: Any
) -> LinearizationMonitor:
    """Gradient descent on digits, at a fraction of the largest stable learning rate."""
    data, network = digits(size.samples), network.double()
    data = TensorDataset(*(tensor.double() for tensor in data.tensors))
    lr = fraction * edge(network, data)
    if not double:
        data, network = TensorDataset(*(tensor.float() for tensor in data.tensors)), network.float()
    module = Run(network, nn.functional.mse_loss, lambda p: torch.optim.SGD(p, lr=lr))
    return train(size, module, data, kernel_probe=PROBE, **options)


def scaled(size: Size, alpha: float, **options: Any) -> LinearizationMonitor:
    """A centered network with two hidden layers, multiplied by alpha."""
    return squared(size, Scaled(perceptron(64, size.width, size.width, 10), alpha), **options)


def classified(size: Size, network: nn.Module, *, lr: float = 3e-3, **options: Any) -> LinearizationMonitor:
    """Minibatches of digits, cross-entropy, Adam."""
    module = Run(network, nn.functional.cross_entropy, lambda p: torch.optim.Adam(p, lr=lr))
    return train(size, module, digits(size.samples, one_hot=False), steps=size.minibatches, batch=64, **options)


def normalized(width: int) -> nn.Sequential:
    """A network with BatchNorm and dropout."""
    return nn.Sequential(
        nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, width),
        nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10),
    )  # fmt: skip


def late(size: Size) -> LinearizationMonitor:
    """A short way from weights that have been trained already.

    Training has sharpened the kernel: at half of the edge at initialization the late linearized network is unstable, and refused.
    """
    steps = 2 * size.steps
    return scaled(size, 1.0, fraction=0.1, steps=steps, capture_at=steps - 20)


def reading(size: Size) -> LinearizationMonitor:
    """A transformer on text, with Adam and dropout."""
    data, characters = text(size.samples)
    module = Run(Reader(characters), nn.functional.cross_entropy, lambda p: torch.optim.Adam(p, lr=3e-3))
    return train(size, module, data, steps=size.minibatches, batch=64)


def reading_lazily(size: Size) -> LinearizationMonitor:
    """A centered network on text, multiplied by 300, with plain SGD."""
    data, characters = text(size.samples)
    network = nn.Sequential(
        nn.Embedding(characters, 16), nn.Flatten(), *perceptron(16 * CONTEXT, size.width, characters)
    )
    module = Run(Scaled(network, 300.0), nn.functional.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.3 / 300**2))
    return train(size, module, data, steps=size.minibatches, batch=64)


RUNS = (
    LabeledRun("output scale 1", "rich", lambda size: scaled(size, 1.0)),
    LabeledRun("output scale 3", "intermediate", lambda size: scaled(size, 3.0)),
    LabeledRun("output scale 100", "lazy", lambda size: scaled(size, 100.0)),
    LabeledRun("output scale 1000", "lazy", lambda size: scaled(size, 1000.0)),
    LabeledRun("output scale 10^6 in float32", "undecided", lambda size: scaled(size, 1e6, double=False)),
    LabeledRun("width 64, Adam", "rich", lambda size: classified(size, perceptron(64, 64, 10))),
    LabeledRun("width 2048", "lazy", lambda size: squared(size, perceptron(64, 2048, 10), steps=size.steps // 3)),
    LabeledRun("0.1 of the edge", "lazy", lambda size: scaled(size, 100.0, fraction=0.1)),
    LabeledRun("0.98 of the edge", "lazy", lambda size: scaled(size, 100.0, fraction=0.98)),
    LabeledRun("2 times the edge", "undecided", lambda size: scaled(size, 1.0, fraction=2.0)),
    LabeledRun("a late capture", "lazy", late),
    LabeledRun("BatchNorm and dropout in train mode", "rich", lambda size: classified(size, normalized(size.width))),
    LabeledRun(
        "a wrong loss",
        "undecided",
        lambda size: classified(
            size, perceptron(64, size.width, 10), loss=nn.MSELoss(), mismatch="log", dynamics="twin"
        ),
    ),
    LabeledRun("two steps", "undecided", lambda size: scaled(size, 1.0, steps=2)),
    LabeledRun("a transformer on text, Adam", "rich", reading),
    LabeledRun("text, output scale 300", "lazy", reading_lazily),
)


def judged(run: LabeledRun, size: Size, seed: int) -> dict[str, Any]:
    """What a run is, and what is said of it."""
    seed_everything(seed, verbose=False)
    monitor = run.fit(size)
    verdict = monitor.verdict
    last = {key: value for key, value in monitor.history[-1].items() if math.isfinite(value)}  # JSON has no infinity
    return {
        "run": run.name, "seed": seed, "label": run.label, "verdict": verdict.word, "reason": verdict.reason,
        **{key: last.get(key) for key in ("relative_weight_distance", "taylor_gap", "kernel_change", "loss", "accuracy")},
    }  # fmt: skip


def main() -> None:
    """Prints a table, writes the JSON file, and says how many verdicts are right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--small", action="store_true", help="as the tests run them")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for run in RUNS:
        for seed in options.seeds:
            row = judged(run, SMALL if options.small else Size(), seed)
            rows.append(row)
            shown = [f"{row[key]:9.3g}" if row[key] is not None else f"{'-':>9}" for key in list(row)[5:]]
            right = "right" if row["verdict"] == row["label"] else "WRONG"
            print(f"{run.name:36} {seed} {right} {row['verdict']:12} {' '.join(shown)}  {row['reason']}", flush=True)
    wrong = [row for row in rows if row["verdict"] != row["label"]]
    print(f"{len(rows) - len(wrong)} of {len(rows)} verdicts are right.")
    options.output.write_text(json.dumps({"machine": machine(), "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
