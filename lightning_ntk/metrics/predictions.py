"""Distances between outputs, accumulated over batches and processes."""

import math
from typing import Any

from torch import Tensor

from lightning_ntk.functional.weights import ratio, require_same_shape
from lightning_ntk.metrics.base import SummedMetric


class PredictionRMSE(SummedMetric):
    r"""The root mean square difference between the outputs of the trained and of the linearized network.

    .. math:: \sqrt{\frac{1}{N K} \sum_{n,k} \bigl(f(x_n; w_t) - f_\text{lin}(x_n; t)\bigr)_k^2}

    Args:
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = PredictionRMSE()
        >>> metric.update(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
        >>> metric.update(torch.tensor([[5.0, 0.0]]), torch.zeros(1, 2))
        >>> metric.compute()
        tensor(3.5355, dtype=torch.float64)
    """

    label = "prediction RMSE\n" r"$\mathrm{rms}\,(f_t - f_\mathrm{lin}(t))$"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sums("prediction_error_square", "prediction_elements")

    def update(self, outputs: Tensor, linearized_outputs: Tensor) -> None:
        """Adds one batch.

        Args:
            outputs: Of the trained network, `(B, K)`.
            linearized_outputs: Of the linearized network at the same time, `(B, K)`.

        Raises:
            ValueError: If the shapes differ.
        """
        require_same_shape(outputs=outputs, linearized_outputs=linearized_outputs)
        self.accumulate(
            prediction_error_square=(outputs.double() - linearized_outputs.double()).square().sum().item(),
            prediction_elements=outputs.numel(),
        )

    def compute(self) -> Tensor:
        """The root mean square, a scalar in float64."""
        error, elements = self.sums("prediction_error_square", "prediction_elements")
        return self.result(math.sqrt(error / elements) if elements else math.nan)


class TaylorGap(SummedMetric):
    r"""The part of the change of the outputs that the first-order expansion at the same weights misses.

    .. math:: \frac{\|f_t - f_0 - J (w_t - w_0)\|}{\|f_t - f_0\|}

    It asks whether the network is still linear where training has taken it, whichever way it went. With a `Linearization`
    made at the start, one batch is
    `update(linearization.predict_at(weights, x), linearization(weights, x), linearization.predict(x))`.

    Args:
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = TaylorGap()
        >>> metric(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]]), torch.zeros(1, 2))
        tensor(0.2000, dtype=torch.float64)
    """

    label = "Taylor gap\n" r"$\|f_t - f_0 - J(w_t - w_0)\| \,/\, \|f_t - f_0\|$"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sums("taylor_gap_square", "output_change_square")

    def update(self, outputs: Tensor, taylor_outputs: Tensor, initial_outputs: Tensor) -> None:
        """Adds one batch.

        Args:
            outputs: :math:`f_t`, of the network at the trained weights, `(B, K)`.
            taylor_outputs: :math:`f_0 + J (w_t - w_0)`, of its linearization at the same weights, `(B, K)`.
            initial_outputs: :math:`f_0`, `(B, K)`.

        Raises:
            ValueError: If the shapes differ.
        """
        require_same_shape(outputs=outputs, taylor_outputs=taylor_outputs, initial_outputs=initial_outputs)
        now = outputs.double()
        self.accumulate(
            taylor_gap_square=(now - taylor_outputs.double()).square().sum().item(),
            output_change_square=(now - initial_outputs.double()).square().sum().item(),
        )

    def compute(self) -> Tensor:
        """The gap, a scalar in float64; 0 where the outputs have not changed."""
        gap, change = self.sums("taylor_gap_square", "output_change_square")
        return self.result(ratio(math.sqrt(gap), math.sqrt(change)))
