"""The linearized network trained: at any time t, or step by step beside a run."""

from lightning_ntk.training.linearized_training import LinearizedTraining
from lightning_ntk.training.readout import LinearizedState

__all__ = ["LinearizedState", "LinearizedTraining"]
