"""The gradient that a run's first step must have if it trains on the loss that is linearized."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ntk.comparison.gradient_check import GradientMismatch, check_gradient
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.objective import Loss, Objective
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.utilities.contexts import preserved_rng
from lightning_ntk.utilities.distributed import ALONE, Processes, mean_over


class FirstGradient:
    """The gradient of `loss(predict(module, inputs), target)` at w0, summed over the batches of the first step.

    Args:
        linearization: The network at w0.
        loss: Maps outputs and targets to one number.
        processes: The processes whose gradients a step averages.
    """

    def __init__(self, linearization: Linearization, loss: Loss, *, processes: Processes = ALONE) -> None:
        self._linearization = linearization
        self._loss = loss
        self._processes = processes
        self._objective: Objective | None = None
        self._sum: Tensors | None = None

    @preserved_rng()
    def accumulate(self, inputs: Any, target: Tensor, scale: float = 1.0) -> None:
        """Adds the gradient of one batch, whose loss is multiplied by `scale`."""
        linearization = self._linearization
        outputs = linearization.predict(inputs)
        if self._objective is None:
            self._objective = Objective(self._loss, outputs, target, flat=linearization.flat)
        cotangent = scale * self._objective.gradient(outputs, self._objective.prepare(target, outputs))
        gradient = linearization.vjp(cotangent, inputs)
        if self._sum is None:
            self._sum = {name: value.clone() for name, value in gradient.items()}
        else:
            for name, value in gradient.items():
                self._sum[name].add_(value)

    def discard(self) -> None:
        """Forgets the batches so far: the optimizer did not step."""
        self._sum = None

    def compare(self, actual: Mapping[str, Tensor | None], precision: torch.dtype) -> GradientMismatch | None:
        """Compares the gradient of the run's step with the expected one.

        Args:
            actual: Gradients of the run's own backward passes, before clipping; None for parameters without one.
            precision: The least precise type of these passes.

        Returns:
            None if they agree.
        """
        assert self._sum is not None
        return check_gradient(actual, mean_over(self._processes, self._sum), dtype=precision)
