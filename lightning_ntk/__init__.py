"""How far a network's weights leave the path of its linearization, the neural-tangent-kernel regime."""

from typing import TYPE_CHECKING

from lightning_ntk.utilities.lazy import lazy_names

__version__ = "0.1.0"

__all__ = ["Linearization", "LinearizationMonitor", "LinearizedTraining", "empirical_ntk"]

if TYPE_CHECKING:
    from lightning_ntk.callback.monitor import LinearizationMonitor
    from lightning_ntk.kernel import empirical_ntk
    from lightning_ntk.linearization.linearization import Linearization
    from lightning_ntk.training.linearized_training import LinearizedTraining
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Linearization": "lightning_ntk.linearization.linearization",
            "LinearizationMonitor": "lightning_ntk.callback.monitor",
            "LinearizedTraining": "lightning_ntk.training.linearized_training",
            "empirical_ntk": "lightning_ntk.kernel",
        },
    )
