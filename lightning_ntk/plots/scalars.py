"""Scalars over optimizer steps, and values of a metric."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_ntk.plots.history import LABELS, History, Run, require_any, rows_of, series, tells_at_start
from lightning_ntk.plots.style import (
    GREY,
    LINES,
    Drawing,
    draw_curve,
    is_wide,
    mark_thresholds,
    new_figure,
    panels,
    progress_axis,
    step_axis,
    value_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_history(history: Run, title: str | None = None, ax: "Axes | None" = None) -> Drawing:
    """Draws the distance between both networks' weights, and both losses.

    Dotted lines are at the distances 0.1, below which a run is lazy, and 0.5, from which on it is rich. A triangle at the
    bottom is a distance that is zero to rounding, as after one full-batch step.

    Args:
        history: A monitor, its history or a DataFrame, with "step" and any of "relative_weight_distance", "loss" and
            "linearized_loss".
        title: Title of the figure.
        ax: Axes to draw the distance on, or the losses where there is no distance. Default: both, in a new figure.

    Returns:
        The figure and its axes for the distance and the losses, where they were measured.

    Raises:
        ValueError: If the history is empty or has none of these scalars.
    """
    groups = {
        "How far the weights leave the linearized path": {"relative_weight_distance": ""},
        "Loss of both networks": {"loss": "trained network", "linearized_loss": "linearized network"},
    }
    return _draw_panels(history, title, groups, ax)


def plot_accuracies(history: Run, title: str | None = None, ax: "Axes | None" = None) -> Drawing:
    """Draws the accuracies of the trained, the linearized and the expanded network.

    Args:
        history: A monitor, its history or a DataFrame, with "step" and any of "accuracy", "linearized_accuracy" and
            "taylor_accuracy", from 0 to 1.
        title: Title of the axes.
        ax: Axes to draw on. Default: those of a new figure.

    Returns:
        The figure and its only axes.

    Raises:
        ValueError: If the history is empty or has none of these scalars.
    """
    networks = {
        "accuracy": "trained network",
        "linearized_accuracy": "linearized network",
        "taylor_accuracy": "expansion at the trained weights",
    }
    figure, axes = _draw_panels(history, None, {title or "How much is classified correctly": networks}, ax)
    axis = axes[0] if ax is None else ax
    from matplotlib.ticker import PercentFormatter

    axis.set_yscale("linear")
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.set_ylim(bottom=max(0.0, axis.get_ylim()[0]), top=min(1.01, axis.get_ylim()[1] + 0.01))
    return Drawing(figure, axis)


def plot_over_loss(history: Run, title: str | None = None, ax: "Axes | None" = None) -> Drawing:
    """Draws the distance between both networks' weights over the loss of the trained network.

    Runs that train at different speeds are compared at equal loss, not at equal steps.

    Args:
        history: A monitor, its history or a DataFrame, with "step", "relative_weight_distance" and "loss".
        title: Title of the axes.
        ax: Axes to draw on. Default: those of a new figure.

    Returns:
        The figure and its only axes, with the loss falling from left to right.

    Raises:
        ValueError: If the history is empty or lacks one of the two scalars.
    """
    history = rows_of(history)
    for key in ("relative_weight_distance", "loss"):
        require_any(history, [key])
    figure, (axis,) = panels(1, None, ax=ax)
    draw_scalars(axis, [(history, "relative_weight_distance", LINES[0])], x="loss")
    axis.set_title(title or "How far the weights leave the linearized path, by loss", fontsize=10)
    return Drawing(figure, axis)


def plot_kernel(history: Run, title: str | None = None) -> Drawing:
    """Draws how far the kernel has turned, changed, and how fast it moves.

    Args:
        history: A monitor, its history or a DataFrame, with "step" and any of "kernel_distance", "kernel_change" and
            "kernel_velocity".
        title: Title of the figure.

    Returns:
        The figure and one axes for each scalar that was measured.

    Raises:
        ValueError: If the history is empty or has none of these scalars.
    """
    groups = {
        "How far the kernel has turned": {"kernel_distance": ""},
        "How much the kernel has changed": {"kernel_change": ""},
        "How fast it turns, per step": {"kernel_velocity": ""},
    }
    return _draw_panels(history, title, groups)


def plot_effective_time(history: Run, title: str | None = None) -> Drawing:
    """Draws when the linearized network comes closest to the trained one, and how close.

    Args:
        history: A monitor, its history or a DataFrame, with "step", "closest_time" and "closest_distance", and optionally
            "relative_weight_distance" and "distance_floor". Distances are relative to the displacement of the trained weights.
        title: Title of the figure.

    Returns:
        The figure and its two axes, for the time and the distances.

    Raises:
        ValueError: If the history is empty or has no closest time.
    """
    history = rows_of(history)
    require_any(history, ["closest_time"])
    groups = {
        "How far along the linearized path the run is": {"closest_time": "trained network"},
        "How much of the distance is a matter of time": {
            "relative_weight_distance": "at the same step",
            "closest_distance": "at the closest time",
            "distance_floor": "lower bound at any time",
        },
    }
    figure, (time, distance) = _draw_panels(history, title, groups)
    steps, _ = series(history, "closest_time")
    time.plot(steps, steps, color=GREY, linewidth=1, zorder=1, label="as fast as the linearized network")
    time.legend(frameon=False, fontsize=9)
    distance.set_ylabel("weight distance / displacement", fontsize=9)
    return Drawing(figure, (time, distance))


def plot_values(
    values: Sequence[float],
    label: str,
    ax: "Axes | None" = None,
    *,
    bounds: tuple[float | None, float | None] = (None, None),
) -> Drawing:
    """Draws successive values of one quantity, or one value with its number.

    Args:
        values: The values, in the order in which they were measured.
        label: Label of the vertical axis.
        ax: Axes to draw on. Default: the axes of a new figure.
        bounds: The smallest and the largest possible value, if there are; each is a gray line where it is in view.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: If there are no values.
    """
    if not values:
        raise ValueError("Expected at least one value to plot but got none.")
    figure = new_figure(4.6, 3.6) if ax is None else ax.figure
    ax = figure.subplots() if ax is None else ax
    draw_curve(ax, range(1, len(values) + 1), values, 0.0 if is_wide(values) else None, **LINES[0])
    ax.set_ylabel(label)
    if len(values) == 1:
        ax.annotate(f"{values[0]:.4g}", (1, values[0]), xytext=(8, 0), textcoords="offset points", va="center")
        ax.set_xticks([])
    else:
        ax.set_xlabel("measurement")
        ax.locator_params(axis="x", integer=True)
    value_axis(ax, values)
    low, high = ax.get_ylim()
    for bound in bounds:
        if bound is not None and low <= bound <= high:
            ax.axhline(bound, color=GREY, linewidth=1, zorder=1)
    return Drawing(figure.figure, ax)


def draw_scalars(
    axis: Any, curves: Sequence[tuple[History, str, Mapping[str, Any]]], x: str = "step", *, named: bool = True
) -> None:
    """Draws curves over steps or over the scalar `x`.

    A curve is a history, its scalar and a line style.

    The first scalar names the vertical axis. Markers are hollow where `exact` is 0. A value that is zero, or zero to
    rounding, has no place on a logarithmic axis: it is a triangle at the bottom, without a line. `named` says whether
    the thresholds of a relative distance have a label.
    """
    key = curves[0][1]
    points = [series(history, scalar, x) for history, scalar, _ in curves]
    values = [value for _, line in points for value in line]
    # After one full-batch step distances are zero to rounding. That of kernels is of second order.
    negligible = 0.0 if tells_at_start(key) else 1e-8 if key.startswith("kernel_") else 1e-4
    floor = negligible * max(values, default=0.0)
    kept = [value for value in values if not 0 <= value <= floor]
    wide = is_wide(kept)
    for (history, scalar, style), curve in zip(curves, points, strict=True):
        draw_curve(axis, *curve, floor if wide else None, **style)
        hollow = series([row for row in history if row.get("exact") == 0 and row.get(scalar, 0.0) > floor], scalar, x)
        if hollow[0]:
            axis.plot(*hollow, **{**style, "linestyle": "none", "markerfacecolor": "white", "label": None})
    axis.set_ylabel(LABELS.get(key, key), fontsize=9)
    along = [value for line, _ in points for value in line]
    if x == "step":
        step_axis(axis, along)
    else:
        progress_axis(axis, along, LABELS.get(x, x))
    value_axis(axis, kept)
    if any(scalar == "relative_weight_distance" for _, scalar, _ in curves):
        mark_thresholds(axis, named=named)


def _draw_panels(
    run: Run, title: str | None, groups: Mapping[str, Mapping[str, str]], ax: "Axes | None" = None
) -> Drawing:
    """Draws a panel for each group of scalars with measured values.

    Groups are keyed by their headings, scalars by their labels.

    With `ax`, the first group alone.
    """
    history = rows_of(run)
    present = require_any(history, [key for labels in groups.values() for key in labels])
    shown = [(heading, labels) for heading, labels in groups.items() if not labels.keys().isdisjoint(present)]
    if ax is not None:
        shown = [(title or shown[0][0], shown[0][1])]
    figure, axes = panels(len(shown), title, ax=ax)
    for axis, (heading, labels) in zip(axes, shown, strict=True):
        lines = zip(labels.items(), LINES, strict=False)
        draw_scalars(axis, [(history, key, {**line, "label": label}) for (key, label), line in lines if key in present])
        axis.set_title(heading, fontsize=10)
        if any(labels.values()):
            axis.legend(frameon=False, fontsize=9)
    return Drawing(figure, axes if ax is None else ax)
