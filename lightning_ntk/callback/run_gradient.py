"""Compares the gradient of a run with that of the linearized loss."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_ntk.callback import trainer as view
from lightning_ntk.callback.capture import RunCapture
from lightning_ntk.callback.status import RunStatus
from lightning_ntk.comparison.gradient_check import compiled_noise

Gradients = dict[str, Tensor | None]


class RunGradient:
    """Compares gradients of the run with those of the linearized loss.

    It does so at the first step and at every measured step.

    Args:
        capture: The run where it was linearized.
        status: Takes the reports.
        is_measured: Whether a step, counted from the capture, will be measured.
    """

    def __init__(self, capture: RunCapture, status: RunStatus, is_measured: Callable[[int], bool]) -> None:
        run = capture.run
        self._monitor, self._trainer = run.monitor, run.trainer
        self._module, self._processes = run.module, run.processes
        self._capture, self._status, self._is_measured = capture, status, is_measured
        self._first_batch: Any = None  # a copy, to say what the run does with it
        self._due: bool | None = None  # whether the coming step is compared, once that is known

    @property
    def is_due(self) -> bool:
        """Whether the gradient of the step to come is compared."""
        if self._due is None:  # once for all batches of a step
            comparison = self._capture.comparison
            last = self._trainer.global_step + 1 == self._trainer.max_steps
            self._due = comparison.steps_taken == 0 or last or self._is_measured(comparison.steps + 1)
        return self._due

    def keep_first(self, batch: Any) -> None:
        """Keeps a copy of a batch of the first step."""
        self._first_batch = batch

    def accumulate(self, batch: Any, scale: float) -> None:
        """Adds the linearized loss's gradient on a batch, at the trained weights."""
        expected = self._capture.comparison.expected_gradient
        if self.is_due and expected is not None:
            expected.accumulate(batch, view.tensors_of(self._module), scale)

    def tell_judge(self, batch: Any, scale: float) -> None:
        """Passes a batch of the first step to the judge of rounding errors."""
        if self._capture.judge is None:
            return
        try:
            with self._processes.agreement():
                self._capture.judge.accumulate(batch, view.tensors_of(self._module), scale)
        except Exception as error:
            self._capture.judge = None  # in all processes
            self._status.report_once(
                "judge",
                "LinearizationMonitor compares the given loss with the run in the precision of the run alone, because the "
                f"training step cannot be followed: {error}",
            )

    def retract(self) -> None:
        """Retracts the present batch, which `training_step` has skipped."""
        for expected in (self._capture.comparison.expected_gradient, self._capture.judge):
            if expected is not None:
                expected.retract()

    def finish_step(self) -> None:
        """Forgets whether the step was to be compared."""
        self._due = None

    def discard(self) -> None:
        """Forgets a step that was not taken."""
        self._due = None
        if self._capture.judge is not None:
            self._capture.judge.discard()

    def compare(self, gradients: Gradients, *, is_scaled: bool, step: int) -> float | None:
        """Compares the gradient of the coming step.

        Args:
            gradients: The gradient of the run, by parameter name.
            is_scaled: Whether a GradScaler multiplied the loss: it leaves out steps that are not finite.
            step: The number of the step in the run.

        Returns:
            The relative mismatch; None where there is nothing to compare.

        Raises:
            MisconfigurationException: If the run does not follow the loss in its first step, unless mismatches are
                logged; a ValueError after a late capture, whose run continues.
        """
        comparison, judge = self._capture.comparison, self._capture.judge
        if all(gradient is None for gradient in gradients.values()):
            return None
        skipped = is_scaled and not all(g.isfinite().all() for g in gradients.values() if g is not None)
        if comparison.expected_gradient is None or skipped:
            return None
        own = torch.float64 if self._capture.step is None else self._capture.step.precision
        precisions = [view.precision(self._trainer, self._module), own]
        precision = max(precisions, key=lambda dtype: torch.finfo(dtype).eps)
        trained = {n: g for n, g in gradients.items() if self._module.get_parameter(n).requires_grad}
        relative, mismatch = comparison.expected_gradient.compare(trained, precision)
        if mismatch is None and judge is not None and judge.has_batches:
            judged = {name: value for name, value in judge.total().items() if name in trained}
            mismatch = comparison.expected_gradient.compare(judged, torch.float32)[1]
        self._capture.judge = None  # of the first step alone
        comparison.expected_gradient.discard()  # as large as the weights, and no longer needed
        if mismatch is not None:
            is_first = comparison.steps_taken == 0
            where = "the first step" if is_first else f"step {step}"
            sentence = f"LinearizationMonitor does not follow the loss of this run in {where}. {mismatch.describe()}"
            if is_first and self._monitor.mismatch == "refuse":
                raise self._refusal(sentence)
            # Layers in another mode have been reported, and explain it.
            if not self._capture.is_in_other_mode:
                self._status.mark("gradient", sentence)
        return relative

    def _refusal(self, sentence: str) -> Exception:
        if self._monitor.is_given_loss:
            with suppress(Exception):  # what the step is cannot always be told
                sentence += f" {self._capture.loss_of_run(self._first_batch)}".rstrip()
            advice = "Leave out `loss`, `predict` and `unpack`"
        elif not self._capture.accumulates_before:
            advice = 'Use dynamics="twin", which follows the network in train mode'
        else:
            noise = compiled_noise(self._module, is_compiled=view.is_compiled(self._module))
            advice = noise or (
                "The training step keeps state that changes its loss, or draws random numbers from a generator of its own: "
                "give `loss`"
            )
        # A run that has trained before a late capture goes on, without measurements.
        kind = ValueError if self._monitor.capture_at else MisconfigurationException
        return kind(
            f'{sentence} {advice}; or use mismatch="log" to go on with `gradient_mismatch` beside every distance.'
        )
