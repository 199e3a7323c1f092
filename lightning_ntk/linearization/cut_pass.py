"""One pass along the cut of a training step: its gradient, and what it has computed."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from lightning_ntk.linearization.cut_step import CutStep, LossCall
from lightning_ntk.linearization.linearization import pulled_back
from lightning_ntk.linearization.parameters import Tensors


class Evaluation(NamedTuple):
    """What a step has computed on one batch.

    Attributes:
        loss: The loss, a number.
        outputs: The outputs of the network, or of its linearization, where they enter the loss.
        starts: The outputs of the network at the weights around which it was linearized.
        losses: The calls of loss functions.
        returned: Whether the loss is the very result of one of these.
    """

    loss: Tensor
    outputs: list[Tensor]
    starts: list[Tensor]
    losses: list[LossCall]
    returned: bool


class CutPass(NamedTuple):
    """One run along the cut, as long as its graph lives."""

    loss: Tensor
    trace: CutStep
    leaves: Tensors
    values: Tensors
    duals: ExitStack


def pull_back(run: CutPass) -> Tensors:
    """Computes the gradient, through the network for its linearized outputs.

    It is direct for expressions of parameters alone.
    """
    entered = [output for output in run.trace.outputs if output.value.requires_grad]
    wanted = [*(output.value for output in entered), *run.values.values()]
    gradients = torch.autograd.grad(run.loss, wanted, allow_unused=True)
    seen = [(o, g) for o, g in zip(entered, gradients, strict=False) if g is not None]
    starts = [_primal(output.start) for output, _ in seen]
    run.duals.close()  # or the backward pass would differentiate itself along the tangents
    total = pulled_back(starts, [g for _, g in seen], run.leaves)
    for name, direct in zip(run.values, gradients[len(entered) :], strict=True):
        if direct is not None:
            total[name] += direct
    return total


def read(run: CutPass) -> Evaluation:
    """What the pass has computed, without its graph."""
    outputs = [output.value.detach() for output in run.trace.outputs]
    starts = [_primal(output.start).detach() for output in run.trace.outputs]
    returned = any(call.result is run.loss for call in run.trace.losses)
    return Evaluation(run.loss.detach(), outputs, starts, run.trace.losses, returned)


def _primal(tensor: Tensor) -> Tensor:
    primal: Tensor = unpack_dual(tensor)[0]  # type: ignore[no-untyped-call]
    return primal


def pushed(start: Tensor, leaves: Tensors, tangent: Mapping[str, Tensor]) -> Tensor:
    """J v through two reverse passes, J v = d/du <J^T u, v>."""
    if not start.requires_grad:
        return torch.zeros_like(start)
    cotangent = torch.zeros_like(start, requires_grad=True)
    gradients = torch.autograd.grad(
        start, list(leaves.values()), cotangent, create_graph=True, allow_unused=True, materialize_grads=True
    )
    product = torch.stack([(g * tangent[n]).sum() for n, g in zip(leaves, gradients, strict=True)]).sum()
    if not product.requires_grad:
        return torch.zeros_like(start)
    (pushed,) = torch.autograd.grad(product, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True)
    return pushed.detach()
