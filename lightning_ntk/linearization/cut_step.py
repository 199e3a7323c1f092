"""Runs a step along its cut.

The network runs on dual numbers, the loss on its linearized outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_ntk.linearization.cut import Cut
from lightning_ntk.linearization.tracker import Kind, Tracker, tensors_of, written_base


class CutChangedError(Exception):
    """A batch takes another path through network and loss than the cut."""


class LossCall(NamedTuple):
    """A call of a function from `torch.nn.functional` that gave one number, in the loss.

    Attributes:
        function: The function.
        args: Its arguments, with the linearized outputs of the network.
        kwargs: Its keyword arguments.
        result: The number.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Tensor


class Output(NamedTuple):
    """A result of the network where it enters the loss.

    Attributes:
        start: The result at w0, in the graph of the network.
        value: What the loss sees: a leaf of its graph with the value of the linearized network.
        module: The module that made it, by name.
    """

    start: Tensor
    value: Tensor
    module: str


class CutStep(Tracker):
    r"""Runs a step along its cut, with the network linearized in the loss.

    The calls of the network run as they are, on whatever the parameters are: dual numbers :math:`(w_0, \delta)`, for example.
    Where a result of the network enters a call of the loss, its linearized value takes its place, a new leaf. Expressions of
    parameters alone that enter the loss are computed from the values of `value_of`.

    Args:
        cut: The cut.
        parameters: The parameters with which the network runs, by name.
        value_of: Gives their values in the loss, by name, when the loss uses them.
        batch: The tensors of the batch.
        linearize: Maps a result of the network to its value in the loss, without a graph.

    Attributes:
        outputs: The results of the network that have entered the loss.
        losses: The calls of loss functions.
    """

    def __init__(
        self,
        cut: Cut,
        parameters: Mapping[str, Tensor],
        value_of: Callable[[str], Tensor],
        batch: Sequence[Tensor],
        linearize: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(list(parameters.values()), batch)
        self._cut = cut
        self._linearize = linearize
        self._names = {id(tensor): name for name, tensor in parameters.items()}
        self._value_of = value_of
        self._values: dict[int, Tensor] = {}  # of expressions of parameters alone
        self._leaves: dict[int, tuple[Tensor, Tensor]] = {}  # by the result of the network, which is kept
        self._at = 0
        self.outputs: list[Output] = []
        self.losses: list[LossCall] = []

    def _call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], kind: Kind
    ) -> Any:
        planned = self._cut[self._at] if self._at < len(self._cut) else None
        if planned is None or planned.function != func:
            result = func(*args, **kwargs)
            if any(True for _ in tensors_of(result)):
                raise CutChangedError(f"call {self._at} is {func}, and not {planned and planned.function}")
            return result
        at = self._at
        if not planned.depends:
            result = func(*args, **kwargs)
            if not any(True for _ in tensors_of(result)):
                return result
            self._at += 1
            self._enter(result, Kind(kind & Kind.DATA), None)
            return result
        result = None
        again = planned.again and kind is Kind.BOTH
        value = func(*_mapped(self._value, args), **_mapped(self._value, kwargs)) if again else None
        # What is made of parameters and then detached is as it is at w0: DoRA divides its weights by such a norm.
        is_network = planned.network or (kind is Kind.PARAMETERS and not planned.loss)
        if is_network:
            result = func(*args, **kwargs)
            if not any(True for _ in tensors_of(result)):  # a query by a function that may return tensors, too
                return result
        if not is_network or (planned.loss and kind is Kind.PARAMETERS):
            entered, options = _mapped(self._value, args), _mapped(self._value, kwargs)
            value = func(*entered, **options)
            if kind is Kind.PARAMETERS:
                result = value if result is None else result
                for own, there in zip(tensors_of(result), tensors_of(value), strict=True):
                    self._values[id(own)] = there
                    self._held += [own, there]
            else:
                result = value
                if isinstance(value, Tensor) and value.dim() == 0 and getattr(func, "__module__", "") == F.__name__:
                    self.losses.append(LossCall(func, entered, options, value))
            if not any(True for _ in tensors_of(result)):
                return result
        self._at += 1
        if again:
            for own, there in zip(tensors_of(result), tensors_of(value), strict=True):
                self._leaves[id(own)] = own, there
                if there is not own:
                    self._enter(there, Kind.BOTH, None)
        self._enter(result, kind, at)
        written = written_base(func, args if is_network else entered) if not again else None
        if written is not None:
            self._enter(written, Kind(kind | self._kind(written)), at)
        return result

    def finish(self) -> None:
        """Requires that the step has come to the end of its cut."""
        if self._at != len(self._cut):
            raise CutChangedError(f"the step ends after {self._at} of {len(self._cut)} calls")

    def _value(self, tensor: Tensor) -> Tensor:
        """What the loss sees in the place of a tensor."""
        key, kind = id(tensor), self._kind(tensor)
        if kind is Kind.PARAMETERS:
            known = key in self._values or key not in self._names
            return self._values.get(key, tensor) if known else self._value_of(self._names[key])
        if kind is not Kind.BOTH or not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        if key in self._leaves:
            return self._leaves[key][1]
        maker = self._makers.get(key)
        if maker is None or not self._cut[maker].network:
            return tensor
        # Whatever the step does with it first, such as an accuracy without gradients.
        with torch.inference_mode(False), torch.enable_grad():
            value = self._linearize(tensor).detach()
            if tensor.requires_grad:
                value.requires_grad_()
            # A copy for the step to change in place.
            work = value.clone()
        self._leaves[key] = tensor, work
        self._enter(work, Kind.BOTH, None)
        if self._cut[maker].loss:  # and not only in what is logged
            self.outputs.append(Output(tensor, value, self._cut[maker].module))
        return work


def _mapped(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_mapped(function, branch) for branch in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(_mapped(function, branch) for branch in tree)
    if isinstance(tree, dict):
        return {key: _mapped(function, branch) for key, branch in tree.items()}
    return tree
