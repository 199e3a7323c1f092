"""The optimizer of the linearized network in lockstep: its state and groups, and the kinds that are refused."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from lightning_ntk import Linearization
from lightning_ntk.linearization.batch_loss import PairLoss
from lightning_ntk.linearization.parameters import trainable_parameters
from lightning_ntk.training.base import StepSettings
from lightning_ntk.training.twin import Twin, require_supported_optimizer
from tests.problems import LinearModel, flatten, make, relative_error
from tests.training.twin_runs import (
    OPTIMIZERS,
    Make,
    Run,
    compare,
    minibatches,
    of,
    one_cycle,
    warm_up_and_cosine,
)


def two_groups(parameters: dict[str, Tensor]) -> torch.optim.Optimizer:
    first = {"params": [parameters["0.weight"]], "lr": 0.02, "weight_decay": 0.1}
    return torch.optim.AdamW([first, {"params": [parameters["2.weight"], parameters["2.bias"]]}], lr=0.005)


@pytest.mark.tested("parameter groups", "twin")
def test_parameter_groups_and_parameters_that_no_group_holds() -> None:
    run = compare(two_groups, "cross_entropy", schedule=warm_up_and_cosine, clip_norm=0.1)
    assert run.twin.displacement()["0.bias"].eq(0).all()


@pytest.mark.tested("late start with a momentum buffer", "twin")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_late_twin_starts_with_the_state_of_the_optimizer(optimizer: str) -> None:
    module, inputs, targets = make("mlp")
    early, late = minibatches(steps=20)[:5], minibatches(steps=20)[5:]
    before = Run(module, inputs, targets, nn.MSELoss(), OPTIMIZERS[optimizer])
    before.train(early)
    model = LinearModel(module, inputs)
    continued = copy.deepcopy(before.optimizer.state_dict())

    def continue_optimizer(parameters: dict[str, Tensor]) -> torch.optim.Optimizer:
        copied = OPTIMIZERS[optimizer](parameters)
        copied.load_state_dict(copy.deepcopy(continued))  # it would share the tensors
        return copied

    expected = model.fit(late, targets, nn.MSELoss(), continue_optimizer)
    run = Run(module, inputs, targets, nn.MSELoss(), lambda _: before.optimizer)
    run.train(late)
    # NAdam's state holds a float32 number that the comparison's load_state_dict converts to float64.
    assert run.error(expected) < (1e-10 if optimizer == "nadam" else 1e-13)


@pytest.mark.tested("saved and continued state", "twin")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_stored_twin_continues_in_the_middle_of_an_accumulation(optimizer: str) -> None:
    module, inputs, targets = make("mlp")
    run = Run(module, inputs, targets, nn.MSELoss(), OPTIMIZERS[optimizer])
    steps = minibatches(steps=20)
    run.train(steps[:10])
    run.twin.accumulate((inputs[:4], targets[:4]), scale=0.5)
    stored = io.BytesIO()
    torch.save(run.twin.state_dict(), stored)
    stored.seek(0)
    restored = Twin(PairLoss(run.linearization, run.loss), OPTIMIZERS[optimizer](run.live), run.live)
    state = torch.load(stored, weights_only=True)
    restored.load_state_dict(state)
    kept = copy.deepcopy(state)
    for twin in (run.twin, restored):
        for rows in (torch.arange(4, 11), torch.arange(5)):
            twin.accumulate((inputs[rows], targets[rows]), scale=0.5)
            twin.step(StepSettings(run.optimizer.param_groups))
    assert restored.steps == run.twin.steps == 12
    torch.testing.assert_close(state, kept, rtol=0, atol=0)  # stepping does not reach into what was loaded
    # NAdam's state holds a float32 number that load_state_dict converts to float64.
    tolerance = 1e-7 if optimizer == "nadam" else 0
    assert relative_error(flatten(restored.displacement()), flatten(run.twin.displacement())) <= tolerance


def test_a_stored_twin_of_another_network_is_refused() -> None:
    first, second = (Run(*make(network), nn.MSELoss(), OPTIMIZERS["adam"]) for network in ("mlp", "tied"))
    with pytest.raises(ValueError, match="these names differ"):
        first.twin.load_state_dict(second.twin.state_dict())


def test_parameters_frozen_during_the_run_stay_where_they_are() -> None:
    module, inputs, targets = make("mlp")
    run = Run(module, inputs, targets, nn.MSELoss(), OPTIMIZERS["adamw"])
    run.train(minibatches(steps=5))
    before = dict(run.twin.displacement())
    module[0].requires_grad_(False)
    run.train(minibatches(steps=5))
    after = run.twin.displacement()
    assert before["0.weight"].equal(after["0.weight"])
    assert not before["2.weight"].equal(after["2.weight"])


def test_groups_added_during_the_run() -> None:
    def without_first(parameters: dict[str, Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam([parameters["2.weight"], parameters["2.bias"]], lr=0.01)

    module, inputs, targets = make("mlp")
    model = LinearModel(module, inputs)
    run = Run(module, inputs, targets, nn.MSELoss(), without_first)
    steps = minibatches(steps=10)
    run.train(steps[:5])
    run.optimizer.add_param_group({"params": [run.live["0.weight"], run.live["0.bias"]], "lr": 0.02})
    run.train(steps[5:])

    class Grows(torch.optim.Adam):
        """Adam whose second group joins before the sixth step."""

        steps = 0

        def step(self, closure=None):
            if self.steps == 5:
                self.add_param_group({"params": self.later, "lr": 0.02})
            self.steps += 1
            return super().step(closure)

    def growing(parameters: dict[str, Tensor]) -> torch.optim.Optimizer:
        optimizer = Grows([parameters["2.weight"], parameters["2.bias"]], lr=0.01)
        optimizer.later = [parameters["0.weight"], parameters["0.bias"]]
        return optimizer

    assert run.error(model.fit(steps, targets, nn.MSELoss(), growing)) < 1e-13


def test_named_groups_added_during_the_run_in_part_frozen() -> None:
    module, inputs, targets = make("frozen")

    def head(_: dict[str, Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam([("4.weight", module[4].weight)], lr=0.01)

    run = Run(module, inputs, targets, nn.MSELoss(), head)
    run.train(minibatches(steps=2))
    names = ["0.weight", "2.weight", "2.bias"]
    run.optimizer.add_param_group({"params": [(name, module.get_parameter(name)) for name in names]})
    run.train(minibatches(steps=2))
    moved = {name for name, value in run.twin.displacement().items() if value.any()}
    assert moved == {"4.weight", "2.weight", "2.bias"}


def test_parameters_unfrozen_during_the_run_are_refused() -> None:
    module, inputs, targets = make("frozen")
    run = Run(module, inputs, targets, nn.MSELoss(), OPTIMIZERS["adam"])
    run.train(minibatches(steps=2))
    module[0].requires_grad_(True)
    run.optimizer.add_param_group({"params": list(module[0].parameters())})
    with pytest.raises(ValueError, match="parameter group 1 holds 2 trainable tensors that were not"):
        run.train(minibatches(steps=1))


def test_a_frozen_parameter_that_the_optimizer_holds_has_no_copy() -> None:
    module, inputs, targets = make("frozen")

    def everything(_: dict[str, Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(module.named_parameters(), lr=0.01)

    model = LinearModel(module, inputs)
    run = Run(module, inputs, targets, nn.MSELoss(), everything)
    run.train(minibatches(), clip_norm=0.1)
    expected = model.fit(minibatches(), targets, nn.MSELoss(), of(torch.optim.AdamW, lr=0.01), clip_norm=0.1)
    assert run.error(expected) < 1e-13
    state = run.twin.state_dict()["optimizer"]
    assert len(state["param_groups"][0]["params"]) == len(run.live) == 4
    module[0].requires_grad_(True)
    with pytest.raises(ValueError, match="parameter group 0 holds 2 trainable tensors"):
        run.twin.step(StepSettings(run.optimizer.param_groups))


class Lookahead(torch.optim.SGD):
    """SGD whose weights return half way to slow ones every third step, kept outside of its state."""

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}
        self.count = 0

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        self.count += 1
        if self.count % 3 == 0:
            for parameter, slow in self.slow.items():
                parameter.copy_(slow.lerp_(parameter, 0.5))


def test_an_optimizer_with_attributes_of_its_own() -> None:
    compare(of(Lookahead, lr=0.1), "cross_entropy", schedule=warm_up_and_cosine)


@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16])
def test_the_state_takes_the_type_of_the_passes(live: torch.dtype) -> None:
    module, inputs, targets = make("mlp")
    module = module.to(live)
    parameters = trainable_parameters(module)
    optimizer = torch.optim.Adam(parameters.values(), lr=0.01)
    nn.functional.mse_loss(module(inputs.to(live)), targets.to(live)).backward()
    optimizer.step()
    linearization = Linearization(module, dtype=torch.float64)
    twin = Twin(PairLoss(linearization, nn.MSELoss()), optimizer, parameters)
    for _ in range(2):
        twin.accumulate((inputs, targets))
        twin.step(StepSettings(optimizer.param_groups))
    entries = [entry for state in twin.state_dict()["optimizer"]["state"].values() for entry in state.items()]
    assert {value.dtype for name, value in entries if name != "step"} == {torch.float64}
    assert all(p.dtype == live for p in parameters.values())


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


class SharpnessAware(torch.optim.SGD):
    def first_step(self) -> None: ...

    def second_step(self) -> None: ...


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (torch.optim.LBFGS, "several times within a step"),
        (NeedsClosure, "several times within a step"),
        (SharpnessAware, "at two points in a step"),
        (torch.optim.SparseAdam, "sparse gradients"),
    ],
)
def test_optimizers_that_do_not_step_from_gradients_are_refused(kind, reason: str) -> None:
    optimizer = kind([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match=f"{kind.__name__} .*{reason}.* Use torch.optim.SGD"):
        require_supported_optimizer(optimizer)


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_that_do_are_not_refused_under_a_scheduler(make_optimizer: Make) -> None:
    optimizer = make_optimizer({"weight": nn.Parameter(torch.ones(2, 2))})
    one_cycle(optimizer)
    require_supported_optimizer(optimizer)
    with pytest.raises(TypeError, match=r"torch.optim.Optimizer but got Linear"):
        require_supported_optimizer(nn.Linear(1, 1))


def test_sparse_gradients_are_refused() -> None:
    module = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    live = trainable_parameters(module)
    linearization = Linearization(module)
    with pytest.raises(ValueError, match="`0` was built with `sparse=True`"):
        Twin(PairLoss(linearization, nn.MSELoss()), torch.optim.SGD(live.values(), lr=0.1), live)


def test_parameters_outside_the_network_are_refused() -> None:
    module, _, _ = make("mlp")
    live = trainable_parameters(module)
    linearization = Linearization(module)
    temperature = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="parameter group 0 holds 1 trainable tensors that were not"):
        Twin(PairLoss(linearization, nn.MSELoss()), torch.optim.SGD([*live.values(), temperature], lr=0.1), live)
    with pytest.raises(ValueError, match=r"Expected parameters .*0.bias"):
        Twin(
            PairLoss(linearization, nn.MSELoss()),
            torch.optim.SGD(live.values(), lr=0.1),
            {"0.weight": live["0.weight"]},
        )
