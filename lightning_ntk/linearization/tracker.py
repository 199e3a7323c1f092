"""Tracks which call made the tensors of a training step, and from what."""

from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Functions that make data out of nothing: their results depend on no tensor and still differ from step to step.
_RANDOM = frozenset({
    "rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson", "rand_like", "randn_like",
    "randint_like", "normal_", "uniform_", "bernoulli_", "exponential_", "random_", "log_normal_",
})  # fmt: skip
# Properties of a tensor that compute nothing.
_PROPERTIES = frozenset({
    "data_ptr", "device", "dtype", "grad", "grad_fn", "is_leaf", "layout", "ndim", "requires_grad", "shape",
})  # fmt: skip
_DERIVATIVES = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)


class Kind(IntEnum):
    """What a tensor is made of."""

    CONSTANTS = 0
    PARAMETERS = 1
    DATA = 2
    BOTH = 3


class Tracker(TorchFunctionMode):
    """Tracks what every tensor is made of, and which call made it.

    Tensors are known by their identity. Every result of every call is entered, so that a tensor never has the entry of an
    earlier one whose place in memory it has taken.
    """

    def __init__(self, parameters: Sequence[Tensor], batch: Sequence[Tensor]) -> None:
        super().__init__()
        self.running: list[str] = []
        self._held = [*parameters, *batch]
        self._kinds = {id(t): Kind.PARAMETERS for t in parameters} | {id(t): Kind.DATA for t in batch}
        self._makers: dict[int, int] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__setitem__:
            func = _set_item
        name = getattr(func, "__name__", "")
        if name == "__get__" and getattr(getattr(func, "__self__", None), "__name__", "") in _PROPERTIES:
            return func(*args, **kwargs)
        tensors = list(tensors_of((args, kwargs)))
        kinds = [self._kind(tensor) for tensor in tensors]
        kind = Kind(0)
        for one in kinds:
            kind = Kind(kind | one)
        if name in _RANDOM:
            kind = Kind(kind | Kind.DATA)
        if not kind & Kind.PARAMETERS:
            result = func(*args, **kwargs)
            self._enter(result, kind, None)
            return result
        if func in _DERIVATIVES:
            raise ValueError(
                "Expected a training step without derivatives of its own but it differentiates its network, as a gradient "
                "penalty does. The linearized network has no second derivatives to follow it."
            )
        return self._call(func, args, kwargs, tensors, kind)

    def _call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], kind: Kind
    ) -> Any:
        """A call whose arguments have a parameter among what they are made of."""
        raise NotImplementedError

    def _kind(self, tensor: Tensor) -> Kind:
        return self._kinds.get(id(tensor), Kind.CONSTANTS)

    def _enter(self, result: Any, kind: Kind, maker: int | None) -> None:
        for tensor in tensors_of(result):
            self._kinds[id(tensor)] = kind
            if maker is None:
                self._makers.pop(id(tensor), None)
            else:
                self._makers[id(tensor)] = maker


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """The tensors in arguments or results of a call."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for branch in tree:
            yield from tensors_of(branch)
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from tensors_of(branch)


def _set_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """`tensor[index] = value` as a function that returns what it has changed."""
    tensor[index] = value
    return tensor


def written_base(func: Callable[..., Any], args: tuple[Any, ...]) -> Tensor | None:
    """The tensor of which a call changes a view in place."""
    name = getattr(func, "__name__", "")
    in_place = func is _set_item or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
    target = args[0] if in_place and args and isinstance(args[0], Tensor) else None
    return None if target is None else target._base
