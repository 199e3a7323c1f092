"""The Lanczos process and its solver, alone and through `LinearizedTraining`."""

import itertools
import logging
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lightning_ntk import LinearizedTraining, empirical_ntk
from lightning_ntk.dynamics.closed_form import ClosedForm
from lightning_ntk.dynamics.sgd import SGDSettings
from lightning_ntk.solvers.lanczos import Lanczos, LanczosProcess, LanczosSolver
from lightning_ntk.solvers.products import kernel_product
from lightning_ntk.solvers.rounding import Rounding
from tests.solvers.spectra import DTYPE, advance, decaying


def test_extending_equals_starting_with_more_products() -> None:
    case = decaying()
    lanczos = LanczosProcess(case.residual)
    for products in (5, 17, 41):
        advance(lanczos, kernel_product(case.kernel), products - lanczos.num_products)
        lanczos.modes()
        once = case.modes(products)
        for name in ("eigenvalues", "coordinates", "coupling", "basis"):
            assert torch.equal(getattr(lanczos.modes(), name), getattr(once, name))


def test_ritz_vectors_keep_their_signs_as_the_basis_grows() -> None:
    case, converged = decaying(), []
    lanczos = LanczosProcess(case.residual)
    for _ in range(15, 50, 5):
        advance(lanczos, kernel_product(case.kernel), 5 if converged else 15)
        converged.append(lanczos.modes())
    for earlier, later in itertools.pairwise(converged):
        cosines = (earlier.basis[:, -4:] * later.basis[:, -4:]).sum(0)
        torch.testing.assert_close(cosines, torch.ones(4, dtype=DTYPE), rtol=0, atol=1e-3)
        assert (later.coordinates >= 0).all()


def test_the_basis_is_orthonormal_and_reproduces_the_residual() -> None:
    case = decaying(decades=12)
    modes = case.modes(50)
    torch.testing.assert_close(modes.basis.T @ modes.basis, torch.eye(49, dtype=DTYPE), rtol=0, atol=1e-13)
    torch.testing.assert_close(modes.basis @ modes.coordinates, case.residual, rtol=0, atol=1e-12)


def test_products_with_a_float32_kernel_are_those_of_its_numbers() -> None:
    kernel = decaying(600).kernel.float()
    vector = torch.randn(600, dtype=DTYPE, generator=torch.Generator().manual_seed(0))
    vectors = torch.stack([vector, vector.flip(0)])
    torch.testing.assert_close(kernel_product(kernel)(vectors), vectors @ kernel.double(), rtol=1e-12, atol=1e-13)


def test_the_solver_stops_at_its_tolerance_and_not_much_later() -> None:
    case = decaying()
    form = ClosedForm("gradient_descent", 1.0, DTYPE)
    products = []
    for tolerance in (1e-2, 1e-5, 1e-8):
        solver = LanczosSolver(kernel_product(case.kernel), [case.residual], tolerance=tolerance, max_products=100)
        assert solver.refine(lambda modes: form.solve(modes, 1000)).bound.relative <= 1.01 * tolerance
        products.append(solver.num_products)
    assert products == sorted(set(products))
    assert products[-1] < 58


def test_the_solver_says_when_memory_ends(caplog: pytest.LogCaptureFixture) -> None:
    case = decaying()
    form = ClosedForm("gradient_descent", 1.0, DTYPE)
    solver = LanczosSolver(kernel_product(case.kernel), [case.residual], tolerance=1e-8, max_products=16)
    with caplog.at_level(logging.WARNING):
        solved = solver.refine(lambda modes: form.solve(modes, 1000))
    assert solved.products == solver.num_products <= 17
    assert solved.stopped == "memory"
    assert solved.bound.relative > 1e-8
    assert "stopped after" in caplog.text


# Through LinearizedTraining.


def network(outputs: int, dtype: torch.dtype = DTYPE) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, outputs)).to(dtype)


