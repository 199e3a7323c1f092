"""The life cycle of a monitored run: when to capture, when to follow, when to measure, where to log."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ntk.callback import trainer as view
from lightning_ntk.callback.differences import forward_differences, run_differences
from lightning_ntk.callback.loggers import figures_of, log_charts, log_figures, log_hparams
from lightning_ntk.callback.progress_bars import nested_bars, shows_progress
from lightning_ntk.comparison.options import FollowedDynamics, Options
from lightning_ntk.comparison.run_comparison import Observation
from lightning_ntk.data.reference import unpack_pair
from lightning_ntk.linearization.parameters import plain_name
from lightning_ntk.solvers.selection import Solver
from lightning_ntk.training.base import StepSettings
from lightning_ntk.training.linearized_training import LinearizedTraining
from lightning_ntk.training.problem import JacobianStorage
from lightning_ntk.training.twin import require_supported_optimizer
from lightning_ntk.utilities.distributed import ALONE


class Monitoring(Callback):
    """The hooks of `LinearizationMonitor`, in the order in which a run calls them; its options are set by the subclass."""

    history: list[dict[str, float]]
    """One row for each measurement: "step" and every logged scalar, without the prefix."""

    reference: Any
    dynamics: FollowedDynamics
    loss: Callable[..., Any] | None
    predict: Callable[[nn.Module, Any], Tensor] | None
    unpack: Callable[[Any], tuple[Any, Tensor]] | None
    evaluation: Any
    capture_at: int
    solver: Solver
    jacobian: JacobianStorage
    batch_size: int
    dtype: Literal["float32", "float64"] | None
    device: str | None
    twin_every: int
    name: str
    per_parameter: bool
    taylor: bool
    closest: bool
    modes: int
    kernel_probe: int
    figures: bool
    save_state: bool
    strict: bool
    progress: bool

    def __init__(self) -> None:
        super().__init__()
        self.seconds = {"capture": 0.0, "measurements": 0.0}
        self._reset()

    def should_measure(self, step: int) -> bool:
        """Whether to measure `step` optimizer steps after the capture."""
        raise NotImplementedError

    def _reset(self) -> None:
        self.history = []
        self._observation: Observation | None = None
        self._processes = ALONE
        self._step = 0
        self._settings: StepSettings | None = None
        self._loss_scale: float | None = None
        self._first_gradient: dict[str, Tensor | None] | None = None
        self._lost = False
        self._started = False
        self._loaded: dict[str, Any] | None = None
        self._resumed: dict[str, Any] | None = None
        self._reported: set[str] = set()

    @property
    def training(self) -> LinearizedTraining | None:
        """The captured problem, once it is captured; None for a replay and the twin."""
        return None if self._observation is None else self._observation.training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot be supported, before any data is read."""
        if stage != "fit":
            return
        self._reset()  # before tuners save and restore what an earlier fit left
        view.require_available(self.device)
        view.require_supported_strategy(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far; nothing before the run has begun."""
        if not self._started:
            return {}
        return {
            "history": [dict(row) for row in self.history],
            "start": self._start,
            "reported": sorted(self._reported),
            "lost": self._lost,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps it until training starts."""
        self._loaded = state_dict or None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the initial weights and the state of the linearized network."""
        states = checkpoint.setdefault("lightning_ntk", {})
        if not self._started:
            states[self.state_key] = None
        elif self._observation is not None and self.save_state:
            states[self.state_key] = self._observation.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuses to resume from a checkpoint that does not know the weights at which to linearize."""
        states = checkpoint.get("lightning_ntk", {})
        # Tuners save and restore before training starts, when there is nothing to resume.
        tuned = self.state_key in states and states[self.state_key] is None
        if trainer.state.fn != TrainerFn.FITTING or checkpoint["global_step"] == 0 or tuned:
            return
        self._resumed = states.get(self.state_key)
        waiting = checkpoint["global_step"] <= self.capture_at
        if self._resumed is None and not waiting and not checkpoint["callbacks"].get(self.state_key, {}).get("lost"):
            raise MisconfigurationException(
                f"LinearizationMonitor {self.name!r} expects a checkpoint of a run that it has watched, with save_state=True, "
                "but this one does not hold the weights at which to linearize. Remove the callback, or start a new run."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Captures the linearized problem and makes the first measurement, unless it is to come later."""
        loaded, resumed = self._loaded, self._resumed
        self._reset()
        self._started = True
        self._step = self._start = trainer.global_step  # above 0 in a second fit of the same Trainer
        if loaded is not None and self._step > 0:
            self.history, self._start, self._lost = loaded["history"], loaded["start"], loaded["lost"]
            self._reported = set(loaded["reported"])
        self._processes = view.processes_of(trainer)
        optimizer = view.single_optimizer(trainer)
        try:
            require_supported_optimizer(optimizer)
            if resumed is not None or (self.capture_at == 0 and not self._lost):
                with self._processes.agreement():
                    self._capture(trainer, pl_module, optimizer, resumed)
        except (ValueError, TypeError, MemoryError) as error:
            raise MisconfigurationException(f"LinearizationMonitor cannot capture this run. {error}") from error
        if self._observation is not None and resumed is None:
            self._measure(trainer, pl_module)
        log_charts(trainer.loggers, _histories(trainer))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Looks at the first batch, whether the training set holds it."""
        if self._observation is None or self._observation.steps > 0 or self._lost:
            return
        try:
            with self._processes.agreement():
                reason = self._observation.check_batch(*self._unpack(batch))
        except ValueError as error:
            raise MisconfigurationException(f"LinearizationMonitor cannot replay this run. {error}") from error
        if reason is not None:
            self._report_once("dynamics", f"LinearizationMonitor follows the run with the linearized twin. {reason}")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Reads what the coming step depends on; at the end of the batch the scheduler has moved on."""
        if self._observation is None or self._lost:
            return
        parameters = dict(pl_module.named_parameters())
        linearized = {name: parameters[name] for name in self._observation.initial_weights}
        self._settings = view.step_settings(trainer, optimizer, linearized)
        self._loss_scale = view.loss_scale(trainer)
        if self._observation.steps_taken == 0:
            self._first_gradient = view.gradients(optimizer, linearized, self._loss_scale)
        thawed = [
            plain_name(name)
            for name, p in parameters.items()
            if p.requires_grad and name not in self._observation.initial_weights
        ]
        if thawed:
            self._report_once(
                "thawed",
                f"From step {self._step + 1} on the run trains {_some(thawed)}, which was frozen when the network was "
                "linearized: the linearized network keeps them as they were then, and they are in no distance.",
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advances the linearized network if the optimizer stepped, and measures if it is time."""
        stepped, self._step = trainer.global_step - self._step, trainer.global_step
        if view.has_averaged_weights(trainer):
            return
        if self._observation is None:
            if self.capture_at == self._step - self._start:
                self._capture_late(trainer, pl_module)
            return
        if self._lost:
            return
        try:
            with self._processes.agreement():
                if view.had_backward_pass(pl_module, outputs):
                    self._observation.see(*self._unpack(batch), 1 / trainer.accumulate_grad_batches)
                if stepped > 1:
                    raise ValueError(
                        f"Expected at most one optimizer step in a batch but `training_step` took {stepped}."
                    )
                if stepped:
                    self._follow_step(trainer, pl_module)
        except Exception as error:
            self._fail(
                error, f"The linearized network is lost in step {self._step}, and measurements end; training goes on."
            )
            self._lost = True
            return
        if stepped and (self.should_measure(self._observation.steps) or view.is_last_step(trainer)):
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the last step of a run that another callback stopped early, and draws figures."""
        averaged = view.ends_with_averaged_weights(trainer, self) or view.has_averaged_weights(trainer)
        if self.history and self.history[-1]["step"] != self._step and not averaged and not self._lost:
            self._measure(trainer, pl_module)
        histories = _histories(trainer)
        if list(histories)[-1] == self.name:  # all monitors have measured the last step
            log_hparams(trainer.loggers, histories, step=self._step)
        if self.figures and self._observation is not None:
            training = self._observation.training
            figures = figures_of(
                self.history,
                spectrum=None if training is None else (training.modes.eigenvalues, training.modes.coordinates),
                kernel_time=self._observation.kernel_time,
                outputs=self._observation.outputs,
            )
            log_figures(trainer.loggers, figures, name=self.name, step=self._step)

    def _capture(
        self, trainer: Trainer, module: LightningModule, optimizer: Optimizer, state: dict[str, Any] | None = None
    ) -> None:
        started = time.perf_counter()
        options = Options(
            dynamics=self.dynamics,
            loss=self.loss,
            predict=self.predict,
            unpack=lambda batch: self._unpack(view.training_batch(trainer, module, batch)),
            solver=self.solver,
            jacobian=self.jacobian,
            batch_size=self.batch_size,
            dtype=None if self.dtype is None else getattr(torch, self.dtype),
            device=None if self.device is None else torch.device(self.device),
            twin_every=self.twin_every,
            per_parameter=self.per_parameter,
            taylor=self.taylor,
            closest=self.closest,
            modes=self.modes,
            kernel_probe=self.kernel_probe,
            progress=self.progress and shows_progress(trainer),
        )
        remaining, reference = view.horizon(trainer), self.reference
        with nested_bars(trainer):
            self._observation = observation = Observation(
                module,
                optimizer,
                options,
                data=None
                if reference is None
                else lambda: view.training_data(trainer) if reference == "train" else reference,
                evaluation=self.evaluation,
                differences=lambda dynamics, size: run_differences(trainer, module, optimizer, dynamics, size),
                horizon=None if remaining is None else remaining - self.capture_at,
                momentum=view.momentum_buffers(module, optimizer),
                state=state,
                processes=self._processes,
            )
        if observation.reason:
            rank_zero_info(f"LinearizationMonitor: {observation.reason}")
        differences = run_differences(trainer, module, optimizer, observation.dynamics, observation.num_samples)
        differences += forward_differences(trainer, module)
        if differences:
            self._report_once(
                "differences",
                f"LinearizationMonitor compares this run with {observation.dynamics.replace('_', ' ')}, which does not "
                f"describe all of it, so that a part of every distance is due to the difference: {'; '.join(differences)}.",
            )
        self.seconds = {"capture": time.perf_counter() - started, "measurements": 0.0}

    def _capture_late(self, trainer: Trainer, module: LightningModule) -> None:
        try:
            with self._processes.agreement():
                self._capture(trainer, module, view.single_optimizer(trainer))
        except Exception as error:
            self._fail(error, f"The capture at step {self._step} failed and nothing is measured; training goes on.")
            self._lost = True
            return
        self._measure(trainer, module)
        log_charts(trainer.loggers, _histories(trainer))

    def _follow_step(self, trainer: Trainer, module: LightningModule) -> None:
        assert self._observation is not None
        assert self._settings is not None
        taken = view.step_was_taken(trainer, self._settings, self._loss_scale, len(self._observation.initial_weights))
        if not self._processes.any(taken):
            self._first_gradient = None
            self._observation.skip()
            return
        if self._first_gradient is not None:
            mismatch = self._observation.check_first_gradient(self._first_gradient, view.precision(trainer, module))
            self._first_gradient = None
            if mismatch is not None:
                self._report_once(
                    "gradient", f"LinearizationMonitor does not follow the loss of this run. {mismatch.describe()}"
                )
        self._observation.step(self._settings)
        for kind, sentence in self._observation.warnings(self._settings):
            self._report_once(kind, f"At step {self._step} {sentence}")

    def _measure(self, trainer: Trainer, module: LightningModule) -> None:
        assert self._observation is not None
        started = time.perf_counter()
        try:
            with nested_bars(trainer), self._processes.agreement():
                scalars = self._observation.measure(dict(module.named_parameters()))
        except Exception as error:
            self._fail(error, f"The measurement at step {self._step} failed, and so may later ones; training goes on.")
            return
        self.history.append({"step": float(self._step), **scalars})
        tagged = {f"{self.name}/{tag}": value for tag, value in scalars.items()}
        for logger in trainer.loggers:
            logger.log_metrics(tagged, step=self._step)
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in tagged.items()})
        self.seconds["measurements"] += time.perf_counter() - started

    def _unpack(self, batch: Any) -> tuple[Any, Any]:
        return (self.unpack or unpack_pair)(batch)

    def _fail(self, error: Exception, sentence: str) -> None:
        if self.strict:
            raise error
        self._report_once("failure", f"{sentence} {type(error).__name__}: {error}")

    def _report_once(self, kind: str, message: str) -> None:
        if kind not in self._reported:
            self._reported.add(kind)
            rank_zero_warn(message)


def _histories(trainer: Trainer) -> dict[str, list[dict[str, float]]]:
    return {c.name: c.history for c in view.callbacks_of(trainer) if isinstance(c, Monitoring)}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" and others" if names[3:] else "")
