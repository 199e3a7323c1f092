"""Means over seeds and slopes in log-log axes, with confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from scipy.stats import linregress, sem, t


@dataclass(frozen=True)
class Mean:
    """A mean and its confidence interval, which is infinite for a single value."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class PowerLaw:
    """The least-squares line in log-log axes: y = factor * x^slope.

    Args:
        slope: Exponent of x.
        low: Lower end of the slope's confidence interval; minus infinity for two points.
        high: Upper end.
        factor: Value of the line at x = 1.
        count: Number of points.
        confidence: Probability that the interval contains the slope.
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
    """The mean of independent values, with Student's interval.

    There is at least one value. The interval mean ± t s / sqrt(n) is for normal values.

    Example:
        >>> mean_interval([1.0, 2.0, 3.0]).mean
        2.0
    """
    if not values:
        raise ValueError("Expected at least one value to average but got none.")
    mean = math.fsum(values) / len(values)
    with numpy.errstate(invalid="ignore"):  # the interval of a diverged run is nan
        error = sem(values) if len(values) > 1 else math.nan
    half = _half_width(confidence, len(values) - 1, error)
    return Mean(mean, mean - half, mean + half, len(values))


def geometric_mean_interval(values: Sequence[float], confidence: float = 0.95) -> Mean:
    """Geometric mean of positive values, with Student's interval of their logarithms.

    Example:
        >>> round(geometric_mean_interval([0.01, 1.0]).mean, 12)
        0.1
    """
    wrong = [value for value in values if value <= 0]
    if wrong:
        raise ValueError(f"Expected positive values for a geometric mean but got {wrong[0]}.")
    logs = mean_interval([math.log(value) for value in values], confidence)
    mean, low, high = (float(numpy.exp(end)) for end in (logs.mean, logs.low, logs.high))
    return Mean(mean, low, high, logs.count)


def log_log_slope(x: Sequence[float], y: Sequence[float], confidence: float = 0.95) -> PowerLaw:
    """Fits log y = log factor + slope log x, with Student's interval.

    The fit is by least squares.

    Args:
        x: Positive numbers, at least two of them distinct.
        y: One positive number for each x.
        confidence: Probability that the interval contains the slope, for independent log-normal deviations.

    Raises:
        ValueError: If the lengths differ, a number is not positive and finite, all x are the same, or `confidence` is not a
            probability.

    Example:
        >>> str(log_log_slope([1, 10, 100], [5.0, 0.5, 0.05]))
        '-1.000 [-1.000, -1.000]'
    """
    if len(x) != len(y):
        raise ValueError(f"Expected as many y as x but got {len(y)} and {len(x)}.")
    for axis, numbers in (("x", x), ("y", y)):
        wrong = [value for value in numbers if not 0 < value < math.inf]
        if wrong:
            raise ValueError(
                f"Expected positive, finite numbers for a slope in log-log axes but {len(wrong)} of {len(numbers)} {axis} are "
                f"not: {wrong[0]}, ... Leave those points out, for example diverged runs."
            )
    if len(set(x)) < 2:
        raise ValueError(f"Expected points at two or more different x for a slope but got {sorted(set(x))}.")
    line = linregress([math.log(value) for value in x], [math.log(value) for value in y])
    error = line.stderr if len(set(y)) > 1 else 0.0  # scipy has nan for a constant y
    slope, half = float(line.slope), _half_width(confidence, len(x) - 2, error)
    return PowerLaw(slope, slope - half, slope + half, math.exp(line.intercept), len(x), confidence)


def _half_width(confidence: float, degrees: int, standard_error: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"Expected argument `confidence` to be between 0 and 1 but got {confidence!r}.")
    # Not t.interval, which is nan where the standard error is 0.
    return float(t.ppf(0.5 + confidence / 2, degrees) * standard_error) if degrees else math.inf
