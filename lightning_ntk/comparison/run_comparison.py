"""A run beside its linearized network."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_ntk.comparison.expected_gradient import ExpectedGradient
from lightning_ntk.comparison.full_batch import FullBatchCheck
from lightning_ntk.comparison.functions import FunctionComparison
from lightning_ntk.comparison.optimizer import ObservedOptimizer, some
from lightning_ntk.comparison.regimes import RegimePanel
from lightning_ntk.comparison.regression import RegressionComparison
from lightning_ntk.comparison.scalars import compare_closest, compare_modes, compare_weights
from lightning_ntk.functional.weights import difference
from lightning_ntk.kernel import KernelProbe
from lightning_ntk.linearization.batch_loss import BatchLoss
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.training.base import OnlineTraining, StepSettings
from lightning_ntk.training.linearized_training import LinearizedTraining
from lightning_ntk.training.modal_run import ModalRun
from lightning_ntk.training.twin import Twin
from lightning_ntk.utilities.contexts import preserved_rng
from lightning_ntk.utilities.representation import represent
from lightning_ntk.utilities.shapes import Float64


class RunComparison:
    """A linearized network that trains beside a run, and the scalars that compare both.

    All parts are made outside and passed in. In a training loop of your own, call `accumulate` for every batch, `step`
    right before the optimizer steps, and `measure` whenever you like.

    Args:
        loss: The loss that is linearized, with the network at w0.
        online: The linearized network that trains beside the run.
        module: The network that the run trains. Default: that of the loss.
        reference: The training set, on which functions are compared; None to compare weights only.
        evaluation: Another data set on which functions are compared.
        probe: The samples whose kernel is followed.
        panel: The panel of regimes to measure as well.
        optimizer: The optimizer of the run at capture. None does not look for changes of its settings.
        training: The closed form of `online`, for the modes, the closest time and the edge of stability.
        expected_gradient: The gradient that the run's steps must have, where it is to be compared.
        full_batch: The samples that the run's steps must have, where `online` is full-batch gradient descent.
        regression: Kernel regression with the kernels before and after training.
        per_parameter: Whether to compare every parameter tensor.
        closest: Whether to find the time at which the linearized network is closest to the trained one.
        modes: The number of leading modes along which residuals are compared.

    Attributes:
        online: The linearized network that trains beside the run.
        steps: Optimizer steps of the run since the capture.
        steps_taken: Those that changed the weights.
        expected_gradient: The gradient that the run's steps must have; None if it is not to be compared.

    Example:
        >>> import torch
        >>> from lightning_ntk.comparison import OutputComparison
        >>> from lightning_ntk.training import LinearizedProblem, PairLoss, Twin
        >>> module, inputs, targets = torch.nn.Linear(2, 1), torch.eye(2), torch.ones(2, 1)
        >>> optimizer, loss = torch.optim.Adam(module.parameters()), torch.nn.MSELoss()
        >>> problem = LinearizedProblem(module, (inputs, targets), loss=loss)
        >>> pairs = PairLoss(problem.linearization, loss)
        >>> twin = Twin(pairs, optimizer, dict(module.named_parameters()))
        >>> comparison = RunComparison(pairs, twin, reference=OutputComparison(problem))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     loss(module(inputs), targets).backward()
        ...     comparison.accumulate((inputs, targets))
        ...     comparison.step(optimizer)
        ...     _ = optimizer.step()
        >>> comparison.measure()["relative_weight_distance"] < 1e-5  # a linear network is its own linearization
        True
    """

    def __init__(
        self,
        loss: BatchLoss,
        online: OnlineTraining,
        *,
        module: nn.Module | None = None,
        reference: FunctionComparison | None = None,
        evaluation: FunctionComparison | None = None,
        probe: KernelProbe | None = None,
        panel: RegimePanel | None = None,
        optimizer: ObservedOptimizer | None = None,
        training: LinearizedTraining | None = None,
        expected_gradient: ExpectedGradient | None = None,
        full_batch: FullBatchCheck | None = None,
        regression: RegressionComparison | None = None,
        per_parameter: bool = False,
        closest: bool = False,
        modes: int = 0,
    ) -> None:
        self.loss = loss
        self.online = online
        self._module = loss.module if module is None else module
        self.reference = reference
        self.evaluation = evaluation
        self.training = training
        self._probe = probe
        self._panel = panel
        self._optimizer = optimizer
        self._full_batch = full_batch
        self._regression = regression
        self.expected_gradient = expected_gradient
        self._per_parameter = per_parameter
        self._closest = closest
        self._modes = modes
        self._batches: list[tuple[Any, float]] = []
        self.steps = self.steps_taken = 0

    @property
    def dynamics(self) -> str:
        """The name of the dynamics that the linearized network follows."""
        return self.online.dynamics

    @property
    def initial_weights(self) -> Tensors:
        """w0, by parameter name."""
        return self.loss.params

    @property
    def kernel_time(self) -> float | None:
        r"""The time :math:`\eta t` for the kernel's modes; None if undefined.

        It is undefined where no single number describes it.
        """
        return self.online.kernel_time if isinstance(self.online, ModalRun) else None

    @property
    def outputs(self) -> tuple[Float64[Tensor, "N K"], Float64[Tensor, "N K"]] | None:
        """Outputs of the trained and the linearized network, `(N, K)` each.

        They are on the reference, at the last measurement.
        """
        return None if self.reference is None else self.reference.outputs

    def accumulate(self, batch: Any, scale: float = 1.0) -> None:
        """Adds one batch, whose loss the run multiplied by `scale`."""
        if self.steps_taken == 0:
            self._batches.append((batch, scale))
        if self._full_batch is not None:
            self._full_batch.accumulate(batch, scale)
        self.online.accumulate(batch, scale=scale)

    def prepare_step(self, optimizer: Optimizer, settings: StepSettings) -> Iterator[tuple[str, str]]:
        """Follows the optimizer itself, right before it steps.

        Returns:
            What the step does and the linearized network does not, each as a kind and a phrase that continues "the run".
        """
        if self._optimizer is None:
            return
        twin = self.online if isinstance(self.online, Twin) else None
        if optimizer is not self._optimizer.optimizer:
            remembered = self._optimizer.has_state and twin is None
            remembers = not self._optimizer.replace(optimizer) or remembered
            if twin is not None:
                twin.replace_optimizer(optimizer)
            if remembers or (twin is None and type(optimizer) is not SGD):
                yield "optimizer", f"replaced its optimizer by another one, {type(optimizer).__name__}"
        removed, written = self._optimizer.state_changes()
        if removed and twin is not None:
            twin.forget_state(removed)
        if written or (removed and twin is None):
            yield "state", f"changed what its optimizer remembers of {some(written or removed)}"
        if twin is None:
            yield from self._optimizer.changes(settings, full_batch=isinstance(self.online, ModalRun))
        if settings.gradient_factor != 1 and isinstance(self.online, ModalRun):
            yield "factor", f"multiplied its gradient by {settings.gradient_factor:.4g} before the step"
        difference = None if self._full_batch is None else self._full_batch.difference()
        if difference is not None:
            yield "samples", difference

    def step(self, settings: StepSettings | Optimizer) -> None:
        """Follows one optimizer step along the batches since the last one.

        Args:
            settings: What the step depends on; or the optimizer itself, before it steps.

        Raises:
            OverflowError: If the linearized network diverges beyond floating-point numbers.
        """
        if isinstance(settings, Optimizer):
            live = dict(self._module.named_parameters())
            settings = StepSettings.of(settings, {name: live[name] for name in self.initial_weights})
        self.online.step(settings)
        self._forget()
        self.steps += 1
        self.steps_taken += 1

    def discard(self) -> None:
        """Discards one optimizer step that was counted and not taken.

        A step without gradients is an example.
        """
        self.online.discard()
        self._forget()
        self.steps += 1

    def follow_with(self, online: OnlineTraining) -> None:
        """Replaces the linearized network before the first step.

        The batches so far are not lost.
        """
        self.online, self.training, self._full_batch = online, None, None
        for batch, scale in self._batches:
            online.accumulate(batch, scale=scale)

    def _forget(self) -> None:
        self._batches = []
        if self._full_batch is not None:
            self._full_batch.discard()
        if self.expected_gradient is not None:
            self.expected_gradient.discard()

    def note_state(self) -> None:
        """Records what identifies the optimizer's state, right after it has stepped."""
        if self._optimizer is not None:
            self._optimizer.note_state()

    @preserved_rng()
    def measure(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """Compares trained weights with the linearized ones.

        Args:
            weights: The trained weights w_t, and buffers, by name. Default: those that the module has now.

        Returns:
            The scalars by name, see docs/scalars.md.
        """
        weights = self._live if weights is None else weights
        own = {name: weights[name] for name in self.initial_weights}
        displacement, linearized = difference(own, self.initial_weights), self.online.displacement()
        scalars = compare_weights(displacement, linearized, per_parameter=self._per_parameter)
        if self.reference is not None:
            scalars |= self.reference.compare(weights, displacement, linearized, self.online.predictions())
        if self.training is not None and self.outputs is not None and self._modes:
            scalars |= compare_modes(self.training, *self.outputs, self._modes)
        if self.training is not None and self._closest:
            scalars |= compare_closest(self.training, displacement, self.steps)
        if self.evaluation is not None:
            compared = self.evaluation.compare(weights, displacement, linearized)
            scalars |= {f"evaluation/{name}": value for name, value in compared.items()}
        if self._probe is not None:
            kernel = self._probe.kernel(own)
            scalars |= self._probe.compare(kernel, step=self.steps)
            self._probe.advance(kernel, step=self.steps)
        if self._panel is not None:
            settings = None if self._optimizer is None else self._optimizer.sgd_settings
            scalars |= self._panel.measure(weights, settings)
        return scalars if self._regression is None else scalars | self._regression.before

    @preserved_rng()
    def regress(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """Does kernel regression with the kernel after training.

        It costs as much as a capture of the kernel and its modes.

        Args:
            weights: The trained weights w_t, and buffers, by name. Default: those that the module has now.

        Returns:
            The scalars by name; none unless requested.
        """
        return {} if self._regression is None else self._regression.after(self._live if weights is None else weights)

    @property
    def _live(self) -> dict[str, Tensor]:
        return {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}

    def state_dict(self) -> dict[str, Any]:
        """The state that later measurements depend on.

        It consists of tensors, numbers, strings, dicts and lists.

        The kernel and its modes are not in it: they follow from the rest.
        """
        return {
            "start": self.loss.state_dict(),
            "dynamics": self.dynamics,
            "settings": [] if self._optimizer is None else [list(group) for group in self._optimizer.settings],
            "data": self._fingerprints,
            "online": self.online.state_dict(),
            "steps": self.steps,
            "steps_taken": self.steps_taken,
            "kernel_probe": None if self._probe is None else self._probe.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned.

        The comparison must have the same "start", "dynamics" and "settings".

        Raises:
            ValueError: If a data set is another one.
        """
        own = self._fingerprints
        for name in sorted(state["data"].keys() | own.keys()):
            if state["data"].get(name) != own.get(name):
                raise ValueError(
                    f"Expected the {name} set with which the run began but its content, order or existence is another: "
                    "distances to the linearized network are defined on one set. Give the same data."
                )
        self.online.load_state_dict(state["online"])
        self.online.discard()  # a run that resumes within an accumulated step has lost its gradients, too
        self.steps, self.steps_taken = int(state["steps"]), int(state["steps_taken"])
        if self._probe is not None and state["kernel_probe"] is not None:
            self._probe.load_state_dict(state["kernel_probe"])

    @property
    def _fingerprints(self) -> dict[str, str]:
        data = {"reference": self.reference, "evaluation": self.evaluation}
        return {name: functions.fingerprint for name, functions in data.items() if functions is not None}

    def __repr__(self) -> str:
        sets = {"reference": self.reference, "evaluation": self.evaluation}
        compared = [f"{name} of {len(data)} samples" for name, data in sets.items() if data is not None]
        return represent(self, self.dynamics, f"{self.steps} steps", *compared)
