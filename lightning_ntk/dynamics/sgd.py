"""`torch.optim.SGD` on quantities that depend linearly on the weights: modes of the kernel, coefficients, predictions."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from lightning_ntk.dynamics.filters import Filters, Start


class SGDSettings(NamedTuple):
    """What one step of `torch.optim.SGD` depends on, besides the gradient.

    Attributes:
        lr: Learning rate of the step.
        momentum: Factor of the momentum buffer.
        dampening: One minus the factor of the gradient that enters the buffer, from the second step on.
        nesterov: Whether the step goes along gradient + momentum * buffer.
        weight_decay: The decay rate gamma.
        maximize: Whether the loss is maximized.
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
        self.buffers: list[Tensor | None] = (
            [buffer.clone() for buffer in buffers] if buffers else [None] * len(self.values)
        )
        """The momentum buffers of the values, None before the first step with momentum."""

    def step(self, gradients: Sequence[Tensor], settings: SGDSettings) -> None:
        """One step along gradients with the shapes of the values, which it may overwrite; weight decay is added here."""
        options = settings._asdict()
        if options.pop("decoupled_weight_decay"):
            torch._foreach_mul_(self.values, 1 - settings.lr * options.pop("weight_decay"))
            options["weight_decay"] = 0.0
        # The function behind the class, whose bookkeeping costs more than a step on a thousand modes.
        sgd(self.values, list(gradients), self.buffers, foreach=True, **options)


class ModalSGD:
    r"""Full-batch SGD on a squared loss, mode by mode, with the settings that every step really used.

    The weights are :math:`w = \sum_j q_j e_j - J^\top U (\phi \tilde r + \sum_j \chi_j \tilde h_j)`, with carried vectors
    :math:`e_j` and :math:`h_j = J e_j`: the initial weights where they decay toward zero, the momentum buffer that the
    optimizer brought along. The gradient of the loss in these coordinates is

    .. math:: g_\phi = -c\,(1 - \lambda\phi), \quad g_{\chi_j} = -c\,(s_j - \lambda\chi_j), \quad g_{q_j} = 0

    with :math:`s_j = q_j - q_j(0)`; decay and momentum act on all of them as they act on the weights. No division, exact
    at :math:`\lambda = 0`, and O(m) operations a step.

    Args:
        eigenvalues: Eigenvalues for the residual and for every carried vector, each `(m,)` in float64.
        factor: c, the measured factor of the loss.
        starts: Where the carried vectors are at step 0.
    """

    def __init__(self, eigenvalues: Sequence[Tensor], factor: float, starts: Sequence[Start] = ()) -> None:
        self._eigenvalues = [values.clamp_min(0) for values in eigenvalues]
        self._factor = factor
        self._starts = [start.weight for start in starts]
        values = [torch.zeros_like(v) for v in self._eigenvalues]
        values += [torch.tensor([start.weight], dtype=torch.float64) for start in starts]
        buffers = None
        if any(start.buffer for start in starts):
            buffers = [torch.zeros_like(v) for v in self._eigenvalues]
            buffers += [torch.tensor([start.buffer], dtype=torch.float64) for start in starts]
        self._sgd = LinearSGD(values, buffers)

    def step(self, settings: SGDSettings) -> None:
        """One optimizer step with these settings."""
        values, scales = self.filters
        gradients = [
            (eigenvalues * values).sub_(drive).mul_(self._factor)
            for drive, eigenvalues, values in zip((1.0, *scales), self._eigenvalues, values, strict=True)
        ]
        self._sgd.step([*gradients, *(torch.zeros(1, dtype=torch.float64) for _ in scales)], settings)

    @property
    def filters(self) -> Filters:
        """The filters after the steps so far; later steps change their tensors in place."""
        values = self._sgd.values
        count = len(self._eigenvalues)
        scales = [value.item() - start for value, start in zip(values[count:], self._starts, strict=True)]
        return Filters(tuple(values[:count]), tuple(scales))
