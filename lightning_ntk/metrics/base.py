"""What all metrics share: float64 sums and a plot.

The sums add up over updates and processes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_ntk.plots import Drawing, plot_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class SummedMetric(Metric):
    """A metric computed from sums over all updates, on any number of processes.

    `forward` returns the value for its own arguments alone and adds them to the sums.

    Args:
        kwargs: Options of `torchmetrics.Metric`; every metric takes them.
    """

    is_differentiable = False
    full_state_update = False
    label = ""
    """Name and formula on the axis of a plot."""

    def add_sums(self, name: str, *shape: int) -> None:
        """Adds a state that starts at zero, in float64, and is summed over processes."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: "Axes | None" = None) -> Drawing:
        """Plots one value, or the values of successive measurements. Needs matplotlib.

        Args:
            val: A result of `forward` or `compute`, or a sequence of them. Default: the result of `compute`.
            ax: Axes to draw on. Default: the axes of a new figure.

        Returns:
            The figure and its axes, with a gray line at `plot_lower_bound` and `plot_upper_bound` where they are in view.
        """
        values: Any = self.compute() if val is None else val
        numbers = [float(value) for value in (values if isinstance(values, Sequence) else [values])]
        return plot_values(numbers, self.label, ax, bounds=(self.plot_lower_bound, self.plot_upper_bound))
