"""The hyperparameters of a whole run of `torch.optim.SGD`, constant but for the learning rate."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from lightning_ntk.dynamics.sgd import SGDSettings

LearningRate: TypeAlias = float | Sequence[float] | Callable[[int], float]
Decay = Literal["coupled", "decoupled", "initial"]


@dataclass(frozen=True)
class Hyperparameters:
    """What `torch.optim.SGD` is constructed with, and the learning rate of every step.

    Attributes:
        lr: A constant, one value for each step, or a function of the step, which counts from 0.
        momentum: As for `torch.optim.SGD`.
        dampening: As for `torch.optim.SGD`.
        nesterov: As for `torch.optim.SGD`.
        weight_decay: As for `torch.optim.SGD`.
        decay: "coupled" adds weight_decay * w to the gradient; "decoupled" multiplies the weights by 1 - lr * weight_decay;
            "initial" adds weight_decay * (w - w0).
        maximize: As for `torch.optim.SGD`.

    Raises:
        ValueError: If `torch.optim.SGD` would not take a value.
    """

    lr: LearningRate
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decay: Decay = "coupled"
    maximize: bool = False

    def __post_init__(self) -> None:
        if hasattr(self.lr, "tolist"):  # tensors and arrays
            object.__setattr__(self, "lr", self.lr.tolist())
        if isinstance(self.lr, Sequence):
            object.__setattr__(self, "lr", tuple(_require_rate(value) for value in self.lr))
        elif not callable(self.lr):
            object.__setattr__(self, "lr", _require_rate(self.lr))
        for name in ("momentum", "dampening", "weight_decay"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value)):
                raise ValueError(f"Expected argument `{name}` to be a finite number but got {value!r}.")
        for name in ("momentum", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"Expected argument `{name}` to be at least 0 but got {getattr(self, name)!r}.")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                "Expected a momentum above 0 and no dampening with `nesterov=True`, as torch.optim.SGD does, but got "
                f"momentum {self.momentum} and dampening {self.dampening}."
            )

    @property
    def constant(self) -> bool:
        """Whether all steps have the same settings."""
        return isinstance(self.lr, float)

    @property
    def steps(self) -> float:
        """Steps for which there is a learning rate, infinitely many unless it is a sequence."""
        return len(self.lr) if isinstance(self.lr, Sequence) else math.inf

    @property
    def decays_to_zero(self) -> bool:
        """Whether the initial weights themselves shrink."""
        return self.weight_decay > 0 and self.decay != "initial"

    def settings(self, step: int) -> SGDSettings:
        """The settings of a step, the first of which is step 0.

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
        return SGDSettings(
            rate, float(self.momentum), float(self.dampening), self.nesterov, float(self.weight_decay), self.maximize,
            self.decay == "decoupled",
        )  # fmt: skip

    @property
    def shape(self) -> SGDSettings:
        """The settings that all steps share, with a learning rate of 0."""
        return replace(self, lr=0.0).settings(0)


def _require_rate(value: object) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__") or not 0 <= float(value) < math.inf:
        raise ValueError(
            "Expected argument `lr` to be a finite number, at least 0, or a sequence or function of the step that gives such "
            f"numbers, but got {value!r}."
        )
    return float(value)
