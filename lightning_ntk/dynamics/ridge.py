r"""Kernel ridge regression on the modes of a kernel.

It gives leave-one-out predictions for any number of ridges, without a refit.

Regression with the ridge :math:`\rho` leaves the residuals :math:`M r` with :math:`M = \rho\,(\Theta + \rho I)^{-1}`. That of
sample n, were its K rows left out, is

.. math:: \big(f^{(-n)} - Y\big)_n = (M_{nn})^{-1} (M r)_n

with the K x K block :math:`M_{nn}`. For one output this is Allen's PRESS (1974); for blocks of rows it is exact as well, by block
inversion.
"""

import math

import torch
from torch import Tensor

from lightning_ntk.solvers.base import Modes
from lightning_ntk.utilities.shapes import Float, Float64

_PER_DECADE = 4
# Numbers that are multiplied at once.
_CHUNK = 2**24


def ridge_grid(modes: Modes, dtype: torch.dtype) -> Float64[Tensor, "R"]:
    """Ridges up to ten times the largest eigenvalue, four per decade.

    The smallest is what counts as zero for passes in `dtype`.

    Raises:
        ValueError: If the kernel is zero.
    """
    low, high = modes.cutoff(dtype), modes.eigenvalues[-1].item()
    if not high > 0:
        raise ValueError("Expected a kernel with a positive eigenvalue but it is zero: the outputs do not move.")
    first, last = math.log10(low), math.log10(high) + 1
    return torch.logspace(first, last, math.ceil(_PER_DECADE * (last - first)) + 1, dtype=torch.float64)


def leave_one_out_residuals(modes: Modes, ridges: Float[Tensor, "R"], outputs: int) -> Float64[Tensor, "R N K"]:
    r"""Computes the leave-one-out residuals :math:`f^{(-n)}(x_n) - y_n`.

    They are those of regressions on all samples but one, with each sample left out once.

    Takes about :math:`2 R K^3 N^2` operations beside the modes, and memory for 128 MiB or one sample's :math:`K^3 N` numbers.

    Args:
        modes: All modes of the kernel `(N K, N K)`, rows in sample-major order, with the coordinates of r = f0 - Y; of
            r = -Y for a regression that starts from zero.
        ridges: The ridges :math:`\rho`, `(R,)`, positive, in the unit of the eigenvalues.
        outputs: K, the number of rows of a sample.

    Returns:
        The residuals, `(R, N, K)` in float64 on the CPU.

    Raises:
        ValueError: If modes are missing, or a ridge is not positive.

    Example:
        >>> from lightning_ntk.solvers.eigh import eigh_modes
        >>> (modes,) = eigh_modes(torch.eye(2), torch.tensor([-1.0, -2.0]))  # samples that know nothing of each other
        >>> leave_one_out_residuals(modes, torch.tensor([0.5]), outputs=1).flatten().tolist()
        [-1.0, -2.0]
    """
    basis = modes.basis
    if basis.shape[0] != basis.shape[1] or len(basis) % outputs:
        raise ValueError(
            f"Expected all modes of a kernel with {outputs} rows for each sample but got {basis.shape[1]} modes of "
            f'{len(basis)} rows. Use solver="eigh".'
        )
    if not bool((ridges > 0).all()):
        raise ValueError(
            f"Expected positive ridges but got {ridges.min().item():g}, with which regression is no smoother."
        )
    eigenvalues, ridges = modes.eigenvalues.clamp_min(0), ridges.double().unsqueeze(1)
    kept = ridges / (eigenvalues + ridges)
    residuals = torch.unflatten(basis @ (kept * modes.coordinates).T.to(basis), 0, (-1, outputs))
    weights, rows = kept.T.to(basis), torch.unflatten(basis, 0, (-1, outputs))
    size = max(1, _CHUNK // (outputs * len(basis) * outputs))
    parts = []
    for some, right in zip(torch.split(rows, size), torch.split(residuals, size), strict=True):
        products = (some.unsqueeze(2) * some.unsqueeze(1)) @ weights  # the blocks M_nn, (n, K, K, R)
        parts.append(torch.linalg.solve(products.permute(3, 0, 1, 2), right.permute(2, 0, 1).unsqueeze(3)).squeeze(3))
    return torch.cat(parts, 1).cpu()
