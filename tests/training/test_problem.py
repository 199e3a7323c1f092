"""The problem of linearized training, and arguments that have no effect on it."""

import pytest
import torch
from torch import nn

from lightning_ntk import LinearizedTraining
from lightning_ntk.dynamics.sgd import Hyperparameters, SGDSettings
from lightning_ntk.training import LinearizedProblem
from lightning_ntk.training import problem as module_under_test
from lightning_ntk.training.off_span import off_span_terms
from tests.problems import flatten, make


def test_another_data_set_shares_the_network() -> None:
    module, inputs, targets = make("conv")
    problem = LinearizedProblem(module, (inputs, targets))
    other = problem.on((inputs[:4], targets[:4]))
    assert other.linearization is problem.linearization
    torch.testing.assert_close(other.predictions, problem.predictions[:4])
    assert len(problem.reference) == len(inputs)


@pytest.mark.parametrize("argument", [
    {"loss": nn.MSELoss()}, {"predict": lambda m, x: m(x)}, {"unpack": lambda b: b}, {"dtype": torch.float32},
    {"jacobian": "stored"}, {"batch_size": 3}, {"lr_scales": {"0.bias": 0.5}}, {"progress": False},
], ids=lambda argument: next(iter(argument)))  # fmt: skip
def test_a_problem_refuses_settings_beside_its_own(argument: dict) -> None:
    module, inputs, targets = make("mlp")
    problem = LinearizedProblem(module, (inputs, targets))
    with pytest.raises(ValueError, match=f"no argument `{next(iter(argument))}` beside a LinearizedProblem"):
        LinearizedTraining(problem, lr=0.1, **argument)


@pytest.mark.parametrize("argument", [
    {"dynamics": "gradient_flow"}, {"solver": "eigh"}, {"matrix_free": True}, {"horizon": 10}, {"tolerance": 1e-3},
], ids=lambda argument: next(iter(argument)))  # fmt: skip
def test_recorded_batches_refuse_what_modes_would_need(argument: dict) -> None:
    module, inputs, targets = make("mlp")
    with pytest.raises(ValueError, match=f"no argument `{next(iter(argument))}` beside `batches`"):
        LinearizedTraining(module, (inputs, targets), lr=0.1, batches=[[0, 1]], progress=False, **argument)


def test_results_are_the_callers_own() -> None:
    module, inputs, targets = make("mlp")
    training = LinearizedTraining(module, (inputs, targets), lr=0.1, progress=False)
    before = flatten(training.weights(7)), flatten(training.initial_weights)
    for handed_out in (training.displacement(7), training.initial_weights, training.weights(7)):
        for value in handed_out.values():
            value.fill_(1e3)
    assert torch.equal(flatten(training.weights(7)), before[0])
    assert torch.equal(flatten(training.initial_weights), before[1])


def test_without_a_learning_rate_nothing_moves() -> None:
    module, inputs, targets = make("mlp")
    training = LinearizedTraining(module, (inputs, targets), lr=0.0, progress=False)
    assert not flatten(training.displacement(None)).any()
    moved = {name: torch.ones_like(value) for name, value in training.initial_weights.items()}
    assert training.closest(moved).time == 0


def test_a_kernel_of_differing_rates_is_verified_in_the_type_of_its_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    types, check = [], module_under_test.check_kernel

    def spy(*args, dtype, **options):
        types.append(dtype)
        check(*args, dtype=dtype, **options)

    monkeypatch.setattr(module_under_test, "check_kernel", spy)
    module, inputs, targets = make("mlp")
    problem = LinearizedProblem(module, (inputs, targets), lr_scales={"0.weight": 0.3})
    kernel = problem.kernel(dtype=torch.float64)
    problem.kernel(kernel, dtype=torch.float64)
    problem.kernel(kernel.float(), dtype=torch.float64)
    assert types == [torch.float64, torch.float64, torch.float32]


def test_momentum_buffers_of_a_checkpoint_go_to_the_device_of_the_network() -> None:
    module, inputs, targets = make("mlp")
    problem = LinearizedProblem(module, (inputs, targets))
    hyperparameters = Hyperparameters(0.1, SGDSettings(0.1, momentum=0.9))
    elsewhere = {name: torch.empty_like(w, device="meta") for name, w in problem.linearization.params.items()}
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # asked to move, as to a GPU
        off_span_terms(problem, hyperparameters, elsewhere)
