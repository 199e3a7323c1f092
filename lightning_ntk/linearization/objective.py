"""A loss in function space, with its gradient.

For a squared loss, a factor relates gradient and residual.
"""

import copy
import warnings
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lightning_ntk.data.targets import match_targets
from lightning_ntk.utilities.representation import name_of, represent
from lightning_ntk.utilities.shapes import Float, Float64, Shaped

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]

# Outputs of a batch, above which the loss is computed in their own type: as those of a language model for every token.
_LARGE = 2**24


class Objective:
    """A loss of outputs `(B, K)` and targets, in float64.

    Where outputs are very many it is in their type.

    A squared loss takes integer class labels as one-hot rows, any other loss takes targets as they are.

    Args:
        loss: Maps outputs and targets to one number; it gets outputs `(B,)` if the network returns them.
        outputs: Initial predictions `(N, K)`.
        targets: Targets of the same samples, as the data gives them.
        flat: Whether the network returns `(N,)`, so that `K = 1`.
    """

    factor: float | None = None
    """The c of a squared loss, see `measure_loss_factor`; None for other losses."""
    targets: Tensor
    """The prepared targets of all samples, on the CPU."""
    dtype: torch.dtype
    """The type of gradients."""

    def __init__(
        self, loss: Loss, outputs: Float[Tensor, "N K"], targets: Shaped[Tensor, "N ..."], *, flat: bool = False
    ) -> None:
        self._loss, self._flat = loss, flat
        self._losses: dict[torch.device, Loss] = {}
        self.dtype = self._dtype = torch.float64 if outputs.numel() < _LARGE else outputs.dtype
        outputs, targets = outputs.detach().cpu(), targets.detach().cpu()
        self._reason: ValueError | None = None
        matched: Tensor | None = None
        try:
            matched = match_targets(targets, outputs, flat=flat)
            self.factor = measure_loss_factor(self._loss_on(outputs.device), outputs, matched, flat=flat)
        except (ValueError, RuntimeError) as error:
            # RuntimeError: the loss takes labels instead of rows, or float32 only.
            # Without its traceback, which would keep the tensors of all callers.
            self._reason = ValueError(str(error)) if isinstance(error, ValueError) else _not_squared(loss)
            self._require_computable(outputs, targets, self._reason, takes_rows=matched is not None)
        self.targets = self.prepare(targets, outputs)

    def require_factor(self) -> float:
        """The factor of a squared loss; raises a ValueError for other losses."""
        if self.factor is None:
            assert self._reason is not None
            raise self._reason
        return self.factor

    def factor_of(self, outputs: Float[Tensor, "N K"], targets: Float[Tensor, "N K"]) -> float:
        """The factor of a squared loss for other samples.

        There may be fewer of them. Their targets are prepared, on the CPU.
        """
        return measure_loss_factor(self._loss_on(outputs.device), outputs, targets, flat=self._flat)

    def is_mean(self, outputs: Float[Tensor, "N K"]) -> bool:
        """Whether a squared loss is a mean over samples.

        Its factor is then inverse to their number. The initial predictions of the samples are given.
        """
        total, part = len(outputs), max(1, len(outputs) // 2)
        factor = self.factor_of(outputs[:part].cpu(), self.targets[:part])
        return abs(factor * part - self.require_factor() * total) <= 1e-6 * abs(factor * part)

    def prepare(self, targets: Shaped[Tensor, "B ..."], outputs: Float[Tensor, "B K"]) -> Shaped[Tensor, "B ..."]:
        """Converts targets to what the loss takes.

        These are rows `(B, K)` for a squared loss; other losses take the targets unchanged.
        """
        if self.factor is not None:
            return match_targets(targets, outputs, flat=self._flat).to(self._dtype)
        return targets.detach().to(outputs.device, self._dtype if targets.is_floating_point() else None)

    def value(self, outputs: Float[Tensor, "B K"], targets: Shaped[Tensor, "B ..."]) -> Float64[Tensor, ""]:
        """The loss of outputs `(B, K)` and prepared targets, a scalar in float64."""
        loss = self._loss_on(outputs.device)
        return evaluate_loss(loss, outputs.detach().to(self._dtype), targets, flat=self._flat).double()

    def gradient(self, outputs: Float[Tensor, "B K"], targets: Shaped[Tensor, "B ..."]) -> Float[Tensor, "B K"]:
        """The gradient of the loss in outputs `(B, K)`, for prepared targets."""
        return _gradient(self._loss_on(outputs.device), outputs.to(self._dtype), targets, self._flat).to(self.dtype)

    def hessian_product(
        self, outputs: Float[Tensor, "B K"], targets: Shaped[Tensor, "B ..."], vector: Float[Tensor, "B K"]
    ) -> Float[Tensor, "B K"]:
        """Computes H u for the Hessian of the loss in outputs `(B, K)`.

        The targets are prepared, and the vector is `(B, K)`.
        """
        loss = self._loss_on(outputs.device)
        with torch.inference_mode(False), torch.enable_grad():
            point = outputs.detach().to(self._dtype, copy=True).requires_grad_()
            value = evaluate_loss(loss, point, targets.clone(), flat=self._flat)
            (gradient,) = torch.autograd.grad(value, point, create_graph=True)
            if not gradient.requires_grad:  # a loss that is linear in the outputs, piece by piece
                return torch.zeros_like(vector)
            (product,) = torch.autograd.grad(gradient, point, vector.to(gradient), materialize_grads=True)
        return product.to(vector)

    def _loss_on(self, device: torch.device) -> Loss:
        # A loss may have buffers, class weights for example: they follow the outputs to their device and type.
        if isinstance(self._loss, nn.Module) and device not in self._losses:
            self._losses[device] = copy.deepcopy(self._loss).to(device, self._dtype)
        return self._losses.get(device, self._loss)

    def _require_computable(self, outputs: Tensor, targets: Tensor, reason: ValueError, *, takes_rows: bool) -> None:
        own_shape = outputs.shape[:1] if self._flat else outputs.shape
        if targets.numel() == outputs.numel() and targets.shape != own_shape:
            raise reason  # (N,) beside (N, 1) would broadcast
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Using a target size")
                try:
                    self.gradient(outputs, self.prepare(targets, outputs))
                except RuntimeError:
                    # A loss with constants in float32 refuses outputs in float64.
                    self._dtype = outputs.dtype
                    self._losses.clear()
                    self.gradient(outputs, self.prepare(targets, outputs))
        except (ValueError, RuntimeError, TypeError, IndexError, UserWarning) as error:
            if not takes_rows:
                raise reason from error
            raise ValueError(
                f"Expected a loss of the outputs, of shape {tuple(own_shape)}, and the targets, of shape "
                f"{tuple(targets.shape)} and type {targets.dtype}, but {self._loss!r} failed on them: {error}"
            ) from error

    def __repr__(self) -> str:
        return represent(self, f"loss={name_of(self._loss)}")


def evaluate_loss(
    loss: Loss, outputs: Float[Tensor, "N K"], targets: Shaped[Tensor, "N ..."], *, flat: bool = False
) -> Float[Tensor, ""]:
    """The scalar loss of outputs `(N, K)`; a `flat` one takes `(N,)`."""
    if flat:
        outputs, targets = outputs.squeeze(1), targets.squeeze(1) if targets.dim() > 1 else targets
    value: object = loss(outputs, targets)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"Expected the loss to be one number, reduced over samples and outputs, but got {got}.")
    return value.reshape(())


