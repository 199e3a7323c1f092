"""Eigenmodes of a kernel, bounds on their error, and the solvers' protocol."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from lightning_ntk.utilities.representation import represent_fields
from lightning_ntk.utilities.shapes import Float64

T = TypeVar("T")

Stop = Literal["complete", "tolerance", "rounding", "memory"]


@dataclass(frozen=True, repr=False)
class Modes:
    """An orthonormal basis in which the dynamics of the linearized network are scalar.

    Attributes:
        eigenvalues: `(m,)`, ascending, float64 on the CPU.
        vectors: Orthonormal columns `(N K, m)`, float64 on any device: the eigenvectors, unless a subclass rotates them.
        coordinates: The vector that drives the dynamics, in the eigenvectors: the initial residual f0 - Y or another one.
            `(m,)`, float64 on the CPU.
    """

    eigenvalues: Float64[Tensor, "m"]
    vectors: Float64[Tensor, "rows m"]
    coordinates: Float64[Tensor, "m"]

    @property
    def basis(self) -> Float64[Tensor, "rows m"]:
        """The eigenvectors as columns, `(N K, m)`."""
        return self.vectors

    def coefficients(self, filtered: Float64[Tensor, "m"]) -> Float64[Tensor, "rows"]:
        """Computes the coefficients a = -U (phi * U^T r) on the CPU.

        They are `(N K,)`. The linearized weights are `w0 + J^T a`.
        """
        return -self.expand(filtered * self.coordinates)

    def prediction_change(self, filtered: Float64[Tensor, "m"]) -> Float64[Tensor, "rows"]:
        """Computes the change of predictions, `(N K,)` on the CPU.

        It is f_lin - f0 = -U (lambda * phi * U^T r).
        """
        return -self.expand(self.eigenvalues.clamp_min(0) * filtered * self.coordinates)

    def expand(self, values: Float64[Tensor, "m"]) -> Float64[Tensor, "rows"]:
        """The vector with coordinates `(m,)` in the eigenvectors, `(N K,)` on the CPU."""
        return (self.vectors @ values.to(self.vectors)).cpu()

    def cutoff(self, dtype: torch.dtype) -> float:
        """The largest eigenvalue that rounding can make out of zero.

        The Jacobian is computed in `dtype`.

        Eight roundings of the Jacobian's type, relative to the largest eigenvalue. The customary `N K * eps` would drop
        eigenvalues of real kernels that carry much of the solution. The float64 factorization itself needs it, however.
        """
        relative = max(8 * torch.finfo(dtype).eps, len(self.vectors) * torch.finfo(torch.float64).eps)
        return relative * max(self.eigenvalues[-1].item(), 0.0)

    def __repr__(self) -> str:
        return represent_fields(self, self.__dataclass_fields__)


class ErrorBound(NamedTuple):
    """A bound on the distance between the computed weights and the linearized ones.

    Attributes:
        truncation: What more products with the kernel could still change.
        rounding: What rounding has changed, which no number of products repairs. Infinite where the passes cannot determine
            the weights.
        displacement: |w - w0|, the scale of a relative error.
    """

    truncation: float
    rounding: float
    displacement: float

    @property
    def total(self) -> float:
        """The bound, in the unit of the weights."""
        return self.truncation + self.rounding

    @property
    def relative(self) -> float:
        """The bound divided by the displacement; 0 if nothing moves."""
        if self.total == 0:
            return 0.0
        return self.total / self.displacement if self.displacement > 0 else math.inf

    def meets(self, tolerance: float) -> bool:
        """Whether more products would not help.

        The truncation is then below a relative tolerance, or a hundredth of the rounding.
        """
        if not math.isfinite(self.displacement):  # diverged beyond floating-point numbers
            return True
        visible = self.rounding / 100 if math.isfinite(self.rounding) else 0.0
        return self.truncation <= max(tolerance * self.displacement, visible)


@dataclass(frozen=True)
class Solved(Generic[T]):
    """An answer computed on modes, and how good it is.

    Attributes:
        filters: The answer.
        estimate: Computes the error of the weights that follow from it.
        products: Products with the kernel behind the modes; 0 for an eigendecomposition.
        stopped: Why there are no more modes: they are "complete", or the bound has met the "tolerance" or fallen below
            the "rounding", or "memory" allows no more.
    """

    filters: T
    estimate: Callable[[], ErrorBound]
    products: int = 0
    stopped: Stop = "complete"

    @cached_property
    def bound(self) -> ErrorBound:
        """The error of the weights, computed when it is first read."""
        return self.estimate()


class ModalSolver(Protocol):
    """Where the modes come from."""

    @property
    def modes(self) -> Sequence[Modes]:
        """The modes of the residual and of every carried vector."""

    @property
    def largest_eigenvalue(self) -> float:
        """The largest eigenvalue that any vector reaches, or an upper estimate."""

    def refine(self, solve: Callable[[Sequence[Modes]], Solved[T]], *, by_runs: bool = False) -> Solved[T]:
        """Refines the modes until an answer is good enough, and returns it.

        Args:
            solve: Computes the answer and its bound on given modes, as often as it takes.
            by_runs: Whether `solve` repeats a whole run, so that the solver should call it seldom.
        """


def signs(basis: Float64[Tensor, "rows m"], coordinates: Float64[Tensor, "m"]) -> Float64[Tensor, "m"]:
    """The signs `(m,)` of eigenvectors that make a vector's coordinates positive.

    The eigenvectors are the columns of `basis`; the coordinates are `(m,)`.

    An eigenvector on which the vector has no part gets a largest component that is positive.
    """
    signs = coordinates.sign()
    (zero,) = (signs == 0).nonzero(as_tuple=True)
    columns = basis[:, zero.to(basis.device)]
    signs[zero] = columns.gather(0, columns.abs().argmax(0, keepdim=True))[0].sign().to(signs)
    return signs
