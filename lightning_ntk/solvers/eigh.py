"""All modes of a kernel by a dense eigendecomposition."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from lightning_ntk.solvers.base import Modes, Solved, signs
from lightning_ntk.utilities.progress import track_operations
from lightning_ntk.utilities.shapes import Float

T = TypeVar("T")

# Rows from which a decomposition takes longer than a second on one core.
_ROWS_OF_SECONDS = 2000


def eigh_modes(
    kernel: Float[Tensor, "rows rows"], *vectors: Float[Tensor, "rows"], progress: bool = False
) -> tuple[Modes, ...]:
    """Computes all modes of a kernel `(N K, N K)` for several vectors.

    The vectors are `(N K,)`. Their modes differ in the coordinates only.

    By `torch.linalg.eigh` in float64, because float32 puts the weights off by 1e-3 at eta * t * lambda_max = 1e4 on real
    kernels; and on the CPU, because float64 is slow on most GPUs and their eigensolvers fail on ill-conditioned kernels.
    The coordinates of the first vector are not negative. Decompositions that take seconds may show a progress bar.
    """
    first, *others = (vector.detach().cpu().double() for vector in vectors)
    shown = progress and len(kernel) >= _ROWS_OF_SECONDS
    with track_operations("eigendecomposition of the kernel", total=None, enabled=shown):
        eigenvalues, basis = torch.linalg.eigh(kernel.detach().cpu().double())
    coordinates = basis.T @ first
    flips = signs(basis, coordinates)
    basis *= flips
    modes = Modes(eigenvalues, basis, flips * coordinates)
    return modes, *(replace(modes, coordinates=basis.T @ vector) for vector in others)


class CompleteModes:
    """The eigendecomposition of a kernel for the residual and carried vectors.

    These are `(N, K)` each, the carried vectors by their images.
    """

    def __init__(
        self, kernel: Float[Tensor, "N*K N*K"], vectors: Sequence[Float[Tensor, "N K"]], *, progress: bool = False
    ) -> None:
        self.modes: Sequence[Modes] = eigh_modes(kernel, *(vector.flatten() for vector in vectors), progress=progress)

    @property
    def largest_eigenvalue(self) -> float:
        """The kernel's largest eigenvalue."""
        return self.modes[0].eigenvalues[-1].item()

    def refine(self, solve: Callable[[Sequence[Modes]], Solved[T]], *, by_runs: bool = False) -> Solved[T]:
        """The answer on all modes."""
        return solve(self.modes)
