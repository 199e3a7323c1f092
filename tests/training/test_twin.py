"""The linearized network in lockstep, against any optimizer on the explicit linear model in float64."""

import copy
import io
import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from lightning_ntk import Linearization
from lightning_ntk.linearization.batch_loss import PairLoss
from lightning_ntk.linearization.parameters import trainable_parameters
from lightning_ntk.training import LinearizedProblem, StoredLoss
from lightning_ntk.training.base import StepSettings
from lightning_ntk.training.twin import Twin, require_supported_optimizer
from tests.problems import NETWORKS, LinearModel, flatten, make, relative_error

Make = Callable[[dict[str, Tensor]], torch.optim.Optimizer]


def of(kind: type[torch.optim.Optimizer], **options) -> Make:
    return lambda parameters: kind(parameters.values(), **options)


OPTIMIZERS: dict[str, Make] = {
    "sgd": of(torch.optim.SGD, lr=0.1),
    "momentum": of(torch.optim.SGD, lr=0.05, momentum=0.9, dampening=0.1, weight_decay=1e-2),
    "nesterov": of(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "fused_sgd": of(torch.optim.SGD, lr=0.05, momentum=0.9, fused=True),
    "adam": of(torch.optim.Adam, lr=0.01, betas=(0.8, 0.99)),
    "foreach_adam": of(torch.optim.Adam, lr=0.01, weight_decay=1e-2, foreach=True),
    "fused_adam": of(torch.optim.Adam, lr=0.01, fused=True),
    "adamw": of(torch.optim.AdamW, lr=0.01, weight_decay=0.1, amsgrad=True),
    "tensor_lr": of(torch.optim.AdamW, lr=torch.tensor(0.01)),
    "rmsprop": of(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "adagrad": of(torch.optim.Adagrad, lr=0.05, lr_decay=0.01),
    "nadam": of(torch.optim.NAdam, lr=0.01),
    "adadelta": of(torch.optim.Adadelta, lr=1.0),
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": nn.MSELoss(),
    "cross_entropy": nn.CrossEntropyLoss(),
    "label_smoothing": nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.tensor([1.0, 2.0, 0.5]).double()),
    "bce": nn.BCEWithLogitsLoss(),
    "huber": nn.HuberLoss(delta=0.5),
}


def targets_for(loss: str, targets: Tensor) -> Tensor:
    if loss in ("cross_entropy", "label_smoothing"):
        return targets.argmax(1)
    return (targets > 0).to(targets.dtype) if loss == "bce" else targets


def minibatches(samples: int = 11, size: int = 4, steps: int = 30, accumulate: int = 1) -> list[list[Tensor]]:
    """Shuffled epochs of ragged minibatches, the last of 11 samples has 3."""
    generator = torch.Generator().manual_seed(1)

    def stream() -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(samples, generator=generator).split(size)

    batches = stream()
    return [list(itertools.islice(batches, accumulate)) for _ in range(steps)]


class Run:
    """A real run and its twin, as a trainer drives them."""

    def __init__(self, module, inputs, targets, loss, make_optimizer: Make, *, schedule=None, late: int = 0, **options):
        self.module, self.inputs, self.targets, self.loss = module, inputs, targets, loss
        self.live = trainable_parameters(module)
        self.optimizer = make_optimizer(self.live)
        self.scheduler = schedule(self.optimizer) if schedule else None
        self.linearization = Linearization(module, **options)
        self.twin = Twin(PairLoss(self.linearization, self.loss), self.optimizer, self.live)

    def train(self, steps: Sequence[Sequence[Tensor]], *, clip_norm=None, clip_value=None, frozen=None) -> None:
        for batches in steps:
            self.optimizer.zero_grad()
            for rows in batches:
                outputs = self.linearization._predictor.predict(self.module, self.rows(rows))
                (self.loss(outputs, self.targets[rows]) / len(batches)).backward()
                self.twin.accumulate((self.rows(rows), self.targets[rows]), scale=1 / len(batches))
            without = [n for n, p in self.live.items() if p.grad is None] if frozen is None else frozen
            self.twin.step(StepSettings(self.optimizer.param_groups, clip_norm, clip_value, without))
            held = [p for group in self.optimizer.param_groups for p in group["params"]]
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(held, clip_norm)
            if clip_value is not None:
                nn.utils.clip_grad_value_(held, clip_value)
            self.optimizer.step()
            if self.scheduler:
                self.scheduler.step()

    def rows(self, rows: Tensor):
        return {k: v[rows] for k, v in self.inputs.items()} if isinstance(self.inputs, dict) else self.inputs[rows]

    def error(self, expected: Tensor) -> float:
        """Relative error of the displacement."""
        start = flatten(self.linearization.params)
        return relative_error(flatten(self.twin.displacement()), expected - start)


def warm_up_and_cosine(optimizer: torch.optim.Optimizer) -> LambdaLR:
    def factor(step: int) -> float:
        return (step + 1) / 5 if step < 5 else 0.5 * (1 + torch.cos(torch.tensor(step / 10)).item())

    return LambdaLR(optimizer, factor)


def one_cycle(optimizer: torch.optim.Optimizer) -> OneCycleLR:
    cycled = "momentum" in optimizer.defaults or "betas" in optimizer.defaults
    return OneCycleLR(optimizer, max_lr=0.05, total_steps=40, cycle_momentum=cycled)


def compare(make_optimizer: Make, loss: str, *, network: str = "mlp", accumulate: int = 1, schedule=None, **clipping):
    module, inputs, targets = make(network)
    module.eval()
    targets = targets_for(loss, targets)
    model = LinearModel(module, inputs)
    steps = minibatches(accumulate=accumulate)
    run = Run(module, inputs, targets, LOSSES[loss], make_optimizer, schedule=schedule)
    run.train(steps, **clipping)
    unused = [name for name, p in run.live.items() if p.grad is None]
    expected = model.fit(steps, targets, LOSSES[loss], make_optimizer, schedule=schedule, unused=unused, **clipping)
    assert run.error(expected) < 1e-13
    return run


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


def two_groups(parameters: dict[str, Tensor]) -> torch.optim.Optimizer:
    first = {"params": [parameters["0.weight"]], "lr": 0.02, "weight_decay": 0.1}
    return torch.optim.AdamW([first, {"params": [parameters["2.weight"], parameters["2.bias"]]}], lr=0.005)


@pytest.mark.tested("parameter groups", "twin")
def test_parameter_groups_and_parameters_that_no_group_holds() -> None:
    run = compare(two_groups, "cross_entropy", schedule=warm_up_and_cosine, clip_norm=0.1)
    assert run.twin.displacement()["0.bias"].eq(0).all()


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
