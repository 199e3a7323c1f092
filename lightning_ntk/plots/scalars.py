"""Scalars over optimizer steps."""

from typing import TYPE_CHECKING, Any

from lightning_ntk.plots.history import LABELS, History, require_any, series
from lightning_ntk.plots.style import (
    GREY,
    LINEARIZED_LINE,
    TAYLOR_LINE,
    TRAINED_LINE,
    panels,
    step_axis,
    tidy,
    value_axis,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KERNEL_TITLES = {
    "kernel_distance": "How far the kernel has turned",
    "kernel_change": "How much the kernel has changed",
    "kernel_velocity": "How fast it turns, per step",
}


def plot_history(history: History, title: str | None = None) -> "tuple[Figure, Any]":
    """Distance between the trained and the linearized weights, and the losses of both, over optimizer steps.

    Args:
        history: Rows with "step", and "relative_weight_distance", "loss" and "linearized_loss" or some of them.
        title: Written above the figure.

    Returns:
        The figure and its axes: of the distance and of the losses, where they were measured.

    Raises:
        ValueError: If the history is empty or has none of these scalars.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    present = require_any(history, ["relative_weight_distance", "loss", "linearized_loss"])
    has_distance = "relative_weight_distance" in present
    has_loss = present[-1] != "relative_weight_distance"
    figure, axes = panels(has_distance + has_loss)
    steps = [row["step"] for row in history]
    if has_distance:
        distance = axes[0]
        moved = series(history, "relative_weight_distance", after_start=True)
        distance.plot(*moved, **TRAINED_LINE)
        distance.set_ylabel(LABELS["relative_weight_distance"])
        distance.set_title("How far the weights leave the linearized path", fontsize=10)
        step_axis(distance, steps)
        # After one full-batch step the distance is zero to rounding.
        value_axis(distance, moved[1], negligible=1e-4)
    if has_loss:
        _plot_pair(axes[-1], history, {"loss": "trained network", "linearized_loss": "linearized network"})
        axes[-1].set_ylabel(LABELS["loss"])
        axes[-1].set_title("Loss of both networks", fontsize=10)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure, axes


def plot_accuracies(history: History, title: str | None = None) -> "tuple[Figure, Any]":
    """Accuracies of the trained network, of the linearized one, and of the expansion at the trained weights.

    Args:
        history: Rows with "step", and "accuracy", "linearized_accuracy" and "taylor_accuracy" or some of them, from 0 to 1.
        title: Written above the figure.

    Returns:
        The figure and its only axes, which are in percent.

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
    percent = [
        {key: value if key == "step" else 100 * value for key, value in row.items() if key in networks or key == "step"}
        for row in history
    ]
    _plot_pair(axis, percent, networks, logarithmic=False)
    axis.set_ylabel("accuracy on the reference set (%)")
    axis.set_title(title or "How much is classified correctly", fontsize=10)
    axis.set_ylim(bottom=max(0.0, axis.get_ylim()[0]), top=min(101.0, axis.get_ylim()[1] + 1))
    return figure, axis


def plot_kernel(history: History, title: str | None = None) -> "tuple[Figure, Any]":
    """How far the kernel is from the initial one, how much it changed and how fast it moves, over optimizer steps.

    Args:
        history: Rows with "step", and "kernel_distance", "kernel_change" and "kernel_velocity" or some of them.
        title: Written above the figure.

    Returns:
        The figure and its axes, one for each of the scalars that were measured.

    Raises:
        ValueError: If the history is empty or has none of these scalars.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    present = require_any(history, list(_KERNEL_TITLES))
    figure, axes = panels(len(present))
    for axis, key in zip(axes, present, strict=True):
        steps, values = series(history, key, after_start=True)
        axis.plot(steps, values, **TRAINED_LINE)
        axis.set_ylabel(LABELS[key])
        axis.set_title(_KERNEL_TITLES[key], fontsize=10)
        step_axis(axis, steps)
        value_axis(axis, values, negligible=1e-8)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure, axes


def plot_effective_time(history: History, title: str | None = None) -> "tuple[Figure, Any]":
    """At which time the linearized network is closest to the trained one, and how close.

    Args:
        history: Rows with "step", "closest_time" and "closest_distance", and where measured "relative_weight_distance" and
            "distance_floor"; all distances relative to the displacement of the trained weights.
        title: Written above the figure.

    Returns:
        The figure and its two axes: of the time and of the distances.

    Raises:
        ValueError: If the history is empty or has no closest time.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    require_any(history, ["closest_time"])
    figure, (time, distance) = panels(2)
    moved, closest = series(history, "closest_time", after_start=True)
    time.plot(moved, moved, color=GREY, linewidth=1, label="as fast as the linearized network")
    time.plot(moved, closest, **TRAINED_LINE, label="trained network")
    time.set_ylabel(LABELS["closest_time"])
    time.set_title("How far along the linearized path the run is", fontsize=10)
    time.legend(frameon=False)
    step_axis(time, moved)
    value_axis(time, closest)
    drawn: list[float] = []
    for key, label, line in (
        ("relative_weight_distance", "at the same step", TRAINED_LINE),
        ("closest_distance", "at the closest time", LINEARIZED_LINE),
        ("distance_floor", "smallest in the span of $J^\\top$", TAYLOR_LINE),
    ):
        points = series(history, key, after_start=True)
        if points[0]:
            distance.plot(*points, **line, label=label)
            drawn += points[1]
    distance.set_ylabel("weight distance / displacement")
    distance.set_title("What of the distance is only a matter of time", fontsize=10)
    distance.legend(frameon=False)
    step_axis(distance, moved)
    value_axis(distance, drawn, negligible=1e-4)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure, (time, distance)


def _plot_pair(axis: Any, history: History, labels: dict[str, str], *, logarithmic: bool = True) -> None:
    drawn: list[float] = []
    for (key, label), line in zip(labels.items(), (TRAINED_LINE, LINEARIZED_LINE, TAYLOR_LINE), strict=False):
        points = series(history, key)
        if points[0]:
            axis.plot(*points, **line, label=label)
            drawn += points[1]
    axis.legend(frameon=False)
    step_axis(axis, [row["step"] for row in history])
    if logarithmic:
        value_axis(axis, drawn)
    else:
        tidy(axis)
