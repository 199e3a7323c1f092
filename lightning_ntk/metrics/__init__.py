"""The distances as torchmetrics.Metric classes.

They hold sums; the formulas are those of `lightning_ntk.functional`. Updates and processes may add different batches of outputs
and different blocks of kernels, or all the same ones: the value is the same. Weights of several updates, such as an
ensemble's, are averaged: products and squared norms, each by itself. Updates raise a ValueError if names or shapes differ.
"""

from lightning_ntk.metrics.base import SummedMetric
from lightning_ntk.metrics.kernels import KernelChange, KernelDistance, KernelTargetAlignment
from lightning_ntk.metrics.predictions import PredictionRMSE, TaylorGap
from lightning_ntk.metrics.regimes import (
    ActivationChange,
    CenteredKernelTargetAlignment,
    EffectiveRank,
    LowRankMeasure,
)
from lightning_ntk.metrics.weights import Displacement, WeightCosine, WeightDistance, WeightNormRatio

__all__ = [
    "ActivationChange",
    "CenteredKernelTargetAlignment",
    "Displacement",
    "EffectiveRank",
    "KernelChange",
    "KernelDistance",
    "KernelTargetAlignment",
    "LowRankMeasure",
    "PredictionRMSE",
    "SummedMetric",
    "TaylorGap",
    "WeightCosine",
    "WeightDistance",
    "WeightNormRatio",
]
