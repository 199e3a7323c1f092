r"""The time at which a linearized network is closest to given weights.

With :math:`\Delta = w - w_0` and one pass :math:`J\Delta`, the distance to the linearized weights
:math:`w_0 + \sum_j s_j e_j + J^\top a` at every time costs products with vectors of N K numbers only:

.. math:: D^2 = a^\top \Theta a + 2 a^\top \Big(\sum_j s_j h_j - J\Delta\Big) + \Big|\sum_j s_j e_j - \Delta\Big|^2

It cancels where D is small, so that it serves the search; the distance found is that of formed weights.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ntk.functional.weights import difference, inner_product, norm
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.solvers.eigh import CompleteModes
from lightning_ntk.training.base import LinearizedState
from lightning_ntk.training.modal import ModalTraining
from lightning_ntk.training.off_span import displacements
from lightning_ntk.utilities.validation import require_matching

# Times of the first look: all whole ones up to here, then this many for each factor of ten.
_FIRST_TIMES = 64
_TIMES_PER_DECADE = 16
# Times between two neighbors of the best one, again and again until nothing lies between.
_TIMES_BETWEEN = 32
_FLOW_REFINEMENTS = 8
# Training is over when the slowest mode has lost e^-40 of its residual.
_LAST_EXPONENT = 40.0
# Of a vector that others span, rounding leaves a smaller share than this.
_DEPENDENT = 1e-6


class ClosestTime(NamedTuple):
    """Where a linearized trajectory is closest to given weights.

    Attributes:
        time: Optimizer steps, infinite for the limit of training.
        distance: The distance of the weights there.
        in_span: The share of |w - w0| that lies in the span of J^T, or None without all modes of the kernel.
        floor: The least distance from w - w0 of all w0 + J^T a plus multiples of the off-span terms, relative to |w - w0|: no
            time can go under it. None as well without all modes.
    """

    time: float
    distance: float
    in_span: float | None
    floor: float | None


def find_closest(training: ModalTraining, displacement: Mapping[str, Tensor], until: float | None) -> ClosestTime:
    """Finds the time when linearized training is closest to w0 + displacement.

    Times are in [0, until]; see `LinearizedTraining.closest`.
    """
    problem, last = training.modal.problem, training.last_time if until is None else until
    if last is None or (last == math.inf and not training.has_closed_form(1)):
        raise ValueError(
            f"Expected argument `until` to be the last step to look at but got {until}: this training has no end of its own, "
            "and takes as many steps to look at."
        )
    training.require_time(last)
    if not problem.freezes_only:
        raise ValueError(
            "Expected equal learning rates, or frozen parameters, for the closest time but got `lr_scales` "
            f"{problem.lr_scales}: the distance is no function of the kernel's modes then."
        )
    matching = require_matching(displacement, problem.linearization.params, "a displacement")
    displaced = {name: value.detach().double() for name, value in matching.items()}
    for name, value in displaced.items():
        if not value.isfinite().all():
            raise ValueError(f"Expected a finite displacement but that of `{name}` has NaN or infinity.")
    squared = _SquaredDistance(training, displaced)
    time, state = _closest_time(squared, training, last)
    projections = squared.projections(problem.linearization.dtype)
    projected = [LinearizedState(each, state.predictions, (0.0,) * len(state.scales)) for each in projections]
    stacked = displacements(problem, training.modal.terms, [state, *projected])
    nearest, *inside = ({name: value[i] for name, value in stacked.items()} for i in range(1 + len(projected)))
    distance, moved = norm(difference(displaced, nearest)), math.sqrt(squared.square)
    if not inside:
        return ClosestTime(time, distance, None, None)
    if moved == 0:
        return ClosestTime(time, distance, 1.0, 0.0)
    carried = [difference(term.vector, part) for term, part in zip(training.modal.terms, inside[1:], strict=True)]
    # In float32, rounding along modes of small eigenvalues may leave more of the vectors than the nearest time does.
    outside = min(distance, _norm_outside(difference(displaced, inside[0]), carried))
    return ClosestTime(time, distance, min(1.0, norm(inside[0]) / moved), outside / moved)


def _norm_outside(vector: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]]) -> float:
    """The norm of a vector without its projection on the span of others, by Gram-Schmidt."""
    basis: list[Tensors] = []
    for other in others:
        rest = _without(other, basis)
        if (left := norm(rest)) > _DEPENDENT * norm(other):
            basis.append({name: value / left for name, value in rest.items()})
    return norm(_without(vector, basis))


def _without(vector: Mapping[str, Tensor], basis: Sequence[Tensors]) -> Mapping[str, Tensor]:
    for axis in basis:
        share = inner_product(axis, vector)
        vector = {name: value - share * axis[name] for name, value in vector.items()}
    return vector


class _SquaredDistance:
    """The squared distance from w0 + displacement to the linearized weights."""

    def __init__(self, training: ModalTraining, displacement: Tensors) -> None:
        problem, self._modal = training.modal.problem, training.modal
        self._start = problem.predictions.cpu().double()
        self.square = inner_product(displacement, displacement)
        self.image = problem.push_forward(problem.scaled(displacement)).cpu().double()
        vectors = [term.vector for term in self._modal.terms]
        self._along = torch.tensor([inner_product(v, displacement) for v in vectors], dtype=torch.float64)
        gram = [[inner_product(v, w) for w in vectors] for v in vectors]
        self._gram = torch.tensor(gram, dtype=torch.float64).reshape(len(vectors), len(vectors))

    def __call__(self, state: LinearizedState) -> float:
        """D^2, which rounding may put below zero."""
        scales = torch.tensor(state.scales, dtype=torch.float64)
        images = [scale * term.image for scale, term in zip(state.scales, self._modal.terms, strict=True)]
        carried = sum(images, torch.zeros(()))
        change = state.predictions - self._start - carried
        quadratic = (state.coefficients * (change + 2 * (carried - self.image))).sum()
        return (quadratic + scales @ self._gram @ scales - 2 * scales @ self._along).item() + self.square

    def projections(self, dtype: torch.dtype) -> list[Tensor]:
        """The coefficients a of the projections J^T a of the displacement and of the off-span terms, each `(N, K)`.

        There are none without all modes of the kernel.
        """
        if not isinstance(self._modal.solver, CompleteModes):
            return []
        modes = self._modal.solver.modes[0]
        kept = modes.eigenvalues > modes.cutoff(dtype)
        basis, eigenvalues = modes.basis[:, kept], modes.eigenvalues[kept].to(modes.basis)
        images = [self.image, *(term.image for term in self._modal.terms)]
        found = [basis @ (basis.T @ image.flatten().to(basis) / eigenvalues) for image in images]
        return [each.cpu().view_as(self.image) for each in found]


def _closest_time(
    squared_distance: _SquaredDistance, training: ModalTraining, until: float
) -> tuple[float, LinearizedState]:
    """The time in [0, until] of the least distance, and the state there.

    The search takes a logarithmic grid, then times between the neighbors of the best one, until none is left. It may
    miss a minimum that is narrower than a sixth of its time.
    """
    whole = training.dynamics == "gradient_descent" or not training.hyperparameters.constant
    squares: dict[float, float] = {}

    def look(times: Sequence[float]) -> float:
        for t in times:
            if t not in squares:
                squares[t] = squared_distance(training.state(t))
        best = min(squares, key=lambda t: squares[t])
        # Late times that rounding cannot tell from the limit are the limit, unless it is where training starts.
        unresolved = 4 * torch.finfo(torch.float64).eps * squared_distance.square
        moves = squares[0.0] - squares[best] > unresolved
        return math.inf if moves and squares.get(math.inf, math.inf) - squares[best] <= unresolved else best

    shortest, longest = training.time_scales()
    grid = _grid(min(until, _LAST_EXPONENT * longest), 1.0 if whole else 1e-3 * shortest, whole=whole)
    best = look([*grid, until] if until == math.inf or not whole else [*grid, math.floor(until)])
    refinements = 0
    while best != math.inf and (whole or refinements < _FLOW_REFINEMENTS):
        known = sorted(squares)
        index = known.index(best)
        low, high = known[max(index - 1, 0)], known[min(index + 1, len(known) - 1)]
        high = grid[-1] if high == math.inf else high
        new = [t for t in _between(low, high, whole=whole) if t not in squares]
        if not new:
            break
        best = look(new)
        refinements += 1
    return best, training.state(best)


def _grid(last: float, first: float, *, whole: bool) -> list[float]:
    last = float(math.floor(last)) if whole else last
    times = [float(t) for t in range(int(min(last, _FIRST_TIMES)) + 1)] if whole else [0.0]
    if last >= first:
        decades = math.log10(last / first)
        count = max(2, math.ceil(decades * _TIMES_PER_DECADE) + 1)
        later = [first * 10 ** (decades * i / (count - 1)) for i in range(count)]
        times += [float(round(t)) for t in later] if whole else later
    return sorted({min(t, last) for t in times})


def _between(low: float, high: float, *, whole: bool) -> list[float]:
    if whole and high - low <= 2 * _TIMES_BETWEEN:
        return [float(t) for t in range(int(low), int(high) + 1)]
    times = [low + (high - low) * i / _TIMES_BETWEEN for i in range(1, _TIMES_BETWEEN)]
    return [float(round(t)) for t in times] if whole else times
