"""Records which calls use which parameters, and their output gradients.

These make the factors of a batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_ntk.kernel.factors import Use
from lightning_ntk.kernel.readout import Choice, Readout, find_choice
from lightning_ntk.kernel.rules.layers import RULES, Rule
from lightning_ntk.kernel.rules.recurrent import UNROLLED
from lightning_ntk.kernel.views import (
    VIEWS,
    Selection,
    depends_on_batch,
    follow_batch,
    looked_up,
    mark_batch,
    of_parameter,
    view_of,
)
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.utilities.contexts import isolated_pass


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a function that has a rule."""

    rule: Rule
    names: frozenset[str]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    result: Tensor
    """What the network went on with, a copy of the output, so that an operation in place spares the output."""


class Usage(NamedTuple):
    """How a forward pass used the parameters.

    Attributes:
        factors: For every stack of cotangents the factors of every call.
        uncovered: Parameters that were used, also, where no rule applies.
        outputs: `(N, K)`.
        output_bytes: Those of the outputs of all calls.
        wide: Whether the network has more outputs than its last call, a linear layer, has features.
        head: A last linear layer with more outputs than features. The factors are those of its inputs, where this was asked.
    """

    factors: list[list[Use]]
    uncovered: set[str]
    outputs: Tensor
    output_bytes: int
    wide: bool = False
    head: "Head | None" = None


class Head(NamedTuple):
    """The network's outputs as some of a linear layer's.

    Attributes:
        readout: What the layer does, without the embedding that its weight may be.
        weight: The weight's name.
        bias: The bias's name.
    """

    readout: Readout
    weight: str | None
    bias: str | None


