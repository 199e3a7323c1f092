"""Linearized training that follows a run: what it is told of every batch and step, and the network that it holds then."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ntk.dynamics.sgd import SGDSettings
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.objective import Loss, Objective
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.training.carried import decaying_weights
from lightning_ntk.training.linearized_training import LinearizedTraining
from lightning_ntk.training.problem import Capture, training_kernel
from lightning_ntk.training.replay import Replay
from lightning_ntk.training.scaling import Scaling
from lightning_ntk.training.twin import Twin
from lightning_ntk.utilities.contexts import preserved_rng
from lightning_ntk.utilities.distributed import ALONE, Processes, mean_over


class LinearizedNetwork(NamedTuple):
    """The linearized network at one time.

    Attributes:
        displacement: w_lin - w0, float64.
        predictions: Outputs on the training set, `(N, K)` in float64 on the CPU, where the dynamics know them.
    """

    displacement: Tensors
    predictions: Tensor | None = None


class StepSettings(NamedTuple):
    """What an optimizer step of the run depended on, besides its gradient.

    Attributes:
        groups: The optimizer's parameter groups as they were when it stepped.
        clip_norm: Largest norm of the gradient, or None.
        clip_value: Largest element of the gradient, or None.
        frozen: Names of the parameters that had no gradient.
    """

    groups: Sequence[Mapping[str, Any]]
    clip_norm: float | None = None
    clip_value: float | None = None
    frozen: Collection[str] = ()


class Follower(Protocol):
    """Linearized training in step with a run."""

    def see(self, inputs: Any, target: Tensor, scale: float) -> None:
        """One micro-batch of the run, whose loss it multiplied by `scale` before the backward pass."""

    def step(self, settings: StepSettings) -> None:
        """One optimizer step, with the micro-batches seen since the last one."""

    def skip(self) -> None:
        """Forgets the micro-batches seen since the last step: the optimizer did not step."""

    def network(self) -> LinearizedNetwork:
        """The linearized network after the steps so far."""

    def state_dict(self) -> dict[str, Any]:
        """What of the steps so far another run continues with: tensors, numbers, dicts and lists."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned, on any device."""


