"""Kernel regression with the empirical NTK at one set of weights."""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_ntk.data.reference import Data, Unpack
from lightning_ntk.dynamics.closed_form import ClosedForm, Dynamics
from lightning_ntk.dynamics.ridge import leave_one_out_residuals, ridge_grid
from lightning_ntk.linearization.linearization import Predict
from lightning_ntk.linearization.objective import Loss
from lightning_ntk.solvers.base import Modes
from lightning_ntk.solvers.lanczos import Lanczos
from lightning_ntk.training.modes import ModalProblem
from lightning_ntk.training.problem import LinearizedProblem
from lightning_ntk.utilities.shapes import Float, Float64
from lightning_ntk.utilities.validation import require_choice, require_number


class Fit(NamedTuple):
    """Predictions on a data set, and how good they are.

    Attributes:
        predictions: `(M, K)` in float64 on the CPU.
        loss: Their loss.
        accuracy: The share of samples whose class they predict; None where the targets are not classes.
    """

    predictions: Float64[Tensor, "M K"]
    loss: float
    accuracy: float | None

    def __repr__(self) -> str:
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.1%}"
        return f"loss {self.loss:.4g}{accuracy} on {len(self.predictions)} samples"


@dataclass(frozen=True, repr=False)
class KernelRegression:
    """A kernel regression.

    Attributes:
        ridge: The ridge that was added to the kernel, in the unit of its eigenvalues.
        coefficients: a, `(N, K)` in float64 on the CPU: predictions are f0(x) + Theta(x, X) a, or Theta(x, X) a.
        train: The fit of the training set.
        test: The predictions on the test set; None without one.
        leave_one_out: Predictions for each training sample by the regression on all others; None for a finite time or a
            ridge of 0, for which there is no formula.
        ridges: The ridges that were compared, ascending, `(R,)`; the given one alone.
        errors: Their mean squared leave-one-out errors, `(R,)`; empty where `leave_one_out` is None.
    """

    ridge: float
    coefficients: Float64[Tensor, "N K"]
    train: Fit
    test: Fit | None
    leave_one_out: Fit | None
    ridges: Float64[Tensor, "R"]
    errors: Float64[Tensor, "R"] | Float64[Tensor, "0"]

    def __repr__(self) -> str:
        fits = {"train": self.train, "leave-one-out": self.leave_one_out, "test": self.test}
        said = "; ".join(f"{name}: {fit}" for name, fit in fits.items() if fit is not None)
        return f"{type(self).__name__}(ridge {self.ridge:.3g}; {said})"


