"""Linearized training on a recorded order of minibatches: the replay of `lightning_ntk.training.replay`, asked for any step."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_ntk.dynamics.sgd import Hyperparameters
from lightning_ntk.training.carried import CarriedVector
from lightning_ntk.training.problem import Capture, training_kernel
from lightning_ntk.training.readout import LinearizedState
from lightning_ntk.training.replay import Replay
from lightning_ntk.training.scaling import Scaling

Rows: TypeAlias = Tensor | Sequence[int]
Batches: TypeAlias = Sequence[Rows | tuple[Rows, ...]]


class RecordedTraining:
    """SGD on given minibatches, in function space, with any differentiable loss.

    Args:
        capture: The network at w0.
        scaling: Coordinates in which all learning rates are equal, if they are not.
        hyperparameters: Those of the optimizer.
        carried: The vectors that the weights carry along.
        batches: For every step the rows of its samples `(b,)`, or a tuple of such, micro-batches whose gradients are averaged.
        ntk: A kernel computed earlier.

    Attributes:
        kernel: `(N K, N K)`.

    Raises:
        ValueError: If a batch is empty or has a row that is no sample, or if there are more learning rates than batches.
    """

    def __init__(
        self,
        capture: Capture,
        scaling: Scaling | None,
        hyperparameters: Hyperparameters,
        carried: Sequence[CarriedVector],
        batches: Batches,
        ntk: Tensor | None,
    ) -> None:
        self._capture = capture
        self._hyperparameters = hyperparameters
        self._carried = carried
        self._batches = [_micro_batches(batch, len(capture.reference), step) for step, batch in enumerate(batches)]
        dtype = capture.linearization.dtype
        self.kernel = (
            training_kernel(ntk, capture, dtype=dtype) if scaling is None else scaling.kernel(ntk, dtype=dtype)
        )
        self._replay = self._start()

    @property
    def steps(self) -> int:
        """The number of recorded steps."""
        return len(self._batches)

    def state(self, t: float | None) -> LinearizedState:
        """The linearized network after t steps, on from the last time that was asked for."""
        if t is None or not (0 <= t <= self.steps and t == int(t)):
            raise ValueError(
                f"Expected argument `t` to be a whole number of steps up to {self.steps}, the number of recorded `batches`, "
                f"but got {t}."
            )
        if t < self._replay.steps:
            self._replay = self._start()
        targets = self._capture.objective.targets
        while self._replay.steps < t:
            step = self._replay.steps
            micro_batches = self._batches[step]
            for rows in micro_batches:
                self._replay.accumulate(rows, targets[rows], scale=1 / len(micro_batches))
            self._replay.step(self._hyperparameters.settings(step))
        replay = self._replay
        scales = tuple(replay.initial_scale if c.start.weight else replay.momentum_scale for c in self._carried)
        return LinearizedState(replay.coefficients.cpu(), replay.predictions.cpu(), scales)

    def _start(self) -> Replay:
        images = {bool(c.start.weight): c.image for c in self._carried}
        return Replay(
            self.kernel,
            self._capture.predictions,
            self._capture.objective,
            decay_toward="initial" if self._hyperparameters.decays_to_initial else "zero",
            initial_image=images.get(True),
            momentum_image=images.get(False),
        )


def _micro_batches(batch: Rows | tuple[Rows, ...], samples: int, step: int) -> list[Tensor]:
    several = isinstance(batch, tuple) and not all(isinstance(row, int) for row in batch)
    parts = [torch.as_tensor(rows) for rows in (batch if several else (batch,))]
    for rows in parts:
        whole = not (rows.is_floating_point() or rows.dtype == torch.bool)
        if rows.dim() != 1 or len(rows) == 0 or not whole or rows.min() < 0 or rows.max() >= samples:
            raise ValueError(
                f"Expected argument `batches` to hold, for every step, rows of the training set from 0 to {samples - 1}, but "
                f"step {step} has {rows}."
            )
    return [rows.long() for rows in parts]
