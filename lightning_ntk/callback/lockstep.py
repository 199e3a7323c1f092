"""Advances the linearized network in lockstep with a run."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_ntk.callback import trainer as view
from lightning_ntk.callback.capture import RunCapture
from lightning_ntk.callback.run_gradient import Gradients, RunGradient
from lightning_ntk.callback.status import RunStatus
from lightning_ntk.callback.step_hooks import StepHooks
from lightning_ntk.callback.step_watch import StepWatch
from lightning_ntk.comparison.choice import TWIN
from lightning_ntk.comparison.optimizer import some
from lightning_ntk.comparison.run_comparison import RunComparison
from lightning_ntk.data.batches import copy_batch
from lightning_ntk.data.sample_index import UnknownSamplesError
from lightning_ntk.linearization.parameters import plain_name
from lightning_ntk.training.base import StepSettings
from lightning_ntk.training.optimizer_copy import held_by
from lightning_ntk.training.replay import Replay
from lightning_ntk.training.twin import Twin
from lightning_ntk.utilities.preserved_objects import preserved_objects


class Lockstep:
    """Advances a linearized network with the run beside which it trains.

    The methods are called in the order of a run. A failure here loses the linearized network, in all processes, but not
    the run.

    Args:
        capture: The run where it was linearized.
        status: Takes the reports, and knows whether the linearized network is lost.
        is_measured: Whether a step, counted from the capture, will be measured.

    Attributes:
        step: Optimizer steps of the run before the present batch.
        is_stepping: Whether the optimizer is in the middle of a step.
    """

    def __init__(self, capture: RunCapture, status: RunStatus, is_measured: Callable[[int], bool]) -> None:
        run = capture.run
        self._monitor, self._trainer = run.monitor, run.trainer
        self._module, self._processes = run.module, run.processes
        self._capture, self._status = capture, status
        self._gradient = RunGradient(capture, status, is_measured)
        self._watch = StepWatch()
        self._hooks = StepHooks(self._before_step, self._after_step)
        self.step = run.trainer.global_step
        self.is_stepping = False
        self._batch: Any = None
        self._had_step = self._had_backward = False  # whether the present batch had an optimizer step, a backward pass
        self._is_compared = False  # whether the gradient of the coming step is
        self._taken = False  # whether there is a gradient for the coming step
        self._settings: StepSettings | None = None  # of the coming step
        self._error: Exception | None = None  # to be raised where the processes meet
        self._say_missing_modes()

    @property
    def comparison(self) -> RunComparison:
        """The run beside its linearized network."""
        return self._capture.comparison

    def begin_batch(self, batch: Any, batch_idx: int) -> None:
        """Called before the batch; a twin trains on it unchanged.

        It does so with the random state that the run will have.
        """
        self._batch, self._had_backward, self._had_step = batch, False, False
        is_first = self._monitor.is_given_loss and self.comparison.steps_taken == 0
        self._gradient.keep_first(copy_batch(batch) if is_first else None)
        scale = 1 / self._trainer.accumulate_grad_batches
        self._require_known_samples()
        with self._followed():
            self._raise_earlier()
            self._hooks.attach(view.single_optimizer(self._trainer))
            self._live()
            self._watch.begin_batch(self._module, self._status.mark, self.step)
            if self._capture.shadow is not None:
                self._capture.shadow.follow(batch_idx)
            self._is_compared = self._gradient.is_due
            with self._undisturbed_pass():
                if self._capture.accumulates_before:
                    self.comparison.accumulate(batch, scale)
                    self._say_unknown_samples()
                self._gradient.accumulate(batch, scale)
        if not self._status.lost:
            self._gradient.tell_judge(batch, scale)

    def begin_backward(self) -> None:
        """Called before a backward pass; checks the gradients so far."""
        try:
            scale = view.loss_scale(self._trainer) or 1.0
            self._watch.begin_backward(self._gradients(), scale, self._status.mark, self.step)
        except Exception as error:
            self._error = error

    def end_backward(self) -> None:
        """Called after a backward pass; accumulates the batch and records the gradients."""
        again, self._had_backward = self._had_backward, True
        clips_values = self._trainer.gradient_clip_algorithm == "value"
        try:
            scale = view.loss_scale(self._trainer) or 1.0
            clip = (self._trainer.gradient_clip_val or None) if clips_values else None
            self._watch.end_backward(self._gradients(), scale, clip)
            if again and self._module.automatic_optimization:
                self._status.mark(
                    "closure",
                    f"Step {self.step + 1}: the run has several backward passes for one batch, of which the linearized network "
                    "follows one.",
                )
            elif not self._capture.accumulates_before:
                with self._undisturbed_pass():
                    self.comparison.accumulate(self._batch, 1 / self._trainer.accumulate_grad_batches)
                self._say_unknown_samples()
        except Exception as error:
            self._error = error

    def before_clipping(self, optimizer: Optimizer) -> None:
        """Called before gradients are clipped; compares them with the linearized loss's."""
        with self._followed():
            linearized = self._live()
            scale = view.loss_scale(self._trainer)
            if self._gradient.is_due:
                self._retract_unless_backward()
                gradients = view.gradients(optimizer, linearized, scale)
                mismatch = self._gradient.compare(gradients, is_scaled=scale is not None, step=self.step + 1)
                if mismatch is not None:
                    self._watch.mismatch = mismatch
            parameters = self._module.named_parameters()
            thawed = [plain_name(n) for n, p in parameters if p.requires_grad and n not in linearized]
            if thawed:
                self._status.mark(
                    "thawed",
                    f"From step {self.step + 1} on the run trains {some(thawed)}, frozen when the network was linearized: "
                    "they stay fixed in the linearized network and are excluded from all distances.",
                )

    def _before_step(self, optimizer: Optimizer) -> None:
        """Called with the final gradients; reads what the step depends on."""
        if self._status.lost:
            return
        comparison, step = self.comparison, self.step + 1
        self._settings, self.is_stepping = None, True
        with self._followed():
            self._raise_earlier()
            if self._had_step:
                raise ValueError("Expected at most one optimizer step in a batch but `training_step` took 2.")
            settings = view.step_settings(self._trainer, optimizer, self._live())
            scale = view.scale_of_gradients(optimizer, view.loss_scale(self._trainer))
            self._watch.before_step(self._module, self._gradients(), scale, settings, self._status.mark, step)
            self._settings = settings._replace(gradient_factor=self._watch.factor)
            self._taken = self._processes.any(len(settings.frozen) < len(comparison.initial_weights))
            changes = list(comparison.prepare_step(optimizer, self._settings)) if self._taken else []
            is_twin = isinstance(comparison.online, Twin)
            may_switch = self._monitor.dynamics == "auto" and comparison.steps_taken == 0 and not is_twin
            # A twin would need the parameters of the capture, none of them frozen since.
            if changes and may_switch and "frozen" not in dict(changes):
                self._take_over(f"In its first step the run {changes[0][1]}.")
                changes = []
            for kind, phrase in changes:
                followed = "" if is_twin else ': dynamics="twin" does'
                self._status.mark(
                    kind, f"Step {step}: the run {phrase}, which the linearized network does not follow{followed}."
                )

    def _after_step(self, optimizer: Optimizer) -> None:
        """Called with the new weights; advances the linearized network.

        It does so at once, so that no checkpoint comes between.
        """
        if self._status.lost or self._settings is None:
            self.is_stepping = False
            return
        self._had_step, comparison, settings = True, self.comparison, self._settings
        with self._followed():
            comparison.note_state()
            self._watch.after_step(self._module)
            if not self._taken or view.overflowed(optimizer):
                self._discard()
            else:
                comparison.step(settings)
            lr, training = float(settings.groups[0]["lr"]), comparison.training
            if training is not None and lr > training.max_learning_rate:
                self._status.report_once(
                    "unstable",
                    f"Step {self.step + 1}: the learning rate {lr:.4g} is above {training.max_learning_rate:.4g}, the largest "
                    "for which the linearized network is stable: it diverges while the run may not.",
                )
        self.is_stepping = False
        self._gradient.finish_step()

    def end_batch(self) -> bool:
        """Called after a (micro-)batch; returns whether the run has counted a step."""
        counted, self.step = self._trainer.global_step > self.step, self._trainer.global_step
        self._retract_unless_backward()
        if counted and not self._had_step:  # as a GradScaler leaves a step out
            with self._followed():
                self._discard()
        return counted

    def measure(self) -> dict[str, float]:
        """Compares the networks as they are now."""
        self._live()
        self._watch.check_weights(self._module, self._status.mark, self.step)
        scalars = self.comparison.measure(view.tensors_of(self._module))
        if self._watch.mismatch is not None:
            scalars["gradient_mismatch"] = self._watch.mismatch
        return scalars | {"exact": float(self._status.exact)}

    def detach(self) -> None:
        """Removes the hooks from the optimizer."""
        self._hooks.detach()

    def _undisturbed_pass(self) -> AbstractContextManager[None]:
        """Restores the module's own state after a pass through it.

        Passes through a copy need no restoring.
        """
        apart = self._capture.follows_step
        passes = isinstance(self.comparison.online, Twin) or self._is_compared
        return nullcontext() if apart or not passes else preserved_objects(self._module, skip=view.NOT_DATA)

    def _require_known_samples(self) -> None:
        """Finds the samples of the first step's batches in the data set.

        A replay needs them, and so do stored rows that the user has requested.
        """
        online, stored = self.comparison.online, self._capture.stored
        wanted = stored if self._monitor.jacobian == "stored" else None
        found = online if isinstance(online, Replay) else wanted
        if self.comparison.steps > 0 or found is None:
            return
        try:
            with self._processes.agreement():
                found.rows(self._batch)
        except UnknownSamplesError as error:
            if found is stored:
                raise MisconfigurationException(
                    f"LinearizationMonitor has no stored rows for this run. {error}"
                ) from error
            if self._monitor.dynamics != "auto":
                raise MisconfigurationException(f"LinearizationMonitor cannot replay this run. {error}") from error
            self._take_over(str(error))

    def _say_unknown_samples(self) -> None:
        """Reports the first batch without stored rows, which took a pass."""
        stored = self._capture.stored
        if stored is not None and stored.unknown:
            self._status.report_once(
                "rows",
                "LinearizationMonitor takes passes through the network for batches that are not among the stored rows of the "
                f"Jacobian: slower, and as exact. {stored.unknown}",
            )

    def _take_over(self, why: str) -> None:
        """Switches to the twin if automatically chosen dynamics do not fit."""
        self.comparison.follow_with(self._capture.twin())
        self._capture.reason = f"{TWIN}. {why}"
        self._status.report_once("dynamics", f"LinearizationMonitor follows the run with the linearized twin. {why}")
        self._say_missing_modes()

    def _say_missing_modes(self) -> None:
        """Reports that requested scalars are not logged."""
        if (self._monitor.closest or self._monitor.modes) and self.comparison.training is None:
            self._status.report_once(
                "modes",
                f"LinearizationMonitor logs nothing for `closest` and `modes`: they need the modes of the kernel, which the "
                f'{self.comparison.dynamics} does not have. Choose dynamics="gradient_descent" or "gradient_flow", or leave them '
                "out.",
            )

    def _live(self) -> dict[str, Tensor]:
        """The live parameters that were linearized."""
        return view.live_parameters(self._module, self.comparison.initial_weights)

    def _gradients(self) -> Gradients:
        """The gradients of the linearized parameters that the optimizer steps."""
        held = {id(p) for p in held_by(view.single_optimizer(self._trainer))}
        return {name: p.grad for name, p in self._live().items() if id(p) in held}

    def _retract_unless_backward(self) -> None:
        if not self._had_backward:
            self._gradient.retract()

    def _discard(self) -> None:
        """Discards a step that was counted but not taken."""
        self.comparison.discard()
        self._watch.discard()
        self._gradient.discard()

    @contextmanager
    def _followed(self) -> Iterator[None]:
        try:
            with self._processes.agreement():
                yield
        except MisconfigurationException:
            raise
        except Exception as error:
            self._status.lost = True
            self.detach()
            self._status.fail(
                error,
                f"The linearized network is lost in step {self.step + 1}, and measurements end; training goes on.",
                "lost",
            )

    def _raise_earlier(self) -> None:
        """Raises an earlier failure from a place where the processes did not meet."""
        error, self._error = self._error, None
        if error is not None:
            raise error
