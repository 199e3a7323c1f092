"""What all metrics share: sums in float64 that add up over updates and processes, and a plot."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_ntk.plots import plot_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class SummedMetric(Metric):
    """A metric that is a function of sums over everything it was updated with, on any number of processes.

    `forward` gives the value of its own arguments alone, and adds them to the sums.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    label = ""
    """Name and formula for the axis of a plot."""

    def add_sums(self, *names: str) -> None:
        """Adds states that start at zero, kept in float64 and summed over processes."""
        for name in names:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def accumulate(self, **values: float) -> None:
        """Adds to the states of these names."""
        for name, value in values.items():
            setattr(self, name, getattr(self, name) + value)

    def sums(self, *names: str) -> list[float]:
        """The values of these states."""
        return [getattr(self, name).item() for name in names]

    def result(self, value: float) -> Tensor:
        """A computed value as a scalar tensor on the metric's device."""
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Plots one value, or the values of successive measurements. Needs matplotlib.

        Args:
            val: A result of `forward` or `compute`, or a sequence of them. Default: that of `compute`.
            ax: Axes to draw on. Default: those of a new figure.

        Returns:
            The figure and its axes.
        """
        values: Any = self.compute() if val is None else val
        numbers = [float(value) for value in (values if isinstance(values, Sequence) else [values])]
        return plot_values(numbers, self.label, ax)
