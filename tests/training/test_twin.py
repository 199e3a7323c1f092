"""The linearized network in lockstep, against any optimizer on the explicit linear model in float64."""

import pytest
import torch
from torch import Tensor, nn

from lightning_ntk import Linearization
from lightning_ntk.linearization.batch_loss import PairLoss
from lightning_ntk.linearization.parameters import trainable_parameters
from lightning_ntk.training import LinearizedProblem, StoredLoss
from lightning_ntk.training.base import StepSettings
from lightning_ntk.training.twin import Twin
from tests.problems import NETWORKS, LinearModel, flatten, make, relative_error
from tests.training.twin_runs import (
    LOSSES,
    OPTIMIZERS,
    Run,
    compare,
    minibatches,
    of,
    one_cycle,
    targets_for,
    warm_up_and_cosine,
)


@pytest.mark.tested("minibatches", "twin")
@pytest.mark.tested("momentum, dampening, Nesterov", "twin")
@pytest.mark.tested("weight decay", "twin")
@pytest.mark.tested("Adam and other optimizers", "twin")
@pytest.mark.tested("cross-entropy and other losses", "twin")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_the_optimizer_on_the_explicit_linear_model(optimizer: str, loss: str) -> None:
    compare(OPTIMIZERS[optimizer], loss)


@pytest.mark.tested("gradient accumulation", "twin")
@pytest.mark.tested("clipping by norm", "twin")
@pytest.mark.tested("clipping by value", "twin")
@pytest.mark.tested("learning-rate schedule", "twin")
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("optimizer", ["momentum", "nesterov", "adam", "adamw", "rmsprop", "adagrad"])
@pytest.mark.parametrize("schedule", [warm_up_and_cosine, one_cycle])
@pytest.mark.parametrize("clipping", [{}, {"clip_norm": 0.1}, {"clip_value": 0.02}], ids=["", "norm", "value"])
def test_accumulation_clipping_and_schedules(optimizer: str, loss: str, schedule, clipping) -> None:
    compare(OPTIMIZERS[optimizer], loss, accumulate=3, schedule=schedule, **clipping)


@pytest.mark.tested("frozen, tied or unused parameters", "twin")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_frozen_tied_unused_and_convolutional_parameters(network: str, optimizer: str) -> None:
    compare(OPTIMIZERS[optimizer], "cross_entropy", network=network, clip_norm=0.5)


