"""From a captured network to its modes: the solver is chosen, the kernel formed if it is needed."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ntk.kernel import count_operations
from lightning_ntk.linearization.jacobian import StoredJacobian
from lightning_ntk.solvers.base import ModalSolver
from lightning_ntk.solvers.eigh import CompleteModes
from lightning_ntk.solvers.lanczos import Lanczos, solve_by_lanczos
from lightning_ntk.solvers.selection import Sizes, Solver, choose_solver, expected_products
from lightning_ntk.training.problem import Capture, training_kernel
from lightning_ntk.training.scaling import Scaling

_log = logging.getLogger(__name__)


class Solution(NamedTuple):
    """The modes, and how they came about.

    Attributes:
        solver: Of the residual and of the carried vectors.
        kernel: `(N K, N K)`, or None where it was not formed.
        reason: Why this solver, a sentence.
    """

    solver: ModalSolver
    kernel: Tensor | None
    reason: str


def solve(
    capture: Capture,
    vectors: Sequence[Tensor],
    *,
    scaling: Scaling | None,
    ntk: Tensor | None,
    solver: Solver,
    lanczos: Lanczos,
) -> Solution:
    """The modes of a captured network.

    Args:
        capture: The network at w0.
        vectors: f0 - Y, and the images J e of the carried vectors, `(N, K)` in float64 on the CPU.
        scaling: Coordinates in which all learning rates are equal, if they are not.
        ntk: A kernel computed earlier.
        solver: As for `LinearizedTraining`.
        lanczos: The options of Lanczos.

    Raises:
        ValueError: If the kernel is not of this network and data.
        MemoryError: If no way to the modes fits.
    """
    linearization, outputs = capture.linearization, capture.predictions
    sizes = Sizes(
        samples=len(capture.reference),
        outputs=outputs.shape[1],
        parameters=linearization.num_parameters,
        itemsize=linearization.dtype.itemsize,
        horizon=lanczos.horizon,
        kernel_given=ntk is not None,
        jacobian_stored=isinstance(capture.jacobian, StoredJacobian),
        vectors=len(vectors),
    )
    if not (sizes.kernel_given or sizes.jacobian_stored):
        kernel_operations, forward_operations = count_operations(linearization, capture.reference)
        sizes = sizes._replace(kernel_operations=kernel_operations, forward_operations=forward_operations)
    free = capture.processes.free_memory("cpu", capture.device)
    choice = choose_solver(sizes, solver=solver, matrix_free=lanczos.matrix_free, free_memory=free)
    _log.info("%s", choice.reason)
    kernel: Tensor | None = None
    if not choice.matrix_free:
        # Summed in float32, the kernel puts the weights off by 2e-5 at eta * t * lambda_max = 1e4; in float64 by 3e-6.
        # Lanczos is for kernels whose size matters more than that.
        summed = torch.float64 if choice.solver == "eigh" else linearization.dtype
        kernel = _kernel(capture, scaling, ntk, summed)
        if choice.solver == "eigh":
            return Solution(CompleteModes(kernel, vectors, progress=capture.progress), kernel, choice.reason)
    jacobian = capture.jacobian if scaling is None else scaling.capture.jacobian
    modes = solve_by_lanczos(
        jacobian, kernel, vectors, tolerance=lanczos.tolerance, max_products=choice.max_products,
        expected=expected_products(sizes.rows, lanczos.horizon) if capture.progress else None, processes=capture.processes,
    )  # fmt: skip
    return Solution(modes, kernel, choice.reason)


def _kernel(capture: Capture, scaling: Scaling | None, given: Tensor | None, dtype: torch.dtype) -> Tensor:
    return training_kernel(given, capture, dtype=dtype) if scaling is None else scaling.kernel(given, dtype=dtype)