def data(outputs: int, dtype: torch.dtype = DTYPE, samples: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(samples, 4, generator=generator, dtype=DTYPE)
    inputs[-3:] = inputs[:3]  # duplicates: a singular kernel, with a residual that cannot vanish
    return inputs.to(dtype), torch.randn(samples, outputs, generator=generator, dtype=DTYPE).to(dtype)


def training(outputs: int = 3, dtype: torch.dtype = DTYPE, lr: float = 0.05, **options: object) -> LinearizedTraining:
    return LinearizedTraining(
        network(outputs, dtype), data(outputs, dtype), lr=lr, batch_size=7, progress=False, **options
    )


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return math.sqrt(sum((first[n].double() - second[n].double()).square().sum().item() for n in first))


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("dynamics", ["gradient_descent", "gradient_flow"])
@pytest.mark.parametrize("way", [{"matrix_free": False}, {"matrix_free": True}, {"jacobian": "stored"}])
def test_every_way_gives_the_weights_of_the_eigendecomposition(outputs: int, dynamics: str, way: dict) -> None:
    expected = training(outputs, solver="eigh", dynamics=dynamics)
    actual = training(outputs, solver="lanczos", dynamics=dynamics, tolerance=1e-7, **way)
    for t in (0, 1, 30, 3000, None):
        moved = math.sqrt(sum(v.square().sum().item() for v in expected.displacement(t).values()))
        error = distance(actual.displacement(t), expected.displacement(t))
        assert error <= actual.error_bound(t) + 1e-9 * moved
        assert actual.error_bound(t, relative=True) <= 1e-6
        torch.testing.assert_close(actual.predictions(t), expected.predictions(t), rtol=1e-4, atol=1e-5)
        assert actual.loss(t) == pytest.approx(expected.loss(t), rel=1e-5)
    assert 0 < expected.error_bound(30, relative=True) < 1e-9
    assert actual.max_learning_rate == pytest.approx(expected.max_learning_rate, rel=2e-4)
    assert actual.max_learning_rate <= expected.max_learning_rate * (1 + 1e-12)


def test_matrix_free_has_no_kernel_and_predicts_elsewhere() -> None:
    free, dense = training(solver="lanczos", matrix_free=True), training(solver="eigh")
    assert free.ntk is None
    assert dense.ntk is not None
    other = torch.randn(9, 4, dtype=DTYPE, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(
        free.predictions(100, data=other), dense.predictions(100, data=other), rtol=1e-6, atol=1e-7
    )


def test_float32_passes_stay_within_their_bound() -> None:
    expected = training(solver="eigh")
    actual = training(dtype=torch.float32, solver="lanczos", matrix_free=True)
    for t in (10, 1000, 10000):
        error = distance(actual.displacement(t), expected.displacement(t))
        assert error <= actual.error_bound(t) + 1e-6 * distance(expected.weights(t), expected.initial_weights)
        assert actual.error_bound(t, relative=True) < 1e-3


def test_a_horizon_is_prepared_at_once_and_later_times_extend() -> None:
    run = training(solver="lanczos", horizon=100)
    prepared = run.num_products
    assert run.error_bound(100, relative=True) <= 1e-6
    assert run.num_products == prepared
    early = run.weights(50)
    run.weights(10000)
    assert run.num_products > prepared
    assert distance(run.weights(50), early) <= 1e-6 * distance(early, run.initial_weights) + 1e-12


@pytest.mark.parametrize("dynamics", ["gradient_descent", "gradient_flow"])
def test_a_followed_run_extends_without_losing_its_past(dynamics: str) -> None:
    rates = [0.05 * (1 + math.cos(s / 50)) for s in range(400)]
    expected = training(solver="eigh", dynamics=dynamics)
    actual = training(solver="lanczos", dynamics=dynamics)
    runs = expected.follow(), actual.follow()
    other = actual.follow()
    other.step_with(SGDSettings(0.05))
    products = actual.num_products
    for step, lr in enumerate(rates, start=1):
        for run in runs:
            run.step_with(SGDSettings(lr))
        if step in (1, 10, 100, 400):
            first, second = runs[0].displacement(), runs[1].displacement()
            error, moved = distance(second, first), distance(first, dict.fromkeys(first, torch.zeros(1)))
            assert error <= runs[1].error_bound().total + 1e-10 * moved
            assert runs[1].error_bound().relative <= 2e-6
    assert actual.num_products > products
    # A second run, begun on the smaller basis, follows the larger one.
    assert distance(other.displacement(), expected.displacement(1)) <= 1e-9


def test_a_followed_constant_rate_is_the_closed_form() -> None:
    run = training(solver="lanczos", horizon=60)
    online = run.follow()
    for _ in range(60):
        online.step_with(SGDSettings(run.lr))
    torch.testing.assert_close(online.state().coefficients, run.state(60).coefficients, rtol=1e-9, atol=1e-12)
    assert online.error_bound().truncation == pytest.approx(0.0, abs=1e-12)


def test_no_residual_no_movement() -> None:
    module = network(3)
    inputs = data(3)[0]
    run = LinearizedTraining(module, (inputs, module(inputs).detach()), lr=0.1, solver="lanczos", progress=False)
    assert distance(run.weights(1000), run.initial_weights) == 0
    assert run.error_bound(1000, relative=True) == 0
    assert math.isfinite(run.max_learning_rate)


def test_a_diverging_rate_is_reported_and_short_times_are_exact() -> None:
    with pytest.warns(UserWarning, match="diverges"):
        expected = training(lr=5.0, solver="eigh")
    with pytest.warns(UserWarning, match="diverges"):
        actual = training(lr=5.0, solver="lanczos")
    relative = distance(actual.weights(8), expected.weights(8)) / distance(
        expected.weights(8), expected.initial_weights
    )
    assert relative < 1e-9
    with pytest.raises(ValueError, match="no limit"):
        actual.error_bound(None)
    with pytest.raises(OverflowError, match="diverged"):
        actual.weights(10**6)


def test_a_given_kernel_is_used() -> None:
    kernel = empirical_ntk(network(3), data(3)[0])
    run = training(ntk=kernel, solver="lanczos")
    assert run.ntk is not None
    assert run.ntk.data_ptr() == kernel.data_ptr()
    with pytest.raises(ValueError, match="`ntk` is given"):
        training(ntk=kernel, solver="lanczos", matrix_free=True)


def test_a_float32_kernel_gives_what_its_eigendecomposition_gives() -> None:
    kernel = empirical_ntk(network(3, torch.float32), data(3, torch.float32)[0])
    expected = training(dtype=torch.float32, ntk=kernel, solver="eigh")
    actual = training(dtype=torch.float32, ntk=kernel, solver="lanczos")
    for t in (10, 1000, 10000):
        torch.testing.assert_close(actual.state(t).predictions, expected.state(t).predictions, rtol=1e-5, atol=2e-5)
        assert actual.error_bound(t, relative=True) < 1e-4


def test_extending_leaves_the_random_state_and_the_module_alone() -> None:
    module = network(3)
    run = LinearizedTraining(module, data(3), lr=0.05, solver="lanczos", matrix_free=True, progress=False)
    weights, state = [p.detach().clone() for p in module.parameters()], torch.get_rng_state()
    products, online = run.num_products, run.follow()
    for _ in range(500):
        online.step_with(SGDSettings(0.05))
    assert online.state().coefficients.isfinite().all()
    assert run.num_products > products
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, w) for p, w in zip(module.parameters(), weights, strict=True))
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "cg"}, "one of 'auto', 'eigh', 'lanczos'"),
        ({"solver": "eigh", "matrix_free": True}, "`solver` is 'eigh'"),
        ({"horizon": -1}, "`horizon` to be at least 0"),
        ({"tolerance": 0.0}, "`tolerance` to be between 0 and 1"),
    ],
)
def test_unusable_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training(**options)


