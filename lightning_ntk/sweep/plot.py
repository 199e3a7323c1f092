"""A scalar of a sweep over a parameter, log-log, with the fitted slope."""

import itertools
from typing import TYPE_CHECKING

from lightning_ntk.plots.history import LABELS
from lightning_ntk.plots.style import MARKERS, PALETTE, Drawing, label_at, label_plainly, panels, tidy
from lightning_ntk.sweep.results import Results
from lightning_ntk.sweep.statistics import geometric_mean_interval, log_log_slope

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The interval of two repetitions is a factor of 12.7 standard errors, and covers the figure.
_FEWEST_FOR_A_BAR = 3
# Values of the parameter that have room below the axis.
_MOST_LABELS = 8


def plot_scaling(
    results: Results,
    x: str,
    y: str,
    *,
    over: str | None = None,
    step: float | None = None,
    confidence: float = 0.95,
    title: str | None = None,
    ax: "Axes | None" = None,
) -> Drawing:
    """Draws y over x in log-log axes with least-squares lines.

    There is a line, with its slope and interval in the legend, for each combination of the other parameters that vary.

    Args:
        results: The results of a sweep.
        x: A numeric parameter.
        y: A scalar.
        over: A parameter whose values are repetitions. Where there are three or more, their geometric mean and its interval are
            drawn over the single points.
        step: The step of the measurement. Default: the last one of each configuration.
        confidence: Probability of the intervals.
        title: Title of the axes.
        ax: Axes to draw on. Default: those of a new figure.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: If a name is unknown, nothing is complete, or a series has no slope.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    figure, (axis,) = panels(1, None, size=(6.4, 4.4), ax=ax)
    series = results.series(x, y, over=over, step=step)
    styles = zip(itertools.cycle(PALETTE), itertools.cycle(MARKERS))
    for (others, points), (color, marker) in zip(series.items(), styles, strict=False):
        xs, ys = zip(*points, strict=True)
        law = log_log_slope(xs, ys, confidence)
        name = ", ".join(f"{parameter}={value}" for parameter, value in others)
        label = f"{name + ': ' if name else ''}slope {law.slope:.2f}, {confidence:.0%} [{law.low:.2f}, {law.high:.2f}]"
        axis.plot(xs, ys, marker, color=color, markersize=3.5, alpha=0.45 if over else 1.0)
        axis.plot([xs[0], xs[-1]], [law.at(xs[0]), law.at(xs[-1])], "-", color=color, linewidth=1.2, label=label)
        if over:
            for value in sorted(set(xs)):
                mean = geometric_mean_interval([b for a, b in points if a == value], confidence)
                if mean.count >= _FEWEST_FOR_A_BAR:
                    bars = [[mean.mean - mean.low], [mean.high - mean.mean]]
                    axis.errorbar(value, mean.mean, bars, fmt=marker, color=color, markersize=6, capsize=3)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(x)
    axis.set_ylabel(LABELS.get(y.rpartition("/")[2], y) + (f" at step {step:g}" if step is not None else ""))
    places = {point[0] for points in series.values() for point in points}
    if len(places) <= _MOST_LABELS:
        label_at(axis, places)
    label_plainly(axis.yaxis)
    tidy(axis)
    axis.legend(frameon=False, fontsize=9)
    axis.set_title(title or "", fontsize=10)
    return Drawing(figure, axis)