def kernel_regression(
    module: nn.Module | LinearizedProblem,
    train: Data | None = None,
    test: Data | None = None,
    *,
    ridge: float | Literal["loo"] = 0.0,
    centered: bool = False,
    t: float | None = None,
    lr: float | None = None,
    dynamics: Dynamics = "gradient_descent",
    loss: Loss | None = None,
    ntk: Float[Tensor, "rows rows"] | None = None,
    predict: Predict | None = None,
    unpack: Unpack | None = None,
    batch_size: int = 256,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> KernelRegression:
    r"""Kernel (ridge) regression with the empirical NTK at the weights that `module` has now.

    .. math:: f(x) = f_0(x) - \Theta(x, X)\, (\Theta + \rho I)^{-1} (f_0(X) - Y)

    is the limit of training the linearized network with a decay toward the initial weights; a singular kernel is
    inverted on its range. With `centered`, :math:`f_0` is left out, so that predictions depend on the kernel and the
    targets alone. Comparing the kernels of an untrained and a trained network (the "after kernel" of Long, 2021) shows
    how much of what a network has learned is in its kernel. A test set costs one pass :math:`J^\top a` over the
    training set and one :math:`J v` over itself.

    Args:
        module: The network, with outputs `(B, K)` or `(B,)`; or a `LinearizedProblem`, which has a training set and replaces
            `train`, `loss`, `predict`, `unpack`, `batch_size`, `dtype` and `progress`.
        train: The training set, as for `LinearizedTraining`. Class labels are one-hot rows.
        test: A test set, of any size.
        ridge: The ridge :math:`\rho`, at least 0, in the unit of the kernel's eigenvalues; or "loo", the one with the least
            leave-one-out error, which is exact for every ridge of a grid over the spectrum (`lightning_ntk.dynamics.ridge`).
        centered: Whether to leave out f0, as for the network f(w) - f(w0). The regression then starts from zero.
        t: Optimizer steps of gradient descent or flow toward this limit, as for `LinearizedTraining.weights`; needs `lr`.
            Default: infinity.
        lr: The learning rate of these steps.
        dynamics: "gradient_descent" or "gradient_flow", for a finite `t`.
        loss: A squared loss of outputs and targets. Default: `nn.MSELoss()`.
        ntk: The kernel of the training set, computed earlier, `(N K, N K)` in sample-major order.
        predict: As for `LinearizedTraining`, like `unpack`, `batch_size`, `dtype` and `progress`.
        unpack: See `predict`.
        batch_size: See `predict`.
        dtype: See `predict`.
        progress: See `predict`.

    Returns:
        Predictions, losses and accuracies.

    Raises:
        ValueError: If an argument, the data or the network cannot be used, or if the loss is not a squared one.
        OverflowError: If the steps diverge.
        MemoryError: If the kernel and its modes, about 40 (N K)^2 bytes, do not fit.

    Example:
        >>> module, inputs = torch.nn.Linear(2, 1, bias=False), torch.eye(2)
        >>> kernel_regression(module, (inputs, torch.ones(2, 1)), ridge=1.0, centered=True)
        KernelRegression(ridge 1; train: loss 0.25 on 2 samples; leave-one-out: loss 1 on 2 samples)
    """
    _require_ridge(ridge, t)
    require_choice("dynamics", dynamics, Dynamics)
    if (t is None) != (lr is None):
        raise ValueError(
            f"Expected arguments `t` and `lr` together, steps and the learning rate of a step, but got {t} and {lr}. Leave both "
            "out for the limit."
        )
    if isinstance(module, LinearizedProblem):
        problem = module
    elif train is None:
        raise ValueError("Expected argument `train` to be the training set but got None.")
    else:
        problem = LinearizedProblem(
            module, train, loss=loss, predict=predict, unpack=unpack, batch_size=batch_size, dtype=dtype,
            progress=progress,
        )  # fmt: skip
    try:
        modal = ModalProblem(problem, (), solver="eigh", lanczos=Lanczos(), ntk=ntk)
    except MemoryError as error:
        samples, outputs = problem.predictions.shape
        raise MemoryError(
            f"The kernel of {samples} samples with {outputs} outputs and all its modes do not fit. Use fewer samples."
        ) from error
    (modes,) = modal.solver.modes
    targets, start = problem.objective.targets, problem.predictions.cpu().double()
    if centered:
        start = torch.zeros_like(start)
        modes = replace(modes, coordinates=(modes.basis.T @ -targets.flatten().to(modes.basis)).cpu())
    ridges = (
        ridge_grid(modes, problem.linearization.dtype)
        if ridge == "loo"
        else torch.tensor([float(ridge)], dtype=torch.float64)
    )
    chosen, errors, left_out = ridges[0].item(), ridges[:0], None
    if t is None and ridge != 0:
        chosen, errors, residuals = _leave_one_out(modes, ridges, targets)
        left_out = _judged(problem, targets + residuals)

    form = ClosedForm(dynamics, (lr or 1.0) * modal.loss_factor, problem.linearization.dtype, ridge=chosen)
    filtered = form.filter(modes, t)
    coefficients = modes.coefficients(filtered).view_as(start)
    if not coefficients.isfinite().all():
        raise OverflowError(f"The steps diverge beyond floating-point numbers: take a learning rate below {lr}.")
    fit = _judged(problem, start + modes.prediction_change(filtered).view_as(start))
    return KernelRegression(
        chosen, coefficients, fit, _on_test(problem, test, coefficients, centered), left_out, ridges, errors
    )


def _leave_one_out(modes: Modes, ridges: Tensor, targets: Tensor) -> tuple[float, Tensor, Tensor]:
    """Finds the ridge with the least leave-one-out error.

    Returns it with the errors of all ridges and its residuals `(N, K)`.
    """
    residuals = leave_one_out_residuals(modes, ridges, targets.shape[1])
    errors = residuals.square().mean((1, 2))
    best = int(errors.argmin())
    return ridges[best].item(), errors, residuals[best]


def _on_test(problem: LinearizedProblem, test: Data | None, coefficients: Tensor, centered: bool) -> Fit | None:
    if test is None:
        return None
    other = problem.on(test)
    tangent = {name: value[0] for name, value in problem.pull_back(coefficients.unsqueeze(0)).items()}
    change = other.push_forward(tangent).cpu()
    return _judged(other, change if centered else other.predictions.cpu().double() + change)


def _judged(problem: LinearizedProblem, predictions: Tensor) -> Fit:
    classes = problem.classes
    return Fit(predictions, problem.loss_of(predictions), None if classes is None else classes.accuracy(predictions))


def _require_ridge(ridge: object, t: float | None) -> None:
    if ridge == "loo":
        if t is not None:
            raise ValueError(
                f'Expected a number for `ridge` with a finite `t` but got "loo" and {t}: the leave-one-out formula is that of '
                "the limit. Leave out `t`, or give a ridge."
            )
        return
    require_number("ridge", ridge, 'a number, at least 0, or "loo"')
    if not 0 <= float(ridge) < math.inf:  # type: ignore[arg-type]
        raise ValueError(f'Expected argument `ridge` to be a finite number, at least 0, or "loo" but got {ridge!r}.')
