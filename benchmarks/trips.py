"""How many files of the package a question enters: until a run is captured, at a measurement, for the weights at one time.

python benchmarks/trips.py
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_ntk
from lightning_ntk import LinearizationMonitor, LinearizedTraining

PACKAGE = Path(lightning_ntk.__file__).parent


@contextmanager
def entered() -> Iterator[set[str]]:
    """The files of the package whose functions are called inside of the block."""
    files: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        # Class bodies and generated methods of named tuples are no trips.
        if event == "call" and PACKAGE in path.parents and frame.f_code.co_name != "<module>":
            files.add(str(path.relative_to(PACKAGE)))

    sys.setprofile(note)
    try:
        yield files
    finally:
        sys.setprofile(None)


class Regression(LightningModule):
    """A small network on a full batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs `(B, 2)`."""
        outputs: Tensor = self.body(inputs)
        return outputs

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The mean squared error."""
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trips() -> dict[str, set[str]]:
    """The files entered, by question."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(12, 3).double(), torch.randn(12, 2).double()
    counted: dict[str, set[str]] = {}

    class Counting(LinearizationMonitor):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            kind = "in a later batch" if self.comparison else "until a full-batch run is captured"
            with entered() as counted[kind]:
                super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            with entered() as counted["at a measurement"]:
                self._measure(trainer, pl_module)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            max_steps=10, accelerator="cpu", precision="64-true", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[Counting(steps=[10], taylor=False)],
        ).fit(Regression(), DataLoader(TensorDataset(inputs, targets), batch_size=12))  # fmt: skip
    module = Regression().double()
    with entered() as counted["by LinearizedTraining(...)"]:
        training = LinearizedTraining(module, (inputs, targets), lr=0.1, progress=False)
    with entered() as counted["by weights(7) after construction"]:
        training.weights(7)
    return counted


if __name__ == "__main__":
    for question, files in trips().items():
        print(f"{len(files):3d} files {question}")
        if "-v" in sys.argv:
            print("    " + " ".join(sorted(files)))
