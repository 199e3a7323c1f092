"""Everything from YAML: a LightningCLI whose configurations have a LinearizationMonitor among the Trainer's callbacks.

    python examples/cli.py fit --config examples/configs/replay.yaml
    python examples/cli.py fit --config examples/configs/replay.yaml --model.width 512 --trainer.max_steps 500
    python examples/cli.py fit --trainer.callbacks.help lightning_ntk.LinearizationMonitor
    tensorboard --logdir runs

The module and the datamodule know nothing of the callback: those of any project can be in their place.
"""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Network(LightningModule):
    """A tanh network with two hidden layers. The optimizer, and if wanted a scheduler, are in the configuration.

    Args:
        width: Units in each hidden layer.
        output_scale: Factor on the outputs; large means lazier.
        loss: The loss, a function of scores and targets.
    """

    def __init__(self, width: int = 64, output_scale: float = 1.0, loss: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="loss")
        self.output_scale = output_scale
        self.loss = loss or nn.MSELoss()
        self.layers = nn.Sequential(
            nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the ten classes."""
        scores: Tensor = self.layers(images)
        return self.output_scale * scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        images, targets = batch
        loss: Tensor = self.loss(self(images), targets)
        self.log("train_loss", loss)
        return loss


class DigitImages(TensorDataset):
    """Images of scikit-learn's digits, scaled to [0, 1].

    Args:
        start: The first of them.
        samples: How many, up to 1797 in all.
        one_hot: Whether targets are one-hot rows, for a squared loss, or labels.
    """

    def __init__(self, start: int = 0, samples: int = 150, one_hot: bool = False) -> None:
        digits, chosen = load_digits(), slice(start, start + samples)
        labels = torch.tensor(digits.target[chosen])
        images = torch.tensor(digits.data[chosen], dtype=torch.float32) / 16
        super().__init__(images, nn.functional.one_hot(labels, 10).float() if one_hot else labels)


class Digits(LightningDataModule):
    """Training data.

    Args:
        samples: Training images.
        batch_size: Images in a step; null for all of them.
        one_hot: Whether targets are one-hot rows, for a squared loss, or labels.
    """

    def __init__(self, samples: int = 150, batch_size: int | None = None, one_hot: bool = False) -> None:
        super().__init__()
        self.samples, self.batch_size, self.one_hot = samples, batch_size, one_hot

    def train_dataloader(self) -> DataLoader[Any]:
        """In random order, unless there is one batch only."""
        data = DigitImages(samples=self.samples, one_hot=self.one_hot)
        return DataLoader(data, batch_size=self.batch_size or len(data), shuffle=self.batch_size is not None)


def main(arguments: ArgsType = None) -> LightningCLI:
    """Runs the command line."""
    return LightningCLI(Network, Digits, args=arguments, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
