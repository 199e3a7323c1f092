"""Scalars over optimizer steps, and values of a metric."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_ntk.plots.history import LABELS, History, require_any, series
from lightning_ntk.plots.style import (
    GREY,
    LINEARIZED_LINE,
    TAYLOR_LINE,
    TRAINED_LINE,
    new_figure,
    panels,
    step_axis,
    tidy,
    value_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_history(history: History, title: str | None = None) -> "tuple[Figure, Any]":
    """Draws the distance between both networks' weights, and both losses.

    Args:
        history: Rows with "step" and any of "relative_weight_distance", "loss" and "linearized_loss".
        title: Title of the figure.

    Returns:
        The figure and its axes: the distance and the losses, where they were measured.

    Raises:
        ValueError: If the history is empty or has none of these scalars.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    present = require_any(history, ["relative_weight_distance", "loss", "linearized_loss"])
    has_distance = "relative_weight_distance" in present
    has_loss = present[-1] != "relative_weight_distance"
    figure, axes = panels(has_distance + has_loss, title)
    if has_distance:
        # After one full-batch step the distance is zero to rounding.
        _draw(axes[0], history, {"relative_weight_distance": None}, after_start=True, negligible=1e-4)
        axes[0].set_title("How far the weights leave the linearized path", fontsize=10)
    if has_loss:
        _draw(axes[-1], history, {"loss": "trained network", "linearized_loss": "linearized network"})
        axes[-1].set_title("Loss of both networks", fontsize=10)
    return figure, axes


def plot_accuracies(history: History, title: str | None = None) -> "tuple[Figure, Any]":
    """Draws the accuracies of the trained, the linearized and the expanded network.

    Args:
        history: Rows with "step" and any of "accuracy", "linearized_accuracy" and "taylor_accuracy", from 0 to 1.
        title: Title of the figure.

    Returns:
        The figure and its only axes.

    Raises:
        ValueError: If the history is empty or has none of these scalars.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    networks = {
        "accuracy": "trained network",
        "linearized_accuracy": "linearized network",
        "taylor_accuracy": "expansion at the trained weights",
    }
    require_any(history, list(networks))
    figure, (axis,) = panels(1, width=5.4)
    from matplotlib.ticker import PercentFormatter

    _draw(axis, history, networks, logarithmic=False)
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.set_title(title or "How much is classified correctly", fontsize=10)
    axis.set_ylim(bottom=max(0.0, axis.get_ylim()[0]), top=min(1.01, axis.get_ylim()[1] + 0.01))
    return figure, axis


def plot_kernel(history: History, title: str | None = None) -> "tuple[Figure, Any]":
    """Draws how far the kernel has turned, changed, and how fast it moves.

    Args:
        history: Rows with "step" and any of "kernel_distance", "kernel_change" and "kernel_velocity".
        title: Title of the figure.

    Returns:
        The figure and one axes for each scalar that was measured.

    Raises:
        ValueError: If the history is empty or has none of these scalars.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    titles = {
        "kernel_distance": "How far the kernel has turned",
        "kernel_change": "How much the kernel has changed",
        "kernel_velocity": "How fast it turns, per step",
    }
    present = require_any(history, list(titles))
    figure, axes = panels(len(present), title)
    moved = [row for row in history if row["step"] > 0]
    for axis, key in zip(axes, present, strict=True):
        _draw(axis, moved, {key: None}, negligible=1e-8)
        axis.set_title(titles[key], fontsize=10)
    return figure, axes


def plot_effective_time(history: History, title: str | None = None) -> "tuple[Figure, Any]":
    """Draws when the linearized network comes closest to the trained one, and how close.

    Args:
        history: Rows with "step", "closest_time" and "closest_distance", and optionally "relative_weight_distance" and
            "distance_floor". Distances are relative to the displacement of the trained weights.
        title: Title of the figure.

    Returns:
        The figure and its two axes: the time and the distances.

    Raises:
        ValueError: If the history is empty or has no closest time.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    require_any(history, ["closest_time"])
    figure, (time, distance) = panels(2, title)
    moved = [row for row in history if row["step"] > 0]
    steps, _ = series(moved, "closest_time")
    time.plot(steps, steps, color=GREY, linewidth=1, label="as fast as the linearized network")
    _draw(time, moved, {"closest_time": "trained network"})
    time.set_title("How far along the linearized path the run is", fontsize=10)
    distances = {
        "relative_weight_distance": "at the same step",
        "closest_distance": "at the closest time",
        "distance_floor": "smallest in the span of $J^\\top$",
    }
    _draw(distance, moved, distances, negligible=1e-4)
    distance.set_ylabel("weight distance / displacement")
    distance.set_title("What of the distance is only a matter of time", fontsize=10)
    return figure, (time, distance)


def plot_values(
    values: Sequence[float],
    label: str,
    ax: "Axes | None" = None,
    *,
    bounds: tuple[float | None, float | None] = (None, None),
) -> "tuple[Figure, Axes]":
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
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if not values:
        raise ValueError("Expected at least one value to plot but got none.")
    if ax is None:
        ax = new_figure(4.6, 3.6).subplots()
    ax.plot(range(1, len(values) + 1), values, **TRAINED_LINE)  # type: ignore[arg-type]
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
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure, ax


def _draw(
    axis: Any,
    history: History,
    curves: Mapping[str, str | None],
    *,
    after_start: bool = False,
    negligible: float = 0.0,
    logarithmic: bool = True,
) -> None:
    """Draws scalars over steps, with a legend of those that have a label; the axis is named after the first."""
    drawn: list[float] = []
    for (key, label), line in zip(curves.items(), (TRAINED_LINE, LINEARIZED_LINE, TAYLOR_LINE), strict=False):
        steps, values = series(history, key, after_start=after_start)
        if steps:
            axis.plot(steps, values, **line, label=label)
            drawn += values
    axis.set_ylabel(LABELS[next(iter(curves))])
    if any(curves.values()):
        axis.legend(frameon=False)
    step_axis(axis, [row["step"] for row in history])
    if logarithmic:
        value_axis(axis, drawn, negligible=negligible)
    else:
        tidy(axis)
