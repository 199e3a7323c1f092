"""Which method computes a part of the kernel in the fewest operations, and how many these are."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

from lightning_ntk.kernel.factors import Factor, Outer

Method: TypeAlias = Literal["gram", "shared", "dense"]

# An elementwise product, and an operation of the short products over positions, in operations of a long matrix product.
_ELEMENTWISE_COST = 16
_POSITIONS_COST = 3
# An operation of the passes through the network, which have elementwise functions in between.
PASS_COST = 2


class Cost(NamedTuple):
    """Multiply-adds for each sample, before the products of the kernel, and for each pair of samples, in these.

    Example:
        >>> Cost(2.0, 3.0) + Cost(1.0, 0.0)
        Cost(per_sample=3.0, per_pair=3.0)
        >>> Cost(2.0, 3.0).total(samples=4, pairs=10)
        38.0
    """

    per_sample: float = 0.0
    per_pair: float = 0.0

    def __add__(self, other: tuple[object, ...]) -> "Cost":
        """The cost of both."""
        assert isinstance(other, Cost)
        return Cost(self.per_sample + other.per_sample, self.per_pair + other.per_pair)

    def total(self, samples: float, pairs: float) -> float:
        """Multiply-adds for so many samples and pairs."""
        return self.per_sample * samples + self.per_pair * pairs


def cheapest_method(
    factors: Sequence[Factor], outputs: int, rows: int, columns: int, *, symmetric: bool
) -> tuple[Method, Cost]:
    """The method with the fewest operations for parameters that share their output gradients.

    Args:
        factors: Their Jacobians, rows being samples.
        outputs: K.
        rows: Samples of the first data set.
        columns: Samples of the second one.
        symmetric: Whether it is the first one again, so that half of the pairs are enough.
    """
    outers = [factor for factor in factors if isinstance(factor, Outer)]
    if not outers:
        return "dense", Cost(0.0, outputs**2 * sum(factor.shape.numel() for factor in factors))
    _, _, groups, positions, size = outers[0].gradients.shape
    width = sum(factor.width for factor in outers)
    gram_width = sum(1 if factor.one_hot else factor.width for factor in outers)
    if same_for_all_samples(outers[0]):
        return "shared", Cost(0.0, gram_width + outputs**2 * _ELEMENTWISE_COST)
    numel = groups * size * width
    # One-hot inputs are scattered.
    making = sum(_ELEMENTWISE_COST if factor.one_hot else factor.width for factor in outers)
    dense = Cost(outputs * positions * groups * size * making, outputs**2 * numel)
    if positions == 1:
        gram = Cost(0.0, groups * (gram_width + outputs**2 * (size + _ELEMENTWISE_COST)))
    else:
        mixed = positions**2 * outputs * size + outputs**2 * positions * size
        gram = Cost(0.0, groups * (positions**2 * gram_width + _POSITIONS_COST * mixed))
    samples, pairs = kernel_size(rows, columns, symmetric=symmetric)
    return ("gram", gram) if gram.total(samples, pairs) < dense.total(samples, pairs) else ("dense", dense)


def kernel_size(rows: int, columns: int, *, symmetric: bool) -> tuple[float, float]:
    """Samples and pairs of samples of a kernel, half of the pairs if it is symmetric."""
    return (rows, rows**2 / 2) if symmetric else (rows + columns, rows * columns)


def forward_cost(factors: Iterable[Factor], samples: int) -> float:
    """Multiply-adds of the layers behind `factors` in the forward pass of one sample."""
    total = 0
    for factor in factors:
        if isinstance(factor, Outer):
            rows, _, groups, positions, size = factor.gradients.shape
            total += 0 if factor.one_hot else rows * groups * positions * size * factor.width
        else:
            total += len(factor.jacobian) * factor.shape.numel()
    return total / samples


def same_for_all_samples(factor: Outer) -> bool:
    """Whether the gradients are one tensor repeated without copies: those at the outputs of the network itself."""
    samples, _, groups, positions, _ = factor.gradients.shape
    return groups == positions == 1 and (samples == 1 or factor.gradients.stride(0) == 0)
