"""From a run that is about to take a step to its comparison: the problem, the dynamics and the probe are built here."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_ntk.callback import trainer as view
from lightning_ntk.callback.differences import forward_differences, run_differences
from lightning_ntk.callback.progress_bars import shows_progress
from lightning_ntk.comparison.choice import choose_dynamics
from lightning_ntk.comparison.first_gradient import FirstGradient
from lightning_ntk.comparison.optimizer import ObservedOptimizer
from lightning_ntk.comparison.run_comparison import RunComparison
from lightning_ntk.data.reference import Data, NoFixedOrderError
from lightning_ntk.kernel import KernelProbe
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.parameters import trainable_parameters
from lightning_ntk.training.base import OnlineTraining
from lightning_ntk.training.linearized_training import LinearizedTraining
from lightning_ntk.training.problem import LinearizedProblem
from lightning_ntk.training.replay import Replay
from lightning_ntk.training.twin import Twin
from lightning_ntk.utilities.contexts import preserved_rng
from lightning_ntk.utilities.distributed import Processes

if TYPE_CHECKING:
    from lightning_ntk.callback.monitor import LinearizationMonitor


class RunCapture:
    """A run at the weights where it is linearized.

    Args:
        monitor: What is asked for.
        trainer: The Trainer, in the middle of a fit.
        module: The module that it trains.
        processes: The processes of the run, which capture together.
        state: What `state_dict` returned in an earlier part of the run, to go on from.

    Attributes:
        comparison: The comparison of this run.
        reason: Why it follows these dynamics, a sentence; empty if the user has chosen them.
        differences: Phrases on what the run does and the linearized network does not.

    Raises:
        ValueError: If data, network, loss or optimizer cannot be used.
        MemoryError: If the kernel does not fit.
    """

    def __init__(
        self,
        monitor: "LinearizationMonitor",
        trainer: Trainer,
        module: LightningModule,
        processes: Processes,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._monitor, self._processes = monitor, processes
        self._optimizer = optimizer = view.single_optimizer(trainer)
        self._parameters = trainable_parameters(module)
        self._loss = monitor.loss or nn.MSELoss()
        saved = None if state is None else state["comparison"]
        remaining = view.horizon(trainer)
        self._horizon = None if remaining is None else remaining - monitor.capture_at
        self._momentum = view.momentum_buffers(module, optimizer)
        if state is not None:
            self._horizon, self._momentum = state["horizon"], state["momentum"]
        self._observed = ObservedOptimizer(
            optimizer, self._parameters, late=monitor.capture_at > 0,
            settings=None if saved is None else saved["settings"],
        )  # fmt: skip
        differing = cache(partial(run_differences, trainer, module, optimizer))

        self.problem = partial(
            LinearizedProblem, module, loss=monitor.loss, predict=monitor.predict, jacobian=monitor.jacobian,
            batch_size=monitor.batch_size, dtype=_dtype(monitor), processes=processes,
            unpack=lambda batch: monitor.unpacked(view.training_batch(trainer, module, batch)),
            device=None if monitor.device is None else torch.device(monitor.device),
            lr_scales=self._observed.lr_scales, start=None if saved is None else saved["start"],
            progress=monitor.progress and shows_progress(trainer),
        )  # fmt: skip
        reference, no_kernel = self._reference(trainer)
        size = None if reference is None else len(reference.reference)
        if reference is None:
            linearization = Linearization(module, predict=monitor.predict, dtype=_dtype(monitor))
            if saved is not None:
                linearization.load_state_dict(saved["start"])
            linearization.share_buffers(processes)
        else:
            linearization = reference.linearization
        self._linearization = linearization
        evaluation = None
        if monitor.evaluation is not None:
            evaluation = self.problem(monitor.evaluation) if reference is None else reference.on(monitor.evaluation)

        self.reason = ""
        dynamics: str = monitor.dynamics if saved is None else saved["dynamics"]
        if dynamics == "auto":
            dynamics, self.reason = self._choose(reference, lambda name: differing(name, size), no_kernel)
        online, training = self._online(dynamics, reference)
        self.comparison = RunComparison(
            linearization, online, reference=reference, evaluation=evaluation, probe=self._probe(reference),
            optimizer=self._observed, training=training,
            first_gradient=FirstGradient(linearization, self._loss, processes=processes),
            per_parameter=monitor.per_parameter, taylor=monitor.taylor, closest=monitor.closest, modes=monitor.modes,
        )  # fmt: skip
        if saved is not None:
            self.comparison.load_state_dict(saved)
        self.differences = [*differing(dynamics, size), *forward_differences(trainer, module)]

    def twin(self) -> Twin:
        """The linearized twin of this run, before the first step."""
        return Twin(self._linearization, self._optimizer, self._parameters, self._loss, processes=self._processes)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors, numbers, strings, dicts and lists."""
        return {
            "comparison": self.comparison.state_dict(),
            "horizon": self._horizon,
            "momentum": self._momentum,
        }

    def _reference(self, trainer: Trainer) -> tuple[LinearizedProblem | None, str | None]:
        """The problem on the reference set, or why there is none."""
        monitor = self._monitor
        if monitor.reference is None:
            return None, "there is no reference set"
        try:
            with self._processes.agreement():
                data: Data = view.training_data(trainer) if monitor.reference == "train" else monitor.reference
                return self.problem(data), None
        except NoFixedOrderError as error:
            if monitor.dynamics not in ("auto", "twin"):
                raise
            return None, f"the training data has no fixed order. {error}"

    def _choose(
        self, reference: LinearizedProblem | None, differences: Callable[[str], Sequence[str]], no_kernel: str | None
    ) -> tuple[str, str]:
        rows = 0 if reference is None else reference.predictions.numel()
        return choose_dynamics(
            differences,
            no_kernel=no_kernel,
            not_squared=reference is not None and reference.objective.factor is None,
            kernel_bytes=float(rows) ** 2 * self._linearization.dtype.itemsize,
            free=self._processes.free_memory("cpu", self._monitor.device or self._linearization.device),
        )

    def _online(
        self, dynamics: str, reference: LinearizedProblem | None
    ) -> tuple[OnlineTraining, LinearizedTraining | None]:
        if dynamics == "twin":
            return self.twin(), None
        if reference is None:
            raise ValueError(
                f'Expected a reference set for dynamics="{dynamics}" but got None: only "twin" goes without.'
            )
        observed = self._observed.hyperparameters
        momentum = self._momentum if observed.template.momentum else None
        if dynamics == "replay":
            return Replay(reference, observed, momentum_buffers=momentum), None
        if self._monitor.closest and not reference.freezes_only:
            raise ValueError(
                "Expected one learning rate with `closest=True` but the parameter groups have several. Use closest=False."
            )
        options: dict[str, Any] = {"lr": observed.lr, "dynamics": dynamics}
        if dynamics == "gradient_descent":
            settings = observed.template._asdict()
            settings.pop("decoupled_weight_decay")
            options |= settings | {"lr": observed.lr, "momentum_buffers": momentum}
        training = LinearizedTraining(reference, solver=self._monitor.solver, horizon=self._horizon, **options)
        return training.follow(), training

    @preserved_rng()
    def _probe(self, reference: LinearizedProblem | None) -> KernelProbe | None:
        samples = self._monitor.kernel_probe
        if not samples:
            return None
        if reference is None:
            raise ValueError(
                "Expected a reference set, to take samples from, with argument `kernel_probe` but there is none: give "
                "`reference` a data set with a fixed order, or leave out `kernel_probe`."
            )
        return KernelProbe(self._linearization, reference.reference, samples=samples)


def _dtype(monitor: "LinearizationMonitor") -> torch.dtype | None:
    return None if monitor.dtype is None else getattr(torch, monitor.dtype)
