"""Train a small network on real handwritten digits and see how far it leaves its linearized (NTK) path.

A tanh network is trained by full-batch gradient descent on scikit-learn's digits (8 x 8 images, ten classes, one-hot
targets, squared loss). When the fit starts, the callback captures the kernel of the training set. At each measured step it
computes the weights of the linearized network, by one streamed pass of the transposed Jacobian, and logs their distance from the
trained ones.

    python examples/digits.py
    python examples/digits.py --width 512 --output-scale 3
    python examples/digits.py --lr 1 --regime
    tensorboard --logdir runs
"""

import argparse
import time
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ntk import LinearizationMonitor
from lightning_ntk.plots import plot_regimes


class DigitClassifier(LightningModule):
    """A tanh network with two hidden layers, trained by SGD on the squared error of one-hot targets."""

    def __init__(self, width: int, lr: float, output_scale: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.output_scale = output_scale
        self.layers = nn.Sequential(
            nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the ten classes."""
        scores: Tensor = self.layers(images)
        return self.output_scale * scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The squared error of a batch."""
        images, targets = batch
        loss = nn.functional.mse_loss(self(images), targets)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def load_images(samples: int) -> TensorDataset:
    """The first images of the digits, scaled to [0, 1], with one-hot targets."""
    digits = load_digits()
    images = torch.tensor(digits.data[:samples], dtype=torch.float32) / 16
    labels = torch.tensor(digits.target[:samples])
    return TensorDataset(images, nn.functional.one_hot(labels, 10).float())


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128, help="units in each hidden layer")
    parser.add_argument("--lr", type=float, default=0.2, help="learning rate")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument("--output-scale", type=float, default=1.0, help="factor on the outputs; large means lazier")
    parser.add_argument("--samples", type=int, default=1797, help="training images, up to 1797")
    parser.add_argument("--batch-size", type=int, default=None, help="images in a step; default: all of them")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights")
    parser.add_argument(
        "--regime", action="store_true", help="measure the panel of regimes too, with a figure of its own"
    )
    parser.add_argument("--output", type=Path, default=Path("runs"), help="directory of logs and figure")
    return parser.parse_args(arguments)


def train(arguments: argparse.Namespace) -> tuple[LinearizationMonitor, Path, float]:
    """Fits the network; returns the monitor, the directory of the logs and the seconds of the whole fit."""
    seed_everything(arguments.seed, verbose=False)
    data = load_images(arguments.samples)
    loader = DataLoader(data, batch_size=arguments.batch_size or len(data), shuffle=arguments.batch_size is not None)
    monitor = LinearizationMonitor(per_parameter=True, regime=arguments.regime)
    setting = f"width{arguments.width}-lr{arguments.lr:g}-scale{arguments.output_scale:g}-seed{arguments.seed}"
    logger = TensorBoardLogger(arguments.output, name=f"digits/{setting}", default_hp_metric=False)
    trainer = Trainer(
        max_steps=arguments.steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=logger,
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1 if arguments.batch_size is None else 50,
    )
    started = time.perf_counter()
    trainer.fit(DigitClassifier(arguments.width, arguments.lr, arguments.output_scale), loader)
    return monitor, Path(logger.log_dir), time.perf_counter() - started


def main() -> None:
    """Trains, prints the summary and saves the figure."""
    arguments = parse_arguments()
    monitor, directory, elapsed = train(arguments)
    print(monitor.summary())
    figure, _ = monitor.plot()
    figure.savefig(directory / "digits.png", dpi=200)
    if arguments.regime:
        plot_regimes(monitor).figure.savefig(directory / "regimes.svg")
    print(
        f"\nfit: {elapsed:.1f} s, of which capture {monitor.seconds['capture']:.1f} s and "
        f"{len(monitor.history)} measurements {monitor.seconds['measurements']:.1f} s"
    )
    print(f"Figure: {directory / 'digits.png'}\nLogs:   tensorboard --logdir {arguments.output}")


if __name__ == "__main__":
    main()
