"""What a loss does in function space: its targets, its gradient, and the factor between gradient and residual."""

import copy
import warnings
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class Objective:
    """A loss as a function of outputs `(B, K)` and of the targets of their samples, in float64.

    Integer class labels become one-hot rows for a squared loss, and stay what they are for all others.

    Args:
        loss: Maps outputs and targets to one number, on `(B,)` if that is the network's own shape.
        outputs: Initial predictions `(N, K)`.
        targets: Targets of these samples, as the data gives them.
        flat: Whether the network's own outputs are `(N,)`, so that `K = 1`.

    Attributes:
        factor: c of a squared loss, whose gradient in the outputs is c (f - Y), see `measure_loss_factor`; None for others.
        targets: The targets of all samples, prepared, on the CPU.

    Raises:
        ValueError: If the loss cannot be computed from these outputs and targets, or has no gradient.
    """

    def __init__(self, loss: Loss, outputs: Tensor, targets: Tensor, *, flat: bool = False) -> None:
        self._flat = flat
        self._losses: dict[torch.device, Loss] = {}
        self._loss = loss
        self._dtype = torch.float64
        outputs, targets = outputs.detach().cpu(), targets.detach().cpu()
        self.factor: float | None = None
        self._reason: ValueError | None = None
        self._matched = False
        try:
            matched = match_targets(targets, outputs, flat=flat)
            self._matched = True
            self.factor = measure_loss_factor(self._loss_on(outputs.device), outputs, matched, flat=flat)
        except (ValueError, RuntimeError) as error:
            # RuntimeError: the loss takes labels and no rows, or computes in float32 only.
            self._reason = error if isinstance(error, ValueError) else _not_squared(loss)
            self._require_computable(outputs, targets)
        self.targets = self.prepare(targets, outputs)

    def require_factor(self) -> float:
        """The factor of a squared loss.

        Raises:
            ValueError: If the loss is not a squared one.
        """
        if self.factor is None:
            assert self._reason is not None
            raise self._reason
        return self.factor

    def prepare(self, targets: Tensor, outputs: Tensor) -> Tensor:
        """Targets as the loss takes them beside outputs `(B, K)`: rows in float64 for a squared loss, else unchanged."""
        if self.factor is not None:
            return match_targets(targets, outputs, flat=self._flat)
        return targets.detach().to(outputs.device, self._dtype if targets.is_floating_point() else None)

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss, a scalar in float64, of outputs `(B, K)` and prepared targets."""
        return self._evaluate(outputs.detach().to(self._dtype), targets).double()

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The gradient of the loss in the outputs, `(B, K)` in float64, for prepared targets."""
        with torch.inference_mode(False), torch.enable_grad():
            point = outputs.detach().to(self._dtype, copy=True).requires_grad_()
            value = self._evaluate(point, targets.clone() if targets.is_inference() else targets)
            if not value.requires_grad:
                raise _not_differentiable()
            (gradient,) = torch.autograd.grad(value, point)
        return gradient.double()

    def _evaluate(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = self._loss_on(outputs.device)
        if self.factor is None:
            value = loss(outputs.squeeze(1) if self._flat else outputs, targets)
            return _require_number(value)
        return evaluate_loss(loss, outputs, targets, flat=self._flat)

    def _loss_on(self, device: torch.device) -> Loss:
        # The module's own buffers, class weights for example, follow outputs to float64 and to their device.
        if isinstance(self._loss, nn.Module) and device not in self._losses:
            self._losses[device] = copy.deepcopy(self._loss).to(device, self._dtype)
        return self._losses.get(device, self._loss)

    def _require_computable(self, outputs: Tensor, targets: Tensor) -> None:
        assert self._reason is not None
        own_shape = outputs.shape[:1] if self._flat else outputs.shape
        if targets.numel() == outputs.numel() and targets.shape != own_shape:
            raise self._reason  # (N,) beside (N, 1) would broadcast
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Using a target size")
                self._try(outputs, targets)
        except (ValueError, RuntimeError, TypeError, IndexError, UserWarning) as error:
            if not self._matched:
                raise self._reason from error
            raise ValueError(
                f"Expected a loss of the outputs, of shape {tuple(own_shape)}, and the targets, of shape "
                f"{tuple(targets.shape)} and type {targets.dtype}, but {self._loss!r} failed on them: {error}"
            ) from error

    def _try(self, outputs: Tensor, targets: Tensor) -> None:
        try:
            self.gradient(outputs, self.prepare(targets, outputs))
        except RuntimeError:
            # A function with constants in float32 does not take outputs in float64.
            self._dtype = outputs.dtype
            self._losses.clear()
            self.gradient(outputs, self.prepare(targets, outputs))


def match_targets(targets: Tensor, outputs: Tensor, *, flat: bool) -> Tensor:
    """Targets as a float64 tensor of the shape of the outputs, class labels as one-hot rows.

    Args:
        targets: `(N, K)`; `(N,)` if the network's own outputs are `(N,)`; or integer class labels `(N,)`.
        outputs: Predictions `(N, K)`, which give the number of classes.
        flat: Whether the network's own outputs are `(N,)`, so that `K = 1`.

    Returns:
        The targets, `(N, K)`.

    Raises:
        ValueError: If the shapes do not match, or a label is no class: subtracting `(N,)` from `(N, 1)` would broadcast.
    """
    count, classes = outputs.shape
    targets = targets.to(outputs.device)
    if not flat and classes > 1 and targets.shape == (count,) and not targets.is_floating_point():
        if targets.min() < 0 or targets.max() >= classes:
            raise ValueError(
                f"Expected class labels from 0 to {classes - 1}, as the network has {classes} outputs, "
                f"but got labels from {int(targets.min())} to {int(targets.max())}."
            )
        return torch.nn.functional.one_hot(targets.long(), classes).double()
    expected = (count,) if flat else (count, classes)
    if tuple(targets.shape) != expected:
        raise ValueError(
            f"Expected targets of the shape of the outputs, {expected}, but got {tuple(targets.shape)}. "
            "Reshape the targets, or the outputs with `predict`; only integer class labels are converted."
        )
    return targets.double().reshape(count, classes)


def evaluate_loss(loss: Loss, outputs: Tensor, targets: Tensor, *, flat: bool = False) -> Tensor:
    """The scalar loss of outputs `(N, K)`, computed on `(N,)` if that is the network's own shape."""
    value = loss(outputs.squeeze(1), targets.squeeze(1)) if flat else loss(outputs, targets)
    return _require_number(value)


def measure_loss_factor(loss: Loss, outputs: Tensor, targets: Tensor, *, flat: bool = False) -> float:
    r"""The factor c of a squared loss, whose gradient in the outputs is :math:`c (f - Y)`.

    It is measured, :math:`c = \langle g, f - Y \rangle / |f - Y|^2` with :math:`g = \partial L / \partial f` by autograd,
    because the same name stands for many conventions: 2/(NK) for `nn.MSELoss()`, 2 for `reduction="sum"`, 1/N for the
    mean over samples of half the squared error. It turns the learning rate into kernel time, `eta = lr * c`.

    Args:
        loss: Maps outputs and targets to a scalar.
        outputs: Predictions `(N, K)`.
        targets: Targets `(N, K)`.
        flat: Whether the loss expects `(N,)` instead of `(N, 1)`.

    Returns:
        c, positive.

    Raises:
        ValueError: If the gradient is not a positive multiple of the residual, at `outputs` and at a perturbed point.
    """
    targets = targets.double()
    scale = (outputs.double() - targets).square().mean().sqrt().clamp_min(1e-3)
    # A fixed, irregular perturbation: the test must not depend on, or advance, the random state.
    perturbation = scale * torch.cos(torch.arange(outputs.numel(), device=outputs.device).double() ** 1.5).view_as(
        outputs
    )
    factors = [_factor_at(loss, outputs.double() + p, targets, flat) for p in (0 * perturbation, perturbation)]
    measured = [factor for factor in factors if factor is not None]
    if abs(measured[-1] - measured[0]) > 1e-6 * abs(measured[0]) or measured[0] <= 0:
        raise _not_squared(loss)
    return measured[-1]


def _factor_at(loss: Loss, outputs: Tensor, targets: Tensor, flat: bool) -> float | None:
    with torch.inference_mode(False), torch.enable_grad():
        point = outputs.detach().clone().requires_grad_()
        value = evaluate_loss(loss, point, targets.clone(), flat=flat)
        if not value.requires_grad:
            raise _not_differentiable()
        (gradient,) = torch.autograd.grad(value, point)
    residual = point.detach() - targets
    square = residual.square().sum()
    if square == 0:
        return None  # every loss of an exact fit has this gradient, so it says nothing about the factor
    factor = (gradient * residual).sum() / square
    if (gradient - factor * residual).norm() > 1e-6 * gradient.norm() or not torch.isfinite(factor):
        raise _not_squared(loss)
    return factor.item()


def _require_number(value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(
            "Expected the loss to be one number, reduced over samples and outputs, but got "
            f"{tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}."
        )
    return value.reshape(())


def _not_differentiable() -> ValueError:
    return ValueError("Expected the loss to be differentiable in its first argument, the outputs, but it is not.")


def _not_squared(loss: Loss) -> ValueError:
    return ValueError(
        f"Expected argument `loss` to be a squared loss, with a gradient c (f - Y) in the outputs f, but {loss!r} is not one. "
        "Closed-form linearized dynamics exist for squared losses only: use nn.MSELoss(), or dynamics that take any loss: "
        '"replay" or "twin".'
    )
