"""What a monitor writes to the loggers of a Trainer besides its scalars: figures, a layout of charts, HParams."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lightning_ntk.comparison.run_comparison import Observation
from lightning_ntk.plots import (
    plot_accuracies,
    plot_history,
    plot_kernel,
    plot_parameters,
    plot_predictions,
    plot_spectrum,
)
from lightning_ntk.plots.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By which runs are compared in the HParams tab of TensorBoard: those that mean the same in all of them.
COMPARED = (
    "relative_weight_distance", "weight_cosine", "prediction_rmse", "loss", "linearized_loss", "kernel_distance",
)  # fmt: skip
# Charts of the Custom Scalars tab of TensorBoard, by title: what is drawn over one another.
_CHARTS = {
    "loss of the trained and the linearized network": ("loss", "linearized_loss"),
    "accuracy of the trained, the linearized and the expanded network": (
        "accuracy", "linearized_accuracy", "taylor_accuracy",
    ),
    "relative distances": ("relative_weight_distance", "taylor_gap"),
    "weight distance and displacement": ("weight_distance", "displacement"),
    "direction and length of the displacement": ("weight_cosine", "weight_norm_ratio"),
    "prediction RMSE": ("prediction_rmse",),
    "how far the kernel has turned": ("kernel_distance",),
    "how much the kernel has changed": ("kernel_change",),
    "loss on the evaluation set": ("evaluation/loss", "evaluation/linearized_loss"),
}  # fmt: skip
_DOTS_PER_INCH = 120


def layout(absent: Mapping[str, Sequence[str]]) -> dict[str, dict[str, list[Any]]]:
    """Charts for the Custom Scalars tab of TensorBoard: a category for each monitor, which overlays real and linearized network.

    Args:
        absent: By the name of each monitor, beginnings of the tags that it will not log.

    Returns:
        What `SummaryWriter.add_custom_scalars` takes. Tags in it are regular expressions.
    """
    return {
        name: {
            title: ["Multiline", [f"^{re.escape(f'{name}/{tag}')}$" for tag in tags]]
            for title, tags in _CHARTS.items()
            if not tags[0].startswith(tuple(missing))
        }
        for name, missing in absent.items()
    }


@rank_zero_only
def announce(trainer: Trainer, absent: Mapping[str, Sequence[str]]) -> None:
    """Tells TensorBoard, before anything is logged, which charts to draw and by which scalars to compare runs.

    A layout that the run itself adds later takes the place of this one. HParams of one run are described once and for all,
    the first description counts: with a logger that describes them by `hp_metric` alone, they are described here.

    Args:
        trainer: Before it logs the hyperparameters.
        absent: By the name of each monitor, beginnings of the tags that it will not log.
    """
    metrics = {
        f"{name}/{tag}": 0 for name, missing in absent.items() for tag in COMPARED if not tag.startswith(tuple(missing))
    }
    for logger in _of_tensorboard(trainer.loggers):
        with _harmless("charts"):
            logger.experiment.add_custom_scalars(layout(absent))
        with _harmless("HParams"):
            parameters = _hyperparameters(trainer)
            if parameters and logger._default_hp_metric:
                experiment, _, _ = _summaries(logger, parameters, {"hp_metric": -1, **metrics})
                logger.experiment._get_file_writer().add_summary(experiment)


@rank_zero_only
def describe_run(trainer: Trainer, tags: Sequence[str]) -> None:
    """Adds a run that is over to the HParams tab of TensorBoard, with these scalars, where its logger has not done so.

    Args:
        trainer: At the end of a fit.
        tags: Of scalars that were logged; their last values are those of the run.
    """
    for logger in _of_tensorboard(trainer.loggers):
        with _harmless("HParams"):
            if logger.hparams and not logger._default_hp_metric:
                for summary in _summaries(logger, logger.hparams, dict.fromkeys(tags, 0)):
                    logger.experiment._get_file_writer().add_summary(summary)


def figures_of(
    history: History, observation: Observation | None
) -> Iterator[tuple[str, "Callable[[], tuple[Figure, Any]]"]]:
    """Figures of a run that is over, those for which there is something to draw.

    Args:
        history: Rows with "step".
        observation: What is known of the linearized network.

    Yields:
        Names, and functions that draw.
    """
    measured = {key for row in history if row["step"] > 0 for key in row}
    if "relative_weight_distance" in measured:
        yield "history", lambda: plot_history(history)
    if "accuracy" in measured:
        yield "accuracies", lambda: plot_accuracies(history)
    if "kernel_distance" in measured:
        yield "kernel", lambda: plot_kernel(history)
    if any(key.startswith("parameter/") for key in measured):
        yield "parameters", lambda: plot_parameters(history)
    if observation is None:
        return
    if observation.training is not None:
        modes, time = observation.training.modes, observation.kernel_time
        yield "spectrum", lambda: plot_spectrum(modes.eigenvalues, modes.coordinates, time=time)
    if observation.outputs is not None:
        outputs = observation.outputs
        yield "predictions", lambda: plot_predictions(*outputs)


@rank_zero_only
def log_figures(
    loggers: Sequence[Logger],
    drawn: "Iterable[tuple[str, Callable[[], tuple[Figure, Any]]]]",
    *,
    name: str,
    step: int,
) -> None:
    """Draws figures and writes them to the loggers that can hold them: TensorBoard, Weights & Biases and MLflow.

    A figure that cannot be drawn or written is reported, and the next one is drawn.

    Args:
        loggers: Of the Trainer; others are passed over, without drawing anything if there are only such.
        drawn: Names, and functions that draw.
        name: Of the monitor; a figure is logged as `name/figure/...`.
        step: The optimizer step.
    """
    loggers = [logger for logger in loggers if isinstance(logger, TensorBoardLogger | WandbLogger | MLFlowLogger)]
    for what, draw in drawn if loggers else ():
        with _harmless(f"figure {what!r}"):
            figure, _ = draw()
            for logger in loggers:
                _log_figure(logger, f"{name}/figure/{what}", figure, step)


@contextmanager
def _harmless(what: str) -> Iterator[None]:
    """Reports a failure: nothing that is only looked at may cost a run, and some of it is beyond what Lightning promises."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"LinearizationMonitor writes no {what} of this run. {type(error).__name__}: {error}")


