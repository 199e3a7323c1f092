"""Means over seeds and slopes in log-log axes, with confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """A mean and its confidence interval.

    Args:
        mean: Of the values.
        low: Lower end of the interval; minus infinity for a single value, which says nothing about its spread.
        high: Upper end.
        count: Number of values.
    """

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class PowerLaw:
    """The least-squares line through points in log-log axes: y = factor * x^slope.

    Args:
        slope: Exponent of x.
        low: Lower end of the confidence interval of the slope; minus infinity for points at two abscissas only, one each.
        high: Upper end.
        factor: The value of the line at x = 1.
        count: Number of points.
        confidence: Probability of the interval.
    """

    slope: float
    low: float
    high: float
    factor: float
    count: int
    confidence: float

    def at(self, x: float) -> float:
        """The value of the line at x."""
        return self.factor * float(x**self.slope)

    def __str__(self) -> str:
        return f"{self.slope:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Mean:
    """Mean of independent values, with Student's t interval: mean ± t s / sqrt(n), s from n - 1 degrees of freedom.

    Args:
        values: At least one.
        confidence: Probability that the interval contains the expectation, for normal values.

    Raises:
        ValueError: If there are no values, or `confidence` is no probability.

    Example:
        >>> mean_interval([1.0, 2.0, 3.0]).mean
        2.0
    """
    if not values:
        raise ValueError("Expected at least one value to average but got none.")
    _require_probability(confidence)
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Mean(mean, -math.inf, math.inf, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = _t_quantile(confidence, count - 1) * math.sqrt(variance / count)
    return Mean(mean, mean - half, mean + half, count)


def log_log_slope(x: Sequence[float], y: Sequence[float], confidence: float = 0.95) -> PowerLaw:
    """Least squares of log y = log factor + slope log x, with Student's t interval from n - 2 degrees of freedom.

    Args:
        x: Positive abscissas, at least two distinct ones.
        y: Positive values, one for each.
        confidence: Probability that the interval contains the slope, for independent log-normal deviations.

    Raises:
        ValueError: If the lengths differ, a number is not positive and finite, all x are the same, or `confidence` is no
            probability.

    Example:
        >>> str(log_log_slope([1, 10, 100], [5.0, 0.5, 0.05]))
        '-1.000 [-1.000, -1.000]'
    """
    _require_probability(confidence)
    if len(x) != len(y):
        raise ValueError(f"Expected as many y as x but got {len(y)} and {len(x)}.")
    for axis, numbers in (("x", x), ("y", y)):
        wrong = [value for value in numbers if not (math.isfinite(value) and value > 0)]
        if wrong:
            raise ValueError(
                f"Expected positive, finite numbers for a slope in log-log axes but {len(wrong)} of {len(numbers)} {axis} are "
                f"not: {wrong[0]}, ... Leave those points out, for example diverged runs."
            )
    if len(set(x)) < 2:
        raise ValueError(f"Expected points at two or more different x for a slope but got {sorted(set(x))}.")
    log_x, log_y = [math.log(value) for value in x], [math.log(value) for value in y]
    count = len(x)
    mean_x, mean_y = math.fsum(log_x) / count, math.fsum(log_y) / count
    spread = math.fsum((value - mean_x) ** 2 for value in log_x)
    slope = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(log_x, log_y, strict=True)) / spread
    half = math.inf
    if count > 2:
        residuals = [b - mean_y - slope * (a - mean_x) for a, b in zip(log_x, log_y, strict=True)]
        variance = math.fsum(residual**2 for residual in residuals) / (count - 2)
        half = _t_quantile(confidence, count - 2) * math.sqrt(variance / spread)
    return PowerLaw(slope, slope - half, slope + half, math.exp(mean_y - slope * mean_x), count, confidence)


def _t_quantile(confidence: float, degrees: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + confidence / 2, degrees))


def _require_probability(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"Expected argument `confidence` to be between 0 and 1 but got {confidence!r}.")
