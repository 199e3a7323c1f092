"""`torch.optim.SGD` on quantities that depend linearly on the weights.

Examples are modes of the kernel, coefficients and predictions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from lightning_ntk.dynamics.filters import Filters, Start
from lightning_ntk.utilities.shapes import Float64

LearningRate: TypeAlias = float | Sequence[float] | Callable[[int], float]
Decay = Literal["coupled", "decoupled", "initial"]


class SGDSettings(NamedTuple):
    """The settings of one step of `torch.optim.SGD`.

    Attributes:
        lr: The learning rate of the step.
        momentum: The factor of the momentum buffer.
        dampening: One minus the factor of the gradient that enters the buffer, from the second step on.
        nesterov: Whether the step goes along gradient + momentum * buffer.
        weight_decay: The decay rate gamma.
        decoupled_weight_decay: Whether the weights are multiplied by 1 - lr * gamma before the step, instead of adding
            gamma * w to the gradient.
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "SGDSettings":
        """Reads the settings from a parameter group of an optimizer.

        What the group lacks keeps its default.
        """
        types = cls.__annotations__
        return cls(**{name: types[name](group[name]) for name in SGD_OPTIONS if name in group})

    @property
    def gain(self) -> float:
        """The factor of a gradient in the step, from the second step on.

        Dampening acts with momentum only.
        """
        return 1 - self.dampening if self.momentum else 1.0


SGD_OPTIONS = SGDSettings._fields[:-1]
"""The settings that a parameter group of `torch.optim.SGD` holds, under the same names."""


@dataclass(frozen=True)
class Hyperparameters:
    """The settings of a whole run of SGD, constant except for the learning rate.

    Attributes:
        lr: A constant, one value for each step, or a function of the step, which counts from 0.
        template: The settings that all steps share; its learning rate has no meaning.
        decays_to_initial: Whether the weights decay toward w0 instead of zero: the gradient has gamma * (w - w0) in it.

    Raises:
        ValueError: If `torch.optim.SGD` would refuse a value.
    """

    lr: LearningRate
    template: SGDSettings
    decays_to_initial: bool = False

    def __post_init__(self) -> None:
        if hasattr(self.lr, "tolist"):  # tensors and arrays
            object.__setattr__(self, "lr", self.lr.tolist())
        if isinstance(self.lr, Sequence):
            object.__setattr__(self, "lr", tuple(_require_rate(value) for value in self.lr))
        elif not callable(self.lr):
            object.__setattr__(self, "lr", _require_rate(self.lr))
        momentum, dampening = self.template.momentum, self.template.dampening
        for name, value in self.template._asdict().items():
            if not (isinstance(value, int | float) and math.isfinite(value)):
                raise ValueError(f"Expected argument `{name}` to be a finite number but got {value!r}.")
            if name != "dampening" and value < 0:
                raise ValueError(f"Expected argument `{name}` to be at least 0 but got {value!r}.")
        if self.template.nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(
                "Expected a momentum above 0 and no dampening with `nesterov=True`, as torch.optim.SGD does, but got "
                f"momentum {momentum} and dampening {dampening}."
            )

    @property
    def constant(self) -> bool:
        """Whether all steps have the same settings."""
        return isinstance(self.lr, float)

    @property
    def steps(self) -> float:
        """The number of steps for which there is a learning rate.

        It is infinite unless the learning rate is a sequence.
        """
        return len(self.lr) if isinstance(self.lr, Sequence) else math.inf

    @property
    def decays(self) -> bool:
        """Whether steps may have weight decay."""
        return self.template.weight_decay > 0 or self.decays_to_initial

    @property
    def decays_to_zero(self) -> bool:
        """Whether the initial weights themselves shrink."""
        return self.template.weight_decay > 0 and not self.decays_to_initial

    def settings(self, step: int) -> SGDSettings:
        """The settings of a step; the first is step 0.

        Raises:
            ValueError: If there is no learning rate for it, or one that no optimizer would take.
        """
        if isinstance(self.lr, Sequence):
            if step >= len(self.lr):
                raise ValueError(
                    f"Expected `t` to be at most {len(self.lr)}, the number of learning rates in `lr`, but got {step + 1}."
                )
            rate = self.lr[step]
        else:
            rate = _require_rate(self.lr(step)) if callable(self.lr) else self.lr
        return self.template._replace(lr=rate)


