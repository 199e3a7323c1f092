"""One objective, many configurations, any number of processes, on an Optuna study."""

from typing import TYPE_CHECKING

from lightning_ntk.utilities.lazy import lazy_names

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

if TYPE_CHECKING:
    from lightning_ntk.sweep.configurations import Range, grid, latin_hypercube, product, random_sample
    from lightning_ntk.sweep.plot import plot_scaling
    from lightning_ntk.sweep.results import Results
    from lightning_ntk.sweep.runner import Sweep
    from lightning_ntk.sweep.statistics import PowerLaw, log_log_slope
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            **dict.fromkeys(
                ["Range", "grid", "latin_hypercube", "product", "random_sample"], "lightning_ntk.sweep.configurations"
            ),
            **dict.fromkeys(["PowerLaw", "log_log_slope"], "lightning_ntk.sweep.statistics"),
            "Results": "lightning_ntk.sweep.results",
            "Sweep": "lightning_ntk.sweep.runner",
            "plot_scaling": "lightning_ntk.sweep.plot",
        },
    )
