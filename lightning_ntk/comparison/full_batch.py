"""Checks whether a run's steps are full-batch gradient descent.

The samples of every batch decide this.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_ntk.data.sample_index import UnknownSamplesError
from lightning_ntk.training.problem import LinearizedProblem
from lightning_ntk.utilities.contexts import preserved_rng

_ROUNDING = 1e-6


class FullBatchCheck:
    r"""Sums the weights with which samples enter the gradient of a step.

    A batch of a squared loss, multiplied by a scale s, gives each of its samples the weight s c, where c is the factor of this
    loss for as many samples (2/(b K) for `nn.MSELoss()`, 2 for `reduction="sum"`). In gradient descent it is the factor for all
    samples.

    Args:
        problem: The network on its training set, with a squared loss.
    """

    def __init__(self, problem: LinearizedProblem) -> None:
        self._problem = problem
        samples = len(problem.reference)
        self._first = problem.samples.first_rows
        times = torch.bincount(self._first, minlength=samples)
        self._expected = times * problem.objective.require_factor()
        self._factors: dict[int, float] = {samples: problem.objective.require_factor()}
        self.discard()

    @preserved_rng()
    def accumulate(self, batch: Any, scale: float = 1.0) -> None:
        """Records the samples of one batch, which are found by their content."""
        try:
            rows = self._problem.rows(batch)
        except UnknownSamplesError:
            self._unknown = True
            return
        self._seen.index_add_(0, rows, torch.full(rows.shape, scale * self._factor(rows), dtype=torch.float64))

    def discard(self) -> None:
        """Forgets the batches so far."""
        self._seen = torch.zeros(len(self._first), dtype=torch.float64)
        self._unknown = False

    def difference(self) -> str | None:
        """Says how a step's batches differ from one of all samples.

        The phrase covers all processes. Then the batches are forgotten.
        """
        processes = self._problem.processes
        unknown, seen = processes.any(self._unknown), processes.sum_(self._seen) / processes.size
        self.discard()
        if unknown:
            return "saw samples that are not in the reference set"
        weights, share = self._expected, seen / self._expected.clamp_min(torch.finfo(torch.float64).tiny)
        if ((seen - weights).abs() <= _ROUNDING * weights.max()).all():
            return None
        known, kinds = share[weights > 0], int((weights > 0).sum())
        if (known - known.mean()).abs().max() <= _ROUNDING * known.mean().abs():
            return f"gave its gradient {float(known.mean()):.4g} times the factor that its loss has on the whole reference set"
        missing = int((known == 0).sum())
        if missing:
            return f"saw {kinds - missing} of {kinds} different samples"
        return "saw some samples more often than others, or with another weight"

    def _factor(self, rows: Tensor) -> float:
        size = len(rows)
        if size not in self._factors:
            problem = self._problem
            outputs, targets = problem.predictions.cpu()[rows], problem.objective.targets[rows]
            self._factors[size] = problem.objective.factor_of(outputs, targets)
        return self._factors[size]
