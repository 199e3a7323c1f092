"""A run compared with its linearized network: told of every batch and step, asked for scalars. It knows no Lightning."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ntk.comparison.choice import choose_dynamics
from lightning_ntk.comparison.gradient_check import GradientMismatch, check_gradient
from lightning_ntk.comparison.optimizer import ObservedOptimizer
from lightning_ntk.comparison.options import Options
from lightning_ntk.comparison.scalars import (
    compare_closest,
    compare_functions,
    compare_modes,
    compare_weights,
    outputs_of,
)
from lightning_ntk.data.reference import Data, NoFixedOrderError
from lightning_ntk.data.sample_index import UnknownSamplesError
from lightning_ntk.functional.weights import difference
from lightning_ntk.kernel.probe import KernelProbe
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.objective import Objective
from lightning_ntk.linearization.parameters import Tensors, trainable_parameters
from lightning_ntk.training.base import Follower, ModesFollower, ReplayFollower, StepSettings, TwinFollower
from lightning_ntk.training.linearized_training import LinearizedTraining
from lightning_ntk.training.problem import Capture
from lightning_ntk.utilities.contexts import preserved_rng
from lightning_ntk.utilities.distributed import ALONE, Processes, mean_over


class Observation:
    """What is known of a run and its linearized network from the capture on.

    Args:
        module: The network, at the weights w0 at which to linearize.
        optimizer: Its optimizer, in the state that it has there.
        options: How to observe.
        data: Gives the training set in a fixed order, or raises a `NoFixedOrderError`; None for none, with the twin.
        evaluation: Other data on which to compare functions.
        differences: Phrases on what the run does that the named dynamics do not describe.
        horizon: Optimizer steps still to come, if known.
        momentum: The optimizer's momentum buffers, by parameter name.
        state: What `state_dict` returned in an earlier part of the run, to go on from.
        processes: The processes of a distributed run, each of which observes its own batches. They call the methods together.

    Attributes:
        dynamics: Those that are followed.
        reason: Why, a sentence; empty if they were asked for.
        training: The captured problem of gradient descent or flow; None for other dynamics.
        steps: Optimizer steps of the run since the capture.
        steps_taken: Those that changed the weights.
        outputs: Of the trained and of the linearized network on the reference at the last measurement, `(N, K)` each.

    Raises:
        ValueError: If data, network, loss or optimizer cannot be used.
        MemoryError: If the kernel does not fit.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        options: Options,
        *,
        data: Callable[[], Data] | None,
        evaluation: Data | None = None,
        differences: Callable[[str, int | None], Sequence[str]],
        horizon: float | None = None,
        momentum: Tensors | None = None,
        state: Mapping[str, Any] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self._options = options
        self._processes = processes
        self._start = None if state is None else state["start"]
        self._momentum = momentum if state is None else state["momentum"]
        self._horizon = horizon if state is None else state["horizon"]
        self._parameters = trainable_parameters(module)
        self._optimizer = ObservedOptimizer(optimizer, self._parameters, None if state is None else state["settings"])
        self._reference, no_kernel = self._capture_if_possible(module, data)
        self._linearization = self._linearize(module) if self._reference is None else self._reference.linearization
        self._evaluation = None if evaluation is None else self._capture(module, evaluation)
        size = None if self._reference is None else len(self._reference.reference)
        if state is None:
            self.dynamics, self.reason = self._choose(lambda dynamics: differences(dynamics, size), no_kernel)
        else:
            self._require_same_data(state["data"])
            self.dynamics, self.reason = state["dynamics"], ""
        self.training: LinearizedTraining | None = None
        self._follower = self._follow()
        self._probe = self._make_probe()
        self.outputs: tuple[Tensor, Tensor] | None = None
        self._expected: Tensors | None = None
        self._objective = None if self._reference is None else self._reference.objective
        self.steps = self.steps_taken = 0
        if state is not None:
            self._follower.load_state_dict(state["follower"])
            self.steps, self.steps_taken = int(state["steps"]), int(state["steps_taken"])
            if self._probe is not None and state["kernel_probe"] is not None:
                self._probe.load_state_dict(state["kernel_probe"])

    def state_dict(self) -> dict[str, Any]:
        """Everything that the measurements to come depend on, as tensors, numbers, strings, dicts and lists.

        The kernel and its modes are not in it: they follow from the rest.
        """
        return {
            "start": self._linearization.state_dict(),
            "momentum": self._momentum,
            "horizon": self._horizon,
            "settings": self._optimizer.settings,
            "dynamics": self.dynamics,
            "data": self._fingerprints,
            "follower": self._follower.state_dict(),
            "steps": self.steps,
            "steps_taken": self.steps_taken,
            "kernel_probe": None if self._probe is None else self._probe.state_dict(),
        }

    @property
    def initial_weights(self) -> Tensors:
        """w0 by parameter name."""
        return self._linearization.params

    @property
    def kernel_time(self) -> float | None:
        r"""The time :math:`\eta t` of the kernel's modes by now, where one number says how far they are, see `ModesFollower`."""
        return self._follower.kernel_time if isinstance(self._follower, ModesFollower) else None

    @property
    def num_samples(self) -> int | None:
        """Samples of the reference, if there is one."""
        return None if self._reference is None else len(self._reference.reference)

    def check_batch(self, inputs: Any, target: Tensor) -> str | None:
        """Looks whether the first batch of the run can be followed, before its step.

        Returns:
            None, or the reason for which the twin has taken over from a replay that was no choice of the user.

        Raises:
            UnknownSamplesError: If a replay was asked for and the batch has samples that the training set has not.
        """
        if self.steps > 0 or not isinstance(self._follower, ReplayFollower):
            return None
        try:
            with self._processes.agreement():
                self._follower.rows(inputs, target)
        except UnknownSamplesError as error:
            if self._options.dynamics != "auto":
                raise
            self.dynamics = "twin"
            self._follower = self._follow()
            return str(error)
        return None

    def see(self, inputs: Any, target: Tensor, scale: float) -> None:
        """One micro-batch, whose loss the run multiplied by `scale` before its backward pass."""
        if self.steps_taken == 0:
            with preserved_rng():
                self._add_expected_gradient(inputs, target, scale)
        self._follower.see(inputs, target, scale)

    def step(self, settings: StepSettings) -> None:
        """One optimizer step, with the micro-batches seen since the last one.

        Raises:
            OverflowError: If the linearized network diverges beyond floating-point numbers.
        """
        self._follower.step(settings)
        self.steps += 1
        self.steps_taken += 1

    def skip(self) -> None:
        """One optimizer step that is counted and was not taken, as without a gradient: what was seen for it is forgotten."""
        self._follower.skip()
        self._expected = None
        self.steps += 1

    def warnings(self, settings: StepSettings) -> Iterator[tuple[str, str]]:
        """What the step that was just taken did and the dynamics do not describe: kinds, and ends of sentences."""
        lr = float(settings.groups[0]["lr"])
        if self.training is not None and lr > self.training.max_learning_rate:
            yield (
                "unstable",
                f"the learning rate {lr:.4g} is above {self.training.max_learning_rate:.4g}, the largest for which the "
                "linearized network is stable: it diverges while the run may not.",
            )
        if self.dynamics != "twin":
            ends = f'{self.dynamics.replace("_", " ")} does not follow: dynamics="twin" does.'
            yield from ((kind, f"{sentence}, which {ends}") for kind, sentence in self._optimizer.changes(settings))

    def check_first_gradient(
        self, actual: Mapping[str, Tensor | None], precision: torch.dtype
    ) -> GradientMismatch | None:
        """Compares the gradient of the run's first step with that of the loss at w0, once its batches were seen.

        Args:
            actual: Gradients of the run's own backward passes, before clipping; None for parameters without one.
            precision: The least precise type of these passes.

        Returns:
            None if they agree.
        """
        expected, self._expected = self._expected, None
        assert expected is not None
        return check_gradient(actual, mean_over(self._processes, expected), dtype=precision)

    def measure(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """The scalars of trained weights w_t, with the names of `initial_weights`; others are ignored."""
        options = self._options
        weights = {name: weights[name] for name in self.initial_weights}
        with preserved_rng():
            network = self._follower.network()
            displacement = difference(weights, self.initial_weights)
            scalars = compare_weights(displacement, network.displacement, per_parameter=options.per_parameter)
            if self._reference is not None:
                pushed = self._reference.push_forward(displacement).cpu() if options.taylor else None
                self.outputs = outputs_of(self._reference, weights, network)
                scalars |= compare_functions(self._reference, *self.outputs, pushed)
                if self.training is not None and options.modes:
                    scalars |= compare_modes(self.training, *self.outputs, options.modes)
                if self.training is not None and options.closest:
                    scalars |= compare_closest(self.training, displacement, self.steps)
            if self._evaluation is not None:
                pushed = self._evaluation.push_forward(displacement).cpu() if options.taylor else None
                there = outputs_of(self._evaluation, weights, network._replace(predictions=None))
                compared = compare_functions(self._evaluation, *there, pushed)
                scalars |= {f"evaluation/{name}": value for name, value in compared.items()}
            if self._probe is not None:
                kernel = self._probe.kernel(weights)
                scalars |= self._probe.compare(kernel, step=self.steps)
                self._probe.advance(kernel, step=self.steps)
        if options.twin_every > 1 and self.dynamics == "twin":
            scalars["twin_coverage"] = 1 / options.twin_every
        return scalars

    def _make_probe(self) -> KernelProbe | None:
        if not self._options.kernel_probe:
            return None
        if self._reference is None:
            raise ValueError(
                "Expected a reference set, of which to take samples, with argument `kernel_probe` but there is none: give "
                "`reference` a data set with a fixed order, or leave out `kernel_probe`."
            )
        with preserved_rng():
            return KernelProbe(self._linearization, self._reference.reference, samples=self._options.kernel_probe)

    @property
    def _fingerprints(self) -> dict[str, str]:
        captures = {"reference": self._reference, "evaluation": self._evaluation}
        return {name: capture.fingerprint for name, capture in captures.items() if capture is not None}

    def _require_same_data(self, expected: Mapping[str, str]) -> None:
        own = self._fingerprints
        for name in sorted(expected.keys() | own.keys()):
            if expected.get(name) != own.get(name):
                raise ValueError(
                    f"Expected the {name} set with which the run began but its content, order or existence is another: "
                    "distances to the linearized network are defined on one set. Give the same data."
                )

    def _linearize(self, module: nn.Module) -> Linearization:
        linearization = Linearization(module, predict=self._options.predict, dtype=self._options.dtype)
        if self._start is not None:
            linearization.load_state_dict(self._start)
        linearization.share_buffers(self._processes)
        return linearization

    def _capture(self, module: nn.Module, data: Data) -> Capture:
        options = self._options
        return Capture(
            module, data, loss=options.loss, predict=options.predict, unpack=options.unpack, jacobian=options.jacobian,
            batch_size=options.batch_size, dtype=options.dtype, device=options.device, progress=options.progress,
            start=self._start, processes=self._processes,
        )  # fmt: skip

    def _capture_if_possible(
        self, module: nn.Module, data: Callable[[], Data] | None
    ) -> tuple[Capture | None, str | None]:
        if data is None:
            return None, "there is no reference set"
        try:
            with self._processes.agreement():
                return self._capture(module, data()), None
        except NoFixedOrderError as error:
            if self._options.dynamics not in ("auto", "twin"):
                raise
            return None, f"the training data has no fixed order. {error}"

    def _choose(self, differences: Callable[[str], Sequence[str]], no_kernel: str | None) -> tuple[str, str]:
        options, reference = self._options, self._reference
        if options.dynamics != "auto":
            if reference is None and options.dynamics != "twin":
                raise ValueError(
                    f'Expected a reference set for dynamics="{options.dynamics}" but got None: only "twin" goes without.'
                )
            return options.dynamics, ""
        rows = 0 if reference is None else reference.predictions.numel()
        choice = choose_dynamics(
            differences,
            no_kernel=no_kernel,
            not_squared=reference is not None and reference.objective.factor is None,
            kernel_bytes=float(rows) ** 2 * self._linearization.dtype.itemsize,
            free=self._processes.free_memory("cpu", options.device or self._linearization.device),
        )
        return choice.dynamics, choice.reason

    def _follow(self) -> Follower:
        options = self._options
        if self.dynamics == "twin":
            loss = options.loss or nn.MSELoss()
            return TwinFollower(
                self._linearization, self._optimizer.optimizer, self._parameters, loss, every=options.twin_every,
                processes=self._processes,
            )  # fmt: skip
        assert self._reference is not None
        settings, multiples = self._optimizer.settings[0], self._optimizer.multiples()
        momentum = self._momentum if settings["momentum"] else None
        if self.dynamics == "replay":
            decays = settings["weight_decay"] != 0
            return ReplayFollower(self._reference, decays=decays, momentum=momentum, multiples=multiples)
        described: dict[str, Any] = {"lr": settings["lr"], "dynamics": "gradient_flow"}
        if self.dynamics == "gradient_descent":
            flags = {name: bool(settings[name]) for name in ("nesterov", "maximize")}
            described = {**settings, **flags, "momentum_buffers": momentum}
        if options.closest and multiples is not None and not set(multiples.values()) <= {0.0, 1.0}:
            raise ValueError(
                "Expected one learning rate with `closest=True` but the parameter groups have several. Use closest=False."
            )
        self.training = LinearizedTraining(
            self._reference, solver=options.solver, horizon=self._horizon, lr_scales=multiples, **described
        )
        return ModesFollower(self.training)

    def _add_expected_gradient(self, inputs: Any, target: Tensor, scale: float) -> None:
        linearization = self._linearization
        outputs = linearization.predict(inputs)
        if self._objective is None:
            self._objective = Objective(self._options.loss or nn.MSELoss(), outputs, target, flat=linearization.flat)
        cotangent = scale * self._objective.gradient(outputs, self._objective.prepare(target, outputs))
        gradient = linearization.vjp(cotangent, inputs)
        if self._expected is None:
            self._expected = {name: value.clone() for name, value in gradient.items()}
        else:
            for name, value in gradient.items():
                self._expected[name].add_(value)
