"""Vectors of weights that linearized SGD carries along besides J^T a: decaying initial weights, an older momentum buffer."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ntk.dynamics.filters import Start
from lightning_ntk.dynamics.sgd import Hyperparameters
from lightning_ntk.functional.weights import norm
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.training.problem import Capture
from lightning_ntk.training.scaling import Scaling


class CarriedVector(NamedTuple):
    """A vector e of weights whose multiple the linearized weights hold.

    Attributes:
        start: Its coefficients at step 0.
        limit: What its coefficient in the weights changes by until t = infinity.
        vector: e, with the names and shapes of the weights, in float64.
        image: h = J e, `(N, K)` in float64 on the CPU.
        norm: |e|.
    """

    start: Start
    limit: float
    vector: Tensors
    image: Tensor
    norm: float


def carried_vectors(
    capture: Capture,
    hyperparameters: Hyperparameters,
    momentum_buffers: Mapping[str, Tensor] | None,
    scaling: Scaling | None = None,
) -> tuple[CarriedVector, ...]:
    """What has to be carried, each for one pass of Jacobian-vector products.

    Args:
        capture: The network at w0.
        hyperparameters: Those of the run.
        momentum_buffers: The buffers that the optimizer has at step 0, by parameter.
        scaling: The coordinates to carry them in.

    Raises:
        ValueError: If there are buffers without momentum, or of other names or shapes than the weights.
    """
    weights, carried = capture.initial_weights, []
    if hyperparameters.decays_to_zero:
        carried.append(_carried(capture, scaling, decaying_weights(capture), Start(1.0, 0.0), -1.0))
    if momentum_buffers is not None:
        shapes = {name: tuple(value.shape) for name, value in momentum_buffers.items()}
        expected = {name: tuple(value.shape) for name, value in weights.items()}
        if shapes != expected:
            differing = sorted(n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n))
            raise ValueError(
                f"Expected argument `momentum_buffers` to hold one tensor of its shape for every trainable parameter but it "
                f"differs for {differing}."
            )
        template = hyperparameters.template
        momentum = template.momentum
        if momentum == 0:
            raise ValueError("Expected `momentum` above 0 where `momentum_buffers` are given but got 0.")
        if hyperparameters.constant and template.weight_decay == 0 and momentum < 1:
            along = momentum**2 if template.nesterov else momentum
            limit = -hyperparameters.settings(0).lr * along / (1 - momentum)
        else:
            limit = 0.0
        carried.append(_carried(capture, scaling, momentum_buffers, Start(0.0, 1.0), limit))
    return tuple(carried)


def decaying_weights(capture: Capture) -> Tensors:
    """w0, with zeros for the parameters that the outputs do not depend on: without a gradient an optimizer leaves them alone."""
    unused = capture.linearization.unused(capture.reference.read(0, 1).inputs)
    return {name: torch.zeros_like(w) if name in unused else w for name, w in capture.initial_weights.items()}


def _carried(
    capture: Capture, scaling: Scaling | None, vector: Mapping[str, Tensor], start: Start, limit: float
) -> CarriedVector:
    # Copies: an optimizer changes its buffers in place.
    copies = {name: value.detach().to(torch.float64, copy=True) for name, value in vector.items()}
    if scaling is not None:
        capture, copies = scaling.capture, scaling.of_gradients(copies)
    return CarriedVector(start, limit, copies, capture.push_forward(copies).cpu().double(), norm(copies))
