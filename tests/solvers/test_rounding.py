"""The rounding of passes, as measured against float64."""

import pytest
import torch
from torch import Tensor, nn

from lightning_ntk import empirical_ntk
from lightning_ntk.data.reference import Reference
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.solvers.rounding import Rounding, measure_rounding
from tests.problems import LinearModel

EPS = torch.finfo(torch.float32).eps


def problem(dtype: torch.dtype = torch.float32, samples: int = 30) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 2)).to(dtype)
    return module, torch.randn(samples, 6).to(dtype), torch.randn(samples, 2).double()


def measure(module: nn.Module, inputs: Tensor, targets: Tensor, batch_size: int = 256, **options: object) -> Rounding:
    linearization = Linearization(module)
    reference = Reference(inputs, batch_size=batch_size)
    return measure_rounding(linearization, reference, linearization.predict(inputs), targets, **options)


@pytest.mark.parametrize("batch_size", [7, 256])
def test_errors_are_those_of_the_passes(batch_size: int) -> None:
    module, inputs, targets = problem()
    rounding = measure(module, inputs, targets, batch_size)
    predictions = module(inputs).detach()
    exact = LinearModel(module.double(), inputs.double())
    largest = torch.linalg.matrix_norm(exact.jacobian, 2).item()
    assert 0.03 * EPS * largest < rounding.backward < 2 * EPS * largest
    assert 0.03 * EPS * largest < rounding.forward < 2 * EPS * largest
    # Batches of seven leave out two of the samples.
    assert rounding.outputs == pytest.approx((predictions - exact.outputs).norm().item(), rel=0.3)
    assert rounding.weights == pytest.approx(EPS / 2 * exact.start.norm().item())
    assert (rounding.kernel, rounding.independent) == (0.0, False)


def test_errors_of_a_kernel_are_found() -> None:
    module, inputs, targets = problem()
    kernel = empirical_ntk(module.double(), inputs.double())
    noise = torch.randn(60, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for size in (1e-6, 1e-3):
        rounding = measure(module, inputs.double(), targets, kernel=kernel + size * (noise + noise.T))
        assert rounding.kernel == pytest.approx(size * 2**0.5 * 60**0.5, rel=0.5)
        assert rounding.backward == rounding.forward == 0


def test_passes_in_float64_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs, targets = problem(torch.float64)
    linearization = Linearization(module)
    predictions = linearization.predict(inputs)
    monkeypatch.setattr(Linearization, "apply", None)
    rounding = measure_rounding(linearization, Reference(inputs), predictions, targets)
    assert rounding.backward == rounding.forward == rounding.kernel == 0
    assert 0 < rounding.outputs < 1e-14


def test_only_some_samples_of_a_large_set_are_read() -> None:
    module, inputs, targets = problem(samples=1000)
    linearization, read = Linearization(module), []
    predictions = linearization.predict(inputs)

    class Counted(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1000

        def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
            read.append(row)
            return inputs[row], targets[row]

    some = measure_rounding(linearization, Reference(Counted(), batch_size=50), predictions, targets)
    assert len(set(read)) == len(read) <= 128
    assert {min(read), max(read)} == {0, 999}
    outputs = (predictions - Linearization(module.double()).predict(inputs)).norm().item()
    assert some.outputs == pytest.approx(outputs, rel=0.4)


def test_learning_rates_of_parameters_scale_their_errors() -> None:
    module, inputs, targets = problem()
    names = [name for name, _ in module.named_parameters()]
    plain = measure(module, inputs, targets)
    doubled = measure(module, inputs, targets, lr_scales=dict.fromkeys(names, 4.0))
    assert doubled.backward == pytest.approx(2 * plain.backward, rel=1e-6)
    assert doubled.forward == pytest.approx(2 * plain.forward, rel=1e-6)
    assert measure(module, inputs, targets, lr_scales=dict.fromkeys(names, 0.0)).backward == 0


def test_module_and_random_state_stay_as_they_are() -> None:
    module, inputs, targets = problem()
    state, weights = torch.get_rng_state(), [p.detach().clone() for p in module.parameters()]
    measure(module, inputs, targets)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, w) and p.dtype == w.dtype for p, w in zip(module.parameters(), weights, strict=True))
