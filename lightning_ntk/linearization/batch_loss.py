"""The loss of a linearized network on a batch, and its gradient.

Higher layers see network and loss through it alone.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_ntk.data.reference import unpack_pair
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.objective import Loss, Objective
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.utilities.representation import name_of, represent
from lightning_ntk.utilities.shapes import Float, Shaped


class BatchLoss(Protocol):
    """The loss of one batch as a function of the weights.

    The network is linearized at w0 or not.
    """

    @property
    def module(self) -> nn.Module:
        """The network."""

    @property
    def params(self) -> Tensors:
        """w0, the trainable parameters by name."""

    def gradient(self, batch: Any, tangent: Mapping[str, Tensor] | None = None) -> Tensors | None:
        """Computes the gradient for the linearized network at w0 + tangent.

        It has memory of its own. None for a batch without a loss.
        """

    def gradient_at(self, batch: Any, weights: Mapping[str, Tensor]) -> Tensors | None:
        """Computes the network's own gradient, at weights (and buffers) by name.

        None for a batch without a loss.
        """

    def state_dict(self) -> dict[str, Tensors]:
        """The tensors of the network, under "params", "frozen" and "buffers"."""


class PairLoss:
    r"""The loss of outputs and targets, with a batch made of inputs and targets.

    The gradient is :math:`J^\top \partial L / \partial f` at the outputs :math:`f_0 + J \delta`, in eval mode.

    Args:
        linearization: The network at w0.
        loss: Maps outputs and targets of a batch to one number.
        unpack: Maps a batch to `(inputs, target)`. Default: batches that are such pairs.
    """

    def __init__(self, linearization: Linearization, loss: Loss, *, unpack: Callable[[Any], Any] | None = None) -> None:
        self.linearization = linearization
        self.module = linearization.module
        self._loss = loss
        self._unpack = unpack or unpack_pair
        self._objective: Objective | None = None

    @property
    def params(self) -> Tensors:
        """w0, the trainable parameters by name."""
        return self.linearization.params

    def gradient(self, batch: Any, tangent: Mapping[str, Tensor] | None = None) -> Tensors:
        """The gradient for the linearized network at w0 + tangent.

        Raises:
            ValueError: If the loss refuses the outputs of the linearized network.
        """
        inputs, target = self._pair(batch)
        objective = self._prepared(self.linearization, inputs, target)

        def cotangent(outputs: Tensor, derivative: Tensor) -> Tensor:
            predictions = outputs.to(objective.dtype) + derivative
            return loss_gradient(objective, predictions, target)

        return self.linearization.predict_jvp_and_vjp(tangent, inputs, cotangent)

    def gradient_at(self, batch: Any, weights: Mapping[str, Tensor]) -> Tensors:
        """The gradient for the network itself, at weights by name."""
        inputs, target = self._pair(batch)
        network = self.linearization.at({name: weights[name] for name in self.params})
        objective = self._prepared(network, inputs, target)
        outputs = network.predict(inputs)
        return network.vjp(objective.gradient(outputs, objective.prepare(target, outputs)), inputs)

    def state_dict(self) -> dict[str, Tensors]:
        """The tensors of the network, under "params", "frozen" and "buffers"."""
        return self.linearization.state_dict()

    def _pair(self, batch: Any) -> tuple[Any, Tensor]:
        inputs, target = self._unpack(batch)
        if target is None:
            raise ValueError(
                "Expected batches with a target but got inputs alone. Give `unpack=lambda batch: (inputs, target)`."
            )
        return inputs, target

    def _prepared(self, network: Linearization, inputs: Any, target: Tensor) -> Objective:
        if self._objective is None:
            outputs = network.predict(inputs)
            self._objective = Objective(self._loss, outputs, target, flat=network.flat)
        return self._objective

    def __repr__(self) -> str:
        return represent(self, name_of(self._loss), repr(self.linearization))


def loss_gradient(
    objective: Objective, predictions: Float[Tensor, "B K"], target: Shaped[Tensor, "B ..."]
) -> Float[Tensor, "B K"]:
    """The gradient of the loss in the predictions of a linearized network, `(B, K)`.

    Raises:
        ValueError: If the loss refuses them.
    """
    if not predictions.isfinite().all():
        return torch.full_like(predictions, float("nan"))  # found by the step
    prepared = objective.prepare(target, predictions)
    try:
        return objective.gradient(predictions, prepared)
    except RuntimeError as error:
        raise ValueError(
            "Expected a loss that takes any outputs, because those of the linearized network leave the range of "
            f"a sigmoid or softmax, but it failed on outputs from {predictions.min():.3g} to {predictions.max():.3g}: "
            f"{error}. Use a loss of logits, such as nn.BCEWithLogitsLoss(), with a `predict` that returns them."
        ) from error
