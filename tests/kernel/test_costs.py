import pytest
import torch
from torch import nn

from lightning_ntk import LinearizedTraining
from lightning_ntk.data.reference import Reference
from lightning_ntk.kernel import PlannedKernel, count_operations, empirical_ntk
from lightning_ntk.kernel.collection import collect
from lightning_ntk.kernel.planning import make_plan
from lightning_ntk.kernel.recorder import record_usage
from lightning_ntk.linearization import Linearization


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class Recurrent(nn.Module):
    """Uses one weight several times, one through a function without a rule, and one not at all."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head, self.unused = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3), nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1] * torch.sin(self.scale))


NETWORKS = {
    "linear": (nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 5)), (4,)),
    "convolution": (nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)), (1, 4, 4)),
    "softmax": (nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), (4,)),
    "recurrent": (Recurrent(), (5, 2)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("samples", [1, 2, 7])
def test_a_plan_made_from_one_cotangent_knows_the_bytes_of_its_factors(name, samples):
    module, shape = NETWORKS[name]
    plan = make_plan(Linearization(module), Reference(randn(samples, *shape)))
    factors = collect(plan, randn(samples, *shape))
    grams = [
        tensor for gram in (*factors.grams, *sum(factors.unexpanded, ())) for tensor in (*gram.inputs, gram.gradients)
    ]
    of_samples = [tensor for tensor in (*grams, *factors.jacobians) if tensor.dim() > 2]
    assert plan.cost.factor_bytes == pytest.approx(sum(tensor.nbytes for tensor in of_samples) / samples)


def test_a_kernel_is_planned_once(monkeypatch):
    recordings = []

    def spy(*args, **options):
        recordings.append(args)
        return record_usage(*args, **options)

    for module_name in ("planning", "collection"):
        monkeypatch.setattr(f"lightning_ntk.kernel.{module_name}.record_usage", spy)
    module, shape = NETWORKS["convolution"]
    planned = PlannedKernel(Linearization(module), Reference(randn(7, *shape)))
    assert planned.operations.kernel > planned.operations.forward > 0
    assert len(recordings) == 1
    planned.compute()
    assert len(recordings) == 3  # the verification, and all samples in one pass


def test_operations_of_a_linear_layer_by_hand():
    layers = nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 10))
    counted = count_operations(Linearization(layers), Reference(randn(1000, 64)))
    multiply_adds = 64 * 100 + 100 + 100 * 10 + 10  # a bias is a weight whose input is one
    assert counted.forward == 2 * 1000 * multiply_adds
    gram = (
        65 + 101 + 10**2 * (100 + 2 * 16)
    )  # an elementwise product is counted as 16 multiply-adds, one of a pass as two
    assert counted.kernel == 2 * (1000**2 / 2 * gram + 1000 * 2 * 21 * multiply_adds)


def test_the_solver_is_chosen_by_the_structured_kernel():
    # A contraction would take 6.8e11 operations, and so would be avoided.
    module = nn.Sequential(nn.Linear(8, 1024), nn.Tanh(), nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 3))
    training = LinearizedTraining(module, (randn(266, 8), randn(266, 3)), lr=1e-3, progress=False)
    assert "eigendecomposition" in training.solver_reason
    assert training.ntk is not None


def test_a_parameter_without_axes():
    module, inputs = Recurrent().double(), randn(5, 3, 2).double()
    kernels = [empirical_ntk(module, inputs, method=m) for m in ("structured", "contraction")]
    torch.testing.assert_close(*kernels)
    targets = randn(5, 3).double()
    stored, streamed = (
        LinearizedTraining(module, (inputs, targets), lr=0.01, jacobian=way, progress=False)
        for way in ("stored", "streamed")
    )
    torch.testing.assert_close(stored.weights(3)["scale"], streamed.weights(3)["scale"])
