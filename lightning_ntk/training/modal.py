"""Linearized training on the modes: the state at any time, by a closed form where there is one, else by the recurrence."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from lightning_ntk.dynamics.closed_form import ClosedForm, Dynamics, is_infinite
from lightning_ntk.dynamics.filters import Filters
from lightning_ntk.dynamics.sgd import Hyperparameters
from lightning_ntk.dynamics.stability import max_learning_rate, ridge
from lightning_ntk.linearization.rounding import Rounding
from lightning_ntk.solvers.base import ErrorBound, ModalSolver, Solved
from lightning_ntk.solvers.eigh import CompleteModes
from lightning_ntk.training.carried import CarriedVector
from lightning_ntk.training.readout import LinearizedState, Readout
from lightning_ntk.training.run import Run


class ModalTraining:
    """What `LinearizedTraining` knows in function space.

    Args:
        solver: The modes of the residual and of the carried vectors.
        dynamics: "gradient_descent" or "gradient_flow".
        hyperparameters: Those of the optimizer.
        factor: c, the measured factor of the loss.
        carried: The vectors that the weights carry along.
        readout: Turns filters into states.
        dtype: Type of the passes.
        rounding: Their errors.

    Raises:
        ValueError: If gradient flow cannot have these hyperparameters.
    """

    def __init__(
        self,
        solver: ModalSolver,
        dynamics: Dynamics,
        hyperparameters: Hyperparameters,
        factor: float,
        carried: Sequence[CarriedVector],
        readout: Readout,
        dtype: torch.dtype,
        rounding: Rounding,
    ) -> None:
        self.solver = solver
        self.dynamics = dynamics
        self.hyperparameters = hyperparameters
        self._factor = factor
        self._carried = carried
        self._readout = readout
        self._form = ClosedForm(
            dynamics,
            hyperparameters.lr * factor if isinstance(hyperparameters.lr, float) else 0.0,
            dtype,
            ridge=ridge(hyperparameters.template, factor),
            limits=tuple(c.limit for c in carried),
            norms=tuple(c.norm for c in carried),
            rounding=rounding,
        )
        self._run: Run | None = None

    @property
    def max_learning_rate(self) -> float:
        """The largest stable learning rate, infinite for gradient flow."""
        if self.dynamics == "gradient_flow":
            return math.inf
        return max_learning_rate(self.hyperparameters.template, self._factor * max(self.solver.largest_eigenvalue, 0.0))

    @property
    def unstable(self) -> bool:
        """Whether a constant learning rate is above the largest stable one."""
        return isinstance(self.hyperparameters.lr, float) and self.hyperparameters.lr > self.max_learning_rate

    def state(self, t: float | None) -> LinearizedState:
        """The linearized network after t steps; the recurrence goes on from the last time it was asked for."""
        self.require_time(t)
        if not self.has_closed_form(t):
            return self._run_to(_whole(t)).state
        filters = self._solve(t).filters
        return self._readout.state(self.solver.modes, filters)

    def error_bound(self, t: float | None) -> ErrorBound:
        """The error of the weights after t steps that the solver makes."""
        self.require_time(t)
        return self._solve(t).bound if self.has_closed_form(t) else self._run_to(_whole(t)).error_bound

    def follow(self) -> Run:
        """These dynamics from step 0 on."""
        return Run(
            self.solver, self._form, self._factor, [c.start for c in self._carried], self._readout.state,
            decays=self.hyperparameters.decays_to_zero or self.hyperparameters.decays_to_initial,
        )  # fmt: skip

    @property
    def last_time(self) -> float | None:
        """The last time that can be asked for at bearable cost, infinity included, or None if nothing sets one."""
        constant, complete = self.hyperparameters.constant, isinstance(self.solver, CompleteModes)
        if constant and complete and self.has_closed_form(1) and not self.unstable:
            return math.inf
        return None if constant or self.hyperparameters.steps == math.inf else self.hyperparameters.steps

    def time_scales(self, dtype: torch.dtype) -> tuple[float, float]:
        """Steps in which the fastest and the slowest mode above the rounding of `dtype` lose a factor e of their residual.

        The slowest takes 0 where nothing moves.
        """
        rate = self._form.rate
        largest = max(m.eigenvalues[-1].item() for m in self.solver.modes)
        cutoff = max(m.cutoff(dtype) for m in self.solver.modes)
        moving = [m.eigenvalues[m.eigenvalues > cutoff] for m in self.solver.modes]
        smallest = min((values.min().item() for values in moving if len(values)), default=math.inf)
        if rate == 0 or largest <= 0:
            return 1.0, 0.0
        return 1 / (rate * (largest + self._form.ridge)), 1 / (rate * (smallest + self._form.ridge))

    def prepare(self, horizon: float) -> None:
        """Refines for times up to a number of steps; without a closed form, for gradient flow over the same time."""
        t = None if horizon == math.inf else math.floor(horizon)
        settings, rate = self.hyperparameters.template, self.hyperparameters.lr
        limited = isinstance(rate, float) and rate < self.max_learning_rate
        if isinstance(self.solver, CompleteModes) or (is_infinite(t) and not limited):
            return
        if self.has_closed_form(t):
            self._solve(t)
            return
        steps = int(min(_whole(t), self.hyperparameters.steps))
        rates = sum(self.hyperparameters.settings(step).lr for step in range(steps))
        time = rates * self._factor * settings.gain / max(1 - settings.momentum, 1e-3)
        flow = replace(self._form, dynamics="gradient_flow", rate=1.0, ridge=0.0, limits=(), norms=())
        for index in range(len(self.solver.modes)):
            self.solver.refine(partial(lambda own, modes: flow.solve(modes[own : own + 1], time), index))

    def has_closed_form(self, t: float | None) -> bool:
        """Whether the state at this time takes no recurrence."""
        if is_infinite(t):
            return True
        template = self.hyperparameters.template
        plain = template.momentum == 0 and not self._carried and not template.maximize
        return self.hyperparameters.constant and (plain or self.dynamics == "gradient_flow")

    def require_time(self, t: float | None) -> None:
        """Raises a ValueError where there is no such time."""
        if t is not None and not t >= 0:
            raise ValueError(f"Expected argument `t` to be at least 0 optimizer steps but got {t}.")
        if not is_infinite(t):
            return
        rate = self.hyperparameters.lr
        if not isinstance(rate, float):
            raise ValueError(
                "Expected a finite `t` with a learning rate that changes: only a constant one has a limit."
            )
        template = self.hyperparameters.template
        if rate > 0 and (rate >= self.max_learning_rate or template.maximize or template.gain == 0):
            raise ValueError(
                f"Expected a stable learning rate for t = infinity but {rate:.4g} is not below the maximum "
                f"{self.max_learning_rate:.4g}: the linearized network has no limit."
            )

    def _run_to(self, t: int) -> Run:
        if self._run is None or self._run.steps > t:
            self._run = self.follow()
        while self._run.steps < t:
            self._run.step(self.hyperparameters.settings(self._run.steps))
        return self._run

    def _solve(self, t: float | None) -> Solved[Filters]:
        return self.solver.refine(lambda modes: self._form.solve(modes, t))


def _whole(t: float | None) -> int:
    if t is None or t != int(t):
        raise ValueError(f"Expected argument `t` to be a whole number of optimizer steps, at least 0, but got {t}.")
    return int(t)
