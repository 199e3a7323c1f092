"""The factor of losses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_ntk.linearization.objective import measure_loss_factor
from tests.problems import LOSSES, half_sum_per_sample


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
