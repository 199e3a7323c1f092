import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from lightning_ntk.sweep import log_log_slope
from lightning_ntk.sweep.statistics import geometric_mean_interval, mean_interval


@given(st.integers(0, 10_000), st.integers(3, 30), st.sampled_from([0.5, 0.9, 0.99]))
def test_slope_and_interval_are_those_of_least_squares(seed: int, count: int, confidence: float) -> None:
    generator = np.random.default_rng(seed)
    x = generator.uniform(1, 100, count)
    y = 3 * x**-0.7 * np.exp(generator.normal(0, 0.3, count))
    law = log_log_slope(x.tolist(), y.tolist(), confidence)
    design = np.stack([np.log(x), np.ones(count)], 1)
    (slope, intercept), squares, *_ = np.linalg.lstsq(design, np.log(y), rcond=None)
    error = math.sqrt(squares[0] / (count - 2) * np.linalg.inv(design.T @ design)[0, 0])
    half = t.ppf(0.5 + confidence / 2, count - 2) * error
    assert law.slope == pytest.approx(slope, rel=1e-9, abs=1e-11)
    assert law.high - law.slope == pytest.approx(half, rel=1e-6)
    assert law.slope - law.low == pytest.approx(half, rel=1e-6)
    assert law.factor == pytest.approx(math.exp(intercept), rel=1e-9)
    assert law.at(7.0) == pytest.approx(math.exp(intercept) * 7**slope, rel=1e-9)


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    x = [1.0, 2.0, 4.0, 8.0, 16.0]
    covered = 0
    for _ in range(2000):
        law = log_log_slope(x, (np.array(x) ** -0.5 * np.exp(generator.normal(0, 0.2, 5))).tolist(), 0.8)
        covered += law.low <= -0.5 <= law.high
    assert pytest.approx(covered / 2000, abs=4 * math.sqrt(0.8 * 0.2 / 2000)) == 0.8


def test_two_points_have_a_slope_and_no_interval() -> None:
    law = log_log_slope([1, 4], [1, 0.5])
    assert law.slope == pytest.approx(-0.5)
    assert (law.low, law.high) == (-math.inf, math.inf)


def test_numbers_without_a_logarithm_are_refused() -> None:
    for y in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"but 1 of 3 y are not: {y}"):
            log_log_slope([1, 2, 3], [1, y, 2])
    with pytest.raises(ValueError, match="at two or more different x"):
        log_log_slope([2, 2, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="Expected as many y as x but got 1 and 2"):
        log_log_slope([1, 2], [1])
    with pytest.raises(ValueError, match="Expected argument `confidence` to be between 0 and 1 but got 95"):
        log_log_slope([1, 2], [1, 2], 95)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12))
def test_means_and_intervals_are_students(values: list[float]) -> None:
    mean = mean_interval(values, 0.9)
    assert mean.mean == pytest.approx(np.mean(values), abs=1e-10)
    half = t.ppf(0.95, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    assert mean.high - mean.mean == pytest.approx(half, rel=1e-9, abs=1e-10)
    assert mean.count == len(values)


def test_a_geometric_mean_and_its_interval_are_those_of_logarithms() -> None:
    values = [0.3, 0.01, 2.0, 0.05]
    mean, logs = geometric_mean_interval(values, 0.9), mean_interval([math.log(value) for value in values], 0.9)
    assert [math.log(end) for end in (mean.low, mean.mean, mean.high)] == pytest.approx(
        [logs.low, logs.mean, logs.high]
    )
    assert mean.mean == pytest.approx(math.prod(values) ** 0.25)
    assert geometric_mean_interval([3.0]).high == math.inf
    with pytest.raises(ValueError, match=r"Expected positive values for a geometric mean but got 0\.0"):
        geometric_mean_interval([1.0, 0.0])


def test_values_without_spread_have_an_interval_without_width() -> None:
    mean = mean_interval([2.5, 2.5, 2.5])
    assert (mean.low, mean.mean, mean.high) == (2.5, 2.5, 2.5)
    flat = log_log_slope([1, 2, 4], [3.0, 3.0, 3.0])
    assert (flat.low, flat.slope, flat.high) == (0.0, 0.0, 0.0)


def test_a_single_value_says_nothing_about_its_spread() -> None:
    assert mean_interval([3.0]).low == -math.inf
    with pytest.raises(ValueError, match="Expected at least one value"):
        mean_interval([])
