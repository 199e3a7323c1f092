"""Distances between trained and linearized weights."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from lightning_ntk.functional.weights import difference, inner_product, ratio
from lightning_ntk.metrics.base import SummedMetric


class _WeightMetric(SummedMetric):
    """Holds w0 in the type in which it came, on the device of the weights that it is compared with."""

    def __init__(self, initial_weights: Mapping[str, Tensor], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not initial_weights:
            raise ValueError("Expected argument `initial_weights` to hold at least one parameter but it is empty.")
        # No buffers: they would take the type of a module that is cast, and w0 its rounding.
        self.initial_weights = {name: value.detach().clone() for name, value in initial_weights.items()}

    def _displacement(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        initial = self.initial_weights
        differing = sorted(initial.keys() ^ weights.keys())
        if differing:
            raise ValueError(f"Expected weights named as the initial ones are but these names differ: {differing}.")
        for name, value in weights.items():
            if value.shape != initial[name].shape:
                raise ValueError(
                    f"Expected `{name}` of shape {tuple(initial[name].shape)} but got {tuple(value.shape)}."
                )
            initial[name] = initial[name].to(value.device)
        return difference({name: value.detach() for name, value in weights.items()}, initial)


class _LinearizedWeightMetric(_WeightMetric):
    """The sums that all comparisons of w_t with w_lin share, so that a `MetricCollection` computes them once."""

    def __init__(self, initial_weights: Mapping[str, Tensor], **kwargs: Any) -> None:
        super().__init__(initial_weights, **kwargs)
        self.add_sums("weight_distance_square", "displacement_square", "linearized_square", "displacement_product")
        self.add_sums("weight_updates")

    def update(self, weights: Mapping[str, Tensor], linearized_weights: Mapping[str, Tensor]) -> None:
        """Adds one pair of weights.

        Args:
            weights: w_t, by parameter name, as the initial weights are.
            linearized_weights: w_lin(t), likewise.

        Raises:
            ValueError: If names or shapes are not those of the initial weights.
        """
        moved, expected = self._displacement(weights), self._displacement(linearized_weights)
        apart = difference(moved, expected)
        self.accumulate(
            weight_distance_square=inner_product(apart, apart),
            displacement_square=inner_product(moved, moved),
            linearized_square=inner_product(expected, expected),
            displacement_product=inner_product(moved, expected),
            weight_updates=1,
        )


class WeightDistance(_LinearizedWeightMetric):
    r"""How far trained weights are from the linearized ones.

    .. math::
        \|w_t - w_\text{lin}(t)\| \quad\text{or}\quad \frac{\|w_t - w_\text{lin}(t)\|}{\|w_t - w_0\|}

    Several updates, as of an ensemble of networks, and several processes give the root mean square over them, of numerator
    and denominator each. Processes that hold the same weights therefore give the value of one of them.

    Args:
        initial_weights: w_0, by parameter name; it is cloned.
        normalization: "relative" to the displacement of the trained weights, or "absolute".
        kwargs: Options of `torchmetrics.Metric`.

    Raises:
        ValueError: If an argument has a value that it cannot have.

    Example:
        >>> import torch
        >>> metric = WeightDistance({"weight": torch.zeros(2)})
        >>> metric.update({"weight": torch.tensor([3.0, 4.0])}, {"weight": torch.tensor([3.0, 0.0])})
        >>> metric.compute()
        tensor(0.8000, dtype=torch.float64)
    """

    def __init__(
        self,
        initial_weights: Mapping[str, Tensor],
        normalization: Literal["relative", "absolute"] = "relative",
        **kwargs: Any,
    ) -> None:
        super().__init__(initial_weights, **kwargs)
        if normalization not in ("relative", "absolute"):
            raise ValueError(
                f'Expected argument `normalization` to be "relative" or "absolute" but got {normalization!r}.'
            )
        self.normalization = normalization
        self.label = (
            "weight distance\n" r"$\|w_t - w_\mathrm{lin}(t)\|$"
            if normalization == "absolute"
            else "relative weight distance\n" r"$\|w_t - w_\mathrm{lin}(t)\| \,/\, \|w_t - w_0\|$"
        )

    def compute(self) -> Tensor:
        """The distance, a scalar in float64; 0 where neither network has moved."""
        apart, moved, updates = self.sums("weight_distance_square", "displacement_square", "weight_updates")
        if self.normalization == "relative":
            return self.result(ratio(math.sqrt(apart), math.sqrt(moved)))
        return self.result(_root_mean(apart, updates))


class WeightCosine(_LinearizedWeightMetric):
    r"""The cosine between the displacements of trained and linearized weights.

    .. math:: \frac{\langle w_t - w_0, w_\text{lin}(t) - w_0\rangle}{\|w_t - w_0\| \, \|w_\text{lin}(t) - w_0\|}

    Products and squared norms are averaged over updates and processes.

    Args:
        initial_weights: w_0, by parameter name; it is cloned.
        kwargs: Options of `torchmetrics.Metric`.

    Raises:
        ValueError: If there are no weights.

    Example:
        >>> import torch
        >>> metric = WeightCosine({"weight": torch.zeros(2)})
        >>> metric({"weight": torch.tensor([3.0, 4.0])}, {"weight": torch.tensor([3.0, 0.0])})
        tensor(0.6000, dtype=torch.float64)
    """

    label = r"cosine of the displacements $w_t - w_0$ and $w_\mathrm{lin}(t) - w_0$"

    def compute(self) -> Tensor:
        """The cosine, a scalar in float64; 1 where neither network has moved."""
        product, moved, expected = self.sums("displacement_product", "displacement_square", "linearized_square")
        together = moved == expected == 0
        return self.result(1.0 if together else ratio(product, math.sqrt(moved) * math.sqrt(expected)))


class WeightNormRatio(_LinearizedWeightMetric):
    r"""How far the linearized weights have moved, relative to the trained ones.

    .. math:: \frac{\|w_\text{lin}(t) - w_0\|}{\|w_t - w_0\|}

    Squared norms are averaged over updates and processes.

    Args:
        initial_weights: w_0, by parameter name; it is cloned.
        kwargs: Options of `torchmetrics.Metric`.

    Raises:
        ValueError: If there are no weights.

    Example:
        >>> import torch
        >>> metric = WeightNormRatio({"weight": torch.zeros(2)})
        >>> metric({"weight": torch.tensor([3.0, 4.0])}, {"weight": torch.tensor([3.0, 0.0])})
        tensor(0.6000, dtype=torch.float64)
    """

    label = "norm ratio\n" r"$\|w_\mathrm{lin}(t) - w_0\| \,/\, \|w_t - w_0\|$"

    def compute(self) -> Tensor:
        """The ratio, a scalar in float64; 1 where neither network has moved."""
        moved, expected = self.sums("displacement_square", "linearized_square")
        return self.result(1.0 if moved == expected == 0 else ratio(math.sqrt(expected), math.sqrt(moved)))


class Displacement(_WeightMetric):
    r"""How far trained weights have moved, :math:`\|w_t - w_0\|`; the root mean square over updates and processes.

    Args:
        initial_weights: w_0, by parameter name; it is cloned.
        kwargs: Options of `torchmetrics.Metric`.

    Raises:
        ValueError: If there are no weights.

    Example:
        >>> import torch
        >>> metric = Displacement({"weight": torch.zeros(2)})
        >>> metric({"weight": torch.tensor([3.0, 4.0])})
        tensor(5., dtype=torch.float64)
    """

    label = "displacement\n" r"$\|w_t - w_0\|$"

    def __init__(self, initial_weights: Mapping[str, Tensor], **kwargs: Any) -> None:
        super().__init__(initial_weights, **kwargs)
        self.add_sums("moved_square", "moved_updates")

    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Adds trained weights, by parameter name, as the initial weights are.

        Raises:
            ValueError: If names or shapes are not those of the initial weights.
        """
        moved = self._displacement(weights)
        self.accumulate(
            moved_square=inner_product(moved, moved),
            moved_updates=1,
        )

    def compute(self) -> Tensor:
        """The displacement, a scalar in float64."""
        return self.result(_root_mean(*self.sums("moved_square", "moved_updates")))


def _root_mean(total: float, count: float) -> float:
    return math.sqrt(total / count) if count else math.nan
