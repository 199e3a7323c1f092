"""Distances between the outputs of a trained network and those of its linearizations."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_ntk.functional.weights import ratio_of_norms
from lightning_ntk.utilities.shapes import Float
from lightning_ntk.utilities.validation import require_same_shape

_PART = 2**20


def prediction_rmse(outputs: Float[Tensor, "N *K"], linearized_outputs: Float[Tensor, "N *K"]) -> float:
    r"""Computes the root mean square difference between the outputs of two networks.

    .. math:: \sqrt{\frac{1}{N K} \sum_{n,k} \bigl(f(x_n; w_t) - f_\text{lin}(x_n; t)\bigr)_k^2}

    Args:
        outputs: Outputs of the trained network, `(N, K)`, or with any other axes after the first.
        linearized_outputs: Outputs of the linearized network at the same time, of the same shape.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> prediction_rmse(torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 2.0]]))
        1.0
    """
    return root_mean(*error_sums(outputs, linearized_outputs)).item()


def taylor_gap(
    outputs: Float[Tensor, "N *K"], taylor_outputs: Float[Tensor, "N *K"], initial_outputs: Float[Tensor, "N *K"]
) -> float:
    r"""Computes the share of the outputs' change that the first-order expansion misses.

    .. math:: \frac{\|f_t - f_0 - J (w_t - w_0)\|}{\|f_t - f_0\|}

    Args:
        outputs: :math:`f_t`, outputs of the network at the trained weights, `(N, K)`.
        taylor_outputs: :math:`f_0 + J (w_t - w_0)`, outputs of its linearization at the same weights, `(N, K)`.
        initial_outputs: :math:`f_0`, `(N, K)`.

    Returns:
        The gap, at least 0. It is 0 if the outputs have not changed and the expansion agrees.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> taylor_gap(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]]), torch.zeros(1, 2))
        0.2
    """
    return ratio_of_norms(*taylor_sums(outputs, taylor_outputs, initial_outputs)).item()


def error_sums(outputs: Tensor, linearized_outputs: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of squared differences in float64, and how many there are."""
    require_same_shape(outputs=outputs, linearized_outputs=linearized_outputs)
    squares = [(own - other).square().sum() for own, other in _parts(outputs, linearized_outputs)]
    return torch.stack(squares).sum(), squares[0].new_full((), outputs.numel())


def root_mean(total: Tensor, count: Tensor) -> Tensor:
    """The root of a mean, NaN for a mean of nothing."""
    return (total / count).sqrt()


def taylor_sums(outputs: Tensor, taylor_outputs: Tensor, initial_outputs: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`\|f_t - f_0 - J (w_t - w_0)\|^2` and :math:`\|f_t - f_0\|^2` in float64."""
    require_same_shape(outputs=outputs, taylor_outputs=taylor_outputs, initial_outputs=initial_outputs)
    squares = [
        torch.stack([(now - taylor).square().sum(), (now - start).square().sum()])
        for now, taylor, start in _parts(outputs, taylor_outputs, initial_outputs)
    ]
    missed, moved = torch.stack(squares).sum(0)
    return missed, moved


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Splits flattened tensors into parts in float64.

    The outputs of language models are too large for whole copies.
    """
    for parts in zip(*(torch.split(tensor.flatten(), _PART) for tensor in tensors), strict=True):
        yield tuple(part.double() for part in parts)
