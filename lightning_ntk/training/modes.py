"""A linearized problem in the modes of its kernel."""

import logging

import torch
from torch import Tensor

from lightning_ntk.dynamics.filters import Filters
from lightning_ntk.linearization.jacobian import StoredJacobian
from lightning_ntk.solvers.base import ModalSolver
from lightning_ntk.solvers.eigh import CompleteModes
from lightning_ntk.solvers.lanczos import Lanczos, LanczosSolver
from lightning_ntk.solvers.products import jacobian_product, kernel_product
from lightning_ntk.solvers.rounding import measure_rounding
from lightning_ntk.solvers.selection import Sizes, Solver, choose_solver, expected_products
from lightning_ntk.training.base import LinearizedState
from lightning_ntk.training.off_span import OffSpanTerm
from lightning_ntk.training.problem import LinearizedProblem
from lightning_ntk.utilities.shapes import Float

_log = logging.getLogger(__name__)


class ModalProblem:
    """The modes that the residual and the off-span terms of a problem reach.

    Attributes:
        solver: Where the modes come from, for the residual and for every term.
        kernel: The kernel `(N K, N K)`, or None where it was not formed.
        reason: Why this solver, in a sentence.
        rounding: The errors of the passes and of the kernel.

    Raises:
        ValueError: If the loss is not a squared one, or if the kernel is not of this network and data.
        MemoryError: If no way to the modes fits.
    """

    def __init__(
        self,
        problem: LinearizedProblem,
        terms: tuple[OffSpanTerm, ...],
        *,
        solver: Solver,
        lanczos: Lanczos,
        ntk: Float[Tensor, "rows rows"] | None,
    ) -> None:
        self.problem = problem
        self.terms = terms
        self.loss_factor = problem.objective.require_factor()
        vectors = [problem.predictions.cpu().double() - problem.objective.targets, *(term.image for term in terms)]
        sizes = _sizes(problem, ntk, lanczos.horizon, len(vectors))
        free = problem.processes.free_memory("cpu", problem.device)
        choice = choose_solver(sizes, solver=solver, matrix_free=lanczos.matrix_free, free_memory=free)
        self.reason = choice.reason
        _log.info("%s", choice.reason)
        kernel_dtype = choice.way.kernel_dtype
        self.kernel = None if kernel_dtype is None else problem.kernel(ntk, dtype=kernel_dtype)
        # A kernel summed in float64 from passes in float32 has the errors of these passes, and no others.
        own_errors = self.kernel is not None and (ntk is not None or self.kernel.dtype != torch.float64)
        self.rounding = measure_rounding(
            problem.linearization, problem.reference, problem.predictions, problem.objective.targets,
            kernel=self.kernel if own_errors else None, lr_scales=problem.lr_scales,
        )._replace(independent=kernel_dtype is None)  # fmt: skip
        if choice.way.solver == "eigh":
            assert self.kernel is not None
            self.solver: ModalSolver = CompleteModes(self.kernel, vectors, progress=problem.progress)
            return
        expected = expected_products(sizes.rows, lanczos.horizon) if problem.progress else None
        if self.kernel is None:
            product = jacobian_product(problem.pull_back, problem.push_forward, problem.predictions.shape)
        else:
            product = kernel_product(self.kernel, problem.processes)
        device = vectors[0].device if self.kernel is None else self.kernel.device
        self.solver = LanczosSolver(
            product, [vector.flatten().to(device) for vector in vectors], tolerance=lanczos.tolerance,
            max_products=choice.max_products, expected=expected, processes=problem.processes,
        )  # fmt: skip

    def state(self, filters: Filters) -> LinearizedState:
        """Applies filters to the present modes of the solver, without a pass.

        Raises:
            OverflowError: If the filters are not finite, because the dynamics have diverged.
        """
        pairs = list(zip(self.solver.modes, filters.values, strict=True))
        coefficients = torch.stack([modes.coefficients(values) for modes, values in pairs]).sum(0)
        if not coefficients.isfinite().all():
            raise OverflowError(
                "The linearized network has diverged beyond floating-point numbers: the learning rate is above the largest "
                "stable one, `max_learning_rate`."
            )
        predictions = self.problem.predictions.cpu().double()
        change = torch.stack([modes.prediction_change(values) for modes, values in pairs]).sum(0)
        for scale, term in zip(filters.scales, self.terms, strict=True):
            change = change + scale * term.image.flatten()
        return LinearizedState(
            coefficients.view_as(predictions), predictions + change.view_as(predictions), filters.scales
        )


def _sizes(problem: LinearizedProblem, ntk: Tensor | None, horizon: float | None, vectors: int) -> Sizes:
    (samples, outputs), network = problem.predictions.shape, problem.linearization
    stored = isinstance(problem.jacobian, StoredJacobian)
    sizes = Sizes(samples, outputs, network.num_parameters, network.dtype, horizon, ntk is not None, stored, vectors)
    if ntk is not None or stored:
        return sizes
    operations = problem.planned_kernel.operations
    return sizes._replace(kernel_operations=operations.kernel, forward_operations=operations.forward)
