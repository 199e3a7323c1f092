"""Eigen-modes of the kernel, and the residual in their basis."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ntk.utilities.progress import track_operations

# Rows from which a decomposition takes longer than a second on one core.
_ROWS_OF_SECONDS = 2000


@dataclass(frozen=True)
class Modes:
    """An orthonormal basis in which the dynamics of the linearized network are scalar.

    Attributes:
        eigenvalues: `(m,)`, ascending, float64 on the CPU.
        basis: Eigenvectors in its columns, `(N K, m)`, float64 on any device.
        residual: Coefficients of the initial residual f0 - Y, or of another vector that drives the dynamics, in the basis,
            `(m,)`, float64 on the CPU.
    """

    eigenvalues: Tensor
    basis: Tensor
    residual: Tensor

    def coefficients(self, filtered: Tensor) -> Tensor:
        """The coefficients a = -U (phi * U^T r), `(N K,)` on the CPU: the linearized weights are `w0 + J^T a`."""
        return -self.expand(filtered * self.residual)

    def prediction_change(self, filtered: Tensor) -> Tensor:
        """f_lin - f0 = -U (lambda * phi * U^T r), `(N K,)` on the CPU."""
        return -self.expand(self.eigenvalues.clamp_min(0) * filtered * self.residual)

    def expand(self, values: Tensor) -> Tensor:
        """The vector with these coefficients `(m,)` in the basis, `(N K,)` on the CPU."""
        return (self.basis @ values.to(self.basis)).cpu()

    def cutoff(self, dtype: torch.dtype) -> float:
        """The largest eigenvalue that rounding can make out of zero, for a Jacobian computed in `dtype`.

        Eight roundings of the Jacobian's type, relative to the largest eigenvalue. The customary `N K * eps` would drop
        eigenvalues of real kernels that carry much of the solution; for the float64 factorization itself it is needed.
        """
        relative = max(8 * torch.finfo(dtype).eps, len(self.basis) * torch.finfo(torch.float64).eps)
        return relative * max(self.eigenvalues[-1].item(), 0.0)


def eigh_modes(kernel: Tensor, *vectors: Tensor, progress: bool = False) -> tuple[Modes, ...]:
    """All modes, by a dense eigendecomposition in float64 on the CPU.

    float64 always: float32 puts the weights off by 1e-3 at eta * t * lambda_max = 1e4 on real kernels. On the CPU,
    because float64 is slow on most GPUs and their eigensolvers fail on ill-conditioned kernels.

    Args:
        kernel: `(N K, N K)`, symmetric.
        vectors: f0 - Y, and J e for the vectors e that the weights carry along, each `(N K,)`.
        progress: Whether a decomposition that takes seconds shows a bar.

    Returns:
        For each vector the modes, m = N K of them: the same but for its coefficients.
    """
    matrix = kernel.detach().cpu().double()
    shown = progress and len(matrix) >= _ROWS_OF_SECONDS
    with track_operations("eigendecomposition of the kernel", total=None, enabled=shown):
        eigenvalues, basis = torch.linalg.eigh(matrix)
    return tuple(Modes(eigenvalues, basis, basis.T @ vector.detach().cpu().double()) for vector in vectors)
