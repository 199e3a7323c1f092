"""The Lightning callback: the life cycle of a monitored run."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_ntk.callback import trainer as view
from lightning_ntk.callback.arguments import FollowedDynamics, require_valid
from lightning_ntk.callback.capture import RunCapture
from lightning_ntk.callback.captured_run import CapturedRun
from lightning_ntk.callback.checkpoint import NO_STATE, arguments_of, incomplete, options_of, require_resumable
from lightning_ntk.callback.lockstep import Lockstep
from lightning_ntk.callback.loggers import (
    figures_of,
    log_charts,
    log_figures,
    log_hparams,
    log_page,
    log_verdict,
    unsmoothed,
)
from lightning_ntk.callback.progress_bars import nested_bars
from lightning_ntk.callback.results import RunResults
from lightning_ntk.callback.status import RunStatus, say
from lightning_ntk.callback.training_step import require_followable_step
from lightning_ntk.comparison.schedule import is_scheduled
from lightning_ntk.data.reference import unpack_pair
from lightning_ntk.training.optimizer_copy import require_supported_optimizer
from lightning_ntk.utilities.distributed import ALONE
from lightning_ntk.utilities.preserved_objects import preserved_objects

# The first steps of a run are slower than others, and measurements that take no time are not worth a word.
_STEPS_BEFORE_COST = 2
_LARGE_SHARE = 0.2
_NOTICED_SECONDS = 2.0
# What a run is compared with, by its dynamics.
_PATHS = {
    "gradient_descent": "gradient descent",
    "gradient_flow": "gradient flow",
    "replay": "a replay of its minibatches",
    "twin": "its linearized twin",
}


class LinearizationMonitor(RunResults):
    """Logs how far a training run leaves the path of its linearized (neural-tangent-kernel) network.

    Before the first step, the callback captures the initial weights and, for dynamics that need them, the initial predictions
    and the empirical neural tangent kernel on the reference set. At chosen optimizer steps it computes the weights that the
    *linearized* network would have after the same steps and compares them with those of the run. Training itself does not
    change: the weights after `fit` are bitwise those of a run without the callback.

    Every logger of the Trainer gets the scalars as `{name}/...` at `step=trainer.global_step`, and so does
    `trainer.callback_metrics`: `weight_distance`, `relative_weight_distance`, `weight_cosine`, `weight_norm_ratio`,
    `displacement`; on the reference set `prediction_rmse`, `loss`, `linearized_loss`, `taylor_gap` and, for classes,
    `accuracy`, `linearized_accuracy`, `taylor_accuracy`; the same on the evaluation set as `evaluation/...`; and the optional
    ones below.

    The loss is that of the module's own `training_step`, run on a copy of the module, in train mode and with the random
    numbers of the run. The linearized network trains with the learning rates, momentum, decay and clipping of each step
    of the run. A warning names whatever the dynamics do not describe. In the first step and in every measured step, the
    gradient of the run is compared with that of the linearized loss, as `gradient_mismatch`.

    A run resumed with `ckpt_path` continues as if it had not been interrupted. With DDP the processes share captures
    and measurements, and the linearized network trains on the batches of all of them.

    Several optimizers and strategies that divide the network itself, such as FSDP, are not supported. They raise a
    `MisconfigurationException` before training starts.

    Args:
        reference: The training set in a fixed order, for closed forms and for comparing outputs: a map-style Dataset or
            a DataLoader, whose data set and collate function are used but not its sampler. "train" takes the part of
            the Trainer's training set that training sees. None compares weights only, which requires the twin.
        steps: An integer n to measure every n optimizer steps, a list of steps, or "log" for roughly logarithmic steps.
            The first (0) and the last step are always measured.
        dynamics: "gradient_descent" is full-batch `torch.optim.SGD` with the settings of the run. "gradient_flow" is
            its continuous-time limit, over the sum of the learning rates. "replay" is SGD on the run's own minibatches,
            on the kernel, with any loss. "twin" trains the linearized network in lockstep, with any optimizer and loss
            and without a kernel. "auto" picks the first of these that is exact for the run and affordable, and reports
            its choice.
        loss: The loss to follow instead of `training_step`'s, as a function of outputs and targets. If only `predict`
            or `unpack` is given, it is `nn.MSELoss()`. A squared loss turns class labels into one-hot rows.
        predict: Maps `(module, inputs)` to outputs `(B, K)`, in eval mode. Default: the LightningModule's `forward`.
        unpack: Maps a batch of the data to `(inputs, target)`. Default: batches already are such pairs.
        network: The name of a submodule, or several, whose outputs in `training_step` are linearized. Default: the last
            places where a parameter meets data, see `linearized_outputs`.
        evaluation: Further data on which functions are compared, such as a validation set.
        reference_samples: Number of samples per data set, evenly spaced, on which the twin compares functions. Short
            runs take fewer, at least 256, so that comparing costs no more than training. None for all.
        capture_at: The optimizer step at which to linearize. In studies of fine-tuning it is later than 0. The
            linearized network then starts with the weights and the optimizer state of that step.
        mismatch: What to do if the first gradient of the run is not that of the linearized loss: "refuse" the run
            before that step, or "log" the size of the mismatch.
        solver: How to find the modes of the kernel. "eigh" finds all of them. "lanczos" finds those that matter for the
            length of the run, with or without forming the kernel. "auto" takes the cheapest that fits into memory.
        jacobian: "stored" keeps the Jacobian of the reference in memory: N K P numbers for N samples, K outputs and P
            trainable parameters. A twin then takes no pass through the network, if the run has fixed samples and
            neither dropout nor batch statistics. "streamed" takes passes. "auto" stores it for a twin where it takes at
            most a quarter of the free memory and saves more passes over the run than it costs; `reason` says so.
        batch_size: Samples in one pass.
        dtype: Type of the passes: "float32", "float64" or a `torch.dtype`. Default: the type of the parameters, or
            float32 for parameters in half precision.
        device: Where the kernel, its modes and vectors are kept, such as "cpu" if a GPU has no room for them. Passes
            run on the module's device, which is also the default.
        name: Prefix of the logged tags. Several monitors of one Trainer need a name each.
        per_parameter: Whether to log the distance of every parameter tensor, `parameter/<name>`.
        taylor: Whether to log `taylor_gap`, from an expansion of the trained network around the initial weights. It
            costs a forward-mode pass.
        closest: Whether to log `closest_time`, the number of steps after which the linearized network is closest to the
            trained weights; `closest_distance`, the distance at that time; and `distance_floor`, a lower bound at any
            time. It needs gradient descent or flow and takes two more passes.
        modes: Number of leading kernel eigenvectors along which to log the residuals, `mode/<i>/residual` and
            `mode/<i>/linearized_residual`. It needs gradient descent or flow.
        kernel_probe: Number of samples, evenly spaced in the reference, on which to track the kernel (0: off). It logs
            `kernel_distance`, `kernel_change` and `kernel_velocity`. Each measurement computes the kernel of these
            samples.
        kernels: Kernels for kernel regression beside the network, logged as `kernel_regression/...`: "before" training,
            at w0, and "after" it, at the weights and buffers of the last step. Each uses at most `reference_samples`
            samples of the reference and 4096 rows (samples times outputs), and costs as much as capturing such a kernel
            with its modes.
        regime: Whether to log the panel of regimes, `regime/...`, on a few samples of the reference: alignment, trace
            and rank of the kernel, the edge of stability, rank and change of features.
        figures: Whether to draw figures for TensorBoard, Weights & Biases and MLflow when training ends. The last two
            also get the page of `report`. It needs matplotlib.
        prog_bar: Whether the Trainer's progress bar shows `relative_weight_distance`.
        save_state: Whether checkpoints hold what a resumed run needs to continue measuring: the initial weights and the
            state of the linearized network. Without it a resumed run is refused.
        strict: Whether a failing measurement ends the run. Default: it is reported once and training continues.
        progress: Whether captures and measurements show a progress bar below the Trainer's own, TQDM or Rich.

    Raises:
        ValueError: If an argument has an invalid value.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LinearizationMonitor(steps=100)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        # jsonargparse, and so LightningCLI, passes no arguments to a class that is annotated with its type parameters, and takes
        # a callable that returns a Tensor for something that makes objects of the class Tensor.
        reference: Dataset | DataLoader | Literal["train"] | None = "train",  # type: ignore[type-arg]
        steps: int | Sequence[int] | Literal["log"] = "log",
        *,
        dynamics: FollowedDynamics = "auto",
        loss: Callable[[Tensor, Tensor], Any] | None = None,
        predict: Callable[[nn.Module, Any], Any] | None = None,
        unpack: Callable[[Any], Any] | None = None,
        network: str | Sequence[str] = (),
        evaluation: Dataset | DataLoader | None = None,  # type: ignore[type-arg]
        reference_samples: int | None = 1024,
        capture_at: int = 0,
        mismatch: Literal["refuse", "log"] = "refuse",
        solver: Literal["auto", "eigh", "lanczos"] = "auto",
        jacobian: Literal["auto", "streamed", "stored"] = "auto",
        batch_size: int = 256,
        dtype: Literal["float32", "float64"] | torch.dtype | None = None,
        device: str | None = None,
        name: str = "ntk",
        per_parameter: bool = False,
        taylor: bool = True,
        closest: bool = False,
        modes: int = 0,
        kernel_probe: int = 0,
        kernels: Sequence[Literal["before", "after"]] = (),
        regime: bool = False,
        figures: bool = False,
        prog_bar: bool = False,
        save_state: bool = True,
        strict: bool = False,
        progress: bool = True,
    ) -> None:
        super().__init__()
        self.reference = reference
        self.steps = steps
        self.dynamics = dynamics
        self.loss = loss
        self.predict = predict
        self.unpack = unpack
        self.network = [network] if isinstance(network, str) or not isinstance(network, Sequence) else list(network)
        self.evaluation = evaluation
        self.reference_samples = reference_samples
        self.capture_at = capture_at
        self.mismatch = mismatch
        self.solver = solver
        self.jacobian = jacobian
        self.batch_size = batch_size
        self.dtype = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
        self.device = device
        self.name = name
        self.per_parameter = per_parameter
        self.taylor = taylor
        self.closest = closest
        self.modes = modes
        self.kernel_probe = kernel_probe
        self.kernels = kernels
        self.regime = regime
        self.figures = figures
        self.prog_bar = prog_bar
        self.save_state = save_state
        self.strict = strict
        self.progress = progress
        require_valid(self)
        self._lockstep: Lockstep | None = None  # from the capture to the end of the fit
        self._reset()

    def _reset(self) -> None:
        self._detach()
        self._lockstep = None
        self.history = []
        self.seconds = {"capture": 0.0, "measurements": 0.0}
        self._status = RunStatus(strict=self.strict)
        self._capture: RunCapture | None = None  # until the step `capture_at`
        self._processes = ALONE  # until training starts
        self._step = self._start = 0  # `trainer.global_step` now and at the start of this fit
        self._resumed: dict[str, Any] | None = None  # what a resumed run goes on from, until its first batch
        self._captured_at = 0.0  # on the clock of `seconds`
        self._said_cost = False  # whether it was said how long the measurements take
        self._started = False  # whether checkpoints have anything to hold
        self._loaded: dict[str, Any] | None = None  # the state in a checkpoint, until training starts
        self._loaded_step: int | None = None  # at which it was saved

    def should_measure(self, step: int) -> bool:
        """Whether to measure `step` optimizer steps after the capture.

        Override it for a schedule of your own.
        """
        return is_scheduled(self.steps, step)

    @property
    @override
    def state_key(self) -> str:
        # Lightning refuses two callbacks with one key, and with it two monitors of one name.
        return self._generate_state_key(name=self.name)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called before any data are read. Refuses what is not supported."""
        if stage != "fit":
            return
        self._reset()  # before tuners save and restore what an earlier fit left
        view.require_available(self.device)
        view.require_supported_strategy(trainer)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called when a run resumes. Keeps the saved state.

        Refuses to resume without one.
        """
        if trainer.state.fn != TrainerFn.FITTING or checkpoint["global_step"] == 0:
            return
        state = checkpoint["callbacks"].get(self.state_key, {})
        if state and not state.get("started", True):  # a tuner restores what it saved before training started
            return
        if state or checkpoint["global_step"] > self.capture_at:
            require_resumable(self, state or NO_STATE, checkpoint["global_step"])
        self._loaded = state

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when weights and counters are final. Captures the run and measures.

        A capture at a later step waits for that step.
        """
        loaded = self._loaded
        self._reset()
        self._started = True
        self._step = self._start = trainer.global_step  # above 0 in a second fit of the same Trainer
        resumed = None
        if loaded and self._step > 0:
            status, self.history, self._start = self._status, loaded["history"], loaded["start"]
            status.reported, status.exact, status.lost = dict(loaded["reported"]), loaded["exact"], loaded["lost"]
            resumed, self._loaded_step = None if status.lost else loaded["capture"], loaded["step"]
        self._processes = view.processes_of(trainer)
        try:
            self._processes.require_same(arguments_of(self), "arguments of LinearizationMonitor")
            require_supported_optimizer(view.single_optimizer(trainer))
            if not self.is_given_loss:
                require_followable_step(pl_module)
        except (ValueError, TypeError) as error:
            raise MisconfigurationException(f"LinearizationMonitor cannot capture this run. {error}") from error
        self._resumed = resumed
        if self.is_given_loss and (resumed or self._is_due):
            self._begin(trainer, pl_module)
        else:
            log_charts(trainer.loggers, _histories(trainer))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before each batch. Captures if it is time, and trains a twin.

        A capture of a training step needs the batch. The twin trains on the batch before the run can change it.
        """
        if self._status.lost or view.has_averaged_weights(trainer):
            self._detach()
            return
        if self._capture is None and not self.is_given_loss and (self._resumed or self._is_due):
            self._begin(trainer, pl_module, batch)
        if self._following is not None:
            self._following.begin_batch(batch, batch_idx)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Called before every backward pass. Checks the gradients so far."""
        if self._following is not None:
            self._following.begin_backward()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after every backward pass. Accumulates the batch and records the gradients."""
        if self._following is not None:
            self._following.end_backward()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called before gradients are clipped. Compares them with the linearized loss's."""
        if self._following is not None:
            self._following.before_clipping(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after every (micro-)batch. Measures if it is time."""
        self._step = trainer.global_step
        if view.has_averaged_weights(trainer) or self._status.lost:
            return
        if self._following is None:
            if self.is_given_loss and self._capture is None and self._is_due:
                self._begin(trainer, pl_module)
            return
        stepped, comparison = self._following.end_batch(), self._following.comparison
        if stepped and not self._status.lost and (self._is_measured(comparison.steps) or view.is_last_step(trainer)):
            self._measure(trainer, pl_module)
            if self.prog_bar and self.history:
                tag = "relative_weight_distance"
                pl_module.log(
                    f"{self.name}/{tag}", self.history[-1][tag], prog_bar=True, logger=False, on_step=True, on_epoch=False,
                    batch_size=1,
                )  # fmt: skip

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when training ends. Measures the last step and draws figures.

        The last step is missing only if another callback stopped the run.
        """
        averaged = view.ends_with_averaged_weights(trainer, self) or view.has_averaged_weights(trainer)
        if self.history and self.history[-1]["step"] != self._step and not averaged and not self._status.lost:
            self._measure(trainer, pl_module)
        if self.kernels and self._capture is not None and not averaged and not self._status.lost:
            self._regress(trainer, pl_module)
        if len(self.history) > 1:
            say(self.verdict.describe(), self.name)
            log_verdict(trainer.loggers, self.verdict, self.summary(), name=self.name, step=self._step)
        histories = _histories(trainer)
        if list(histories)[-1] == self.name:  # all monitors have measured the last step
            log_hparams(trainer.loggers, histories, step=self._step)
            curves = unsmoothed(trainer.loggers)
            if curves:
                say(curves)
        if self.figures and self._capture is not None:
            training, comparison = self.training, self._capture.comparison
            try:
                figures = figures_of(
                    self.history,
                    spectrum=None if training is None else (training.modes.eigenvalues, training.modes.coordinates),
                    kernel_time=comparison.kernel_time,
                    outputs=comparison.outputs,
                )
                log_figures(trainer.loggers, figures, name=self.name, step=self._step)
                log_page(trainer.loggers, self._page, name=self.name, step=self._step)
            except Exception as error:
                self._status.fail(error, "The figures cannot be drawn.", "figures")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called at the end, even after an exception. Releases the run."""
        self._detach()
        self._lockstep = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run continues from.

        Before training starts it only says that training has not started.
        """
        if not self._started:
            return {"started": False}
        capture, step = self._resumed, self._start + self.capture_at  # until the first batch of a resumed run
        if self._capture is not None:
            step += self._capture.comparison.steps
            try:
                capture = self._capture.state_dict() if self.save_state and not self._status.lost else None
            except Exception as error:
                capture = None
                self._status.fail(
                    error, f"The checkpoint at step {self._step} holds nothing to resume from.", "checkpoint"
                )
        elif self._loaded_step is not None:
            step = self._loaded_step
        return {
            "started": True,
            "step": None if self._lockstep is not None and self._lockstep.is_stepping else step,
            "options": options_of(self),
            "history": [dict(row) for row in self.history],
            "start": self._start,
            "reported": dict(self._status.reported),
            "lost": self._status.lost,
            "exact": self._status.exact,
            "capture": capture if self.save_state and not self._status.lost else None,
        }

    def _undisturbed(self, trainer: Trainer, module: LightningModule) -> AbstractContextManager[None]:
        """Restores the state of data sets, hooks and modules."""
        own = [*view.data_parts(self.reference), *view.data_parts(self.evaluation)]
        return preserved_objects(*view.bystanders(trainer, module), *own, skip=view.NOT_DATA)

    def unpacked(self, batch: Any) -> tuple[Any, Any]:
        """The inputs and the target of a batch, by `unpack`."""
        return (self.unpack or unpack_pair)(batch)

    @property
    def _is_due(self) -> bool:
        return self._step - self._start == self.capture_at and not self._status.lost

    def _begin(self, trainer: Trainer, module: LightningModule, batch: Any = None) -> None:
        """Captures and measures.

        An error before training ends the run; a later one ends the measurements.
        """
        resumed, self._resumed = self._resumed, None
        try:
            with self._processes.agreement(), self._undisturbed(trainer, module):
                self._linearize(trainer, module, resumed, batch)
        except Exception as error:
            if self.capture_at and resumed is None:
                self._status.lost = True
                self._status.fail(
                    error, f"The capture at step {self._step} failed and nothing is measured; training goes on."
                )
                return
            if isinstance(error, KeyError) and resumed is not None:
                raise incomplete(self, str(error)) from error
            if isinstance(error, ValueError | TypeError | MemoryError | MisconfigurationException):
                what = str(error)
            else:
                passed = (
                    "" if batch is None else "The pass of the linearized network through the training step failed. "
                )
                what = f"{passed}{type(error).__name__}: {error}"
            raise MisconfigurationException(f"LinearizationMonitor cannot capture this run. {what}") from error
        measured = bool(self.history) and self.history[-1]["step"] == self._step
        # A checkpoint may have been written after a step and before its measurement.
        if not measured and (resumed is None or self._is_measured(self._step - self._start - self.capture_at)):
            self._measure(trainer, module)
        log_charts(trainer.loggers, _histories(trainer))

    def _linearize(
        self, trainer: Trainer, module: LightningModule, state: dict[str, Any] | None = None, batch: Any = None
    ) -> None:
        started = time.perf_counter()
        with nested_bars(trainer):
            run = CapturedRun(self, trainer, module, self._processes, state, batch)
            self._capture = capture = RunCapture(run)
        dynamics = capture.comparison.dynamics
        said = [capture.reason, "" if capture.step is None else capture.step.describe()]
        if any(said):
            say(" ".join(filter(None, said)), self.name)
        if capture.differences:
            self._status.mark(
                "differences",
                f"LinearizationMonitor compares this run with {_PATHS[dynamics]}, which does not describe all of it, so that a "
                f"part of every distance is due to the difference: {'; '.join(capture.differences)}."
                f"{self._advice_on_modes(capture)}",
            )
        self._lockstep = Lockstep(capture, self._status, self._is_measured)
        self.seconds["capture"] = time.perf_counter() - started
        self._captured_at = time.perf_counter()

    def _advice_on_modes(self, capture: RunCapture) -> str:
        if not capture.is_in_other_mode:
            return ""
        without = "Without `loss`, `predict` and `unpack`" if self.is_given_loss else 'With dynamics="twin"'
        return f" {without} the linearized network trains in the modes of the run; or put these layers in eval mode."

    def _is_measured(self, step: int) -> bool:
        """Whether to measure, the same in all processes."""
        try:
            due = self.should_measure(step)
        except Exception as error:
            self._status.fail(
                error, f"`should_measure` failed at step {step}, and so may later calls; training goes on.", "schedule"
            )
            due = False
        own = type(self).should_measure is not LinearizationMonitor.should_measure
        return self._processes.any(due) if own else due

    @property
    def _following(self) -> Lockstep | None:
        """The linearized network beside the run, unless it was lost."""
        return None if self._status.lost else self._lockstep

    def _detach(self) -> None:
        if self._lockstep is not None:
            self._lockstep.detach()

    def _measure(self, trainer: Trainer, module: LightningModule) -> None:
        assert self._lockstep is not None
        started = time.perf_counter()
        try:
            with nested_bars(trainer), self._processes.agreement(), self._undisturbed(trainer, module):
                scalars = self._lockstep.measure()
        except Exception as error:
            self._status.fail(
                error, f"The measurement at step {self._step} failed, and so may later ones; training goes on."
            )
            return
        self.history.append({"step": float(self._step), **scalars})
        self._log(trainer, scalars)
        took = time.perf_counter() - started
        self.seconds["measurements"] += took
        self._say_cost(trainer, took)

    def _regress(self, trainer: Trainer, module: LightningModule) -> None:
        """Adds kernel regression with the kernel after training to the last row."""
        assert self._capture is not None
        try:
            with nested_bars(trainer), self._processes.agreement(), self._undisturbed(trainer, module):
                scalars = self._capture.comparison.regress(view.tensors_of(module))
        except Exception as error:
            self._status.fail(error, "Kernel regression with the kernel after training failed.", "kernels")
            return
        self.history[-1].update(scalars)
        self._log(trainer, scalars)

    def _log(self, trainer: Trainer, scalars: dict[str, float]) -> None:
        tagged = {f"{self.name}/{tag}": value for tag, value in scalars.items()}
        for logger in trainer.loggers:
            try:
                logger.log_metrics(tagged, step=self._step)
            except Exception as error:
                self._status.fail(
                    error, f"{type(logger).__name__} cannot log step {self._step}; training goes on.", "logger"
                )
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in tagged.items()})

    def _say_cost(self, trainer: Trainer, took: float) -> None:
        """Reports what the measurements to come will cost.

        This needs the duration of a measurement and of a training step.
        """
        assert self._capture is not None
        steps, end = self._capture.comparison.steps, view.horizon(trainer)
        own = type(self).should_measure is not LinearizationMonitor.should_measure  # which may not foresee anything
        if steps < _STEPS_BEFORE_COST or end is None or own or self._said_cost:
            return
        self._said_cost = True
        planned = sum(self.should_measure(step) for step in range(steps + 1, int(end) - self._start + 1)) + 1
        between = time.perf_counter() - self._captured_at - self.seconds["measurements"]
        share = planned * took / (between / steps * (end - self._start))
        if share > _LARGE_SHARE and planned * took > _NOTICED_SECONDS:
            say(
                f"the {planned} measurements to come take about {planned * took:.0f} s, "
                f"{share:.0%} of the time of the run. Fewer `steps`, fewer `reference_samples` and taylor=False make it less.",
                self.name,
            )


def _histories(trainer: Trainer) -> dict[str, list[dict[str, float]]]:
    return {c.name: c.history for c in view.callbacks_of(trainer) if isinstance(c, LinearizationMonitor)}
