"""Checks of a capture: its data and network are deterministic, and its products consistent."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_ntk.data.reference import NoFixedOrderError, Reference
from lightning_ntk.linearization.jacobian import Jacobian
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.passes import close

# Relative tolerance of the random-probe checks, in roundings of the type of the passes.
_PROBE_ROUNDINGS = 1e4


def check_determinism(linearization: Linearization, reference: Reference, predictions: Tensor) -> None:
    """Requires data and outputs that do not change, and outputs that do not depend on the rest of the batch.

    `predictions` are the outputs of a complete pass, `(N, K)`.
    """
    batch = reference.read(0, reference.batch_size)
    again = reference.read(0, reference.batch_size)
    if not _equal((batch.inputs, batch.target), (again.inputs, again.target)):
        raise NoFixedOrderError(
            "Expected the reference data to be the same whenever it is read but two reads of its first samples differ: "
            "random augmentation or shuffling is active. Give a reference without it."
        )
    outputs = linearization.predict(batch.inputs)
    if not close(linearization.predict(batch.inputs), outputs):
        raise ValueError(
            "Expected the same outputs from the same inputs but two passes in eval mode differ: the forward draws random "
            "numbers, for example through F.dropout without training=self.training. Make it deterministic in eval mode."
        )
    if not close(outputs, predictions[batch.rows]):
        raise NoFixedOrderError(
            "Expected the reference data to be in a fixed order but its first samples gave other outputs in a complete pass: "
            "the data set returns other samples, or transforms them differently, in worker processes."
        )
    last = len(reference) - 1
    for row in {0, last // 2, last}:
        alone = linearization.predict(reference.read(row, row + 1).inputs)
        if not close(alone, predictions[row : row + 1], roundings=1e5):
            raise ValueError(
                f"Expected the outputs of a sample not to depend on its batch but those of sample {row} differ when it is alone: "
                "samples are coupled, for example by BatchNorm with batch statistics or by padding in the collate function. "
                "Such a network has no kernel of single samples."
            )


def check_adjoint(linearization: Linearization, jacobian: Jacobian, predictions: Tensor) -> None:
    """Requires <J v, u> = <v, J^T u> for random u and v over the whole data set; otherwise raises a RuntimeError."""
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
    """Requires u^T Theta u = |D^(1/2) J^T u|^2 for a random u: the kernel is of these weights, data and row order.

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


def _equal(first: Any, second: Any) -> bool:
    pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))
