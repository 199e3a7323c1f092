"""One scalar of a sweep over one parameter, log-log, with the fitted slope."""

from typing import TYPE_CHECKING, Any

from lightning_ntk.sweep.results import Results
from lightning_ntk.sweep.statistics import log_log_slope, mean_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The Okabe-Ito palette, which stays apart for color-blind readers; markers tell lines apart in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"


def plot_scaling(
    results: Results,
    x: str,
    y: str,
    *,
    over: str | None = None,
    step: float | None = None,
    confidence: float = 0.95,
) -> "tuple[Figure, Any]":
    """Draws y over x in log-log axes with the least-squares line of each series; slope and interval are in the legend.

    Args:
        results: Of a sweep.
        x: A numeric parameter.
        y: A scalar.
        over: The parameter whose values are repetitions: means and their intervals are drawn over the single points.
        step: Of the measurement; None: the last one of each configuration.
        confidence: Probability of the intervals.

    Returns:
        The figure and its axis. One line for each combination of the other parameters that vary.

    Raises:
        ValueError: If a name is unknown, nothing is complete, or a series has no slope.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Plots need matplotlib, which is not installed: pip install 'lightning-ntk[plot]'."
        ) from error
    series = results.series(x, y, over=over, step=step)
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    percent = f"{confidence:.0%}"
    for index, (others, points) in enumerate(series.items()):
        color, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        xs, ys = [point[0] for point in points], [point[1] for point in points]
        law = log_log_slope(xs, ys, confidence)
        name = ", ".join(f"{parameter}={value}" for parameter, value in others)
        label = f"{name + ': ' if name else ''}slope {law.slope:.2f}, {percent} [{law.low:.2f}, {law.high:.2f}]"
        axis.plot(xs, ys, marker, color=color, markersize=3.5, alpha=0.45 if over else 1.0)
        axis.plot([xs[0], xs[-1]], [law.at(xs[0]), law.at(xs[-1])], "-", color=color, linewidth=1.2, label=label)
        if over:
            for value in sorted(set(xs)):
                mean = mean_interval([b for a, b in points if a == value], confidence)
                if mean.count > 1:
                    # On a logarithmic axis an interval that reaches zero is drawn down to its end only.
                    low = max(mean.low, 1e-3 * mean.mean)
                    axis.errorbar(
                        value, mean.mean, yerr=[[mean.mean - low], [mean.high - mean.mean]],
                        fmt=marker, color=color, markersize=6, capsize=3,
                    )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(x)
    axis.set_ylabel(y + (f" at step {step:g}" if step is not None else ""))
    axis.grid(alpha=0.25, which="both", linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    return figure, axis
