"""Distances between kernels, accumulated over blocks and processes."""

from typing import Any

import torch
from torch import Tensor

from lightning_ntk.functional.kernels import KernelSums, alignment, alignment_sums, kernel_sums
from lightning_ntk.metrics.base import SummedMetric
from lightning_ntk.plots.history import LABELS
from lightning_ntk.utilities.shapes import Float, Float64, Shaped


class _KernelMetric(SummedMetric):
    """Sums over kernel entries, which a `MetricCollection` computes once."""

    plot_lower_bound = 0.0
    kernel_sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sums("kernel_sums", 3)

    def update(self, initial_kernel: Float[Tensor, "rows columns"], kernel: Float[Tensor, "rows columns"]) -> None:
        """Adds two kernels, or one block of both, `(N1 K, N2 K)` each.

        A block is for example the rows of one process.
        """
        self.kernel_sums += torch.stack(kernel_sums(initial_kernel, kernel))


class KernelDistance(_KernelMetric):
    r"""The kernel distance from initialization (Fort et al., 2020).

    .. math:: 1 - \frac{\langle\Theta_0, \Theta_t\rangle}{\|\Theta_0\| \, \|\Theta_t\|}

    Example:
        >>> import torch
        >>> metric = KernelDistance()
        >>> metric(torch.eye(2), torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
        tensor(0.2929, dtype=torch.float64)
    """

    plot_upper_bound = 2.0
    label = LABELS["kernel_distance"]

    def compute(self) -> Float64[Tensor, ""]:
        """Returns the distance, a scalar in float64."""
        return KernelSums(*self.kernel_sums).distance


class KernelChange(_KernelMetric):
    r"""The change of the kernel relative to the initial one.

    .. math:: \frac{\|\Theta_t - \Theta_0\|}{\|\Theta_0\|}

    Example:
        >>> import torch
        >>> metric = KernelChange()
        >>> metric(torch.eye(2), torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
        tensor(1., dtype=torch.float64)
    """

    label = LABELS["kernel_change"]

    def compute(self) -> Float64[Tensor, ""]:
        """Returns the change, a scalar in float64."""
        return KernelSums(*self.kernel_sums).change


class KernelTargetAlignment(SummedMetric):
    r"""The cosine between the kernel and the targets' kernel (Cristianini et al., 2001).

    .. math:: \frac{y^\top \Theta_t y}{\|\Theta_t\| \, \|y\|^2}

    Example:
        >>> import torch
        >>> metric = KernelTargetAlignment()
        >>> metric(torch.eye(4), torch.tensor([[1.0, -1.0], [0.0, 1.0]]))
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True
    plot_lower_bound, plot_upper_bound = 0.0, 1.0
    label = "kernel-target alignment\n" r"$y^\top \Theta_t\, y \,/\, (\|\Theta_t\| \|y\|^2)$"
    alignment_sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sums("alignment_sums", 3)

    def update(
        self,
        kernel: Float[Tensor, "rows columns"],
        targets: Shaped[Tensor, "N1 K"] | Shaped[Tensor, "rows"],
        column_targets: Shaped[Tensor, "N2 K"] | Shaped[Tensor, "columns"] | None = None,
    ) -> None:
        r"""Adds a kernel or a block of it.

        Args:
            kernel: :math:`\Theta_t`, `(N1 K, N2 K)`, with rows in sample-major order.
            targets: Targets of its rows, `(N1, K)` or `(N1 K,)`.
            column_targets: Targets of its columns, `(N2, K)` or `(N2 K,)`. Default: `targets`, for N1 = N2.
        """
        columns = targets if column_targets is None else column_targets
        self.alignment_sums += torch.stack(alignment_sums(kernel, targets, columns))

    def compute(self) -> Float64[Tensor, ""]:
        """Returns the alignment, a scalar in float64."""
        return alignment(*self.alignment_sums)
