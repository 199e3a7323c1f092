"""Distances between weights."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_ntk.functional import difference, inner_product, norm, parameter_distances, weight_distances


def test_weight_distances_of_a_known_triangle() -> None:
    moved = {"a": torch.tensor([3.0]), "b": torch.tensor([[0.0, 4.0]])}
    expected = {"a": torch.tensor([3.0]), "b": torch.tensor([[0.0, 0.0]])}
    scalars = weight_distances(moved, expected)
    assert scalars == pytest.approx(
        {
            "weight_distance": 4.0,
            "relative_weight_distance": 0.8,
            "weight_cosine": 0.6,
            "weight_norm_ratio": 0.6,
            "displacement": 5.0,
        }
    )
    assert parameter_distances(moved, expected) == {"a": 0.0, "b": 1.0}


def test_weights_that_have_not_moved() -> None:
    zero, one = {"a": torch.zeros(2)}, {"a": torch.ones(2)}
    assert weight_distances(zero, zero)["relative_weight_distance"] == 0
    assert weight_distances(zero, zero)["weight_cosine"] == 1
    assert weight_distances(zero, zero)["weight_norm_ratio"] == 1
    assert weight_distances(zero, one)["relative_weight_distance"] == math.inf


def test_norms_are_summed_in_float64() -> None:
    # In float32 the small entries vanish next to the large one.
    assert norm({"a": torch.cat([torch.tensor([1e4]), torch.full((10_000,), 0.1)])}) ** 2 == pytest.approx(
        1e8 + 100, abs=1
    )


@pytest.mark.parametrize("function", [difference, inner_product, parameter_distances, weight_distances])
def test_other_names_and_shapes_are_refused(function: Callable[..., Any]) -> None:
    weights = {"a": torch.ones(1), "b": torch.ones(2)}
    with pytest.raises(ValueError, match=r"the names \['a', 'b'\] but these names differ: \['b'\]"):
        function(weights, {"a": torch.ones(1)})
    with pytest.raises(ValueError, match=r"names differ: \['c'\]"):
        function(weights, weights | {"c": torch.ones(1)})
    with pytest.raises(ValueError, match=r"`b` of shape \(2,\) but got \(1,\)"):
        function(weights, weights | {"b": torch.ones(1)})
