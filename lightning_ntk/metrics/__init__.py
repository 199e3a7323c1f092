"""The distances as `torchmetrics.Metric` classes: alone, in a `MetricCollection`, and over several processes.

The classes hold sums; the mathematics is in `lightning_ntk.functional.weights` and `lightning_ntk.functional.kernels`.
"""

from lightning_ntk.metrics.kernels import KernelChange, KernelDistance, KernelTargetAlignment
from lightning_ntk.metrics.predictions import PredictionRMSE, TaylorGap
from lightning_ntk.metrics.weights import Displacement, WeightCosine, WeightDistance, WeightNormRatio

__all__ = [
    "Displacement",
    "KernelChange",
    "KernelDistance",
    "KernelTargetAlignment",
    "PredictionRMSE",
    "TaylorGap",
    "WeightCosine",
    "WeightDistance",
    "WeightNormRatio",
]
