"""The Lightning callback: when to capture, when to measure, where to log."""

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, TQDMProgressBar, WeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_ntk.closed_form import Dynamics
from lightning_ntk.comparison import compare
from lightning_ntk.dynamics.sgd import SGDSettings
from lightning_ntk.isolation import preserved_rng
from lightning_ntk.linearization import trainable_parameters
from lightning_ntk.plots import plot_history
from lightning_ntk.reference import unpack_pair
from lightning_ntk.run_differences import run_differences
from lightning_ntk.training import LinearizedTraining, require_choice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Measurements per factor of ten in the number of steps, with steps="log".
_LOG_POINTS_PER_DECADE = 8


class LinearizationMonitor(Callback):
    """Logs how far a training run leaves the path of its linearised (neural-tangent-kernel) network.

    When fitting starts, the initial weights, predictions and the empirical neural tangent kernel on the reference set are
    captured. At chosen optimizer steps the weights that the *linearised* network would have after the same steps, with the
    learning rates really used, are computed and compared with those of the run. Training itself is not changed: weights
    after `fit` are bitwise those of a run without the callback.

    Logged to every logger of the Trainer, as `{name}/...` at `step=trainer.global_step`: `weight_distance`,
    `relative_weight_distance`, `weight_cosine`, `weight_norm_ratio`, `displacement`, `prediction_rmse`, `loss`,
    `linearized_loss` and, if asked for, `parameter/<name>`. The same values are in `trainer.callback_metrics`.

    The dynamics are those of full-batch gradient descent on a squared loss. For a run that they do not describe (momentum,
    Adam, minibatches, ...) the comparison is with that idealised run, and this is said once.

    Not supported: losses that are not squared, several optimizers, training on several devices, resuming from a
    checkpoint. They raise a `MisconfigurationException` before training starts.

    Args:
        reference: The training set in a fixed order: a map-style Dataset, a DataLoader (its data set and collate function
            are used, not its sampler), or "train" for the Trainer's own training set.
        steps: An integer n to measure every n optimizer steps, a list of steps, or "log" for roughly logarithmic steps.
            The first (0) and the last step are always measured.
        dynamics: "gradient_descent" follows `torch.optim.SGD` with the learning rates of the run; "gradient_flow" is
            continuous time, the sum of the learning rates; "auto" is gradient descent.
        loss: A squared loss of outputs and targets, the one that the run minimises. Default: `nn.MSELoss()`.
        predict: Maps `(module, inputs)` to outputs `(B, K)`. Default: the LightningModule's `forward`.
        unpack: Maps a batch of the reference to `(inputs, target)`. Default: batches that are such pairs.
        solver: How the modes of the kernel are found: "eigh" (all of them), "lanczos" (those that matter for the length of
            the run, with or without forming the kernel), or "auto" for the cheapest that fits into memory.
        jacobian: "streamed" or, for small models, "stored": see `LinearizedTraining`.
        batch_size: Samples in one pass.
        dtype: Type of the passes, as "float32" or "float64". Default: that of the parameters.
        name: Prefix of the logged tags.
        per_parameter: Whether to log the distance of every parameter tensor too.
        strict: Whether a failing measurement ends the run. Default: it is reported once and training goes on.
        progress: Whether captures and measurements show a progress bar, where the Trainer shows its TQDM one.

    Raises:
        ValueError: If an argument has a value that it cannot have.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LinearizationMonitor(steps=100)], logger=False, enable_checkpointing=False)
    """

    history: list[dict[str, float]]
    """One row for each measurement: "step" and every logged scalar, without the prefix."""
    training: LinearizedTraining | None
    """The captured problem, from the start of fitting on."""

    def __init__(
        self,
        reference: Dataset[Any] | DataLoader[Any] | Literal["train"] = "train",
        steps: int | Sequence[int] | Literal["log"] = "log",
        dynamics: Literal["auto", "gradient_descent", "gradient_flow"] = "auto",
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        predict: Callable[[nn.Module, Any], Tensor] | None = None,
        unpack: Callable[[Any], tuple[Any, Tensor]] | None = None,
        solver: Literal["auto", "eigh", "lanczos"] = "auto",
        jacobian: Literal["streamed", "stored"] = "streamed",
        batch_size: int = 256,
        dtype: Literal["float32", "float64"] | None = None,
        name: str = "ntk",
        per_parameter: bool = False,
        strict: bool = False,
        progress: bool = True,
    ) -> None:
        super().__init__()
        _validate(reference, steps, dynamics, dtype)
        self.reference = reference
        self.steps = steps
        self.dynamics = dynamics
        self.loss = loss
        self.predict = predict
        self.unpack = unpack
        self.solver = solver
        self.jacobian = jacobian
        self.batch_size = batch_size
        self.dtype = dtype
        self.name = name
        self.per_parameter = per_parameter
        self.strict = strict
        self.progress = progress
        self.seconds = {"capture": 0.0, "measurements": 0.0}
        self._reset()

    def _reset(self) -> None:
        self.history = []
        self.training = None
        self._step = 0
        self._lr = 0.0
        self._reported: set[str] = set()

    @property
    def state_key(self) -> str:
        """Distinct for every monitor of a Trainer."""
        return self._generate_state_key(name=self.name)

    def should_measure(self, step: int) -> bool:
        """Whether to measure after optimizer step `step`; override for a schedule of your own."""
        if isinstance(self.steps, int):
            return step % self.steps == 0
        if self.steps == "log":
            exponent = round(_LOG_POINTS_PER_DECADE * math.log10(step)) if step else 0
            return step in (0, round(10 ** (exponent / _LOG_POINTS_PER_DECADE)))
        return step in self.steps

    def plot(self) -> "tuple[Figure, Any]":
        """Distance and losses over optimizer steps: `(figure, axes)`. Needs matplotlib."""
        return plot_history(self.history)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot be supported, before any data is read."""
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy):
            raise MisconfigurationException(
                f"LinearizationMonitor expects training on a single device but got {type(trainer.strategy).__name__}. "
                "Use Trainer(devices=1)."
            )
        if sum(isinstance(c, LinearizationMonitor) and c.name == self.name for c in _callbacks(trainer)) > 1:
            raise MisconfigurationException(
                f"Two LinearizationMonitor callbacks have the name {self.name!r} and would log the same tags. "
                "Give each one its own `name`."
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuses to resume: the weights at which to linearise are those of the start of the interrupted run."""
        if trainer.state.fn == TrainerFn.FITTING:
            raise MisconfigurationException(
                "LinearizationMonitor expects to see the start of training but fit was called with ckpt_path: the weights "
                "at which to linearise are not known. Remove the callback, or start a new run."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Captures the linearised problem and makes the first measurement."""
        self._reset()
        self._step = trainer.global_step  # above 0 in a second fit of the same Trainer
        started = time.perf_counter()
        optimizer = _single_optimizer(trainer)
        unpack = self.unpack or unpack_pair

        def to_device(batch: Any) -> tuple[Any, Tensor | None]:
            # With the hooks of the LightningModule and the datamodule, so that the reference is what training sees.
            return unpack(trainer.strategy.batch_to_device(batch))

        try:
            self.training = LinearizedTraining(
                pl_module,
                self._reference_data(trainer),
                lr=_learning_rate(optimizer),
                loss=self.loss,
                dynamics="gradient_flow" if self.dynamics == "gradient_flow" else "gradient_descent",
                solver=self.solver,
                horizon=_horizon(trainer),
                jacobian=self.jacobian,
                predict=self.predict,
                unpack=to_device,
                batch_size=self.batch_size,
                dtype=None if self.dtype is None else getattr(torch, self.dtype),
                progress=self._shows_progress(trainer),
            )
        except (ValueError, TypeError, MemoryError) as error:
            raise MisconfigurationException(f"LinearizationMonitor cannot capture this run. {error}") from error
        self._online = self.training.follow()
        self._say_what_is_not_described(trainer, pl_module, optimizer)
        self.seconds = {"capture": time.perf_counter() - started, "measurements": 0.0}
        self._measure(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Reads the learning rate of the coming step; at the end of the batch the scheduler has moved on."""
        self._lr = _learning_rate(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advances the linearised network if the optimizer stepped, and measures if it is time."""
        if self.training is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._online.step(SGDSettings(self._lr))
        if self._lr > self.training.max_learning_rate:
            self._report_once(
                "unstable",
                f"At step {self._step} the learning rate {self._lr:.4g} is above {self.training.max_learning_rate:.4g}, the "
                "largest for which the linearised network is stable: it diverges while the run may not.",
            )
        if self.should_measure(self._step) or _is_last_step(trainer):
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the last step of a run that another callback stopped early."""
        # Averaging callbacks have replaced the weights of the last step by now.
        averaged = any(isinstance(c, StochasticWeightAveraging | WeightAveraging) for c in _callbacks(trainer))
        if self.history and self.history[-1]["step"] != self._step and not averaged:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.training is not None
        started = time.perf_counter()
        try:
            with preserved_rng():
                state = self._online.state
                weights = trainable_parameters(pl_module)
                scalars = compare(self.training, state, weights, per_parameter=self.per_parameter)
        except Exception as error:
            if self.strict:
                raise
            self._report_once(
                "failure",
                f"The measurement at step {self._step} failed, and so may later ones; training goes on. "
                f"{type(error).__name__}: {error}",
            )
            return
        self.history.append({"step": float(self._step), **scalars})
        tagged = {f"{self.name}/{tag}": value for tag, value in scalars.items()}
        for logger in trainer.loggers:
            logger.log_metrics(tagged, step=self._step)
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in tagged.items()})
        self.seconds["measurements"] += time.perf_counter() - started

    def _reference_data(self, trainer: Trainer) -> Any:
        if self.reference != "train":
            return self.reference
        loaders = trainer.train_dataloader
        if not isinstance(loaders, DataLoader):
            raise ValueError(
                f'Expected one training DataLoader for reference="train" but got {type(loaders).__name__}. '
                "Give the reference data set itself."
            )
        return loaders

    def _shows_progress(self, trainer: Trainer) -> bool:
        bar = trainer.progress_bar_callback
        return self.progress and isinstance(bar, TQDMProgressBar) and bar.is_enabled

    def _say_what_is_not_described(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert self.training is not None
        differences = list(run_differences(trainer, pl_module, optimizer, len(self.training.reference)))
        if differences:
            self._report_once(
                "differences",
                f"LinearizationMonitor compares this run with full-batch {self.training.dynamics.replace('_', ' ')}, which "
                f"it is not, so that a part of every distance is due to the difference: {'; '.join(differences)}.",
            )

    def _report_once(self, kind: str, message: str) -> None:
        if kind not in self._reported:
            self._reported.add(kind)
            rank_zero_warn(message)


def _validate(reference: Any, steps: Any, dynamics: Any, dtype: Any) -> None:
    if isinstance(reference, str) and reference != "train":
        raise ValueError(
            f'Expected argument `reference` to be a data set, a DataLoader or "train" but got {reference!r}.'
        )
    whole = (
        isinstance(steps, Sequence) and not isinstance(steps, str) and all(isinstance(s, int) and s >= 0 for s in steps)
    )
    if not (steps == "log" or whole or (isinstance(steps, int) and not isinstance(steps, bool) and steps > 0)):
        raise ValueError(
            f'Expected argument `steps` to be a positive integer, a list of steps or "log" but got {steps!r}.'
        )
    require_choice("dynamics", dynamics, Literal["auto", Dynamics])
    require_choice("dtype", dtype, Literal["float32", "float64", None])


def _single_optimizer(trainer: Trainer) -> Optimizer:
    if len(trainer.optimizers) != 1:
        raise MisconfigurationException(
            f"LinearizationMonitor expects a LightningModule with one optimizer but it has {len(trainer.optimizers)}. "
            "Linearised training is defined for one optimizer that minimises one loss."
        )
    return trainer.optimizers[0]


def _learning_rate(optimizer: Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


def _horizon(trainer: Trainer) -> float | None:
    """Optimizer steps of the run, or None if they have no end in sight."""
    steps = float(trainer.estimated_stepping_batches)
    return steps if math.isfinite(steps) else None


def _is_last_step(trainer: Trainer) -> bool:
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.should_stop or (trainer.is_last_batch and last_epoch)


def _callbacks(trainer: Trainer) -> list[Callback]:
    return list(getattr(trainer, "callbacks", []))