class ModesFollower:
    """Full-batch gradient descent or flow on the modes of the kernel: O(m) a step.

    Args:
        training: The captured problem.
    """

    def __init__(self, training: LinearizedTraining) -> None:
        self._training = training
        self._run = training.follow()

    def see(self, inputs: Any, target: Tensor, scale: float) -> None:
        """Nothing: these dynamics see the whole training set in every step."""

    def step(self, settings: StepSettings) -> None:
        """One step with the settings of the first parameter group."""
        used = SGDSettings.of(settings.groups[0])
        # Gradient flow has a duration of each step, and nothing else of an optimizer.
        self._run.step(SGDSettings(used.lr) if self._training.dynamics == "gradient_flow" else used)

    def skip(self) -> None:
        """Nothing: what a batch holds is not looked at."""

    @property
    def kernel_time(self) -> float | None:
        r"""The sum of the learning rates times the factor of the loss, :math:`\eta t`; None with momentum or decay."""
        if any(settings.momentum or settings.weight_decay for settings, _ in self._run.history):
            return None
        return self._training.loss_factor * sum(settings.lr * count for settings, count in self._run.history)

    def network(self) -> LinearizedNetwork:
        """One pass over the training set."""
        state = self._run.state
        return LinearizedNetwork(self._training.displacement_of(state), state.predictions)

    def state_dict(self) -> dict[str, Any]:
        """The settings of all steps, from which the state follows on any modes."""
        rows = [(*settings, count) for settings, count in self._run.history]
        return {"settings": torch.tensor(rows, dtype=torch.float64).reshape(-1, len(SGDSettings._fields) + 1)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the steps again."""
        for lr, momentum, dampening, nesterov, weight_decay, maximize, decoupled, count in state["settings"].tolist():
            settings = SGDSettings(
                lr, momentum, dampening, bool(nesterov), weight_decay, bool(maximize), bool(decoupled)
            )
            for _ in range(int(count)):
                self._run.step(settings)


class ReplayFollower:
    """The run's own minibatches replayed on the kernel.

    Args:
        capture: The network on its training set.
        decays: Whether the run has weight decay, so that w0 itself shrinks.
        momentum: The optimizer's momentum buffers at capture, by parameter name, if it had any.
        multiples: By parameter, the multiple of the learning rate that it is trained with; None where all have 1.
    """

    def __init__(
        self,
        capture: Capture,
        *,
        decays: bool = False,
        momentum: Tensors | None = None,
        multiples: Mapping[str, float] | None = None,
    ) -> None:
        self._scaling = None if multiples is None else Scaling(capture, multiples)
        self._capture = capture if self._scaling is None else self._scaling.capture
        if self._scaling is not None:
            self._scaling.require_commuting(float(decays))
        dtype = capture.linearization.dtype
        self._index = capture.samples
        self._decaying = self._in_coordinates(decaying_weights(capture) if decays else None)
        self._momentum = self._in_coordinates(momentum)
        self._replay = Replay(
            training_kernel(None, capture, dtype=dtype)
            if self._scaling is None
            else self._scaling.kernel(None, dtype=dtype),
            capture.predictions,
            capture.objective,
            initial_image=self._image(self._decaying),
            momentum_image=self._image(self._momentum),
            processes=capture.processes,
        )

    def _in_coordinates(self, vector: Tensors | None) -> Tensors | None:
        return vector if vector is None or self._scaling is None else self._scaling.of_gradients(vector)

    def _image(self, vector: Tensors | None) -> Tensor | None:
        return None if vector is None else self._capture.push_forward(vector)

    @preserved_rng()
    def see(self, inputs: Any, target: Tensor, scale: float) -> None:
        """Adds the loss gradient of the batch, whose samples are found in the training set by their content."""
        self._replay.accumulate(self.rows(inputs, target), target, scale=scale)

    def rows(self, inputs: Any, target: Tensor) -> Tensor:
        """The rows of a batch's samples in the training set, `(b,)`.

        Raises:
            UnknownSamplesError: If it has samples that are not there.
        """
        return self._index.rows(inputs, target)

    def step(self, settings: StepSettings) -> None:
        """One step with the settings of the first parameter group."""
        self._replay.step(
            SGDSettings.of(settings.groups[0]), clip_norm=settings.clip_norm, clip_value=settings.clip_value
        )

    def skip(self) -> None:
        """Drops the batches seen since the last step."""
        self._replay.forget()

    def network(self) -> LinearizedNetwork:
        """One pass over the training set."""
        coefficients = self._replay.coefficients.unsqueeze(0)
        displacement = {name: value[0] for name, value in self._capture.pull_back(coefficients).items()}
        carried = [
            (self._replay.initial_scale, self._decaying),
            (self._replay.momentum_scale, self._momentum),
        ]
        for scale, vector in carried:
            if vector is not None:
                for name, value in displacement.items():
                    value.add_(vector[name].to(value), alpha=scale)
        if self._scaling is not None:
            displacement = self._scaling.to_weights(displacement)
        return LinearizedNetwork(displacement, self._replay.predictions.cpu())

    def state_dict(self) -> dict[str, Any]:
        """Coefficients, predictions and momentum."""
        return self._replay.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes them over."""
        self._replay.load_state_dict(dict(state))


class TwinFollower:
    """The linearized network trained in lockstep, by an optimizer of the same class.

    Args:
        linearization: The network at w0.
        optimizer: The optimizer of the run, in the state that it has at w0.
        parameters: The live parameters, with the names of `linearization.params`.
        loss: Of outputs and targets.
        every: Steps that share one gradient, that of the first of them; 1 is exact.
        processes: The processes whose gradients a step averages, as distributed training does; each sees its own batches.
    """

    def __init__(
        self,
        linearization: Linearization,
        optimizer: Optimizer,
        parameters: Mapping[str, Tensor],
        loss: Loss,
        *,
        every: int = 1,
        processes: Processes = ALONE,
    ) -> None:
        self._processes = processes
        self._linearization = linearization
        self._loss = loss
        self._every = every
        self._steps = 0
        self._kept: Tensors | None = None
        self._twin = Twin(linearization, optimizer, parameters)

    @preserved_rng()
    def see(self, inputs: Any, target: Tensor, scale: float) -> None:
        """Adds the loss gradient of the batch at the outputs of the linearized network."""
        if self._steps % self._every:
            return
        if self._twin.objective is None:
            outputs = self._linearization.predict(inputs)
            self._twin.objective = Objective(self._loss, outputs, target, flat=self._linearization.flat)
        self._twin.accumulate(inputs, target, scale=scale)

    @preserved_rng()
    def step(self, settings: StepSettings) -> None:
        """One step of the twin's optimizer."""
        if self._kept is not None and self._steps % self._every:
            self._twin.gradients = self._kept
        else:
            if self._processes.size > 1:
                self._twin.gradients = mean_over(self._processes, self._twin.gradients)
            self._kept = self._twin.gradients if self._every > 1 else None
        self._twin.step(
            settings.groups, clip_norm=settings.clip_norm, clip_value=settings.clip_value, frozen=settings.frozen
        )
        self._steps += 1

    def skip(self) -> None:
        """Drops the gradient of the batches seen since the last step."""
        self._twin.forget()

    def network(self) -> LinearizedNetwork:
        """No pass."""
        return LinearizedNetwork(self._twin.displacement)

    def state_dict(self) -> dict[str, Any]:
        """The twin's weights and its optimizer's state."""
        return {"twin": self._twin.state_dict(), "steps": self._steps, "kept": self._kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes them over."""
        self._twin.load_state_dict(state["twin"])
        self._steps, self._kept = int(state["steps"]), state["kept"]
