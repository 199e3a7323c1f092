"""Filters and error bounds of constant settings at any time, without a recurrence."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_ntk.dynamics.error_bounds import error_bound, left_out
from lightning_ntk.dynamics.filters import (
    Filters,
    gradient_descent_filter,
    gradient_descent_slope,
    gradient_flow_filter,
    gradient_flow_slope,
    minimum_norm_filter,
)
from lightning_ntk.dynamics.truncation import (
    gradient_descent_truncation,
    gradient_flow_truncation,
    minimum_norm_truncation,
    ridge_truncation,
)
from lightning_ntk.solvers.base import ErrorBound, Modes, Solved
from lightning_ntk.solvers.lanczos import LanczosModes
from lightning_ntk.solvers.rounding import Rounding
from lightning_ntk.utilities.shapes import Float64

_log = logging.getLogger(__name__)

Dynamics = Literal["gradient_descent", "gradient_flow"]


@dataclass(frozen=True)
class ClosedForm:
    r"""Training with constant settings, as a function of the number of steps.

    Decay shifts the eigenvalues by the ridge :math:`\rho`: toward the initial weights that is all it does. Decay toward zero
    also carries the initial weights along as :math:`q w_0`. In gradient flow :math:`q = e^{-\rho\eta t}`, and the filter of
    :math:`h = J w_0` is :math:`\chi = q\,\phi_t(\lambda) - \phi_t(\lambda + \rho)`. At t = infinity a filter is the change s of
    its vector's coefficient times the filter of the residual. At a rate of 0 nothing ever moves.

    Attributes:
        dynamics: "gradient_descent" or "gradient_flow".
        rate: The learning rate times the loss factor, eta.
        dtype: The type of the passes, which decides what counts as zero at t = infinity.
        ridge: The shift rho of the eigenvalues, see `lightning_ntk.dynamics.stability.ridge`.
        limits: The change of every carried vector's coefficient until t = infinity.
        norms: The norms of the carried vectors.
        rounding: The errors of the passes.
    """

    dynamics: Dynamics
    rate: float
    dtype: torch.dtype
    ridge: float = 0.0
    limits: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    rounding: Rounding = Rounding()  # noqa: RUF009

    def solve(self, modes: Sequence[Modes], t: float | None) -> Solved[Filters]:
        """The filters after t steps, and the error of the weights.

        Args:
            modes: The modes of the residual and of every carried vector.
            t: Optimizer steps, None for infinity. Finite times with carried vectors exist for gradient flow only.
        """
        t = math.inf if t is None else t
        scales = self._scales(t)
        pairs = [self._pair(own, t, scale) for own, scale in zip(modes, (None, *scales), strict=True)]
        filters = Filters(tuple(values for values, _ in pairs), scales)
        return Solved(filters, lambda: self._bound(modes, filters, [slopes for _, slopes in pairs], t))

    def filter(self, modes: Modes, t: float | None) -> Float64[Tensor, "m"]:
        """The filter of the residual after t steps, `(m,)`."""
        return self._pair(modes, math.inf if t is None else t)[0]

    def _bound(self, modes: Sequence[Modes], filters: Filters, slopes: Sequence[Tensor], t: float) -> ErrorBound:
        # A carried vector drives its modes with at most s in the place of 1, always with the same sign.
        drives = [1.0, *(abs(scale) for scale in filters.scales)]
        truncations = [
            drive * self._truncation(own, t) if isinstance(own, LanczosModes) else 0.0
            for own, drive in zip(modes, drives, strict=True)
        ]
        bound = error_bound(modes, filters, slopes, truncations, self.rounding, self.norms)
        if not (t == math.inf and self.ridge == 0 and self.rate > 0):
            return bound
        hidden = sum(
            drive * left_out(own, own.cutoff(self.dtype), self.rounding)
            for own, drive in zip(modes, drives, strict=True)
            if drive > 0
        )
        return bound._replace(rounding=bound.rounding + hidden)

    def _pair(self, modes: Modes, t: float, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """The filter and its slope, of the residual or a carried vector.

        The carried vector has changed by `scale`.
        """
        eigenvalues = modes.eigenvalues.clamp_min(0)
        shifted = eigenvalues + self.ridge
        if self.rate == 0:
            return torch.zeros_like(shifted), torch.zeros_like(shifted)
        if t == math.inf:
            filtered = 1 / shifted if self.ridge > 0 else self._minimum_norm(modes)
            factor = 1.0 if scale is None else scale
            return factor * filtered, -factor * filtered**2
        values, slopes = self._at(shifted, t)
        if scale is None:
            return values, slopes
        free, free_slopes = self._at(eigenvalues, t)
        return (1 + scale) * free - values, (1 + scale) * free_slopes - slopes

    def _at(self, eigenvalues: Tensor, t: float) -> tuple[Tensor, Tensor]:
        if self.dynamics == "gradient_flow":
            values = gradient_flow_filter(eigenvalues, self.rate * t)
            return values, gradient_flow_slope(eigenvalues, values, self.rate * t)
        values = gradient_descent_filter(eigenvalues, self.rate, t)
        return values, gradient_descent_slope(eigenvalues, values, self.rate, t)

    def _minimum_norm(self, modes: Modes) -> Tensor:
        cutoff = modes.cutoff(self.dtype)
        dropped = modes.eigenvalues <= cutoff
        energy = modes.coordinates[dropped].square().sum() / modes.coordinates.square().sum().clamp_min(1e-300)
        _log.info(
            "At t = infinity %d of %d modes, below %.3g, count as zero; they hold %.3g of the residual's energy.",
            int(dropped.sum()), len(dropped), cutoff, energy.item(),
        )  # fmt: skip
        return minimum_norm_filter(modes.eigenvalues, cutoff)

    def _truncation(self, modes: LanczosModes, t: float) -> float:
        """The truncation error of the residual's part of the weights."""
        if self.rate == 0:
            return 0.0
        if t == math.inf:
            if self.ridge > 0:
                return ridge_truncation(modes, self.ridge)
            return minimum_norm_truncation(modes, modes.cutoff(self.dtype))
        if self.dynamics == "gradient_flow":
            return gradient_flow_truncation(modes, self.rate * t, self.ridge)
        return gradient_descent_truncation(modes, self.rate, t, self.ridge)

    def _scales(self, t: float) -> tuple[float, ...]:
        if self.rate == 0:
            return tuple(0.0 for _ in self.limits)
        if t == math.inf or not self.limits:
            return self.limits
        return (math.expm1(-self.ridge * self.rate * t),)


def is_infinite(t: float | None) -> bool:
    """Whether a time stands for the end of training."""
    return t is None or t == math.inf
