"""What the reproductions share: the digits, a network trained on all of them at once, and its largest stable learning rate."""

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ntk import LinearizedTraining

CLASSES = 10


def digits(samples: int) -> TensorDataset:
    """The first images of scikit-learn's digits, centered and of unit mean square, with one-hot targets: `(N, 64)`, `(N, 10)`."""
    data = load_digits()
    images = torch.tensor(data.data[:samples], dtype=torch.float32)
    images = images - images.mean()
    targets = nn.functional.one_hot(torch.tensor(data.target[:samples]), CLASSES).float()
    return TensorDataset(images / images.square().mean().sqrt(), targets)


class FullBatch(LightningModule):
    """A network trained by gradient descent on the mean squared error.

    Args:
        network: Maps images to outputs.
        lr: Learning rate.
    """

    def __init__(self, network: nn.Module, lr: float) -> None:
        super().__init__()
        self.network = network
        self.lr = lr

    def forward(self, images: Tensor) -> Tensor:
        """Outputs of the network."""
        outputs: Tensor = self.network(images)
        return outputs

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean squared error, over samples and outputs."""
        images, targets = batch
        return nn.functional.mse_loss(self(images), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class AtSteps(Callback):
    """Measures a network of a run at the start and at some steps.

    Args:
        steps: When.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = steps

    def measure(self, step: int, module: LightningModule) -> None:
        """Measures the network after so many steps."""
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures at initialization."""
        self.measure(0, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures if it is time."""
        if trainer.global_step in self.steps:
            self.measure(trainer.global_step, pl_module)


def max_learning_rate(network: nn.Module, data: TensorDataset) -> float:
    """The largest learning rate for which the linearized network is stable, 2 / (c lambda_max) for a loss gradient c (f - Y)."""
    training = LinearizedTraining(network, data, lr=1e-30, solver="lanczos", horizon=1, progress=False)
    return training.max_learning_rate


def quiet_trainer(steps: int, callbacks: Sequence[Callback]) -> Trainer:
    """A Trainer on the CPU for so many steps, that writes nothing."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # The last one is of Lightning's own, with recent versions of PyTorch.
    for message in (
        "The 'train_dataloader' does not have many workers",
        "The number of training batches",
        ".*LeafSpec",
    ):
        warnings.filterwarnings("ignore", message=message)
    return Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip


def fit(network: FullBatch, data: TensorDataset, steps: int, callbacks: Sequence[Callback]) -> None:
    """Trains for so many steps, each on all of the data."""
    quiet_trainer(steps, callbacks).fit(network, DataLoader(data, batch_size=len(data)))
