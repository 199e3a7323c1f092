"""Compares a trained network with kernel regression before and after training."""

from collections.abc import Collection, Mapping
from typing import Literal

from torch import Tensor

from lightning_ntk.data.reference import Data
from lightning_ntk.training.problem import LinearizedProblem
from lightning_ntk.training.regression import kernel_regression
from lightning_ntk.utilities.representation import represent

Kernel = Literal["before", "after"]


class RegressionComparison:
    r"""Kernel regression on the targets, at initial and at trained weights.

    Ridge regression from zero, :math:`f(x) = \Theta(x, X)\,(\Theta + \rho I)^{-1} Y`, with the ridge of the least leave-one-out
    error. With the outputs of a trained network in it, it would begin where training has ended.

    Args:
        problem: The network at its initial weights on the training samples, with a squared loss.
        evaluation: Other data to predict.
        kernels: Which kernels: "before" and "after". The first is computed here.

    Attributes:
        before: The scalars of the kernel before training, see docs/scalars.md.
    """

    def __init__(self, problem: LinearizedProblem, evaluation: Data | None, kernels: Collection[Kernel]) -> None:
        self._problem = problem
        self._evaluation = evaluation
        self._kernels = kernels
        self.before = self._scalars("before", problem) if "before" in kernels else {}

    def after(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """The scalars of the kernel at trained weights and buffers, by name.

        There are none unless "after" was requested.
        """
        return self._scalars("after", self._problem.at(tensors)) if "after" in self._kernels else {}

    def _scalars(self, kernel: Kernel, problem: LinearizedProblem) -> dict[str, float]:
        found = kernel_regression(problem, test=self._evaluation, ridge="loo", centered=True)
        own = f"kernel_regression/{kernel}/"
        fits = {own: found.train, f"evaluation/{own}": found.test}
        if kernel == "before":  # the kernel after training has seen every label, also the one that is left out
            fits[f"{own}leave_one_out_"] = found.leave_one_out
        scalars = {f"{own}ridge": found.ridge}
        for prefix, fit in fits.items():
            if fit is not None:
                scalars[f"{prefix}loss"] = fit.loss
            if fit is not None and fit.accuracy is not None:
                scalars[f"{prefix}accuracy"] = fit.accuracy
        return scalars

    def __repr__(self) -> str:
        return represent(self, *(f"kernel {kernel} training" for kernel in self._kernels))
