"""One network, three optimizers: which of them stays closest to the linearized (NTK) training of the same network?

A tanh network is trained on scikit-learn's digits by cross-entropy on minibatches, with SGD, with SGD and momentum, and with
AdamW. Each run is compared with its own linearized twin, trained by the same optimizer on the same minibatches: SGD is replayed
on the kernel, AdamW needs the twin in weight space. The callback chooses, and says so.

    python examples/optimizers.py
    python examples/optimizers.py --width 1024

How to read the figure: over time the three runs look different. But a run that learns faster also leaves its tangent space
sooner. Compare runs where they have fitted the data equally well. Over the training loss (time runs to the right) the curves lie
nearly on each other: what a run has learned decides how far it is from its linearization, more than the optimizer does. Two
differences remain. Down to a loss of 0.2 plain SGD is farthest: at a loss of about 0.25 its distance is 0.64, against 0.56 with
momentum and 0.54 with AdamW. Its first steps, at ten times the learning rate, are the largest. And AdamW's displacement is half
as large again as SGD's at the end: 13.7 against 9.1.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_ntk import LinearizationMonitor
from lightning_ntk.plots import plot_runs

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.3),
    "SGD, momentum 0.9": lambda parameters: torch.optim.SGD(parameters, lr=0.03, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}


class Classifier(LightningModule):
    """A tanh network with two hidden layers, trained by cross-entropy."""

    def __init__(self, width: int, make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer
        self.layers = nn.Sequential(
            nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the ten classes."""
        logits: Tensor = self.layers(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The cross-entropy of a minibatch."""
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> Optimizer:
        """The optimizer of this run."""
        return self.make_optimizer(self.parameters())


def load_images(samples: int) -> tuple[TensorDataset, TensorDataset]:
    """Training images, scaled to [0, 1], and 300 others to evaluate on."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    return TensorDataset(images[:samples], labels[:samples]), TensorDataset(images[-300:], labels[-300:])


def train(name: str, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """The history of a run with one of the optimizers, all from the same initial weights on the same minibatches."""
    seed_everything(arguments.seed, verbose=False)
    module = Classifier(arguments.width, OPTIMIZERS[name])
    training, evaluation = load_images(arguments.samples)
    monitor = LinearizationMonitor(evaluation=evaluation)
    trainer = Trainer(
        max_steps=arguments.steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(training, batch_size=64, shuffle=True))
    return monitor.history


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="units in each hidden layer")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps")
    parser.add_argument("--samples", type=int, default=1000, help="training images, up to 1497")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and the minibatches")
    parser.add_argument("--output", type=Path, default=Path("runs/optimizers.svg"), help="where the figure goes")
    return parser.parse_args()


def plot(runs: dict[str, list[dict[str, float]]]) -> Figure:
    """The relative weight distance of every run, over steps and over the training loss."""
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    over_steps, over_loss = figure.subplots(1, 2, sharey=True)
    plot_runs(runs, ["relative_weight_distance"], "over time", ax=over_steps)
    plot_runs(runs, ["relative_weight_distance"], "over the loss, which falls to the right", x="loss", ax=over_loss)
    over_steps.get_legend().remove()
    over_loss.set_ylabel("")
    return figure


def main() -> None:
    """Trains with every optimizer, prints the last measurements and saves the figure."""
    arguments = parse_arguments()
    runs = {name: train(name, arguments) for name in OPTIMIZERS}
    columns = [
        "relative_weight_distance",
        "loss",
        "linearized_loss",
        "evaluation/accuracy",
        "evaluation/linearized_accuracy",
    ]
    print(f"{'optimizer':>20}" + "".join(f"{column:>32}" for column in columns))
    for name, history in runs.items():
        print(f"{name:>20}" + "".join(f"{history[-1][column]:32.4f}" for column in columns))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    plot(runs).savefig(arguments.output)
    print(f"Figure: {arguments.output}")


if __name__ == "__main__":
    main()
