"""One network frozen at w0: outputs, J v, J^T u and the loss, on a batch and on a data set."""

from lightning_ntk.linearization.linearization import Linearization

__all__ = ["Linearization"]
