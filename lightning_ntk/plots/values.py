"""One value, or successive values of one quantity."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_ntk.plots.style import TRAINED_LINE, new_figure, value_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_values(values: Sequence[float], label: str, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
    """Successive values of one quantity, or one value by itself with its number.

    Args:
        values: In the order in which they were measured.
        label: Of the vertical axis.
        ax: Axes to draw on. Default: those of a new figure.

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
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure, ax
