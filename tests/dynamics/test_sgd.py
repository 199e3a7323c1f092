"""torch.optim.SGD in full, against torch.optim.SGD on the explicit linear model in float64."""

import itertools
import math
import time
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_ntk import LinearizedTraining
from lightning_ntk.dynamics.filters import Start
from lightning_ntk.dynamics.sgd import ModalSGD, SGDSettings
from tests.problems import LinearModel, flatten, make, relative_error

STEPS = 200
SCHEDULES: dict[str, float | Callable[[int], float] | Sequence[float]] = {
    "constant": 0.05,
    "cosine": lambda step: 0.05 * (1 + math.cos(math.pi * step / STEPS)),
    "warm-up": [0.05 * min(1, (step + 1) / 50) for step in range(STEPS)],
}
OPTIMIZERS = [
    {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": decay}
    for momentum, dampening, nesterov, decay in itertools.product((0.0, 0.9), (0.0, 0.1), (False, True), (0.0, 1e-2))
    if not nesterov or (momentum > 0 and dampening == 0)
]
SOLVERS = [{"solver": "eigh"}, {"solver": "lanczos", "tolerance": 1e-12}]


def linearized(module: nn.Module, inputs: Tensor, targets: Tensor, **options: object) -> LinearizedTraining:
    return LinearizedTraining(module, (inputs, targets), **({"lr": 0.05, "batch_size": 4, "progress": False} | options))


def at(schedule: object) -> Callable[[int], float]:
    if callable(schedule):
        return schedule
    return (lambda step: schedule[step]) if isinstance(schedule, Sequence) else (lambda step: schedule)


def train(
    model: LinearModel,
    targets: Tensor,
    steps: int,
    *,
    lr: object = 0.05,
    decay: str = "coupled",
    weight_decay: float = 0.0,
    buffers: Tensor | None = None,
    scales: Tensor | float = 1.0,
    **options: object,
) -> Tensor:
    """torch.optim.SGD on the explicit linear model, every weight a parameter group of its own where `scales` differ."""
    weights = model.start.clone().requires_grad_()
    coupled = weight_decay if decay == "coupled" else 0.0
    optimizer = torch.optim.SGD([weights], lr=0.0, weight_decay=coupled, **options)
    if buffers is not None:
        optimizer.state[weights]["momentum_buffer"] = buffers.clone()
    for step in range(steps):
        rate = at(lr)(step)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model.predict(weights), targets)
        if decay == "initial":
            loss = loss + weight_decay / 2 * (weights - model.start).square().sum()
        loss.backward()
        before = weights.detach().clone()
        if decay == "decoupled":
            weights.data.mul_(1 - rate * weight_decay)
        optimizer.step()
        if isinstance(scales, Tensor):
            weights.data.copy_(before + scales * (weights.detach() - before))
    return weights.detach()


@pytest.mark.tested("momentum, dampening, Nesterov", "gradient_descent")
@pytest.mark.tested("learning-rate schedule", "gradient_descent")
@pytest.mark.parametrize("solver", SOLVERS, ids=["eigh", "lanczos"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", OPTIMIZERS, ids=str)
def test_weights_and_predictions_equal_brute_force(options: dict, schedule: str, solver: dict) -> None:
    module, inputs, targets = make("mlp")
    model, lr = LinearModel(module, inputs), SCHEDULES[schedule]
    expected = train(model, targets, STEPS, lr=lr, **options)
    training = linearized(module, inputs, targets, lr=lr, **options, **solver)
    assert relative_error(flatten(training.displacement(STEPS)), expected - model.start) < 1e-10
    assert relative_error(training.predictions(STEPS), model.predict(expected)) < 1e-10
    online = training.follow()
    for step in range(STEPS):
        online.step_with(SGDSettings(at(lr)(step), **options))
    assert relative_error(flatten(online.displacement()), expected - model.start) < 1e-10
    assert relative_error(online.state().predictions, model.predict(expected)) < 1e-10


@pytest.mark.tested("weight decay", "gradient_descent")
@pytest.mark.parametrize("solver", SOLVERS, ids=["eigh", "lanczos"])
@pytest.mark.parametrize("decay", ["coupled", "decoupled", "initial"])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"momentum": 0.8, "nesterov": True}, {"momentum": 0.5, "dampening": 0.3}],
    ids=str,
)
def test_every_decay(options: dict, decay: str, solver: dict) -> None:
    module, inputs, targets = make("conv", 1)
    model, lr = LinearModel(module, inputs), SCHEDULES["cosine"]
    for rate in (lr, 0.05):
        described = {"lr": rate, "decay": decay, "weight_decay": 0.03, **options}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            training = linearized(module, inputs, targets, **described, **solver)
        expected = train(model, targets, STEPS, **described)
        assert relative_error(flatten(training.displacement(STEPS)), expected - model.start) < 1e-10
        assert relative_error(training.predictions(STEPS), model.predict(expected)) < 1e-10