class _Recorder(TorchFunctionMode):
    """Sees every operation that is given a parameter, by the identity of the tensor."""

    def __init__(self, params: Tensors) -> None:
        super().__init__()
        self.params = params
        self.names = {id(tensor): name for name, tensor in params.items()}
        # With the selecting tensor, so that no other takes its identity.
        self.selections: dict[int, tuple[Selection, Tensor]] = {}
        self.calls: list[Call] = []
        self.uncovered: set[str] = set()
        self.recording = True

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = _leaves((args, kwargs))
        names = frozenset(self.names[id(x)] for x in leaves if id(x) in self.names)
        result = self._run(func, names, args, kwargs) if names else func(*args, **kwargs)
        if any(depends_on_batch(x) for x in leaves):
            follow_batch(func, args, _leaves(result))
        return result

    def _run(
        self, func: Callable[..., Any], names: frozenset[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if torch.is_grad_enabled():  # off in the forward of a custom autograd Function, whose backward is its own
            if func in UNROLLED:
                with self:
                    result = UNROLLED[func](*args, **kwargs)
                if result is not NotImplemented:
                    return result
            if func is F.embedding and self._select(func, names, args, kwargs, [looked := func(*args, **kwargs)]):
                return looked
            if func in RULES:
                return self._call(func, names, args, kwargs)
            if isinstance(func, FunctionType) and func.__module__ == F.__name__:
                with self:
                    return _body(func)(*args, **kwargs)
        result = func(*args, **kwargs)
        if torch.is_grad_enabled() and self._select(func, names, args, kwargs, _leaves(result)):
            return result
        # Questions about a parameter, such as its shape, and conversions that return it as it is are no uses.
        if self.recording and any(isinstance(x, Tensor) and id(x) not in self.names for x in _leaves(result)):
            self.uncovered |= names
        return result

    def _select(
        self,
        func: Callable[..., Any],
        names: frozenset[str],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        results: list[Any],
    ) -> bool:
        """Whether the results are parts of a parameter.

        If so, they stand for it from now on.
        """
        if len(names) > 1:
            return False
        (name,) = names
        selections: list[Selection | None] = []
        if func in VIEWS:
            selections = [view_of(name, self.params[name], result) for result in results]
        elif func is F.embedding:
            selections = [looked_up(name, self.params[name], *args, **kwargs)]
        found = [selection for selection in selections if selection is not None]
        if not found or len(found) < len(results):
            return False
        for result, selection in zip(results, found, strict=True):
            self.names[id(result)] = name
            self.selections[id(result)] = selection, result
        return True

    def _call(
        self, func: Callable[..., Any], names: frozenset[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        output: Tensor = func(*args, **kwargs)
        if not output.requires_grad:
            output.requires_grad_()
        result = output.clone()
        # Activation checkpointing runs calls again during the backward passes.
        if self.recording:
            self.calls.append(Call(RULES[func], names, args, kwargs, output, result))
        return result


def record_usage(
    linearization: Linearization,
    inputs: Any,
    cotangents: Callable[[Tensor], Sequence[Tensor]],
    *,
    from_features: bool = False,
) -> Usage:
    """The factors of every use of a parameter, from one forward pass.

    `cotangents` maps the outputs `(N, K)` to stacks `(C, N, K)`. C backward passes each give the gradients of C weighted sums
    of the outputs, and factors with C in the place of K. As samples do not interact, one pass serves all samples.

    With `from_features`, where a last linear layer has more outputs than features, the features take the place of the
    outputs.
    """
    params = linearization.spare({name: p.detach() for name, p in linearization.params.items()})
    recorder = _Recorder(params)

    def differentiate(outputs: Tensor) -> Usage:
        recorder.recording = False
        output_bytes = sum(call.output.nbytes for call in recorder.calls)
        if from_features and (found := _find_head(recorder, outputs)):
            head, choice = found
            last = recorder.calls.pop()
            gradients = _output_gradients(last.args[0], recorder.calls, choice.cotangents(last.args[0]))
            with torch.no_grad():
                uses = list(_apply_rules(recorder, gradients))
            return Usage([uses], recorder.uncovered, outputs.detach(), output_bytes, True, head)
        stacks = []
        for stack in cotangents(outputs.detach()):
            gradients = _output_gradients(outputs, recorder.calls, stack)
            with torch.no_grad():
                stacks.append(list(_apply_rules(recorder, gradients)))
        return Usage(stacks, recorder.uncovered, outputs.detach(), output_bytes, _is_wide(recorder, outputs))

    inputs = mark_batch(linearization.convert(inputs))
    isolated = isolated_pass(linearization.module, linearization.device.type)
    with isolated, torch.enable_grad(), torch.compiler.set_stance("force_eager"), recorder:
        return linearization.apply(params, inputs, differentiate)


def one_hot_cotangents(outputs: Tensor) -> Tensor:
    """Makes a cotangent for each output, `(K, N, K)`.

    It is the same for all samples, and held once.
    """
    samples, classes = outputs.shape
    return torch.eye(classes, dtype=outputs.dtype, device=outputs.device).unsqueeze(1).expand(-1, samples, -1)


def _is_wide(recorder: _Recorder, outputs: Tensor) -> bool:
    if not recorder.calls or outputs.dim() != 2:
        return False
    last = recorder.calls[-1]
    linear = last.rule is RULES[F.linear] and not last.kwargs and len(last.args) in (2, 3)
    return linear and last.args[0].shape[-1] < outputs.shape[1]


def _find_head(recorder: _Recorder, outputs: Tensor) -> tuple[Head, Choice] | None:
    if not _is_wide(recorder, outputs):
        return None
    last = recorder.calls[-1]
    inputs, weight, bias = (*last.args, None)[:3]
    selected = any(id(x) in recorder.selections for x in (weight, bias))
    if selected or weight.dim() != 2 or (choice := find_choice(outputs, last.result)) is None:
        return None
    features = choice.features(inputs.detach())
    if features[0].numel() >= outputs.shape[1]:
        return None
    weight_name, bias_name = (recorder.names.get(id(x)) for x in (weight, bias))
    scales = float(weight_name is not None), float(bias_name is not None)
    readout = Readout(weight.detach(), features, choice.slots, choice.columns, scales)
    return Head(readout, weight_name, bias_name), choice


def _output_gradients(outputs: Tensor, calls: list[Call], cotangents: Tensor) -> list[Tensor]:
    """The gradients `(C, *shape)` at the output of every call."""
    # Those at the outputs of the network are known: the structured head of Novak et al., 2022.
    inner = [call.output for call in calls if call.result is not outputs]
    stacks = [x.new_zeros((len(cotangents), *x.shape)) for x in inner]
    if inner and outputs.requires_grad:
        # The recorder stays on: activation checkpointing recomputes what was saved while it was.
        gradient_of = _body(torch.autograd.grad)
        for index, cotangent in enumerate(cotangents):
            gradients = gradient_of(
                outputs, inner, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for stack, gradient in zip(stacks, gradients, strict=True):
                stack[index] = gradient
    remaining = iter(stacks)
    return [cotangents if call.result is outputs else next(remaining) for call in calls]


def _apply_rules(recorder: _Recorder, gradients: list[Tensor]) -> Iterator[Use]:
    for call, gradient in zip(recorder.calls, gradients, strict=True):
        covered = set()
        args, kwargs = pytree.tree_map_only(Tensor, _detached, (call.args, call.kwargs))
        enlarged: dict[int, Tensor] = {}
        for tensor, factor in call.rule(gradient, *args, **kwargs):
            name = recorder.names.get(id(tensor))
            if name is not None:
                covered.add(name)
                if id(tensor) in recorder.selections:
                    factor = of_parameter(factor, recorder.selections[id(tensor)][0], enlarged)
                yield name, factor
        recorder.uncovered |= call.names - covered


def _detached(tensor: Tensor) -> Tensor:
    # Parameters need no detaching here, and are recognized by their identity.
    return tensor.detach() if tensor.requires_grad else tensor


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, tuple | list):
        return [leaf for branch in tree for leaf in _leaves(branch)]
    return [tree]


@cache
def _body(func: Any) -> Any:
    """The Python body of a PyTorch function, without its check for overrides.

    The recorder then sees the calls in it.
    """
    # PyTorch has no public way to run a function's own body while a TorchFunctionMode stays on: called within the mode, the
    # function only asks the mode again, and outside of it the parts are not seen.
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    scope = {**func.__globals__, **dict.fromkeys(names, lambda *_: False)}
    body = FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body
