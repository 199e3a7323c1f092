"""Distances between two kernels, and between a kernel and the targets: pure functions."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ntk.functional.weights import ratio, require_same_shape


class KernelSums(NamedTuple):
    r"""The sums over kernel entries from which every distance between two kernels follows.

    They add up over blocks of the kernels, and a common factor cancels from the distances.
    """

    difference: float
    r""":math:`\|\Theta_t - \Theta_0\|^2`, squared Frobenius norms like the others."""
    initial: float
    r""":math:`\|\Theta_0\|^2`."""
    current: float
    r""":math:`\|\Theta_t\|^2`."""

    @property
    def distance(self) -> float:
        r""":math:`1 - \langle\Theta_0, \Theta_t\rangle / (\|\Theta_0\| \|\Theta_t\|)`, between 0 and 2."""
        initial, current = math.sqrt(self.initial), math.sqrt(self.current)
        # The textbook form leaves no digit below 1e-16; here what is subtracted is of the order of the result.
        return ratio(max(self.difference - (current - initial) ** 2, 0.0), 2 * initial * current)

    @property
    def change(self) -> float:
        r""":math:`\|\Theta_t - \Theta_0\| / \|\Theta_0\|`."""
        return ratio(math.sqrt(self.difference), math.sqrt(self.initial))


def kernel_sums(initial: Tensor, kernel: Tensor) -> KernelSums:
    """The sums of two kernels, or of the same block of both, in float64.

    Args:
        initial: The kernel to compare with, `(N1 K, N2 K)`.
        kernel: The kernel now, of the same shape.

    Raises:
        ValueError: If the shapes differ.
    """
    require_same_shape(initial=initial, kernel=kernel)
    initial, kernel = initial.double(), kernel.double()
    difference, first, second = (x.square().sum().item() for x in (kernel - initial, initial, kernel))
    return KernelSums(difference, first, second)


def kernel_distance(initial: Tensor, kernel: Tensor) -> float:
    r"""How far a kernel has turned away from another one (Fort et al., 2020).

    .. math:: 1 - \frac{\langle\Theta_0, \Theta_t\rangle}{\|\Theta_0\| \, \|\Theta_t\|}

    Args:
        initial: The kernel to compare with, `(N1 K, N2 K)`.
        kernel: The kernel now, of the same shape.

    Returns:
        The distance: 0 for kernels that are multiples of each other, 1 for orthogonal ones.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> kernel_distance(torch.eye(2), 5 * torch.eye(2))
        0.0
        >>> round(kernel_distance(torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]])), 12)
        1.0
    """
    return kernel_sums(initial, kernel).distance


def kernel_change(initial: Tensor, kernel: Tensor) -> float:
    r"""The change of a kernel relative to what it was, :math:`\|\Theta_t - \Theta_0\| / \|\Theta_0\|`.

    Args:
        initial: The kernel to compare with, `(N1 K, N2 K)`.
        kernel: The kernel now, of the same shape.

    Returns:
        The change, which unlike `kernel_distance` sees a change of scale.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> kernel_change(torch.eye(2), 5 * torch.eye(2))
        4.0
    """
    return kernel_sums(initial, kernel).change


def kernel_target_alignment(kernel: Tensor, targets: Tensor) -> float:
    r"""The cosine between a kernel and the one that the targets themselves would make (Cristianini et al., 2001).

    .. math:: \frac{y^\top \Theta y}{\|\Theta\| \, \|y\|^2}

    Args:
        kernel: `(N K, N K)`, rows in sample-major order.
        targets: `(N, K)` or `(N K,)`; center them first where a constant should not count.

    Returns:
        The alignment: 1 for :math:`\Theta \propto y y^\top`, which is learned in one step, near 0 for a kernel that knows
        nothing of the targets.

    Raises:
        ValueError: If the kernel is not square or has not one row for each target.

    Example:
        >>> kernel_target_alignment(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.tensor([[1.0], [-1.0]]))
        1.0
    """
    product, kernel_square, target_square = alignment_sums(kernel, targets, targets)
    return ratio(product, math.sqrt(kernel_square * target_square))


def alignment_sums(kernel: Tensor, row_targets: Tensor, column_targets: Tensor) -> tuple[float, float, float]:
    r"""The sums of `kernel_target_alignment` over one block of the kernel, in float64.

    Args:
        kernel: `(N1 K, N2 K)`.
        row_targets: y of its rows, `(N1, K)` or `(N1 K,)`.
        column_targets: z of its columns, `(N2, K)` or `(N2 K,)`.

    Returns:
        :math:`y^\top \Theta z`, :math:`\|\Theta\|^2` and :math:`\|y z^\top\|^2`.

    Raises:
        ValueError: If the kernel has not one row and one column for each target.
    """
    rows, columns = (targets.double().flatten() for targets in (row_targets, column_targets))
    if kernel.shape != (len(rows), len(columns)):
        raise ValueError(
            f"Expected a kernel of shape {(len(rows), len(columns))}, one row and one column for each target of each sample, "
            f"but got {tuple(kernel.shape)}. Targets of classes must be one-hot."
        )
    kernel = kernel.double()
    product = torch.dot(rows, kernel @ columns).item()
    return product, kernel.square().sum().item(), (rows.square().sum() * columns.square().sum()).item()
