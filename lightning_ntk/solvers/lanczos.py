"""Finds modes by Lanczos from the residual.

It takes a few dozen products with the kernel instead of its eigendecomposition.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from lightning_ntk.solvers.base import ErrorBound, Modes, Solved, Stop, signs
from lightning_ntk.solvers.products import Product
from lightning_ntk.utilities.distributed import ALONE, Processes
from lightning_ntk.utilities.progress import track_operations
from lightning_ntk.utilities.shapes import Float64
from lightning_ntk.utilities.validation import require_choice, require_number

T = TypeVar("T")

_log = logging.getLogger(__name__)

# The residual of the largest Ritz pair, relative to its value, at which it counts as the largest eigenvalue.
_LARGEST_EIGENVALUE_TOLERANCE = 1e-4
# Products between two looks at the error, as a share of those made: a look costs an eigendecomposition, ...
_SHARE_BETWEEN_LOOKS = 1 / 16
# ... and where the bound has no closed form, a whole run.
_SHARE_BETWEEN_RUNS = 1 / 4


@dataclass(frozen=True)
class Lanczos:
    """The Lanczos solver and its options.

    Attributes:
        tolerance: The truncation error to allow in the weights, relative to |w_lin - w0|. Lanczos never asks for more than a
            hundredth of what rounding leaves open: in float32, without a kernel, the weights are off by about 1e-5 after
            1000 steps of eta lambda_max = 1, by 1e-4 after 10000; with one, by a tenth of that.
        horizon: The largest number of steps you will ask for. Lanczos prepares for it at once; later times extend the
            basis. Infinity takes nearly N K products on most networks, because eigenvalues reach down to what counts as
            zero. None: unknown, and Lanczos starts with the first question.
        matrix_free: Whether to work without the kernel, in two passes a product. None: whatever is cheaper.

    Raises:
        ValueError: If an option is out of range.
    """

    tolerance: float = 1e-6
    horizon: float | None = None
    matrix_free: bool | None = None

    def __post_init__(self) -> None:
        require_choice("matrix_free", self.matrix_free, Literal[True, False, None])
        require_number("tolerance", self.tolerance, "a number between 0 and 1")
        if self.horizon is not None:
            require_number("horizon", self.horizon, "a number of optimizer steps or None")
        if self.horizon is not None and not self.horizon >= 0:
            raise ValueError(
                f"Expected argument `horizon` to be at least 0 optimizer steps or None but got {self.horizon}."
            )
        if not 0 < self.tolerance < 1:
            raise ValueError(f"Expected argument `tolerance` to be between 0 and 1 but got {self.tolerance}.")


@dataclass(frozen=True, repr=False)
class LanczosModes(Modes):
    r"""Ritz pairs of the kernel in a vector's Krylov space, as `Modes`.

    After k products, :math:`\Theta V_k = V_k T_k + \beta_k v_{k+1} e_k^\top` with :math:`T_k = U \Lambda U^\top`. The
    eigenvalues are the Ritz values :math:`\Lambda`, the eigenvectors :math:`V_k U` and the coordinates
    :math:`|r| e_1^\top U`. Every filter then gives :math:`a = -|r| V_k \phi(T_k) e_1` (Saad, 1992; Hochbruck & Lubich, 1997).

    Attributes:
        rotation: U, `(k, k)`; the columns of V_k are the `vectors`.
        coupling: :math:`\beta_k e_k^\top U`, `(k,)`: by how much each Ritz pair fails to be an eigenpair. Zero when the
            Krylov space is invariant and the answers exact.
        next_curvature: :math:`\alpha_{k+1} = |J^\top v_{k+1}|^2`.
        diagonal: :math:`\alpha_1, \ldots, \alpha_k`, with :math:`\alpha_l = |J^\top v_l|^2`, not negative.
    """

    rotation: Float64[Tensor, "k k"]
    coupling: Float64[Tensor, "k"]
    next_curvature: float
    diagonal: Float64[Tensor, "k"]

    @property
    def basis(self) -> Float64[Tensor, "rows k"]:
        """The Ritz vectors V_k U as columns, `(N K, k)`."""
        return self.vectors @ self.rotation.to(self.vectors)

    def expand(self, values: Float64[Tensor, "k"]) -> Float64[Tensor, "rows"]:
        """The vector with coordinates `(k,)` in the Ritz vectors, `(N K,)` on the CPU."""
        return super().expand(self.rotation @ values)

    @property
    def largest_eigenvalue(self) -> float:
        """An upper estimate of the largest eigenvalue that the vector has a part in.

        The largest Ritz value, which converges from below, plus the norm of the residual of its Ritz pair.
        """
        return self.eigenvalues[-1].item() + self.coupling[-1].abs().item()


class LanczosProcess:
    """The Lanczos process on a kernel from one vector.

    More products can extend it at any time.

    Differs from `scipy.sparse.linalg.eigsh` in that it

    1. starts from the vector whose image is wanted, and never restarts;
    2. orthogonalizes every new vector twice against all others (Parlett, 1998, section 6.9): without it, copies of
       converged Ritz values appear;
    3. has no tolerance of its own: the caller stops when the answer is good enough, not the eigenpairs.
    """

    def __init__(self, vector: Float64[Tensor, "rows"]) -> None:
        self._norm = vector.norm().item()
        # A network without residual does not move, but its largest eigenvalue still means something.
        start = vector / self._norm if self._norm > 0 else torch.ones_like(vector) / math.sqrt(len(vector))
        self._vectors = start.unsqueeze(0)
        self._diagonal: list[float] = []
        self._off_diagonal: list[float] = []
        self._scale = 0.0

    @property
    def num_products(self) -> int:
        """The number of products made so far.

        It is one more than the number of modes, for the bound, unless the space is exhausted.
        """
        return len(self._diagonal)

    @property
    def exhausted(self) -> bool:
        """Whether the Krylov space is invariant under the kernel.

        More products then add nothing.
        """
        return bool(self._off_diagonal) and self._off_diagonal[-1] == 0

    @property
    def newest(self) -> Float64[Tensor, "rows"]:
        """The basis vector whose product with the kernel comes next, `(N K,)`."""
        return self._vectors[len(self._diagonal)]

    def add(self, vector: Float64[Tensor, "rows"]) -> None:
        """Takes the product of the kernel with `newest`; the space must not be exhausted."""
        index = len(self._diagonal)
        self._reserve(index + 2)
        known = self._vectors[: index + 1]
        size = vector.norm()
        first = known @ vector
        vector = vector - first @ known
        vector = vector - (known @ vector) @ known
        # One transfer a product from a GPU.
        size, beta, coefficient = torch.stack([size, vector.norm(), first[-1]]).tolist()
        self._scale = max(self._scale, size)
        unit = torch.finfo(vector.dtype).eps * self._scale
        # A remainder that is rounding alone has no direction of its own.
        if beta <= 4 * unit * math.sqrt(len(vector)) or index + 1 == len(vector):
            beta = 0.0
        else:
            self._vectors[index + 1] = vector / beta
        self._diagonal.append(coefficient)
        self._off_diagonal.append(beta)

    def modes(self) -> LanczosModes:
        """Computes the Ritz pairs of all products but the last.

        The last serves their error bound. It needs at least two products.
        """
        size = len(self._diagonal) - (not self.exhausted)
        if size < 1:
            raise ValueError(f"Expected at least two products before the first modes but got {self.num_products}.")
        diagonal = torch.tensor(self._diagonal[:size], dtype=torch.float64)
        off_diagonal = torch.tensor(self._off_diagonal[: size - 1], dtype=torch.float64)
        matrix = torch.diag(diagonal) + torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
        values, rotation = torch.linalg.eigh(matrix)
        # Without this, the arbitrary signs of the Ritz vectors would change as the basis grows.
        rotation *= signs(rotation, rotation[0])
        return LanczosModes(
            eigenvalues=values,
            vectors=self._vectors[:size].T,
            coordinates=self._norm * rotation[0],
            rotation=rotation,
            coupling=self._off_diagonal[size - 1] * rotation[-1],
            next_curvature=0.0 if self.exhausted else max(self._diagonal[size], 0.0),
            diagonal=diagonal.clamp_min(0),
        )

    def _reserve(self, count: int) -> None:
        capacity = len(self._vectors)
        if count > capacity:
            grown = self._vectors.new_zeros(max(count, min(capacity + 64, 2 * capacity + 8)), self._vectors.shape[1])
            grown[:capacity] = self._vectors
            self._vectors = grown


class LanczosSolver:
    """Ritz pairs that are refined whenever an answer would miss the tolerance.

    Every vector has a Krylov space of its own; one product of all of them shares its passes.

    Args:
        product: Products with the kernel.
        vectors: The residual and the images of the carried vectors, `(N K,)` each.
        tolerance: As for `Lanczos`.
        max_products: Products after which to stop in any case.
        expected: Products that are probably needed, for a progress bar; None for no bar.
        processes: The processes that share the products. All of them stop where the first one does, because rounding may
            differ between machines.
    """

    def __init__(
        self,
        product: Product,
        vectors: Sequence[Float64[Tensor, "rows"]],
        *,
        tolerance: float,
        max_products: int,
        expected: int | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self._expected = expected
        self._product = product
        self._processes = processes
        self._krylov = [LanczosProcess(vector) for vector in vectors]
        self._tolerance = tolerance
        self._max_products = max_products
        self._limit_reported = False
        self._extend(lambda: all(_largest_is_settled(modes) for modes in self.modes), _SHARE_BETWEEN_LOOKS)

    @property
    def num_products(self) -> int:
        """The number of kernel products made so far.

        It counts those of each vector whose space was not exhausted before.
        """
        return max(process.num_products for process in self._krylov)

    @property
    def largest_eigenvalue(self) -> float:
        """An upper estimate, see `LanczosModes.largest_eigenvalue`."""
        return max(modes.largest_eigenvalue for modes in self.modes)

    def refine(self, solve: Callable[[Sequence[Modes]], Solved[T]], *, by_runs: bool = False) -> Solved[T]:
        """Extends the Krylov spaces until an answer meets the tolerance, and returns that answer."""
        solved = solve(self.modes)

        def enough() -> bool:
            nonlocal solved
            solved = solve(self.modes)
            return solved.bound.meets(self._tolerance)

        if not self._processes.any(self._complete or solved.bound.meets(self._tolerance)):
            self._extend(enough, _SHARE_BETWEEN_RUNS if by_runs else _SHARE_BETWEEN_LOOKS)
        stopped = self._stopped(solved.bound)
        if stopped == "memory" and not self._limit_reported:
            self._limit_reported = True
            _log.warning(
                "Lanczos stopped after %d products, at a relative error bound of %.3g where %.3g was wanted: more would not fit. "
                "Ask for an earlier time, or use fewer samples.", self.num_products, solved.bound.relative, self._tolerance,
            )  # fmt: skip
        return replace(solved, estimate=lambda: solved.bound, products=self.num_products, stopped=stopped)

    @property
    def _complete(self) -> bool:
        return self.num_products >= self._max_products or all(process.exhausted for process in self._krylov)

    def _stopped(self, bound: ErrorBound) -> Stop:
        if all(process.exhausted for process in self._krylov):
            return "complete"
        if self._complete and not bound.meets(self._tolerance):
            return "memory"
        return "rounding" if bound.truncation > self._tolerance * bound.displacement else "tolerance"

    def _extend(self, enough: Callable[[], bool], share: float) -> None:
        description, expected = "modes of the kernel (Lanczos)", self._expected
        with track_operations(description, total=expected or 0, counted=True, enabled=expected is not None) as advance:
            advance(self.num_products)
            while True:
                for _ in range(max(1 if self.num_products else 2, int(self.num_products * share))):
                    extend(self._krylov, self._product)
                    advance(1)
                self.modes: Sequence[LanczosModes] = [process.modes() for process in self._krylov]
                if self._processes.any(enough() or self._complete):
                    break


def extend(krylov: Sequence[LanczosProcess], product: Product) -> None:
    """Adds a product to every process whose space is not exhausted.

    All share the same passes.
    """
    active = [process for process in krylov if not process.exhausted]
    if active:
        vectors = product(torch.stack([process.newest for process in active]))
        for process, vector in zip(active, vectors, strict=True):
            process.add(vector)


def _largest_is_settled(modes: LanczosModes) -> bool:
    residual = modes.coupling[-1].abs().item()
    return residual <= _LARGEST_EIGENVALUE_TOLERANCE * modes.eigenvalues[-1].item()
