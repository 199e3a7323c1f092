"""Distances between weights, and between predictions: pure functions."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def inner_product(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """The inner product of two weight vectors, summed in float64 over all parameters.

    Example:
        >>> inner_product({"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.ones(2), "b": torch.full((1,), 3.0)})
        5.0
    """
    products = [(value.double() * second[name].double()).sum() for name, value in first.items()]
    return torch.stack(products).sum().item()


def norm(weights: Mapping[str, Tensor]) -> float:
    """The Euclidean norm over all parameters."""
    return math.sqrt(inner_product(weights, weights))


def difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`first - second`, parameter by parameter in float64."""
    return {name: value.double() - second[name].double() for name, value in first.items()}


def ratio(numerator: float, denominator: float) -> float:
    """The quotient, with 0 / 0 = 0: a distance between two points that coincide with the origin."""
    if denominator == 0:
        return 0.0 if numerator == 0 else math.inf
    return numerator / denominator


def weight_distances(displacement: Mapping[str, Tensor], linearized: Mapping[str, Tensor]) -> dict[str, float]:
    r"""How far the trained weights are from the linearized ones.

    Args:
        displacement: w_t - w_0 of the trained network, by parameter name.
        linearized: w_lin(t) - w_0 of the linearized one.

    Returns:
        `weight_distance` :math:`|w_t - w_\text{lin}|`, `relative_weight_distance` (the same over :math:`|w_t - w_0|`),
        `weight_cosine` of the two displacements, `weight_norm_ratio` :math:`|w_\text{lin} - w_0| / |w_t - w_0|` and
        `displacement` :math:`|w_t - w_0|`. Where neither network has moved, the two agree: distance 0, cosine and ratio 1.
    """
    moved, expected = norm(displacement), norm(linearized)
    distance = norm(difference(displacement, linearized))
    together = moved == expected == 0
    return {
        "weight_distance": distance,
        "relative_weight_distance": ratio(distance, moved),
        "weight_cosine": 1.0 if together else ratio(inner_product(displacement, linearized), moved * expected),
        "weight_norm_ratio": 1.0 if together else ratio(expected, moved),
        "displacement": moved,
    }


def parameter_distances(displacement: Mapping[str, Tensor], linearized: Mapping[str, Tensor]) -> dict[str, float]:
    """`relative_weight_distance` of every parameter tensor by itself."""
    return {
        name: ratio(norm(difference({name: value}, {name: linearized[name]})), norm({name: value}))
        for name, value in displacement.items()
    }


def root_mean_square(difference: Tensor) -> float:
    """The root mean square of all elements."""
    return difference.double().square().mean().sqrt().item()


def taylor_gap(outputs: Tensor, taylor_outputs: Tensor, initial_outputs: Tensor) -> float:
    r"""The part of the change of the outputs that the first-order expansion at the same weights misses.

    .. math:: \frac{\|f_t - f_0 - J (w_t - w_0)\|}{\|f_t - f_0\|}

    Args:
        outputs: :math:`f_t`, of the network at the trained weights, `(N, K)`.
        taylor_outputs: :math:`f_0 + J (w_t - w_0)`, of its linearization at the same weights, `(N, K)`.
        initial_outputs: :math:`f_0`, `(N, K)`.

    Returns:
        The gap, at least 0; it is 0 where the outputs have not changed and the expansion says so too.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> taylor_gap(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]]), torch.zeros(1, 2))
        0.2
    """
    require_same_shape(outputs=outputs, taylor_outputs=taylor_outputs, initial_outputs=initial_outputs)
    gap = (outputs.double() - taylor_outputs.double()).norm().item()
    return ratio(gap, (outputs.double() - initial_outputs.double()).norm().item())


def require_same_shape(**tensors: Tensor) -> None:
    """Refuses tensors of different shapes, which would be broadcast to plausible nonsense.

    Raises:
        ValueError: With the name and shape of each.
    """
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"`{name}` {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"Expected tensors of one shape but got {shapes}.")
