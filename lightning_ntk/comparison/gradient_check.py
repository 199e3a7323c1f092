"""Checks by its first gradient whether a run trains on the linearized loss."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_ntk.functional.weights import parameter_distances, ratio, weight_sums

_EXPECTED = "the loss that is linearized"


class GradientMismatch(NamedTuple):
    r"""The difference between a run's gradient g and the expected one.

    The expected gradient is :math:`\bar g = J^T \partial L / \partial f`.

    Attributes:
        relative: :math:`|g - \bar g| / |\bar g|`; infinite if only :math:`\bar g` is zero.
        factor: The c that brings :math:`c \bar g` closest to g.
        remainder: :math:`|g - c \bar g| / |c \bar g|`, which no factor explains; infinite if c is zero.
        tolerance: The part that rounding explains.
        parameters: The three parameters at most that hold most of the remainder, largest first, each with its own
            :math:`|g_p - \bar g_p| / |\bar g_p|`.
    """

    relative: float
    factor: float
    remainder: float
    tolerance: float
    parameters: tuple[tuple[str, float], ...]

    @property
    def is_factor(self) -> bool:
        """Whether a factor, positive or negative, explains the difference."""
        return self.factor != 0 and self.remainder <= self.tolerance

    def describe(self) -> str:
        """Describes the mismatch and its likely form in one or two sentences."""
        if not math.isfinite(self.factor):
            return f"The gradient of the run's step, or that of {_EXPECTED}, holds NaN or infinity."
        if math.isinf(self.relative):
            return f"The run's gradient is not zero but that of {_EXPECTED} is."
        if self.is_factor:
            return f"The run's gradient is {self.factor:.4g} times that of {_EXPECTED}."
        worst = ", ".join(f"`{name}` ({mismatch:.2g})" for name, mismatch in self.parameters)
        return (
            f"The run's gradient differs from that of {_EXPECTED} by {self.relative:.2g} of its norm, and by "
            f"{self.remainder:.2g} after the best factor, {self.factor:.4g}. Parameters that differ most: {worst}."
        )


def compiled_noise(module: nn.Module, *, is_compiled: bool = False) -> str | None:
    """Says what to do about the random numbers of a compiled network.

    Args:
        module: The network that trains.
        is_compiled: Whether a Trainer has compiled it, which the module itself does not show.

    Returns:
        A clause; None if the network is not compiled, or draws the numbers of a plain one.
    """
    from torch._inductor import config

    compiled = (name.endswith("_orig_mod") or m._compiled_call_impl is not None for name, m in module.named_modules())
    if config.fallback_random or not (is_compiled or any(compiled)):
        return None
    return (
        "`torch.compile` draws the random numbers of dropout in its own way: set `torch._inductor.config.fallback_random = "
        "True` before training"
    )


def check_gradient(
    actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor], *, dtype: torch.dtype
) -> tuple[float, GradientMismatch | None]:
    r"""Compares the gradient of a run's own backward pass with the expected one.

    The tolerance is :math:`\sqrt{\epsilon}` of `dtype`: 1.5e-8 in float64, 3.5e-4 in float32, 9 % in bfloat16. A layer in
    another mode, labels in another form, or a forgotten factor change the gradient by far more.

    Args:
        actual: Gradients of the run's step before clipping, None for parameters without one.
        expected: The gradient of the loss at the same weights, with the same names and shapes.
        dtype: The least precise type of the run's forward and backward pass, such as that of autocast.

    Returns:
        :math:`|g - \bar g| / |\bar g|`; and None if they agree, or else the mismatch.

    Raises:
        ValueError: If names or shapes differ.
    """
    given = {name: gradient for name, gradient in actual.items() if gradient is not None}
    own = {name: value.new_zeros(()).expand_as(value) for name, value in expected.items() if name in actual} | given
    sums = weight_sums(expected, own)
    tolerance = math.sqrt(torch.finfo(dtype).eps)
    if not (sums.displacement + sums.linearized).isfinite():
        return math.nan, GradientMismatch(math.nan, math.nan, math.nan, tolerance, ())
    relative = sums.relative_distance.item()
    if relative <= tolerance:
        return relative, None
    factor = ratio(sums.product, sums.displacement).item()
    size = abs(factor) * sums.displacement.sqrt()
    unexplained = {name: (own[name].double() - factor * value.double()).norm() for name, value in expected.items()}
    remainder = ratio(torch.stack(list(unexplained.values())).norm(), size).item()
    largest = sorted(unexplained, key=lambda name: unexplained[name].item(), reverse=True)[:3]
    mismatches = parameter_distances(expected, own)
    worst = tuple((name, mismatches[name]) for name in largest)
    return relative, GradientMismatch(relative, factor, remainder, tolerance, worst)
