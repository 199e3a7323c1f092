"""`torch.optim.SGD` on quantities that depend linearly on the weights: modes of the kernel, coefficients, predictions."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import SGD


class SGDSettings(NamedTuple):
    """What one step of `torch.optim.SGD` depends on, besides the gradient.

    Attributes:
        lr: Learning rate of the step.
        momentum: Factor of the momentum buffer.
        dampening: One minus the factor of the gradient that enters the buffer, from the second step on.
        nesterov: Whether the step goes along gradient + momentum * buffer.
        weight_decay: The decay rate gamma.
        maximize: Whether the loss is maximised.
        decoupled_weight_decay: Whether the weights are multiplied by 1 - lr * gamma before the step, instead of adding
            gamma * w to the gradient.
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    maximize: bool = False
    decoupled_weight_decay: bool = False

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "SGDSettings":
        """The settings in a parameter group of an optimizer."""
        return cls(
            lr=float(group["lr"]),
            momentum=float(group.get("momentum", 0.0)),
            dampening=float(group.get("dampening", 0.0)),
            nesterov=bool(group.get("nesterov", False)),
            weight_decay=float(group.get("weight_decay", 0.0)),
            maximize=bool(group.get("maximize", False)),
        )


class LinearSGD:
    """The recurrence of SGD on linear images of the weights, by `torch.optim.SGD` itself.

    Decay, momentum and learning rate act on every linear image of the weights as they act on the weights, so that the optimizer
    that steps the weights steps their coefficients too, in whatever space these are.

    Args:
        values: Tensors that are updated in place.
        buffers: Momentum buffers of the values, if the optimizer has stepped before.
    """

    def __init__(self, values: Sequence[Tensor], buffers: Sequence[Tensor] | None = None) -> None:
        self.values = list(values)
        self._optimizer = SGD(self.values, lr=0.0, foreach=True)
        for value, buffer in zip(self.values, buffers or (), strict=False):
            self._optimizer.state[value]["momentum_buffer"] = buffer.clone()

    def step(self, gradients: Sequence[Tensor], settings: SGDSettings) -> None:
        """One step along gradients with the shapes of the values; weight decay is added here."""
        options = settings._asdict()
        if options.pop("decoupled_weight_decay"):
            decay = 1 - settings.lr * options.pop("weight_decay")
            for value in self.values:
                value.mul_(decay)
        self._optimizer.param_groups[0].update({"weight_decay": 0.0} | options)
        for value, gradient in zip(self.values, gradients, strict=True):
            value.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()

    @property
    def buffers(self) -> list[Tensor] | None:
        """Momentum buffers of the values, None before the first step with momentum."""
        buffers = [self._optimizer.state[value].get("momentum_buffer") for value in self.values]
        return None if any(buffer is None for buffer in buffers) else buffers


class GradientDescent:
    r"""Full-batch gradient descent, advanced step by step with the learning rates really used.

    The filter of a mode obeys :math:`\phi \leftarrow \phi + \eta_s (1 - \lambda \phi)`: no division, exact at zero, and
    O(m) operations a step.

    Args:
        eigenvalues: Eigenvalues of the kernel, `(m,)` in float64.
        factor: c, the measured factor of the loss.
    """

    def __init__(self, eigenvalues: Tensor, factor: float) -> None:
        self._eigenvalues = eigenvalues.clamp_min(0)
        self._factor = factor
        self.filter = eigenvalues.new_zeros(eigenvalues.shape)

    def step(self, lr: float) -> None:
        """One optimizer step with this learning rate."""
        self.filter = self.filter + lr * self._factor * (1 - self._eigenvalues * self.filter)
