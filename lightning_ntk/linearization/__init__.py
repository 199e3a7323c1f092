"""One network frozen at w0: outputs, J v, J^T u and the loss, on a batch and on a data set."""

from lightning_ntk.linearization.batch_loss import BatchLoss, PairLoss
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.step import StepLinearization

__all__ = ["BatchLoss", "Linearization", "PairLoss", "StepLinearization"]