@pytest.mark.tested("late start with a momentum buffer", "gradient_descent")
@pytest.mark.parametrize("solver", SOLVERS, ids=["eigh", "lanczos"])
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
        {"momentum": 0.7, "dampening": 0.4, "weight_decay": 0.02},
        {"momentum": 0.7, "dampening": 0.4, "weight_decay": 0.02, "decay": "decoupled"},
        {"momentum": 0.7, "weight_decay": 0.02, "decay": "initial"},
    ],
    ids=str,
)
def test_a_late_start_with_the_momentum_buffer_of_the_optimizer(options: dict, solver: dict) -> None:
    module, inputs, targets = make("mlp")
    model = LinearModel(module, inputs)
    buffers = torch.randn(len(model.start), dtype=torch.float64)
    described = {"lr": SCHEDULES["warm-up"], **options}
    expected = train(model, targets, STEPS, buffers=buffers, **described)
    named = model.unflatten(buffers)
    training = linearized(module, inputs, targets, momentum_buffers=named, **described, **solver)
    buffers.zero_()  # as the optimizer does, in place
    assert relative_error(flatten(training.displacement(STEPS)), expected - model.start) < 1e-10
    assert relative_error(training.predictions(STEPS), model.predict(expected)) < 1e-10


@pytest.mark.parametrize("decay", [None, "coupled", "decoupled", "initial"])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.6}, {"momentum": 0.6, "dampening": 0.4}, {"momentum": 0.6, "nesterov": True}],
    ids=str,
)
@pytest.mark.parametrize("late", [False, True])
def test_infinite_time_is_where_a_long_run_ends(options: dict, decay: str | None, late: bool) -> None:
    if late and not options:
        return
    module, inputs, targets = make("mlp", 1, samples=3)
    model = LinearModel(module, inputs)
    buffers = torch.randn(len(model.start), dtype=torch.float64) if late else None
    extra = {"momentum_buffers": model.unflatten(buffers)} if late else {}
    described = {"lr": 0.3, **options, **({"weight_decay": 0.02, "decay": decay} if decay else {})}
    expected = train(model, targets, 5000, buffers=buffers, **described)
    for solver in SOLVERS:
        training = linearized(module, inputs, targets, **described, **extra, **solver)
        assert relative_error(flatten(training.displacement(None)), expected - model.start) < 1e-9


