"""The cheapest way to the modes that fits into memory."""

import math
from typing import Literal, NamedTuple

import torch

from lightning_ntk.utilities.memory import format_bytes

Solver = Literal["auto", "eigh", "lanczos"]

# Relative costs of an operation: a matrix product is 1; a factorization and a product with a vector wait for memory.
_EIGH_OPERATIONS = 20.0  # times rows^3
_MEMORY_BOUND = 10.0
_WIDENED = 20.0
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


class Sizes(NamedTuple):
    """The sizes of a problem, which decide the way to its modes.

    Attributes:
        samples: N.
        outputs: K.
        parameters: P.
        dtype: The type of the passes.
        horizon: The largest number of optimizer steps that anyone will ask for, or None if unknown.
        kernel_given: Whether the kernel exists already.
        jacobian_stored: Whether J is kept in memory.
        vectors: Start vectors of Lanczos: the residual, and one more for decaying weights or a momentum buffer.
        kernel_operations: The cost of the kernel; by default (N K)^2 P, half of a contraction of Jacobians.
        forward_operations: The cost of a forward pass over the data; by default 2 N P, each parameter used once.
    """

    samples: int
    outputs: int
    parameters: int
    dtype: torch.dtype
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


class Candidate(NamedTuple):
    """A way to the modes and its cost.

    Attributes:
        name: The way, in words.
        solver: "eigh" or "lanczos".
        operations: Operations, in those of a matrix product.
        memory: Bytes.
        kernel_dtype: The type in which to sum the kernel; None where Lanczos works without one.
    """

    name: str
    solver: Literal["eigh", "lanczos"]
    operations: float
    memory: float
    kernel_dtype: torch.dtype | None = None


class Choice(NamedTuple):
    """The chosen way to the modes.

    Attributes:
        way: The way.
        reason: The choice and its cause, a sentence.
        max_products: How many products with the kernel memory allows.
    """

    way: Candidate
    reason: str
    max_products: int


def expected_products(rows: int, horizon: float | None) -> int:
    """Estimates the kernel products that Lanczos needs for `horizon` steps.

    The estimate is for eta * lambda_max = 1.

    Measured on kernels of real networks for 1e-6 in the weights: about 11, 24, 51 and 90 for 10, 100, 1000 and 10000 steps.
    """
    horizon = _DEFAULT_HORIZON if horizon is None else horizon
    return rows if horizon == math.inf else min(rows, math.ceil(5 * max(horizon, 1) ** (1 / 3)) + 2)


def choose_solver(
    sizes: Sizes, *, solver: Solver = "auto", matrix_free: bool | None = None, free_memory: float
) -> Choice:
    """Chooses the solver with the fewest operations that fits in memory.

    A cheap eigendecomposition is always taken.

    Counted are, with q products expected: for the kernel `sizes.kernel_operations`; for its eigendecomposition
    20 (N K)^3; for Lanczos on it 20 q (N K)^2 + 4 q^2 N K; without it, 6 q times `sizes.forward_operations`
    + 4 q^2 N K, a forward, a backward and a forward-mode pass each time.

    Args:
        sizes: The sizes.
        solver: "eigh" or "lanczos" to require that one.
        matrix_free: Whether Lanczos has to do without (True) or with a kernel (False).
        free_memory: Bytes.

    Raises:
        ValueError: If an eigendecomposition is wanted without a kernel.
        MemoryError: If no way fits.
    """
    if matrix_free and (solver == "eigh" or sizes.kernel_given):
        cause = "`solver` is 'eigh'" if solver == "eigh" else "argument `ntk` is given"
        raise ValueError(
            f"Expected `matrix_free` to be False or None but got True where {cause}, do without one of the two."
        )
    candidates = [
        c for c in _candidates(sizes) if solver in ("auto", c.solver) and matrix_free in (None, c.kernel_dtype is None)
    ]
    fitting = [c for c in candidates if c.memory <= free_memory]
    if not fitting:
        least = min(candidates, key=lambda c: c.memory)
        share, advice = free_memory / least.memory, ""
        if least.kernel_dtype is not None:
            share, advice = math.sqrt(share), ", or solver='lanczos' with matrix_free=True, which needs no kernel"
        raise MemoryError(
            f"The modes of {sizes.samples} samples with {sizes.outputs} outputs need {format_bytes(least.memory)} but "
            f"{format_bytes(free_memory)} are free. Use at most {int(sizes.samples * share)} samples as the reference{advice}."
        )
    few = [c for c in fitting if c.solver == "eigh" and c.operations <= _FEW_OPERATIONS]
    best = min(few or fitting, key=lambda c: c.operations)
    basis = _BASIS_SHARE * free_memory / (8 * sizes.rows * sizes.vectors)
    reason = _reason(sizes, best, fitting, candidates, few=bool(few))
    return Choice(best, reason, int(min(sizes.rows, _MAX_PRODUCTS, max(16.0, basis))))


