"""Weight vectors outside the span of D J^T that SGD carries along.

Examples are decaying initial weights and an older momentum buffer.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ntk.dynamics.filters import Start
from lightning_ntk.dynamics.sgd import Hyperparameters
from lightning_ntk.functional.weights import inner_product
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.training.base import LinearizedState
from lightning_ntk.training.problem import LinearizedProblem
from lightning_ntk.utilities.shapes import Float
from lightning_ntk.utilities.validation import require_matching


class OffSpanTerm(NamedTuple):
    """A fixed vector e of weights whose multiple the linearized weights hold.

    Attributes:
        start: Its coefficients at step 0, in the weights and in the momentum buffer.
        limit: The change of its coefficient in the weights until t = infinity.
        vector: D e, with the names and shapes of the weights, in float64.
        image: J D e, `(N, K)` in float64 on the CPU.
        norm: |D^(1/2) e|.
    """

    start: Start
    limit: float
    vector: Tensors
    image: Float[Tensor, "N K"]
    norm: float

    @classmethod
    def of(cls, problem: LinearizedProblem, vector: Mapping[str, Tensor], start: Start, limit: float) -> "OffSpanTerm":
        """Makes the term of a vector e, with one Jacobian-vector product.

        It copies e, which an optimizer changes in place.
        """
        device = problem.linearization.device
        copied = {name: value.detach().to(device, torch.float64, copy=True) for name, value in vector.items()}
        scaled = problem.scaled(copied)
        image = problem.push_forward(scaled).cpu().double()
        return cls(start, limit, scaled, image, math.sqrt(inner_product(copied, scaled)))


def off_span_terms(
    problem: LinearizedProblem, hyperparameters: Hyperparameters, momentum_buffers: Mapping[str, Tensor] | None
) -> tuple[OffSpanTerm, ...]:
    """The terms that training with these hyperparameters, and momentum buffers at step 0, needs.

    Raises:
        ValueError: If weight decay meets unequal learning rates, or if there are buffers without momentum or of other
            names or shapes than the weights.
    """
    template, weights = hyperparameters.template, problem.linearization.params
    if template.weight_decay != 0 and not problem.freezes_only:
        raise ValueError(
            f"Expected no weight decay with learning rates that differ between parameters but got {template.weight_decay}: "
            'weights that shrink at different rates leave the modes of the kernel. Use dynamics="twin", which trains the '
            "linearized network itself."
        )
    terms = []
    if hyperparameters.decays_to_zero:
        # An optimizer skips what the outputs do not depend on, as it has no gradient.
        unused = problem.linearization.unused(problem.reference.read(0, 1).inputs)
        decaying = {name: torch.zeros_like(w) if name in unused else w for name, w in weights.items()}
        terms.append(OffSpanTerm.of(problem, decaying, Start(1.0, 0.0), -1.0))
    if momentum_buffers is not None:
        buffers, momentum = require_matching(momentum_buffers, weights), template.momentum
        if momentum == 0:
            raise ValueError("Expected `momentum` above 0 where `momentum_buffers` are given but got 0.")
        limit = 0.0
        if hyperparameters.constant and template.weight_decay == 0 and momentum < 1:
            along = momentum**2 if template.nesterov else momentum
            limit = -hyperparameters.settings(0).lr * along / (1 - momentum)
        terms.append(OffSpanTerm.of(problem, buffers, Start(0.0, 1.0), limit))
    return tuple(terms)


def displacement(problem: LinearizedProblem, terms: Sequence[OffSpanTerm], state: LinearizedState) -> Tensors:
    """Computes w_lin - w0 of one state, in one pass over the data.

    The result is by parameter name, in float64.
    """
    return {name: value[0] for name, value in displacements(problem, terms, [state]).items()}


def displacements(
    problem: LinearizedProblem, terms: Sequence[OffSpanTerm], states: Sequence[LinearizedState]
) -> Tensors:
    """Computes w_lin - w0 of T states.

    Every parameter has a tensor `(T, *shape)` in float64. It takes one forward and T backward passes.
    """
    stacked = problem.pull_back(torch.stack([state.coefficients for state in states]))
    for index, term in enumerate(terms):
        scales = torch.tensor([state.scales[index] for state in states], dtype=torch.float64)
        for name, vector in term.vector.items():
            stacked[name] = stacked[name] + scales.to(vector).reshape(-1, *[1] * vector.dim()) * vector
    return stacked
