"""Distances between two kernels, and between a kernel and the targets."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ntk.functional.weights import ratio, ratio_of_norms
from lightning_ntk.utilities.shapes import Float, Shaped
from lightning_ntk.utilities.validation import require_same_shape


def kernel_distance(initial: Float[Tensor, "rows columns"], kernel: Float[Tensor, "rows columns"]) -> float:
    r"""Measures how far a kernel has turned away from another (Fort et al., 2020).

    .. math:: 1 - \frac{\langle\Theta_0, \Theta_t\rangle}{\|\Theta_0\| \, \|\Theta_t\|}

    Args:
        initial: The kernel to compare with, `(N1 K, N2 K)`.
        kernel: The kernel now, of the same shape.

    Returns:
        The distance, 0 for kernels that are multiples of each other, 1 for orthogonal ones.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> kernel_distance(torch.eye(2), 5 * torch.eye(2))
        0.0
        >>> round(kernel_distance(torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]])), 12)
        1.0
    """
    return kernel_sums(initial, kernel).distance.item()


def kernel_change(initial: Float[Tensor, "rows columns"], kernel: Float[Tensor, "rows columns"]) -> float:
    r"""Computes the relative change of a kernel, :math:`\|\Theta_t - \Theta_0\| / \|\Theta_0\|`.

    Args:
        initial: The kernel to compare with, `(N1 K, N2 K)`.
        kernel: The kernel now, of the same shape.

    Returns:
        The change. Unlike `kernel_distance`, it sees a change of scale.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> kernel_change(torch.eye(2), 5 * torch.eye(2))
        4.0
    """
    return kernel_sums(initial, kernel).change.item()


def kernel_target_alignment(
    kernel: Float[Tensor, "rows rows"], targets: Shaped[Tensor, "N K"] | Shaped[Tensor, "rows"]
) -> float:
    r"""Computes the cosine between the kernel and the targets' kernel (Cristianini et al., 2001).

    .. math:: \frac{y^\top \Theta y}{\|\Theta\| \, \|y\|^2}

    Args:
        kernel: The kernel, `(N K, N K)`, with rows in sample-major order.
        targets: The targets, `(N, K)` or `(N K,)`. Center them first if a constant should not count.

    Returns:
        The alignment, 1 for :math:`\Theta \propto y y^\top`, which is learned in one step, and near 0 for a kernel unrelated
        to the targets.

    Raises:
        ValueError: If the kernel is not square or does not have one row for each target.

    Example:
        >>> kernel_target_alignment(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.tensor([[1.0], [-1.0]]))
        1.0
    """
    return alignment(*alignment_sums(kernel, targets, targets)).item()


class KernelSums(NamedTuple):
    """Squared Frobenius norms of Theta_t - Theta_0, Theta_0 and Theta_t.

    They add up over blocks.
    """

    difference: Tensor
    initial: Tensor
    current: Tensor

    @property
    def distance(self) -> Tensor:
        r""":math:`1 - \langle\Theta_0, \Theta_t\rangle / (\|\Theta_0\| \|\Theta_t\|)`, from 0 to 2."""
        initial, current = self.initial.sqrt(), self.current.sqrt()
        # The textbook form cancels: it leaves no digit of a distance below 1e-16.
        turned = self.difference - (current - initial).square()
        return ratio(turned.clamp_min(0), 2 * initial * current)

    @property
    def change(self) -> Tensor:
        r""":math:`\|\Theta_t - \Theta_0\| / \|\Theta_0\|`."""
        return ratio_of_norms(self.difference, self.initial)


def kernel_sums(initial: Tensor, kernel: Tensor) -> KernelSums:
    """Sums the squared entries of two kernels, in float64.

    Both may be the same block of their kernels.
    """
    require_same_shape(initial=initial, kernel=kernel)
    initial, kernel = initial.double(), kernel.double()
    return KernelSums(*(x.square().sum() for x in (kernel - initial, initial, kernel)))


def alignment_sums(kernel: Tensor, row_targets: Tensor, column_targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Sums what the alignment needs over one block, in float64.

    The sums are :math:`y^\top \Theta z`, :math:`\|\Theta\|^2` and :math:`\|y z^\top\|^2`.
    """
    rows, columns = (targets.double().flatten() for targets in (row_targets, column_targets))
    if kernel.shape != (len(rows), len(columns)):
        raise ValueError(
            f"Expected a kernel of shape {(len(rows), len(columns))}, one row and one column for each target of each sample, "
            f"but got {tuple(kernel.shape)}. Make class labels one-hot."
        )
    kernel = kernel.double()
    product = torch.dot(rows, kernel @ columns)
    return product, kernel.square().sum(), rows.square().sum() * columns.square().sum()


def alignment(product: Tensor, kernel_square: Tensor, target_square: Tensor) -> Tensor:
    r""":math:`y^\top \Theta z / (\|\Theta\| \|y z^\top\|)` from the sums over all blocks."""
    return ratio(product, kernel_square.sqrt() * target_square.sqrt())
