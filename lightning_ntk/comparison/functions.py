"""Compares the trained, linearized and expanded networks on a data set.

The results are losses, outputs and accuracies.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from lightning_ntk.comparison.scalars import compare_functions, outputs_of
from lightning_ntk.training.problem import LinearizedProblem
from lightning_ntk.utilities.representation import represent
from lightning_ntk.utilities.shapes import Float64


class FunctionComparison(Protocol):
    """A data set on which functions are compared."""

    def __len__(self) -> int:
        """The number of samples."""

    @property
    def outputs(self) -> tuple[Float64[Tensor, "N K"], Float64[Tensor, "N K"]] | None:
        """Outputs of the trained and the linearized network, `(N, K)` each.

        They are those of the last comparison; None if they are not kept.
        """

    @property
    def fingerprint(self) -> str:
        """A string that identifies this data set."""

    def compare(
        self,
        weights: Mapping[str, Tensor],
        displacement: Mapping[str, Tensor],
        linearized: Mapping[str, Tensor],
        predictions: Float64[Tensor, "N K"] | None = None,
    ) -> dict[str, float]:
        """Compares trained weights (and buffers) w_t with the linearized network.

        Args:
            weights: w_t, and buffers, by name.
            displacement: w_t - w_0.
            linearized: w_lin - w_0.
            predictions: Outputs of the linearized network on the data set where they are known, `(N, K)`.
        """


class OutputComparison:
    """Compares functions by their outputs `(N, K)` on a data set.

    Passes are in eval mode and with the buffers of the capture.

    Args:
        problem: The network on the data set.
        taylor: Whether to expand the trained network around w0, at the cost of a forward-mode pass.
    """

    def __init__(self, problem: LinearizedProblem, *, taylor: bool = True) -> None:
        self.problem = problem
        self._taylor = taylor
        self.outputs: tuple[Float64[Tensor, "N K"], Float64[Tensor, "N K"]] | None = None

    def __len__(self) -> int:
        return len(self.problem.reference)

    @property
    def fingerprint(self) -> str:
        """A digest of the samples."""
        return self.problem.samples.fingerprint

    def compare(
        self,
        weights: Mapping[str, Tensor],
        displacement: Mapping[str, Tensor],
        linearized: Mapping[str, Tensor],
        predictions: Float64[Tensor, "N K"] | None = None,
    ) -> dict[str, float]:
        """Compares trained weights with the linearized network, see `FunctionComparison`."""
        trained = {name: weights[name] for name in self.problem.linearization.params}
        self.outputs = outputs_of(self.problem, trained, linearized, predictions)
        pushed = self.problem.push_forward(displacement).cpu() if self._taylor else None
        return compare_functions(self.problem, *self.outputs, pushed)

    def __repr__(self) -> str:
        return represent(self, f"{self.problem}")
