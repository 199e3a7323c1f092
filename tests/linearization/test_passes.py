"""Loops over a data set: what the first one finds, and what later ones share with it."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_ntk.data.reference import Reference
from lightning_ntk.linearization import Linearization
from lightning_ntk.linearization.jacobian import StoredJacobian, StreamedJacobian
from lightning_ntk.linearization.passes import DataPasses
from lightning_ntk.utilities.distributed import Processes
from tests.problems import LinearModel, flatten, make


class Counted(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets, self.reads = inputs, targets, 0

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        return self.inputs[row], self.targets[row]


def test_one_pass_finds_outputs_targets_and_samples() -> None:
    module, inputs, targets = make("mlp")
    data = Counted(inputs, targets)
    outputs, found, samples = DataPasses(Linearization(module), Reference(data, batch_size=4)).first()
    torch.testing.assert_close(outputs, module(inputs).detach())
    assert torch.equal(found, targets)
    order = torch.tensor([5, 0, 10])
    assert torch.equal(samples.rows(inputs[order], targets[order]), order)
    assert data.reads == 11
    *_, again = DataPasses(Linearization(module), Reference((inputs, targets), batch_size=3)).first()
    assert again.fingerprint == samples.fingerprint
    *_, turned = DataPasses(Linearization(module), Reference((inputs.flip(0), targets.flip(0)))).first()
    assert turned.fingerprint != samples.fingerprint


def test_several_data_sets_share_one_linearization() -> None:
    module, inputs, targets = make("conv")
    model = LinearModel(module, inputs)
    linearization = Linearization(module)
    for rows in (slice(0, 11), slice(2, 5)):
        passes = DataPasses(linearization, Reference((inputs[rows], targets[rows]), batch_size=4))
        predictions, *_ = passes.first()
        torch.testing.assert_close(predictions, model.outputs[rows])
        torch.testing.assert_close(passes.predict(linearization.params), predictions)
        tangent = {name: torch.randn_like(p) for name, p in linearization.params.items()}
        pushed = (model.jacobian @ flatten(tangent)).reshape(11, 3)[rows]
        torch.testing.assert_close(StreamedJacobian(passes, predictions).jvp(tangent), pushed)


@pytest.mark.parametrize("network", ["mlp", "tied", "unused"])
@pytest.mark.parametrize("batch_size", [1, 4, 11])
def test_streamed_and_stored_products_equal_the_explicit_jacobian(network: str, batch_size: int) -> None:
    module, inputs, _ = make(network)
    model = LinearModel(module, inputs)
    linearization = Linearization(module)
    passes = DataPasses(linearization, Reference(inputs, batch_size=batch_size))
    parts = model.jacobian.reshape(11, 3, -1).split([p.numel() for p in linearization.params.values()], 2)
    blocks = {
        name: part.reshape(11, 3, *p.shape) for part, (name, p) in zip(parts, linearization.params.items(), strict=True)
    }
    halves = [{name: block[rows] for name, block in blocks.items()} for rows in (slice(0, 7), slice(7, 11))]
    cotangents = torch.randn(2, 11, 3).double()
    tangent = {name: torch.randn_like(p) for name, p in linearization.params.items()}
    for jacobian in (StreamedJacobian(passes, passes.predict()), StoredJacobian.cat(halves, 11)):
        pushed = (model.jacobian @ flatten(tangent)).reshape(11, 3)
        torch.testing.assert_close(jacobian.jvp(tangent), pushed, rtol=1e-9, atol=1e-12)
        pulled = jacobian.vjp(cotangents)
        for i in range(2):
            product = flatten({name: value[i] for name, value in pulled.items()})
            torch.testing.assert_close(product, model.jacobian.T @ cotangents[i].flatten(), rtol=1e-9, atol=1e-12)


def test_sums_over_batches_are_kept_in_float64() -> None:
    module = nn.Linear(1, 1, bias=False)
    inputs = torch.cat([torch.full((8, 1), 2.0**25), torch.ones(64, 1)])
    passes = DataPasses(Linearization(module), Reference(inputs, batch_size=1))
    summed = StreamedJacobian(passes, passes.predict()).vjp(torch.ones(1, 72, 1))
    assert summed["weight"].item() == 8 * 2.0**25 + 64  # float32 would lose the ones


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (torch.ones(4, 6), None, "Expected the training set to have targets"),
        (
            torch.tensor([1.0, 2.0, float("nan"), 0.0]).expand(6, 4).T,
            torch.ones(4, 3),
            "finite inputs but sample 2 has",
        ),
        (torch.ones(4, 6), torch.full((4, 3), float("inf")), "finite targets but sample 0 has"),
        (torch.full((4, 6), 1e38), torch.ones(4, 3), "finite outputs but sample 0 has"),
    ],
)
def test_data_without_numbers_is_refused(inputs: Tensor, targets: Tensor | None, message: str) -> None:
    data = inputs if targets is None else (inputs, targets)
    module = nn.Linear(6, 3)
    nn.init.constant_(module.weight, 100.0)
    with pytest.raises(ValueError, match=message):
        DataPasses(Linearization(module), Reference(data, batch_size=2)).first()


def test_rows_of_a_process_are_read_alone_after_the_first_pass() -> None:
    module, inputs, targets = make("mlp")
    data = Counted(inputs, targets)
    passes = DataPasses(Linearization(module), Reference(data, batch_size=4), processes=Processes(1, 3))
    assert passes.rows == range(3, 7)
    assert [batch.rows for batch in passes.batches("passes")] == [slice(3, 7)]
    assert data.reads == 4