def _candidates(sizes: Sizes) -> list[Candidate]:
    rows, parameters = float(sizes.rows), float(sizes.parameters)
    products = expected_products(sizes.rows, sizes.horizon)
    jacobian = rows * parameters * sizes.dtype.itemsize if sizes.jacobian_stored else 0.0
    forming = rows**2 * parameters if sizes.kernel_operations is None else sizes.kernel_operations
    kernel = 0.0 if sizes.kernel_given else forming
    orthogonalizing = 4 * rows * products**2 * sizes.vectors
    basis = 3 * 8 * rows * products * sizes.vectors

    def dense(dtype: torch.dtype, name: str, cost: float) -> Candidate:
        held = 0.0 if sizes.kernel_given else dtype.itemsize * rows**2
        operations = kernel + 2 * cost * products * rows**2 + orthogonalizing
        return Candidate(name, "lanczos", operations, jacobian + held + basis, dtype)

    candidates = [
        # The kernel, a copy, the eigenvectors and the workspace of the eigensolver.
        Candidate(
            "the kernel's eigendecomposition", "eigh", kernel + _EIGH_OPERATIONS * rows**3,
            jacobian + 5 * 8 * rows**2, torch.float64,
        ),
        dense(torch.float64, "Lanczos on the kernel", _MEMORY_BOUND),
    ]  # fmt: skip
    if sizes.kernel_given:
        return candidates
    if sizes.dtype != torch.float64:
        # Widened for every product, and of entries that are rounded: only where the other one is too large.
        candidates.append(
            dense(sizes.dtype, f"Lanczos on the kernel in {str(sizes.dtype).removeprefix('torch.')}", _WIDENED)
        )
    forward = 2.0 * sizes.samples * parameters if sizes.forward_operations is None else sizes.forward_operations
    passes = 4 * _MEMORY_BOUND * rows * parameters if sizes.jacobian_stored else _PASSES * forward
    operations = passes * products * sizes.vectors + orthogonalizing
    weights = 3 * 8 * parameters
    return [*candidates, Candidate("Lanczos without a kernel", "lanczos", operations, jacobian + basis + weights)]


def _reason(sizes: Sizes, best: Candidate, fitting: list[Candidate], candidates: list[Candidate], *, few: bool) -> str:
    horizon = "an unknown number of" if sizes.horizon is None else f"{sizes.horizon:g}"
    head = f"Modes by {best.name} for {sizes.rows} rows, {sizes.parameters} parameters and {horizon} steps"
    if len(candidates) == 1:
        return f"{head}: it was asked for."
    if few:
        return f"{head}: {best.operations:.2g} operations are few, and it answers every time exactly."
    counts = ", ".join(
        f"{c.name} {c.operations:.2g}" + ("" if c in fitting else f" (needs {format_bytes(c.memory)}, too much)")
        for c in candidates
    )
    return f"{head}, by counted operations: {counts}."
