"""Distances between the weights of a trained network and those of its linearization."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


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
    require_matching(linearized, displacement)
    return {
        name: weight_sums({name: value}, {name: linearized[name]}).relative_distance.item()
        for name, value in displacement.items()
    }


def difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Subtracts `second` from `first`, parameter by parameter in float64.

    Raises:
        ValueError: If names or shapes differ.
    """
    require_matching(second, first)
    return {name: value.double() - second[name].double() for name, value in first.items()}


def inner_product(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Computes the inner product of two weight vectors in float64.

    Raises:
        ValueError: If names or shapes differ.

    Example:
        >>> inner_product({"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.ones(2), "b": torch.full((1,), 3.0)})
        5.0
    """
    require_matching(second, first)
    products = [(value.double() * second[name].double()).sum() for name, value in first.items()]
    return torch.stack(products).sum().item()


def norm(weights: Mapping[str, Tensor]) -> float:
    """Computes the Euclidean norm of a weight vector in float64."""
    return math.sqrt(inner_product(weights, weights))


class WeightSums(NamedTuple):
    """|w_t - w_lin|^2, |w_t - w_0|^2, |w_lin - w_0|^2 and <w_t - w_0, w_lin - w_0>, which add up over parameters."""

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
    require_matching(linearized, displacement)
    parameters = []
    for name, value in displacement.items():
        moved, expected = value.double(), linearized[name].double()
        squares = [x.square().sum() for x in (moved - expected, moved, expected)]
        parameters.append(torch.stack([*squares, (moved * expected).sum()]))
    return WeightSums(*torch.stack(parameters).sum(0))


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divides, with 0 / 0 = 0: points that coincide have distance 0."""
    return torch.where((numerator == 0) & (denominator == 0), 0.0, numerator / denominator)


def ratio_of_norms(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divides the norms whose squares are given, with 0 / 0 = 0."""
    return ratio(numerator.sqrt(), denominator.sqrt())


def require_matching(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises a ValueError unless both have the same names and shapes."""
    differing = sorted(expected.keys() ^ tensors.keys())
    if differing:
        raise ValueError(f"Expected tensors with the names {sorted(expected)} but these names differ: {differing}.")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"Expected `{name}` of shape {tuple(expected[name].shape)} but got {tuple(tensor.shape)}.")


def require_same_shape(**tensors: Tensor) -> None:
    """Raises a ValueError unless all shapes are equal: others would broadcast to plausible nonsense."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"`{name}` {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"Expected tensors of one shape but got {shapes}.")
