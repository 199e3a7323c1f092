"""empirical_ntk by both methods, against an explicit Jacobian."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ntk import empirical_ntk
from lightning_ntk.data.reference import Reference
from lightning_ntk.kernel import PlannedKernel, compute_kernel
from lightning_ntk.linearization import Linearization
from tests.problems import NETWORKS, LinearModel, make


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("memory_limit", [None, 20_000, 1])
@pytest.mark.parametrize("method", ["structured", "contraction"])
def test_equals_the_explicit_jacobian(network: str, outputs: int, memory_limit: int | None, method: str) -> None:
    module, inputs, _ = make(network, outputs)
    others = torch.randn(4, 6).double()
    first, second = LinearModel(module, inputs).jacobian, LinearModel(module, others).jacobian
    kernel = empirical_ntk(module, inputs, memory_limit=memory_limit, method=method)
    torch.testing.assert_close(kernel, first @ first.T)
    assert torch.equal(kernel, kernel.T)
    torch.testing.assert_close(
        empirical_ntk(module, inputs, others, memory_limit=memory_limit, method=method), first @ second.T
    )
    torch.testing.assert_close(
        empirical_ntk(module, others, inputs, memory_limit=memory_limit, method=method), second @ first.T
    )


def test_at_given_parameters_and_in_their_type() -> None:
    module, inputs, _ = make("mlp")
    params = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    kernel = empirical_ntk(module, inputs, params=params)
    module.load_state_dict(params)
    torch.testing.assert_close(kernel, empirical_ntk(module, inputs))
    single = empirical_ntk(module.float(), inputs)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), kernel, rtol=1e-4, atol=1e-4)


def test_data_sets_and_loaders_in_their_own_order() -> None:
    module, inputs, targets = make("mlp")
    expected = empirical_ntk(module, inputs)
    data = TensorDataset(inputs, targets)
    for source in (data, DataLoader(data, batch_size=3, shuffle=True), (inputs, targets)):
        assert torch.equal(empirical_ntk(module, source), expected)


def test_operations_that_vmap_lacks_are_done_sample_by_sample_with_a_warning() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 3).double()

        def forward(self, x):
            return self.body(x) * (2.0 if x.sum().item() > 0 else 1.0)

    module, inputs = Branch(), torch.randn(5, 6).double()
    with pytest.warns(UserWarning, match="vmap does not support"):
        kernel = empirical_ntk(module, inputs, method="contraction")
    scale = torch.where(inputs.sum(1) > 0, 2.0, 1.0).double().repeat_interleave(3)
    torch.testing.assert_close(kernel, scale[:, None] * empirical_ntk(module.body, inputs) * scale)


def scaled_jacobian(module: nn.Module, inputs: Tensor, lr_scales: dict[str, float]) -> Tensor:
    """J D^(1/2), `(N K, P)`."""
    sizes = {name: p.numel() for name, p in module.named_parameters() if p.requires_grad}
    roots = [torch.full((size,), lr_scales.get(name, 1.0), dtype=torch.float64).sqrt() for name, size in sizes.items()]
    return LinearModel(module, inputs).jacobian * torch.cat(roots)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("memory_limit", [None, 1])
@pytest.mark.parametrize("method", ["structured", "contraction"])
def test_learning_rates_that_differ(network: str, memory_limit: int | None, method: str) -> None:
    module, inputs, _ = make(network)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    lr_scales = {name: (0.3, 2.0, 1.0, 0.0)[index % 4] for index, name in enumerate(names[1:])}
    others = torch.randn(4, 6).double()
    first, second = (scaled_jacobian(module, x, lr_scales) for x in (inputs, others))
    linearization = Linearization(module)
    options = {"method": method, "lr_scales": lr_scales, "memory_limit": memory_limit}
    kernel = compute_kernel(linearization, Reference(inputs), **options)
    torch.testing.assert_close(kernel, first @ first.T, rtol=1e-11, atol=1e-11)
    assert torch.equal(kernel, kernel.T)
    kernel = compute_kernel(linearization, Reference(inputs), Reference(others), **options)
    torch.testing.assert_close(kernel, first @ second.T, rtol=1e-11, atol=1e-11)


def test_learning_rates_of_embeddings_and_of_parameters_without_a_rule() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
            self.head.weight = self.tokens.weight
            self.places, self.scale = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.tokens(x) + self.places).tanh() * torch.sin(self.scale))[:, -1]

    torch.manual_seed(0)
    module, inputs = Network().double(), torch.randint(0, 7, (6, 5))
    lr_scales = {"tokens.weight": 0.5, "places": 3.0, "scale": 0.1, "head.bias": 7.0}
    jacobian = scaled_jacobian(module, inputs, lr_scales)
    for method in ("structured", "contraction"):
        kernel = compute_kernel(Linearization(module), Reference(inputs), lr_scales=lr_scales, method=method)
        torch.testing.assert_close(kernel, jacobian @ jacobian.T, rtol=1e-11, atol=1e-11)


def test_a_parameter_with_learning_rate_zero_costs_nothing() -> None:
    module, inputs, _ = make("mlp")
    frozen, _, _ = make("mlp")
    frozen[0].requires_grad_(False)
    lr_scales = {"0.weight": 0, "0.bias": 0}
    planned = PlannedKernel(Linearization(module), Reference(inputs), lr_scales=lr_scales)
    expected = PlannedKernel(Linearization(frozen), Reference(inputs))
    assert planned.operations == expected.operations
    assert torch.equal(planned.compute(), expected.compute())


def test_learning_rates_are_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ntk.kernel.collection.scaled", lambda factor, scale: factor)
    module, inputs, _ = make("mlp")
    lr_scales = {"0.bias": 1.01, "0.weight": 1.01}
    expected = compute_kernel(Linearization(module), Reference(inputs), lr_scales=lr_scales, method="contraction")
    with pytest.warns(UserWarning, match=r"`0\.bias`, `0\.weight` disagree with plain autograd"):
        kernel = compute_kernel(Linearization(module), Reference(inputs), lr_scales=lr_scales)
    torch.testing.assert_close(kernel, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("lr_scales", "message"),
    [
        ({"weight": 1.0}, r"to name trainable parameters, \['0.bias', .*\], but got \['weight'\]"),
        ({"0.bias": -1.0}, "at least 0 but got -1.0 for '0.bias'"),
        ({"0.bias": float("nan")}, "finite"),
        (dict.fromkeys(("0.weight", "0.bias", "2.weight", "2.bias"), 0.0), "all multiples are 0"),
    ],
)
def test_learning_rates_that_cannot_be_used(lr_scales: dict[str, float], message: str) -> None:
    module, inputs, _ = make("mlp")
    with pytest.raises(ValueError, match=message):
        compute_kernel(Linearization(module), Reference(inputs), lr_scales=lr_scales)


class Detached(nn.Module):
    """Outputs that autograd cannot see, or those of a head that is not returned."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.auxiliary = make("mlp")[0], nn.Linear(6, 3).double()
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def without_gradients(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network.body(x)


def frozen_body(network: nn.Module, x: Tensor) -> Tensor:
    network.auxiliary(x)
    return network.body(x).detach()


@pytest.mark.parametrize("forward", [frozen_body, without_gradients, lambda network, x: x[:, :3]])
@pytest.mark.parametrize("method", ["structured", "contraction"])
def test_outputs_that_depend_on_no_parameter(forward: Callable[[nn.Module, Tensor], Tensor], method: str) -> None:
    inputs = torch.randn(5, 6).double()
    with pytest.raises(ValueError, match="they depend on none of"):
        empirical_ntk(Detached(forward), inputs, method=method)


def test_dead_units_are_no_missing_dependence() -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))
    nn.init.zeros_(module[0].weight)
    nn.init.constant_(module[0].bias, -1)
    assert not empirical_ntk(module, torch.randn(5, 6)).any()


