"""The distance of every parameter tensor, as a heat map."""

import math
from typing import TYPE_CHECKING, Any

from lightning_ntk.plots.history import Run, rows_of
from lightning_ntk.plots.style import Drawing, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PREFIX = "parameter/"
# Values below this fraction of the largest get its color: after one step, distances are zero to rounding.
_DYNAMIC_RANGE = 1e-3
_NAME_LENGTH = 36
_MOST_LABELS, _MOST_STEPS = 90, 14
_MOST_OUTLINED = 30
# In vector graphics every cell is a path of its own.
_MOST_VECTOR_CELLS = 600


def plot_parameters(history: Run, title: str | None = None, ax: "Axes | None" = None) -> Drawing:
    """Draws the relative weight distance of each parameter (row) at each measurement (column).

    Colors are logarithmic. Cells that were not measured or are not finite are white.

    Args:
        history: A monitor with `per_parameter=True`, its history or a DataFrame, with "step" and "parameter/<name>".
        title: Title of the axes.
        ax: Axes to draw on. Default: those of a new figure, as high as the parameters need.

    Returns:
        The figure and its axes, with rows in the order of the network, from the top.

    Raises:
        ValueError: If the history has no distances of parameters after step 0.
    """
    history = rows_of(history)
    names = list(dict.fromkeys(key for row in history for key in row if key.startswith(_PREFIX)))
    moved = [row for row in history if row["step"] > 0 and any(name in row for name in names)]
    if not moved:
        raise ValueError(
            "Expected a history with distances of parameters after step 0 but it has none. "
            "Give the monitor `per_parameter=True`."
        )
    size = 2.6 + max(4.5, min(8.0, 0.28 * len(moved))), min(14.0, 1.5 + 0.26 * len(names))
    figure, (axis,) = panels(1, None, size=size, ax=ax)
    from matplotlib.colors import LogNorm

    cells = [[row.get(name, math.nan) for row in moved] for name in names]
    finite = [value for line in cells for value in line if math.isfinite(value) and value > 0]
    largest = max(finite, default=1.0)
    smallest = max(min(finite, default=1.0), _DYNAMIC_RANGE * largest)
    if smallest == largest:
        smallest = largest / 10
    # A zero has no color on a log scale: it gets that of the smallest value.
    shown = [[max(value, smallest) if math.isfinite(value) else value for value in line] for line in cells]
    # Lines between many cells would hide them.
    grid: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.4} if len(names) <= _MOST_OUTLINED else {}
    pixels = len(names) * len(moved) > _MOST_VECTOR_CELLS
    image = axis.pcolormesh(shown, cmap="cividis", norm=LogNorm(smallest, largest), rasterized=pixels, **grid)
    axis.invert_yaxis()
    short = [name.removeprefix(_PREFIX) for name in names]
    labels = [name if len(name) <= _NAME_LENGTH else "…" + name[1 - _NAME_LENGTH :] for name in short]
    rows = range(0, len(names), math.ceil(len(names) / _MOST_LABELS))
    axis.set_yticks([row + 0.5 for row in rows], [labels[row] for row in rows], fontsize=8)
    # Counted from the end, so that the last step has a label.
    columns = range(len(moved) - 1, -1, -math.ceil(len(moved) / _MOST_STEPS))
    steps = [f"{moved[column]['step']:g}" for column in columns]
    axis.set_xticks([column + 0.5 for column in columns], steps, fontsize=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("optimizer step")
    axis.set_title(title or "How far each parameter leaves its linearized path", fontsize=10)
    extend = "min" if min(finite, default=1.0) < smallest else "neither"
    bar = figure.colorbar(image, ax=axis, extend=extend, pad=0.02, aspect=30)
    bar.set_label("relative weight distance", fontsize=9)
    bar.outline.set_visible(False)
    return Drawing(figure, axis)
