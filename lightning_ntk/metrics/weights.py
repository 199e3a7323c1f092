"""Distances between trained and linearized weights, averaged over updates and processes."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ntk.functional.predictions import root_mean
from lightning_ntk.functional.weights import WeightSums, difference, weight_sums
from lightning_ntk.metrics.base import SummedMetric
from lightning_ntk.plots.history import LABELS
from lightning_ntk.utilities.shapes import Float64
from lightning_ntk.utilities.validation import require_choice, require_matching


class _WeightMetric(SummedMetric):
    """Holds w0 in its own type, on the device of the weights."""

    def __init__(self, initial_weights: Mapping[str, Tensor], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not initial_weights:
            raise ValueError("Expected argument `initial_weights` to hold at least one parameter but it is empty.")
        # Not buffers: casting a module would round them.
        self.initial_weights = {name: value.detach().clone() for name, value in initial_weights.items()}

    def _displacement(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        require_matching(weights, self.initial_weights)
        self.initial_weights = {name: value.to(weights[name].device) for name, value in self.initial_weights.items()}
        return difference(weights, self.initial_weights)


class _LinearizedWeightMetric(_WeightMetric):
    """The sums that all comparisons of w_t with w_lin share.

    A `MetricCollection` computes them once.
    """

    weight_sums: Tensor
    weight_updates: Tensor

    def __init__(self, initial_weights: Mapping[str, Tensor], **kwargs: Any) -> None:
        super().__init__(initial_weights, **kwargs)
        self.add_sums("weight_sums", 4)
        self.add_sums("weight_updates")

    def update(self, weights: Mapping[str, Tensor], linearized_weights: Mapping[str, Tensor]) -> None:
        """Adds w_t and w_lin(t), with the names and shapes of the initial weights."""
        sums = weight_sums(self._displacement(weights), self._displacement(linearized_weights))
        self.weight_sums += torch.stack(sums)
        self.weight_updates += 1


class WeightDistance(_LinearizedWeightMetric):
    r"""How far trained weights are from the linearized ones.

    .. math::
        \|w_t - w_\text{lin}(t)\| \quad\text{or}\quad \frac{\|w_t - w_\text{lin}(t)\|}{\|w_t - w_0\|}

    Args:
        initial_weights: w_0, by parameter name; it is cloned.
        normalization: "relative" to the displacement of the trained weights, or "absolute".

    Raises:
        ValueError: If there are no weights or the normalization is unknown.

    Example:
        >>> import torch
        >>> metric = WeightDistance({"weight": torch.zeros(2)})
        >>> metric.update({"weight": torch.tensor([3.0, 4.0])}, {"weight": torch.tensor([3.0, 0.0])})
        >>> metric.compute()
        tensor(0.8000, dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound = 0.0

    def __init__(
        self,
        initial_weights: Mapping[str, Tensor],
        normalization: Literal["relative", "absolute"] = "relative",
        **kwargs: Any,
    ) -> None:
        super().__init__(initial_weights, **kwargs)
        require_choice("normalization", normalization, Literal["relative", "absolute"])
        self.normalization = normalization
        self.label = LABELS["weight_distance" if normalization == "absolute" else "relative_weight_distance"]

    def compute(self) -> Float64[Tensor, ""]:
        """Returns the distance, a scalar in float64; 0 if neither network has moved."""
        sums = WeightSums(*self.weight_sums)
        if self.normalization == "relative":
            return sums.relative_distance
        return root_mean(sums.distance, self.weight_updates)


class WeightCosine(_LinearizedWeightMetric):
    r"""The cosine between the displacements of trained and linearized weights.

    .. math:: \frac{\langle w_t - w_0, w_\text{lin}(t) - w_0\rangle}{\|w_t - w_0\| \, \|w_\text{lin}(t) - w_0\|}

    Args:
        initial_weights: w_0, by parameter name; it is cloned.

    Example:
        >>> import torch
        >>> metric = WeightCosine({"weight": torch.zeros(2)})
        >>> metric({"weight": torch.tensor([3.0, 4.0])}, {"weight": torch.tensor([3.0, 0.0])})
        tensor(0.6000, dtype=torch.float64)
    """

    higher_is_better = True
    plot_lower_bound, plot_upper_bound = -1.0, 1.0
    label = LABELS["weight_cosine"]

    def compute(self) -> Float64[Tensor, ""]:
        """Returns the cosine, a scalar in float64; 1 if neither network has moved."""
        return WeightSums(*self.weight_sums).cosine


class WeightNormRatio(_LinearizedWeightMetric):
    r"""How far the linearized weights have moved, relative to the trained ones.

    .. math:: \frac{\|w_\text{lin}(t) - w_0\|}{\|w_t - w_0\|}

    Args:
        initial_weights: w_0, by parameter name; it is cloned.

    Example:
        >>> import torch
        >>> metric = WeightNormRatio({"weight": torch.zeros(2)})
        >>> metric({"weight": torch.tensor([3.0, 4.0])}, {"weight": torch.tensor([3.0, 0.0])})
        tensor(0.6000, dtype=torch.float64)
    """

    plot_lower_bound = 0.0
    label = LABELS["weight_norm_ratio"]

    def compute(self) -> Float64[Tensor, ""]:
        """Returns the ratio, a scalar in float64; 1 if neither network has moved."""
        return WeightSums(*self.weight_sums).norm_ratio


class Displacement(_WeightMetric):
    r"""How far trained weights have moved, :math:`\|w_t - w_0\|`.

    Args:
        initial_weights: w_0, by parameter name; it is cloned.

    Example:
        >>> import torch
        >>> metric = Displacement({"weight": torch.zeros(2)})
        >>> metric({"weight": torch.tensor([3.0, 4.0])})
        tensor(5., dtype=torch.float64)
    """

    plot_lower_bound = 0.0
    label = LABELS["displacement"]
    displacement_square: Tensor
    displacement_updates: Tensor

    def __init__(self, initial_weights: Mapping[str, Tensor], **kwargs: Any) -> None:
        super().__init__(initial_weights, **kwargs)
        self.add_sums("displacement_square")
        self.add_sums("displacement_updates")

    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Adds w_t, with the names and shapes of the initial weights."""
        moved = self._displacement(weights)
        self.displacement_square += weight_sums(moved, moved).displacement
        self.displacement_updates += 1

    def compute(self) -> Float64[Tensor, ""]:
        """Returns the displacement, a scalar in float64."""
        return root_mean(self.displacement_square, self.displacement_updates)
