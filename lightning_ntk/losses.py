"""What a loss does in function space: its targets, and the factor between its gradient and the residual."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


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
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(
            "Expected the loss to be one number, reduced over samples and outputs, but got "
            f"{tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}."
        )
    return value.reshape(())


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
            raise ValueError(
                "Expected the loss to be differentiable in its first argument, the outputs, but it is not."
            )
        (gradient,) = torch.autograd.grad(value, point)
    residual = point.detach() - targets
    square = residual.square().sum()
    if square == 0:
        return None  # every loss of an exact fit has this gradient, so it says nothing about the factor
    factor = (gradient * residual).sum() / square
    if (gradient - factor * residual).norm() > 1e-6 * gradient.norm() or not torch.isfinite(factor):
        raise _not_squared(loss)
    return factor.item()


def _not_squared(loss: Loss) -> ValueError:
    return ValueError(
        f"Expected argument `loss` to be a squared loss, with a gradient c (f - Y) in the outputs f, but {loss!r} is not one. "
        "Closed-form linearised dynamics exist for squared losses only: use nn.MSELoss() with one-hot targets."
    )
