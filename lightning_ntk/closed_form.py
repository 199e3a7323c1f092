"""The filter, and its error bound, of a constant learning rate at any time."""

import logging
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_ntk.dynamics.spectral import gradient_descent_filter, gradient_flow_filter, minimum_norm_filter
from lightning_ntk.error_bounds import ErrorBound, gradient_descent_bound, gradient_flow_bound, minimum_norm_bound
from lightning_ntk.lanczos import LanczosModes
from lightning_ntk.modes import Modes

_log = logging.getLogger(__name__)

Dynamics = Literal["gradient_descent", "gradient_flow"]


@dataclass(frozen=True)
class ClosedForm:
    """Training with one learning rate, as a function of the number of steps.

    Attributes:
        dynamics: "gradient_descent" or "gradient_flow".
        rate: eta, the learning rate times the loss factor.
        dtype: Type of the passes, which decides what counts as zero at t = infinity.
    """

    dynamics: Dynamics
    rate: float
    dtype: torch.dtype

    def filter(self, modes: Modes, t: float | None) -> Tensor:
        """The filter after t steps, None for infinity, `(m,)`."""
        if is_infinite(t):
            cutoff = modes.cutoff(self.dtype)
            _report_dropped(modes, cutoff)
            return minimum_norm_filter(modes.eigenvalues, cutoff)
        assert t is not None
        if self.dynamics == "gradient_flow":
            return gradient_flow_filter(modes.eigenvalues, self.rate * t)
        return gradient_descent_filter(modes.eigenvalues, self.rate, t)

    def bound(self, modes: LanczosModes, t: float | None) -> ErrorBound:
        """The error of the weights after t steps that Ritz values make."""
        if is_infinite(t):
            return minimum_norm_bound(modes, modes.cutoff(self.dtype))
        assert t is not None
        if self.dynamics == "gradient_flow":
            return gradient_flow_bound(modes, self.rate * t)
        return gradient_descent_bound(modes, self.rate, t)


def is_infinite(t: float | None) -> bool:
    """Whether a time stands for the end of training."""
    return t is None or t == math.inf


def _report_dropped(modes: Modes, cutoff: float) -> None:
    dropped = modes.eigenvalues <= cutoff
    energy = modes.residual[dropped].square().sum() / modes.residual.square().sum().clamp_min(1e-300)
    _log.info(
        "At t = infinity %d of %d modes, below %.3g, count as zero; they hold %.3g of the residual's energy.",
        int(dropped.sum()), len(dropped), cutoff, energy.item(),
    )  # fmt: skip
