"""Lanczos on demand: the basis grows until the error bound of what is asked for is met."""

import logging
from array import array
from collections.abc import Callable

from torch import Tensor

from lightning_ntk.dynamics.sgd import GradientDescent
from lightning_ntk.dynamics.spectral import GradientFlow
from lightning_ntk.error_bounds import ErrorBound, RunningBound, gradient_flow_bound
from lightning_ntk.jacobian import Jacobian
from lightning_ntk.lanczos import Lanczos, LanczosModes, jacobian_product, kernel_product, vector_device

_log = logging.getLogger(__name__)

# The residual of the largest Ritz pair, relative to its value, at which it counts as the largest eigenvalue.
_LARGEST_EIGENVALUE_TOLERANCE = 1e-4


class LanczosSolver:
    """Ritz pairs that are refined whenever an answer would not meet the tolerance.

    Args:
        lanczos: The process, not necessarily at its start.
        tolerance: Error of the weights, relative to their displacement from w0, that every answer has to meet, unless the
            rounding of the products is larger.
        max_products: Products after which to stop in any case, with a warning.
    """

    def __init__(self, lanczos: Lanczos, *, tolerance: float, max_products: int) -> None:
        self._lanczos = lanczos
        self._tolerance = tolerance
        self._max_products = max_products
        self._limit_reported = False
        self._extend(_largest_is_settled)

    @property
    def num_products(self) -> int:
        """Products with the kernel made so far."""
        return self._lanczos.num_products

    def refine(self, bound: Callable[[LanczosModes], ErrorBound]) -> ErrorBound:
        """Extends the basis until a bound meets the tolerance, and returns it."""
        current = bound(self.modes)
        if current.meets(self._tolerance) or self._lanczos.exhausted:
            return current
        self._extend(lambda modes: bound(modes).meets(self._tolerance))
        current = bound(self.modes)
        if not (current.meets(self._tolerance) or self._lanczos.exhausted or self._limit_reported):
            self._limit_reported = True
            _log.warning(
                "Lanczos stopped after %d products, at a relative error bound of %.3g where %.3g was wanted: more would not fit. "
                "Ask for an earlier time, or use fewer samples.", self.num_products, current.relative, self._tolerance,
            )  # fmt: skip
        return current

    def _extend(self, enough: Callable[[LanczosModes], bool]) -> None:
        lanczos = self._lanczos
        while True:
            # Looking costs an eigendecomposition, hence a share of the steps only.
            for _ in range(max(1 if lanczos.num_products else 2, lanczos.num_products // 16)):
                lanczos.step()
            if lanczos.exhausted or lanczos.num_products >= self._max_products or enough(lanczos.modes(basis=False)):
                break
        self.modes = lanczos.modes()


class LanczosRun:
    """Dynamics on Ritz values, advanced with the learning rates of a run, under the tolerance of the solver.

    The rates are kept: when the basis had to be extended, they are replayed on the new Ritz values, which gives the state
    that a run on these values from the start would have.

    Args:
        solver: The Ritz pairs.
        factor: c, the measured factor of the loss.
        flow: Gradient flow, whose time is the sum of the learning rates, in the place of gradient descent.
    """

    def __init__(self, solver: LanczosSolver, factor: float, *, flow: bool = False) -> None:
        self._solver = solver
        self._factor = factor
        self._flow = flow
        self._rates = array("d")
        self._start(solver.modes)

    def step(self, lr: float) -> None:
        """One optimizer step with this learning rate."""
        self._rates.append(lr)
        self._advance(lr)

    @property
    def filter(self) -> Tensor:
        """The filter after the steps so far, on the present Ritz values of the solver, `(k,)`."""
        self._solver.refine(self._bound)
        self._bound(self._solver.modes)
        return self._dynamics.filter

    @property
    def error_bound(self) -> ErrorBound:
        """Bound on the distance of the weights after the steps so far from the linearised ones."""
        return self._solver.refine(self._bound)

    def _bound(self, modes: LanczosModes) -> ErrorBound:
        if modes is not self._modes:
            self._start(modes)
            for lr in self._rates:
                self._advance(lr)
        if self._flow:
            return gradient_flow_bound(modes, self._factor * sum(self._rates))
        return self._running.result(self._dynamics.filter)

    def _start(self, modes: LanczosModes) -> None:
        self._modes = modes
        online = GradientFlow if self._flow else GradientDescent
        self._dynamics: GradientFlow | GradientDescent = online(modes.eigenvalues, self._factor)
        self._running = RunningBound(modes)

    def _advance(self, lr: float) -> None:
        if not self._flow:
            self._running.step(self._dynamics.filter, lr * self._factor)
        self._dynamics.step(lr)


def solve_by_lanczos(
    jacobian: Jacobian, kernel: Tensor | None, residual: Tensor, *, tolerance: float, max_products: int
) -> LanczosSolver:
    """Lanczos on a kernel, with vectors on its device, or without one, with vectors on the CPU.

    Args:
        jacobian: J, for products without a kernel.
        kernel: `(N K, N K)`, or None.
        residual: f0 - Y, `(N, K)` in float64 on the CPU.
        tolerance: As for `LanczosSolver`.
        max_products: As for `LanczosSolver`.
    """
    flat = residual.flatten()
    if kernel is None:
        product = jacobian_product(jacobian, residual.shape)
    else:
        device = vector_device(kernel.device)
        product, flat = kernel_product(kernel.to(device)), flat.to(device)
    return LanczosSolver(Lanczos(product, flat), tolerance=tolerance, max_products=max_products)


def _largest_is_settled(modes: LanczosModes) -> bool:
    residual = modes.coupling[-1].abs().item()
    return residual <= _LARGEST_EIGENVALUE_TOLERANCE * modes.eigenvalues[-1].item()
