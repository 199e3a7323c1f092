"""Closed forms of the dynamics, against exact rational or high-precision arithmetic."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_ntk.dynamics.filters import (
    Start,
    gradient_descent_filter,
    gradient_descent_slope,
    gradient_flow_filter,
    gradient_flow_slope,
    minimum_norm_filter,
)
from lightning_ntk.dynamics.sgd import ModalSGD, SGDSettings

eigenvalues = st.one_of(
    st.just(0.0), st.floats(1e-300, 1e-200), st.floats(1e-16, 1e-6), st.floats(1e-6, 2.5), st.sampled_from([1.0, 2.0])
)


def exact_descent(eigenvalue: float, rate: float, steps: int) -> float:
    """sum_{s<t} (1 - eta lambda)^s eta, in rational arithmetic."""
    x = Fraction(rate) * Fraction(eigenvalue)
    if x == 0:
        return float(Fraction(rate) * steps)
    return float((1 - (1 - x) ** steps) / Fraction(eigenvalue))


@given(eigenvalue=eigenvalues, rate=st.floats(1e-3, 1.0), steps=st.integers(0, 60))
def test_descent_equals_rational_arithmetic(eigenvalue: float, rate: float, steps: int) -> None:
    actual = gradient_descent_filter(torch.tensor([eigenvalue], dtype=torch.float64), rate, steps)
    # Near eta * lambda = 2 even powers cancel, and the rounding of eta * lambda itself, times t, is what remains.
    scale = abs(1 - rate * eigenvalue) ** steps / eigenvalue if rate * eigenvalue > 1 else 0.0
    assert actual.item() == pytest.approx(exact_descent(eigenvalue, rate, steps), rel=1e-13, abs=1e-14 * scale * steps)


@given(eigenvalue=eigenvalues, time=st.floats(0, 1e4, allow_subnormal=False))
def test_flow_is_between_its_bounds_and_solves_its_equation(eigenvalue: float, time: float) -> None:
    phi = gradient_flow_filter(torch.tensor([eigenvalue], dtype=torch.float64), time).item()
    assert 0 <= phi <= time * (1 + 1e-15)
    assert phi * eigenvalue <= 1 + 1e-15
    x = eigenvalue * time
    series = time * (1 - x / 2 + x**2 / 6)
    if x < 1e-5:
        assert phi == pytest.approx(series, rel=1e-14)


@given(eigenvalue=st.floats(1e-6, 1.9), first=st.integers(0, 200), second=st.integers(0, 200))
def test_descent_composes_over_time(eigenvalue: float, first: int, second: int) -> None:
    value = torch.tensor([eigenvalue], dtype=torch.float64)
    phi = [gradient_descent_filter(value, 1.0, t).item() for t in (first, second, first + second)]
    # w(t1 + t2): the remaining residual (1 - lambda phi) after t1 is trained for t2.
    assert phi[2] == pytest.approx(phi[0] + (1 - eigenvalue * phi[0]) * phi[1], rel=1e-9, abs=1e-9)


@given(rates=st.lists(st.floats(0, 1.5), max_size=30), eigenvalue=eigenvalues)
def test_recurrence_equals_the_product_of_its_steps(rates: list[float], eigenvalue: float) -> None:
    online = ModalSGD([torch.tensor([eigenvalue], dtype=torch.float64)], factor=0.5)
    remaining = 1.0
    for rate in rates:
        online.step(SGDSettings(rate))
        remaining *= 1 - 0.5 * rate * eigenvalue
    assert 1 - eigenvalue * online.filters.values[0].item() == pytest.approx(remaining, rel=1e-9, abs=1e-11)


@given(eigenvalue=st.floats(1e-3, 1.0))
def test_all_dynamics_reach_the_minimum_norm_solution(eigenvalue: float) -> None:
    value = torch.tensor([eigenvalue], dtype=torch.float64)
    limit = minimum_norm_filter(value, cutoff=1e-6)
    assert limit.item() == 1 / eigenvalue
    torch.testing.assert_close(gradient_descent_filter(value, 1.0, 10**7), limit)
    torch.testing.assert_close(gradient_flow_filter(value, 1e7), limit)


def test_small_eigenvalues_keep_all_their_digits() -> None:
    # The textbook form (1 - (1 - x)^t) / lambda is 8e-8 off here in float64 and 100 % off in float32.
    value = torch.tensor([1e-10], dtype=torch.float64)
    exact = exact_descent(1e-10, 1.0, 1000)
    assert gradient_descent_filter(value, 1.0, 1000).item() == pytest.approx(exact, rel=1e-15)
    naive = (1 - (1 - value) ** 1000) / value
    assert abs(naive.item() - exact) > 1e-9 * exact


def test_rounding_below_zero_counts_as_zero() -> None:
    value = torch.tensor([-1e-12, 0.0], dtype=torch.float64)
    assert gradient_descent_filter(value, 0.5, 8).tolist() == [4.0, 4.0]
    assert gradient_flow_filter(value, 4.0).tolist() == [4.0, 4.0]
    assert minimum_norm_filter(value, 0.0).tolist() == [0.0, 0.0]
    online = ModalSGD([value], 1.0)
    online.step(SGDSettings(4.0))
    assert online.filters.values[0].tolist() == [4.0, 4.0]


def test_eigenvalues_above_the_stable_maximum_grow() -> None:
    value = torch.tensor([3.0], dtype=torch.float64)
    assert gradient_descent_filter(value, 1.0, 3).item() == pytest.approx((1 - (-2.0) ** 3) / 3)


@pytest.mark.parametrize("steps", [-1, 0.5, float("nan")])
def test_steps_must_be_whole_numbers(steps: float) -> None:
    with pytest.raises(ValueError, match=r"`t`|NaN"):
        gradient_descent_filter(torch.ones(1).double(), 1.0, steps)


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 300])
def test_slopes_are_derivatives(steps: int) -> None:
    values = torch.tensor([0.0, 1e-9, 1e-5, 1e-2, 0.3, 0.9, 1.0, 1.4, 1.9], dtype=torch.float64)
    step = 1e-7
    for filter_of, slope_of in ((gradient_descent_filter, gradient_descent_slope), (_flow, _flow_slope)):
        expected = (filter_of(values + 2 * step, 1.0, steps) - filter_of(values + step, 1.0, steps)) / step
        actual = slope_of(values + 1.5 * step, filter_of(values + 1.5 * step, 1.0, steps), 1.0, steps)
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=1e-5)


def _flow(values: torch.Tensor, rate: float, steps: float) -> torch.Tensor:
    return gradient_flow_filter(values, rate * steps)


def _flow_slope(values: torch.Tensor, filtered: torch.Tensor, rate: float, steps: float) -> torch.Tensor:
    return gradient_flow_slope(values, filtered, rate * steps)


@pytest.mark.parametrize("start", [Start(1.0, 0.0), Start(0.0, 1.0)])
def test_the_recurrence_follows_slopes(start: Start) -> None:
    values = torch.tensor([0.0, 0.3, 1.1], dtype=torch.float64)
    settings = SGDSettings(0.4, momentum=0.8, nesterov=True, weight_decay=0.05)
    both = [ModalSGD([v, v], 0.7, [start], with_slopes=True) for v in (values, values + 1e-6)]
    for _ in range(40):
        for sgd in both:
            sgd.step(settings)
    first, second = (sgd.filters.values for sgd in both)
    for slope, low, high in zip(both[0].slopes, first, second, strict=True):
        torch.testing.assert_close(slope, (high - low) / 1e-6, rtol=1e-4, atol=1e-6)
    assert ModalSGD([values], 0.7).slopes == []