def _log_figure(logger: Logger, tag: str, figure: "Figure", step: int) -> None:
    if isinstance(logger, MLFlowLogger):
        logger.experiment.log_figure(logger.run_id, figure, f"{tag}.png")
        return
    image = _rendered(figure)
    if isinstance(logger, WandbLogger):
        logger.log_image(tag, [image], step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(tag, image, step, dataformats="HWC")


def _rendered(figure: "Figure") -> Any:
    """The pixels `(height, width, 3)`: the loggers' own way would import pyplot, and with it a backend."""
    import numpy
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(_DOTS_PER_INCH)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return numpy.asarray(canvas.buffer_rgba())[..., :3].copy()


def _of_tensorboard(loggers: Sequence[Logger]) -> list[TensorBoardLogger]:
    # Without tensorboard Lightning writes with tensorboardX, which has neither.
    known = find_spec("tensorboard") is not None
    return [logger for logger in loggers if known and isinstance(logger, TensorBoardLogger)]


def _hyperparameters(trainer: Trainer) -> dict[str, Any]:
    """Those that the Trainer logs, of the LightningModule and of the datamodule."""
    datamodule = getattr(trainer, "datamodule", None)
    sources = [source for source in (trainer.lightning_module, datamodule) if source is not None]
    if not trainer.enable_autolog_hparams:
        return {}
    return {
        key: value
        for source in sources
        if source._log_hyperparams
        for key, value in source.hparams_initial.items()
        if key != "_class_path"
    }


def _summaries(logger: TensorBoardLogger, parameters: Any, metrics: Mapping[str, float]) -> tuple[Any, Any, Any]:
    """Of the experiment, of the start and of the end of a session, as the logger itself would write them."""
    from torch.utils.tensorboard import summary

    flat = logger._sanitize_params(_flatten_dict(_convert_params(parameters)))
    describe: Any = summary.hparams
    experiment, start, end = describe(flat, dict(metrics))
    return experiment, start, end