def test_the_options_of_lanczos_come_as_an_object() -> None:
    run = training(solver=Lanczos(tolerance=1e-2, horizon=10**4, matrix_free=True))
    finer = training(solver="lanczos", tolerance=1e-6, horizon=10**4, matrix_free=True)
    assert run.ntk is None
    assert run.num_products < finer.num_products
    assert run.error_bound(10**4, relative=True) <= 1e-2
    with pytest.raises(ValueError, match="as options of"):
        training(solver=Lanczos(), tolerance=1e-3)
    with pytest.raises(ValueError, match="`tolerance` to be between 0 and 1"):
        Lanczos(tolerance=2.0)


def test_the_solver_says_why_it_stopped() -> None:
    case = decaying(20)
    form = ClosedForm("gradient_descent", 1.0, DTYPE)
    solver = LanczosSolver(kernel_product(case.kernel), [case.residual], tolerance=1e-3, max_products=100)
    solved = solver.refine(lambda modes: form.solve(modes, 100))
    assert (solved.stopped, solved.products) == ("tolerance", solver.num_products)
    assert torch.equal(solved.filters.values[0], form.filter(solver.modes[0], 100))
    assert solver.refine(lambda modes: form.solve(modes, None)).stopped == "complete"
    coarse = replace(form, rounding=Rounding(kernel=1e-6))
    again = LanczosSolver(kernel_product(case.kernel), [case.residual], tolerance=1e-12, max_products=100)
    assert again.refine(lambda modes: coarse.solve(modes, 1000)).stopped == "rounding"


def test_modes_need_two_products() -> None:
    lanczos = advance(LanczosProcess(decaying().residual), kernel_product(decaying().kernel), 1)
    with pytest.raises(ValueError, match="at least two products"):
        lanczos.modes()
