"""Reads the loss, data and optimizer of a run when it is linearized."""

from collections.abc import Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_ntk.callback import trainer as view
from lightning_ntk.callback.differences import run_differences
from lightning_ntk.callback.progress_bars import shows_progress
from lightning_ntk.callback.status import warn
from lightning_ntk.callback.training_step import ShadowStep
from lightning_ntk.comparison.functions import OutputComparison
from lightning_ntk.comparison.optimizer import ObservedOptimizer
from lightning_ntk.data.reference import Data, NoFixedOrderError, Reference, Unpack
from lightning_ntk.linearization.batch_loss import PairLoss
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.pair_of_step import NoPairError, Pair, pair_of_step
from lightning_ntk.linearization.parameters import trainable_parameters
from lightning_ntk.linearization.step import StepLinearization
from lightning_ntk.training.problem import JacobianStorage, LinearizedProblem
from lightning_ntk.utilities.distributed import Processes
from lightning_ntk.utilities.preserved_objects import reached_iterator

if TYPE_CHECKING:
    from lightning_ntk.callback.monitor import LinearizationMonitor

# All comparisons of functions together take at most this share of the samples that training sees, but no fewer than these.
_COMPARED_SHARE = 0.5
_LEAST_SAMPLES = 256
_COUNTED_STEPS = 20000  # at most, to know how often a run is measured


