"""The rounding of the passes over a network, measured against float64."""

import math
from collections.abc import Mapping
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ntk.data.reference import Reference
from lightning_ntk.functional.weights import difference, norm
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.utilities.contexts import preserved_rng
from lightning_ntk.utilities.shapes import Float, Float64

# Samples that are measured, in batches from all over the data set.
_SAMPLES, _BATCH = 128, 64
# Roundings of float64 in the outputs of a network, of which many cancel.
_FLOAT64_ROUNDINGS = 8


class Rounding(NamedTuple):
    r"""The errors of products with the Jacobian J and the kernel.

    They are for vectors of norm 1.

    Attributes:
        backward: The error of :math:`J^\top u`.
        forward: The error of :math:`J v`.
        outputs: The error of f0, :math:`|\delta f_0|`.
        weights: The rounding of weights near w0 to the type of the passes.
        kernel: The error of :math:`\Theta u` from the kernel's own entries.
        independent: Whether every product with the kernel has errors of its own, as without a kernel. Otherwise all of
            them have the errors of one computed J.
    """

    backward: float = 0.0
    forward: float = 0.0
    outputs: float = 0.0
    weights: float = 0.0
    kernel: float = 0.0
    independent: bool = False


@preserved_rng()
def measure_rounding(
    linearization: Linearization,
    reference: Reference,
    predictions: Float[Tensor, "N K"],
    targets: Float64[Tensor, "N K"],
    *,
    kernel: Float[Tensor, "N*K N*K"] | None = None,
    lr_scales: Mapping[str, float] | None = None,
) -> Rounding:
    """Compares passes over some of the samples with passes in float64.

    The cotangents are the residual, its image under the kernel, which points to the leading eigenvectors, and a random
    one. The tangents are what J^T makes of them. Errors of outputs are scaled to all samples, over which their squares add
    up. Costs three passes in each direction and type over at most 128 samples. Passes in float64 are not measured: the
    error bounds assume a few roundings for them.

    Args:
        linearization: The network in the type to measure.
        reference: The data set.
        predictions: The computed outputs f0, `(N, K)`.
        targets: Y, `(N, K)`.
        kernel: A kernel `(N K, N K)` whose entries have errors of their own.
        lr_scales: The diagonal matrix D, by parameter, where learning rates differ; J D^(1/2) is measured then.
    """
    unit = torch.finfo(linearization.dtype).eps / 2
    weights = unit * norm(linearization.params)
    if linearization.dtype == torch.float64 and kernel is None:
        return Rounding(outputs=_FLOAT64_ROUNDINGS * unit * predictions.norm().item(), weights=weights)
    exact = copy(linearization)
    exact.dtype = torch.float64
    exact.load_state_dict(linearization.state_dict())
    samples, size = len(reference), min(len(reference), reference.batch_size, _BATCH)
    count = max(1, min(samples, _SAMPLES) // size)
    starts = [i * (samples - size) // max(count - 1, 1) for i in range(count)]
    inputs = [reference.read(start, start + size).inputs for start in starts]
    rows = torch.cat([torch.arange(start, start + size) for start in starts])

    def vjp(network: Linearization, cotangent: Tensor) -> Tensors:
        parts = [network.vjp(u, batch) for u, batch in zip(torch.split(cotangent, size), inputs, strict=True)]
        return {
            name: root(name) * torch.stack([part[name] for part in parts]).sum(0, dtype=torch.float64)
            for name in parts[0]
        }

    def jvp(network: Linearization, tangent: Tensors) -> Tensor:
        scaled = {name: root(name) * value for name, value in tangent.items()}
        return torch.cat([network.jvp(scaled, batch) for batch in inputs]).double()

    def root(name: str) -> float:
        return 1.0 if lr_scales is None else math.sqrt(lr_scales[name])

    scale = math.sqrt(samples / len(rows))
    expected = torch.cat([exact.predict(batch) for batch in inputs])
    error = predictions[rows.to(predictions.device)].to(expected) - expected
    random = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    backward = forward = entries = 0.0
    cotangent = expected - targets[rows].to(expected)
    for probe in range(3):
        cotangent = cotangent if probe < 2 else random.to(expected)
        cotangent = cotangent / cotangent.norm().clamp_min(1e-300)
        pulled = vjp(exact, cotangent)
        length = norm(pulled)
        backward = max(backward, norm(difference(vjp(linearization, cotangent), pulled)))
        tangent = {name: value / max(length, 1e-300) for name, value in pulled.items()}
        image = jvp(exact, tangent)
        forward = max(forward, (jvp(linearization, tangent) - image).norm().item())
        if kernel is not None:
            entries = max(entries, (_product(kernel, rows, cotangent) - length * image).norm().item())
        cotangent = image
    return Rounding(backward, scale * forward, scale * error.norm().item(), weights, scale * entries)


def _product(kernel: Tensor, rows: Tensor, vector: Tensor) -> Tensor:
    """Theta u on the samples `rows` alone, `(n, K)`."""
    outputs = vector.shape[1]
    index = (rows.unsqueeze(1) * outputs + torch.arange(outputs)).flatten().to(kernel.device)
    product = kernel[index][:, index].double() @ vector.flatten().to(kernel.device)
    return product.reshape(vector.shape).to(vector)
