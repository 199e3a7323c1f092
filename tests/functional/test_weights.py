"""Distances between weights, and the factor of losses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_ntk.functional.weights import norm, parameter_distances, root_mean_square, weight_distances
from lightning_ntk.linearization.objective import measure_loss_factor
from tests.problems import LOSSES, half_sum_per_sample


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
    assert root_mean_square(torch.tensor([[3.0, 4.0]])) == pytest.approx(math.sqrt(12.5))


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


@given(samples=st.integers(1, 9), outputs=st.integers(1, 7), scale=st.floats(1e-3, 1e3))
def test_loss_factors(samples: int, outputs: int, scale: float) -> None:
    f, y = torch.randn(samples, outputs), torch.randn(samples, outputs)
    expected = {"mean": 2 / (samples * outputs), "sum": 2.0, "half_sum_per_sample": 1 / samples}
    for name, loss in LOSSES.items():
        assert measure_loss_factor(loss, f, y) == pytest.approx(expected[name], rel=1e-12)
        scaled = measure_loss_factor(lambda a, b, loss=loss: scale * loss(a, b), f, y)
        assert scaled == pytest.approx(scale * expected[name], rel=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        nn.L1Loss(),
        nn.HuberLoss(),
        nn.BCEWithLogitsLoss(),
        lambda f, y: -nn.functional.mse_loss(f, y),
        lambda f, y: nn.functional.mse_loss(f, y) + 1e-3 * (f - y).square().square().mean(),
        lambda f, y: (f - y).square().mean().sqrt(),
        lambda f, y: nn.functional.mse_loss(2 * f, y),
        lambda f, y: half_sum_per_sample(f, y) + f.mean(),
    ],
)
def test_losses_that_are_not_squared_are_refused(loss) -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="squared loss"):
        measure_loss_factor(loss, torch.randn(5, 3), torch.rand(5, 3))


def test_losses_that_are_not_differentiable_are_refused() -> None:
    with pytest.raises(ValueError, match="differentiable"):
        measure_loss_factor(lambda f, y: nn.functional.mse_loss(f.detach(), y), torch.randn(5, 3), torch.rand(5, 3))
