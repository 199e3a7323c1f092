"""Builds the comparison of a run: its loss, dynamics and probe."""

from functools import partial
from typing import Any

import torch

from lightning_ntk.callback import trainer as view
from lightning_ntk.callback.captured_run import CapturedRun, dtype_of
from lightning_ntk.callback.differences import forward_differences
from lightning_ntk.callback.extras import kernel_probe, regime_panel, regression_comparison
from lightning_ntk.callback.stored_rows import stored_loss
from lightning_ntk.callback.training_step import ShadowStep
from lightning_ntk.comparison.choice import TWIN, choose_dynamics
from lightning_ntk.comparison.expected_gradient import ExpectedGradient
from lightning_ntk.comparison.full_batch import FullBatchCheck
from lightning_ntk.comparison.functions import FunctionComparison
from lightning_ntk.comparison.run_comparison import RunComparison
from lightning_ntk.comparison.step_functions import StepComparison
from lightning_ntk.data.reference import evenly_spaced
from lightning_ntk.linearization.batch_loss import BatchLoss
from lightning_ntk.linearization.objective import Objective
from lightning_ntk.linearization.pair_of_step import NoPairError, pair_of_step
from lightning_ntk.linearization.step import StepLinearization
from lightning_ntk.training.base import OnlineTraining
from lightning_ntk.training.linearized_training import LinearizedTraining
from lightning_ntk.training.problem import LinearizedProblem
from lightning_ntk.training.replay import Replay
from lightning_ntk.training.stored_loss import StoredLoss
from lightning_ntk.training.twin import Twin
from lightning_ntk.utilities.contexts import preserved_rng


