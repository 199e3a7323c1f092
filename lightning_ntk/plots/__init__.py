"""Matplotlib figures of histories, spectra, predictions and several runs.

Every function returns a `Drawing`, the figure and its axes, which a notebook shows as a picture. Nothing here uses pyplot, so
your backend and your open figures are left alone. Colors come from the Okabe-Ito palette and
cividis, which color-blind readers can tell apart; line styles and markers do the same in print. Without matplotlib, every
function raises a ModuleNotFoundError.
"""

from typing import TYPE_CHECKING

from lightning_ntk.utilities.lazy import lazy_names

__all__ = [
    "Drawing",
    "plot_accuracies",
    "plot_effective_time",
    "plot_history",
    "plot_kernel",
    "plot_over_loss",
    "plot_parameters",
    "plot_predictions",
    "plot_regimes",
    "plot_runs",
    "plot_spectrum",
    "plot_values",
    "read_history",
]

if TYPE_CHECKING:
    from lightning_ntk.plots.history import read_history
    from lightning_ntk.plots.parameters import plot_parameters
    from lightning_ntk.plots.predictions import plot_predictions
    from lightning_ntk.plots.regimes import plot_regimes
    from lightning_ntk.plots.runs import plot_runs
    from lightning_ntk.plots.scalars import (
        plot_accuracies,
        plot_effective_time,
        plot_history,
        plot_kernel,
        plot_over_loss,
        plot_values,
    )
    from lightning_ntk.plots.spectrum import plot_spectrum
    from lightning_ntk.plots.style import Drawing
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "read_history": "lightning_ntk.plots.history",
            "plot_parameters": "lightning_ntk.plots.parameters",
            "plot_predictions": "lightning_ntk.plots.predictions",
            "plot_regimes": "lightning_ntk.plots.regimes",
            "plot_runs": "lightning_ntk.plots.runs",
            **dict.fromkeys(
                [
                    "plot_accuracies",
                    "plot_effective_time",
                    "plot_history",
                    "plot_kernel",
                    "plot_over_loss",
                    "plot_values",
                ],
                "lightning_ntk.plots.scalars",
            ),
            "plot_spectrum": "lightning_ntk.plots.spectrum",
            "Drawing": "lightning_ntk.plots.style",
        },
    )
