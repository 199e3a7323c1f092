"""Distances between the weights of a trained network and those of its linearization."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ntk.utilities.validation import require_same_names

_CHUNK = 2**18


def weight_distances(displacement: Mapping[str, Tensor], linearized: Mapping[str, Tensor]) -> dict[str, float]:
    r"""Measures how far the trained weights are from the linearized ones.

    Args:
        displacement: w_t - w_0 of the trained network, by parameter name.
        linearized: w_lin(t) - w_0 of the linearized network.

    Returns:
        `weight_distance` :math:`|w_t - w_\text{lin}|`, `relative_weight_distance` (divided by :math:`|w_t - w_0|`),
        `weight_cosine` of the two displacements, `weight_norm_ratio` :math:`|w_\text{lin} - w_0| / |w_t - w_0|` and
        `displacement` :math:`|w_t - w_0|`. If neither network has moved, the distance is 0, and cosine and ratio are 1.

    Raises:
        ValueError: If names or shapes differ.

    Example:
        >>> distances = weight_distances({"weight": torch.tensor([3.0, 4.0])}, {"weight": torch.tensor([3.0, 0.0])})
        >>> {name: round(value, 12) for name, value in distances.items()}
        {'weight_distance': 4.0, 'relative_weight_distance': 0.8, 'weight_cosine': 0.6, 'weight_norm_ratio': 0.6,
         'displacement': 5.0}
    """
    sums = weight_sums(displacement, linearized)
    distances = {
        "weight_distance": sums.distance.sqrt(),
        "relative_weight_distance": sums.relative_distance,
        "weight_cosine": sums.cosine,
        "weight_norm_ratio": sums.norm_ratio,
        "displacement": sums.displacement.sqrt(),
    }
    return {name: value.item() for name, value in distances.items()}


def parameter_distances(displacement: Mapping[str, Tensor], linearized: Mapping[str, Tensor]) -> dict[str, float]:
    """Computes `relative_weight_distance` for each parameter tensor.

    Args:
        displacement: w_t - w_0 of the trained network, by parameter name.
        linearized: w_lin(t) - w_0 of the linearized network.

    Raises:
        ValueError: If names or shapes differ.
    """
    require_same_names(_shaped(linearized), _shaped(displacement))
    return {
        name: weight_sums({name: value}, {name: linearized[name]}).relative_distance.item()
        for name, value in displacement.items()
    }


def difference(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], *, dtype: torch.dtype | None = torch.float64
) -> Mapping[str, Tensor]:
    """Subtracts `second` from `first`, parameter by parameter.

    Each tensor is computed on request and not kept, so that no second copy of all weights is held.

    Args:
        first: Tensors by name.
        second: Tensors with the same names and shapes.
        dtype: The type in which they are subtracted; None for their own.

    Raises:
        ValueError: If names or shapes differ.

    Example:
        >>> difference({"weight": torch.tensor([3.0, 1.0])}, {"weight": torch.ones(2)})["weight"]
        tensor([2., 0.], dtype=torch.float64)
    """
    require_same_names(_shaped(second), _shaped(first))
    return _Difference(first, second, dtype)


class _Difference(Mapping[str, Tensor]):
    def __init__(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
        self.first, self._second, self._dtype = first, second, dtype

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.first[name].detach(), self._second[name].detach()

    def __getitem__(self, name: str) -> Tensor:
        first, second = self.pair(name)
        return first.to(self._dtype, copy=True).sub_(second.to(self._dtype))

    def __iter__(self) -> Iterator[str]:
        return iter(self.first)

    def __len__(self) -> int:
        return len(self.first)


def inner_product(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Computes the inner product of two weight vectors in float64.

    Raises:
        ValueError: If names or shapes differ.

    Example:
        >>> inner_product({"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.ones(2), "b": torch.full((1,), 3.0)})
        5.0
    """
    require_same_names(_shaped(second), _shaped(first))
    products = [(value.double() * second[name].double()).sum() for name, value in first.items()]
    return torch.stack(products).sum().item()


def norm(weights: Mapping[str, Tensor]) -> float:
    """Computes the Euclidean norm of a weight vector in float64."""
    return math.sqrt(inner_product(weights, weights))


class WeightSums(NamedTuple):
    """Squared norms and the inner product of weight displacements.

    They are |w_t - w_lin|^2, |w_t - w_0|^2, |w_lin - w_0|^2 and <w_t - w_0, w_lin - w_0>, which add up over parameters.
    """

    distance: Tensor
    displacement: Tensor
    linearized: Tensor
    product: Tensor

    @property
    def relative_distance(self) -> Tensor:
        """|w_t - w_lin| / |w_t - w_0|; 0 if neither network has moved."""
        return ratio_of_norms(self.distance, self.displacement)

    @property
    def cosine(self) -> Tensor:
        """The cosine of the two displacements; 1 if neither network has moved."""
        cosine = ratio(self.product, self.displacement.sqrt() * self.linearized.sqrt())
        return torch.where(self.displacement + self.linearized == 0, 1.0, cosine)

    @property
    def norm_ratio(self) -> Tensor:
        """|w_lin - w_0| / |w_t - w_0|; 1 if neither network has moved."""
        quotient = ratio_of_norms(self.linearized, self.displacement)
        return torch.where(self.displacement + self.linearized == 0, 1.0, quotient)


def weight_sums(displacement: Mapping[str, Tensor], linearized: Mapping[str, Tensor]) -> WeightSums:
    """Sums the products of two displacements over all parameters, in float64."""
    require_same_names(_shaped(linearized), _shaped(displacement))
    parameters = []
    for name in displacement:
        for moved, other in zip(_pieces(displacement, name), _pieces(linearized, name), strict=True):
            squares = [x.square().sum() for x in (moved - other, moved, other)]
            parameters.append(torch.stack([*squares, (moved * other).sum()]))
    return WeightSums(*torch.stack(parameters).sum(0))


def _shaped(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors of the same names and shapes that are there without being computed."""
    return tensors.first if isinstance(tensors, _Difference) else tensors


def _pieces(tensors: Mapping[str, Tensor], name: str) -> Iterator[Tensor]:
    """A tensor in float64, piece by piece, so that no large one is copied."""
    if isinstance(tensors, _Difference):
        first, second = tensors.pair(name)
        for left, right in zip(
            torch.split(first.flatten(), _CHUNK), torch.split(second.flatten(), _CHUNK), strict=True
        ):
            yield left.double() - right.double()
    else:
        for piece in torch.split(tensors[name].flatten(), _CHUNK):
            yield piece.double()


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divides, with 0 / 0 = 0: points that coincide have distance 0."""
    return torch.where((numerator == 0) & (denominator == 0), 0.0, numerator / denominator)


def ratio_of_norms(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divides the norms whose squares are given, with 0 / 0 = 0."""
    return ratio(numerator.sqrt(), denominator.sqrt())