def measure_loss_factor(
    loss: Loss, outputs: Float[Tensor, "N K"], targets: Shaped[Tensor, "N K"], *, flat: bool = False
) -> float:
    r"""Measures the factor c of a squared loss.

    Its gradient in the outputs is :math:`c (f - Y)`.

    It turns the learning rate into kernel time, `eta = lr * c`. It is measured by autograd,
    :math:`c = \langle g, f - Y \rangle / |f - Y|^2` with :math:`g = \partial L / \partial f`, because conventions differ:
    2/(NK) for `nn.MSELoss()`, 2 for `reduction="sum"`, 1/N for the mean over samples of half the squared error.

    Args:
        loss: Maps outputs and targets to a scalar.
        outputs: Predictions `(N, K)`.
        targets: Targets `(N, K)`.
        flat: Whether the loss takes `(N,)` instead of `(N, 1)`.

    Returns:
        c, positive.

    Raises:
        ValueError: If the gradient is not a positive multiple of the residual, at `outputs` and at a perturbed point.
    """
    outputs, targets = outputs.detach().double(), targets.double()
    scale = (outputs - targets).square().mean().sqrt().clamp_min(1e-3)
    # Irregular but fixed: the test must not depend on the random state, or advance it.
    angles = torch.arange(outputs.numel(), device=outputs.device).double() ** 1.5
    points = outputs, outputs + scale * torch.cos(angles).view_as(outputs)
    measured = [factor for point in points if (factor := _factor_at(loss, point, targets, flat)) is not None]
    if abs(measured[-1] - measured[0]) > 1e-6 * abs(measured[0]) or measured[0] <= 0:
        raise _not_squared(loss)
    return measured[-1]


def _factor_at(loss: Loss, outputs: Tensor, targets: Tensor, flat: bool) -> float | None:
    gradient = _gradient(loss, outputs, targets, flat)
    residual = outputs - targets
    square = residual.square().sum()
    if square == 0:
        return None  # at an exact fit the gradient of every loss is zero
    factor = (gradient * residual).sum() / square
    if (gradient - factor * residual).norm() > 1e-6 * gradient.norm() or not torch.isfinite(factor):
        raise _not_squared(loss)
    return factor.item()


def _gradient(loss: Loss, outputs: Tensor, targets: Tensor, flat: bool) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        point = outputs.detach().clone().requires_grad_()
        value = evaluate_loss(loss, point, targets.clone(), flat=flat)  # copies: a loss may write into them
        if not value.requires_grad:
            raise ValueError(
                "Expected the loss to be differentiable in its first argument, the outputs, but it is not."
            )
        (gradient,) = torch.autograd.grad(value, point)
    return gradient


def _not_squared(loss: Loss) -> ValueError:
    return ValueError(
        f"Expected argument `loss` to be a squared loss, with a gradient c (f - Y) in the outputs f, but {loss!r} is not one. "
        "Closed-form linearized dynamics exist for squared losses only: use nn.MSELoss(). With any loss, LinearizedTraining "
        'takes recorded minibatches, `batches=`, and LinearizationMonitor takes dynamics="replay" or "twin".'
    )
