"""Outputs of the linearized network over outputs of the trained one."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_ntk.functional.predictions import prediction_rmse
from lightning_ntk.plots.style import GREY, TRAINED, Drawing, panels, tidy
from lightning_ntk.utilities.shapes import Float
from lightning_ntk.utilities.validation import require_same_shape

# With more outputs than this, all share one panel.
_MOST_PANELS = 12
# With more points than this, a panel shows their density.
_MANY_POINTS = 3000


def plot_predictions(
    outputs: Float[Tensor, "N K"],
    linearized_outputs: Float[Tensor, "N K"],
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> Drawing:
    """Draws outputs of the linearized network over those of the trained one.

    They agree on the diagonal. The title of each panel gives their root mean square difference.

    Args:
        outputs: Outputs of the trained network, `(N, K)`.
        linearized_outputs: Outputs of the linearized network at the same time, `(N, K)`.
        names: Names of the K outputs. Default: their numbers.
        title: Title of the figure.

    Returns:
        The figure and its axes, one panel for each output, or a single panel for more than twelve.

    Raises:
        ValueError: If the shapes differ or are not `(N, K)`, or if there are not K names.
    """
    require_same_shape(outputs=outputs, linearized_outputs=linearized_outputs)
    if outputs.dim() != 2 or outputs.numel() == 0:
        raise ValueError(f"Expected outputs of shape (N, K) but got {tuple(outputs.shape)}.")
    real, predicted = outputs.detach().cpu().double(), linearized_outputs.detach().cpu().double()
    count = real.shape[1]
    if names is not None and len(names) != count:
        raise ValueError(f"Expected {count} names, one for each output, but got {len(names)}.")
    if count > _MOST_PANELS:
        real, predicted, labels = real.reshape(-1, 1), predicted.reshape(-1, 1), [f"all {count} outputs"]
    else:
        labels = list(names) if names is not None else [f"output {k}" for k in range(count)] if count > 1 else [""]
    columns, size = (5 if len(labels) > 8 else 4), (2.1 if len(labels) > 1 else 4.4)
    title = title or "Linearized against trained network"
    figure, axes = panels(len(labels), title, columns=columns, size=(size, size), shared=True)
    finite = real.isfinite() & predicted.isfinite()
    values = real[finite].tolist() + predicted[finite].tolist()
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.04 * (high - low) or 0.5
    limits = low - margin, high + margin
    for k, (axis, label) in enumerate(zip(axes, labels, strict=True)):
        axis.axline((0, 0), slope=1, color=GREY, linewidth=1)
        _draw(axis, real[:, k], predicted[:, k], limits)
        axis.set(xlim=limits, ylim=limits, aspect="equal")
        rmse = prediction_rmse(real[:, k], predicted[:, k])
        axis.set_title(f"{label}  rms {rmse:.2g}".strip(), fontsize=9)
        tidy(axis)
    figure.supxlabel("output of the trained network", fontsize=10)
    figure.supylabel("output of the linearized network", fontsize=10)
    return Drawing(figure, axes)


def _draw(axis: Any, real: Tensor, predicted: Tensor, limits: tuple[float, float]) -> None:
    if len(real) > _MANY_POINTS:
        extent = (*limits, *limits)
        axis.hexbin(real, predicted, gridsize=70, bins="log", mincnt=1, cmap="cividis_r", linewidths=0, extent=extent)
    else:
        alpha = max(0.15, min(0.8, 100 / len(real)))
        axis.plot(real, predicted, "o", color=TRAINED, markersize=2.5, alpha=alpha, markeredgewidth=0, rasterized=True)
