"""The gradient of the linearized loss at the weights of a run.

A run that trains on this loss has the same gradient.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ntk.comparison.gradient_check import GradientMismatch, check_gradient
from lightning_ntk.linearization.batch_loss import BatchLoss
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.utilities.contexts import preserved_rng
from lightning_ntk.utilities.distributed import ALONE, Processes, mean_over


class ExpectedGradient:
    """The loss gradient at the run's weights, summed over one step's batches.

    Args:
        loss: The loss that is linearized.
        processes: The processes whose gradients a step averages.
    """

    def __init__(self, loss: BatchLoss, *, processes: Processes = ALONE) -> None:
        self._loss = loss
        self._processes = processes
        self._sum: Tensors = {}
        self._latest: Tensors = {}

    @preserved_rng()
    def accumulate(self, batch: Any, weights: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Adds the gradient of one batch, at weights and buffers by name.

        The loss is multiplied by `scale`.
        """
        self._fold()
        self._latest = self._loss.gradient_at(batch, weights) or {}
        if scale != 1 and self._latest:
            torch._foreach_mul_(list(self._latest.values()), scale)

    @property
    def has_batches(self) -> bool:
        """Whether any batch of the step has a gradient."""
        return bool(self._sum or self._latest)

    def retract(self) -> None:
        """Takes back the last batch: the run had no backward pass for it."""
        self._latest = {}

    def discard(self) -> None:
        """Forgets the batches so far: the optimizer has stepped, or did not."""
        self._sum, self._latest = {}, {}

    def compare(
        self, actual: Mapping[str, Tensor | None], precision: torch.dtype
    ) -> tuple[float, GradientMismatch | None]:
        """Compares the gradient of the run's step with the expected one.

        Args:
            actual: Gradients of the run's own backward passes, before clipping; None for parameters without one. Those that
                are not named are not compared.
            precision: The least precise type of these passes.

        Returns:
            The difference relative to the expected gradient, and what is known of it where rounding does not explain it.
        """
        expected = {name: value for name, value in self.total().items() if name in actual}
        return check_gradient(actual, expected, dtype=precision)

    def total(self) -> Tensors:
        """The gradient of the batches so far, averaged over the processes; zero without one."""
        self._fold()
        own = self._sum or {name: torch.zeros_like(value) for name, value in self._loss.params.items()}
        return mean_over(self._processes, own)

    def _fold(self) -> None:
        """Adds the last batch to the sum, for good."""
        for name, value in self._latest.items():
            if name in self._sum:
                self._sum[name] += value
            else:
                self._sum[name] = value
        self._latest = {}
