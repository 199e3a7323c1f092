"""The Lightning callback: the life cycle of a monitored run."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_ntk.callback import trainer as view
from lightning_ntk.callback.arguments import FollowedDynamics, require_valid
from lightning_ntk.callback.capture import RunCapture
from lightning_ntk.callback.checkpoint import NO_STATE, arguments_of, incomplete, options_of, require_resumable
from lightning_ntk.callback.loggers import figures_of, log_charts, log_figures, log_hparams
from lightning_ntk.callback.progress_bars import nested_bars
from lightning_ntk.callback.results import RunResults
from lightning_ntk.callback.step_hooks import StepHooks
from lightning_ntk.callback.step_watch import StepWatch
from lightning_ntk.callback.training_step import require_followable_step
from lightning_ntk.comparison.optimizer import some
from lightning_ntk.comparison.schedule import is_scheduled
from lightning_ntk.data.batches import copy_batch
from lightning_ntk.data.reference import unpack_pair
from lightning_ntk.data.sample_index import UnknownSamplesError
from lightning_ntk.linearization.parameters import plain_name
from lightning_ntk.training.base import StepSettings
from lightning_ntk.training.optimizer_copy import held_by, require_supported_optimizer
from lightning_ntk.training.replay import Replay
from lightning_ntk.training.twin import Twin
from lightning_ntk.utilities.distributed import ALONE
from lightning_ntk.utilities.preserved_objects import preserved_objects

if TYPE_CHECKING:
    pass

# The first steps of a run are slower than others, and measurements that take no time are not worth a word.
_STEPS_BEFORE_COST = 2
_LARGE_SHARE = 0.2
_NOTICED_SECONDS = 2.0


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
    numbers of the run. The linearized network trains as the run trains its own, with the learning rates, momentum, decay and
    clipping of each step. A warning names what the dynamics do not describe. The gradients of the run are compared with those
    of the loss that is linearized, in the first step and in every step that is measured: `gradient_mismatch`.

    A run resumed with `ckpt_path` goes on as if it had not been interrupted. With DDP the processes share captures and
    measurements, and the linearized network trains on the batches of all of them.

    Several optimizers and strategies that divide the network itself, such as FSDP, are not supported. They raise a
    `MisconfigurationException` before training starts.

    Args:
        reference: The training set in a fixed order: a map-style Dataset, or a DataLoader, whose data set and collate function
            are used but not its sampler. "train" takes the Trainer's own training set, as far as training sees it. None
            compares weights only, which the twin can do.
        steps: An integer n to measure every n optimizer steps, a list of steps, or "log" for roughly logarithmic steps.
            The first (0) and the last step are always measured.
        dynamics: "gradient_descent" is full-batch `torch.optim.SGD` with the settings of the run. "gradient_flow" is
            continuous time, the sum of the learning rates. "replay" is SGD on the run's own minibatches with any loss, on the
            kernel. "twin" trains the linearized network in lockstep with any optimizer and loss, without a kernel. "auto"
            takes the first that is exact for the run and affordable, and says which and why.
        loss: A loss to follow instead of that of `training_step`, a function of outputs and targets. If only `predict` or
            `unpack` is given: `nn.MSELoss()`. A squared loss turns class labels into one-hot rows.
        predict: Maps `(module, inputs)` to outputs `(B, K)`, in eval mode. Default: the LightningModule's `forward`.
        unpack: Maps a batch of the data to `(inputs, target)`. Default: batches that are such pairs.
        network: The name of a submodule, or several, whose outputs in `training_step` are linearized. Default: the last
            places where a parameter meets data, see `linearized_outputs`.
        evaluation: Data on which functions are compared too, such as a validation set.
        reference_samples: On at most how many samples of a data set, evenly spaced, the twin compares functions. Short runs take
            fewer, 256 at least, so that comparing costs no more than training. None for all.
        capture_at: The optimizer step at whose weights to linearize. Studies of fine-tuning take a later one than 0: the
            linearized network starts there, with the optimizer's state.
        mismatch: What happens where the gradient of the run's first step is not that of the loss that is linearized: "refuse"
            the run before that step, or "log" how large the mismatch is.
        solver: How to find the modes of the kernel: "eigh" (all of them), "lanczos" (those that matter for the length of
            the run, with or without forming the kernel), or "auto" for the cheapest that fits into memory.
        jacobian: "streamed" or, for small models, "stored": see `LinearizedTraining`.
        batch_size: Samples in one pass.
        dtype: Type of the passes, "float32" or "float64". Default: that of the parameters, float32 for those in half
            precision.
        device: Where the kernel, its modes and vectors are kept, such as "cpu" where a GPU has no room for them. Passes
            run on the device of the module. Default: there too.
        name: Prefix of the logged tags.
        per_parameter: Whether to log the distance of every parameter tensor, `parameter/<name>`.
        taylor: Whether to expand the trained network after the fact, at the cost of a forward-mode pass, for `taylor_gap`.
        closest: Whether to log `closest_time`, the number of steps after which the linearized network is closest to the
            trained weights, `closest_distance` at that time, and `distance_floor`, the lower bound at any time. It needs
            gradient descent or flow and takes two more passes.
        modes: Number of leading eigenvectors of the kernel for which to log `mode/<i>/residual` and
            `mode/<i>/linearized_residual`. It needs gradient descent or flow.
        kernel_probe: Number of evenly spaced samples of the reference whose kernel to follow, for `kernel_distance`,
            `kernel_change` and `kernel_velocity`. Each measurement computes the kernel of these samples. 0 for none.
        figures: Whether to draw figures when training ends, for TensorBoard, Weights & Biases and MLflow. Needs matplotlib.
        prog_bar: Whether the Trainer's progress bar shows `relative_weight_distance`.
        save_state: Whether checkpoints hold what a resumed run needs to go on with its measurements: the initial weights and
            the state of the linearized network. Without it a resumed run is refused.
        strict: Whether a failing measurement ends the run. Default: it is reported once and training goes on.
        progress: Whether captures and measurements show a progress bar below the Trainer's own, TQDM or Rich.

    Raises:
        ValueError: If an argument has a value that it cannot have.

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
        jacobian: Literal["streamed", "stored"] = "streamed",
        batch_size: int = 256,
        dtype: Literal["float32", "float64"] | None = None,
        device: str | None = None,
        name: str = "ntk",
        per_parameter: bool = False,
        taylor: bool = True,
        closest: bool = False,
        modes: int = 0,
        kernel_probe: int = 0,
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
        self.dtype = dtype
        self.device = device
        self.name = name
        self.per_parameter = per_parameter
        self.taylor = taylor
        self.closest = closest
        self.modes = modes
        self.kernel_probe = kernel_probe
        self.figures = figures
        self.prog_bar = prog_bar
        self.save_state = save_state
        self.strict = strict
        self.progress = progress
        require_valid(self)
        self._hooks: StepHooks | None = None  # into the optimizer, while it trains
        self._reset()

    def _reset(self) -> None:
        self._unhook()
        self.history = []
        self.seconds = {"capture": 0.0, "measurements": 0.0}
        self._capture: RunCapture | None = None  # until the step `capture_at`
        self._processes = ALONE  # until training starts
        self._step = self._start = 0  # `trainer.global_step` now and at the start of this fit
        self._settings: StepSettings | None = None  # of the step to come
        self._loss_scale: float | None = None  # of a GradScaler, before the step to come
        self._resumed: dict[str, Any] | None = None  # what a resumed run goes on from, until its first batch
        self._first_batch: Any = None  # a copy, to say what the run does with it
        self._captured_at = 0.0  # on the clock of `seconds`
        self._said_cost = False  # whether it was said how long the measurements take
        self._batch: Any = None  # the present one
        self._had_backward = False  # whether it had a backward pass
        self._had_step = False  # whether the optimizer stepped in it
        self._stepping = False  # whether the optimizer is in the middle of a step
        self._taken = False  # whether there is a gradient for it
        self._compares: bool | None = None  # whether its gradient is compared, once that is known
        self._error: Exception | None = None  # that the processes are to be told of
        self._exact = True  # whether the linearized network follows all that the run has done
        self._watch = StepWatch()
        self._lost = False  # whether the linearized network could not follow, which ends the measurements
        self._started = False  # whether checkpoints have anything to hold
        self._loaded: dict[str, Any] | None = None  # the state in a checkpoint, until training starts
        self._loaded_step: int | None = None  # at which it was saved
        self._reported: dict[str, str] = {}  # the warnings that were given, by kind

    def should_measure(self, step: int) -> bool:
        """Whether to measure `step` optimizer steps after the capture. Override it for a schedule of your own."""
        return is_scheduled(self.steps, step)

    @property
    @override
    def state_key(self) -> str:
        # Lightning refuses two callbacks with one key, and with it two monitors of one name.
        return self._generate_state_key(name=self.name)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called before any data is read. Refuses what cannot be supported."""
        if stage != "fit":
            return
        self._reset()  # before tuners save and restore what an earlier fit left
        view.require_available(self.device)
        view.require_supported_strategy(trainer)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called when a run resumes, before training starts. Keeps the state or refuses to resume without it."""
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
        """Called when weights and counters are final. Captures the problem, unless that is to come later, and measures."""
        loaded = self._loaded
        self._reset()
        self._started = True
        self._step = self._start = trainer.global_step  # above 0 in a second fit of the same Trainer
        resumed = None
        if loaded and self._step > 0:
            self.history, self._start, self._lost = loaded["history"], loaded["start"], loaded["lost"]
            self._reported, self._exact = dict(loaded["reported"]), loaded["exact"]
            resumed, self._loaded_step = None if self._lost else loaded["capture"], loaded["step"]
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
        """Called before the batch. Captures a training step, and lets the linearized network train on the batch as it is."""
        if self._lost or view.has_averaged_weights(trainer):
            self._unhook()
            return
        if self._capture is None and not self.is_given_loss and (self._resumed or self._is_due):
            self._begin(trainer, pl_module, batch)
        if self._capture is None or self._lost:
            return
        capture, comparison = self._capture, self._capture.comparison
        self._batch, self._had_backward, self._had_step = batch, False, False
        self._first_batch = copy_batch(batch) if self.is_given_loss and comparison.steps_taken == 0 else None
        scale = 1 / trainer.accumulate_grad_batches
        self._require_known_samples(batch)
        with self._following():
            self._raise_earlier()
            self._hooks = self._hooks or StepHooks(
                partial(self._before_step, trainer, pl_module), partial(self._after_step, trainer, pl_module)
            )
            self._hooks.attach(view.single_optimizer(trainer))
            self._live(pl_module)
            self._watch.begin_batch(pl_module, self._mark, self._step)
            if capture.shadow is not None:
                capture.shadow.follow(batch_idx)
            compares = self._compares_gradient(trainer)
            with self._undisturbed_pass(pl_module):
                if capture.accumulates_before:
                    comparison.accumulate(batch, scale)
                if compares and comparison.expected_gradient is not None:
                    comparison.expected_gradient.accumulate(batch, view.tensors_of(pl_module), scale)
        self._tell_judge(pl_module, batch, scale)

    def _tell_judge(self, module: LightningModule, batch: Any, scale: float) -> None:
        """Before the first step, tells of a batch the gradient that tells a wrong loss from rounding."""
        if self._capture is None or self._lost or self._capture.judge is None:
            return
        try:
            with self._processes.agreement():
                self._capture.judge.accumulate(batch, view.tensors_of(module), scale)
        except Exception as error:
            self._capture.judge = None  # in all processes
            self._report_once(
                "judge",
                "LinearizationMonitor compares the given loss with the run in the precision of the run alone, because the "
                f"training step cannot be followed: {error}",
            )

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Called before every backward pass. Looks at the gradients that are there."""
        if self._capture is None or self._lost:
            return
        try:
            gradients, scale = self._gradients(trainer, pl_module), view.loss_scale(trainer) or 1.0
            self._watch.begin_backward(gradients, scale, self._mark, self._step)
        except Exception as error:
            self._error = error

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after every backward pass. Tells of the batch, and notes the gradients as they are."""
        again, self._had_backward = self._had_backward, True
        if self._capture is None or self._lost:
            return
        capture, clips_values = self._capture, trainer.gradient_clip_algorithm == "value"
        try:
            gradients, scale = self._gradients(trainer, pl_module), view.loss_scale(trainer) or 1.0
            self._watch.end_backward(gradients, scale, (trainer.gradient_clip_val or None) if clips_values else None)
            if again and pl_module.automatic_optimization:
                self._mark(
                    "closure",
                    f"Step {self._step + 1}: the run has several backward passes for one batch, of which the linearized network "
                    "follows one.",
                )
            elif not capture.accumulates_before:
                with self._undisturbed_pass(pl_module):
                    capture.comparison.accumulate(self._batch, 1 / trainer.accumulate_grad_batches)
        except Exception as error:
            self._error = error

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called before gradients are clipped. Compares them with those of the loss that is linearized."""
        if self._capture is None or self._lost:
            return
        with self._following():
            linearized = self._live(pl_module)
            self._loss_scale = view.loss_scale(trainer)
            if self._compares_gradient(trainer):
                self._compare_gradient(trainer, pl_module, view.gradients(optimizer, linearized, self._loss_scale))
            parameters = pl_module.named_parameters()
            thawed = [plain_name(n) for n, p in parameters if p.requires_grad and n not in linearized]
            if thawed:
                self._mark(
                    "thawed",
                    f"From step {self._step + 1} on the run trains {some(thawed)}, frozen when the network was linearized: "
                    "they stay fixed in the linearized network and are excluded from all distances.",
                )

    def _before_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """Called when the optimizer has its final gradients. Reads what the step depends on."""
        if self._capture is None or self._lost:
            return
        comparison, step = self._capture.comparison, self._step + 1
        self._settings, self._stepping = None, True
        with self._following():
            self._raise_earlier()
            if self._had_step:
                raise ValueError("Expected at most one optimizer step in a batch but `training_step` took 2.")
            settings = view.step_settings(trainer, optimizer, self._live(module))
            scale = view.scale_of_gradients(optimizer, view.loss_scale(trainer))
            self._watch.before_step(module, self._gradients(trainer, module), scale, settings, self._mark, step)
            self._settings = settings._replace(gradient_factor=self._watch.factor)
            self._taken = self._processes.any(len(settings.frozen) < len(comparison.initial_weights))
            changes = list(comparison.prepare_step(optimizer, self._settings)) if self._taken else []
            is_twin = isinstance(comparison.online, Twin)
            if changes and self.dynamics == "auto" and comparison.steps_taken == 0 and not is_twin:
                self._take_over(f"In its first step the run {changes[0][1]}.")
                changes = []
            for kind, phrase in changes:
                followed = "" if is_twin else ': dynamics="twin" does'
                self._mark(
                    kind, f"Step {step}: the run {phrase}, which the linearized network does not follow{followed}."
                )

    def _after_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """Called when the optimizer has new weights. Advances the linearized network, so that no checkpoint comes between."""
        if self._capture is None or self._lost or self._settings is None:
            self._stepping = False
            return
        self._had_step, comparison, settings = True, self._capture.comparison, self._settings
        with self._following():
            comparison.note_state()
            self._watch.after_step(module)
            if not self._taken or view.overflowed(optimizer):
                self._discard()
            else:
                comparison.step(settings)
            lr, training = float(settings.groups[0]["lr"]), comparison.training
            if training is not None and lr > training.max_learning_rate:
                self._report_once(
                    "unstable",
                    f"Step {self._step + 1}: the learning rate {lr:.4g} is above {training.max_learning_rate:.4g}, the largest "
                    "for which the linearized network is stable: it diverges while the run may not.",
                )
        self._stepping, self._compares = False, None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after every (micro-)batch. Measures if it is time."""
        stepped, self._step = trainer.global_step > self._step, trainer.global_step
        if view.has_averaged_weights(trainer) or self._lost:
            return
        if self._capture is None:
            if self.is_given_loss and self._is_due:
                self._begin(trainer, pl_module)
            return
        self._retract_unless_backward()
        if stepped and not self._had_step:  # as a GradScaler leaves a step out
            with self._following():
                self._discard()
        comparison = self._capture.comparison
        if stepped and not self._lost and (self._is_measured(comparison.steps) or view.is_last_step(trainer)):
            self._measure(trainer, pl_module)
            if self.prog_bar and self.history:
                tag = "relative_weight_distance"
                pl_module.log(
                    f"{self.name}/{tag}", self.history[-1][tag], prog_bar=True, logger=False, on_step=True, on_epoch=False,
                    batch_size=1,
                )  # fmt: skip

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when training ends. Measures the last step of a run that another callback stopped, and draws figures."""
        self._unhook()
        averaged = view.ends_with_averaged_weights(trainer, self) or view.has_averaged_weights(trainer)
        if self.history and self.history[-1]["step"] != self._step and not averaged and not self._lost:
            self._measure(trainer, pl_module)
        if len(self.history) > 1:
            rank_zero_info(f"LinearizationMonitor: {self.verdict.describe()}")
        histories = _histories(trainer)
        if list(histories)[-1] == self.name:  # all monitors have measured the last step
            log_hparams(trainer.loggers, histories, step=self._step)
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
            except Exception as error:
                self._fail(error, "The figures cannot be drawn.", "figures")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when everything has ended, also by an exception. Lets go of the optimizer."""
        self._unhook()

    @override
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from; before training starts, only that it has not."""
        if not self._started:
            return {"started": False}
        capture, step = self._resumed, self._start + self.capture_at  # until the first batch of a resumed run
        if self._capture is not None:
            step += self._capture.comparison.steps
            try:
                capture = self._capture.state_dict() if self.save_state and not self._lost else None
            except Exception as error:
                capture = None
                self._fail(error, f"The checkpoint at step {self._step} holds nothing to resume from.", "checkpoint")
        elif self._loaded_step is not None:
            step = self._loaded_step
        return {
            "started": True,
            "step": None if self._stepping else step,
            "options": options_of(self),
            "history": [dict(row) for row in self.history],
            "start": self._start,
            "reported": dict(self._reported),
            "lost": self._lost,
            "exact": self._exact,
            "capture": capture if self.save_state and not self._lost else None,
        }

    def _undisturbed(self, trainer: Trainer, module: LightningModule) -> AbstractContextManager[None]:
        """Puts back what data sets, hooks and modules keep of their own."""
        own = [*view.data_parts(self.reference), *view.data_parts(self.evaluation)]
        return preserved_objects(*view.bystanders(trainer, module), *own, skip=view.NOT_DATA)

    def _undisturbed_pass(self, module: LightningModule) -> AbstractContextManager[None]:
        """The same around a pass on one batch, for what passes through the module itself and not a copy."""
        assert self._capture is not None
        comparison = self._capture.comparison
        apart = comparison.loss is self._capture.step
        passes = isinstance(comparison.online, Twin) or self._compares
        return nullcontext() if apart or not passes else preserved_objects(module, skip=view.NOT_DATA)

    def unpacked(self, batch: Any) -> tuple[Any, Any]:
        """The inputs and the target of a batch, by `unpack`."""
        return (self.unpack or unpack_pair)(batch)

    @property
    def _is_due(self) -> bool:
        return self._step - self._start == self.capture_at and not self._lost

    def _begin(self, trainer: Trainer, module: LightningModule, batch: Any = None) -> None:
        """Captures and measures; what fails before training ends the run, what fails later ends the measurements."""
        resumed, self._resumed = self._resumed, None
        try:
            with self._processes.agreement(), self._undisturbed(trainer, module):
                self._linearize(trainer, module, resumed, batch)
        except Exception as error:
            if self.capture_at and resumed is None:
                self._lost = True
                self._fail(error, f"The capture at step {self._step} failed and nothing is measured; training goes on.")
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
            self._capture = capture = RunCapture(self, trainer, module, self._processes, state, batch)
        dynamics = capture.comparison.dynamics
        said = [capture.reason, "" if capture.step is None else capture.step.describe()]
        if any(said):
            rank_zero_info(f"LinearizationMonitor: {' '.join(filter(None, said))}")
        if capture.differences:
            self._mark(
                "differences",
                f"LinearizationMonitor compares this run with {dynamics.replace('_', ' ')}, which does not describe all of "
                f"it, so that a part of every distance is due to the difference: {'; '.join(capture.differences)}.",
            )
        self._say_modes()
        self.seconds["capture"] = time.perf_counter() - started
        self._captured_at = time.perf_counter()

    def _say_modes(self) -> None:
        """Says that scalars that were asked for are not logged."""
        assert self._capture is not None
        comparison = self._capture.comparison
        if (self.closest or self.modes) and comparison.training is None:
            self._report_once(
                "modes",
                f"LinearizationMonitor logs nothing for `closest` and `modes`: they need the modes of the kernel, which the "
                f'{comparison.dynamics} does not have. Choose dynamics="gradient_descent" or "gradient_flow", or leave them out.',
            )

    def _is_measured(self, step: int) -> bool:
        """Whether to measure, the same in all processes."""
        try:
            due = self.should_measure(step)
        except Exception as error:
            self._fail(
                error, f"`should_measure` failed at step {step}, and so may later calls; training goes on.", "schedule"
            )
            due = False
        own = type(self).should_measure is not LinearizationMonitor.should_measure
        return self._processes.any(due) if own else due

    def _compares_gradient(self, trainer: Trainer) -> bool:
        """Whether the gradient of the step to come is compared with that of the loss that is linearized."""
        assert self._capture is not None
        if self._compares is None:  # once for all batches of a step
            comparison, last = self._capture.comparison, self._step + 1 == trainer.max_steps
            self._compares = comparison.steps_taken == 0 or last or self._is_measured(comparison.steps + 1)
        return self._compares

    def _compare_gradient(self, trainer: Trainer, module: LightningModule, gradients: dict[str, Tensor | None]) -> None:
        assert self._capture is not None
        comparison, step = self._capture.comparison, self._capture.step
        judge = self._capture.judge
        self._retract_unless_backward()
        if all(gradient is None for gradient in gradients.values()):
            return
        scaled = self._loss_scale is not None and not all(
            g.isfinite().all() for g in gradients.values() if g is not None
        )
        if comparison.expected_gradient is None or scaled:  # the GradScaler leaves out this step
            return
        precisions = [view.precision(trainer, module), torch.float64 if step is None else step.precision]
        precision = max(precisions, key=lambda dtype: torch.finfo(dtype).eps)
        trained = {n: g for n, g in gradients.items() if module.get_parameter(n).requires_grad}
        relative, mismatch = comparison.expected_gradient.compare(trained, precision)
        if mismatch is None and judge is not None and judge.has_batches:
            judged = {name: value for name, value in judge.total().items() if name in trained}
            mismatch = comparison.expected_gradient.compare(judged, torch.float32)[1]
        self._capture.judge = None  # of the first step alone
        comparison.expected_gradient.discard()  # as large as the weights, and no longer needed
        self._watch.mismatch = relative
        if mismatch is None:
            return
        where = "the first step" if comparison.steps_taken == 0 else f"step {self._step + 1}"
        sentence = f"LinearizationMonitor does not follow the loss of this run in {where}. {mismatch.describe()}"
        if comparison.steps_taken == 0 and self.mismatch == "refuse":
            if self.is_given_loss:
                with suppress(Exception):  # what the step is cannot always be told
                    sentence += f" {self._capture.loss_of_run(trainer, self._first_batch)}".rstrip()
                advice = "Leave out `loss`, `predict` and `unpack`"
            elif not self._capture.accumulates_before:
                advice = 'Use dynamics="twin", which follows the network in train mode'
            else:
                advice = (
                    "The training step keeps state that changes its loss, or draws random numbers from a generator of its own: "
                    "give `loss`"
                )
            # A run that has trained before a late capture goes on, without measurements.
            kind = ValueError if self.capture_at else MisconfigurationException
            raise kind(
                f'{sentence} {advice}; or use mismatch="log" to go on with `gradient_mismatch` beside every distance.'
            )
        self._mark("gradient", sentence)

    def _retract_unless_backward(self) -> None:
        """Takes the present batch back where `training_step` left it out."""
        assert self._capture is not None
        for expected in (self._capture.comparison.expected_gradient, self._capture.judge):
            if not self._had_backward and expected is not None:
                expected.retract()

    def _require_known_samples(self, batch: Any) -> None:
        """Before the first step of a replay, finds the samples of its batches."""
        assert self._capture is not None
        comparison = self._capture.comparison
        if comparison.steps > 0 or not isinstance(comparison.online, Replay):
            return
        try:
            with self._processes.agreement():
                comparison.online.rows(batch)
        except UnknownSamplesError as error:
            if self.dynamics != "auto":
                raise MisconfigurationException(f"LinearizationMonitor cannot replay this run. {error}") from error
            self._take_over(str(error))

    def _live(self, module: LightningModule) -> dict[str, Tensor]:
        """The live parameters that were linearized."""
        assert self._capture is not None
        return view.live_parameters(module, self._capture.comparison.initial_weights)

    def _gradients(self, trainer: Trainer, module: LightningModule) -> dict[str, Tensor | None]:
        """The gradients of the linearized parameters that the optimizer steps."""
        held = {id(p) for p in held_by(view.single_optimizer(trainer))}
        return {name: p.grad for name, p in self._live(module).items() if id(p) in held}

    @contextmanager
    def _following(self) -> Iterator[None]:
        """What fails here loses the linearized network, in all processes, and not the run."""
        try:
            with self._processes.agreement():
                yield
        except MisconfigurationException:
            raise
        except Exception as error:
            self._lose(error)

    def _raise_earlier(self) -> None:
        """Raises what failed where the processes do not meet."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _discard(self) -> None:
        """The step was counted, and not taken."""
        assert self._capture is not None
        self._compares = None
        self._capture.comparison.discard()
        self._watch.discard()
        if self._capture.judge is not None:
            self._capture.judge.discard()

    def _take_over(self, why: str) -> None:
        """Replaces dynamics that were chosen here, and that do not fit, by the twin."""
        assert self._capture is not None
        self._capture.comparison.follow_with(self._capture.twin())
        self._capture.reason = f"Linearized twin in lockstep. {why}"
        self._report_once("dynamics", f"LinearizationMonitor follows the run with the linearized twin. {why}")
        self._say_modes()

    def _lose(self, error: Exception) -> None:
        self._lost = True
        self._unhook()
        step = self._step + 1
        self._fail(
            error, f"The linearized network is lost in step {step}, and measurements end; training goes on.", "lost"
        )

    def _unhook(self) -> None:
        if self._hooks is not None:
            self._hooks.detach()
        self._hooks = None

    def _measure(self, trainer: Trainer, module: LightningModule) -> None:
        assert self._capture is not None
        started = time.perf_counter()
        try:
            with nested_bars(trainer), self._processes.agreement(), self._undisturbed(trainer, module):
                self._live(module)
                self._watch.check_weights(module, self._mark, self._step)
                scalars = self._capture.comparison.measure(view.tensors_of(module))
        except Exception as error:
            self._fail(error, f"The measurement at step {self._step} failed, and so may later ones; training goes on.")
            return
        if self._watch.mismatch is not None:
            scalars["gradient_mismatch"] = self._watch.mismatch
        scalars["exact"] = float(self._exact)
        self.history.append({"step": float(self._step), **scalars})
        tagged = {f"{self.name}/{tag}": value for tag, value in scalars.items()}
        for logger in trainer.loggers:
            try:
                logger.log_metrics(tagged, step=self._step)
            except Exception as error:
                self._fail(error, f"{type(logger).__name__} cannot log step {self._step}; training goes on.", "logger")
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in tagged.items()})
        took = time.perf_counter() - started
        self.seconds["measurements"] += took
        self._say_cost(trainer, took)

    def _say_cost(self, trainer: Trainer, took: float) -> None:
        """Says what the measurements to come will take, once their duration and that of a step are known."""
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
            rank_zero_info(
                f"LinearizationMonitor: the {planned} measurements to come take about {planned * took:.0f} s, "
                f"{share:.0%} of the time of the run. Fewer `steps`, fewer `reference_samples` and taylor=False make it less."
            )

    def _fail(self, error: Exception, sentence: str, kind: str = "failure") -> None:
        if self.strict:
            raise error
        self._report_once(kind, f"{sentence} {type(error).__name__}: {error}")

    def _mark(self, kind: str, message: str) -> None:
        """Reports what the linearized network does not follow, and marks all rows to come."""
        self._exact = False
        self._report_once(kind, message)

    def _report_once(self, kind: str, message: str) -> None:
        if kind not in self._reported:
            self._reported[kind] = message
            rank_zero_warn(message)


def _histories(trainer: Trainer) -> dict[str, list[dict[str, float]]]:
    return {c.name: c.history for c in view.callbacks_of(trainer) if isinstance(c, LinearizationMonitor)}
