"""Several runs in one figure."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning_ntk.plots.history import LABELS, History, Run, require_any, rows_of
from lightning_ntk.plots.scalars import draw_scalars
from lightning_ntk.plots.style import GREY, MARKERS, PALETTE, TRAINED, Drawing, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Runs: TypeAlias = "Mapping[str, Run] | Sequence[tuple[str, Run] | Run]"

# More curves in one panel cannot be told apart.
_MOST_CURVES = 6
_DEFAULT_SCALARS = ("relative_weight_distance", "prediction_rmse", "loss")


def plot_runs(
    runs: Runs,
    scalars: Sequence[str] | None = None,
    title: str | None = None,
    *,
    x: str = "step",
    ax: "Axes | None" = None,
) -> Drawing:
    """Draws the same scalars of several runs over optimizer steps, or at equal loss.

    At one learning rate, networks of different widths train at different speeds. The distance at equal steps then also
    reflects the speed; at equal loss (`x="loss"`) it does not.

    Up to six runs share a panel for each scalar. More runs get a panel each, with the first scalar only and the other runs
    in gray.

    Args:
        runs: The runs by their labels, as a mapping or as pairs (label, run). A run is a monitor, its history or a DataFrame.
            Monitors without labels are labeled by their names.
        scalars: Names of the scalars. Default: "relative_weight_distance", "prediction_rmse" and "loss", if measured.
        title: Title of the figure.
        x: The scalar on the horizontal axis: "step", or "loss", which falls from left to right.
        ax: Axes to draw the first scalar on, for up to six runs. Default: those of a new figure.

    Returns:
        The figure and its axes, one for each scalar or one for each run, or `ax`.

    Raises:
        TypeError: If a run is none of these.
        ValueError: If there are no runs, if a scalar was measured in none of them, or if there are too many for `ax`.

    Example:
        >>> narrow = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
        >>> wide = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.5}]
        >>> figure, axes = plot_runs({"width 32": narrow, "width 64": wide})
    """
    labeled = _labeled(runs)
    rows = [row for _, history in labeled for row in history]
    scalars = require_any(rows, [key for key in _DEFAULT_SCALARS if key != x]) if scalars is None else scalars
    for key in scalars:
        require_any(rows, [key])
    require_any(rows, [x])
    if len(labeled) > _MOST_CURVES and ax is None:
        return _small_multiples(labeled, scalars[0], title, x)
    if len(labeled) > _MOST_CURVES:
        raise ValueError(f"Expected at most {_MOST_CURVES} runs with argument `ax` but got {len(labeled)}.")
    figure, axes = panels(len(scalars), title, size=(4.4, 3.7), ax=ax)
    styles = [
        {"label": label, "color": color, "marker": marker, "markersize": 3.5, "linewidth": 1.4}
        for (label, _), color, marker in zip(labeled, PALETTE, MARKERS, strict=False)
    ]
    for axis, key in zip(axes, scalars, strict=False):
        draw_scalars(axis, [(history, key, style) for (_, history), style in zip(labeled, styles, strict=True)], x)
    if ax is not None:
        ax.legend(frameon=False, fontsize=9)
        ax.set_title(title or "", fontsize=10)
        return Drawing(figure, ax)
    fitting = int(11 * figure.get_figwidth()) // (max(len(label) for label, _ in labeled) + 8)
    columns = min(max(1, fitting), len(labeled))
    curves, _ = axes[0].get_legend_handles_labels()
    figure.legend(handles=curves, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return Drawing(figure, axes)


def _labeled(runs: Runs) -> list[tuple[str, History]]:
    """The label and the rows of each run."""
    pairs: list[Any] = list(runs.items()) if isinstance(runs, Mapping) else list(runs)
    if not pairs:
        raise ValueError("Expected at least one run, such as {label: monitor}, but got none.")
    if all(isinstance(row, Mapping) for row in pairs):
        raise TypeError("Expected several runs but got the rows of one history: give it a label, {label: history}.")
    labeled = []
    for number, pair in enumerate(pairs, 1):
        named = isinstance(pair, Sequence) and len(pair) == 2 and isinstance(pair[0], str)
        label, run = pair if named else (getattr(pair, "name", f"run {number}"), pair)
        labeled.append((label, rows_of(run)))
    return labeled


def _small_multiples(runs: Sequence[tuple[str, History]], key: str, title: str | None, x: str) -> Drawing:
    columns = min(5, math.ceil(math.sqrt(len(runs))))
    figure, axes = panels(len(runs), title, columns=columns, size=(2.4, 2.0), shared=True)
    others = [(history, key, {"color": GREY, "linewidth": 0.6, "alpha": 0.5}) for _, history in runs]
    for axis, (label, history) in zip(axes, runs, strict=True):
        draw_scalars(axis, [*others, (history, key, {"color": TRAINED, "linewidth": 2})], x, named=False)
        axis.set_title(label, fontsize=9)
        axis.set(xlabel=None, ylabel=None)
    figure.supxlabel("optimizer step" if x == "step" else LABELS.get(x, x), fontsize=10)
    figure.supylabel(LABELS.get(key, key), fontsize=9)
    return Drawing(figure, axes)
