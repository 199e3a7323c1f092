"""Figures of a monitored run, drawn with matplotlib."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Two colours of the Okabe-Ito palette, which stay apart for colour-blind readers; line styles tell them apart in print.
_TRAINED, _LINEARIZED = "#0072B2", "#D55E00"


def plot_history(history: Sequence[Mapping[str, float]], title: str | None = None) -> "tuple[Figure, Any]":
    """Distance between the trained and the linearised weights, and the losses of both, over optimizer steps.

    Args:
        history: Rows with "step", "relative_weight_distance", "loss" and "linearized_loss".
        title: Written above the figure.

    Returns:
        The figure and its two axes.

    Raises:
        ValueError: If the history is empty.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if not history:
        raise ValueError("Expected a history with at least one measurement but it is empty: plot after training.")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Plots need matplotlib, which is not installed: pip install 'lightning-ntk[plot]'."
        ) from error
    steps = [row["step"] for row in history]
    # A figure of its own, without pyplot: the user's backend and open figures are left alone.
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    distance, loss = figure.subplots(1, 2)
    moved = [row for row in history if row["step"] > 0]
    distance.plot(
        [row["step"] for row in moved],
        [row["relative_weight_distance"] for row in moved],
        "o-", color=_TRAINED, markersize=4,
    )  # fmt: skip
    distance.set_ylabel(r"relative weight distance  $\|w_t - w_\mathrm{lin}(t)\| \,/\, \|w_t - w_0\|$")
    distance.set_title("How far the weights leave the linearised path", fontsize=10)
    _log_axes(distance, [row["relative_weight_distance"] for row in moved], steps)
    largest = max((row["relative_weight_distance"] for row in moved), default=0.0)
    if largest > 0:
        # After one full-batch step the distance is zero to rounding: that point must not take most of the axis.
        distance.set_ylim(bottom=max(distance.get_ylim()[0], 1e-4 * largest))
    loss.plot(steps, [row["loss"] for row in history], "o-", color=_TRAINED, markersize=4, label="trained network")
    loss.plot(
        steps,
        [row["linearized_loss"] for row in history],
        "s--", color=_LINEARIZED, markersize=3.5, markerfacecolor="none", label="linearised network",
    )  # fmt: skip
    loss.set_ylabel("loss on the reference set")
    loss.set_title("Loss of both networks", fontsize=10)
    loss.legend(frameon=False)
    _log_axes(loss, [row[key] for row in history for key in ("loss", "linearized_loss")], steps)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure, (distance, loss)


def _log_axes(axis: Any, values: Sequence[float], steps: Sequence[float]) -> None:
    axis.set_xlabel("optimizer step")
    if max(steps) > 20:
        # Linear up to the first step, so that step 0 has a place.
        axis.set_xscale("symlog", linthresh=1, linscale=0.3)
        axis.set_xlim(left=0)
    positive = [value for value in values if value > 0]
    if positive and max(positive) > 5 * min(positive):
        axis.set_yscale("log")
    axis.grid(alpha=0.25, which="both", linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
