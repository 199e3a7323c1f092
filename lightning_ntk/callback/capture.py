"""From a run that is about to take a step to its comparison: the loss, the dynamics and the probe are built here."""

import warnings
from collections.abc import Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_ntk.callback import trainer as view
from lightning_ntk.callback.differences import forward_differences, run_differences
from lightning_ntk.callback.progress_bars import shows_progress
from lightning_ntk.callback.status import warn
from lightning_ntk.callback.training_step import ShadowStep
from lightning_ntk.comparison.choice import choose_dynamics
from lightning_ntk.comparison.expected_gradient import ExpectedGradient
from lightning_ntk.comparison.full_batch import FullBatchCheck
from lightning_ntk.comparison.functions import FunctionComparison, OutputComparison
from lightning_ntk.comparison.optimizer import ObservedOptimizer
from lightning_ntk.comparison.regimes import RegimePanel
from lightning_ntk.comparison.regression import RegressionComparison
from lightning_ntk.comparison.run_comparison import RunComparison
from lightning_ntk.comparison.step_functions import StepComparison
from lightning_ntk.comparison.stored_rows import StoredSizes, require_worth
from lightning_ntk.data.reference import Data, NoFixedOrderError, Reference, Unpack, evenly_spaced
from lightning_ntk.kernel import KernelProbe
from lightning_ntk.linearization.batch_loss import BatchLoss, PairLoss
from lightning_ntk.linearization.labels_of_step import labeled_pair
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.objective import Objective
from lightning_ntk.linearization.pair_of_step import NoPairError, Pair, pair_of_step, same_gradient
from lightning_ntk.linearization.parameters import trainable_parameters
from lightning_ntk.linearization.step import StepLinearization
from lightning_ntk.training.base import OnlineTraining
from lightning_ntk.training.linearized_training import LinearizedTraining
from lightning_ntk.training.problem import JacobianStorage, LinearizedProblem
from lightning_ntk.training.replay import Replay
from lightning_ntk.training.stored_loss import StoredLoss
from lightning_ntk.training.twin import Twin
from lightning_ntk.utilities.contexts import preserved_rng
from lightning_ntk.utilities.distributed import Processes
from lightning_ntk.utilities.preserved_objects import preserved_objects, reached_iterator

if TYPE_CHECKING:
    from lightning_ntk.callback.monitor import LinearizationMonitor


# All comparisons of functions together take at most this share of the samples that training sees, but no fewer than these.
_COMPARED_SHARE = 0.5
_LEAST_SAMPLES = 256
_COUNTED_STEPS = 20000  # at most, to know how often a run is measured
# Rows of the kernels of kernel regression, at most: all modes of so many take 40 m^2 bytes, 640 MiB.
_REGRESSION_ROWS = 4096


