"""From a captured network to its modes: the solver is chosen, the kernel formed if it is needed."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ntk.kernel import count_operations
from lightning_ntk.linearization.jacobian import StoredJacobian
from lightning_ntk.linearization.rounding import Rounding, measure_rounding
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
        rounding: The errors of the passes and of the kernel.
    """

    solver: ModalSolver
    kernel: Tensor | None
    reason: str
    rounding: Rounding


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
        dtype=linearization.dtype,
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
    kernel = None if choice.matrix_free else _kernel(capture, scaling, ntk, choice.kernel_dtype)
    own_errors = kernel is not None and (ntk is not None or kernel.dtype != torch.float64)
    rounding = measure_rounding(
        linearization, capture.reference, outputs, capture.objective.targets,
        kernel=kernel if own_errors else None, roots=None if scaling is None else scaling.roots,
    )._replace(independent=choice.matrix_free)  # fmt: skip
    if kernel is not None and choice.solver == "eigh":
        return Solution(CompleteModes(kernel, vectors, progress=capture.progress), kernel, choice.reason, rounding)
    jacobian = capture.jacobian if scaling is None else scaling.capture.jacobian
    modes = solve_by_lanczos(
        jacobian, kernel, vectors, tolerance=lanczos.tolerance, max_products=choice.max_products,
        expected=expected_products(sizes.rows, lanczos.horizon) if capture.progress else None, processes=capture.processes,
    )  # fmt: skip
    return Solution(modes, kernel, choice.reason, rounding)


def _kernel(capture: Capture, scaling: Scaling | None, given: Tensor | None, dtype: torch.dtype) -> Tensor:
    return training_kernel(given, capture, dtype=dtype) if scaling is None else scaling.kernel(given, dtype=dtype)
