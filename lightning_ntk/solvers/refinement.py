"""How modes are refined: Lanczos on demand, until the error bound of what is asked for is met, or all of them at once."""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from lightning_ntk.dynamics.error_bounds import ErrorBound
from lightning_ntk.linearization.jacobian import Jacobian
from lightning_ntk.solvers.base import Modes, eigh_modes
from lightning_ntk.solvers.lanczos import Lanczos, LanczosModes, Product, extend, jacobian_product, kernel_product
from lightning_ntk.utilities.distributed import ALONE, Processes
from lightning_ntk.utilities.progress import track_operations

_log = logging.getLogger(__name__)

# The residual of the largest Ritz pair, relative to its value, at which it counts as the largest eigenvalue.
_LARGEST_EIGENVALUE_TOLERANCE = 1e-4
# Products between two looks at the error, as a share of those made: a look costs an eigendecomposition, ...
_SHARE_BETWEEN_LOOKS = 1 / 16
# ... and where the bound has no closed form, a whole run.
_SHARE_BETWEEN_RUNS = 1 / 4

Bound = Callable[[Sequence[LanczosModes]], ErrorBound]


class ModalSolver(Protocol):
    """Where the modes come from."""

    @property
    def modes(self) -> Sequence[Modes]:
        """The modes for the residual and for every carried vector."""

    @property
    def largest_eigenvalue(self) -> float:
        """Of the kernel, as far as any of these vectors has part in it: never less."""

    def refine(self, bound: Bound, *, by_runs: bool = False) -> ErrorBound:
        """Makes the modes as good as a bound on their error asks for, and returns it."""


class CompleteModes:
    """The eigendecomposition of a kernel, which needs no refinement.

    Args:
        kernel: `(N K, N K)`.
        vectors: The residual and the images of the carried vectors, `(N, K)` each.
        progress: Whether to show a bar.
    """

    def __init__(self, kernel: Tensor, vectors: Sequence[Tensor], *, progress: bool = False) -> None:
        self.modes: Sequence[Modes] = eigh_modes(kernel, *(vector.flatten() for vector in vectors), progress=progress)

    @property
    def largest_eigenvalue(self) -> float:
        """Of the kernel."""
        return self.modes[0].eigenvalues[-1].item()

    def refine(self, bound: Bound, *, by_runs: bool = False) -> ErrorBound:
        """Nothing: the error is zero."""
        return ErrorBound(0.0, 0.0, 0.0)


class LanczosSolver:
    """Ritz pairs that are refined whenever an answer would not meet the tolerance.

    Every start vector has a Krylov space of its own; one product of all of them shares its passes.

    Args:
        product: Products with the kernel.
        vectors: The residual and the images of the carried vectors, `(N K,)` each.
        tolerance: Error of the weights, relative to their displacement from w0, that every answer has to meet, unless the
            rounding of the products is larger.
        max_products: Products after which to stop in any case, with a warning.
        expected: Products that it will probably take, for a progress bar; None for no bar.
        processes: The processes that share the products. All of them stop where the first one does, as rounding may differ
            between machines.
    """

    def __init__(
        self,
        product: Product,
        vectors: Sequence[Tensor],
        *,
        tolerance: float,
        max_products: int,
        expected: int | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self._expected = expected
        self._product = product
        self._processes = processes
        self._krylov = [Lanczos(vector) for vector in vectors]
        self._tolerance = tolerance
        self._max_products = max_products
        self._limit_reported = False
        self._extend(lambda modes: all(_largest_is_settled(m) for m in modes), _SHARE_BETWEEN_LOOKS)

    @property
    def num_products(self) -> int:
        """Products with the kernel made so far, from each start vector whose space was not exhausted before."""
        return max(lanczos.num_products for lanczos in self._krylov)

    @property
    def largest_eigenvalue(self) -> float:
        """An upper estimate, see `LanczosModes.largest_eigenvalue`."""
        return max(modes.largest_eigenvalue for modes in self.modes)

    @property
    def _exhausted(self) -> bool:
        return all(lanczos.exhausted for lanczos in self._krylov)

    def refine(self, bound: Bound, *, by_runs: bool = False) -> ErrorBound:
        """Extends the bases until a bound meets the tolerance, and returns it.

        Args:
            bound: The bound that modes have; they may lack their basis.
            by_runs: Whether computing it takes a whole run, so that it is better asked for seldom.
        """
        current = bound(self.modes)
        if self._processes.any(current.meets(self._tolerance) or self._exhausted):
            return current
        share = _SHARE_BETWEEN_RUNS if by_runs else _SHARE_BETWEEN_LOOKS
        self._extend(lambda modes: bound(modes).meets(self._tolerance), share)
        current = bound(self.modes)
        if not (current.meets(self._tolerance) or self._exhausted or self._limit_reported):
            self._limit_reported = True
            _log.warning(
                "Lanczos stopped after %d products, at a relative error bound of %.3g where %.3g was wanted: more would not fit. "
                "Ask for an earlier time, or use fewer samples.", self.num_products, current.relative, self._tolerance,
            )  # fmt: skip
        return current

    def _extend(self, enough: Callable[[Sequence[LanczosModes]], bool], share: float) -> None:
        description, expected = "Lanczos: products with the kernel", self._expected
        with track_operations(description, total=expected or 0, counted=True, enabled=expected is not None) as advance:
            advance(self.num_products)
            while True:
                for _ in range(max(1 if self._krylov[0].num_products else 2, int(self.num_products * share))):
                    extend(self._krylov, self._product)
                    advance(1)
                complete = self._exhausted or self.num_products >= self._max_products
                if self._processes.any(complete or enough([lanczos.modes(basis=False) for lanczos in self._krylov])):
                    break
        self.modes: Sequence[LanczosModes] = [lanczos.modes() for lanczos in self._krylov]


def solve_by_lanczos(
    jacobian: Jacobian,
    kernel: Tensor | None,
    vectors: Sequence[Tensor],
    *,
    tolerance: float,
    max_products: int,
    expected: int | None = None,
    processes: Processes = ALONE,
) -> LanczosSolver:
    """Lanczos on a kernel, with vectors on its device, or without one, with vectors on the CPU.

    Args:
        jacobian: J, for products without a kernel.
        kernel: `(N K, N K)`, or None.
        vectors: f0 - Y, and the images J e of the carried vectors, `(N, K)` in float64 on the CPU.
        tolerance: As for `LanczosSolver`.
        max_products: As for `LanczosSolver`.
        expected: As for `LanczosSolver`.
        processes: As for `LanczosSolver`.
    """
    if kernel is None:
        product, device = jacobian_product(jacobian, vectors[0].shape), vectors[0].device
    else:
        product, device = kernel_product(kernel, processes), kernel.device
    flat = [vector.flatten().to(device) for vector in vectors]
    return LanczosSolver(
        product, flat, tolerance=tolerance, max_products=max_products, expected=expected, processes=processes
    )


def _largest_is_settled(modes: LanczosModes) -> bool:
    residual = modes.coupling[-1].abs().item()
    return residual <= _LARGEST_EIGENVALUE_TOLERANCE * modes.eigenvalues[-1].item()