class CapturedRun:
    """What a comparison needs to know about a run when it is linearized.

    Args:
        monitor: The monitor, with its arguments.
        trainer: The Trainer, in the middle of a fit.
        module: The module that it trains.
        processes: The processes of the run, which capture together.
        state: The state of an earlier part of the run, to continue from.
        batch: The batch that the run is about to train on. A capture of the training step needs it.

    Attributes:
        shadow: The training step as the linearized network takes it; None where the user has given the loss.
        step: Its linearization.
        pair: The loss as a function of outputs and targets; None if there is none.
        no_pair: The reason why there is none, as a phrase.
        eval_pair: The same for the network in eval mode, even if the run has no other.
        data: The reference data; None where there are none.
        no_order: The reason why there are none, as a phrase.
        observed: The optimizer of the run.
        horizon: The number of optimizer steps to come; None if open.
        batches: The batches to come.
        momentum: The momentum buffers of SGD at the capture.
        samples: The number of samples on which the twin compares functions; None for all.
        averages: Whether the run averages the losses of parts of a batch.
        differing: Maps dynamics and the size of the data to phrases for what the run does and they do not describe.

    Raises:
        ValueError: If data, network, loss or optimizer cannot be used.
    """

    def __init__(
        self,
        monitor: "LinearizationMonitor",
        trainer: Trainer,
        module: LightningModule,
        processes: Processes,
        state: Mapping[str, Any] | None,
        batch: Any,
    ) -> None:
        self.monitor, self.trainer, self.module = monitor, trainer, module
        self.processes, self.batch = processes, batch
        self.optimizer = optimizer = view.single_optimizer(trainer)
        self.parameters = trainable_parameters(module)
        self.saved = saved = None if state is None else state["comparison"]
        remaining = view.horizon(trainer)
        self.horizon = None if remaining is None else remaining - monitor.capture_at
        self.momentum = view.momentum_buffers(module, optimizer)
        self.samples = self._affordable_samples(trainer)
        self.averages = trainer.accumulate_grad_batches * processes.size > 1
        if state is not None:
            self.horizon, self.momentum, self.samples = state["horizon"], state["momentum"], state["samples"]
            if type(optimizer).__name__ != state["optimizer"]:
                raise ValueError(
                    f"Expected the optimizer with which the run was saved, {state['optimizer']}, but got "
                    f"{type(optimizer).__name__}: its state means something else. Configure the same, or start a new run."
                )
        self.batches = None if self.horizon is None else self.horizon * trainer.accumulate_grad_batches
        self.observed = ObservedOptimizer(
            optimizer, self.parameters, late=monitor.capture_at > 0,
            settings=None if saved is None else saved["settings"],
        )  # fmt: skip
        self.transfer = partial(view.training_batch, trainer, module)
        self.progress = monitor.progress and shows_progress(trainer)
        self.differing = cache(partial(run_differences, trainer, module, optimizer))
        self.shadow: ShadowStep | None = None
        self.step: StepLinearization | None = None
        self.pair: Pair | None = Pair(monitor.loss or nn.MSELoss(), monitor.predict)
        self.no_pair = ""
        self.eval_pair: Pair | None = self.pair
        if not monitor.is_given_loss:
            self.pair, self.no_pair = self._look_at_step(trainer, batch)
        self.data, self.no_order = self._reference_data(trainer)

    @property
    def size(self) -> int | None:
        """The number of samples of the reference data."""
        return None if self.data is None else len(Reference(self.data))

    def on(self, data: Data, *, keep_size: bool = False, unpack: Unpack | None = None) -> Reference:
        """Wraps data so that they are read as training reads them.

        With `keep_size`, batches have the size that they have in training.
        """
        size = getattr(data, "batch_size", None) if keep_size else None
        return Reference(
            data, batch_size=size or self.monitor.batch_size, unpack=unpack or self.monitor.unpacked,
            transfer=self.transfer,
        )  # fmt: skip

    def problem(
        self,
        data: Data,
        pair: Pair | None = None,
        *,
        jacobian: JacobianStorage = "streamed",
        module: nn.Module | None = None,
        batch_size: int | None = None,
    ) -> LinearizedProblem:
        """The network at w0 on a data set, with its loss."""
        monitor, pair = self.monitor, pair or self.pair
        assert pair is not None
        return LinearizedProblem(
            module or self.module, data, loss=pair.loss, predict=pair.predict, jacobian=jacobian,
            batch_size=batch_size or monitor.batch_size, dtype=dtype_of(monitor), processes=self.processes,
            unpack=pair.unpack or monitor.unpacked, transfer=self.transfer,
            device=None if monitor.device is None else torch.device(monitor.device),
            lr_scales=self.observed.lr_scales, progress=self.progress,
            start=None if self.saved is None else self.saved["start"],
        )  # fmt: skip

    def linearization(self) -> Linearization:
        """The network at w0."""
        linearization = Linearization(
            self.module, predict=None if self.pair is None else self.pair.predict, dtype=dtype_of(self.monitor)
        )
        if self.saved is not None:
            linearization.load_state_dict(self.saved["start"])
        linearization.share_buffers(self.processes)
        return linearization

    def pairs(self, linearization: Linearization) -> PairLoss:
        """The loss of outputs and targets, with the network at w0."""
        assert self.pair is not None
        return PairLoss(linearization, self.pair.loss, unpack=self.monitor.unpacked)

    def outputs(self, problem: LinearizedProblem | None) -> OutputComparison | None:
        """The comparison of outputs on a data set."""
        return None if problem is None else OutputComparison(problem, taylor=self.monitor.taylor)

    def _affordable_samples(self, trainer: Trainer) -> int | None:
        """The number of samples on which the twin compares functions.

        A short run takes fewer than `reference_samples`.
        """
        most, size = self.monitor.reference_samples, getattr(trainer.train_dataloader, "batch_size", None)
        if most is None or self.horizon is None or size is None:
            return most
        steps = min(int(self.horizon), _COUNTED_STEPS)
        try:
            planned = sum(self.monitor.should_measure(step) for step in range(steps + 1)) or 1
        except Exception:  # a schedule of one's own, which may not foresee anything; it is reported when a step comes
            planned = steps
        planned = -int(self.processes.minimum(-planned))
        seen = steps * size * trainer.accumulate_grad_batches
        return min(most, max(_LEAST_SAMPLES, int(_COMPARED_SHARE * seen / planned)))

    def _look_at_step(self, trainer: Trainer, batch: Any) -> tuple[Pair | None, str]:
        """Finds the training step's loss of outputs and targets.

        If there is none, it finds the reason.
        """
        monitor = self.monitor
        self.shadow = ShadowStep(trainer, self.module, dtype=dtype_of(monitor))
        self.step = StepLinearization(
            self.shadow.module, self.shadow, batch_dtype=self.shadow.batch_dtype, network=monitor.network
        )
        if self.saved is not None:
            self.step.load_state_dict(self.saved["start"])
        if monitor.network:
            self.eval_pair = None
            self.step.first_outputs(batch)
            return None, "the user has named the network"
        try:
            self.eval_pair = pair_of_step(self.step, batch)
            return self.eval_pair, ""
        except NoPairError as error:
            self.eval_pair = error.pair
            # Who chooses dynamics on a kernel has a network in eval mode, and learns from the gradients how well it fits.
            chosen = monitor.dynamics not in ("auto", "twin")
            return error.pair if chosen else None, str(error)

    def _reference_data(self, trainer: Trainer) -> tuple[Data | None, str]:
        """The reference data, or why there are none."""
        monitor = self.monitor
        if monitor.reference is None:
            return None, "there is no reference set"
        try:
            with self.processes.agreement():
                data: Data = view.training_data(trainer) if monitor.reference == "train" else monitor.reference
                self.processes.require_same(str(len(Reference(data))), "reference data")
                iterator = reached_iterator(*view.data_parts(data), skip=view.NOT_DATA)
                if iterator is not None:
                    raise NoFixedOrderError(
                        f"Expected data that can be read again but a {type(iterator).__name__} is a part of them, which reading "
                        "would advance for the run, too. Give a reference without it."
                    )
                return data, ""
        except NoFixedOrderError as error:
            if monitor.dynamics not in ("auto", "twin"):
                raise
            warn(f"LinearizationMonitor compares weights only, and no functions on the training set. {error}")
            return None, f"the training data has no fixed order. {error}"


def dtype_of(monitor: "LinearizationMonitor") -> torch.dtype | None:
    """The type of the passes that a monitor asks for."""
    return None if monitor.dtype is None else getattr(torch, monitor.dtype)
