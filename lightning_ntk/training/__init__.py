"""The linearized network trained: at any time t, or step by step beside a run."""

from lightning_ntk.linearization.batch_loss import PairLoss
from lightning_ntk.training.base import LinearizedState, OnlineTraining, StepSettings
from lightning_ntk.training.linearized_training import LinearizedTraining
from lightning_ntk.training.problem import LinearizedProblem
from lightning_ntk.training.regression import Fit, KernelRegression, kernel_regression
from lightning_ntk.training.replay import Replay
from lightning_ntk.training.stored_loss import StoredLoss
from lightning_ntk.training.twin import Twin

__all__ = [
    "Fit",
    "KernelRegression",
    "LinearizedProblem",
    "LinearizedState",
    "LinearizedTraining",
    "OnlineTraining",
    "PairLoss",
    "Replay",
    "StepSettings",
    "StoredLoss",
    "Twin",
    "kernel_regression",
]
