"""The recurrence of `torch.optim.SGD` on one mode, for learning rates that change from step to step."""

import torch
from torch import Tensor


class GradientDescent:
    r"""Full-batch gradient descent, advanced step by step with the learning rates really used.

    The filter of a mode obeys :math:`\phi \leftarrow \phi + \eta_s (1 - \lambda \phi)`: no division, exact at zero, and
    O(m) operations a step.

    Args:
        eigenvalues: Eigenvalues of the kernel, `(m,)` in float64.
        factor: c, the measured factor of the loss.
    """

    def __init__(self, eigenvalues: Tensor, factor: float) -> None:
        self._eigenvalues = eigenvalues.clamp_min(0)
        self._factor = factor
        self.filter = torch.zeros_like(eigenvalues)

    def step(self, lr: float) -> None:
        """One optimizer step with this learning rate."""
        self.filter = self.filter + lr * self._factor * (1 - self._eigenvalues * self.filter)
