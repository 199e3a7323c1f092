"""Checks that data and network are deterministic, and products consistent."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_ntk.data.reference import Batch, NoFixedOrderError, Reference
from lightning_ntk.linearization.jacobian import Jacobian
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.passes import close, require_finite
from lightning_ntk.utilities.contexts import full_precision

# Relative tolerance of the random-probe checks, in roundings of the type of the passes.
_PROBE_ROUNDINGS = 1e4
# Evenly spaced samples that are looked at before a pass over all.
_SAMPLES = 3


class _Watch(TorchFunctionMode):
    """Detects autocast, and a forward that uses parameters it should not.

    Other tensors stand in for these parameters.
    """

    def __init__(self, linearization: Linearization) -> None:
        super().__init__()
        self._live = {id(p): name for name, p in linearization.module.named_parameters() if p.requires_grad}
        self._kind = linearization.device.type
        self.live: set[str] = set()
        self.autocast = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(
            isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)
        ):  # else a question, such as that of a shape
            self.autocast |= torch.is_autocast_enabled(self._kind)
            self.live |= {self._live[id(x)] for x in pytree.tree_leaves((args, kwargs)) if id(x) in self._live}
        return result


def check_samples(linearization: Linearization, reference: Reference) -> None:
    """Checks on a few samples what products with a Jacobian require.

    It runs before all of them are read.

    The data is finite and the same when it is read again. Outputs are finite, one row for each sample, the same again and for a
    sample alone, in full precision, and depend on the parameters, which the forward uses as attributes of their modules.

    Raises:
        ValueError: If any of this does not hold; the message says which.
    """
    last = len(reference) - 1
    rows = sorted({last * i // (_SAMPLES - 1) for i in range(_SAMPLES)})
    some = reference.subset(rows)
    batch = some.read(0, len(rows))
    require_finite("inputs", batch.inputs, rows)
    require_finite("targets", batch.target, rows)
    _require_same_data(batch, some.read(0, len(rows)))
    with full_precision(linearization.device.type), _Watch(linearization) as watch:
        outputs = linearization.predict(batch.inputs)
    if len(outputs) != len(rows):
        raise ValueError(
            f"Expected one row of outputs per sample but got {len(outputs)} rows for {len(rows)} samples. "
            "Give `predict=lambda module, inputs: ...` that returns outputs (batch, outputs)."
        )
    if watch.autocast or torch.finfo(outputs.dtype).eps > torch.finfo(torch.float32).eps:
        raise ValueError(
            "Expected a forward in full precision but it computes in half precision, by `torch.autocast` or by conversions of "
            "its own. Give `predict=lambda module, inputs: ...` that calls the network without them."
        )
    if torch.finfo(outputs.dtype).eps > torch.finfo(linearization.dtype).eps:
        raise ValueError(
            f"Expected outputs in the type of the passes, {linearization.dtype}, but they are {outputs.dtype}: the forward "
            "converts them. Convert the module to that type, or give a `predict` that leaves them as they are."
        )
    if watch.live:
        raise ValueError(
            f"Expected a forward that reads its parameters from their modules but it reads {sorted(watch.live)} elsewhere, from "
            "a Python list for example, where other weights cannot stand in. Use nn.ParameterList, or the attribute itself."
        )
    require_finite("outputs", outputs, rows)
    _require_same_outputs(outputs, linearization.predict(batch.inputs))
    for number, row in enumerate(rows):
        _require_uncoupled(
            row, linearization.predict(some.read(number, number + 1).inputs), outputs[number : number + 1]
        )
    require_dependent(linearization, batch.inputs)


def require_dependent(linearization: Linearization, inputs: Any) -> None:
    """Raises a ValueError for outputs that depend on no parameter."""
    params = linearization.params.keys()
    if linearization.unused(inputs) == params:
        raise ValueError(
            f"Expected outputs that depend on a trainable parameter but they depend on none of {sorted(params)}. "
            "Return outputs that are not detached, and not computed under `torch.no_grad`."
        )


def check_determinism(linearization: Linearization, reference: Reference, predictions: Tensor) -> None:
    """Requires constant data and outputs, and samples independent of each other.

    An output must not depend on the rest of the batch.

    `predictions` are the outputs of a complete pass, `(N, K)`.
    """
    batch = reference.read(0, reference.batch_size)
    again = reference.read(0, reference.batch_size)
    _require_same_data(batch, again)
    outputs = linearization.predict(batch.inputs)
    _require_same_outputs(outputs, linearization.predict(batch.inputs))
    if not close(outputs, predictions[batch.rows]):
        raise NoFixedOrderError(
            "Expected the reference data to be in a fixed order but its first samples gave other outputs in a complete pass: "
            "the data set returns other samples, or transforms them differently, in worker processes."
        )
    last = len(reference) - 1
    for row in {0, last // 2, last}:
        alone = linearization.predict(reference.read(row, row + 1).inputs)
        _require_uncoupled(row, alone, predictions[row : row + 1])


def check_adjoint(linearization: Linearization, jacobian: Jacobian, predictions: Tensor) -> None:
    """Requires <J v, u> = <v, J^T u> over the whole data set.

    The vectors u and v are random. Otherwise raises a RuntimeError.
    """
    generator = torch.Generator().manual_seed(0)
    cotangent = _probe(predictions, generator)
    tangent = {name: _probe(p, generator) for name, p in linearization.params.items()}
    pushed = jacobian.jvp(tangent)
    pulled = {name: value[0] for name, value in jacobian.vjp(cotangent.unsqueeze(0)).items()}
    left = (pushed * cotangent).sum().item()
    right = sum((tangent[name].double() * value).sum().item() for name, value in pulled.items())
    scale = (pushed.norm() * cotangent.norm()).item()
    if abs(left - right) > _tolerance(linearization.dtype) * scale:
        raise RuntimeError(
            f"The Jacobian's two products disagree: <J v, u> = {left:.8g} but <v, J^T u> = {right:.8g} for random u and v. "
            "An operation of the network has a wrong derivative, or its forward is not deterministic."
        )


def check_kernel(
    jacobian: Jacobian, kernel: Tensor, predictions: Tensor, *, lr_scales: Mapping[str, float], dtype: torch.dtype
) -> None:
    """Requires u^T Theta u = |D^(1/2) J^T u|^2 for a random u.

    The kernel is then of these weights, data and row order.

    D are the `lr_scales`. The tolerance is that of `dtype`, the type in which the kernel was computed.
    """
    cotangent = _probe(predictions, torch.Generator().manual_seed(0))
    flat = cotangent.flatten().to(kernel)
    quadratic = (flat @ (kernel @ flat)).item()
    pulled = jacobian.vjp(cotangent.unsqueeze(0))
    expected = sum(lr_scales[name] * value.square().sum().item() for name, value in pulled.items())
    if not abs(quadratic - expected) <= _tolerance(dtype) * expected:
        raise ValueError(
            f"Expected the kernel of this network and data but u^T Theta u = {quadratic:.8g} where |J^T u|^2 = {expected:.8g} "
            "for a random u. A kernel computed earlier must be of the same weights, samples and order, rows n * K + k, and be "
            "given in the type in which it was computed."
        )


def _probe(like: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU: the same numbers on every device.
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _tolerance(dtype: torch.dtype) -> float:
    return _PROBE_ROUNDINGS * torch.finfo(dtype).eps


def _require_same_data(first: Batch, again: Batch) -> None:
    if not _equal((first.inputs, first.target), (again.inputs, again.target)):
        raise NoFixedOrderError(
            "Expected the reference data to be the same whenever it is read but two reads of the same samples differ: "
            "random augmentation or shuffling is active. Give a reference without it."
        )


def _require_same_outputs(outputs: Tensor, again: Tensor) -> None:
    if not close(again, outputs):
        raise ValueError(
            "Expected the same outputs from the same inputs but two passes in eval mode differ: the forward draws random "
            "numbers, for example through F.dropout without training=self.training. Make it deterministic in eval mode."
        )


def _require_uncoupled(row: int, alone: Tensor, together: Tensor) -> None:
    if not close(alone, together, roundings=1e5):
        raise ValueError(
            f"Expected the outputs of a sample not to depend on its batch but those of sample {row} differ when it is alone: "
            "samples are coupled, for example by BatchNorm with batch statistics or by padding in the collate function. "
            "Such a network has no kernel of single samples."
        )


def _equal(first: Any, second: Any) -> bool:
    pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))
