"""Estimates operations, and chooses the cheapest method for a part."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_ntk.kernel.factors import Factor, Outer, gradients_of
from lightning_ntk.kernel.readout import Readout

Method: TypeAlias = Literal["gram", "shared", "dense", "expanded", "vmap"]

# An elementwise product, and an operation of the short products over positions, in operations of a long matrix product.
_ELEMENTWISE_COST = 16
_POSITIONS_COST = 3
# An operation of the passes through the network, which have elementwise functions in between.
_PASS_COST = 2
# One element of a Jacobian made by vmap.
_VMAP_COST = 400


@dataclass(frozen=True)
class Cost:
    """The cost of a part of the kernel; those of several parts add up.

    Attributes:
        per_sample: Multiply-adds per sample, in the passes and up to the factors.
        per_pair: Multiply-adds per pair of samples.
        forward: Multiply-adds of a forward pass, per sample.
        factor_bytes: Memory for the factors, per sample.
        pass_bytes: Memory for the passes that make them, per sample.

    Example:
        >>> cost = Cost(per_sample=2, per_pair=3) + Cost(per_sample=1)
        >>> cost.total(samples=4, pairs=10)
        42.0
    """

    per_sample: float = 0
    per_pair: float = 0
    forward: float = 0
    factor_bytes: int = 0
    pass_bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        """The cost of both."""
        return Cost(*(one + another for one, another in zip(astuple(self), astuple(other), strict=True)))

    def total(self, samples: float, pairs: float) -> float:
        """Multiply-adds for these numbers of samples and pairs."""
        return float(self.per_sample * samples + self.per_pair * pairs)


def cheapest_method(
    factors: Sequence[Factor], outputs: int, forward: float, size: tuple[float, float], *, expand: bool = True
) -> tuple[Method, Cost]:
    """The method with the fewest operations for parameters that share their output gradients.

    The factors have one row per sample and any number of cotangents. `forward` is the multiply-adds of their layers in a
    forward pass, per sample; `size` the samples of the kernel and the pairs of samples; `expand` whether Jacobians may be made
    when they are multiplied.
    """
    passes = _PASS_COST * (1 + 2 * outputs) * forward
    numel = sum(factor.shape.numel() for factor in factors)
    jacobian = numel * outputs * gradients_of(factors[0]).element_size()
    outers = [factor for factor in factors if isinstance(factor, Outer)]
    if not outers:
        return "dense", Cost(passes, outputs**2 * numel, forward, jacobian, 3 * jacobian)
    gradients = outers[0].gradients
    samples, cotangents, groups, positions, length = gradients.shape
    inputs = sum(factor.inputs.nbytes for factor in outers) // samples
    recorded = inputs + gradients.nbytes * outputs // cotangents // samples
    gram_width = sum(1 if factor.one_hot else factor.width for factor in outers)
    used = sum(_used_width(factor) for factor in outers)
    if same_for_all_samples(outers[0]):
        pair = gram_width + outputs**2 * _ELEMENTWISE_COST
        return "shared", Cost(passes, pair, forward, inputs, 3 * inputs)
    if positions == 1:
        pair = groups * (gram_width + outputs**2 * (length + _ELEMENTWISE_COST))
    else:
        mixed = positions**2 * outputs * length + outputs**2 * positions * length
        pair = groups * (positions**2 * gram_width + _POSITIONS_COST * mixed)
    gram = Cost(passes, pair, forward, recorded, 3 * recorded)
    # One-hot inputs are scattered.
    making = sum(_ELEMENTWISE_COST if factor.one_hot else factor.width for factor in outers)
    making *= outputs * positions * groups * length
    if jacobian <= recorded or not expand:
        method: Method = "dense"
        dense = Cost(passes + making, outputs**2 * numel, forward, jacobian, jacobian + 2 * recorded)
    else:  # made again for each pair of blocks, of which there is one where the factors fit into memory
        method = "expanded"
        dense = Cost(passes + making, outputs**2 * groups * length * used, forward, recorded, 3 * recorded)
    return ("gram", gram) if gram.total(*size) < dense.total(*size) else (method, dense)


def _used_width(factor: Outer) -> int:
    """The number of inputs that are not always zero.

    For a table these are all rows, except those that all samples look up alike.
    """
    alike = factor.one_hot and bool((factor.inputs == factor.inputs[:1]).all())
    return len(torch.unique(factor.inputs[:1])) if alike else factor.width


def readout_cost(readout: Readout, outputs: int) -> Cost:
    """The cost of the outputs' kernel where that of the features is known."""
    width, inputs = readout.matrix.shape[1], readout.features[0].numel()
    pair = width * outputs * (width + outputs) + outputs**2 * _ELEMENTWISE_COST
    memory = readout.features[0].nbytes
    if readout.tokens is not None and readout.gradients is not None:
        pair += outputs * width * (outputs + 2 * readout.tokens.shape[1])
        memory += width * readout.gradients[0, :, 0].nbytes + readout.tokens[0].nbytes
    forward = outputs * inputs
    return Cost(_PASS_COST * forward, pair, forward, memory, 3 * memory)


def vmap_cost(parameter: Tensor, outputs: int) -> Cost:
    """The cost of a parameter whose per-sample Jacobians are made by vmap."""
    numel, jacobian = parameter.numel(), outputs * parameter.nbytes
    return Cost(_VMAP_COST * outputs * numel, outputs**2 * numel, numel, jacobian, 2 * jacobian)


def forward_cost(factor: Factor) -> float:
    """Multiply-adds of the call behind a factor in the forward pass, over all rows."""
    if isinstance(factor, Outer):
        rows, _, groups, positions, size = factor.gradients.shape
        return 0 if factor.one_hot else rows * groups * positions * size * factor.width
    return len(factor.jacobian) * factor.shape.numel()


def same_for_all_samples(factor: Outer) -> bool:
    """Whether all samples share one tensor of gradients.

    This is so at the outputs of the network itself.
    """
    samples, _, groups, positions, _ = factor.gradients.shape
    return groups == positions == 1 and (samples == 1 or factor.gradients.stride(0) == 0)