class RunCapture:
    """A run at the weights where it is linearized.

    Args:
        monitor: What is asked for.
        trainer: The Trainer, in the middle of a fit.
        module: The module that it trains.
        processes: The processes of the run, which capture together.
        state: What `state_dict` returned in an earlier part of the run, to go on from.
        batch: The batch that the run is about to train on. It is needed where the training step is the loss.

    Attributes:
        comparison: The comparison of this run.
        reason: Why it follows these dynamics, and how a twin gets its products with the Jacobian; empty if the user has chosen
            both.
        differences: Phrases on what the run does and the linearized network does not.
        judge: The gradient of the training step in the precision of the linearized passes, where the run computes in a lower one
            and the loss was given: it tells a wrong loss from rounding.
        shadow: The training step as the linearized network takes it; None where the user has given the loss.
        step: Its linearization.
        stored: The loss along stored rows of the Jacobian; None where products are streamed.

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
        batch: Any = None,
    ) -> None:
        self._monitor, self._processes, self._module = monitor, processes, module
        self._optimizer = optimizer = view.single_optimizer(trainer)
        self._parameters = trainable_parameters(module)
        self._saved = saved = None if state is None else state["comparison"]
        remaining = view.horizon(trainer)
        self._horizon = None if remaining is None else remaining - monitor.capture_at
        self._momentum = view.momentum_buffers(module, optimizer)
        self._samples = self._affordable_samples(trainer)
        self._averages = trainer.accumulate_grad_batches * processes.size > 1
        if state is not None:
            self._horizon, self._momentum, self._samples = state["horizon"], state["momentum"], state["samples"]
            if type(optimizer).__name__ != state["optimizer"]:
                raise ValueError(
                    f"Expected the optimizer with which the run was saved, {state['optimizer']}, but got "
                    f"{type(optimizer).__name__}: its state means something else. Configure the same, or start a new run."
                )
        self._observed = ObservedOptimizer(
            optimizer, self._parameters, late=monitor.capture_at > 0,
            settings=None if saved is None else saved["settings"],
        )  # fmt: skip
        self._transfer = partial(view.training_batch, trainer, module)
        self._progress = monitor.progress and shows_progress(trainer)
        self._differing = cache(partial(run_differences, trainer, module, optimizer))

        self.shadow: ShadowStep | None = None
        self.stored: StoredLoss | None = None
        self._batch = batch
        self._batches = None if self._horizon is None else self._horizon * trainer.accumulate_grad_batches
        self.step: StepLinearization | None = None
        self._pair: Pair | None = Pair(monitor.loss or nn.MSELoss(), monitor.predict)
        self._no_pair = ""
        self._eval_pair: Pair | None = self._pair  # of the network in eval mode, whether or not the run has another one
        if not monitor.is_given_loss:
            self._pair, self._no_pair = self._look_at_step(trainer, batch)
        self._data, self._no_order = self._reference_data(trainer)

        self.reason = ""
        dynamics: str = monitor.dynamics if saved is None else saved["dynamics"]
        if dynamics == "auto":
            dynamics, self.reason = self._choose()
        try:
            built = self._on_kernel(dynamics) if dynamics != "twin" else self._beside_run()
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            if monitor.dynamics != "auto" or dynamics == "twin":
                raise
            dynamics, self.reason = "twin", f"Linearized twin in lockstep, because a kernel cannot be used: {error}"
            built = self._beside_run()
        self._batch = None
        loss, online, training, reference, evaluation = built
        self.judge = self._judge(trainer)
        forward = forward_differences(trainer, module, in_eval_mode=_through_passes(loss) is not self.step)
        self.differences = [*self._differing(dynamics, self._size), *forward]
        self.is_in_other_mode = any(phrase.endswith("eval mode") for phrase in forward)
        # Where it is known that the run is no gradient descent, its batches are not looked at.
        looks = training is not None and not self._differing(dynamics, self._size)
        self.comparison = RunComparison(
            loss, online, reference=reference, evaluation=evaluation, probe=self._probe(loss),
            panel=self._panel(loss), optimizer=self._observed,
            training=training, expected_gradient=ExpectedGradient(loss, processes=processes),
            full_batch=FullBatchCheck(training.problem) if training is not None and looks else None,
            regression=self._regression(),
            per_parameter=monitor.per_parameter, closest=monitor.closest, modes=monitor.modes,
        )  # fmt: skip
        if saved is not None:
            self.comparison.load_state_dict(saved)

    @property
    def accumulates_before(self) -> bool:
        """Whether batches are to be told of before the run trains on them, with the random state that it will have."""
        return isinstance(self.comparison.online, Twin) and self.follows_step

    @property
    def follows_step(self) -> bool:
        """Whether the loss is the training step itself, whose passes go through a copy of the module."""
        return self.step is not None and _through_passes(self.comparison.loss) is self.step

    def twin(self) -> Twin:
        """The linearized twin of this run, before the first step."""
        loss: BatchLoss = self.step or self._pairs(self._linearization())
        return Twin(loss, self._optimizer, self._parameters, processes=self._processes)

    def loss_of_run(self, trainer: Trainer, batch: Any) -> str:
        """A sentence on the loss function that the training step computes; empty where it is more than one."""
        shadow = ShadowStep(trainer, self._module, dtype=_dtype(self._monitor))
        step = StepLinearization(shadow.module, shadow, batch_dtype=shadow.batch_dtype)
        try:
            return f"The training step computes {pair_of_step(step, batch).loss!r}. "
        except NoPairError as error:
            return "" if error.pair is None else f"The training step computes {error.pair.loss!r} in train mode. "

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors, numbers, strings, dicts and lists."""
        return {
            "comparison": self.comparison.state_dict(),
            "horizon": self._horizon,
            "momentum": self._momentum,
            "samples": self._samples,
            "optimizer": type(self._observed.optimizer).__name__,
        }

    def _judge(self, trainer: Trainer) -> ExpectedGradient | None:
        eps = torch.finfo(view.precision(trainer, self._module)).eps
        if self.step is not None or eps <= torch.finfo(torch.float32).eps or not self._module.automatic_optimization:
            return None
        self.shadow = ShadowStep(trainer, self._module, dtype=_dtype(self._monitor))
        step = StepLinearization(self.shadow.module, self.shadow, batch_dtype=self.shadow.batch_dtype)
        return ExpectedGradient(step, processes=self._processes)

    def _affordable_samples(self, trainer: Trainer) -> int | None:
        """The number of samples on which the twin compares functions: fewer than `reference_samples` in a short run."""
        most, size = self._monitor.reference_samples, getattr(trainer.train_dataloader, "batch_size", None)
        if most is None or self._horizon is None or size is None:
            return most
        steps = min(int(self._horizon), _COUNTED_STEPS)
        try:
            planned = sum(self._monitor.should_measure(step) for step in range(steps + 1)) or 1
        except Exception:  # a schedule of one's own, which may not foresee anything; it is reported when a step comes
            planned = steps
        planned = -int(self._processes.minimum(-planned))
        seen = steps * size * trainer.accumulate_grad_batches
        return min(most, max(_LEAST_SAMPLES, int(_COMPARED_SHARE * seen / planned)))

    def _look_at_step(self, trainer: Trainer, batch: Any) -> tuple[Pair | None, str]:
        """The loss that the training step computes from outputs and targets, or why it is none of these."""
        monitor = self._monitor
        self.shadow = ShadowStep(trainer, self._module, dtype=_dtype(monitor))
        self.step = StepLinearization(
            self.shadow.module, self.shadow, batch_dtype=self.shadow.batch_dtype, network=monitor.network
        )
        if self._saved is not None:
            self.step.load_state_dict(self._saved["start"])
        if monitor.network:
            self._eval_pair = None
            self.step.first_outputs(batch)
            return None, "the user has named the network"
        try:
            self._eval_pair = pair_of_step(self.step, batch)
            return self._eval_pair, ""
        except NoPairError as error:
            self._eval_pair = error.pair
            # Who chooses dynamics on a kernel has a network in eval mode, and learns from the gradients how well it fits.
            chosen = monitor.dynamics not in ("auto", "twin")
            return error.pair if chosen else None, str(error)

    def _reference_data(self, trainer: Trainer) -> tuple[Data | None, str]:
        """The reference data, or why there are none."""
        monitor = self._monitor
        if monitor.reference is None:
            return None, "there is no reference set"
        try:
            with self._processes.agreement():
                data: Data = view.training_data(trainer) if monitor.reference == "train" else monitor.reference
                self._processes.require_same(str(len(Reference(data))), "reference data")
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

    @property
    def _size(self) -> int | None:
        return None if self._data is None else len(Reference(self._data))

    def _choose(self) -> tuple[str, str]:
        monitor, no_kernel = self._monitor, self._no_order
        not_squared, parts, rows, itemsize = False, False, 0, 0
        if self._data is not None and self._pair is None:
            no_kernel = self._no_pair
        elif self._data is not None and self._pair is not None:
            linearization = self._linearization()
            try:
                with preserved_rng():
                    first = self._on(self._data).read(0, monitor.batch_size)
                    outputs = linearization.predict(first.inputs)
                if first.target is None:
                    raise ValueError("the batches have no target")
                objective = Objective(self._pair.loss, outputs, first.target, flat=linearization.flat)
                not_squared = objective.factor is None
                parts = not not_squared and not objective.is_mean(outputs) and self._averages
                rows, itemsize = (self._size or 0) * outputs.shape[1], linearization.dtype.itemsize
            except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
                if monitor.is_given_loss:
                    raise
                no_kernel = str(error)
        sums = ["its loss is no mean over samples, and it averages that of parts"] if parts else []
        return choose_dynamics(
            lambda name: [*self._differing(name, self._size), *(sums if name == "gradient_descent" else [])],
            no_kernel=no_kernel or None,
            not_squared=not_squared,
            kernel_bytes=float(rows) ** 2 * itemsize,
            free=self._processes.free_memory("cpu", monitor.device or next(iter(self._parameters.values())).device),
        )

    def _on_kernel(self, dynamics: str) -> tuple[Any, ...]:
        """Loss, dynamics on the kernel, and the functions to compare."""
        monitor = self._monitor
        if self._data is None:
            raise ValueError(
                f'Expected a reference set for dynamics="{dynamics}" but got None: only "twin" goes without.'
            )
        if self._pair is None:
            raise ValueError(
                f'Expected a training step that is a loss of outputs and targets for dynamics="{dynamics}" but '
                f'{self._no_pair}. Give `loss`, and `predict` and `unpack` where needed, or use dynamics="twin".'
            )
        problem = self._problem(self._data, jacobian="stored" if monitor.jacobian == "stored" else "streamed")
        observed = self._observed.hyperparameters
        momentum = self._momentum if observed.template.momentum else None
        online: OnlineTraining
        training: LinearizedTraining | None = None
        if dynamics == "replay":
            online = Replay(problem, observed, momentum_buffers=momentum)
        else:
            if monitor.closest and not problem.freezes_only:
                raise ValueError(
                    "Expected one learning rate with `closest=True` but the parameter groups have several. Use "
                    "closest=False."
                )
            options: dict[str, Any] = {"lr": observed.lr, "dynamics": dynamics}
            if dynamics == "gradient_descent":
                settings = observed.template._asdict()
                settings.pop("decoupled_weight_decay")
                options |= settings | {"lr": observed.lr, "momentum_buffers": momentum}
            training = LinearizedTraining(problem, solver=monitor.solver, horizon=self._horizon, **options)
            online = training.follow()
        other = None if monitor.evaluation is None else problem.on(monitor.evaluation)
        return self._pairs(problem.linearization), online, training, self._outputs(problem), self._outputs(other)

    def _beside_run(self) -> tuple[Any, ...]:
        """Loss, twin, and the functions to compare, on some samples."""
        monitor, samples = self._monitor, self._samples
        data = {"reference": self._data, "evaluation": monitor.evaluation}
        some = {name: None if d is None else evenly_spaced(d, samples) for name, d in data.items()}
        functions: dict[str, FunctionComparison | None] = {}
        if self.step is not None:
            loss: BatchLoss = self.step
            for name, own in some.items():
                functions[name] = None if own is None else StepComparison(
                    self.step, self._on(own, keep_size=True), taylor=monitor.taylor, keeps_outputs=monitor.figures,
                    announce=partial(setattr, self.shadow, "batch_index"), processes=self._processes,
                )  # fmt: skip
        else:
            problem: LinearizedProblem | None = None
            for name, own in some.items():
                if own is not None:
                    problem = self._problem(own) if problem is None else problem.on(own)
                    functions[name] = self._outputs(problem)
            loss = self._pairs(self._linearization() if problem is None else problem.linearization)
        if monitor.jacobian != "streamed":
            self.stored, how = self._stored(loss)
            self.reason = f"{self.reason} {how}".lstrip()
            loss = self.stored or loss
        twin = Twin(loss, self._optimizer, self._parameters, processes=self._processes)
        return loss, twin, None, functions.get("reference"), functions.get("evaluation")

    def _stored(self, streamed: BatchLoss) -> tuple[StoredLoss | None, str]:
        """The loss along stored rows of the Jacobian, or None where they are not stored; and a sentence on it."""
        required = self._monitor.jacobian == "stored"
        try:
            with self._processes.agreement(), warnings.catch_warnings():
                if not required:  # where it is known what it costs
                    warnings.filterwarnings("ignore", "Per-sample Jacobians are computed one sample at a time")
                with preserved_objects(*([] if self.step is None else [self.step.module]), skip=view.NOT_DATA):
                    stored = self._store(streamed, required=required)
        except Exception as error:  # of any kind: a way that is only cheaper must not end the run
            why = str(error).rstrip(".")
            if required:
                raise ValueError(
                    f'Expected fixed samples, a loss of outputs and targets, and no noise for jacobian="stored" but {why}. Use '
                    'jacobian="streamed".'
                ) from error
            return None, f"The twin takes passes through the network: {why}."
        return stored, "The twin takes products with stored rows of the Jacobian, and no pass through the network."

    def _store(self, streamed: BatchLoss, *, required: bool) -> StoredLoss:
        if self._data is None:
            raise ValueError(self._no_order)
        if self._monitor.network:
            raise ValueError(self._no_pair)
        free = None if required else self._processes.free_memory(next(iter(streamed.params.values())).device)
        if free is not None:
            require_worth(StoredSizes.least(streamed, len(Reference(self._data))), self._batches, free)
        pair, module = self._pair, self._module if self.step is None else self.step.module
        if pair is None:
            assert self.step is not None
            pair = labeled_pair(self.step, self._batch)
        pair = pair._replace(unpack=pair.unpack or self._monitor.unpacked)
        reference = self._on(self._data, keep_size=True, unpack=pair.unpack)
        if free is not None:
            require_worth(StoredSizes.of(streamed, pair, reference), self._batches, free)
        problem = self._problem(
            self._data, jacobian="stored", module=module, pair=pair, batch_size=reference.batch_size
        )
        stored = StoredLoss(problem, PairLoss(problem.linearization, pair.loss, unpack=pair.unpack), streamed)
        if self._batch is not None:
            stored.rows(self._batch)
        if self.step is not None and not same_gradient(self.step, stored, self._batch):
            raise ValueError("the gradient along stored rows is not that of the training step in the first batch")
        return stored

    def _on(self, data: Data, *, keep_size: bool = False, unpack: Unpack | None = None) -> Reference:
        """Data read as training reads it; with `keep_size` in batches of the size that training has."""
        size = getattr(data, "batch_size", None) if keep_size else None
        return Reference(
            data, batch_size=size or self._monitor.batch_size, unpack=unpack or self._monitor.unpacked,
            transfer=self._transfer,
        )  # fmt: skip

    def _problem(
        self,
        data: Data,
        pair: Pair | None = None,
        *,
        jacobian: JacobianStorage = "streamed",
        module: nn.Module | None = None,
        batch_size: int | None = None,
    ) -> LinearizedProblem:
        monitor, pair = self._monitor, pair or self._pair
        assert pair is not None
        return LinearizedProblem(
            module or self._module, data, loss=pair.loss, predict=pair.predict, jacobian=jacobian,
            batch_size=batch_size or monitor.batch_size, dtype=_dtype(monitor), processes=self._processes,
            unpack=pair.unpack or monitor.unpacked, transfer=self._transfer,
            device=None if monitor.device is None else torch.device(monitor.device),
            lr_scales=self._observed.lr_scales, progress=self._progress,
            start=None if self._saved is None else self._saved["start"],
        )  # fmt: skip

    def _linearization(self) -> Linearization:
        linearization = Linearization(
            self._module, predict=None if self._pair is None else self._pair.predict, dtype=_dtype(self._monitor)
        )
        if self._saved is not None:
            linearization.load_state_dict(self._saved["start"])
        linearization.share_buffers(self._processes)
        return linearization

    def _pairs(self, linearization: Linearization) -> PairLoss:
        assert self._pair is not None
        return PairLoss(linearization, self._pair.loss, unpack=self._monitor.unpacked)

    def _outputs(self, problem: LinearizedProblem | None) -> OutputComparison | None:
        return None if problem is None else OutputComparison(problem, taylor=self._monitor.taylor)

    @preserved_rng()
    def _probe(self, loss: BatchLoss) -> KernelProbe | None:
        samples = self._monitor.kernel_probe
        return KernelProbe(*self._samples_for("kernel_probe", loss), samples=samples) if samples else None

    @preserved_rng()
    def _panel(self, loss: BatchLoss) -> RegimePanel | None:
        if not self._monitor.regime:
            return None
        linearization, reference = self._samples_for("regime", loss)
        assert self._pair is not None
        return RegimePanel(linearization, reference, self._pair.loss, processes=self._processes)

    def _samples_for(self, argument: str, loss: BatchLoss) -> tuple[Linearization, Reference]:
        """The network at w0 and the reference, for what an argument asks of a few samples."""
        if self._data is None or self._pair is None:
            why = self._no_pair if self._pair is None else "there is none"
            raise ValueError(
                f"Expected samples of a reference set with outputs (samples, outputs) for argument `{argument}` but {why}. "
                f"Leave out `{argument}`; or give `reference` a data set with a fixed order, and `loss`."
            )
        linearization = loss.linearization if isinstance(loss, PairLoss) else self._linearization()
        return linearization, self._on(self._data)

    def _regression(self) -> RegressionComparison | None:
        """Kernel regression on some samples of the reference, with the squared loss of the run or the mean squared error."""
        monitor, pair = self._monitor, self._eval_pair
        if not monitor.kernels:
            return None
        if self._data is None or pair is None:
            raise ValueError(
                "Expected a reference set, and a loss of outputs (samples, outputs) and targets, for argument `kernels` but "
                f"{self._no_pair if pair is None else self._no_order}. Leave out `kernels`; or give `reference` a data set with "
                "a fixed order, and `loss`."
            )
        try:
            few, most = self._problem(evenly_spaced(self._data, 2), pair), monitor.reference_samples
            if few.objective.factor is None:
                pair = Pair(nn.MSELoss(), pair.predict)
            if most is not None:
                most = min(most, max(1, _REGRESSION_ROWS // few.predictions.shape[1]))
            problem = self._problem(evenly_spaced(self._data, most), pair)
            problem.objective.require_factor()
        except ValueError as error:
            raise ValueError(f"{error} Argument `kernels` needs targets of a squared loss; or leave it out.") from error
        other = None if monitor.evaluation is None else evenly_spaced(monitor.evaluation, monitor.reference_samples)
        return RegressionComparison(problem, other, monitor.kernels)


def _through_passes(loss: BatchLoss) -> BatchLoss:
    return loss.streamed if isinstance(loss, StoredLoss) else loss


def _dtype(monitor: "LinearizationMonitor") -> torch.dtype | None:
    return None if monitor.dtype is None else getattr(torch, monitor.dtype)
