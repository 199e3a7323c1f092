"""Lanczos modes: always within their own bound of the eigendecomposition, and what else a Krylov space promises."""

import itertools
import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_ntk import LinearizedTraining, empirical_ntk
from lightning_ntk.dynamics.closed_form import ClosedForm
from lightning_ntk.dynamics.error_bounds import gradient_descent_bound, gradient_flow_bound
from lightning_ntk.dynamics.sgd import SGDSettings
from lightning_ntk.solvers.base import Modes
from lightning_ntk.solvers.eigh import eigh_modes
from lightning_ntk.solvers.lanczos import Lanczos, LanczosModes, LanczosProcess, LanczosSolver, extend
from lightning_ntk.solvers.products import Product, kernel_product

DTYPE = torch.float64


class Case:
    """A kernel with a known spectrum, J = Q sqrt(lambda) and a residual."""

    def __init__(self, eigenvalues: Tensor, residual: Tensor, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = len(eigenvalues)
        rotation = torch.linalg.qr(torch.randn(size, size, dtype=DTYPE, generator=generator))[0]
        self.jacobian = rotation * eigenvalues.sqrt()
        self.kernel = self.jacobian @ self.jacobian.T
        self.residual = rotation @ residual

    def weights(self, modes: Modes, filtered: Tensor) -> Tensor:
        return self.jacobian.T @ modes.coefficients(filtered)

    def modes(self, products: int) -> LanczosModes:
        return advance(LanczosProcess(self.residual), kernel_product(self.kernel), products).modes()


def advance(lanczos: LanczosProcess, product: Product, products: int) -> LanczosProcess:
    for _ in range(products):
        extend([lanczos], product)
    return lanczos


def decaying(size: int = 60, decades: float = 6.0) -> Case:
    generator = torch.Generator().manual_seed(1)
    eigenvalues = torch.logspace(0, -decades, size, dtype=DTYPE)
    return Case(eigenvalues, torch.randn(size, dtype=DTYPE, generator=generator))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Spectra with decay, exact zeros, duplicates and clusters; residuals dense, sparse or aligned with few modes."""
    size = draw(st.integers(2, 60))
    seed = draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    decades = draw(st.floats(0.0, 9.0))
    eigenvalues = torch.logspace(0, -decades, size, dtype=DTYPE)
    kind = draw(st.sampled_from(["decay", "zeros", "duplicates", "clusters", "outlier"]))
    if kind == "zeros":
        eigenvalues[size // 2 :] = 0
    elif kind == "duplicates":
        eigenvalues = eigenvalues[:: max(1, size // 4)].repeat_interleave(max(1, size // 4))[:size]
    elif kind == "clusters":
        eigenvalues = eigenvalues[torch.arange(size) // 5 * 5] * (1 + 1e-9 * torch.arange(size))
    elif kind == "outlier":
        eigenvalues[0] = 100
    residual = torch.randn(len(eigenvalues), dtype=DTYPE, generator=generator)
    residual = residual * draw(st.sampled_from([1e-6, 1.0, 1e5]))
    alignment = draw(st.sampled_from(["dense", "sparse", "decaying"]))
    if alignment == "sparse":
        residual = residual * (torch.rand(len(eigenvalues), generator=generator) < 0.3)
        residual[-1] += 1e-3
    elif alignment == "decaying":
        residual = residual * (eigenvalues + 1e-6)
    return Case(eigenvalues, residual, seed)


def distance_and_bound(case: Case, modes: LanczosModes, form: ClosedForm, t: float | None) -> tuple[float, float]:
    (reference,) = eigh_modes(case.kernel, case.residual)
    expected = case.weights(reference, form.filter(reference, t))
    error = (case.weights(modes, form.filter(modes, t)) - expected).norm().item()
    # The eigendecomposition itself is off by a few roundings of the largest eigenvalue, which time magnifies.
    values = reference.eigenvalues.clamp_min(0)
    largest = form.filter(reference, None)
    if t is not None:
        largest = torch.clamp(1 / values.clamp_min(1e-300), max=form.rate * t)
    gain = (values.sqrt() * largest).max()
    if t is None:
        gain = gain + values[-1] * (values.sqrt() * largest**2).max()
    allowance = 1e-14 * gain * (values[-1] * (largest * reference.coordinates).norm() + reference.coordinates.norm())
    return error, form.bound(modes, t).total + allowance.item()


@settings(max_examples=200, deadline=None)
@given(
    case=cases(),
    products=st.integers(2, 40),
    scaled_rate=st.sampled_from([0.03, 0.9, 1.0, 1.3, 1.9, 2.0]),
    t=st.sampled_from([0, 1, 7, 50, 1000, 30000, 10**6]),
    dynamics=st.sampled_from(["gradient_descent", "gradient_flow"]),
)
def test_weights_are_within_their_bound(case: Case, products: int, scaled_rate: float, t: int, dynamics: str) -> None:
    modes = case.modes(products)
    largest = torch.linalg.eigvalsh(case.kernel)[-1].item()
    form = ClosedForm(dynamics, scaled_rate / largest, DTYPE)
    error, bound = distance_and_bound(case, modes, form, t)
    assert error <= bound


@settings(max_examples=100, deadline=None)
@given(case=cases(), products=st.integers(2, 70))
def test_the_minimum_norm_solution_is_within_its_bound(case: Case, products: int) -> None:
    modes = case.modes(products)
    error, bound = distance_and_bound(case, modes, ClosedForm("gradient_descent", 1.0, DTYPE), None)
    assert error <= bound


@pytest.mark.parametrize("dynamics", ["gradient_descent", "gradient_flow"])
@pytest.mark.parametrize("scaled_rate", [0.5, 1.0, 1.8])
@pytest.mark.parametrize("t", [100, 1000, 10000])
def test_the_bound_is_sharp(dynamics: str, scaled_rate: float, t: int) -> None:
    case = decaying()
    form = ClosedForm(dynamics, scaled_rate, DTYPE)
    modes = next(modes for k in range(2, 60) if form.bound(modes := case.modes(k), t).relative < 1e-3)
    error, bound = distance_and_bound(case, modes, form, t)
    assert error <= bound <= 30 * error


@pytest.mark.parametrize("t", [1, 5, 12])
@pytest.mark.parametrize("rate", [1.0, 1.7, 2.5])
def test_gradient_descent_is_exact_after_as_many_products_as_steps(t: int, rate: float) -> None:
    case = decaying()
    form = ClosedForm("gradient_descent", rate, DTYPE)
    modes, (reference,) = case.modes(t + 1), eigh_modes(case.kernel, case.residual)
    expected = case.weights(reference, form.filter(reference, t))
    torch.testing.assert_close(case.weights(modes, form.filter(modes, t)), expected, rtol=1e-11, atol=1e-12)
    assert form.bound(modes, t).truncation == 0
    assert form.bound(modes, t + 1).truncation > 0


def test_the_explicit_sum_over_steps_agrees_with_the_closed_one() -> None:
    modes = decaying().modes(20)
    rate = 1 / modes.largest_diagonal
    for t in (100, 5000, 10**5):
        # A rate slightly above takes the explicit sum, one slightly below the closed form.
        above, below = (gradient_descent_bound(modes, rate * (1 + sign * 1e-9), t) for sign in (1, -1))
        assert above.truncation == pytest.approx(below.truncation, rel=1e-5)


def test_descent_becomes_flow_for_small_rates() -> None:
    modes = decaying().modes(20)
    descent, flow = gradient_descent_bound(modes, 1e-5, 10**7), gradient_flow_bound(modes, 100.0)
    assert descent.truncation == pytest.approx(flow.truncation, rel=1e-3)


@pytest.mark.parametrize("rank", [1, 4])
def test_an_invariant_space_is_exact(rank: int) -> None:
    eigenvalues = torch.cat([torch.linspace(1, 2, rank, dtype=DTYPE), torch.zeros(20, dtype=DTYPE)])
    case = Case(eigenvalues, torch.ones(rank + 20, dtype=DTYPE))
    lanczos = advance(LanczosProcess(case.residual), kernel_product(case.kernel), 15)
    assert lanczos.exhausted
    assert lanczos.num_products <= rank + 2  # the null space counts as one eigenvalue, and rounding as one more
    form = ClosedForm("gradient_descent", 0.3, DTYPE)
    for t in (3, 1000, None):
        assert form.bound(lanczos.modes(), t).truncation == 0
        error, bound = distance_and_bound(case, lanczos.modes(), form, t)
        assert error <= bound <= 1e-10


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


def test_rounded_products_are_noticed() -> None:
    case = decaying()
    rounded = advance(LanczosProcess(case.residual), lambda v: (v.float() @ case.kernel.float()).double(), 50)
    form = ClosedForm("gradient_descent", 1.0, DTYPE)
    exact, estimated = form.bound(case.modes(50), 1000), form.bound(rounded.modes(), 1000)
    assert estimated.rounding > 1e4 * exact.rounding
    error, bound = distance_and_bound(case, rounded.modes(), form, 1000)
    assert 1e-7 < error <= bound


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
    assert expected.error_bound(30) == 0
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
    coarse = LanczosSolver(
        lambda v: (v.float() @ case.kernel.float()).double(), [case.residual], tolerance=1e-12, max_products=100
    )
    assert coarse.refine(lambda modes: form.solve(modes, 1000)).stopped == "rounding"


def test_modes_need_two_products() -> None:
    lanczos = advance(LanczosProcess(decaying().residual), kernel_product(decaying().kernel), 1)
    with pytest.raises(ValueError, match="at least two products"):
        lanczos.modes()
