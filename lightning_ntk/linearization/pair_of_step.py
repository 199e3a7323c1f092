"""Checks whether a training step is a loss of outputs and targets.

Dynamics on a kernel need such a loss, with outputs `(B, K)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_ntk.data.reference import Unpack, unpack_pair
from lightning_ntk.data.targets import match_targets
from lightning_ntk.linearization.batch_loss import BatchLoss, PairLoss
from lightning_ntk.linearization.cut_step import LossCall
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.network import Predict, call_module
from lightning_ntk.linearization.objective import Loss
from lightning_ntk.linearization.step import StepLinearization
from lightning_ntk.utilities.contexts import isolated_pass, preserved_rng

# By how much the weights are moved to compare gradients, relative to their root mean square.
_MOVED = 0.1
TRANSFORMED = "the loss function gets a transformation of the outputs that are linearized"
_NO_FUNCTION = "the loss is more than one loss function of torch.nn.functional, and no squared distance"


class Pair(NamedTuple):
    """What a training step computes, as `LinearizedProblem` takes it.

    Attributes:
        loss: Maps outputs and targets to one number.
        predict: Maps module and inputs to outputs; None for the module itself.
        unpack: Maps a batch to inputs and target; None for batches that are such pairs.
    """

    loss: Loss
    predict: Predict | None
    unpack: Unpack | None = None


class NoPairError(ValueError):
    """A training step is not a loss of outputs and targets.

    The message is a phrase that says why.

    Attributes:
        pair: The loss of outputs and targets where only the outputs are not those of the forward in eval mode.
    """

    pair: Pair | None = None


def pair_of_step(step: StepLinearization, batch: Any) -> Pair:
    """Finds the loss of outputs and targets that a training step computes.

    The outputs are those of the network's forward.

    It is found if the step returns what one function of `torch.nn.functional` gives for the outputs of `forward` and the target
    of a pair `(inputs, target)`, or a multiple of their squared distance, however that is written; if the forward is the same in
    train and in eval mode; and if both have the same gradient at other weights of the linearized network: then it makes no
    difference where the outputs are linearized.

    Args:
        step: The training step.
        batch: A batch of the run.

    Raises:
        NoPairError: If the step is anything else.
    """
    found = step.first_outputs(batch)
    if found is None:
        raise NoPairError("the training step has no loss for the first batch")
    try:
        inputs, target = unpack_pair(step.copy(batch))
    except ValueError:
        raise NoPairError("the batches are no pairs (inputs, target)") from None
    if target is None:
        raise NoPairError("the batches have no target")
    call = found.losses[0] if len(found.losses) == 1 and found.returned else None
    if call is None and len(found.outputs) != 1:
        raise NoPairError(_NO_FUNCTION)
    if call is not None and (len(call.args) < 2 or not all(isinstance(tensor, Tensor) for tensor in call.args[:2])):
        raise NoPairError("the loss is not one of outputs and targets")
    try:
        with isolated_pass(step.module, step.device.type), preserved_rng(), torch.no_grad():
            outputs = call_module(step.module, inputs)
    except Exception:  # whatever a forward that is not meant to be called like this may raise
        raise NoPairError("the module has no `forward` that takes the inputs of a batch") from None
    given = found.outputs[0] if call is None else call.args[0]
    if call is None and not (isinstance(outputs, Tensor) and outputs.numel() == given.numel()):
        raise NoPairError(_NO_FUNCTION)
    pair = _as_squared(found.loss, outputs, target) if call is None else pair_of_call(call, outputs, target)
    if (outputs.reshape(given.shape) - given).norm() > torch.finfo(step.precision).eps ** 0.5 * given.norm():
        error = NoPairError("the training step does not use the outputs that `forward` gives in eval mode")
        error.pair = pair
        raise error
    require_equal_gradients(step, pair, batch, _NO_FUNCTION if call is None else TRANSFORMED)
    return _reduced(step, pair, outputs, target, batch) if call is None else pair


def pair_of_call(call: LossCall, outputs: Any, target: Tensor) -> Pair:
    """The pair of a call of a loss function.

    It has the outputs and the target of a batch.

    Raises:
        NoPairError: If the function gets others.
    """
    given, wanted = call.args[:2]
    if not isinstance(outputs, Tensor) or outputs.dim() not in (1, 2) or len(outputs) != len(target):
        raise NoPairError("`forward` returns no outputs (samples, outputs)")
    squeezed = given.shape != outputs.shape
    if squeezed and not (outputs.dim() == 2 and given.shape == outputs.shape[:1] and outputs.shape[1] == 1):
        raise NoPairError("the loss function gets a transformation of the outputs")
    reshaped = wanted.shape != target.shape
    if wanted.numel() != target.numel() or not bool((wanted == target.view_as(wanted).to(wanted.device)).all()):
        raise NoPairError("the loss function gets a transformation of the targets")
    loss = _Called(call.function, call.args[2:], call.kwargs, reshaped, wanted.is_floating_point())
    return Pair(loss, _squeezed if squeezed else None)


def _as_squared(loss: Tensor, outputs: Tensor, target: Tensor) -> Pair:
    """The multiple of the mean squared distance that has the value of the loss."""
    square = (outputs - _rows(target, outputs)).double().square().sum()
    return Pair(_Squared((loss.double() * len(outputs) / square).item(), mean=True), None)


def _reduced(step: StepLinearization, pair: Pair, outputs: Tensor, target: Tensor, batch: Any) -> Pair:
    """Makes the pair a mean over samples or a sum.

    The loss of half the batch decides which.
    """
    size, half = len(outputs), len(outputs) // 2
    assert isinstance(pair.loss, _Squared)
    described = step.linearized_outputs
    try:
        part = step.first_outputs(pytree.tree_map_only(Tensor, lambda leaf: leaf[:half], batch)) if half else None
    except Exception:  # whatever a step may raise that takes batches of one size alone
        part = None
    step.linearized_outputs = described
    tolerance = torch.finfo(step.precision).eps ** 0.5
    mean = pair.loss(outputs[:half], _rows(target, outputs)[:half]).double()
    for loss, expected in ((pair.loss, mean), (pair.loss.summed(size), mean * half / size)):
        if part is not None and abs(part.loss.double() - expected) <= tolerance * expected:
            return Pair(loss, None)
    raise NoPairError("the loss is neither a mean nor a sum over samples")


def _rows(target: Tensor, outputs: Tensor) -> Tensor:
    """The targets with the shape of the outputs."""
    flat = outputs.dim() == 1
    try:
        rows = match_targets(target, outputs.unsqueeze(1) if flat else outputs, flat=flat)
    except (ValueError, RuntimeError):
        raise NoPairError(_NO_FUNCTION) from None
    return rows.to(outputs).view_as(outputs)


def require_equal_gradients(step: StepLinearization, pair: Pair, batch: Any, otherwise: str) -> None:
    """Raises a NoPairError unless pair and step have the same gradient.

    Its message is the phrase `otherwise`; see `same_gradient`.
    """
    linearization = Linearization(step.module, predict=pair.predict)
    if not same_gradient(step, PairLoss(linearization, pair.loss, unpack=pair.unpack), batch):
        raise NoPairError(otherwise)


def same_gradient(step: StepLinearization, loss: BatchLoss, batch: Any) -> bool:
    """Whether a loss has the gradient of the step.

    The gradients are of the linearized network, at weights some way from w0.
    """
    generator = torch.Generator().manual_seed(0)
    tangent = {}
    for name, start in step.params.items():
        noise = torch.randn(start.shape, generator=generator).to(start)
        tangent[name] = _MOVED * noise * start.square().mean().sqrt().clamp_min(_MOVED)
    with preserved_rng():
        own, other = step.gradient(batch, tangent, update=False), loss.gradient(step.copy(batch), tangent)
    assert own is not None
    assert other is not None
    apart = torch.stack([(own[name].double() - value.double()).norm() for name, value in other.items()]).norm()
    size = torch.stack([value.double().norm() for value in other.values()]).norm()
    return bool(apart <= torch.finfo(step.precision).eps ** 0.5 * size)


def _squeezed(module: nn.Module, inputs: Any) -> Tensor:
    return call_module(module, inputs).squeeze(1)


class _Squared:
    """A multiple of the squared distance of outputs from targets.

    It is a mean or a sum over samples.
    """

    def __init__(self, factor: float, *, mean: bool) -> None:
        self._factor, self._mean = factor, mean

    def summed(self, size: int) -> "_Squared":
        """The sum with the same value for `size` samples."""
        return _Squared(self._factor / size, mean=False)

    def __call__(self, outputs: Tensor, target: Tensor) -> Tensor:
        total = self._factor * (outputs - target).square().sum()
        return total / len(outputs) if self._mean else total

    def __repr__(self) -> str:
        return f"{self._factor:.4g} times the squared distance, {'a mean' if self._mean else 'summed'} over samples"


class _Called:
    """A function of outputs and targets, with its other arguments fixed.

    They are those with which a training step called it.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        reshaped: bool,
        floating: bool,
    ) -> None:
        self._function, self._args, self._kwargs = function, args, kwargs
        self._reshaped, self._floating = reshaped, floating

    def __call__(self, outputs: Tensor, target: Tensor) -> Tensor:
        wanted = target.view_as(outputs) if self._reshaped else target
        wanted = wanted.to(outputs.dtype) if self._floating else wanted

        def like(value: Any) -> Any:
            return value.to(outputs) if isinstance(value, Tensor) and value.is_floating_point() else value

        kwargs = {name: like(value) for name, value in self._kwargs.items()}
        return self._function(outputs, wanted, *map(like, self._args), **kwargs)

    def __repr__(self) -> str:
        return f"torch.nn.functional.{getattr(self._function, '__name__', self._function)}"
