"""Which way to the modes is the cheapest one that fits into memory."""

import math
from typing import Literal, NamedTuple

from lightning_ntk.utilities.memory import format_bytes

Solver = Literal["auto", "eigh", "lanczos"]

# Relative costs of an operation: a matrix product is 1; a factorization and a product with a vector wait for memory.
_EIGH_OPERATIONS = 20.0  # times rows^3
_MEMORY_BOUND = 10.0
# A forward, a backward and a forward-mode pass, in forward passes.
_PASSES = 6.0
# Below, some seconds on one core, the complete decomposition is preferred: it answers every time exactly.
_FEW_OPERATIONS = 5e11
# Steps that are planned for when nobody says how many there will be.
_DEFAULT_HORIZON = 1e4
# Share of the free memory that the Lanczos basis may grow into.
_BASIS_SHARE = 0.25
# Beyond, Lanczos has no advantage over anything.
_MAX_PRODUCTS = 4000


class Problem(NamedTuple):
    """The sizes that decide.

    Attributes:
        samples: N.
        outputs: K.
        parameters: P.
        itemsize: Bytes of a number in the passes.
        horizon: Largest number of optimizer steps to be asked for, or None if it is not known.
        kernel_given: Whether the kernel is there already.
        jacobian_stored: Whether J is kept in memory.
        vectors: Start vectors of Lanczos: one, and one more for weights that decay or a momentum buffer.
        kernel_operations: What forming the kernel costs; by default (N K)^2 P, half of a contraction of Jacobians.
        forward_operations: What one forward pass over the data costs; by default 2 N P, each parameter used once.
    """

    samples: int
    outputs: int
    parameters: int
    itemsize: int
    horizon: float | None = None
    kernel_given: bool = False
    jacobian_stored: bool = False
    vectors: int = 1
    kernel_operations: float | None = None
    forward_operations: float | None = None

    @property
    def rows(self) -> int:
        """N K."""
        return self.samples * self.outputs


class Choice(NamedTuple):
    """How the modes are found.

    Attributes:
        solver: "eigh" or "lanczos".
        matrix_free: Whether Lanczos goes without a kernel.
        reason: The choice and its cause, a sentence.
        max_products: Products with the kernel that memory allows.
    """

    solver: Literal["eigh", "lanczos"]
    matrix_free: bool
    reason: str
    max_products: int


class _Way(NamedTuple):
    solver: Literal["eigh", "lanczos"]
    matrix_free: bool
    operations: float
    memory: float
    name: str


def expected_products(rows: int, horizon: float | None) -> int:
    """Products with the kernel that Lanczos needs for `horizon` steps at eta * lambda_max = 1.

    Measured on kernels of real networks for 1e-6 in the weights: about 11, 24, 51 and 90 for 10, 100, 1000 and 10000 steps.
    """
    horizon = _DEFAULT_HORIZON if horizon is None else horizon
    return rows if horizon == math.inf else min(rows, math.ceil(5 * max(horizon, 1) ** (1 / 3)) + 2)


