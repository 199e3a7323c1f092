"""One batch at frozen weights: products against an explicit Jacobian, and the isolation of the live module."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_ntk import Linearization
from lightning_ntk.data.reference import Reference
from lightning_ntk.linearization.jacobian import StreamedJacobian
from lightning_ntk.linearization.passes import DataPasses
from lightning_ntk.utilities.contexts import full_precision, preserved_rng
from tests.problems import FULL, NETWORKS, LinearModel, flatten, make, precisions_of_products


class ManualSine(torch.autograd.Function):
    """An operation without forward mode, torch.func support or vmap rule, as older code has them."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.cos()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(2, 6)

    def forward(self, x):
        q, k, v = self.project(x.reshape(-1, 1, 3, 2)).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v).flatten(1)[:, :3]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(2, 1, 4, dropout=0.1, batch_first=True)

    def forward(self, x):
        return self.layer(x.reshape(-1, 3, 2)).flatten(1)[:, :3]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(2, 3, batch_first=True)

    def forward(self, x):
        return self.cell(x.reshape(-1, 3, 2))[0][:, -1]


class Manual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return ManualSine.apply(self.layer(x))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False))


def explicit_jacobian(linearization: Linearization, inputs: torch.Tensor) -> torch.Tensor:
    """J by central differences of the live network's own outputs, float64."""
    start = flatten(linearization.params)
    model_outputs = []
    step = 1e-5
    shapes = {name: p.shape for name, p in linearization.params.items()}

    def outputs(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split([shape.numel() for shape in shapes.values()])
        params = {n: part.reshape(shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)}
        return linearization.predict_at(params, inputs).flatten()

    for index in range(len(start)):
        direction = torch.zeros_like(start)
        direction[index] = step
        model_outputs.append((outputs(start + direction) - outputs(start - direction)) / (2 * step))
    return torch.stack(model_outputs, 1)


def random_like(params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.randn_like(p) for name, p in params.items()}


@pytest.mark.parametrize("network", NETWORKS)
def test_products_equal_the_explicit_jacobian(network: str) -> None:
    module, inputs, _ = make(network)
    model = LinearModel(module, inputs)
    linearization = Linearization(module)
    tangent = random_like(linearization.params)
    cotangent = torch.randn(11, 3).double()
    pushed = (model.jacobian @ flatten(tangent)).reshape(11, 3)
    torch.testing.assert_close(linearization.jvp(tangent, inputs), pushed)
    pulled = model.jacobian.T @ cotangent.flatten()
    torch.testing.assert_close(flatten(linearization.vjp(cotangent, inputs)), pulled)
    torch.testing.assert_close(linearization.predict(inputs), model.outputs)
    moved = {name: p + tangent[name] for name, p in linearization.params.items()}
    torch.testing.assert_close(linearization(moved, inputs), model.outputs + pushed)
    combined = linearization.predict_jvp_and_vjp(tangent, inputs, lambda f, jv: (f + jv).sin())
    pulled = model.jacobian.T @ (model.outputs + pushed).sin().flatten()
    torch.testing.assert_close(flatten(combined), pulled, rtol=1e-12, atol=1e-13)
    without = linearization.predict_jvp_and_vjp(None, inputs, lambda f, jv: (f + jv).sin())
    torch.testing.assert_close(
        flatten(without), model.jacobian.T @ model.outputs.sin().flatten(), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("network", [Attention, Encoder, Recurrent, Manual, Checkpointed])
def test_operations_without_forward_mode_or_that_run_twice(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module, inputs = network().double(), torch.randn(4, 6).double()
    linearization = Linearization(module)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)  # whatever falls back on the live weights is far off
    jacobian = explicit_jacobian(linearization, inputs)
    tangent = random_like(linearization.params)
    cotangent = torch.randn(4, 3).double()
    pushed = (jacobian @ flatten(tangent)).reshape(4, 3)
    pulled = jacobian.T @ cotangent.flatten()
    for _ in range(2):  # what the first call learned about forward mode must hold for the second
        torch.testing.assert_close(linearization.jvp(tangent, inputs), pushed, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(flatten(linearization.vjp(cotangent, inputs)), pulled, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("network", [Attention, Encoder, Recurrent, Manual, Checkpointed])
def test_the_combined_pass_of_such_operations_equals_the_separate_ones(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module, inputs = network().double(), torch.randn(4, 6).double()
    linearization, separate = Linearization(module), Linearization(module)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    tangent = random_like(linearization.params)
    outputs, pushed = separate.predict_and_jvp(tangent, inputs)
    expected = separate.vjp((outputs * pushed).sin(), inputs)
    for _ in range(2):
        combined = linearization.predict_jvp_and_vjp(tangent, inputs, lambda f, jv: (f * jv).sin())
        torch.testing.assert_close(combined, expected, rtol=1e-10, atol=1e-12)


def test_the_combined_pass_runs_the_network_once() -> None:
    module, inputs, _ = make("mlp")
    calls = []
    linearization = Linearization(module, predict=lambda m, x: calls.append(1) or m(x))
    linearization.predict(inputs)  # the first pass shows that the network leaves its weights alone
    linearization.predict_jvp_and_vjp(random_like(linearization.params), inputs, lambda f, jv: f + jv)
    assert len(calls) == 2


def test_errors_of_the_network_are_not_taken_for_missing_forward_mode() -> None:
    linearization = Linearization(nn.Linear(6, 3))
    with pytest.raises(
        ValueError, match=r"Linear over inputs float32 of shape \(2, 5\) .* shapes cannot be multiplied"
    ):
        linearization.jvp(random_like(linearization.params), torch.randn(2, 5))


def test_several_cotangents_share_one_forward_pass() -> None:
    module, inputs, _ = make("mlp")
    calls = []
    linearization = Linearization(module, predict=lambda m, x: calls.append(1) or m(x))
    cotangents = torch.randn(4, 11, 3).double()
    outputs, results = linearization.predict_and_vjp(cotangents, inputs)
    assert len(calls) == 1
    torch.testing.assert_close(outputs, linearization.predict(inputs))
    for cotangent, result in zip(cotangents, results, strict=True):
        torch.testing.assert_close(result, linearization.vjp(cotangent, inputs))


def test_parameters_without_influence_have_zero_products() -> None:
    module, inputs, _ = make("unused")
    pulled = Linearization(module).vjp(torch.ones(11, 3).double(), inputs)
    assert (pulled["spare.weight"] == 0).all()
    assert (pulled["body.0.weight"] != 0).any()
    constant = Linearization(module, predict=lambda m, x: x[:, :3])
    assert (flatten(constant.vjp(torch.ones(11, 3), inputs)) == 0).all()
    assert (constant.jvp(random_like(constant.params), inputs) == 0).all()


def test_tied_parameters_count_once_and_frozen_ones_are_constants() -> None:
    assert set(Linearization(make("tied")[0]).params) == {
        "first.weight", "first.bias", "second.bias", "head.weight", "head.bias",
    }  # fmt: skip
    module, inputs, _ = make("frozen")
    linearization = Linearization(module)
    assert not any(name.startswith("0.") for name in linearization.params)
    before = linearization.predict(inputs)
    with torch.no_grad():
        module[0].weight.mul_(2)  # unfrozen during the run, say
    torch.testing.assert_close(linearization.predict(inputs), before)


def test_rows_of_padding_are_constants_in_both_products() -> None:
    """Where a head shares the weight, these rows move, but autograd has no derivative in their embeddings."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3, padding_idx=-4)
            self.embedding.weight.data.normal_()

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.embedding(tokens)).mean(1) @ self.embedding.weight.T

    module, tokens = Tied().double(), torch.tensor([[1, 2, 0], [3, 1, 1]])
    linearization = Linearization(module)
    tangent, cotangent = {"embedding.weight": torch.randn(5, 3).double()}, torch.randn(2, 5).double()
    (gradient,) = torch.autograd.grad(module(tokens), module.embedding.weight, cotangent)
    expected = (gradient * tangent["embedding.weight"]).sum()
    assert (linearization.jvp(tangent, tokens) * cotangent).sum().item() == pytest.approx(expected.item(), rel=1e-12)


def test_usable_under_inference_mode_and_with_inference_tensors() -> None:
    module, inputs, _ = make("mlp")
    linearization = Linearization(module)
    cotangent, tangent = torch.ones(11, 3).double(), random_like(linearization.params)
    expected = linearization.vjp(cotangent, inputs), linearization.jvp(tangent, inputs)
    with torch.inference_mode():
        linearization = Linearization(module)
        actual = linearization.vjp(cotangent, inputs + 0), linearization.jvp(tangent, inputs + 0)
    torch.testing.assert_close(actual, expected)


def test_buffers_are_cloned_and_stay_as_they_were() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.layer(x) * self.calls

    module = Counter()
    linearization = Linearization(module)
    inputs = torch.randn(2, 6)
    torch.testing.assert_close(linearization.predict(inputs), linearization.predict(inputs))
    linearization.vjp(torch.ones(2, 3), inputs)
    assert module.calls == linearization.buffers["calls"] == 0


def test_modes_are_restored_module_by_module() -> None:
    module, inputs, _ = make("conv")
    module.norm.eval()
    statistics = module.norm.running_mean.clone()
    linearization = Linearization(module)
    assert torch.equal(linearization.predict(inputs), linearization.predict(inputs))  # no dropout
    linearization.vjp(torch.ones(11, 3), inputs)
    linearization.jvp(random_like(linearization.params), inputs)
    assert module.training
    assert module.dropout.training
    assert not module.norm.training
    assert torch.equal(module.norm.running_mean, statistics)


def test_autocast_and_reduced_precision_are_off_inside_and_restored() -> None:
    module, inputs = nn.Linear(6, 3), torch.randn(4, 6)
    seen = []

    def predict(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        seen.append((torch.is_autocast_enabled("cpu"), precisions_of_products()))
        return m(x)

    linearization = Linearization(module, predict=predict)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linearization.predict(inputs).dtype == torch.float32
            assert module(inputs).dtype == torch.bfloat16
        assert seen == [(False, {FULL})]
        assert torch.get_float32_matmul_precision() == "medium"
        assert FULL not in precisions_of_products()
    finally:
        torch.set_float32_matmul_precision("highest")
    with pytest.raises(KeyError), full_precision("cpu"):
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


def test_half_precision_parameters_are_upcast() -> None:
    module = nn.Linear(6, 3).to(torch.bfloat16)
    linearization = Linearization(module)
    assert linearization.predict(torch.randn(2, 6)).dtype == torch.float32
    assert Linearization(module, dtype=torch.float64).predict(torch.randn(2, 6)).dtype == torch.float64


def test_random_states_are_preserved_after_errors_too() -> None:
    import random

    import numpy as np

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()

    def draw_and_fail() -> None:
        torch.rand(3), random.random(), np.random.rand()
        raise KeyError

    with pytest.raises(KeyError), preserved_rng():
        draw_and_fail()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_other_names_and_shapes_are_refused() -> None:
    linearization = Linearization(nn.Linear(6, 3))
    with pytest.raises(ValueError, match="these names differ: \\['bias'\\]"):
        linearization.jvp({"weight": torch.zeros(3, 6)}, torch.zeros(1, 6))
    with pytest.raises(ValueError, match=r"`weight` of shape \(3, 6\) but got \(6, 3\)"):
        linearization({"weight": torch.zeros(6, 3), "bias": torch.zeros(3)}, torch.zeros(1, 6))


def test_gradients_that_share_storage_are_summed_separately() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(3).double()) for _ in range(2))

        def forward(self, x):
            return x[:, :3] + (self.first + self.second)

    module, inputs = Sum(), torch.randn(11, 6).double()
    linearization = Linearization(module)
    passes = DataPasses(linearization, Reference(inputs, batch_size=1))
    jacobian = StreamedJacobian(passes, passes.predict())
    cotangent = torch.randn(1, 11, 3).double()
    for value in jacobian.vjp(cotangent).values():
        torch.testing.assert_close(value, cotangent.sum(1))
