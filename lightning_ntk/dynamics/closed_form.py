"""Filters and error bounds of constant settings at any time, without a recurrence."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_ntk.dynamics.error_bounds import (
    combined_bound,
    displacement,
    gradient_descent_bound,
    gradient_flow_bound,
    minimum_norm_bound,
    ridge_bound,
)
from lightning_ntk.dynamics.filters import (
    Filters,
    gradient_descent_filter,
    gradient_flow_filter,
    minimum_norm_filter,
)
from lightning_ntk.solvers.base import ErrorBound, Modes, Solved
from lightning_ntk.solvers.lanczos import LanczosModes

_log = logging.getLogger(__name__)

Dynamics = Literal["gradient_descent", "gradient_flow"]


@dataclass(frozen=True)
class ClosedForm:
    r"""Training with constant settings, as a function of the number of steps.

    Decay shifts the eigenvalues by the ridge :math:`\rho`: toward the initial weights that is all it does. Decay toward zero
    also carries the initial weights along as :math:`q w_0`. In gradient flow :math:`q = e^{-\rho\eta t}`, and the filter of
    :math:`h = J w_0` is :math:`\chi = q\,\phi_t(\lambda) - \phi_t(\lambda + \rho)`. At t = infinity a filter is the change s of
    its vector's coefficient times the filter of the residual. At a rate of 0 nothing moves, at infinity either.

    Attributes:
        dynamics: "gradient_descent" or "gradient_flow".
        rate: The learning rate times the loss factor, eta.
        dtype: The type of the passes, which decides what counts as zero at t = infinity.
        ridge: The shift rho of the eigenvalues, see `lightning_ntk.dynamics.stability.ridge`.
        limits: The change of every carried vector's coefficient until t = infinity.
        norms: The norms of the carried vectors.
    """

    dynamics: Dynamics
    rate: float
    dtype: torch.dtype
    ridge: float = 0.0
    limits: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()

    def solve(self, modes: Sequence[Modes], t: float | None) -> Solved[Filters]:
        """The filters after t steps and the error of the weights that Ritz values make.

        A carried vector drives its modes with at most s in the place of 1, always with the same sign, so that s times the
        bound of the residual holds.

        Args:
            modes: The modes of the residual and of every carried vector.
            t: Optimizer steps, None for infinity. Finite times with carried vectors exist for gradient flow only.
        """
        filters = self._filters(modes, t)
        parts = []
        for own, value, scale in zip(modes, filters.values, (1.0, *filters.scales), strict=True):
            bound = self.bound(own, t)
            size = displacement(own, value)
            parts.append(ErrorBound(abs(scale) * bound.truncation, abs(scale) * bound.rounding, size))
        lengths = [abs(s) * norm for s, norm in zip(filters.scales, self.norms, strict=True)]
        return Solved(filters, combined_bound(parts, lengths))

    def filter(self, modes: Modes, t: float | None) -> Tensor:
        """The filter of the residual after t steps, `(m,)`."""
        shifted = modes.eigenvalues.clamp_min(0) + self.ridge
        if self.rate == 0:
            return torch.zeros_like(shifted)
        if is_infinite(t):
            if self.ridge > 0:
                return 1 / shifted
            cutoff = modes.cutoff(self.dtype)
            _report_dropped(modes, cutoff)
            return minimum_norm_filter(modes.eigenvalues, cutoff)
        if self.dynamics == "gradient_flow":
            return gradient_flow_filter(shifted, self.rate * _finite(t))
        return gradient_descent_filter(shifted, self.rate, _finite(t))

    def bound(self, modes: Modes, t: float | None) -> ErrorBound:
        """The error of the residual's part of the weights after t steps that Ritz values make."""
        if not isinstance(modes, LanczosModes) or self.rate == 0:
            return ErrorBound(0.0, 0.0, 0.0)
        if is_infinite(t):
            if self.ridge > 0:
                return ridge_bound(modes, self.ridge)
            return minimum_norm_bound(modes, modes.cutoff(self.dtype))
        if self.dynamics == "gradient_flow":
            return gradient_flow_bound(modes, self.rate * _finite(t), self.ridge)
        return gradient_descent_bound(modes, self.rate, _finite(t), self.ridge)

    def _filters(self, modes: Sequence[Modes], t: float | None) -> Filters:
        first, *others = modes
        scales = self._scales(t)
        values = [self.filter(first, t)]
        for carried, scale in zip(others, scales, strict=True):
            value = self.filter(carried, t)
            if is_infinite(t):
                values.append(scale * value)
            else:
                values.append((1 + scale) * gradient_flow_filter(carried.eigenvalues, self.rate * _finite(t)) - value)
        return Filters(tuple(values), scales)

    def _scales(self, t: float | None) -> tuple[float, ...]:
        if self.rate == 0:
            return tuple(0.0 for _ in self.limits)
        if is_infinite(t) or not self.limits:
            return self.limits
        return (math.expm1(-self.ridge * self.rate * _finite(t)),)


def is_infinite(t: float | None) -> bool:
    """Whether a time stands for the end of training."""
    return t is None or t == math.inf


def _finite(t: float | None) -> float:
    assert t is not None
    return t


def _report_dropped(modes: Modes, cutoff: float) -> None:
    dropped = modes.eigenvalues <= cutoff
    energy = modes.coordinates[dropped].square().sum() / modes.coordinates.square().sum().clamp_min(1e-300)
    _log.info(
        "At t = infinity %d of %d modes, below %.3g, count as zero; they hold %.3g of the residual's energy.",
        int(dropped.sum()), len(dropped), cutoff, energy.item(),
    )  # fmt: skip
