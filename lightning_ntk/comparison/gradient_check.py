"""Whether a run trains on the loss that is linearized: its gradient against that of `loss(predict(module, inputs), target)`."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ntk.functional.weights import difference, inner_product, norm, ratio

_EXPECTED = "loss(predict(module, inputs), target)"


class GradientMismatch(NamedTuple):
    r"""How the gradient g of a run's step differs from the expected one, :math:`\bar g = J^T \partial L / \partial f`.

    Attributes:
        relative: :math:`|g - \bar g| / |\bar g|`; infinite if only :math:`\bar g` is zero.
        factor: The c that brings :math:`c \bar g` closest to g.
        remainder: :math:`|g - c \bar g| / |c \bar g|`, what a factor does not explain; infinite where c is zero.
        tolerance: What rounding explains.
        parameters: Parameters with their own :math:`|g_p - \bar g_p| / |\bar g_p|`, of those that hold most of the
            difference that the factor does not explain, largest first; at most three.
    """

    relative: float
    factor: float
    remainder: float
    tolerance: float
    parameters: tuple[tuple[str, float], ...]

    @property
    def is_factor(self) -> bool:
        """Whether a positive or negative factor explains the difference."""
        return self.factor != 0 and self.remainder <= self.tolerance

    def describe(self) -> str:
        """One or two sentences: how large the mismatch is, and what it looks like."""
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


def check_gradient(
    actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor], *, dtype: torch.dtype
) -> GradientMismatch | None:
    r"""Compares the gradient of a run's own backward pass with the expected one.

    The tolerance is :math:`\sqrt{\epsilon}` of `dtype`: 1.5e-8 in float64, 3.5e-4 in float32, 9 % in bfloat16. A layer in
    another mode, labels in another form, or a forgotten factor change the gradient by far more.

    Args:
        actual: Gradients of the run's step before clipping, None for parameters without one.
        expected: The gradient of the loss at the same weights, with the same names and shapes.
        dtype: The least precise type of the run's forward and backward pass, as that of autocast.

    Returns:
        None if they agree, or the mismatch.

    Raises:
        ValueError: If names or shapes differ.
    """
    differing = sorted(actual.keys() ^ expected.keys())
    if differing:
        raise ValueError(f"Expected gradients of the same parameters but these names differ: {differing[:6]}.")
    own: dict[str, Tensor] = {}
    for name, reference in expected.items():
        gradient = actual[name]
        own[name] = torch.zeros_like(reference) if gradient is None else gradient.detach().to(reference.device)
        if own[name].shape != reference.shape:
            raise ValueError(
                f"Expected a gradient of `{name}` of shape {tuple(reference.shape)} but got {tuple(own[name].shape)}."
            )
    tolerance = math.sqrt(torch.finfo(dtype).eps)
    size = norm(expected)
    if not math.isfinite(size + norm(own)):
        return GradientMismatch(math.nan, math.nan, math.nan, tolerance, ())
    relative = ratio(norm(difference(own, expected)), size)
    if relative <= tolerance:
        return None
    factor = ratio(inner_product(own, expected), size**2) if size else 0.0
    explained = {name: factor * reference.double() for name, reference in expected.items()}
    rest = difference(own, explained)
    largest = sorted(rest, key=lambda name: rest[name].norm().item(), reverse=True)[:3]
    parameters = tuple(
        (
            name,
            ratio((own[name].double() - expected[name].double()).norm().item(), expected[name].double().norm().item()),
        )
        for name in largest
    )
    return GradientMismatch(relative, factor, ratio(norm(rest), norm(explained)), tolerance, parameters)
