"""The panel of regimes over optimizer steps, with its 95 % intervals."""

import math
from collections.abc import Mapping
from typing import Any

from lightning_ntk.plots.history import History, Run, require_any, rows_of
from lightning_ntk.plots.style import GREY, LINES, MARKERS, PALETTE, Drawing, panels, step_axis, tidy, value_axis

_PREFIX = "regime/"
# Headings with their scalars and the labels of these.
_PANELS: Mapping[str, Mapping[str, str]] = {
    "Alignment of kernel and labels": {"alignment": "kernel", "centered_alignment": "centered"},
    "Effective rank of the kernel": {"effective_rank": ""},
    "Trace of the kernel": {"trace": ""},
    "Edge of stability": {"edge": ""},
    "Largest curvature": {"curvature": ""},
    "Low-rank measure of the features": {"low_rank": ""},
}
_BY_LAYER = {
    "alignment": "Alignment by layer",
    "centered_alignment": "Centered alignment by layer",
    "activation_change": "Change of activations by layer",
}
_MOST_LAYERS = len(PALETTE)
# Panels that depend on the number of samples, with the scalar that the halves of the samples rescale.
_OF_HALVES = {"Edge of stability": f"{_PREFIX}edge", "Largest curvature": f"{_PREFIX}curvature"}


def plot_regimes(history: Run, title: str | None = None) -> Drawing:
    """Plots what the panel of regimes measured.

    Bands are the 95 % intervals of estimates.

    Args:
        history: A monitor with `regime=True`, its history or a DataFrame, with "step" and "regime/...".
        title: Title of the figure.

    Returns:
        The figure and one axes for each quantity that was measured. Of more than seven layers, evenly spaced ones are drawn.

    Raises:
        ValueError: If the history is empty or has no such scalars.
    """
    history = rows_of(history)
    known = [f"{_PREFIX}{key}" for labels in _PANELS.values() for key in labels]
    present = set(require_any(history, known))
    groups = {
        heading: {f"{_PREFIX}{key}": label for key, label in labels.items()} for heading, labels in _PANELS.items()
    }
    groups |= {heading: _layers(history, quantity) for quantity, heading in _BY_LAYER.items()}
    if f"{_PREFIX}edge" in present:
        del groups["Largest curvature"]  # the same curve, in another unit
    shown = [(h, labels) for h, labels in groups.items() if any(key in row for key in labels for row in history)]
    figure, axes = panels(len(shown), title, columns=4, size=(3.7, 3.1))
    for axis, (heading, labels) in zip(axes, shown, strict=True):
        _draw(axis, history, labels)
        axis.set_title(heading, fontsize=10)
        if heading == "Edge of stability":
            axis.axhline(1, color=GREY, linestyle=(0, (1, 2)), linewidth=1, zorder=0.5)
            axis.set_ylabel("learning rate / largest stable one", fontsize=9)
        if heading in _OF_HALVES:
            _draw_halves(axis, history, _OF_HALVES[heading])
        if any(labels.values()):
            axis.legend(frameon=False, fontsize=8)
    return Drawing(figure, axes)


def _layers(history: History, quantity: str) -> dict[str, str]:
    """The scalars of some layers with their names, in network order."""
    start, end = f"{_PREFIX}layer/", f"/{quantity}"
    keys = list(dict.fromkeys(k for row in history for k in row if k.startswith(start) and k.endswith(end)))
    count = min(len(keys), _MOST_LAYERS)
    kept = [keys[round(i * (len(keys) - 1) / max(count - 1, 1))] for i in range(count)]
    return {key: key.removeprefix(start).removesuffix(end) for key in kept}


def _draw(axis: Any, history: History, labels: Mapping[str, str]) -> None:
    seen: list[float] = []
    steps: list[float] = []
    for number, (key, label) in enumerate(labels.items()):
        # Nothing has changed at step 0, which no logarithmic axis can show.
        told = [row for row in history if row["step"] > 0 or not key.endswith("change")]
        rows = [row for row in told if math.isfinite(row.get(key, math.nan))]
        if not rows:
            continue
        at, values = [row["step"] for row in rows], [row[key] for row in rows]
        style: dict[str, Any] = {"color": PALETTE[number], "marker": MARKERS[number], "markersize": 3.5}
        axis.plot(at, values, label=label or None, **(LINES[0] | style))
        if all(f"{key}_low" in row for row in rows):
            low, high = ([row[f"{key}_{end}"] for row in rows] for end in ("low", "high"))
            axis.fill_between(at, low, high, color=PALETTE[number], alpha=0.15, linewidth=0)
        seen, steps = seen + values, steps + at
    step_axis(axis, steps)
    value_axis(axis, seen)
    tidy(axis)


def _draw_halves(axis: Any, history: History, key: str) -> None:
    """A faint line for half of the samples: where it is far above the curve, all samples may be far below it."""
    whole, halves = f"{_PREFIX}curvature", f"{_PREFIX}curvature_of_halves"
    rows = [row for row in history if key in row and row.get(whole) and halves in row]
    if rows:
        values = [row[key] * row[halves] / row[whole] for row in rows]
        axis.plot([row["step"] for row in rows], values, color=GREY, linestyle=":", label="half of the samples")
        axis.legend(frameon=False, fontsize=8)
