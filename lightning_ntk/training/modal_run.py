"""Full-batch gradient descent or flow on kernel modes, beside a run."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from lightning_ntk.dynamics.closed_form import ClosedForm
from lightning_ntk.dynamics.error_bounds import error_bound
from lightning_ntk.dynamics.filters import Filters
from lightning_ntk.dynamics.sgd import Hyperparameters, ModalSGD, SGDSettings
from lightning_ntk.dynamics.truncation import RunningTruncation
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.solvers.base import ErrorBound, Modes, Solved
from lightning_ntk.solvers.lanczos import LanczosModes
from lightning_ntk.training.base import LinearizedState, StepSettings
from lightning_ntk.training.function_space import require_prepared_decay
from lightning_ntk.training.modes import ModalProblem
from lightning_ntk.training.off_span import displacement
from lightning_ntk.utilities.shapes import Float64


class ModalRun:
    """Dynamics on the modes, advanced with the settings of every step.

    A step takes O(m) operations.

    With Lanczos, asking for the state extends the bases where the steps so far need it. The settings are kept for that and
    replayed on the new Ritz values, which gives the state that a run on these values from the start would have. Gradient flow
    has a closed form, as its steps only add up their durations.

    Attributes:
        dynamics: "gradient_descent" or "gradient_flow".
        history: The settings of all steps so far; equal ones in a row appear once, with their number.
        steps: The number of steps so far.
    """

    def __init__(self, modal: ModalProblem, form: ClosedForm, hyperparameters: Hyperparameters) -> None:
        self.dynamics: str = form.dynamics
        self._modal = modal
        self._flow = replace(form, rate=1.0)
        self._decays = hyperparameters.decays
        self.history: list[tuple[SGDSettings, int]] = []
        self.steps = 0
        self._time = 0.0
        self._solved: tuple[Sequence[Modes], Solved[Filters]] | None = None
        self._start(modal.solver.modes)

    def accumulate(self, batch: Any, *, scale: float = 1.0) -> None:
        """Ignores the batch: these dynamics see the whole training set in every step."""

    def discard(self) -> None:
        """Does nothing, as no batch is kept."""

    def step(self, settings: StepSettings) -> None:
        """Takes one step with the settings of the first parameter group."""
        used = SGDSettings.of(settings.groups[0])
        # To gradient flow a step is a duration; whatever else an optimizer does is not part of it.
        self.step_with(
            used if self.dynamics == "gradient_descent" else SGDSettings(used.lr, weight_decay=self._flow_decay)
        )

    def step_with(self, settings: SGDSettings) -> None:
        """Takes one step with these settings.

        Raises:
            ValueError: If these dynamics cannot take them.
        """
        self._require_settings(settings)
        self.steps += 1
        self._solved = None
        last, count = self.history[-1] if self.history else (None, 0)
        if settings == last:
            self.history[-1] = (settings, count + 1)
        else:
            self.history.append((settings, 1))
        if self.dynamics == "gradient_flow":
            self._time += settings.lr
        else:
            self._advance(settings)

    @property
    def kernel_time(self) -> float | None:
        r"""The kernel time :math:`\eta t`; None with momentum or decay.

        It is the sum of the learning rates times the loss factor.
        """
        if any(settings.momentum or settings.weight_decay for settings, _ in self.history):
            return None
        return self._modal.loss_factor * sum(settings.lr * count for settings, count in self.history)

    def state(self) -> LinearizedState:
        """Computes the linearized network after the steps so far.

        It takes no pass over the data unless Lanczos needs more products.

        Raises:
            OverflowError: If the dynamics have diverged.
        """
        return self._modal.state(self._solve().filters)

    def error_bound(self) -> ErrorBound:
        """Bound on the error of the weights after the steps so far."""
        return self._solve().bound

    def displacement(self) -> Tensors:
        """w_lin - w0, by parameter name in float64: one pass over the training set."""
        return displacement(self._modal.problem, self._modal.terms, self.state())

    def predictions(self) -> Float64[Tensor, "N K"]:
        """Outputs on the training set, `(N, K)` in float64 on the CPU."""
        return self.state().predictions

    def state_dict(self) -> dict[str, Any]:
        """The settings of all steps, from which the state follows on any modes."""
        rows = [(*settings, count) for settings, count in self.history]
        return {"settings": torch.tensor(rows, dtype=torch.float64).reshape(-1, len(SGDSettings._fields) + 1)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the steps again."""
        kinds = SGDSettings.__annotations__.values()
        for *values, count in state["settings"].tolist():
            settings = SGDSettings(*(kind(value) for kind, value in zip(kinds, values, strict=True)))
            for _ in range(int(count)):
                self.step_with(settings)

    @property
    def _flow_decay(self) -> float:
        return self._flow.ridge * self._modal.loss_factor

    def _require_settings(self, settings: SGDSettings) -> None:
        require_prepared_decay(settings, self._decays)
        if self.dynamics == "gradient_descent":
            return
        if settings.momentum != 0:
            raise ValueError(
                'Expected steps without momentum for dynamics="gradient_flow" but got momentum '
                f'{settings.momentum}. Use dynamics="gradient_descent".'
            )
        if not math.isclose(settings.weight_decay, self._flow_decay, rel_tol=1e-9):
            raise ValueError(
                f"Expected the weight decay to stay {self._flow_decay:.6g} in gradient flow but got "
                f'{settings.weight_decay}. Use dynamics="gradient_descent", whose settings may change.'
            )

    def _solve(self) -> Solved[Filters]:
        solver = self._modal.solver
        if self._solved is None or self._solved[0] is not solver.modes:
            solved = solver.refine(self._answer, by_runs=self.dynamics == "gradient_descent")
            self._solved = solver.modes, solved
        return self._solved[1]

    def _answer(self, modes: Sequence[Modes]) -> Solved[Filters]:
        if self.dynamics == "gradient_flow":
            return self._flow.solve(modes, self._modal.loss_factor * self._time)
        if modes is not self._modes:
            self._start(modes)
            for settings in self._taken():
                self._advance(settings)
        filters = self._sgd.filters
        return Solved(filters, lambda: self._estimate(modes, filters))

    def _estimate(self, modes: Sequence[Modes], filters: Filters) -> ErrorBound:
        if self._running is None:
            # The slopes of all modes would double the cost of a step, and few ask for them.
            sgd = self._make_sgd(modes, with_slopes=True)
            for settings in self._taken():
                sgd.step(settings)
            truncations, slopes = [0.0] * len(modes), sgd.slopes
        else:
            truncations, slopes = self._running.truncations, self._sgd.slopes
        rounding, norms = self._modal.rounding, [term.norm for term in self._modal.terms]
        return error_bound(modes, filters, slopes, truncations, rounding, norms, steps=self.steps)

    def _taken(self) -> Iterator[SGDSettings]:
        return chain.from_iterable(repeat(settings, count) for settings, count in self.history)

    def _start(self, modes: Sequence[Modes]) -> None:
        ritz = [m for m in modes if isinstance(m, LanczosModes)]
        self._modes = modes
        self._sgd = self._make_sgd(modes, with_slopes=bool(ritz))
        self._running = RunningTruncation(ritz, self._modal.loss_factor) if ritz else None

    def _make_sgd(self, modes: Sequence[Modes], *, with_slopes: bool) -> ModalSGD:
        starts = [term.start for term in self._modal.terms]
        return ModalSGD([m.eigenvalues for m in modes], self._modal.loss_factor, starts, with_slopes=with_slopes)

    def _advance(self, settings: SGDSettings) -> None:
        if self._running is not None:
            self._running.step(self._sgd.filters, settings)
        self._sgd.step(settings)
