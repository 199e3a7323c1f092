"""The gradient of a run's own backward pass against the one that is linearized: what is found, and how it is told."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_ntk import Linearization
from lightning_ntk.comparison.gradient_check import GradientMismatch, check_gradient
from lightning_ntk.linearization.objective import Objective
from tests.problems import make


def expected_gradient(module: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    linearization = Linearization(module)
    outputs = linearization.predict(inputs)
    objective = Objective(nn.MSELoss(), outputs, targets)
    return linearization.vjp(objective.gradient(outputs, objective.targets), inputs)


def own_gradient(module: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def check(network: str, own_loss, dtype=torch.float64, mode: bool = False) -> GradientMismatch | None:
    module, inputs, targets = make(network)
    module, inputs, targets = module.to(dtype), inputs.to(dtype), targets.to(dtype)
    module.train(mode)
    expected = expected_gradient(module, inputs, targets)
    return check_gradient(own_gradient(module, own_loss(module, inputs, targets)), expected, dtype=dtype)[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("network", ["mlp", "conv", "tied", "frozen", "unused"])
def test_the_same_loss_passes(network: str, dtype: torch.dtype) -> None:
    assert check(network, lambda m, x, y: nn.functional.mse_loss(m(x), y), dtype=dtype) is None


@pytest.mark.parametrize("factor", [2.0, 1 / 3, -1.0, 1.01])
def test_a_factor_is_named(factor: float) -> None:
    mismatch = check("mlp", lambda m, x, y: factor * nn.functional.mse_loss(m(x), y), dtype=torch.float32)
    assert mismatch is not None
    assert mismatch.is_factor
    assert mismatch.factor == pytest.approx(factor, rel=1e-5)
    assert mismatch.relative == pytest.approx(abs(factor - 1), rel=1e-3)
    assert f"{factor:.4g} times that of the loss that is linearized" in mismatch.describe()


def test_dropout_is_no_factor() -> None:
    mismatch = check("conv", lambda m, x, y: nn.functional.mse_loss(m(x), y), mode=True)
    assert mismatch is not None
    assert not mismatch.is_factor
    assert mismatch.relative > 0.1
    assert f"by {mismatch.relative:.2g} of its norm" in mismatch.describe()


def test_a_regularisation_of_one_layer_names_its_parameter() -> None:
    mismatch = check("mlp", lambda m, x, y: nn.functional.mse_loss(m(x), y) + m[0].weight.square().sum())
    assert mismatch is not None
    assert mismatch.parameters[0][0] == "0.weight"
    assert "Parameters that differ most: `0.weight`" in mismatch.describe()


def test_size_factor_and_remainder_of_known_vectors() -> None:
    expected = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    mismatch = check_gradient({"a": torch.tensor([6.0, 5.0]), "b": torch.tensor([8.0])}, expected, dtype=torch.float32)[
        1
    ]
    assert mismatch is not None
    assert mismatch.factor == pytest.approx(2.0)
    assert mismatch.remainder == pytest.approx(0.5)
    assert mismatch.relative == pytest.approx(math.sqrt(2))
    assert mismatch.parameters == (("a", pytest.approx(math.sqrt(34) / 3)), ("b", pytest.approx(1.0)))


def test_missing_zero_and_non_finite_gradients() -> None:
    one, zero = {"a": torch.ones(2)}, {"a": torch.zeros(2)}
    assert check_gradient({"a": None}, zero, dtype=torch.float32)[1] is None
    missing = check_gradient({"a": None}, one, dtype=torch.float32)[1]
    assert missing is not None
    assert missing.relative == 1
    assert "by 1 of its norm" in missing.describe()
    assert not missing.is_factor
    unexpected = check_gradient(one, zero, dtype=torch.float32)[1]
    assert unexpected is not None
    assert "is not zero but that of" in unexpected.describe()
    undefined = check_gradient({"a": torch.tensor([1.0, math.nan])}, one, dtype=torch.float32)[1]
    assert undefined is not None
    assert "NaN" in undefined.describe()


def test_other_names_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"names differ: \['b'\]"):
        check_gradient({"a": None, "b": torch.ones(1)}, {"a": torch.ones(2)}, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"names differ: \['a'\]"):
        check_gradient({}, {"a": torch.ones(2)}, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"of shape \(2,\) but got \(3,\)"):
        check_gradient({"a": torch.ones(3)}, {"a": torch.ones(2)}, dtype=torch.float32)