@pytest.mark.parametrize("method", ["structured", "contraction"])
def test_a_head_that_is_not_returned_has_no_part(method: str) -> None:
    def forward(network: nn.Module, x: Tensor) -> Tensor:
        network.auxiliary(x)
        return network.body(x)

    inputs = torch.randn(5, 6).double()
    linearization = Linearization(Detached(forward))
    for scale in (0.0, 1e200):
        lr_scales = {"auxiliary.weight": scale, "auxiliary.bias": scale}
        kernel = compute_kernel(linearization, Reference(inputs), lr_scales=lr_scales, method=method)
        expected = empirical_ntk(linearization.module.body, inputs, method=method)
        torch.testing.assert_close(kernel, expected, rtol=1e-13, atol=1e-13)
    others = {name: 0.0 for name in linearization.params if name.startswith("body")}
    with pytest.raises(ValueError, match=r"they depend on none of \['auxiliary\.bias', 'auxiliary\.weight'\]"):
        compute_kernel(linearization, Reference(inputs), lr_scales=others, method=method)


def test_outputs_that_are_not_one_row_per_sample() -> None:
    module = nn.Sequential(nn.Linear(6, 3), nn.Unflatten(1, (3, 1)), nn.Flatten(0, 1))
    for method in ("structured", "contraction"):
        with pytest.raises(ValueError, match="one row of outputs per sample but got 9 rows for 3 samples"):
            empirical_ntk(module, torch.randn(5, 6), method=method)


def test_bad_input_gets_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs, _ = make("mlp")
    with pytest.raises(ValueError, match="`method`"):
        empirical_ntk(module, inputs, method="magic")
    with pytest.raises(ValueError, match="these names differ"):
        empirical_ntk(module, inputs, params={"weight": torch.ones(1)})
    monkeypatch.setattr("lightning_ntk.utilities.distributed.available_memory", lambda device: 100)
    with pytest.raises(MemoryError, match=r"11 x 11 samples with 3 outputs needs 8\.5 KiB but 100\.0 B"):
        empirical_ntk(module, inputs)
