"""A sweep to copy: how far networks of several widths leave their linearized path, for several seeds.

    python examples/sweep.py

Change `Network` and `objective`, and the lists in `main`. Run it again and it resumes; add a width and only that one is run. Or
describe the sweep in a file, with this objective: see examples/sweep.yaml and `lightning-ntk sweep run examples/sweep.yaml`.
"""

import argparse
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ntk import LinearizationMonitor
from lightning_ntk.sweep import Sweep


class Network(LightningModule):
    """A tanh network with one hidden layer, trained by gradient descent on the squared error of one-hot targets."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the ten classes."""
        scores: Tensor = self.layers(images)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The squared error of a batch."""
        images, targets = batch
        return nn.functional.mse_loss(self(images), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=0.05)


def objective(config: dict[str, Any]) -> LinearizationMonitor:
    """Trains for one configuration; the sweep keeps every scalar of the monitor."""
    seed_everything(config["seed"], verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.data[:300], dtype=torch.float32) / 16
    targets = nn.functional.one_hot(torch.tensor(digits.target[:300]), 10).float()
    data = DataLoader(TensorDataset(images, targets), batch_size=300)
    monitor = LinearizationMonitor(progress=False)
    trainer = Trainer(
        max_steps=config["steps"], max_epochs=-1, accelerator="cpu", callbacks=[monitor], logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(Network(config["width"]), data)
    return monitor


def main() -> None:
    """Runs the sweep, prints the table and the slope."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--storage", default="sweep.journal", help="a file, or an Optuna storage URL")
    options = parser.parse_args()
    grid = {"width": options.widths, "seed": options.seeds, "steps": [options.steps]}
    results = Sweep(objective, grid, storage=options.storage, name="widths").run(workers=options.workers)
    distance = "ntk/relative_weight_distance"
    print(results.markdown(columns=["width", "seed", "step", distance, "ntk/loss", "ntk/linearized_loss"]))
    for config, mean in results.mean(distance, over="seed", geometric=True):
        print(
            f"width {config['width']}: geometric mean {mean.mean:.4f}, 95% interval [{mean.low:.4f}, {mean.high:.4f}]"
        )
    print(f"slope of {distance} over width: {results.slope('width', distance)}")


if __name__ == "__main__":  # worker processes import this file
    main()
