"""Linearized training on given minibatches, replayed on the kernel.

The minibatches are those of a run, or a recorded order.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_ntk.dynamics.sgd import Hyperparameters, SGDSettings
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.training.base import LinearizedState, StepSettings
from lightning_ntk.training.function_space import FunctionSpaceSGD, require_rows
from lightning_ntk.training.off_span import displacement, off_span_terms
from lightning_ntk.training.problem import LinearizedProblem
from lightning_ntk.utilities.contexts import preserved_rng
from lightning_ntk.utilities.representation import represent
from lightning_ntk.utilities.shapes import Float, Float64, Int, Shaped
from lightning_ntk.utilities.validation import require_instance, require_number

Rows: TypeAlias = Tensor | Sequence[int]
Batches: TypeAlias = Sequence[Rows | tuple[Rows, ...]]


class Replay:
    """SGD on minibatches of the training set, in function space, with any differentiable loss.

    A step costs no pass through the network. The samples of a batch are recognized by their content.

    Args:
        problem: The network on its training set.
        hyperparameters: The optimizer's settings. They say whether weights decay and toward what; the settings of every
            step come with the step.
        momentum_buffers: The optimizer's momentum buffers at step 0, by parameter.
        ntk: A kernel computed earlier.

    Attributes:
        kernel: The kernel of the training set, `(N K, N K)`.
        terms: The vectors that the weights carry along besides D J^T a.

    Raises:
        ValueError: If the kernel, the hyperparameters or the buffers cannot be used.
    """

    dynamics = "replay"

    def __init__(
        self,
        problem: LinearizedProblem,
        hyperparameters: Hyperparameters,
        *,
        momentum_buffers: Mapping[str, Tensor] | None = None,
        ntk: Float[Tensor, "rows rows"] | None = None,
    ) -> None:
        self.problem = problem
        self.terms = off_span_terms(problem, hyperparameters, momentum_buffers)
        self._decays = hyperparameters.decays
        self.kernel = problem.kernel(ntk, dtype=problem.linearization.dtype)
        self.restart()

    def restart(self) -> None:
        """Goes back to step 0."""
        self._sgd = FunctionSpaceSGD(
            self.kernel,
            self.problem.predictions,
            self.problem.objective,
            carried=[(term.start, term.image) for term in self.terms],
            decays=self._decays,
            processes=self.problem.processes,
        )

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return self._sgd.steps

    def rows(self, batch: Any) -> Int[Tensor, "B"]:
        """The rows of a batch's samples in the training set, `(B,)`.

        Raises:
            UnknownSamplesError: If the batch has samples that are not in the training set.
        """
        return self.problem.rows(batch)

    @preserved_rng()
    def accumulate(self, batch: Any, *, scale: float = 1.0) -> None:
        """Adds the loss gradient of a batch of training samples.

        The samples are found in the training set by their content.
        """
        _, target = self.problem.reference.unpack(batch)
        assert target is not None  # as in the training set
        self.accumulate_rows(self.rows(batch), target, scale=scale)

    def accumulate_rows(self, rows: Int[Tensor, "B"], target: Shaped[Tensor, "B ..."], *, scale: float = 1.0) -> None:
        """Adds the loss gradient of these rows `(B,)` of the training set."""
        self._sgd.accumulate(rows, target, scale=scale)

    def step(self, settings: StepSettings) -> None:
        """Takes one step with the settings of the first parameter group."""
        self._sgd.step(
            SGDSettings.of(settings.groups[0]), clip_norm=settings.clip_norm, clip_value=settings.clip_value,
            factor=settings.gradient_factor,
        )  # fmt: skip

    def step_with(self, settings: SGDSettings) -> None:
        """Takes one step, see `FunctionSpaceSGD.step`."""
        self._sgd.step(settings)

    def discard(self) -> None:
        """Forgets the batches accumulated since the last step."""
        self._sgd.discard()

    def state(self) -> LinearizedState:
        """The linearized network after the steps so far, without a pass."""
        return LinearizedState(self._sgd.coefficients.cpu(), self._sgd.predictions.cpu(), self._sgd.scales)

    def displacement(self) -> Tensors:
        """w_lin - w0, by parameter name in float64: one pass over the training set."""
        return displacement(self.problem, self.terms, self.state())

    def predictions(self) -> Float64[Tensor, "N K"]:
        """Outputs on the training set, `(N, K)` in float64 on the CPU."""
        return self._sgd.predictions.cpu()

    def state_dict(self) -> dict[str, Any]:
        """Coefficients, predictions and momentum."""
        return self._sgd.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned."""
        self._sgd.load_state_dict(state)

    def __repr__(self) -> str:
        return represent(self, f"{self.problem}", f"{self.steps} steps")


class RecordedTraining:
    """A replay that can be evaluated at any step.

    The batches are those of `LinearizedTraining`, the other arguments those of `Replay`.
    """

    def __init__(
        self,
        problem: LinearizedProblem,
        hyperparameters: Hyperparameters,
        batches: Batches,
        *,
        momentum_buffers: Mapping[str, Tensor] | None = None,
        ntk: Float[Tensor, "rows rows"] | None = None,
    ) -> None:
        require_instance("batches", batches, list | tuple, "a list with the rows of every step")
        self._hyperparameters = hyperparameters
        self._batches = [_micro_batches(batch, len(problem.reference), step) for step, batch in enumerate(batches)]
        self._replay = Replay(problem, hyperparameters, momentum_buffers=momentum_buffers, ntk=ntk)
        self.terms = self._replay.terms
        self.kernel = self._replay.kernel

    def state(self, t: float | None) -> LinearizedState:
        """Computes the linearized network after t steps.

        It continues from the last time requested.
        """
        steps, replay = len(self._batches), self._replay
        if t is not None:
            require_number("t", t, "a number of optimizer steps")
        if t is None or not (0 <= t <= steps and t == int(t)):
            raise ValueError(
                f"Expected argument `t` to be a whole number of steps up to {steps}, the number of recorded `batches`, "
                f"but got {t}."
            )
        if t < replay.steps:
            replay.restart()
        targets = replay.problem.objective.targets
        while replay.steps < t:
            step = replay.steps
            for rows in self._batches[step]:
                replay.accumulate_rows(rows, targets[rows], scale=1 / len(self._batches[step]))
            replay.step_with(self._hyperparameters.settings(step))
        return replay.state()


def _micro_batches(batch: Rows | tuple[Rows, ...], samples: int, step: int) -> list[Tensor]:
    several = isinstance(batch, tuple) and not all(isinstance(row, int) for row in batch)
    parts = [torch.as_tensor(rows) for rows in (batch if several else (batch,))]
    for rows in parts:
        require_rows(rows, samples, f"the batch of step {step}")
    return [rows.long() for rows in parts]
