"""Linearized training on the modes of the kernel, at any time.

It uses a closed form where there is one, and steps otherwise.
"""

import math
from dataclasses import replace
from functools import partial

from lightning_ntk.dynamics.closed_form import ClosedForm, Dynamics, is_infinite
from lightning_ntk.dynamics.filters import Filters
from lightning_ntk.dynamics.sgd import Hyperparameters
from lightning_ntk.dynamics.stability import max_learning_rate, ridge
from lightning_ntk.solvers.base import ErrorBound, Solved
from lightning_ntk.solvers.eigh import CompleteModes
from lightning_ntk.training.base import LinearizedState
from lightning_ntk.training.modal_run import ModalRun
from lightning_ntk.training.modes import ModalProblem
from lightning_ntk.utilities.validation import require_number


class ModalTraining:
    """Full-batch gradient descent or flow on the modes of the kernel."""

    def __init__(self, modal: ModalProblem, dynamics: Dynamics, hyperparameters: Hyperparameters) -> None:
        self.modal = modal
        self.dynamics = dynamics
        self.hyperparameters = hyperparameters
        self._form = ClosedForm(
            dynamics,
            hyperparameters.lr * modal.loss_factor if isinstance(hyperparameters.lr, float) else 0.0,
            modal.problem.linearization.dtype,
            ridge=ridge(hyperparameters.template, modal.loss_factor),
            limits=tuple(term.limit for term in modal.terms),
            norms=tuple(term.norm for term in modal.terms),
            rounding=modal.rounding,
        )
        self._run: ModalRun | None = None

    @property
    def max_learning_rate(self) -> float:
        """The largest stable learning rate, infinite for gradient flow."""
        if self.dynamics == "gradient_flow":
            return math.inf
        curvature = self.modal.loss_factor * max(self.modal.solver.largest_eigenvalue, 0.0)
        return max_learning_rate(self.hyperparameters.template, curvature)

    @property
    def unstable(self) -> bool:
        """Whether a constant learning rate is above the largest stable one."""
        return isinstance(self.hyperparameters.lr, float) and self.hyperparameters.lr > self.max_learning_rate

    def state(self, t: float | None) -> LinearizedState:
        """Computes the linearized network after t steps.

        A recurrence continues from the last time requested.
        """
        self.require_time(t)
        return self.modal.state(self._solve(t).filters) if self.has_closed_form(t) else self._run_to(_whole(t)).state()

    def error_bound(self, t: float | None) -> ErrorBound:
        """Bound on the error of the weights after t steps."""
        self.require_time(t)
        return self._solve(t).bound if self.has_closed_form(t) else self._run_to(_whole(t)).error_bound()

    def follow(self) -> ModalRun:
        """Starts these dynamics at step 0, to be advanced step by step."""
        return ModalRun(self.modal, self._form, self.hyperparameters)

    @property
    def knows_all_times(self) -> bool:
        """Whether every time up to infinity has a closed form on all modes."""
        complete = isinstance(self.modal.solver, CompleteModes)
        return self.hyperparameters.constant and complete and self.has_closed_form(1) and not self.unstable

    @property
    def last_time(self) -> float | None:
        """The last time that can be computed at bearable cost.

        It may be infinite; None means that there is no limit.
        """
        if self.knows_all_times:
            return math.inf
        steps = self.hyperparameters.steps
        return None if self.hyperparameters.constant or steps == math.inf else steps

    def time_scales(self) -> tuple[float, float]:
        """Steps in which the fastest and the slowest mode decay by a factor e.

        Modes below rounding do not count.

        The slowest takes 0 steps where nothing moves.
        """
        rate, modes = self._form.rate, self.modal.solver.modes
        largest = max(m.eigenvalues[-1].item() for m in modes)
        cutoff = max(m.cutoff(self._form.dtype) for m in modes)
        moving = [m.eigenvalues[m.eigenvalues > cutoff] for m in modes]
        smallest = min((values.min().item() for values in moving if len(values)), default=math.inf)
        if rate == 0 or largest <= 0:
            return 1.0, 0.0
        return 1 / (rate * (largest + self._form.ridge)), 1 / (rate * (smallest + self._form.ridge))

    def prepare(self, horizon: float) -> None:
        """Refines the modes for times up to a number of steps.

        Without a closed form it does so for gradient flow over the same time.
        """
        t = None if horizon == math.inf else math.floor(horizon)
        settings, rate, solver = self.hyperparameters.template, self.hyperparameters.lr, self.modal.solver
        limited = isinstance(rate, float) and rate < self.max_learning_rate
        if isinstance(solver, CompleteModes) or (is_infinite(t) and not limited):
            return
        if self.has_closed_form(t):
            self._solve(t)
            return
        steps = int(min(_whole(t), self.hyperparameters.steps))
        rates = sum(self.hyperparameters.settings(step).lr for step in range(steps))
        time = rates * self.modal.loss_factor * settings.gain / max(1 - settings.momentum, 1e-3)
        flow = replace(self._form, dynamics="gradient_flow", rate=1.0, ridge=0.0, limits=(), norms=())
        for index in range(len(solver.modes)):
            solver.refine(partial(lambda own, modes: flow.solve(modes[own : own + 1], time), index))

    def has_closed_form(self, t: float | None) -> bool:
        """Whether the state at this time takes no recurrence."""
        if is_infinite(t):
            return True
        template = self.hyperparameters.template
        plain = template.momentum == 0 and not self.modal.terms
        return self.hyperparameters.constant and (plain or self.dynamics == "gradient_flow")

    def require_time(self, t: float | None) -> None:
        """Raises a ValueError where there is no such time."""
        if t is not None:
            require_number("t", t, "a number of optimizer steps or None")
        if t is not None and not t >= 0:
            raise ValueError(f"Expected argument `t` to be at least 0 optimizer steps but got {t}.")
        if not is_infinite(t):
            return
        rate, template = self.hyperparameters.lr, self.hyperparameters.template
        if not isinstance(rate, float):
            raise ValueError(
                "Expected a finite `t` with a learning rate that changes: only a constant one has a limit."
            )
        if rate > 0 and (rate >= self.max_learning_rate or template.gain == 0):
            raise ValueError(
                f"Expected a stable learning rate for t = infinity but {rate:.4g} is not below the maximum "
                f"{self.max_learning_rate:.4g}: the linearized network has no limit."
            )

    def _run_to(self, t: int) -> ModalRun:
        if self._run is None or self._run.steps > t:
            self._run = self.follow()
        while self._run.steps < t:
            self._run.step_with(self.hyperparameters.settings(self._run.steps))
        return self._run

    def _solve(self, t: float | None) -> Solved[Filters]:
        return self.modal.solver.refine(lambda modes: self._form.solve(modes, t))


def _whole(t: float | None) -> int:
    if t is None or t != int(t):
        raise ValueError(f"Expected argument `t` to be a whole number of optimizer steps, at least 0, but got {t}.")
    return int(t)
