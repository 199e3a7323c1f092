"""One objective, many configurations, any number of processes, on an Optuna study."""

from lightning_ntk.sweep.configurations import Range, grid, latin_hypercube, product, random_sample
from lightning_ntk.sweep.plot import plot_scaling
from lightning_ntk.sweep.results import Results
from lightning_ntk.sweep.runner import Sweep
from lightning_ntk.sweep.statistics import PowerLaw, log_log_slope

__all__ = [
    "PowerLaw",
    "Range",
    "Results",
    "Sweep",
    "grid",
    "latin_hypercube",
    "log_log_slope",
    "plot_scaling",
    "product",
    "random_sample",
]
