"""From filters of the modes to predictions and weights."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ntk.dynamics.filters import Filters
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.solvers.base import Modes
from lightning_ntk.training.carried import CarriedVector
from lightning_ntk.training.problem import Capture


class LinearizedState(NamedTuple):
    """The linearized network at one time, in function space.

    Attributes:
        coefficients: a, `(N, K)` in float64 on the CPU; the weights are `w0 + J^T a`, and what is carried along.
        predictions: Outputs on the training set, `(N, K)` in float64 on the CPU.
        scales: The change of the coefficient of every vector that is carried along: the initial weights where they decay,
            the momentum buffer of a late start. Usually none.
    """

    coefficients: Tensor
    predictions: Tensor
    scales: tuple[float, ...] = ()


class Readout:
    """What filters say about the network.

    Args:
        capture: The network at w0.
        carried: The vectors that the weights carry along.
    """

    def __init__(self, capture: Capture, carried: Sequence[CarriedVector]) -> None:
        self._capture = capture
        self._carried = carried

    def state(self, modes: Sequence[Modes], filters: Filters) -> LinearizedState:
        """The state that filters of the residual and of the carried vectors give.

        Raises:
            ValueError: If the filters are of other modes, for Lanczos of those before an extension.
            OverflowError: If they are not finite, because the dynamics have diverged.
        """
        expected, got = [m.eigenvalues.shape for m in modes], [v.shape for v in filters.values]
        if expected != got:
            raise ValueError(
                f"Expected filters of {[shape.numel() for shape in expected]} modes but got {[s.numel() for s in got]}: the "
                "modes were extended since, read the filters of the followed run again."
            )
        pairs = list(zip(modes, filters.values, strict=True))
        coefficients = torch.stack([m.coefficients(values) for m, values in pairs]).sum(0)
        if not coefficients.isfinite().all():
            raise OverflowError(
                "The linearized network has diverged beyond floating-point numbers: the learning rate is above the largest "
                "stable one, `max_learning_rate`."
            )
        shape = self._capture.predictions.shape
        change = torch.stack([m.prediction_change(values) for m, values in pairs]).sum(0).reshape(shape)
        for scale, carried in zip(filters.scales, self._carried, strict=True):
            change = change + scale * carried.image
        return LinearizedState(
            coefficients.reshape(shape), self._capture.predictions.cpu().double() + change, filters.scales
        )

    def displacements(self, states: Sequence[LinearizedState]) -> Tensors:
        """w_lin - w0 of T states, for every parameter `(T, *shape)` in float64: one forward, T backward passes."""
        stacked = self._capture.pull_back(torch.stack([state.coefficients for state in states]))
        for index, carried in enumerate(self._carried):
            scales = torch.tensor([state.scales[index] for state in states], dtype=torch.float64)
            for name, value in carried.vector.items():
                stacked[name] = stacked[name] + scales.to(value).reshape(-1, *[1] * value.dim()) * value
        return stacked
