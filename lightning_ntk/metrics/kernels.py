"""Distances between kernels, accumulated over blocks and processes."""

import math
from typing import Any

from torch import Tensor

from lightning_ntk.functional.kernels import KernelSums, alignment_sums, kernel_sums
from lightning_ntk.functional.weights import ratio
from lightning_ntk.metrics.base import SummedMetric


class _KernelMetric(SummedMetric):
    """The sums over kernel entries, which a `MetricCollection` computes once for all metrics of kernels."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sums("kernel_difference_square", "initial_kernel_square", "kernel_square")

    def update(self, initial_kernel: Tensor, kernel: Tensor) -> None:
        r"""Adds two kernels, or the same block of both: rows of each process, for example.

        Args:
            initial_kernel: :math:`\Theta_0`, `(N1 K, N2 K)`.
            kernel: :math:`\Theta_t`, of the same shape.

        Raises:
            ValueError: If the shapes differ.
        """
        sums = kernel_sums(initial_kernel, kernel)
        self.accumulate(
            kernel_difference_square=sums.difference,
            initial_kernel_square=sums.initial,
            kernel_square=sums.current,
        )

    def kernel_sums(self) -> KernelSums:
        """The sums so far."""
        return KernelSums(*self.sums("kernel_difference_square", "initial_kernel_square", "kernel_square"))


class KernelDistance(_KernelMetric):
    r"""How far the kernel has turned away from the initial one (Fort et al., 2020).

    .. math:: 1 - \frac{\langle\Theta_0, \Theta_t\rangle}{\|\Theta_0\| \, \|\Theta_t\|}

    Updates and processes may bring different blocks of the kernels, or all the same ones: the value is the same.

    Args:
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = KernelDistance()
        >>> metric(torch.eye(2), torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
        tensor(0.2929, dtype=torch.float64)
    """

    label = "kernel distance\n" r"$1 - \cos(\Theta_0, \Theta_t)$"

    def compute(self) -> Tensor:
        """The distance, a scalar in float64."""
        return self.result(self.kernel_sums().distance)


class KernelChange(_KernelMetric):
    r"""The change of the kernel relative to the initial one.

    .. math:: \frac{\|\Theta_t - \Theta_0\|}{\|\Theta_0\|}

    Updates and processes may bring different blocks of the kernels, or all the same ones: the value is the same.

    Args:
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = KernelChange()
        >>> metric(torch.eye(2), torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
        tensor(1., dtype=torch.float64)
    """

    label = "kernel change\n" r"$\|\Theta_t - \Theta_0\| \,/\, \|\Theta_0\|$"

    def compute(self) -> Tensor:
        """The change, a scalar in float64."""
        return self.result(self.kernel_sums().change)


class KernelTargetAlignment(SummedMetric):
    r"""The cosine between the kernel and the one that the targets themselves would make (Cristianini et al., 2001).

    .. math:: \frac{y^\top \Theta_t y}{\|\Theta_t\| \, \|y\|^2}

    Updates and processes may bring different blocks of the kernel, or all the same ones: the value is the same.

    Args:
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = KernelTargetAlignment()
        >>> metric(torch.eye(4), torch.tensor([[1.0, -1.0], [0.0, 1.0]]))
        tensor(0.5000, dtype=torch.float64)
    """

    label = "kernel-target alignment\n" r"$y^\top \Theta_t\, y \,/\, (\|\Theta_t\| \|y\|^2)$"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sums("alignment_product", "aligned_kernel_square", "target_kernel_square")

    def update(self, kernel: Tensor, targets: Tensor, column_targets: Tensor | None = None) -> None:
        r"""Adds a kernel, or a block of it.

        Args:
            kernel: :math:`\Theta_t`, `(N1 K, N2 K)`, rows in sample-major order.
            targets: y of its rows, `(N1, K)` or `(N1 K,)`.
            column_targets: y of its columns, `(N2, K)` or `(N2 K,)`. Default: `targets`, of a kernel with N1 = N2.

        Raises:
            ValueError: If the kernel has not one row and one column for each target.
        """
        columns = targets if column_targets is None else column_targets
        product, kernel_square, target_square = alignment_sums(kernel, targets, columns)
        self.accumulate(
            alignment_product=product,
            aligned_kernel_square=kernel_square,
            target_kernel_square=target_square,
        )

    def compute(self) -> Tensor:
        """The alignment, a scalar in float64."""
        product, kernel_square, target_square = self.sums(
            "alignment_product", "aligned_kernel_square", "target_kernel_square"
        )
        return self.result(ratio(product, math.sqrt(kernel_square) * math.sqrt(target_square)))
