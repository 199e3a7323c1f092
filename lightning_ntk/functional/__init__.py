"""The distances and what tells regimes, as pure functions: the only copy of every formula."""

from lightning_ntk.functional.kernels import kernel_change, kernel_distance, kernel_target_alignment
from lightning_ntk.functional.predictions import prediction_rmse, taylor_gap
from lightning_ntk.functional.regimes import (
    activation_change,
    centered_kernel_target_alignment,
    effective_rank,
    low_rank_measure,
)
from lightning_ntk.functional.trace import (
    Estimate,
    KernelMoments,
    ProbeVectors,
    gram_matrices,
    interval,
    kernel_moments,
    probe_vectors,
)
from lightning_ntk.functional.verdict import Verdict, judge
from lightning_ntk.functional.weights import difference, inner_product, norm, parameter_distances, weight_distances

__all__ = [
    "Estimate",
    "KernelMoments",
    "ProbeVectors",
    "Verdict",
    "activation_change",
    "centered_kernel_target_alignment",
    "difference",
    "effective_rank",
    "gram_matrices",
    "inner_product",
    "interval",
    "judge",
    "kernel_change",
    "kernel_distance",
    "kernel_moments",
    "kernel_target_alignment",
    "low_rank_measure",
    "norm",
    "parameter_distances",
    "prediction_rmse",
    "probe_vectors",
    "taylor_gap",
    "weight_distances",
]
