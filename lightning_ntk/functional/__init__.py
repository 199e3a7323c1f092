"""The distances as pure functions: the only copy of every formula."""

from lightning_ntk.functional.kernels import kernel_change, kernel_distance, kernel_target_alignment
from lightning_ntk.functional.predictions import prediction_rmse, taylor_gap
from lightning_ntk.functional.verdict import Verdict, judge
from lightning_ntk.functional.weights import difference, inner_product, norm, parameter_distances, weight_distances

__all__ = [
    "Verdict",
    "difference",
    "inner_product",
    "judge",
    "kernel_change",
    "kernel_distance",
    "kernel_target_alignment",
    "norm",
    "parameter_distances",
    "prediction_rmse",
    "taylor_gap",
    "weight_distances",
]