@pytest.mark.parametrize("solver", SOLVERS, ids=["eigh", "lanczos"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"dynamics": "gradient_flow"}], ids=str)
def test_nothing_moves_without_a_learning_rate(options: dict, solver: dict) -> None:
    module, inputs, targets = make("mlp")
    training = linearized(module, inputs, targets, lr=0.0, **options, **solver)
    for t in (0, 5, None):
        torch.testing.assert_close(training.weights(t), training.initial_weights, rtol=0, atol=0)
        torch.testing.assert_close(training.predictions(t), training.initial_predictions, rtol=0, atol=0)
        assert training.error_bound(t) == 0


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"momentum": 0.5, "dampening": 1.0}], ids=str)
def test_momentum_that_never_comes_to_rest_has_no_limit(options: dict) -> None:
    module, inputs, targets = make("mlp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training = linearized(module, inputs, targets, lr=1e-3, **options)
    with pytest.raises(ValueError, match="has no limit"):
        training.weights(None)


@pytest.mark.tested("parameter groups", "gradient_descent")
@pytest.mark.parametrize("solver", [*SOLVERS, {"solver": "lanczos", "matrix_free": True, "tolerance": 1e-12}], ids=str)
@pytest.mark.parametrize("jacobian", ["streamed", "stored"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=str)
def test_learning_rates_of_parameter_groups(options: dict, jacobian: str, solver: dict) -> None:
    module, inputs, targets = make("twice")
    model = LinearModel(module, inputs)
    multiples = {"layer.weight": 0.3, "layer.bias": 0.0, "head.bias": 2.0}
    parts = [
        torch.full(s, multiples.get(n, 1.0), dtype=torch.float64).flatten()
        for n, s in zip(model.names, model.shapes, strict=True)
    ]
    buffers = torch.randn(len(model.start), dtype=torch.float64) if options else None
    expected = train(model, targets, STEPS, scales=torch.cat(parts), buffers=buffers, **options)
    if buffers is not None:
        options = options | {"momentum_buffers": model.unflatten(buffers)}
    training = linearized(module, inputs, targets, lr_scales=multiples, jacobian=jacobian, **options, **solver)
    assert relative_error(flatten(training.displacement(STEPS)), expected - model.start) < 1e-10
    assert relative_error(training.predictions(STEPS), model.predict(expected)) < 1e-10
    elsewhere = torch.randn(5, 6).double()
    there = LinearModel(module, elsewhere).predict(expected)
    assert relative_error(training.predictions(STEPS, elsewhere), there) < 1e-10
    assert torch.equal(training.weights(STEPS)["layer.bias"], training.initial_weights["layer.bias"])


@pytest.mark.tested("frozen, tied or unused parameters", "gradient_descent")
@pytest.mark.parametrize("solver", SOLVERS, ids=["eigh", "lanczos"])
def test_frozen_groups_do_not_decay(solver: dict) -> None:
    module, inputs, targets = make("mlp")
    model = LinearModel(module, inputs)
    parts = [
        torch.full(s, float(n != "0.weight"), dtype=torch.float64).flatten()
        for n, s in zip(model.names, model.shapes, strict=True)
    ]
    options = {"momentum": 0.9, "weight_decay": 0.05}
    expected = train(model, targets, STEPS, scales=torch.cat(parts), **options)
    training = linearized(module, inputs, targets, lr_scales={"0.weight": 0.0}, **options, **solver)
    assert relative_error(flatten(training.displacement(STEPS)), expected - model.start) < 1e-10


def test_a_given_kernel_has_to_be_the_weighted_one() -> None:
    module, inputs, targets = make("mlp")
    plain, weighted = (
        linearized(module, inputs, targets),
        linearized(module, inputs, targets, lr_scales={"0.bias": 3.0}),
    )
    again = linearized(module, inputs, targets, lr_scales={"0.bias": 3.0}, ntk=weighted.ntk)
    torch.testing.assert_close(again.weights(30), weighted.weights(30))
    with pytest.raises(ValueError, match="kernel of this network"):
        linearized(module, inputs, targets, lr_scales={"0.bias": 3.0}, ntk=plain.ntk)


@pytest.mark.tested("weight decay", "gradient_flow")
@pytest.mark.parametrize("decay", ["coupled", "initial"])
def test_gradient_flow_with_decay_is_the_limit_of_small_steps(decay: str) -> None:
    module, inputs, targets = make("mlp")
    options = {"weight_decay": 0.2, "decay": decay}
    for solver in SOLVERS:
        flow = linearized(module, inputs, targets, lr=0.5, dynamics="gradient_flow", **options, **solver)
        errors = []
        for fine in (100, 200):
            steps = linearized(module, inputs, targets, lr=0.5 / fine, **options)
            errors.append(relative_error(flatten(steps.displacement(12.5 * fine)), flatten(flow.displacement(12.5))))
        assert errors[0] == pytest.approx(2 * errors[1], rel=0.02)  # the error of small steps, and nothing else
        assert errors[1] < 1e-2
        online = flow.follow()
        for lr in (0.5, 1.0, 0.25):
            online.step_with(SGDSettings(lr, weight_decay=0.2))
        torch.testing.assert_close(online.state().predictions, flow.predictions(3.5))
        with pytest.raises(ValueError, match=r"weight decay to stay 0\.2"):
            online.step_with(SGDSettings(0.5, weight_decay=0.1))


@pytest.mark.parametrize("options", [o for o in OPTIMIZERS if o["momentum"] or o["weight_decay"]], ids=str)
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("fraction", [0.3, 0.95])
def test_lanczos_stays_within_its_bound(options: dict, schedule: str, fraction: float) -> None:
    module, inputs, targets = make("conv", 3, samples=21)
    limit = linearized(module, inputs, targets, **options).max_learning_rate

    def lr(step: int) -> float:
        return fraction * limit * (1.0 if schedule == "constant" else 0.5 * (1 + math.cos(step / 30)))

    exact = linearized(module, inputs, targets, lr=lr, solver="eigh", **options)
    for tolerance in (1e-2, 1e-6):
        training = linearized(module, inputs, targets, lr=lr, solver="lanczos", tolerance=tolerance, **options)
        for t in (20, 150):
            expected = flatten(exact.displacement(t))
            error = (flatten(training.displacement(t)) - expected).norm().item()
            assert error <= training.error_bound(t) + 1e-11 * expected.norm().item()
            assert training.error_bound(t, relative=True) <= 1.01 * tolerance


@pytest.mark.parametrize("way", [{"matrix_free": False}, {"matrix_free": True}, {"jacobian": "stored"}], ids=str)
def test_krylov_spaces_of_all_carried_vectors_are_bounded(way: dict) -> None:
    module, inputs, targets = make("conv", 3, samples=21)
    model = LinearModel(module, inputs)
    buffers = torch.randn(len(model.start), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    options = {"momentum": 0.8, "weight_decay": 0.05, "momentum_buffers": model.unflatten(10 * buffers)}
    exact = linearized(module, inputs, targets, solver="eigh", **options)
    for tolerance in (1e-2, 1e-5):
        training = linearized(module, inputs, targets, solver="lanczos", tolerance=tolerance, **options, **way)
        for t in (30, 200, None):
            expected = flatten(exact.displacement(t))
            error = (flatten(training.displacement(t)) - expected).norm().item()
            assert 1e-9 * tolerance < error <= training.error_bound(t) + 1e-11 * expected.norm().item()
            assert training.error_bound(t, relative=True) <= 1.01 * tolerance
        assert training.num_products < 63  # not by exhausting the spaces


def test_later_times_go_on_from_earlier_ones() -> None:
    module, inputs, targets = make("mlp")
    model, calls = LinearModel(module, inputs), []

    def lr(step: int) -> float:
        calls.append(step)
        return 0.05

    training = linearized(module, inputs, targets, lr=lr, momentum=0.9, solver="eigh")
    for t in (10, 40, 40, 60):
        expected = train(model, targets, t, momentum=0.9)
        assert relative_error(flatten(training.displacement(t)), expected - model.start) < 1e-10
    assert calls == list(range(60))
    earlier = train(model, targets, 30, momentum=0.9)
    assert relative_error(flatten(training.displacement(30)), earlier - model.start) < 1e-10


def test_several_times_in_one_pass_with_what_is_carried_along() -> None:
    module, inputs, targets = make("mlp")
    training = linearized(module, inputs, targets, momentum=0.9, weight_decay=0.1)
    times = [0, 3, 50, None]
    for t, weights in zip(times, training.weights_at(times), strict=True):
        torch.testing.assert_close(weights, training.weights(t), rtol=1e-12, atol=1e-14)


def test_a_step_costs_a_multiple_of_the_modes() -> None:
    def seconds(size: int) -> float:
        online = ModalSGD([torch.rand(size, dtype=torch.float64)] * 2, 1.0, [Start(1.0, 0.0)])
        best = math.inf
        for _ in range(20):
            started = time.perf_counter()
            online.step(SGDSettings(0.1, momentum=0.9, weight_decay=0.1))
            best = min(best, time.perf_counter() - started)
        return best

    assert seconds(800_000) < 100 * seconds(50_000)  # O(m^2) would be 256 times


def test_dynamics_that_the_modes_cannot_have_are_refused() -> None:
    module, inputs, targets = make("mlp")
    online = linearized(module, inputs, targets).follow()
    with pytest.raises(ValueError, match=r"without weight decay but got 0\.1"):
        online.step_with(SGDSettings(0.1, weight_decay=0.1))
    flow = linearized(module, inputs, targets, dynamics="gradient_flow").follow()
    with pytest.raises(ValueError, match="without momentum"):
        flow.step_with(SGDSettings(0.1, momentum=0.9))
    scheduled = linearized(module, inputs, targets, lr=[0.1] * 5)
    with pytest.raises(ValueError, match="at most 5, the number of learning rates"):
        scheduled.weights(6)
    with pytest.raises(ValueError, match="only a constant one has a limit"):
        scheduled.weights(None)
    with pytest.raises(ValueError, match="whole number"):
        scheduled.weights(2.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": -0.1}, "`momentum` to be at least 0 but got -0.1"),
        ({"weight_decay": -0.1}, "`weight_decay` to be at least 0"),
        ({"dampening": math.nan}, "`dampening` to be a finite number"),
        ({"nesterov": True}, "momentum above 0 and no dampening"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "momentum above 0 and no dampening"),
        ({"decay": "L2"}, "`decay` to be one of 'coupled', 'decoupled', 'initial'"),
        ({"lr": [0.1, -1.0]}, "`lr`.*got -1.0"),
        ({"lr": "0.1"}, "`lr`"),
        ({"lr": True}, "`lr`"),
        ({"dynamics": "gradient_flow", "momentum": 0.9}, "no momentum"),
        ({"lr_scales": {"body": 1.0}}, "`lr_scales` to name trainable parameters"),
        ({"lr_scales": {"0.bias": -1.0}}, "`lr_scales` to be finite and at least 0"),
        ({"lr_scales": dict.fromkeys(("0.weight", "0.bias", "2.weight", "2.bias"), 0.0)}, "all multiples are 0"),
        ({"lr_scales": {"0.bias": 0.5}, "weight_decay": 0.1}, 'dynamics="twin"'),
        (
            {"momentum_buffers": {"0.bias": torch.zeros(8)}, "momentum": 0.9},
            "these names differ: .'0.weight', '2.bias'",
        ),
    ],
)
def test_bad_arguments_get_a_sentence(options: dict, message: str) -> None:
    module, inputs, targets = make("mlp")
    with pytest.raises(ValueError, match=message):
        linearized(module, inputs, targets, **options)


def test_momentum_buffers_need_momentum() -> None:
    module, inputs, targets = make("mlp")
    buffers = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    with pytest.raises(ValueError, match="`momentum` above 0"):
        linearized(module, inputs, targets, momentum_buffers=buffers)


def test_learning_rates_as_a_tensor() -> None:
    module, inputs, targets = make("mlp")
    rates = torch.linspace(0.01, 0.05, 30)
    expected = linearized(module, inputs, targets, lr=rates.tolist()).weights(30)
    torch.testing.assert_close(linearized(module, inputs, targets, lr=rates).weights(30), expected)
