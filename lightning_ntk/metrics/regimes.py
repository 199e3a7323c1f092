"""Metrics that distinguish a lazy from a rich regime, accumulated over samples and processes."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_ntk.functional.regimes import (
    centered_kernel_target_alignment,
    change_sums,
    low_rank_measure,
    rank_of,
    rank_sums,
)
from lightning_ntk.functional.weights import ratio_of_norms
from lightning_ntk.metrics.base import SummedMetric
from lightning_ntk.utilities.shapes import Float, Float64, Shaped


class EffectiveRank(SummedMetric):
    r"""The effective rank of the kernel (Bartlett et al., 2020).

    .. math:: \frac{(\operatorname{tr} \Theta)^2}{\|\Theta\|^2}

    Example:
        >>> import torch
        >>> metric = EffectiveRank()
        >>> metric(torch.eye(3))
        tensor(3., dtype=torch.float64)
    """

    plot_lower_bound = 1.0
    label = "effective rank\n" r"$(\mathrm{tr}\,\Theta_t)^2 \,/\, \|\Theta_t\|^2$"
    rank_sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sums("rank_sums", 2)

    def update(self, kernel: Float[Tensor, "rows columns"], first_row: int = 0) -> None:
        r"""Adds a kernel or some of its rows.

        Args:
            kernel: Rows of :math:`\Theta_t`, all columns of them, `(R, N K)`.
            first_row: The number of the first of them.
        """
        self.rank_sums += torch.stack(rank_sums(kernel, first_row))

    def compute(self) -> Float64[Tensor, ""]:
        """Returns the rank, a scalar in float64."""
        return rank_of(*self.rank_sums)


class CenteredKernelTargetAlignment(SummedMetric):
    r"""The cosine between the centered kernels of network and targets (Cortes et al., 2012).

    Both are centered over the samples.

    .. math:: \frac{y^\top H \Theta_t H y}{\|H \Theta_t H\| \, \|H y\|^2}

    Example:
        >>> import torch
        >>> metric = CenteredKernelTargetAlignment()
        >>> metric(torch.tensor([[3.0, 1.0], [1.0, 3.0]]), torch.tensor([[2.0], [4.0]]))
        tensor(1., dtype=torch.float64)
    """

    higher_is_better = True
    plot_lower_bound, plot_upper_bound = 0.0, 1.0
    label = "centered kernel-target alignment\n" r"$y^\top H \Theta_t H y \,/\, (\|H \Theta_t H\| \|H y\|^2)$"

    rows: list[Tensor]
    targets: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, kernel: Float[Tensor, "N1*K columns"], targets: Shaped[Tensor, "N1 K"]) -> None:
        r"""Adds a kernel or some of its rows.

        Args:
            kernel: Rows of :math:`\Theta_t` in order, all columns of them, `(N1 K, N K)`.
            targets: Targets of these rows, `(N1, K)`.
        """
        self.rows.append(kernel)
        self.targets.append(targets)

    def compute(self) -> Float64[Tensor, ""]:
        """Returns the alignment, a scalar in float64."""
        rows, targets = dim_zero_cat(self.rows), dim_zero_cat(self.targets)
        return torch.tensor(centered_kernel_target_alignment(rows, targets), dtype=torch.float64, device=rows.device)


class LowRankMeasure(SummedMetric):
    r"""How far features are from the fewest needed (Nam et al., 2024).

    It compares the features before the last layer with the fewest that the outputs need.

    .. math:: D_\text{LR} = 1 - \operatorname{CKA}(\Phi \Phi^\top, P)

    Example:
        >>> import torch
        >>> metric = LowRankMeasure()
        >>> round(metric(torch.eye(4), torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])).item(), 4)
        0.4226
    """

    higher_is_better = False
    plot_lower_bound, plot_upper_bound = 0.0, 1.0
    label = "low-rank measure\n" r"$1 - \mathrm{CKA}(\Phi_t \Phi_t^\top, P_t)$"

    features: list[Tensor]
    outputs: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("outputs", [], dist_reduce_fx="cat")

    def update(self, features: Float[Tensor, "N p"], outputs: Float[Tensor, "N K"]) -> None:
        """Adds features `(N, p)` and outputs of the network `(N, K)`.

        The features are those before the last linear layer, for the same samples.
        """
        self.features.append(features)
        self.outputs.append(outputs)

    def compute(self) -> Float64[Tensor, ""]:
        """Returns the measure, a scalar in float64."""
        features, outputs = dim_zero_cat(self.features), dim_zero_cat(self.outputs)
        return torch.tensor(low_rank_measure(features, outputs), dtype=torch.float64, device=features.device)


class ActivationChange(SummedMetric):
    r"""The relative change of a layer's activations.

    .. math:: \frac{\|h_t - h_0\|}{\|h_0\|}

    Example:
        >>> import torch
        >>> metric = ActivationChange()
        >>> metric(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.5]]))
        tensor(0.1000, dtype=torch.float64)
    """

    plot_lower_bound = 0.0
    label = "change of activations\n" r"$\|h_t - h_0\| \,/\, \|h_0\|$"
    change_sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sums("change_sums", 2)

    def update(self, initial: Float[Tensor, "*shape"], activations: Float[Tensor, "*shape"]) -> None:
        """Adds activations of some samples at the initial weights and now, of one shape."""
        self.change_sums += torch.stack(change_sums(initial, activations))

    def compute(self) -> Float64[Tensor, ""]:
        """Returns the change, a scalar in float64."""
        return ratio_of_norms(*self.change_sums)
