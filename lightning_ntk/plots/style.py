"""Figures without pyplot, and the colors and axes that they share."""

import io
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_ntk.functional.verdict import LAZY, RICH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
# Between limits that differ by less than this factor, 1, 2 and 5 may be one label or none.
_FEW_LABELS = 4
# Other ticks are powers of ten.
_PLAIN_FROM, _PLAIN_TO = 1e-3, 1e5
# Dots per inch of a figure in a notebook: as wide as matplotlib's own, and sharp on screens with two dots in a pixel.
_SHOWN_DPI, _DRAWN_DPI = 80, 160


class Drawing(NamedTuple):
    """A figure and its axes, which notebooks show as a picture.

    It unpacks as `figure, axes = ...`. No magic command is needed, and nothing is shown twice, because pyplot does not know of
    the figure.

    Attributes:
        figure: The `matplotlib.figure.Figure`; `figure.savefig(path)` writes it.
        axes: Its axes, or a tuple of them.
    """

    figure: "Figure"
    axes: Any

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        file = io.BytesIO()
        self.figure.savefig(file, format="png", dpi=_DRAWN_DPI)
        width, height = (round(inches * _SHOWN_DPI) for inches in self.figure.get_size_inches())
        return file.getvalue(), {"width": width, "height": height}

    def __repr__(self) -> str:
        return repr(self.figure)


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
    count: int,
    title: str | None,
    *,
    columns: int = 3,
    size: tuple[float, float] = (4.8, 3.6),
    shared: bool = False,
    ax: "Axes | None" = None,
) -> "tuple[Figure, tuple[Any, ...]]":
    """Makes a figure with a grid of panels.

    Each has a size in inches, and their axes and labels may be shared. With `ax`, returns it and its figure.
    """
    if ax is not None:
        return ax.figure.figure, (ax,)
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
    """Puts optimizer steps on the horizontal axis.

    It is logarithmic above 20, with room for step 0 if it is among them.
    """
    axis.set_xlabel("optimizer step")
    steps = list(steps)
    if max(steps, default=0.0) <= 20:
        axis.locator_params(axis="x", integer=True)
    elif min(steps) > 0:
        axis.set_xscale("log")
        label_plainly(axis.xaxis)
    else:
        axis.set_xscale("symlog", linthresh=1, linscale=0.3)
        axis.set_xlim(-0.1, 1.3 * max(steps))  # room for half a marker
        axis.xaxis.set_major_formatter(lambda value, _: _as_tick(value))


def progress_axis(axis: Any, values: Iterable[float], label: str) -> None:
    """Puts a loss on the horizontal axis, falling from left to right.

    It is logarithmic if the loss spans more than a factor of five.
    """
    axis.set_xlabel(label.replace("\n", ", "))
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if positive and max(positive) > _WIDE * min(positive):
        axis.set_xscale("log")
        label_plainly(axis.xaxis)
    axis.invert_xaxis()


def is_wide(values: Sequence[float]) -> bool:
    """Whether values are nonnegative and span more than a factor of five."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    return not any(value < 0 for value in values) and bool(positive) and max(positive) > _WIDE * min(positive)


def value_axis(axis: Any, values: Sequence[float]) -> None:
    """Makes the vertical axis logarithmic if the values on it are wide."""
    if is_wide(values):
        axis.set_yscale("log")
        label_plainly(axis.yaxis)
    tidy(axis)


def mark_thresholds(axis: Any, *, named: bool = True) -> None:
    """Marks the thresholds of lazy and rich runs with faint lines.

    They are values of the relative weight distance, drawn only if in view.
    """
    low, high = axis.get_ylim()
    # Where a curve that grows does not pass: over a falling loss it is steep on the left.
    left = (0, (3, 2), "left", "bottom")
    right = (1, (-3, -2), "right", "top")
    places = ((LAZY, "lazy below", right), (RICH, "rich from", right if axis.xaxis_inverted() else left))
    for level, words, (at, offset, align, side) in places:
        if low <= level <= high:
            axis.axhline(level, color=GREY, linestyle=(0, (1, 2)), linewidth=1, zorder=0.5)
            if named:
                axis.annotate(
                    f"{words} {level:g}", (at, level), offset, xycoords=("axes fraction", "data"),
                    textcoords="offset points", va=side, ha=align, color=GREY, fontsize=8, zorder=0.5,
                )  # fmt: skip


def draw_curve(axis: Any, along: Sequence[float], values: Sequence[float], floor: float | None, **style: Any) -> None:
    """Draws values over `along`, with a floor.

    Values up to `floor` are triangles at the bottom of the axis, without a line.
    """
    absent = [floor is not None and value <= floor for value in values]
    axis.plot(along, [math.nan if out else value for out, value in zip(absent, values, strict=True)], **style)
    if any(absent):
        places = list(itertools.compress(along, absent))
        bottom = {"transform": axis.get_xaxis_transform(), "clip_on": False, "linestyle": "none"}
        marker = {"marker": "v", "markersize": 5, "color": style["color"], "alpha": style.get("alpha")}
        axis.plot(places, [0.0] * len(places), **bottom, **marker)


def label_plainly(axis: Any) -> None:
    """Labels a logarithmic axis with plain numbers, as far as they are short.

    An axis that spans few powers of ten, `xaxis` or `yaxis`, gets labels at 1, 2 and 5, or evenly spaced ones.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    low, high = sorted(axis.get_view_interval())
    if high < _FEW_DECADES * low:
        axis.set_major_locator(
            LogLocator(subs=(1, 2, 5)) if high > _FEW_LABELS * low else MaxNLocator(6, steps=(1, 2, 5, 10))
        )
        axis.set_minor_formatter("")
    axis.set_major_formatter(lambda value, _: _as_tick(value))


def _as_tick(value: float) -> str:
    """Formats a plain number, or a power of ten if very small or large."""
    if value == 0 or _PLAIN_FROM <= value < _PLAIN_TO:
        return f"{value:g}"
    digits, exponent = f"{value:.0e}".split("e")
    power = f"10^{{{int(exponent)}}}"
    return f"${power}$" if digits == "1" else rf"${digits}\times{power}$"


def label_at(axis: Any, places: Iterable[float]) -> None:
    """Ticks of a logarithmic horizontal axis at these places only."""
    places = sorted(places)
    axis.set_xticks(places, [f"{place:g}" for place in places])
    axis.set_xticks([], minor=True)


def tidy(axis: Any) -> None:
    """A faint grid, and no frame above and on the right."""
    axis.grid(alpha=0.25, which="both", linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