def choose_solver(
    problem: Problem, *, solver: Solver = "auto", matrix_free: bool | None = None, free_memory: float
) -> Choice:
    """The way with the fewest operations among those that fit into memory; a cheap eigendecomposition is always taken.

    Counted are, with q products expected: for the kernel `problem.kernel_operations`; for its eigendecomposition
    20 (N K)^3; for Lanczos on it 20 q (N K)^2 + 4 q^2 N K; without it, 6 q times `problem.forward_operations`
    + 4 q^2 N K, a forward, a backward and a forward-mode pass each time.

    Args:
        problem: The sizes.
        solver: "eigh" or "lanczos" to have that one.
        matrix_free: Whether Lanczos has to do without (True) or with a kernel (False).
        free_memory: Bytes.

    Raises:
        ValueError: If an eigendecomposition is wanted without a kernel.
        MemoryError: If no way fits.
    """
    if matrix_free and (solver == "eigh" or problem.kernel_given):
        cause = "`solver` is 'eigh'" if solver == "eigh" else "argument `ntk` is given"
        raise ValueError(
            f"Expected `matrix_free` to be False or None but got True where {cause}, do without one of the two."
        )
    allowed = [
        way for way in _ways(problem) if solver in ("auto", way.solver) and matrix_free in (None, way.matrix_free)
    ]
    fitting = [way for way in allowed if way.memory <= free_memory]
    if not fitting:
        least = min(allowed, key=lambda way: way.memory)
        share = free_memory / least.memory if least.matrix_free else math.sqrt(free_memory / least.memory)
        advice = "" if least.matrix_free else ", or solver='lanczos' with matrix_free=True, which needs no kernel"
        raise MemoryError(
            f"The modes of {problem.samples} samples with {problem.outputs} outputs need {format_bytes(least.memory)} but "
            f"{format_bytes(free_memory)} are free. Use at most {int(problem.samples * share)} samples as the reference{advice}."
        )
    best = min(fitting, key=lambda way: way.operations)
    small = fitting[0].solver == "eigh" and fitting[0].operations <= _FEW_OPERATIONS
    if small:
        best = fitting[0]
    products = int(
        min(problem.rows, _MAX_PRODUCTS, max(16.0, _BASIS_SHARE * free_memory / (8 * problem.rows * problem.vectors)))
    )
    return Choice(best.solver, best.matrix_free, _reason(problem, best, fitting, allowed, small=small), products)


def _ways(problem: Problem) -> list[_Way]:
    rows, parameters = float(problem.rows), float(problem.parameters)
    products = expected_products(problem.rows, problem.horizon)
    jacobian = rows * parameters * problem.itemsize if problem.jacobian_stored else 0.0
    matrix = rows**2 * problem.itemsize
    forming = rows**2 * parameters if problem.kernel_operations is None else problem.kernel_operations
    kernel = 0.0 if problem.kernel_given else forming
    held = jacobian if problem.kernel_given else jacobian + matrix
    reorthogonalization = 4 * rows * products**2 * problem.vectors
    basis = 3 * 8 * rows * products * problem.vectors
    dense = _Way(
        "lanczos", False, kernel + 2 * _MEMORY_BOUND * products * rows**2 + reorthogonalization, held + basis,
        "Lanczos on the kernel",
    )  # fmt: skip
    # The kernel in float64, a copy, the eigenvectors and the workspace of the eigensolver.
    eigh = _Way(
        "eigh",
        False,
        kernel + _EIGH_OPERATIONS * rows**3,
        jacobian + 5 * 8 * rows**2,
        "the kernel's eigendecomposition",
    )
    if problem.kernel_given:
        return [eigh, dense]
    forward = 2.0 * problem.samples * parameters if problem.forward_operations is None else problem.forward_operations
    passes = 4 * _MEMORY_BOUND * rows * parameters if problem.jacobian_stored else _PASSES * forward
    weights = 3 * 8 * parameters
    free = _Way(
        "lanczos",
        True,
        passes * products * problem.vectors + reorthogonalization,
        jacobian + basis + weights,
        "Lanczos without a kernel",
    )
    return [eigh, dense, free]


def _reason(problem: Problem, best: _Way, fitting: list[_Way], allowed: list[_Way], *, small: bool) -> str:
    horizon = "an unknown number of" if problem.horizon is None else f"{problem.horizon:g}"
    head = f"Modes by {best.name} for {problem.rows} rows, {problem.parameters} parameters and {horizon} steps"
    if len(allowed) == 1:
        return f"{head}: it was asked for."
    if small:
        return f"{head}: {best.operations:.2g} operations are few, and it answers every time exactly."
    counts = ", ".join(
        f"{way.name} {way.operations:.2g}"
        + ("" if way in fitting else f" (needs {format_bytes(way.memory)}, too much)")
        for way in allowed
    )
    return f"{head}, by counted operations: {counts}."