def test_two_hundred_steps() -> None:
    module, inputs, targets = make("mlp")
    steps = minibatches(steps=200)
    run = Run(module, inputs, targets.argmax(1), nn.CrossEntropyLoss(), OPTIMIZERS["adamw"])
    expected = LinearModel(module, inputs).fit(steps, targets.argmax(1), nn.CrossEntropyLoss(), OPTIMIZERS["adamw"])
    run.train(steps)
    assert run.error(expected) < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_exactly_linear_network_stays_with_its_twin(optimizer: str, loss: str, dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    module = nn.Linear(6, 3, dtype=dtype)
    inputs, targets = torch.randn(11, 6, dtype=dtype), targets_for(loss, torch.randn(11, 3, dtype=dtype))
    run = Run(module, inputs, targets, LOSSES[loss], OPTIMIZERS[optimizer])
    run.train(minibatches(accumulate=3), clip_norm=0.5)
    moved = {n: p.detach().double() - run.linearization.params[n].double() for n, p in run.live.items()}
    assert relative_error(flatten(run.twin.displacement()), flatten(moved)) < tolerance


class Pair(nn.Module):
    """Two inputs in a dict, one output per sample of shape `(B,)`."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 5), nn.Linear(2, 5)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return (self.left(left).tanh() * self.right(right).tanh()).sum(1)


def test_batches_that_are_dicts_and_outputs_without_a_second_dimension() -> None:
    torch.manual_seed(0)
    module = Pair().double()
    inputs = {"left": torch.randn(11, 6).double(), "right": torch.randn(11, 2).double()}
    targets = torch.randn(11).double()

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = module

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(x[:, :6], x[:, 6:])

    model = LinearModel(Joined(), torch.cat([inputs["left"], inputs["right"]], 1))
    steps = minibatches()
    run = Run(module, inputs, targets, nn.MSELoss(), OPTIMIZERS["adam"], predict=lambda m, x: m(**x))
    run.train(steps)
    assert run.error(model.fit(steps, targets, nn.MSELoss(), OPTIMIZERS["adam"])) < 1e-13


def test_the_run_shares_nothing_with_its_twin() -> None:
    weights = []
    for with_twin in (False, True):
        module, inputs, targets = make("mlp")
        run = Run(module, inputs, targets, nn.MSELoss(), OPTIMIZERS["adam"], schedule=one_cycle)
        if not with_twin:
            run.twin.accumulate = run.twin.step = lambda *_, **__: None
        run.train(minibatches())
        weights.append(flatten({n: p.detach() for n, p in run.live.items()}))
    assert weights[0].equal(weights[1])
    assert not run.linearization.params["0.weight"].equal(run.twin.weights["0.weight"])


@pytest.mark.tested("divergence", "twin")
def test_a_diverging_twin_says_so_and_keeps_its_last_weights() -> None:
    module, inputs, targets = make("mlp")
    module, inputs, targets = module.float(), inputs.float(), targets.float()
    parameters = trainable_parameters(module)
    optimizer = torch.optim.SGD(parameters.values(), lr=1e4)
    linearization = Linearization(module)
    twin = Twin(PairLoss(linearization, nn.MSELoss()), optimizer, parameters)

    def train() -> None:
        for _ in range(100):
            twin.accumulate((inputs, targets))
            twin.step(StepSettings(optimizer.param_groups))

    with pytest.raises(OverflowError, match=r"training diverges, .* Lower the learning rate"):
        train()
    assert 2 < twin.steps < 100


def test_a_loss_of_probabilities_does_not_take_linearized_outputs() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 3), nn.Sigmoid()).double()
    inputs, targets = torch.randn(11, 6).double(), (torch.randn(11, 3) > 0).double()
    run = Run(module, inputs, targets, nn.BCELoss(), of(torch.optim.SGD, lr=10.0))
    with pytest.raises(ValueError, match="leave the range of a sigmoid"):
        run.train(minibatches())


class SharedGradient(nn.Module):
    """Autograd returns one tensor as the gradient of both parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.ones(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3] + self.first + self.second


def test_parameters_with_one_gradient_are_clipped_once() -> None:
    module = SharedGradient().double()
    inputs, targets = torch.randn(4, 6).double(), torch.randn(4, 3).double()
    model = LinearModel(module, inputs)
    steps = [[torch.arange(4)]] * 5
    run = Run(module, inputs, targets, nn.MSELoss(), OPTIMIZERS["sgd"])
    run.train(steps, clip_norm=0.1)
    assert run.error(model.fit(steps, targets, nn.MSELoss(), OPTIMIZERS["sgd"], clip_norm=0.1)) < 1e-13


def test_no_memory_is_read_before_it_is_written(poisoned) -> None:
    module, inputs, targets = make("unused")
    live = trainable_parameters(module)
    optimizer = torch.optim.Adam(live.values(), lr=0.01)
    twin = Twin(PairLoss(Linearization(module), nn.MSELoss()), optimizer, live)
    for _ in range(3):
        twin.accumulate((inputs, targets))
        twin.step(
            StepSettings([dict(group) for group in optimizer.param_groups], frozen=["spare.weight", "spare.bias"])
        )
    model = LinearModel(module, inputs)
    expected = model.fit(
        [[torch.arange(11)]] * 3, targets, nn.MSELoss(), of(torch.optim.Adam, lr=0.01),
        unused=["spare.weight", "spare.bias"],
    )  # fmt: skip
    assert relative_error(flatten(twin.displacement()), expected - model.start) < 1e-9


@pytest.mark.tested("stored Jacobian", "twin")
@pytest.mark.tested("frozen, tied or unused parameters", "twin")
@pytest.mark.parametrize("network", NETWORKS)
def test_stored_rows_give_the_gradient_of_passes(network: str) -> None:
    module, inputs, targets = make(network)
    loss = nn.CrossEntropyLoss()
    problem = LinearizedProblem(module, (inputs, targets.argmax(1)), loss=loss, jacobian="stored", batch_size=4)
    pairs = PairLoss(problem.linearization, loss)
    stored, rows = StoredLoss(problem, pairs), torch.tensor([9, 2, 2, 5, 0])
    batch = inputs[rows], targets.argmax(1)[rows]
    for tangent in (None, {name: torch.randn_like(value) for name, value in pairs.params.items()}):
        actual, expected = stored.gradient(batch, tangent), pairs.gradient(batch, tangent)
        assert actual is not None
        assert relative_error(flatten(actual), flatten(expected)) < 1e-13
    assert not stored.unknown
    other = inputs[rows] + 1, batch[1]
    assert torch.equal(flatten(stored.gradient(other, tangent) or {}), flatten(pairs.gradient(other, tangent)))
    assert "5 of its 5 samples are not in it" in stored.unknown
    with pytest.raises(ValueError, match="its Jacobian is streamed"):
        StoredLoss(LinearizedProblem(module, (inputs, targets)), pairs)
