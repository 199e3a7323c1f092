"""The factor of losses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_ntk.linearization import Linearization, objective
from lightning_ntk.linearization.batch_loss import PairLoss
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


class LargestDouble(TorchDispatchMode):
    """The number of elements of the largest tensor in float64."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("large", [False, True])
def test_the_loss_of_very_many_outputs_is_computed_in_their_type(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr(objective, "_LARGE", 2 * 3 * 11)
    torch.manual_seed(0)
    module, tokens = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11), nn.Flatten()), torch.randint(11, (2, 3))

    def loss(outputs, labels):
        return nn.functional.cross_entropy(outputs.view(-1, 11), labels.flatten())

    pairs = PairLoss(Linearization(module), loss)
    tangent = {name: 0.1 * torch.randn_like(value) for name, value in pairs.params.items()}
    with LargestDouble() as watched:
        gradient = pairs.gradient((tokens, tokens), tangent)
    assert watched.largest == (0 if large else 2 * 3 * 11)
    expected = PairLoss(Linearization(module, dtype=torch.float64), loss).gradient((tokens, tokens), tangent)
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name].double(), value, rtol=1e-5, atol=1e-7)
