"""Writes verdicts, pages, figures, charts and HParams to loggers."""

import io
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lightning_ntk.callback.status import warn
from lightning_ntk.functional.verdict import Verdict
from lightning_ntk.plots import (
    Drawing,
    plot_accuracies,
    plot_history,
    plot_kernel,
    plot_parameters,
    plot_predictions,
    plot_regimes,
    plot_spectrum,
)
from lightning_ntk.plots.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw: TypeAlias = Callable[[], Drawing]

# The metrics of TensorBoard's HParams tab: scalars that mean the same in every run.
COMPARED = (
    "relative_weight_distance", "weight_cosine", "prediction_rmse", "loss", "linearized_loss", "kernel_distance",
)  # fmt: skip
# The charts of TensorBoard's Custom Scalars tab, by title, and the scalars that each overlays.
_CHARTS = {
    "relative weight distance": ("relative_weight_distance",),
    "loss": ("loss", "linearized_loss"),
    "accuracy": ("accuracy", "linearized_accuracy", "taylor_accuracy"),
    "perplexity": ("perplexity", "linearized_perplexity", "taylor_perplexity"),
    "loss on the evaluation set": ("evaluation/loss", "evaluation/linearized_loss"),
    "accuracy on the evaluation set": (
        "evaluation/accuracy", "evaluation/linearized_accuracy", "evaluation/taylor_accuracy",
    ),
    "perplexity on the evaluation set": (
        "evaluation/perplexity", "evaluation/linearized_perplexity", "evaluation/taylor_perplexity",
    ),
    "Taylor gap": ("taylor_gap",),
    "kernel distance": ("kernel_distance",),
    "kernel change": ("kernel_change",),
    "weight distance and displacement": ("weight_distance", "displacement"),
    "cosine of the displacements": ("weight_cosine",),
    "norm ratio of the displacements": ("weight_norm_ratio",),
    "alignment of kernel and labels": ("regime/alignment", "regime/centered_alignment"),
}  # fmt: skip
_DOTS_PER_INCH = 150
# TensorBoard's charts with their values, and not with averages over the last measurements.
_UNSMOOTHED = "http://localhost:6006/#custom_scalars&_smoothingWeight=0"


@rank_zero_only
def log_charts(loggers: Sequence[Logger], histories: Mapping[str, History]) -> None:
    """Lays out TensorBoard's Custom Scalars tab with the measured scalars.

    It has a category for each monitor.

    The last layout of a run counts: a layout that the user adds later replaces this one.
    """
    layout = {
        name: {
            title: ["Multiline", [f"^{re.escape(f'{name}/{tag}')}$" for tag in tags if tag in history[-1]]]
            for title, tags in _CHARTS.items()
            if tags[0] in history[-1]
        }
        for name, history in histories.items()
        if history
    }
    for logger in _tensorboard_among(loggers) if layout else ():
        with _harmless("charts"):
            logger.experiment.add_custom_scalars(layout)


@rank_zero_only
def log_hparams(loggers: Sequence[Logger], histories: Mapping[str, History], *, step: int) -> None:
    """Adds a finished run to TensorBoard's HParams tab.

    Its metrics are the distances at the last step.

    The first description of a run counts, and loggers with `default_hp_metric=True` have already given theirs.
    """
    scalars = {
        f"{name}/{tag}": history[-1][tag]
        for name, history in histories.items()
        for tag in COMPARED
        if history and history[-1]["step"] == step and tag in history[-1]
    }
    for logger in _tensorboard_among(loggers):
        with _harmless("HParams"):
            if logger.hparams and not logger._default_hp_metric:
                logger.log_hyperparams(logger.hparams, scalars, step)


def figures_of(
    history: History,
    *,
    spectrum: tuple[Tensor, Tensor] | None,
    kernel_time: float | None,
    outputs: tuple[Tensor, Tensor] | None,
) -> dict[str, Draw]:
    """Functions that draw the figures of a finished run, by name.

    They take the arguments of `plot_spectrum` and the like.

    Each has one panel, because cards of loggers are small.
    """
    over_steps: dict[str, tuple[Callable[[History], Drawing], tuple[str, ...]]] = {
        "relative_weight_distance": (plot_history, ("relative_weight_distance",)),
        "loss": (plot_history, ("loss", "linearized_loss")),
        "accuracy": (plot_accuracies, ("accuracy", "linearized_accuracy", "taylor_accuracy")),
        "kernel_distance": (plot_kernel, ("kernel_distance",)),
        "kernel_change": (plot_kernel, ("kernel_change",)),
        "kernel_velocity": (plot_kernel, ("kernel_velocity",)),
    }
    measured = {key for row in history if row["step"] > 0 for key in row}
    figures: dict[str, Draw] = {
        name: partial(draw, [{key: row[key] for key in ("step", "exact", *keys) if key in row} for row in history])
        for name, (draw, keys) in over_steps.items()
        if name in measured
    }
    if any(key.startswith("parameter/") for key in measured):
        figures["parameters"] = partial(plot_parameters, history)
    if any(key.startswith("regime/") for key in measured):
        figures["regimes"] = partial(plot_regimes, history)
    if spectrum is not None:
        figures["spectrum"] = partial(plot_spectrum, *spectrum, time=kernel_time)
    if outputs is not None:
        figures["predictions"] = partial(plot_predictions, *outputs)
    return figures


