"""The closest time, against the distances of all steps of the explicit linear model."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_ntk import LinearizedTraining
from tests.problems import LinearModel, flatten, make

OPTIONS = {"lr": 0.05, "batch_size": 4, "progress": False}


def path(model: LinearModel, targets: Tensor, steps: int, lr: float = 0.05, **options: float) -> Tensor:
    """The weights after 0, 1, ..., `steps` steps."""
    weights = model.start.clone().requires_grad_()
    optimizer = torch.optim.SGD([weights], lr=lr, **options)
    points = [model.start]
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model.predict(weights), targets).backward()
        optimizer.step()
        points.append(weights.detach().clone())
    return torch.stack(points)


def problem() -> tuple[LinearModel, LinearizedTraining, Tensor, tuple]:
    module, inputs, targets = make("mlp")
    return LinearModel(module, inputs), targets, (module, (inputs, targets))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"solver": "lanczos"},
        {"momentum": 0.9},
        {"weight_decay": 0.1},
        {"momentum": 0.5, "weight_decay": 0.1, "solver": "lanczos"},
    ],
    ids=str,
)
@pytest.mark.parametrize("near", [3, 40, 333, 1777])
def test_the_closest_step_is_that_of_brute_force(near: int, options: dict) -> None:
    model, targets, arguments = problem()
    described = {name: value for name, value in options.items() if name != "solver"}
    points = path(model, targets, 2000, **described)
    generator = torch.Generator().manual_seed(near)
    aside = torch.randn(len(model.start), generator=generator, dtype=torch.float64)
    training = LinearizedTraining(*arguments, **OPTIONS, **options)
    for offset in (0.0, 0.02):
        weights = points[near] + offset * aside
        distances = (points - weights).norm(dim=1)
        found = training.closest(model.unflatten(weights - model.start), until=2000)
        if near < 1000:  # later, the trajectory of some moves less than cancellation lets anyone see
            assert found.time == distances.argmin().item()
        assert found.distance == pytest.approx(
            distances.min().item(), rel=1e-5, abs=2e-6 if options.get("solver") else 1e-10
        )


def test_without_a_last_time_all_decades_and_infinity_are_searched() -> None:
    model, targets, arguments = problem()
    training = LinearizedTraining(*arguments, **OPTIONS)
    for t in (0, 7, 54321, 10**5):
        found = training.closest(training.displacement(t))
        assert found.time == t
        assert found.distance < 1e-9
    limit = training.closest({name: 1.1 * value for name, value in training.displacement(None).items()})
    assert limit.time == math.inf
    norm = (model.minimum_norm(targets) - model.start).norm().item()
    assert limit.distance == pytest.approx(0.1 * norm, rel=1e-6)


def test_gradient_flow_finds_real_times() -> None:
    _, _, arguments = problem()
    training = LinearizedTraining(*arguments, **OPTIONS, dynamics="gradient_flow")
    for t in (0.37, 12.5, 4321.9):
        found = training.closest(training.displacement(t))
        assert found.time == pytest.approx(t, rel=1e-6)
    scheduled = LinearizedTraining(*arguments, **(OPTIONS | {"lr": [0.05] * 99}), dynamics="gradient_flow")
    assert scheduled.closest(scheduled.displacement(77)).time == 77


def test_the_floor_is_what_lies_outside_of_the_span() -> None:
    model, _, arguments = problem()
    training = LinearizedTraining(*arguments, **OPTIONS)
    basis = torch.linalg.svd(model.jacobian, full_matrices=False).Vh
    moved = torch.randn(len(model.start), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inside = basis.T @ (basis @ moved)
    found = training.closest(model.unflatten(moved))
    assert found.in_span == pytest.approx((inside.norm() / moved.norm()).item(), rel=1e-9)
    assert found.floor == pytest.approx(((moved - inside).norm() / moved.norm()).item(), rel=1e-9)
    assert found.distance >= found.floor * moved.norm().item() * (1 - 1e-12)
    assert training.closest(training.displacement(30)).in_span == pytest.approx(1)
    partial = LinearizedTraining(*arguments, **OPTIONS, solver="lanczos").closest(model.unflatten(moved), until=100)
    assert (partial.in_span, partial.floor) == (None, None)
    resting = training.closest(model.unflatten(torch.zeros_like(moved)))
    assert (resting.time, resting.distance) == (0, 0)


def test_decay_and_momentum_carry_weights_that_the_floor_leaves_out() -> None:
    model, _, arguments = problem()
    generator = torch.Generator().manual_seed(2)
    buffer, moved = (torch.randn(len(model.start), generator=generator, dtype=torch.float64) for _ in range(2))
    options = {"momentum": 0.8, "weight_decay": 0.1, "momentum_buffers": model.unflatten(buffer)}
    training = LinearizedTraining(*arguments, **OPTIONS, **options)
    reached = torch.cat([model.jacobian, model.start[None], buffer[None]]).T
    floor = (moved - reached @ torch.linalg.lstsq(reached, moved[:, None], driver="gelsd").solution[:, 0]).norm()
    found = training.closest(model.unflatten(moved), until=50)
    assert found.floor == pytest.approx((floor / moved.norm()).item(), rel=1e-9)
    assert training.closest(training.displacement(30), until=50).floor < 1e-9


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_in_float32_the_floor_is_below_the_distance_that_it_bounds(decay: float) -> None:
    _, _, (module, (inputs, targets)) = problem()
    training = LinearizedTraining(
        module.float(), (inputs.float(), targets.float()), **OPTIONS | {"dtype": None}, weight_decay=decay
    )
    displacement = {name: value.float() for name, value in training.displacement(1).items()}
    found = training.closest(displacement, until=50)
    assert found.floor <= found.distance / flatten(displacement).norm().item() * (1 + 1e-12)
    assert found.distance < 1e-5 * flatten(displacement).norm().item()


def test_frozen_parameters_keep_their_part_of_the_distance() -> None:
    _, _, arguments = problem()
    training = LinearizedTraining(*arguments, **OPTIONS, lr_scales={"0.weight": 0.0})
    displacement = training.displacement(25)
    displacement["0.weight"] = displacement["0.weight"] + 0.5
    found = training.closest(displacement)
    assert found.time == 25
    assert found.distance == pytest.approx(0.5 * math.sqrt(displacement["0.weight"].numel()))
    assert found.floor == pytest.approx(found.distance / flatten(displacement).norm().item())


def test_a_schedule_ends_with_its_last_rate() -> None:
    _, _, arguments = problem()
    training = LinearizedTraining(*arguments, **(OPTIONS | {"lr": [0.05, 0.1, 0.02] * 20}))
    assert training.closest(training.displacement(41)).time == 41
    with pytest.raises(ValueError, match="at most 60"):
        training.closest(training.displacement(41), until=61)


def test_what_has_no_closest_time_gets_a_sentence() -> None:
    _, _, arguments = problem()
    momentum = LinearizedTraining(*arguments, **OPTIONS, momentum=0.9)
    with pytest.raises(ValueError, match="`until` to be the last step"):
        momentum.closest(momentum.displacement(3))
    with pytest.raises(ValueError, match=r"`until`.*got inf"):
        momentum.closest(momentum.displacement(3), until=math.inf)
    groups = LinearizedTraining(*arguments, **OPTIONS, lr_scales={"0.weight": 0.5})
    with pytest.raises(ValueError, match="equal learning rates"):
        groups.closest(groups.displacement(3))


def test_a_network_at_rest_is_closest_at_the_start() -> None:
    model, _, arguments = problem()
    moved = torch.ones_like(model.start)
    for dynamics in ("gradient_descent", "gradient_flow"):
        training = LinearizedTraining(*arguments, **(OPTIONS | {"lr": 0.0}), dynamics=dynamics)
        found = training.closest(model.unflatten(moved))
        assert (found.time, found.distance) == (0, pytest.approx(moved.norm().item()))
