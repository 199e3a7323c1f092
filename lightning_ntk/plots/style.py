"""Figures without pyplot, and the colors and axes that they share."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The Okabe-Ito palette, without its yellow, which is too light for lines.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TRAINED, LINEARIZED, TAYLOR = PALETTE[:3]
GREY = "#999999"
MARKERS = "osD^vPX"
# The curves of the trained network, of the linearized one, and of one that is neither.
LINES: tuple[dict[str, Any], ...] = (
    {"color": TRAINED, "linestyle": "-", "marker": "o", "markersize": 4},
    {"color": LINEARIZED, "linestyle": "--", "marker": "s", "markersize": 3.5, "markerfacecolor": "none"},
    {"color": TAYLOR, "linestyle": ":", "marker": "^", "markersize": 4, "markerfacecolor": "none"},
)
# An axis is logarithmic if the largest value exceeds the smallest by this factor.
_WIDE = 5
# A logarithmic axis is labeled at 1, 2 and 5 if its limits differ by less than this factor.
_FEW_DECADES = 100


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, sized in inches."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Plots need matplotlib, which is not installed: pip install 'lightning-ntk[plot]'."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def panels(
    count: int, title: str | None, *, columns: int = 3, size: tuple[float, float] = (4.75, 3.8), shared: bool = False
) -> "tuple[Figure, tuple[Any, ...]]":
    """A figure with a grid of panels, sized in inches each, whose axes and labels may be shared."""
    columns = min(columns, count)
    rows, room = math.ceil(count / columns), 0.5 if shared else 0.0
    figure = new_figure(size[0] * columns + room, size[1] * rows + room)
    if title:
        figure.suptitle(title, fontsize=11)
    grid = figure.subplots(rows, columns, sharex=shared, sharey=shared, squeeze=False).flatten()
    for index in range(count, len(grid)):
        grid[index].set_visible(False)
        grid[index - columns].tick_params(labelbottom=True)
    return figure, tuple(grid[:count])


def step_axis(axis: Any, steps: Iterable[float]) -> None:
    """Optimizer steps on the horizontal axis, logarithmic above 20, with room for step 0 if it is among them."""
    axis.set_xlabel("optimizer step")
    steps = list(steps)
    if max(steps, default=0.0) <= 20:
        axis.locator_params(axis="x", integer=True)
    elif min(steps) > 0:
        axis.set_xscale("log")
        label_few_decades(axis.xaxis)
    else:
        axis.set_xscale("symlog", linthresh=1, linscale=0.3)
        axis.set_xlim(left=0)


def progress_axis(axis: Any, values: Iterable[float], label: str) -> None:
    """A loss on the horizontal axis, falling from left to right, logarithmic if it spans more than a factor of five."""
    axis.set_xlabel(label.replace("\n", ", "))
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if positive and max(positive) > _WIDE * min(positive):
        axis.set_xscale("log")
        label_few_decades(axis.xaxis)
    axis.invert_xaxis()


def value_axis(axis: Any, values: Iterable[float], *, negligible: float = 0.0) -> None:
    """Makes the vertical axis logarithmic if the values on it span more than a factor of five.

    Values below the fraction `negligible` of the largest are zero to rounding and do not widen the axis.
    """
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if positive and max(positive) > _WIDE * min(positive):
        kept = [value for value in positive if value >= negligible * max(positive)]
        axis.set_yscale("log")
        if len(kept) < len(positive):
            axis.set_ylim(bottom=min(kept) / 2, top=max(kept) * 2)
        label_few_decades(axis.yaxis)
    tidy(axis)


def label_few_decades(axis: Any) -> None:
    """Labels a logarithmic `xaxis` or `yaxis` at 1, 2 and 5 where powers of ten alone would give one or two labels."""
    from matplotlib.ticker import LogLocator

    low, high = sorted(axis.get_view_interval())
    if high < _FEW_DECADES * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")


def label_at(axis: Any, places: Iterable[float]) -> None:
    """Ticks of a logarithmic horizontal axis at these places only."""
    places = sorted(places)
    axis.set_xticks(places, [f"{place:g}" for place in places])
    axis.set_xticks([], minor=True)


def tidy(axis: Any) -> None:
    """A faint grid, and no frame above and on the right."""
    axis.grid(alpha=0.25, which="both", linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