class LinearSGD:
    """SGD on linear images of the weights, by `torch.optim.SGD` itself.

    Decay, momentum and learning rate act on every linear image of the weights as they act on the weights. The optimizer that
    steps the weights therefore steps their coefficients too, in whatever space these are.

    Args:
        values: Tensors that are updated in place.
        buffers: The momentum buffers of the values, if the optimizer has stepped before.
    """

    def __init__(self, values: Sequence[Tensor], buffers: Sequence[Tensor] | None = None) -> None:
        self.values = list(values)
        self.buffers: list[Tensor | None] = (
            [buffer.clone() for buffer in buffers] if buffers else [None] * len(self.values)
        )
        """The momentum buffers of the values, None before the first step with momentum."""

    def step(self, gradients: Sequence[Tensor], settings: SGDSettings) -> None:
        """Takes one step along gradients with the shapes of the values.

        It may overwrite the gradients, and adds weight decay itself.
        """
        options = settings._asdict()
        if options.pop("decoupled_weight_decay"):
            torch._foreach_mul_(self.values, 1 - settings.lr * options.pop("weight_decay"))
            options["weight_decay"] = 0.0
        # The function behind the class, whose bookkeeping costs more than a step on a thousand modes.
        sgd(self.values, list(gradients), self.buffers, foreach=True, maximize=False, **options)


class ModalSGD:
    r"""Full-batch SGD on a squared loss, mode by mode.

    It uses the settings of each step.

    The weights are :math:`w = \sum_j q_j e_j - J^\top U (\phi \tilde r + \sum_j \chi_j \tilde h_j)`, with carried vectors
    :math:`e_j` and :math:`h_j = J e_j`: the initial weights where they decay toward zero, and the momentum buffer that the
    optimizer brought along. The gradient of the loss in these coordinates is

    .. math:: g_\phi = -c\,(1 - \lambda\phi), \quad g_{\chi_j} = -c\,(s_j - \lambda\chi_j), \quad g_{q_j} = 0

    with :math:`s_j = q_j - q_j(0)`; decay and momentum act on all of them as they act on the weights. No division, exact
    at :math:`\lambda = 0`, and O(m) operations a step.

    Their derivatives in :math:`\lambda`, which error bounds need, follow from the derivative of the gradient:
    :math:`c\,(\phi + \lambda\phi')`.

    Args:
        eigenvalues: The eigenvalues for the residual and for every carried vector, each `(m,)` in float64.
        factor: The measured factor c of the loss.
        starts: The coefficients of the carried vectors at step 0.
        with_slopes: Whether to follow the derivatives too.
    """

    def __init__(
        self,
        eigenvalues: Sequence[Float64[Tensor, "_"]],
        factor: float,
        starts: Sequence[Start] = (),
        *,
        with_slopes: bool = False,
    ) -> None:
        self._eigenvalues = [values.clamp_min(0) for values in eigenvalues]
        self._factor = factor
        self._starts = [start.weight for start in starts]
        modes = self._eigenvalues * (2 if with_slopes else 1)
        values = [torch.tensor([start.weight], dtype=torch.float64) for start in starts]
        values += [torch.zeros_like(v) for v in modes]
        buffers = None
        if any(start.buffer for start in starts):
            buffers = [torch.tensor([start.buffer], dtype=torch.float64) for start in starts]
            buffers += [torch.zeros_like(v) for v in modes]
        self._sgd = LinearSGD(values, buffers)

    def step(self, settings: SGDSettings) -> None:
        """One optimizer step with these settings."""
        values, scales = self.filters
        gradients = [torch.zeros(1, dtype=torch.float64) for _ in scales]
        gradients += [
            (eigenvalues * value).sub_(drive).mul_(self._factor)
            for drive, eigenvalues, value in zip((1.0, *scales), self._eigenvalues, values, strict=True)
        ]
        gradients += [
            (eigenvalues * slope).add_(value).mul_(self._factor)
            for slope, eigenvalues, value in zip(self.slopes, self._eigenvalues, values, strict=False)
        ]
        self._sgd.step(gradients, settings)

    @property
    def filters(self) -> Filters:
        """The filters after the steps so far; later steps change their tensors in place."""
        values, carried = self._sgd.values, len(self._starts)
        scales = [value.item() - start for value, start in zip(values[:carried], self._starts, strict=True)]
        return Filters(tuple(values[carried : carried + len(self._eigenvalues)]), tuple(scales))

    @property
    def slopes(self) -> list[Float64[Tensor, "_"]]:
        """The derivatives of the filters after the steps so far.

        Later steps change these tensors in place.
        """
        return self._sgd.values[len(self._starts) + len(self._eigenvalues) :]


def _require_rate(value: object) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__") or not 0 <= float(value) < math.inf:
        raise ValueError(
            "Expected argument `lr` to be a finite number, at least 0, or a sequence or function of the step that gives such "
            f"numbers, but got {value!r}."
        )
    return float(value)
