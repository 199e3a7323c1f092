"""What distinguishes a lazy from a rich regime at one time.

The quantities are alignment and rank of the kernel, and rank and change of the features.
"""

import torch
from torch import Tensor

from lightning_ntk.functional.kernels import kernel_target_alignment
from lightning_ntk.functional.weights import ratio, ratio_of_norms
from lightning_ntk.utilities.shapes import Float, Shaped
from lightning_ntk.utilities.validation import require_same_shape


def centered_kernel_target_alignment(kernel: Float[Tensor, "N*K N*K"], targets: Shaped[Tensor, "N K"]) -> float:
    r"""Computes the centered kernel-target alignment (Cortes et al., 2012).

    This is the cosine between the kernel and that of the targets, both centered over the samples.

    .. math:: \frac{y^\top H \Theta H y}{\|H \Theta H\| \, \|H y\|^2}, \qquad H = I - \tfrac1N \mathbf 1 \mathbf 1^\top

    Unlike `kernel_target_alignment`, it does not count what a constant would explain.

    Args:
        kernel: The kernel, `(N K, N K)`, with rows in sample-major order.
        targets: The targets, `(N, K)`.

    Raises:
        ValueError: If the kernel is not square or does not have one row for each target.

    Example:
        >>> centered_kernel_target_alignment(torch.tensor([[3.0, 1.0], [1.0, 3.0]]), torch.tensor([[2.0], [4.0]]))
        1.0
    """
    targets = targets.double().reshape(len(targets), -1)
    samples, outputs = targets.shape
    if kernel.shape != (samples * outputs, samples * outputs):
        return kernel_target_alignment(kernel, targets)  # which says what is wrong
    rows = kernel.double().reshape(samples, outputs, samples, outputs)
    rows = rows - rows.mean(0, keepdim=True)
    rows = rows - rows.mean(2, keepdim=True)
    return kernel_target_alignment(rows.reshape(kernel.shape), targets - targets.mean(0))


def effective_rank(kernel: Float[Tensor, "rows rows"]) -> float:
    r"""Computes the effective rank of a kernel, :math:`R_0` of Bartlett et al. (2020).

    .. math:: \frac{(\operatorname{tr} \Theta)^2}{\|\Theta\|^2} = \frac{(\sum_i \lambda_i)^2}{\sum_i \lambda_i^2}

    Args:
        kernel: The kernel, `(N K, N K)`.

    Returns:
        The rank, 1 for a single direction, N K for a multiple of the identity.

    Raises:
        ValueError: If the kernel is not square.

    Example:
        >>> effective_rank(torch.eye(3)), effective_rank(torch.ones(3, 3))
        (3.0, 1.0)
    """
    if kernel.dim() != 2 or kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"Expected a square kernel but got the shape {tuple(kernel.shape)}.")
    return rank_of(*rank_sums(kernel)).item()


def low_rank_measure(features: Float[Tensor, "N p"], outputs: Float[Tensor, "N K"]) -> float:
    r"""Computes how far features are from the fewest needed (Nam et al., 2024).

    It compares the features before the last layer with the fewest that the outputs need.

    .. math:: D_\text{LR} = 1 - \operatorname{CKA}(\mathcal T, \mathcal T_\text{MP})
        = 1 - \frac{\langle H \Phi \Phi^\top H,\ H P H\rangle}{\|H \Phi \Phi^\top H\| \, \|H P H\|}

    :math:`\mathcal T = \Phi \Phi^\top` is the kernel of the features, and :math:`\mathcal T_\text{MP}` the minimum projection
    operator: the orthogonal projection P onto the span of the K functions that the network has learned, and a constant, which
    centering by :math:`H = I - \mathbf 1 \mathbf 1^\top / N` removes.

    Args:
        features: Inputs of the last linear layer, `(N, p)`.
        outputs: Outputs of the network, `(N, K)`.

    Returns:
        The measure, 0 for features that span the outputs alone, all equally, as in neural collapse (rich), and up to 1 for
        features most of which the outputs do not need (lazy). With N not above p, it is smaller than with many samples.

    Raises:
        ValueError: If the numbers of samples differ.

    Example:
        >>> outputs = torch.eye(3).repeat(4, 1)
        >>> low_rank_measure(outputs @ torch.tensor([[0.0, 2.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 2.0]]), outputs) < 1e-12
        True
    """
    if features.dim() != 2 or outputs.dim() != 2 or len(features) != len(outputs):
        raise ValueError(
            f"Expected features (N, p) and outputs (N, K) but got {tuple(features.shape)} and {tuple(outputs.shape)}."
        )
    features, outputs = features.double(), outputs.double()
    basis, sizes, _ = torch.linalg.svd(outputs, full_matrices=False)
    basis = basis[:, sizes > max(outputs.shape) * torch.finfo(features.dtype).eps * sizes.max()]
    features, basis = features - features.mean(0), basis - basis.mean(0)
    # Products of the features themselves: (N, N) would be the kernels.
    product = (basis.T @ features).square().sum()
    norms = (features.T @ features).norm() * (basis.T @ basis).norm()
    return 1 - ratio(product, norms).item()


def activation_change(initial: Float[Tensor, "*shape"], activations: Float[Tensor, "*shape"]) -> float:
    r"""Computes the relative change of a layer's activations, :math:`\|h_t - h_0\| / \|h_0\|`.

    Args:
        initial: :math:`h_0`, activations at the initial weights, of any shape.
        activations: :math:`h_t`, those of the same samples now.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> activation_change(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
        0.1
    """
    return ratio_of_norms(*change_sums(initial, activations)).item()


def rank_sums(kernel: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """The trace and the squared norm over rows of a kernel, in float64."""
    return kernel.diagonal(first_row).double().sum(), kernel.double().square().sum()


def rank_of(trace: Tensor, square: Tensor) -> Tensor:
    r""":math:`(\operatorname{tr} \Theta)^2 / \|\Theta\|^2`."""
    return ratio(trace.square(), square)


def change_sums(initial: Tensor, activations: Tensor) -> tuple[Tensor, Tensor]:
    """The squared norms of the change and of the initial activations, in float64."""
    require_same_shape(initial=initial, activations=activations)
    initial = initial.double()
    return (activations.double() - initial).square().sum(), initial.square().sum()
