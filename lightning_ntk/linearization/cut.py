"""The cut of a step: where its network ends and its loss begins.

It is the last place where a parameter meets data.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_ntk.linearization.tracker import Kind, Tracker, tensors_of, written_base

# Functions without random numbers and states: the loss computes them again, from linearized outputs of the network.
_PLAIN = frozenset({
    "relu", "relu_", "softmax", "log_softmax", "sigmoid", "tanh", "exp", "log", "softplus", "elu", "gelu", "silu",
    "leaky_relu", "normalize", "mul", "add", "sub", "div", "true_divide", "__mul__", "__rmul__", "__add__", "__radd__",
    "__sub__", "__rsub__", "__truediv__", "__neg__", "neg", "__getitem__", "chunk", "split", "unbind", "view", "reshape",
    "flatten", "transpose", "permute", "squeeze", "unsqueeze", "clamp", "pow", "__pow__", "square", "sqrt", "rsqrt", "mean",
    "sum", "stack", "cat", "expand", "t", "expand_as", "contiguous", "to", "float", "double", "type_as", "movedim",
    "unflatten", "view_as", "logsumexp", "norm", "topk", "broadcast_tensors",
})  # fmt: skip


class Call(NamedTuple):
    """A call in a step whose arguments depend on a parameter.

    Attributes:
        function: The function that was called.
        network: Whether the result flows into a call in which a parameter meets data.
        loss: Whether the result flows into the loss in another way.
        depends: Whether the result depends on the parameter, and not only on its shape or type.
        module: The innermost module that was running, by name.
        again: Whether the loss computes the result again, from linearized outputs of the network: what both need of an output.
    """

    function: Callable[..., Any]
    network: bool
    loss: bool
    depends: bool
    module: str
    again: bool = False


Cut = tuple[Call, ...]


class CutRecorder(Tracker):
    """Watches a step and finds its cut.

    A call belongs to the network if a parameter meets data in it, or if its result flows into such a call later. All others
    belong to the loss. Numbers do not make a network: a loss times a learned weight is a loss.

    Args:
        parameters: The parameters of the network, trainable and frozen ones.
        batch: The tensors of the batch.
        network: Names of modules whose outputs are the network's. Default: found by the rule.

    Attributes:
        precision: The least precise floating-point type of the results so far.
    """

    def __init__(self, parameters: Sequence[Tensor], batch: Sequence[Tensor], network: Sequence[str] = ()) -> None:
        super().__init__(parameters, batch)
        self._network = set(network)
        self._numbers: set[int] = set()  # tensors that are made of numbers of the network, as losses, and of parameters
        self._records: list[tuple[Callable[..., Any], bool, bool, set[int], str]] = []
        self.precision = torch.float64

    def _call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], kind: Kind
    ) -> Any:
        reads = {self._makers[id(t)] for t in tensors if id(t) in self._makers}
        data = [t for t in tensors if self._kind(t) & Kind.DATA]
        numbers = bool(data) and all(self._is_number(t) for t in data)
        meets = any(self._kind(t) is Kind.PARAMETERS for t in tensors) and any(t.dim() for t in tensors) and not numbers
        result = func(*args, **kwargs)
        results = list(tensors_of(result))
        if not results:  # a query, such as that of a size
            return result
        for tensor in results:
            if tensor.is_floating_point() and torch.finfo(tensor.dtype).eps > torch.finfo(self.precision).eps:
                self.precision = tensor.dtype
        # Frozen parameters need no gradient; what is made of them and nothing else is as they are.
        frozen = kind is Kind.PARAMETERS and not any(t.requires_grad for t in tensors)
        depends = frozen or not torch.is_grad_enabled() or any(t.requires_grad for t in results)
        if self._network:
            meets = not self._network.isdisjoint(self.running)
        written = written_base(func, args)
        if written is not None and id(written) in self._makers:  # what is written into a view is in its base, too
            reads.add(self._makers[id(written)])
        self._enter(result, kind if depends else Kind(kind & Kind.DATA), len(self._records) if depends else None)
        if written is not None and depends:
            self._enter(written, Kind(kind | self._kind(written)), len(self._records))
        for tensor in results:
            if numbers:
                self._numbers.add(id(tensor))
            else:
                self._numbers.discard(id(tensor))
        self._records.append((func, depends and meets and kind is Kind.BOTH, depends, reads, self._module()))
        return result

    def _is_number(self, tensor: Tensor) -> bool:
        return self._kind(tensor) is Kind.BOTH and (tensor.dim() == 0 or id(tensor) in self._numbers)

    def cut(self, loss: Tensor) -> Cut:
        """The cut of the step that has returned this loss.

        Raises:
            ValueError: If the loss itself is where a parameter meets data last, or no parameter meets data.
        """
        network = [meets for _, meets, _, _, _ in self._records]
        plain = [
            not meets and depends and getattr(func, "__name__", "") in _PLAIN
            for func, meets, depends, _, _ in self._records
        ]
        for index in reversed(range(len(network))):
            if network[index]:
                for read in self._records[index][3]:
                    network[read] = True
        last = self._makers.get(id(loss))
        if last is not None and network[last]:
            raise ValueError(
                "Expected a loss that is computed from the outputs of a network but a parameter meets data last in the loss "
                f'itself, in {_place(self._records[last][4])}. Name the network: network="...", a submodule whose outputs '
                "are linearized."
            )
        needed, used, again = ([False] * len(network) for _ in range(3))
        if last is not None:
            needed[last] = used[last] = True
        for index in reversed(range(len(network))):
            again[index] = network[index] and used[index] and plain[index] and not self._network
            for read in self._records[index][3] if needed[index] else ():
                needed[read] = True
                used[read] |= again[index] or not network[index]
        if not any(network):
            raise ValueError(
                "Expected a network whose parameters meet the batch but none does: the loss depends on parameters alone, or "
                "on tensors that the training step does not get from its batch."
            )
        return tuple(
            Call(func, is_network, is_used, depends, module, is_again)
            for (func, _, depends, _, module), is_network, is_used, is_again in zip(
                self._records, network, used, again, strict=True
            )
        )

    def _module(self) -> str:
        return self.running[-1] if self.running else ""


def _place(module: str) -> str:
    return f"`{module}`" if module else "the training step"
