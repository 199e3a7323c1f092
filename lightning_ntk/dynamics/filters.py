r"""Filters: what training leaves of every mode of the kernel, and their closed forms.

With the kernel's eigenvectors U and the residual r = f0 - Y, the linearized network trained on a squared loss has
:math:`w_t = w_0 - J^\top U \phi_t(\lambda) U^\top r` and predictions :math:`f_t = f_0 - U \lambda \phi_t(\lambda) U^\top r`.
The rate `eta = lr * c` is the learning rate times the measured factor of the loss.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ntk.utilities.shapes import Float64

# Products of time, rate and eigenvalue below which the slope of a filter is that at zero.
_SMALL = 1e-4


class Start(NamedTuple):
    """The coefficients of a carried vector when training starts.

    Attributes:
        weight: Its coefficient q in the weights: 1 for the initial weights, which decay toward zero shrinks.
        buffer: Its coefficient in the momentum buffer: 1 for the buffer that the optimizer brings along.
    """

    weight: float
    buffer: float


class Filters(NamedTuple):
    r"""The linearized weights at one time, as filters on the modes.

    The weights are :math:`w_0 + \sum_j s_j e_j - J^\top U (\phi \tilde r + \sum_j \chi_j \tilde h_j)`.

    Here :math:`h_j = J e_j` for the carried vectors :math:`e_j`, and a tilde marks coordinates in the modes U.

    Attributes:
        values: :math:`\phi, \chi_1, \ldots`, each `(m,)` on the modes of its own vector.
        scales: :math:`s_1, \ldots`, the change of each carried vector's coefficient in the weights.
    """

    values: tuple[Float64[Tensor, "_"], ...]
    scales: tuple[float, ...] = ()


def gradient_descent_filter(
    eigenvalues: Float64[Tensor, "*shape"], rate: float, steps: float
) -> Float64[Tensor, "*shape"]:
    r"""Computes :math:`\phi_t(\lambda) = (1 - (1 - \eta\lambda)^t) / \lambda`.

    The limit at zero is :math:`\eta t`.

    Computed through `expm1` and `log1p`: the textbook form loses all digits where :math:`\eta\lambda` is small. Negative
    eigenvalues, which only rounding makes, count as zero.

    Args:
        eigenvalues: The kernel's eigenvalues, any shape, float64.
        rate: The learning rate times the loss factor, eta.
        steps: The number t of optimizer steps.

    Returns:
        The filter, of the shape of the eigenvalues. It grows without bound in `steps` where eta * eigenvalue > 2.

    Raises:
        ValueError: If `steps` is negative or not a whole number.

    Example:
        >>> gradient_descent_filter(torch.tensor([0.0, 0.5, 1.0, 1.5], dtype=torch.float64), rate=1.0, steps=2)
        tensor([2.0000, 1.5000, 1.0000, 0.5000], dtype=torch.float64)
    """
    if steps != int(steps) or steps < 0:
        raise ValueError(f"Expected argument `t` to be a whole number of optimizer steps, at least 0, but got {steps}.")
    eigenvalues = eigenvalues.clamp_min(0)
    x = rate * eigenvalues
    if steps == 0:
        return torch.zeros_like(eigenvalues)
    below = -torch.expm1(steps * torch.log1p(-x.clamp_max(1)))
    log_growth = steps * torch.log1p(x.clamp_min(1) - 2)  # log1p(-1) = -inf serves x = 1
    above = 1 + log_growth.exp() if steps % 2 else -torch.expm1(log_growth)
    decayed = torch.where(x < 1, below, above)
    return _with_limit(decayed, eigenvalues, limit=rate * steps)


def gradient_flow_filter(eigenvalues: Float64[Tensor, "*shape"], time: float) -> Float64[Tensor, "*shape"]:
    r"""Computes :math:`\phi_t(\lambda) = (1 - e^{-\eta t\lambda}) / \lambda`.

    The limit at zero is :math:`\eta t`.

    Args:
        eigenvalues: The kernel's eigenvalues, any shape, float64.
        time: The sum of the rates of all steps, eta * t.

    Returns:
        The filter, of the shape of the eigenvalues.

    Raises:
        ValueError: If `time` is negative.
    """
    if time < 0:
        raise ValueError(f"Expected argument `t` to be at least 0 but got a time of {time}.")
    eigenvalues = eigenvalues.clamp_min(0)
    return _with_limit(-torch.expm1(-time * eigenvalues), eigenvalues, limit=time)


def gradient_descent_slope(
    eigenvalues: Float64[Tensor, "*shape"], filtered: Float64[Tensor, "*shape"], rate: float, steps: float
) -> Float64[Tensor, "*shape"]:
    r""":math:`\phi_t'(\lambda) = (\eta t (1 - \eta\lambda)^{t-1} - \phi_t) / \lambda`, to four digits.

    Args:
        eigenvalues: The kernel's eigenvalues, any shape, float64.
        filtered: The filter :math:`\phi_t` on them.
        rate: The learning rate times the loss factor, eta.
        steps: The number t of optimizer steps.
    """
    x = rate * eigenvalues.clamp_min(0)
    slope = _divide(steps * rate * (1 - x) ** max(steps - 1, 0) - filtered, eigenvalues)
    return torch.where(steps * x < _SMALL, -(rate**2) * steps * (steps - 1) / 2, slope)


def gradient_flow_slope(
    eigenvalues: Float64[Tensor, "*shape"], filtered: Float64[Tensor, "*shape"], time: float
) -> Float64[Tensor, "*shape"]:
    r""":math:`\phi_t'(\lambda) = (\eta t e^{-\eta t\lambda} - \phi_t) / \lambda`, to four digits.

    Args:
        eigenvalues: The kernel's eigenvalues, any shape, float64.
        filtered: The filter :math:`\phi_t` on them.
        time: The sum of the rates of all steps, eta * t.
    """
    x = time * eigenvalues.clamp_min(0)
    return torch.where(x < _SMALL, -(time**2) / 2, _divide(time * (-x).exp() - filtered, eigenvalues))


def minimum_norm_filter(eigenvalues: Float64[Tensor, "*shape"], cutoff: float) -> Float64[Tensor, "*shape"]:
    r""":math:`\phi_\infty(\lambda) = 1/\lambda` above the cutoff and 0 below: the minimum-norm solution.

    Args:
        eigenvalues: The kernel's eigenvalues, any shape, float64.
        cutoff: The largest eigenvalue that counts as zero.

    Returns:
        The filter, of the shape of the eigenvalues.
    """
    kept = eigenvalues > cutoff
    return torch.where(kept, 1 / torch.where(kept, eigenvalues, 1), 0)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    return numerator / denominator.clamp_min(torch.finfo(torch.float64).tiny)


def _with_limit(numerator: Tensor, eigenvalues: Tensor, limit: float) -> Tensor:
    # The filter is limit * (1 - x/2 + ...) with x = limit * eigenvalue: the limit itself, to the last digit, for small x.
    # The quotient loses digits where x underflows.
    divisible = limit * eigenvalues > 1e-20
    return torch.where(divisible, numerator / torch.where(divisible, eigenvalues, 1), limit)
