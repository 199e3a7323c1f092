"""Modes by Lanczos from the residual: a few dozen products with the kernel in the place of its eigendecomposition."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ntk.linearization.jacobian import Jacobian
from lightning_ntk.solvers.base import Modes
from lightning_ntk.utilities.contexts import preserved_rng
from lightning_ntk.utilities.distributed import ALONE, Processes

# Maps vectors `(T, N K)` to their products with the kernel, in float64.
Product = Callable[[Tensor], Tensor]

# Numbers of a kernel in float32 that are widened to float64 at a time: few enough for the processor's cache.
_WIDENED_AT_ONCE = {"cpu": 2**18, "cuda": 2**25}


@dataclass(frozen=True)
class LanczosModes(Modes):
    r"""Ritz pairs of the kernel in the Krylov space of the residual, as `Modes`.

    After k products, :math:`\Theta V_k = V_k T_k + \beta_k v_{k+1} e_k^\top` with :math:`T_k = U \Lambda U^\top`. The
    eigenvalues are the Ritz values :math:`\Lambda`, the basis is :math:`V_k U` and the residual :math:`|r| e_1^\top U`,
    so that every filter gives :math:`a = -|r| V_k \phi(T_k) e_1` (Saad, 1992; Hochbruck & Lubich, 1997).

    Attributes:
        coupling: :math:`\beta_k e_k^\top U`, `(k,)`: by how much each Ritz pair fails to be an eigenpair. Zero when the
            Krylov space is invariant, the answers then being exact.
        next_curvature: :math:`\alpha_{k+1} = |J^\top v_{k+1}|^2`.
        largest_diagonal: The largest :math:`\alpha_1, \ldots, \alpha_k`.
        rounding: The error of the products as measured on the basis, in the basis of the Ritz vectors, `(k, k)`.
    """

    coupling: Tensor
    next_curvature: float
    largest_diagonal: float
    rounding: Tensor

    @property
    def largest_eigenvalue(self) -> float:
        """An upper estimate of the largest eigenvalue that the residual has part in.

        The largest Ritz value, which converges from below, plus the norm of the residual of its Ritz pair.
        """
        return self.eigenvalues[-1].item() + self.coupling[-1].abs().item()


class Lanczos:
    """The Lanczos process on a kernel, from the residual: it can be extended at any time, never started again.

    Every new vector is orthogonalized twice against all others (Parlett, 1998, section 6.9), because without it copies of
    converged Ritz values appear. In exact arithmetic the coefficients on all but the last two vectors are zero; what they
    are instead measures the rounding of the products.

    Args:
        residual: The vector to start from, f0 - Y or J e of a carried vector e, `(N K,)` in float64.
    """

    def __init__(self, residual: Tensor) -> None:
        self._norm = residual.norm().item()
        # A network without residual does not move, but its largest eigenvalue still means something.
        start = residual / self._norm if self._norm > 0 else torch.ones_like(residual) / math.sqrt(len(residual))
        self._vectors = start.unsqueeze(0)
        self._diagonal: list[float] = []
        self._off_diagonal: list[float] = []
        self._errors: list[Tensor] = []
        self._scale = 0.0

    @property
    def num_products(self) -> int:
        """Products made so far: one more than there are modes, for the bound, unless the space is exhausted."""
        return len(self._diagonal)

    @property
    def exhausted(self) -> bool:
        """Whether the Krylov space is invariant under the kernel, so that more products cannot add anything."""
        return bool(self._off_diagonal) and self._off_diagonal[-1] == 0

    @property
    def newest(self) -> Tensor:
        """The basis vector whose product with the kernel comes next, `(N K,)`."""
        return self._vectors[len(self._diagonal)]

    def add(self, vector: Tensor) -> None:
        """Takes the product of the kernel with `newest`; not for a space that is exhausted."""
        index = len(self._diagonal)
        self._reserve(index + 2)
        known = self._vectors[: index + 1]
        size = vector.norm()
        first = known @ vector
        vector = vector - first @ known
        vector = vector - (known @ vector) @ known
        # One transfer a product from a GPU.
        size, beta, *coefficients = torch.cat([torch.stack([size, vector.norm()]), first]).tolist()
        self._scale = max(self._scale, size)
        unit = torch.finfo(vector.dtype).eps * self._scale
        errors = torch.tensor(coefficients, dtype=torch.float64)
        if index > 0:
            errors[-2] -= self._off_diagonal[-1]
        errors[-1] = 0
        self._errors.append(errors)
        # A remainder that is rounding alone has no direction of its own.
        if beta <= 4 * unit * math.sqrt(len(vector)) or index + 1 == len(vector):
            beta = 0.0
        else:
            self._vectors[index + 1] = vector / beta
        self._diagonal.append(coefficients[-1])
        self._off_diagonal.append(beta)

    def modes(self, *, basis: bool = True) -> LanczosModes:
        """The Ritz pairs of all products but the last, which serves their error bound.

        Args:
            basis: Whether to form the basis `(N K, k)`; an empty one serves to find out the error.
        """
        size = len(self._diagonal) - (not self.exhausted)
        if size < 1:
            raise ValueError(f"Expected at least two products before the first modes but got {self.num_products}.")
        diagonal = torch.tensor(self._diagonal[:size], dtype=torch.float64)
        off_diagonal = torch.tensor(self._off_diagonal[: size - 1], dtype=torch.float64)
        matrix = torch.diag(diagonal) + torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
        values, vectors = torch.linalg.eigh(matrix)
        known = self._vectors[:size]
        errors = torch.zeros(size, size, dtype=torch.float64)
        for index, column in enumerate(self._errors[:size]):
            errors[: index + 1, index] = column
        return LanczosModes(
            eigenvalues=values,
            basis=known.T @ vectors.to(known) if basis else known.T[:, :0],
            residual=self._norm * vectors[0],
            coupling=self._off_diagonal[size - 1] * vectors[-1],
            next_curvature=0.0 if self.exhausted else max(self._diagonal[size], 0.0),
            largest_diagonal=diagonal.max().item(),
            rounding=vectors.T @ errors @ vectors,
        )

    def _reserve(self, count: int) -> None:
        capacity = len(self._vectors)
        if count > capacity:
            grown = self._vectors.new_zeros(max(count, min(capacity + 64, 2 * capacity + 8)), self._vectors.shape[1])
            grown[:capacity] = self._vectors
            self._vectors = grown


def extend(krylov: Sequence[Lanczos], product: Product) -> None:
    """One product more for every process whose space is not exhausted, all in the same passes."""
    active = [lanczos for lanczos in krylov if not lanczos.exhausted]
    if active:
        vectors = product(torch.stack([lanczos.newest for lanczos in active]))
        for lanczos, vector in zip(active, vectors, strict=True):
            lanczos.add(vector)


def kernel_product(kernel: Tensor, processes: Processes = ALONE) -> Product:
    """Products with a dense kernel `(N K, N K)`: exact for its numbers, whatever their type.

    A kernel in float32 is widened piece by piece and never copied as a whole: products rounded to float32 would cost
    five digits of what Lanczos can give.

    Args:
        kernel: `(N K, N K)`.
        processes: The processes that share its rows.
    """
    kernel = kernel.detach()
    own = processes.rows(len(kernel))
    part = kernel[own.start : own.stop]
    if kernel.dtype == torch.float64:
        blocks: tuple[Tensor, ...] = (part,)
    else:
        blocks = torch.split(part, max(1, _WIDENED_AT_ONCE.get(kernel.device.type, 2**18) // kernel.shape[1]))

    def product(vectors: Tensor) -> Tensor:
        products = torch.cat([vectors @ block.to(vectors.dtype).T for block in blocks], dim=1)
        if processes.size == 1:
            return products
        joined = vectors.new_zeros(len(vectors), len(kernel))
        joined[:, own.start : own.stop] = products
        return processes.sum_(joined)

    return product


def jacobian_product(jacobian: Jacobian, shape: torch.Size) -> Product:
    """Products J (J^T v) without a kernel: one pass of vector-Jacobian products, one of Jacobian-vector products per vector.

    Args:
        jacobian: J.
        shape: (N, K).
    """

    def product(vectors: Tensor) -> Tensor:
        with preserved_rng():
            pulled = jacobian.vjp(vectors.reshape(-1, *shape))
            pushed = [jacobian.jvp({n: value[i] for n, value in pulled.items()}) for i in range(len(vectors))]
        return torch.stack(pushed).flatten(1).to(vectors)

    return product
