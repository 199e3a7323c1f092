"""The truncation of Lanczos: never below the error on kernels with known spectra, and not far above it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ntk.dynamics.closed_form import ClosedForm
from lightning_ntk.dynamics.truncation import gradient_descent_truncation, gradient_flow_truncation
from lightning_ntk.solvers.eigh import eigh_modes
from lightning_ntk.solvers.lanczos import LanczosModes, LanczosProcess
from lightning_ntk.solvers.products import kernel_product
from tests.solvers.spectra import DTYPE, Case, advance, cases, decaying


def distance_and_bound(case: Case, modes: LanczosModes, form: ClosedForm, t: float | None) -> tuple[float, float]:
    (reference,) = eigh_modes(case.kernel, case.residual)
    expected = case.weights(reference, form.filter(reference, t))
    error = (case.weights(modes, form.filter(modes, t)) - expected).norm().item()
    # The eigendecomposition itself is off by a few roundings of the largest eigenvalue, which time magnifies: by the sum of
    # |1 - eta lambda|^s over all steps, which is eta t where eta lambda is 2.
    values = reference.eigenvalues.clamp_min(0)
    largest = form.filter(reference, None)
    if t is not None:
        decay = values
        if form.dynamics == "gradient_descent":
            decay = (1 - (1 - form.rate * values).abs()) / form.rate
        largest = torch.clamp(1 / decay.clamp_min(1e-300), max=form.rate * t)
    gain = (values.sqrt() * largest).max()
    if t is None:
        gain = gain + values[-1] * (values.sqrt() * largest**2).max()
    allowance = 1e-14 * gain * (values[-1] * (largest * reference.coordinates).norm() + reference.coordinates.norm())
    return error, form.solve([modes], t).bound.total + allowance.item()


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
    modes = next(modes for k in range(2, 60) if form.solve([modes := case.modes(k)], t).bound.relative < 1e-3)
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
    assert form.solve([modes], t).bound.truncation == 0
    assert form.solve([modes], t + 1).bound.truncation > 0


def test_the_explicit_sum_over_steps_agrees_with_the_closed_one() -> None:
    modes = decaying().modes(20)
    rate = 1 / modes.diagonal.max().item()
    for t in (100, 5000, 10**5):
        # A rate slightly above takes the explicit sum, one slightly below the closed form.
        above, below = (gradient_descent_truncation(modes, rate * (1 + sign * 1e-9), t) for sign in (1, -1))
        assert above == pytest.approx(below, rel=1e-5)


def test_descent_becomes_flow_for_small_rates() -> None:
    modes = decaying().modes(20)
    flow = gradient_flow_truncation(modes, 100.0)
    assert gradient_descent_truncation(modes, 1e-5, 10**7) == pytest.approx(flow, rel=1e-3)


@pytest.mark.parametrize("rank", [1, 4])
def test_an_invariant_space_is_exact(rank: int) -> None:
    eigenvalues = torch.cat([torch.linspace(1, 2, rank, dtype=DTYPE), torch.zeros(20, dtype=DTYPE)])
    case = Case(eigenvalues, torch.ones(rank + 20, dtype=DTYPE))
    lanczos = advance(LanczosProcess(case.residual), kernel_product(case.kernel), 15)
    assert lanczos.exhausted
    assert lanczos.num_products <= rank + 2  # the null space counts as one eigenvalue, and rounding as one more
    form = ClosedForm("gradient_descent", 0.3, DTYPE)
    for t in (3, 1000, None):
        assert form.solve([lanczos.modes()], t).bound.truncation == 0
        error, bound = distance_and_bound(case, lanczos.modes(), form, t)
        assert error <= bound <= 1e-10
