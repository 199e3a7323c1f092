"""Linearized training step by step, with the settings of every step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import repeat

from lightning_ntk.dynamics.closed_form import ClosedForm
from lightning_ntk.dynamics.error_bounds import error_bound
from lightning_ntk.dynamics.filters import Filters, Start
from lightning_ntk.dynamics.sgd import ModalSGD, SGDSettings
from lightning_ntk.dynamics.truncation import RunningTruncation
from lightning_ntk.solvers.base import ErrorBound, ModalSolver, Modes, Solved
from lightning_ntk.solvers.lanczos import LanczosModes
from lightning_ntk.training.readout import LinearizedState

Read = Callable[[Sequence[Modes], Filters], LinearizedState]


class Run:
    """The dynamics on the modes, advanced by `step` with the settings of a run, under the tolerance of the solver.

    With Lanczos, reading the state extends the bases where the steps so far need it. The settings are kept for that, and
    replayed on the new Ritz values, which gives the state that a run on these values from the start would have. Several runs
    may be followed at once.

    Args:
        solver: The modes.
        form: The closed form of the training, for gradient flow.
        factor: c, the measured factor of the loss.
        starts: Where the carried vectors are at step 0.
        read: Turns filters into a state.
        decays: Whether weight decay is possible: toward the initial weights, or toward zero if they are carried along.

    Attributes:
        history: The settings of all steps so far, equal ones in a row once with their number.
        steps: Their number.
    """

    def __init__(
        self,
        solver: ModalSolver,
        form: ClosedForm,
        factor: float,
        starts: Sequence[Start],
        read: Read,
        *,
        decays: bool,
    ) -> None:
        self._solver = solver
        self._flow = replace(form, rate=1.0) if form.dynamics == "gradient_flow" else None
        self._factor = factor
        self._starts = starts
        self._form = form
        self._read = read
        self._decays = decays
        self.history: list[tuple[SGDSettings, int]] = []
        self._time = 0.0
        self.steps = 0
        if self._flow is None:
            self._start(solver.modes)

    def step(self, settings: SGDSettings) -> None:
        """One optimizer step with these settings.

        Raises:
            ValueError: If these dynamics cannot take them.
        """
        self._require_settings(settings)
        self.steps += 1
        last, count = self.history[-1] if self.history else (None, 0)
        if settings == last:
            self.history[-1] = (settings, count + 1)
        else:
            self.history.append((settings, 1))
        if self._flow is not None:
            self._time += settings.lr * self._factor
            return
        self._advance(settings)

    def _require_settings(self, settings: SGDSettings) -> None:
        if settings.weight_decay != 0 and not self._decays:
            raise ValueError(
                f"Expected steps without weight decay but got {settings.weight_decay}: the initial weights shrink then, for "
                "which they have to be prepared. Give `weight_decay` from the start."
            )
        if self._flow is not None:
            if settings.momentum != 0 or settings.maximize:
                raise ValueError(
                    'Expected steps of plain gradient descent for dynamics="gradient_flow" but got momentum '
                    f'{settings.momentum} and maximize={settings.maximize}. Use dynamics="gradient_descent".'
                )
            if not math.isclose(settings.weight_decay, self._flow.ridge * self._factor, rel_tol=1e-9):
                raise ValueError(
                    f"Expected the weight decay to stay {self._flow.ridge * self._factor:.6g} in gradient flow but got "
                    f'{settings.weight_decay}. Use dynamics="gradient_descent", whose settings may change.'
                )

    @property
    def state(self) -> LinearizedState:
        """The linearized network after the steps so far: no pass over the data, unless Lanczos needs more.

        Raises:
            OverflowError: If the dynamics have diverged.
        """
        filters = self._solve().filters
        return self._read(self._solver.modes, filters)

    @property
    def error_bound(self) -> ErrorBound:
        """Bound on the distance of the weights after the steps so far from the linearized ones."""
        return self._solve().bound

    @property
    def filters(self) -> Filters:
        """The filters after the steps so far, on the present modes of the solver."""
        return self._answer(self._solver.modes).filters

    def _solve(self) -> Solved[Filters]:
        return self._solver.refine(self._answer, by_runs=self._flow is None)

    def _answer(self, modes: Sequence[Modes]) -> Solved[Filters]:
        if self._flow is not None:
            return self._flow.solve(modes, self._time)
        self._follow(modes)
        filters = self._sgd.filters
        return Solved(filters, lambda: self._estimate(modes, filters))

    def _estimate(self, modes: Sequence[Modes], filters: Filters) -> ErrorBound:
        if self._running is None:
            # The slopes of all modes would double the cost of a step, and few ask for them.
            sgd = self._make_sgd(modes, with_slopes=True)
            for settings, count in self.history:
                for same in repeat(settings, count):
                    sgd.step(same)
            truncations, slopes = [0.0] * len(modes), sgd.slopes
        else:
            truncations, slopes = self._running.truncations, self._sgd.slopes
        rounding, norms = self._form.rounding, self._form.norms
        return error_bound(modes, filters, slopes, truncations, rounding, norms, steps=self.steps)

    def _follow(self, modes: Sequence[Modes]) -> None:
        if modes is not self._modes:
            self._start(modes)
            for settings, count in self.history:
                for same in repeat(settings, count):
                    self._advance(same)

    def _start(self, modes: Sequence[Modes]) -> None:
        ritz = [m for m in modes if isinstance(m, LanczosModes)]
        self._modes = modes
        self._sgd = self._make_sgd(modes, with_slopes=bool(ritz))
        self._running = RunningTruncation(ritz, self._factor) if ritz else None

    def _make_sgd(self, modes: Sequence[Modes], *, with_slopes: bool) -> ModalSGD:
        return ModalSGD([m.eigenvalues for m in modes], self._factor, self._starts, with_slopes=with_slopes)

    def _advance(self, settings: SGDSettings) -> None:
        if self._running is not None:
            self._running.step(self._sgd.filters, settings)
        self._sgd.step(settings)