class RunCapture:
    """A run at the weights where it is linearized.

    Args:
        run: What was read off the run.

    Attributes:
        comparison: The comparison of this run.
        reason: The reason for these dynamics, and how a twin gets its products with the Jacobian. It is empty if the
            user has chosen both.
        differences: Phrases for what the run does and the linearized network does not.
        judge: The gradient of the training step in the precision of the linearized passes. It exists where the run
            computes in a lower one and the loss was given, and distinguishes a wrong loss from rounding.
        stored: The loss along stored rows of the Jacobian; None where products are streamed.

    Raises:
        ValueError: If data, network, loss or optimizer cannot be used.
        MemoryError: If the kernel does not fit.
    """

    def __init__(self, run: CapturedRun) -> None:
        self.run, monitor = run, run.monitor
        self.stored: StoredLoss | None = None
        saved = run.saved
        self.reason = ""
        dynamics: str = monitor.dynamics if saved is None else saved["dynamics"]
        if dynamics == "auto":
            dynamics, self.reason = self._choose()
        try:
            built = self._on_kernel(dynamics) if dynamics != "twin" else self._beside_run()
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            if monitor.dynamics != "auto" or dynamics == "twin":
                raise
            dynamics, self.reason = "twin", f"{TWIN}, because a kernel cannot be used: {error}"
            built = self._beside_run()
        run.batch = None  # as large as it may be
        loss, online, training, reference, evaluation = built
        self.judge = self._judge()
        forward = forward_differences(run.trainer, run.module, in_eval_mode=_through_passes(loss) is not run.step)
        self.differences = [*run.differing(dynamics, run.size), *forward]
        self.is_in_other_mode = any(phrase.endswith("eval mode") for phrase in forward)
        # Where it is known that the run is no gradient descent, its batches are not looked at.
        looks = training is not None and not run.differing(dynamics, run.size)
        self.comparison = RunComparison(
            loss, online, reference=reference, evaluation=evaluation, probe=kernel_probe(run, loss),
            panel=regime_panel(run, loss), optimizer=run.observed,
            training=training, expected_gradient=ExpectedGradient(loss, processes=run.processes),
            full_batch=FullBatchCheck(training.problem) if training is not None and looks else None,
            regression=regression_comparison(run),
            per_parameter=monitor.per_parameter, closest=monitor.closest, modes=monitor.modes,
        )  # fmt: skip
        if saved is not None:
            self.comparison.load_state_dict(saved)

    @property
    def shadow(self) -> ShadowStep | None:
        """The training step as the linearized network takes it.

        None where the user has given the loss.
        """
        return self.run.shadow

    @property
    def step(self) -> StepLinearization | None:
        """Its linearization."""
        return self.run.step

    @property
    def accumulates_before(self) -> bool:
        """Whether the comparison must see a batch before the run trains on it.

        It then sees the batch with the random state that the run will have.
        """
        return isinstance(self.comparison.online, Twin) and self.follows_step

    @property
    def follows_step(self) -> bool:
        """Whether the loss is the training step's own, run on a copy."""
        return self.run.step is not None and _through_passes(self.comparison.loss) is self.run.step

    def twin(self) -> Twin:
        """The linearized twin of this run, before the first step."""
        run = self.run
        loss: BatchLoss = run.step or run.pairs(run.linearization())
        return Twin(loss, run.optimizer, run.parameters, processes=run.processes)

    def loss_of_run(self, batch: Any) -> str:
        """A sentence on the loss function of the training step.

        It is empty if the step computes more than one function of outputs and targets.
        """
        shadow = ShadowStep(self.run.trainer, self.run.module, dtype=dtype_of(self.run.monitor))
        step = StepLinearization(shadow.module, shadow, batch_dtype=shadow.batch_dtype)
        try:
            return f"The training step computes {pair_of_step(step, batch).loss!r}. "
        except NoPairError as error:
            return "" if error.pair is None else f"The training step computes {error.pair.loss!r} in train mode. "

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors, numbers, strings, dicts and lists."""
        run = self.run
        return {
            "comparison": self.comparison.state_dict(),
            "horizon": run.horizon,
            "momentum": run.momentum,
            "samples": run.samples,
            "optimizer": type(run.observed.optimizer).__name__,
        }

    def _judge(self) -> ExpectedGradient | None:
        run = self.run
        eps = torch.finfo(view.precision(run.trainer, run.module)).eps
        if run.step is not None or eps <= torch.finfo(torch.float32).eps or not run.module.automatic_optimization:
            return None
        run.shadow = shadow = ShadowStep(run.trainer, run.module, dtype=dtype_of(run.monitor))
        step = StepLinearization(shadow.module, shadow, batch_dtype=shadow.batch_dtype)
        return ExpectedGradient(step, processes=run.processes)

    def _choose(self) -> tuple[str, str]:
        run, monitor, no_kernel = self.run, self.run.monitor, self.run.no_order
        not_squared, parts, rows, itemsize = False, False, 0, 0
        if run.data is not None and run.pair is None:
            no_kernel = run.no_pair
        elif run.data is not None and run.pair is not None:
            linearization = run.linearization()
            try:
                with preserved_rng():
                    first = run.on(run.data).read(0, monitor.batch_size)
                    outputs = linearization.predict(first.inputs)
                if first.target is None:
                    raise ValueError("the batches have no target")
                objective = Objective(run.pair.loss, outputs, first.target, flat=linearization.flat)
                not_squared = objective.factor is None
                parts = not not_squared and not objective.is_mean(outputs) and run.averages
                rows, itemsize = (run.size or 0) * outputs.shape[1], linearization.dtype.itemsize
            except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
                if monitor.is_given_loss:
                    raise
                no_kernel = str(error)
        sums = ["its loss is no mean over samples, and it averages that of parts"] if parts else []
        return choose_dynamics(
            lambda name: [*run.differing(name, run.size), *(sums if name == "gradient_descent" else [])],
            no_kernel=no_kernel or None,
            not_squared=not_squared,
            kernel_bytes=float(rows) ** 2 * itemsize,
            free=run.processes.free_memory("cpu", monitor.device or next(iter(run.parameters.values())).device),
        )

    def _on_kernel(self, dynamics: str) -> tuple[Any, ...]:
        """Loss, dynamics on the kernel, and the functions to compare."""
        run, monitor = self.run, self.run.monitor
        if run.data is None:
            raise ValueError(
                f'Expected a reference set for dynamics="{dynamics}" but got None: only "twin" goes without.'
            )
        if run.pair is None:
            raise ValueError(
                f'Expected a training step that is a loss of outputs and targets for dynamics="{dynamics}" but '
                f'{run.no_pair}. Give `loss`, and `predict` and `unpack` where needed, or use dynamics="twin".'
            )
        problem = run.problem(run.data, jacobian="stored" if monitor.jacobian == "stored" else "streamed")
        observed = run.observed.hyperparameters
        momentum = run.momentum if observed.template.momentum else None
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
            training = LinearizedTraining(problem, solver=monitor.solver, horizon=run.horizon, **options)
            online = training.follow()
        other = None if monitor.evaluation is None else problem.on(monitor.evaluation)
        return run.pairs(problem.linearization), online, training, run.outputs(problem), run.outputs(other)

    def _beside_run(self) -> tuple[Any, ...]:
        """Loss, twin, and the functions to compare, on some samples."""
        run, monitor = self.run, self.run.monitor
        data = {"reference": run.data, "evaluation": monitor.evaluation}
        some = {name: None if d is None else evenly_spaced(d, run.samples) for name, d in data.items()}
        functions: dict[str, FunctionComparison | None] = {}
        if run.step is not None:
            loss: BatchLoss = run.step
            for name, own in some.items():
                functions[name] = None if own is None else StepComparison(
                    run.step, run.on(own, keep_size=True), taylor=monitor.taylor, keeps_outputs=monitor.figures,
                    announce=partial(setattr, run.shadow, "batch_index"), processes=run.processes,
                )  # fmt: skip
        else:
            problem: LinearizedProblem | None = None
            for name, own in some.items():
                if own is not None:
                    problem = run.problem(own) if problem is None else problem.on(own)
                    functions[name] = run.outputs(problem)
            loss = run.pairs(run.linearization() if problem is None else problem.linearization)
        if monitor.jacobian != "streamed":
            self.stored, how = stored_loss(run, loss)
            self.reason = f"{self.reason} {how}".lstrip()
            loss = self.stored or loss
        twin = Twin(loss, run.optimizer, run.parameters, processes=run.processes)
        return loss, twin, None, functions.get("reference"), functions.get("evaluation")


def _through_passes(loss: BatchLoss) -> BatchLoss:
    return loss.streamed if isinstance(loss, StoredLoss) else loss
