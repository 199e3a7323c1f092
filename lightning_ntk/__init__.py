"""How far a network's weights leave the path of its linearization, the neural-tangent-kernel regime."""

from lightning_ntk.callback.monitor import LinearizationMonitor
from lightning_ntk.kernel import empirical_ntk
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.training.linearized_training import LinearizedTraining

__version__ = "0.1.0"

__all__ = ["Linearization", "LinearizationMonitor", "LinearizedTraining", "empirical_ntk"]
