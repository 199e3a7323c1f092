"""empirical_ntk by both methods, against an explicit Jacobian."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ntk import empirical_ntk
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


def test_bad_input_gets_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs, _ = make("mlp")
    with pytest.raises(ValueError, match="`method`"):
        empirical_ntk(module, inputs, method="magic")
    with pytest.raises(ValueError, match="these names differ"):
        empirical_ntk(module, inputs, params={"weight": torch.ones(1)})
    monkeypatch.setattr("lightning_ntk.utilities.distributed.available_memory", lambda device: 100)
    with pytest.raises(MemoryError, match=r"11 x 11 samples with 3 outputs needs 8\.5 KiB but 100\.0 B"):
        empirical_ntk(module, inputs)