@rank_zero_only
def log_figures(loggers: Sequence[Logger], figures: Mapping[str, Draw], *, name: str, step: int) -> None:
    """Draws figures for TensorBoard, Weights & Biases and MLflow, and logs them as `name/figure/...`."""
    loggers = [logger for logger in loggers if isinstance(logger, TensorBoardLogger | WandbLogger | MLFlowLogger)]
    for what, draw in figures.items() if loggers else ():
        with _harmless(f"figure {what!r}"):
            figure, _ = draw()
            for logger in loggers:
                _log_figure(logger, f"{name}/figure/{what}", figure, step)


def unsmoothed(loggers: Sequence[Logger]) -> str:
    """Says how to view a run's curves in TensorBoard without smoothing.

    It is empty without a TensorBoardLogger.
    """
    folders = [
        os.path.relpath(logger.root_dir) for logger in _tensorboard_among(loggers) if "://" not in logger.root_dir
    ]
    if not folders:
        return ""
    return f"Curves: `tensorboard --logdir {shlex.quote(folders[0])}`, without smoothing at {_UNSMOOTHED}"


@rank_zero_only
def log_verdict(loggers: Sequence[Logger], verdict: Verdict, summary: str, *, name: str, step: int) -> None:
    """Logs the verdict of a finished run.

    TensorBoard gets a text with the table, W&B a word in its summary and MLflow one in its tags.
    """
    for logger in loggers:
        with _harmless(f"verdict to {type(logger).__name__}"):
            if isinstance(logger, TensorBoardLogger):
                sentence, _, table = summary.partition("\n\n")
                text = f"**{verdict.word.capitalize()}.** {sentence}\n\nWhy: {verdict.reason}.\n\n```\n{table}\n```"
                logger.experiment.add_text(f"{name}/verdict", text, step)
            elif isinstance(logger, WandbLogger):
                logger.experiment.summary[f"{name}/verdict"] = verdict.word
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.set_tag(logger.run_id, f"{name}/verdict", verdict.word)


@rank_zero_only
def log_page(loggers: Sequence[Logger], page: Callable[[], str], *, name: str, step: int) -> None:
    """Logs the HTML page of a finished run as `name/report`.

    Weights & Biases and MLflow get it.
    """
    loggers = [logger for logger in loggers if isinstance(logger, WandbLogger | MLFlowLogger)]
    if not loggers:
        return
    with _harmless("page"):
        text = page()
        for logger in loggers:
            with _harmless(f"page to {type(logger).__name__}"):
                if isinstance(logger, MLFlowLogger):
                    logger.experiment.log_text(logger.run_id, text, f"{name}/report.html")
                else:
                    import wandb

                    html = wandb.Html(io.StringIO(text), inject=False)  # the page has its own style
                    logger.log_metrics({f"{name}/report": html}, step=step)  # type: ignore[dict-item]


@contextmanager
def _harmless(what: str) -> Iterator[None]:
    """Turns an error into a warning, so that it cannot end a run."""
    try:
        yield
    except Exception as error:
        warn(f"LinearizationMonitor writes no {what} of this run. {type(error).__name__}: {error}")


def _log_figure(logger: Logger, tag: str, figure: "Figure", step: int) -> None:
    if isinstance(logger, MLFlowLogger):
        logger.experiment.log_figure(logger.run_id, figure, f"{tag}.png")
    elif isinstance(logger, WandbLogger):
        logger.log_image(tag, [_rendered(figure)], step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(tag, _rendered(figure), step, dataformats="HWC")


def _rendered(figure: "Figure") -> Any:
    """The pixels of a figure, `(height, width, 3)`.

    The loggers' own way would import pyplot, and with it a backend.
    """
    import numpy
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(_DOTS_PER_INCH)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return numpy.asarray(canvas.buffer_rgba())[..., :3].copy()


def _tensorboard_among(loggers: Sequence[Logger]) -> list[TensorBoardLogger]:
    # Without tensorboard, Lightning writes with tensorboardX, which has neither tab.
    return [x for x in loggers if isinstance(x, TensorBoardLogger) and find_spec("tensorboard") is not None]
