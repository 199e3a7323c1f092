"""The Lightning callback: when to capture, when to measure, where to log."""

import math
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_ntk.arguments import require_choice, require_device, require_integer, require_steps
from lightning_ntk.dynamics.twin import require_supported_optimizer
from lightning_ntk.following import StepSettings
from lightning_ntk.linearization import plain_name
from lightning_ntk.observation import FollowedDynamics, Observation, Options
from lightning_ntk.plots import plot_history
from lightning_ntk.reference import unpack_pair
from lightning_ntk.reporting import COMPARED, announce, describe_run, figures_of, log_figures
from lightning_ntk.run_differences import forward_differences, run_differences
from lightning_ntk.shards import ALONE
from lightning_ntk.trainer_bars import nested_bars, shows_progress
from lightning_ntk.trainer_view import (
    callbacks_of,
    ends_with_averaged_weights,
    gradients,
    had_backward_pass,
    has_averaged_weights,
    horizon,
    is_last_step,
    loss_scale,
    momentum_buffers,
    precision,
    require_available,
    require_supported_strategy,
    shards_of,
    single_optimizer,
    step_settings,
    step_was_taken,
    training_batch,
    training_data,
)
from lightning_ntk.training import LinearizedTraining

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
    `relative_weight_distance`, `weight_cosine`, `weight_norm_ratio`, `displacement`; on the reference set `prediction_rmse`,
    `loss`, `linearized_loss`, `taylor_gap` and, for classes, `accuracy`, `linearized_accuracy`, `taylor_accuracy`; the same on
    the evaluation set as `evaluation/...`; and what is asked for. The same values are in `trainer.callback_metrics`.

    The linearised network is trained as the run trains its own: with the learning rates, momentum, decay and clipping of
    each step. What the dynamics do not describe is said once, in words, and so is a `training_step` whose gradient is not that of
    `loss(predict(module, inputs), target)`, with the size of the mismatch.

    A run resumed with `ckpt_path` goes on as if it had not been interrupted.

    On several devices, with DDP, captures and measurements are shared by the processes, and the linearised network is trained
    on the batches of all of them.

    Not supported: several optimizers, and strategies that divide the network itself, as FSDP. They raise a
    `MisconfigurationException` before training starts.

    Args:
        reference: The training set in a fixed order: a map-style Dataset, a DataLoader (its data set and collate function
            are used, not its sampler), or "train" for the Trainer's own training set: the samples that it sees, with
            `overfit_batches` for example the first ones. None to compare weights only, which
            the twin can do.
        steps: An integer n to measure every n optimizer steps, a list of steps, or "log" for roughly logarithmic steps.
            The first (0) and the last step are always measured.
        dynamics: "gradient_descent" is full-batch `torch.optim.SGD` with the settings of the run; "gradient_flow" is
            continuous time, the sum of the learning rates; "replay" is SGD on the run's own minibatches, with any loss, on the
            kernel; "twin" trains the linearised network in lockstep, with any optimizer and loss, without a kernel. "auto"
            takes the first that is exact for the run and affordable, and says which and why.
        loss: Of outputs and targets, the one that the run minimises. Default: `nn.MSELoss()`; for a squared loss class labels
            become one-hot rows.
        predict: Maps `(module, inputs)` to outputs `(B, K)`. Default: the LightningModule's `forward`.
        unpack: Maps a batch of the data to `(inputs, target)`. Default: batches that are such pairs.
        evaluation: Data on which functions are compared too, a validation set for example.
        capture_at: The optimizer step at whose weights to linearise. Later than 0 as in studies of fine-tuning: the
            linearised network starts there, with the optimizer's state.
        solver: How the modes of the kernel are found: "eigh" (all of them), "lanczos" (those that matter for the length of
            the run, with or without forming the kernel), or "auto" for the cheapest that fits into memory.
        jacobian: "streamed" or, for small models, "stored": see `LinearizedTraining`.
        batch_size: Samples in one pass.
        dtype: Type of the passes, as "float32" or "float64". Default: that of the parameters, float32 for those in half
            precision.
        device: Where the kernel, its modes and vectors are kept, "cpu" for example where a GPU has no room for them. Passes
            run on the device of the module. Default: there too.
        twin_every: Steps of the twin that share one gradient, that of the first of them. Above 1 the comparison is no longer
            exact, which `twin_coverage`, its reciprocal, records.
        name: Prefix of the logged tags.
        per_parameter: Whether to log the distance of every parameter tensor, `parameter/<name>`.
        taylor: Whether to expand the trained network after the fact, one forward-mode pass, for `taylor_gap`.
        closest: Whether to log `closest_time`, the number of steps after which the linearised network is closest to the
            trained weights, `closest_distance` then, and `distance_floor`, under which no time can go; for gradient descent and
            flow, two passes more.
        modes: For how many leading eigenvectors of the kernel to log `mode/<i>/residual` and `mode/<i>/linearized_residual`;
            for gradient descent and flow.
        kernel_probe: Of how many samples of the reference, evenly spaced, to follow the kernel, for `kernel_distance`,
            `kernel_change` and `kernel_velocity`; each measurement takes the kernel of as many samples. 0 for none.
        figures: Whether to draw figures when training ends, for TensorBoard, Weights & Biases and MLflow: distance and losses
            over steps, accuracies, the kernel, a heat map of the parameters, the kernel's spectrum with the residual's
            energy in each mode (for gradient descent and flow), and outputs of both networks. Needs matplotlib.
        save_state: Whether checkpoints hold what a resumed run needs to go on with its measurements: the initial weights and
            the state of the linearised network. Without it a resumed run is refused.
        strict: Whether a failing measurement ends the run. Default: it is reported once and training goes on.
        progress: Whether captures and measurements show a progress bar, below the Trainer's own, TQDM or Rich.

    Raises:
        ValueError: If an argument has a value that it cannot have.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LinearizationMonitor(steps=100)], logger=False, enable_checkpointing=False)
    """

    history: list[dict[str, float]]
    """One row for each measurement: "step" and every logged scalar, without the prefix."""

    def __init__(
        self,
        # jsonargparse, so LightningCLI, passes no arguments to a class that is annotated with its type parameters, and takes a
        # callable that returns a Tensor for something that makes objects of the class Tensor.
        reference: Dataset | DataLoader | Literal["train"] | None = "train",  # type: ignore[type-arg]
        steps: int | Sequence[int] | Literal["log"] = "log",
        dynamics: Literal["auto", "gradient_descent", "gradient_flow", "replay", "twin"] = "auto",
        loss: Callable[[Tensor, Tensor], Any] | None = None,
        predict: Callable[[nn.Module, Any], Any] | None = None,
        unpack: Callable[[Any], Any] | None = None,
        evaluation: Dataset | DataLoader | None = None,  # type: ignore[type-arg]
        capture_at: int = 0,
        solver: Literal["auto", "eigh", "lanczos"] = "auto",
        jacobian: Literal["streamed", "stored"] = "streamed",
        batch_size: int = 256,
        dtype: Literal["float32", "float64"] | None = None,
        device: str | None = None,
        twin_every: int = 1,
        name: str = "ntk",
        per_parameter: bool = False,
        taylor: bool = True,
        closest: bool = False,
        modes: int = 0,
        kernel_probe: int = 0,
        figures: bool = False,
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
        self.evaluation = evaluation
        self.capture_at = capture_at
        self.solver = solver
        self.jacobian = jacobian
        self.batch_size = batch_size
        self.dtype = dtype
        self.device = device
        self.twin_every = twin_every
        self.name = name
        self.per_parameter = per_parameter
        self.taylor = taylor
        self.closest = closest
        self.modes = modes
        self.kernel_probe = kernel_probe
        self.figures = figures
        self.save_state = save_state
        self.strict = strict
        self.progress = progress
        self._validate()
        self.seconds = {"capture": 0.0, "measurements": 0.0}
        self._reset()

    def _validate(self) -> None:
        if isinstance(self.reference, str) and self.reference != "train":
            raise ValueError(
                f'Expected argument `reference` to be a data set, a DataLoader, "train" or None but got {self.reference!r}.'
            )
        require_steps(self.steps)
        require_choice("dynamics", self.dynamics, FollowedDynamics)
        require_choice("dtype", self.dtype, Literal["float32", "float64", None])
        require_device("device", self.device)
        require_integer("capture_at", self.capture_at, least=0)
        require_integer("twin_every", self.twin_every, least=1)
        require_integer("modes", self.modes, least=0)
        if self.dynamics in ("replay", "twin") and (self.closest or self.modes):
            raise ValueError(
                f'Expected `closest=False` and `modes=0` with dynamics="{self.dynamics}" but got {self.closest} and '
                f'{self.modes}, which need the modes of the kernel, so dynamics="gradient_descent" or "gradient_flow".'
            )
        require_integer("kernel_probe", self.kernel_probe, least=0)
        if self.figures and find_spec("matplotlib") is None:
            raise ModuleNotFoundError(
                "Argument `figures` needs matplotlib, which is not installed: pip install 'lightning-ntk[plot]'."
            )
        if self.reference is None and self.kernel_probe:
            raise ValueError(
                "Expected a reference set, of which to take samples, for argument `kernel_probe` but got None."
            )
        if self.reference is None and self.dynamics not in ("auto", "twin"):
            raise ValueError(
                f'Expected a reference set for dynamics="{self.dynamics}" but got None: only "twin" goes without.'
            )

    def _reset(self) -> None:
        self.history = []
        self._observation: Observation | None = None
        self._shards = ALONE
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

    @property
    def state_key(self) -> str:
        """Of its name: two monitors of one Trainer need different ones, or the Trainer refuses them."""
        return self._generate_state_key(name=self.name)

    def should_measure(self, step: int) -> bool:
        """Whether to measure `step` optimizer steps after the capture; override for a schedule of your own."""
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
        self._reset()  # before tuners save and restore what an earlier fit left
        require_available(self.device)
        require_supported_strategy(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells TensorBoard how to show what is to come, once for all monitors."""
        monitors = [c for c in callbacks_of(trainer) if isinstance(c, LinearizationMonitor)]
        if monitors[0] is self:
            announce(trainer, {monitor.name: monitor._absent for monitor in monitors})

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
        """Adds the initial weights and the state of the linearised network."""
        states = checkpoint.setdefault("lightning_ntk", {})
        if not self._started:
            states[self.state_key] = None
        elif self._observation is not None and self.save_state:
            states[self.state_key] = self._observation.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuses to resume from a checkpoint that does not know the weights at which to linearise."""
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
                "but this one does not hold the weights at which to linearise. Remove the callback, or start a new run."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Captures the linearised problem and makes the first measurement, unless it is to come later."""
        loaded, resumed = self._loaded, self._resumed
        self._reset()
        self._started = True
        self._step = self._start = trainer.global_step  # above 0 in a second fit of the same Trainer
        if loaded is not None and self._step > 0:
            self.history, self._start, self._lost = loaded["history"], loaded["start"], loaded["lost"]
            self._reported = set(loaded["reported"])
        self._shards = shards_of(trainer)
        optimizer = single_optimizer(trainer)
        try:
            require_supported_optimizer(optimizer)
            if resumed is not None or (self.capture_at == 0 and not self._lost):
                with self._shards.agreement():
                    self._capture(trainer, pl_module, optimizer, resumed)
        except (ValueError, TypeError, MemoryError) as error:
            raise MisconfigurationException(f"LinearizationMonitor cannot capture this run. {error}") from error
        if self._observation is not None and resumed is None:
            self._measure(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Looks at the first batch, whether the training set holds it."""
        if self._observation is None or self._observation.steps > 0 or self._lost:
            return
        try:
            with self._shards.agreement():
                reason = self._observation.check_batch(*self._unpack(batch))
        except ValueError as error:
            raise MisconfigurationException(f"LinearizationMonitor cannot replay this run. {error}") from error
        if reason is not None:
            self._report_once("dynamics", f"LinearizationMonitor follows the run with the linearised twin. {reason}")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Reads what the coming step depends on; at the end of the batch the scheduler has moved on."""
        if self._observation is None or self._lost:
            return
        parameters = dict(pl_module.named_parameters())
        linearized = {name: parameters[name] for name in self._observation.initial_weights}
        self._settings = step_settings(trainer, optimizer, linearized)
        self._loss_scale = loss_scale(trainer)
        if self._observation.steps_taken == 0:
            self._first_gradient = gradients(optimizer, linearized, self._loss_scale)
        thawed = [
            plain_name(name)
            for name, p in parameters.items()
            if p.requires_grad and name not in self._observation.initial_weights
        ]
        if thawed:
            self._report_once(
                "thawed",
                f"From step {self._step + 1} on the run trains {_some(thawed)}, which was frozen when the network was "
                "linearised: the linearised network keeps them as they were then, and they are in no distance.",
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advances the linearised network if the optimizer stepped, and measures if it is time."""
        stepped, self._step = trainer.global_step - self._step, trainer.global_step
        if has_averaged_weights(trainer):
            return
        if self._observation is None:
            if self.capture_at == self._step - self._start:
                self._capture_late(trainer, pl_module)
            return
        if self._lost:
            return
        try:
            with self._shards.agreement():
                if had_backward_pass(pl_module, outputs):
                    self._observation.see(*self._unpack(batch), 1 / trainer.accumulate_grad_batches)
                if stepped > 1:
                    raise ValueError(
                        f"Expected at most one optimizer step in a batch but `training_step` took {stepped}."
                    )
                if stepped:
                    self._follow_step(trainer, pl_module)
        except Exception as error:
            self._fail(
                error, f"The linearised network is lost in step {self._step}, and measurements end; training goes on."
            )
            self._lost = True
            return
        if stepped and (self.should_measure(self._observation.steps) or is_last_step(trainer)):
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the last step of a run that another callback stopped early, and draws figures."""
        averaged = ends_with_averaged_weights(trainer, self) or has_averaged_weights(trainer)
        if self.history and self.history[-1]["step"] != self._step and not averaged and not self._lost:
            self._measure(trainer, pl_module)
        describe_run(trainer, [f"{self.name}/{tag}" for tag in COMPARED if self.history and tag in self.history[-1]])
        if self.figures:
            drawn = figures_of(self.history, self._observation)
            log_figures(trainer.loggers, drawn, name=self.name, step=self._step)

    @property
    def _absent(self) -> list[str]:
        """Beginnings of the tags that this monitor does not log."""
        functions = ["prediction_rmse", "loss", "linearized_loss", "accuracy", "taylor_"]
        return (
            (functions if self.reference is None else [])
            + (["evaluation/"] if self.evaluation is None else [])
            + ([] if self.kernel_probe else ["kernel_"])
        )

    def _capture(
        self, trainer: Trainer, module: LightningModule, optimizer: Optimizer, state: dict[str, Any] | None = None
    ) -> None:
        started = time.perf_counter()
        options = Options(
            dynamics=self.dynamics,
            loss=self.loss,
            predict=self.predict,
            unpack=lambda batch: self._unpack(training_batch(trainer, module, batch)),
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
        remaining, reference = horizon(trainer), self.reference
        with nested_bars(trainer):
            self._observation = observation = Observation(
                module,
                optimizer,
                options,
                data=None
                if reference is None
                else lambda: training_data(trainer) if reference == "train" else reference,
                evaluation=self.evaluation,
                differences=lambda dynamics, size: run_differences(trainer, module, optimizer, dynamics, size),
                horizon=None if remaining is None else remaining - self.capture_at,
                momentum=momentum_buffers(module, optimizer),
                state=state,
                shards=self._shards,
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
            with self._shards.agreement():
                self._capture(trainer, module, single_optimizer(trainer))
        except Exception as error:
            self._fail(error, f"The capture at step {self._step} failed and nothing is measured; training goes on.")
            self._lost = True
            return
        self._measure(trainer, module)

    def _follow_step(self, trainer: Trainer, module: LightningModule) -> None:
        assert self._observation is not None
        assert self._settings is not None
        if not step_was_taken(trainer, self._settings, self._loss_scale, len(self._observation.initial_weights)):
            self._first_gradient = None
            self._observation.skip()
            return
        if self._first_gradient is not None:
            mismatch = self._observation.check_first_gradient(self._first_gradient, precision(trainer, module))
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
            with nested_bars(trainer), self._shards.agreement():
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


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" and others" if names[3:] else "")
