"""The distances and what tells regimes, as pure functions: the only copy of every formula."""

from typing import TYPE_CHECKING

from lightning_ntk.utilities.lazy import lazy_names

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

if TYPE_CHECKING:
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
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            **dict.fromkeys(
                ["kernel_change", "kernel_distance", "kernel_target_alignment"], "lightning_ntk.functional.kernels"
            ),
            **dict.fromkeys(["prediction_rmse", "taylor_gap"], "lightning_ntk.functional.predictions"),
            **dict.fromkeys(
                ["activation_change", "centered_kernel_target_alignment", "effective_rank", "low_rank_measure"],
                "lightning_ntk.functional.regimes",
            ),
            **dict.fromkeys(
                [
                    "Estimate",
                    "KernelMoments",
                    "ProbeVectors",
                    "gram_matrices",
                    "interval",
                    "kernel_moments",
                    "probe_vectors",
                ],
                "lightning_ntk.functional.trace",
            ),
            **dict.fromkeys(["Verdict", "judge"], "lightning_ntk.functional.verdict"),
            **dict.fromkeys(
                ["difference", "inner_product", "norm", "parameter_distances", "weight_distances"],
                "lightning_ntk.functional.weights",
            ),
        },
    )
