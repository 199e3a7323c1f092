"""Distances between outputs, accumulated over batches and processes."""

from typing import Any

import torch
from torch import Tensor

from lightning_ntk.functional.predictions import error_sums, root_mean, taylor_sums
from lightning_ntk.functional.weights import ratio_of_norms
from lightning_ntk.metrics.base import SummedMetric
from lightning_ntk.plots.history import LABELS
from lightning_ntk.utilities.shapes import Float, Float64


class PredictionRMSE(SummedMetric):
    r"""The root mean square difference between trained and linearized outputs.

    .. math:: \sqrt{\frac{1}{N K} \sum_{n,k} \bigl(f(x_n; w_t) - f_\text{lin}(x_n; t)\bigr)_k^2}

    Unlike `torchmetrics.MeanSquaredError(squared=False)`, it subtracts and sums in float64.

    Example:
        >>> import torch
        >>> metric = PredictionRMSE()
        >>> metric.update(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
        >>> metric.update(torch.tensor([[5.0, 0.0]]), torch.zeros(1, 2))
        >>> metric.compute()
        tensor(3.5355, dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    label = LABELS["prediction_rmse"]
    error_sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sums("error_sums", 2)

    def update(self, outputs: Float[Tensor, "B K"], linearized_outputs: Float[Tensor, "B K"]) -> None:
        """Adds a batch of outputs of both networks, `(B, K)` each.

        Both are from the same time.
        """
        self.error_sums += torch.stack(error_sums(outputs, linearized_outputs))

    def compute(self) -> Float64[Tensor, ""]:
        """Returns the root mean square, a scalar in float64."""
        return root_mean(*self.error_sums)


class TaylorGap(SummedMetric):
    r"""The share of the outputs' change that the first-order expansion misses.

    .. math:: \frac{\|f_t - f_0 - J (w_t - w_0)\|}{\|f_t - f_0\|}

    It asks whether the network is still linear where training has taken it, whichever way it went. With a `Linearization`
    made at the start, one batch is
    `update(linearization.predict_at(weights, x), linearization(weights, x), linearization.predict(x))`.

    Example:
        >>> import torch
        >>> metric = TaylorGap()
        >>> metric(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]]), torch.zeros(1, 2))
        tensor(0.2000, dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    label = LABELS["taylor_gap"]
    taylor_sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sums("taylor_sums", 2)

    def update(
        self, outputs: Float[Tensor, "B K"], taylor_outputs: Float[Tensor, "B K"], initial_outputs: Float[Tensor, "B K"]
    ) -> None:
        """Adds one batch.

        Args:
            outputs: :math:`f_t`, outputs of the network at the trained weights, `(B, K)`.
            taylor_outputs: :math:`f_0 + J (w_t - w_0)`, outputs of its linearization at the same weights, `(B, K)`.
            initial_outputs: :math:`f_0`, `(B, K)`.
        """
        self.taylor_sums += torch.stack(taylor_sums(outputs, taylor_outputs, initial_outputs))

    def compute(self) -> Float64[Tensor, ""]:
        """Returns the gap, a scalar in float64; 0 if the outputs have not changed."""
        return ratio_of_norms(*self.taylor_sums)
