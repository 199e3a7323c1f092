"""Finds outputs and labels where a training step's loss gets them.

Batches may have any form.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.pair_of_step import (
    TRANSFORMED,
    NoPairError,
    Pair,
    pair_of_call,
    require_equal_gradients,
)
from lightning_ntk.linearization.step import Step, StepLinearization
from lightning_ntk.utilities.contexts import preserved_rng


def labeled_pair(step: StepLinearization, batch: Any) -> Pair:
    """Finds the loss function of a training step, with outputs and labels.

    A model that computes its own loss from a dict with `labels`, as those of transformers do, has no pair of inputs and target.
    The whole batch is then the input, the target is the tensor of the batch that the loss function gets, and the outputs are
    what it gets in a repetition of the step in eval mode.

    Args:
        step: The training step.
        batch: A batch of the run.

    Raises:
        NoPairError: If the step returns anything else than one function of `torch.nn.functional` of outputs, one row for each
            sample, and a tensor of the batch; or if the outputs are others in eval mode.
    """
    found = step.first_outputs(batch)
    if found is None:
        raise NoPairError("the training step has no loss for the first batch")
    if len(found.losses) != 1 or not found.returned:
        raise NoPairError("the training step does not return one loss function of torch.nn.functional")
    call = found.losses[0]
    if len(call.args) < 2 or not all(isinstance(tensor, Tensor) for tensor in call.args[:2]):
        raise NoPairError("the loss is not one of outputs and targets")
    given, wanted = call.args[:2]
    plain = _plain(step.copy(batch))
    unpack = _Unpack(_path_of(wanted, plain))
    inputs, target = unpack(plain)
    predict = _LossArgument(step.step, call.function, None if isinstance(batch, dict) else type(batch))
    linearization = Linearization(step.module, predict=predict)
    try:
        with preserved_rng():
            outputs = linearization.predict(inputs)
    except Exception as error:  # whatever a step may raise that is not meant to run in eval mode
        raise NoPairError(f"the training step cannot be repeated in eval mode ({error})") from None
    outputs = outputs.squeeze(1) if linearization.flat else outputs
    if outputs.shape != given.shape or len(outputs) != len(target):
        raise NoPairError("the loss function gets no outputs (samples, outputs)")
    if (outputs - given).norm() > torch.finfo(step.precision).eps ** 0.5 * given.norm():
        raise NoPairError("its outputs in train mode are not those in eval mode, as with dropout or batch statistics")
    pair = pair_of_call(call, outputs, target)._replace(predict=predict, unpack=unpack)
    otherwise = f"{TRANSFORMED}, or depends on more than these and the labels"
    require_equal_gradients(step, pair, batch, otherwise)
    return pair


class _Unpack:
    """Splits a batch into inputs and the tensor at the target's place."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, batch: Any) -> tuple[Any, Tensor]:
        batch = _plain(batch)
        for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
            if pytree.keystr(path) == self._path and isinstance(leaf, Tensor):
                return batch, leaf
        raise ValueError(
            f"Expected batches that hold their targets at {self._path}, as the first one, but one does not."
        )


class _LossArgument(TorchFunctionMode):
    """`predict` that repeats a step and takes the outputs that its loss function gets."""

    def __init__(self, step: Step, function: Callable[..., Any], kind: type | None) -> None:
        super().__init__()
        self._step, self._function, self._kind = step, function, kind
        self._found: list[Tensor] = []

    def __call__(self, module: nn.Module, inputs: Any) -> Tensor:
        self._found.clear()
        with self:
            self._step(inputs if self._kind is None or not isinstance(inputs, Mapping) else self._kind(inputs))
        if len(self._found) != 1:
            name = getattr(self._function, "__name__", self._function)
            raise ValueError(f"Expected one call of {name} in the training step but got {len(self._found)}.")
        return self._found.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is self._function:
            self._found.append(args[0])
        return func(*args, **(kwargs or {}))


def _plain(batch: Any) -> Any:
    """Converts another kind of mapping to a dict, with tensors by key."""
    return dict(batch) if isinstance(batch, Mapping) and not isinstance(batch, dict) else batch


def _path_of(wanted: Tensor, batch: Any) -> str:
    leaves = [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(batch)[0]]
    leaves.sort(key=lambda named: "label" not in named[0])  # others may happen to be equal, in a small batch
    for path, leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.numel() == wanted.numel():
            same = leaf.to(wanted.device).view_as(wanted) == wanted
            if bool(same.all()):
                return path
    raise NoPairError("the loss function gets a transformation of the targets")
