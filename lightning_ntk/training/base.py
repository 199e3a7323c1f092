"""What every linearized training has in common."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.optim import Optimizer

from lightning_ntk.utilities.representation import represent_fields
from lightning_ntk.utilities.shapes import Float64


class LinearizedState(NamedTuple):
    """The linearized network at one time, in function space.

    Attributes:
        coefficients: a, `(N, K)` in float64 on the CPU. The weights are `w0 + D J^T a` plus the off-span terms.
        predictions: Outputs on the training set, `(N, K)` in float64 on the CPU.
        scales: The coefficients of the off-span terms, which are the initial weights where they decay and the momentum
            buffer of a late start. Usually there are none.
    """

    coefficients: Float64[Tensor, "N K"]
    predictions: Float64[Tensor, "N K"]
    scales: tuple[float, ...] = ()

    def __repr__(self) -> str:
        return represent_fields(self, self._fields)


class StepSettings(NamedTuple):
    """What an optimizer step depends on besides its gradient.

    Attributes:
        groups: The optimizer's parameter groups as they were when it stepped.
        clip_norm: Largest norm of the gradient, or None.
        clip_value: Largest element of the gradient, or None.
        frozen: Names of the parameters that had no gradient.
        at_zero: Names of frozen parameters whose gradient is kept and is zero: their momentum and decay go on.
        gradient_factor: The factor that the run gave its gradient after the backward pass, before clipping.
    """

    groups: Sequence[Mapping[str, Any]]
    clip_norm: float | None = None
    clip_value: float | None = None
    frozen: Collection[str] = ()
    at_zero: Collection[str] = ()
    gradient_factor: float = 1.0

    @classmethod
    def of(
        cls,
        optimizer: Optimizer,
        parameters: Mapping[str, Tensor],
        *,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> "StepSettings":
        """Reads the settings of an optimizer's coming step, for live parameters by name."""
        return cls(
            [dict(group) for group in optimizer.param_groups],
            clip_norm,
            clip_value,
            [name for name, parameter in parameters.items() if parameter.grad is None],
            [
                name
                for name, parameter in parameters.items()
                if not parameter.requires_grad and parameter.grad is not None and not parameter.grad.any()
            ],
        )

    def __repr__(self) -> str:
        return represent_fields(self, self._fields)


class OnlineTraining(Protocol):
    """A linearized network that trains step by step beside a run."""

    dynamics: str
    """The name of the dynamics, as `LinearizationMonitor` takes it."""

    def accumulate(self, batch: Any, *, scale: float = 1.0) -> None:
        """Adds the gradient of one batch, times `scale`, to the next step's gradient."""

    def step(self, settings: StepSettings) -> None:
        """Takes one optimizer step along the accumulated gradient, which is then forgotten."""

    def discard(self) -> None:
        """Forgets the accumulated gradient: the optimizer did not step."""

    def displacement(self) -> Mapping[str, Tensor]:
        """Computes w_lin - w0 after the steps so far, by parameter name in float64."""

    def predictions(self) -> Float64[Tensor, "N K"] | None:
        """Computes the outputs on the training set, `(N, K)`.

        They are in float64 on the CPU; None where they would take a pass.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run continues from: tensors, numbers, dicts and lists."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned, whose tensors may be on any device."""
