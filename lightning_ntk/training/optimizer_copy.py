"""A deep copy of an optimizer that steps other weights."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam


def copy_optimizer(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], weights: Mapping[str, nn.Parameter]
) -> Optimizer:
    """Copies an optimizer with its state.

    The copy has the same class, hyperparameters and state. Hooks registered on the optimizer are not copied.

    Args:
        optimizer: The optimizer. It may hold parameters that are not in `parameters`; the copy leaves them out.
        parameters: The live parameters, by name.
        weights: What the copy steps in their place, with the same names and shapes, of any floating-point type.
    """
    stand_in = torch.empty(0)
    memo: dict[int, Any] = {id(p): stand_in for p in held_by(optimizer)}
    memo |= {id(parameter): weights[name] for name, parameter in parameters.items()}
    copied = copy.deepcopy(optimizer, memo)
    # Optimizer.__getstate__ leaves out whatever else an instance has; a scheduler's wrapper of `step` stays behind.
    for name, value in vars(optimizer).items():
        if name not in vars(copied) and name not in ("step", "_opt_called"):
            setattr(copied, name, copy.deepcopy(value, memo))
    for group in copied.param_groups:
        group["params"] = [p for p in group["params"] if p is not stand_in]
    copied.state.pop(stand_in, None)
    for name, parameter in parameters.items():
        state = copied.state.get(weights[name], {})
        for entry, value in state.items():
            # The state has the type of the live parameter, except for a count of steps.
            if isinstance(value, Tensor) and entry != "step" and value.dtype == parameter.dtype:
                state[entry] = value.to(weights[name])
    return copied


def hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters, its tensors cloned."""
    return {key: v.clone() if isinstance(v, Tensor) else v for key, v in group.items() if key != "params"}


def held_by(optimizer: Optimizer) -> Iterator[Tensor]:
    """All parameters of an optimizer."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def require_supported_optimizer(optimizer: Optimizer) -> None:
    """Refuses an optimizer that does not step once from gradients that are there.

    Raises:
        TypeError: If it is not a `torch.optim.Optimizer`.
        ValueError: If it needs a closure, gradients at two points, or sparse gradients.
    """
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"Expected a torch.optim.Optimizer but got {kind}.")
    reason = None
    if isinstance(optimizer, LBFGS) or _needs_closure(optimizer):
        reason = "evaluates the loss several times within a step, through a closure"
    elif hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
        reason = "takes the gradient at two points in a step"
    elif isinstance(optimizer, SparseAdam):
        reason = "takes sparse gradients"
    if reason is not None:
        raise ValueError(
            f"Expected an optimizer that steps once from the gradients of its parameters but {kind} {reason}. "
            "Use torch.optim.SGD, Adam, AdamW, RMSprop, Adagrad, or another that steps from `.grad`."
        )


def _needs_closure(optimizer: Optimizer) -> bool:
    arguments = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(a.default is inspect.Parameter.empty and a.kind not in optional for a in arguments)
