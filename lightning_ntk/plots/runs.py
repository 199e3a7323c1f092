"""Several runs in one figure."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_ntk.plots.history import LABELS, History, require_any, series
from lightning_ntk.plots.style import GREY, PALETTE, TRAINED, new_figure, step_axis, value_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More curves in one panel cannot be told apart.
_MOST_CURVES = 6
_MARKERS = "osD^vP"
_DEFAULT_SCALARS = ("relative_weight_distance", "prediction_rmse", "loss")


def plot_runs(
    runs: Sequence[tuple[str, History]], scalars: Sequence[str] | None = None, title: str | None = None
) -> "tuple[Figure, Any]":
    """Draws the same scalars of several runs over optimizer steps.

    Up to six runs share a panel for each scalar. More runs get a panel each, with the first scalar only and the other runs
    in gray.

    Args:
        runs: Label and history of each run.
        scalars: Names of the scalars. Default: "relative_weight_distance", "prediction_rmse" and "loss", if measured.
        title: Title of the figure.

    Returns:
        The figure and its axes, one for each scalar or one for each run.

    Raises:
        ValueError: If there are no runs, or if a scalar was measured in none of them.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if not runs:
        raise ValueError("Expected at least one run, a pair (label, history), but got none.")
    rows = [row for _, history in runs for row in history]
    if scalars is None:
        scalars = require_any(rows, _DEFAULT_SCALARS)
    for key in scalars:
        require_any(rows, [key])
    figure, axes = _overlay(runs, scalars) if len(runs) <= _MOST_CURVES else _small_multiples(runs, scalars[0])
    if title:
        figure.suptitle(title, fontsize=11)
    return figure, axes


def _overlay(runs: Sequence[tuple[str, History]], scalars: Sequence[str]) -> "tuple[Figure, Any]":
    columns = min(3, len(scalars))
    lines = math.ceil(len(scalars) / columns)
    figure = new_figure(4.4 * columns, 3.6 * lines + 0.4)
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, key in zip(grid, scalars, strict=False):
        curves = [series(history, key, after_start=_starts_at_zero(key)) for _, history in runs]
        for (label, _), points, color, marker in zip(runs, curves, PALETTE, _MARKERS, strict=False):
            axis.plot(*points, color=color, marker=marker, markersize=3.5, linewidth=1.4, label=label)
        _finish(axis, key, curves)
    for axis in grid[len(scalars) :]:
        axis.set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    room = int(11 * figure.get_figwidth()) // (max(map(len, labels)) + 8)
    ncols = max(1, min(room, len(runs)))
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)
    return figure, tuple(grid[: len(scalars)])


def _small_multiples(runs: Sequence[tuple[str, History]], key: str) -> "tuple[Figure, Any]":
    columns = min(5, math.ceil(math.sqrt(len(runs))))
    lines = math.ceil(len(runs) / columns)
    figure = new_figure(2.4 * columns + 0.4, 2.0 * lines + 0.5)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    curves = [series(history, key, after_start=_starts_at_zero(key)) for _, history in runs]
    for axis, (label, _), own in zip(grid, runs, curves, strict=False):
        for other in curves:
            axis.plot(*other, color=GREY, linewidth=0.6, alpha=0.5)
        axis.plot(*own, color=TRAINED, linewidth=2)
        axis.set_title(label, fontsize=9)
        _finish(axis, key, curves)
        axis.set(xlabel=None, ylabel=None)
    for index in range(len(runs), len(grid)):
        grid[index].set_visible(False)
        grid[index - columns].tick_params(labelbottom=True)
    figure.supxlabel("optimizer step", fontsize=10)
    figure.supylabel(LABELS.get(key, key), fontsize=9)
    return figure, tuple(grid[: len(runs)])


def _finish(axis: Any, key: str, points: Sequence[tuple[Sequence[float], Sequence[float]]]) -> None:
    axis.set_ylabel(LABELS.get(key, key), fontsize=9)
    step_axis(axis, [step for steps, _ in points for step in steps])
    value_axis(axis, [value for _, values in points for value in values], negligible=1e-4)


def _starts_at_zero(key: str) -> bool:
    """Whether the scalar is zero by definition at step 0."""
    return key not in ("loss", "linearized_loss", "accuracy", "linearized_accuracy", "taylor_accuracy")
