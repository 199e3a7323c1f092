"""The kernel of a few samples followed through training, against explicit Jacobians."""

import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_ntk.data.reference import Reference
from lightning_ntk.kernel.probe import KernelProbe
from lightning_ntk.linearization import Linearization
from tests.problems import NETWORKS, LinearModel, make


def brute_force_kernel(module: nn.Module, inputs: Tensor) -> Tensor:
    jacobian = LinearModel(module, inputs).jacobian
    return jacobian @ jacobian.T


def one_minus_cosine(first: Tensor, second: Tensor) -> float:
    return 1 - torch.cosine_similarity(first.flatten(), second.flatten(), dim=0).item()


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def move(module: nn.Module, size: float) -> None:
    with torch.no_grad():
        for parameter in weights_of(module).values():
            parameter += size * torch.randn_like(parameter)


@pytest.mark.parametrize("network", NETWORKS)
def test_distance_change_and_velocity_agree_with_explicit_jacobians(network: str) -> None:
    module, inputs, targets = make(network)
    probe = KernelProbe(Linearization(module), Reference((inputs, targets), batch_size=4), samples=5, step=3)
    assert probe.rows == [0, 2, 4, 6, 8]
    kernels = {3: brute_force_kernel(module, inputs[probe.rows])}
    torch.testing.assert_close(probe.initial, kernels[3], rtol=1e-12, atol=1e-12)
    previous = 3
    for step in (10, 12):
        move(module, 0.3)
        kernels[step] = brute_force_kernel(module, inputs[probe.rows])
        kernel = probe.kernel(weights_of(module))
        assert probe.compare(kernel, step) == pytest.approx(
            {
                "kernel_distance": one_minus_cosine(kernels[3], kernels[step]),
                "kernel_change": ((kernels[step] - kernels[3]).norm() / kernels[3].norm()).item(),
                "kernel_velocity": one_minus_cosine(kernels[previous], kernels[step]) / (step - previous),
            },
            rel=1e-11,
        )
        probe.advance(kernel, step)
        previous = step


def test_buffers_are_those_of_the_capture() -> None:
    module, inputs, targets = make("conv")
    probe = KernelProbe(Linearization(module), Reference((inputs, targets)), samples=4)
    module.norm.running_mean += 1
    assert probe.compare(probe.kernel(weights_of(module))) == pytest.approx(
        {"kernel_distance": 0, "kernel_change": 0}, abs=1e-14
    )


def test_module_and_weights_are_left_alone() -> None:
    module, inputs, targets = make("conv")
    probe = KernelProbe(Linearization(module), Reference((inputs, targets)), samples=4)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    probe.kernel({name: value.detach() + 1 for name, value in weights_of(module).items()})
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.training


def test_comparing_remembers_nothing_and_without_a_step_there_is_no_velocity() -> None:
    module, inputs, targets = make("mlp")
    probe = KernelProbe(Linearization(module), Reference((inputs, targets)))
    assert len(probe.rows) == 11  # all of them
    move(module, 0.3)
    kernel = probe.kernel(weights_of(module))
    assert set(probe.compare(kernel)) == {"kernel_distance", "kernel_change"}
    assert probe.compare(kernel, 5)["kernel_velocity"] > 0
    assert probe.previous is probe.initial
    assert probe.step == 0
    probe.advance(kernel, 4.5)
    assert "kernel_velocity" not in probe.compare(kernel, 4.5)
    assert probe.compare(kernel, 5)["kernel_velocity"] == 0
    with pytest.raises(ValueError, match=r"at least 4\.5, the last one, but got 4"):
        probe.compare(kernel, 4)


