"""Several runs in one figure."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_ntk.plots.history import LABELS, History, require_any
from lightning_ntk.plots.scalars import draw_scalars
from lightning_ntk.plots.style import GREY, MARKERS, PALETTE, TRAINED, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More curves in one panel cannot be told apart.
_MOST_CURVES = 6
_DEFAULT_SCALARS = ("relative_weight_distance", "prediction_rmse", "loss")


def plot_runs(
    runs: Sequence[tuple[str, History]],
    scalars: Sequence[str] | None = None,
    title: str | None = None,
    *,
    x: str = "step",
) -> "tuple[Figure, Any]":
    """Draws the same scalars of several runs over optimizer steps, or at equal loss.

    At one learning rate, networks of different widths train at different speeds. The distance at equal steps then tells the
    speed as well; at equal loss (`x="loss"`) it does not.

    Up to six runs share a panel for each scalar. More runs get a panel each, with the first scalar only and the other runs
    in gray.

    Args:
        runs: Label and history of each run.
        scalars: Names of the scalars. Default: "relative_weight_distance", "prediction_rmse" and "loss", if measured.
        title: Title of the figure.
        x: The scalar on the horizontal axis: "step", or "loss", which falls from left to right.

    Returns:
        The figure and its axes, one for each scalar or one for each run.

    Raises:
        ValueError: If there are no runs, or if a scalar was measured in none of them.
    """
    if not runs:
        raise ValueError("Expected at least one run, a pair (label, history), but got none.")
    rows = [row for _, history in runs for row in history]
    scalars = require_any(rows, [key for key in _DEFAULT_SCALARS if key != x]) if scalars is None else scalars
    for key in scalars:
        require_any(rows, [key])
    require_any(rows, [x])
    if len(runs) > _MOST_CURVES:
        return _small_multiples(runs, scalars[0], title, x)
    figure, axes = panels(len(scalars), title, size=(4.4, 3.7))
    styles = [
        {"label": label, "color": color, "marker": marker, "markersize": 3.5, "linewidth": 1.4}
        for (label, _), color, marker in zip(runs, PALETTE, MARKERS, strict=False)
    ]
    for axis, key in zip(axes, scalars, strict=True):
        draw_scalars(axis, [(history, key, style) for (_, history), style in zip(runs, styles, strict=True)], x)
    fitting = int(11 * figure.get_figwidth()) // (max(len(label) for label, _ in runs) + 8)
    columns = min(max(1, fitting), len(runs))
    curves = [line for line in axes[0].lines if not str(line.get_label()).startswith("_")]  # without hollow markers
    figure.legend(handles=curves, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return figure, axes


def _small_multiples(
    runs: Sequence[tuple[str, History]], key: str, title: str | None, x: str
) -> "tuple[Figure, tuple[Any, ...]]":
    columns = min(5, math.ceil(math.sqrt(len(runs))))
    figure, axes = panels(len(runs), title, columns=columns, size=(2.4, 2.0), shared=True)
    others = [(history, key, {"color": GREY, "linewidth": 0.6, "alpha": 0.5}) for _, history in runs]
    for axis, (label, history) in zip(axes, runs, strict=True):
        draw_scalars(axis, [*others, (history, key, {"color": TRAINED, "linewidth": 2})], x)
        axis.set_title(label, fontsize=9)
        axis.set(xlabel=None, ylabel=None)
    figure.supxlabel("optimizer step" if x == "step" else LABELS.get(x, x), fontsize=10)
    figure.supylabel(LABELS.get(key, key), fontsize=9)
    return figure, axes
