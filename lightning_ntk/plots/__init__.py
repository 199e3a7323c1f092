"""Figures of a monitored run, drawn with matplotlib.

They are made without pyplot: the user's backend and open figures are left alone. Colors are those of the Okabe-Ito palette or
of cividis, which stay apart for color-blind readers; line styles and markers tell curves apart in print.
"""

from lightning_ntk.plots.history import read_history
from lightning_ntk.plots.parameters import plot_parameters
from lightning_ntk.plots.predictions import plot_predictions
from lightning_ntk.plots.runs import plot_runs
from lightning_ntk.plots.scalars import plot_accuracies, plot_effective_time, plot_history, plot_kernel
from lightning_ntk.plots.spectrum import plot_spectrum
from lightning_ntk.plots.values import plot_values

__all__ = [
    "plot_accuracies",
    "plot_effective_time",
    "plot_history",
    "plot_kernel",
    "plot_parameters",
    "plot_predictions",
    "plot_runs",
    "plot_spectrum",
    "plot_values",
    "read_history",
]