def test_a_probe_goes_on_from_its_saved_state() -> None:
    module, inputs, targets = make("mlp")
    start, reference = Linearization(module), Reference((inputs, targets))
    probe = KernelProbe(start, reference, samples=4)
    move(module, 0.3)
    probe.advance(probe.kernel(weights_of(module)), 10)
    file = io.BytesIO()
    torch.save(probe.state_dict(), file)
    file.seek(0)
    resumed = KernelProbe(start, reference, samples=4)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    move(module, 0.3)
    kernel = probe.kernel(weights_of(module))
    assert resumed.compare(kernel, 12) == probe.compare(kernel, 12)
    with pytest.raises(ValueError, match=r"probe of the samples \[0, 3, 7\] but got \[0, 2, 5, 8\]"):
        KernelProbe(start, reference, samples=3).load_state_dict(probe.state_dict())
    with pytest.raises(ValueError, match="initial kernel is another"):
        KernelProbe(Linearization(module), reference, samples=4).load_state_dict(probe.state_dict())


@pytest.mark.parametrize("samples", [0, -1, True, 2.0])
def test_bad_number_of_samples(samples: object) -> None:
    module, inputs, targets = make("mlp")
    with pytest.raises(ValueError, match="integer, at least 1"):
        KernelProbe(Linearization(module), Reference((inputs, targets)), samples=samples)


def test_weights_that_cannot_be_used() -> None:
    module, inputs, targets = make("mlp")
    probe = KernelProbe(Linearization(module), Reference((inputs, targets)))
    with pytest.raises(ValueError, match=r"`0\.weight` holds NaN"):
        probe.kernel(weights_of(module) | {"0.weight": torch.full((8, 6), torch.nan)})
    with pytest.raises(ValueError, match="names differ"):
        probe.kernel({"0.weight": torch.zeros(8, 6)})


def test_float32_networks_have_float64_kernels_on_the_cpu() -> None:
    module, inputs, targets = make("mlp")
    exact = KernelProbe(Linearization(module), Reference((inputs, targets))).initial
    single = KernelProbe(Linearization(module.float()), Reference((inputs.float(), targets.float()))).initial
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, exact, rtol=1e-5, atol=1e-5)


class Listed(Dataset):
    """Samples of which the data set itself makes tensors."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], torch.tensor(float(index))


@pytest.mark.parametrize("kind", ["tensors", "subset", "listed", "loader"])
def test_subsets_of_references_read_the_same_samples(kind: str) -> None:
    inputs = torch.randn(11, 6)
    numbers = torch.arange(11.0)
    data = {
        "tensors": (inputs, numbers),
        "subset": Subset(TensorDataset(inputs.flip(0), numbers.flip(0)), list(range(10, -1, -1))),
        "listed": Listed(inputs),
        "loader": DataLoader(Listed(inputs), shuffle=True, collate_fn=torch.utils.data.default_collate),
    }[kind]
    reference = Reference(data, batch_size=2)
    chosen = reference.subset([8, 1, 5])
    assert (len(chosen), len(list(chosen.batches())), len(reference)) == (3, 2, 11)
    batches = list(chosen.batches())
    torch.testing.assert_close(torch.cat([b.inputs for b in batches]), inputs[[8, 1, 5]])
    torch.testing.assert_close(torch.cat([b.target for b in batches]), numbers[[8, 1, 5]])
    again = chosen.subset([2])
    torch.testing.assert_close(next(again.batches()).target, numbers[[5]])
    for rows in ([], [11], [-1]):
        with pytest.raises(ValueError, match="rows from 0 to 10"):
            reference.subset(rows)


def test_a_linearization_at_other_weights_keeps_buffers_and_frozen_weights() -> None:
    module, inputs, _ = make("frozen")
    start = Linearization(module)
    weights = {name: value.detach() + 1 for name, value in weights_of(module).items()}
    moved = start.at(weights)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights.get(name, parameter))
    torch.testing.assert_close(moved.predict(inputs), module(inputs).detach(), rtol=1e-13, atol=1e-13)
    assert not any(torch.equal(moved.params[name], start.params[name]) for name in weights)
    weights["2.weight"].zero_()
    assert moved.params["2.weight"].any()
