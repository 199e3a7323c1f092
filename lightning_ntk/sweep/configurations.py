"""The configurations of a sweep: grids, lists and random samples."""

import itertools
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_ntk.utilities.validation import require_integer

Configuration = dict[str, Any]
"""Names and values of parameters, all of them JSON, the argument of one call of the objective."""

# Columns of the result table that are not parameters.
RESERVED = ("step", "trial")


@dataclass(frozen=True)
class Range:
    """An interval from which a parameter is sampled.

    Args:
        low: Smallest value.
        high: Largest value.
        log: Sample the logarithm of the value uniformly instead of the value.
        integer: Sample whole numbers, both ends included.

    Raises:
        ValueError: If the interval is empty, is logarithmic and reaches zero, or has integer values and fractional ends.
        TypeError: If an end is not a number, or `log` or `integer` is not True or False.
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            switch = name in ("log", "integer")
            if isinstance(value, bool) != switch or not isinstance(value, int | float):
                kind = "true or false" if switch else "a number"
                raise TypeError(f"Expected `{name}` of a range to be {kind} but got {value!r}.")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"Expected a range with low < high, both finite, but got low={self.low}, high={self.high}."
            )
        if self.log and self.low <= 0:
            raise ValueError(f"Expected a positive `low` for a logarithmic range but got {self.low}.")
        if self.integer and (self.low % 1 or self.high % 1):
            raise ValueError(f"Expected whole numbers as ends of an integer range but got {self.low} and {self.high}.")

    def at(self, fraction: float) -> float:
        """The quantile of the distribution at `fraction`, in [0, 1)."""
        # A whole number stands for the unit interval around it, so that both ends are as likely as the others.
        low, high = (self.low - 0.5, self.high + 0.5) if self.integer else (self.low, self.high)
        value = low * (high / low) ** fraction if self.log else low + fraction * (high - low)
        return int(min(max(round(value), self.low), self.high)) if self.integer else value


def grid(values: Mapping[str, Sequence[Any]]) -> list[Configuration]:
    """Every combination of the parameters' values; the last parameter varies fastest.

    Args:
        values: A list of values for each parameter.

    Raises:
        ValueError: If a list is empty, a value occurs twice, or a value is not JSON.
        TypeError: If a parameter has no list.

    Example:
        >>> grid({"width": [64, 128], "seed": [0, 1]})[:3]
        [{'width': 64, 'seed': 0}, {'width': 64, 'seed': 1}, {'width': 128, 'seed': 0}]
    """
    for name, choices in values.items():
        if not _is_list(choices):
            raise TypeError(f"Expected a list of values for the parameter {name!r} but got {choices!r}.")
    return check_configurations(
        dict(zip(values, point, strict=True)) for point in itertools.product(*values.values()) if values
    )


def product(*parts: Iterable[Configuration]) -> list[Configuration]:
    """Every combination of one configuration from each part, such as samples and seeds.

    Example:
        >>> product([{"lr": 0.1}, {"lr": 0.3}], grid({"seed": [0, 1]}))[1]
        {'lr': 0.1, 'seed': 1}
    """
    merged = []
    for point in itertools.product(*map(check_configurations, parts)):
        names = [name for part in point for name in part]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"Expected every parameter in one part of the product but {twice} are in several.")
        merged.append({name: value for part in point for name, value in part.items()})
    return check_configurations(merged)


def random_sample(ranges: Mapping[str, Range | Sequence[Any]], *, samples: int, seed: int = 0) -> list[Configuration]:
    """Independent random configurations, always the same for the same seed.

    Args:
        ranges: For each parameter a `Range`, or a list of values to choose from.
        samples: Number of configurations.
        seed: Seed of the random numbers.

    Raises:
        ValueError: If there are no samples or no ranges, or two samples are the same.
    """
    generator = random.Random(seed)
    _check_samples(ranges, samples)
    return check_configurations(
        {name: _at(choices, generator.random()) for name, choices in ranges.items()} for _ in range(samples)
    )


def latin_hypercube(ranges: Mapping[str, Range | Sequence[Any]], *, samples: int, seed: int = 0) -> list[Configuration]:
    """A random sample that covers the range of every parameter evenly.

    Each parameter has one value in each of `samples` equally likely parts of its range. Arguments are those of `random_sample`.

    Source: McKay, Beckman and Conover, "A comparison of three methods for selecting values of input variables", 1979.
    """
    # Not scipy.stats.qmc: a sweep that resumes must draw the same values under every version of a library.
    generator = random.Random(seed)
    _check_samples(ranges, samples)
    columns = []
    for choices in ranges.values():
        parts = list(range(samples))
        generator.shuffle(parts)
        columns.append([_at(choices, (part + generator.random()) / samples) for part in parts])
    return check_configurations(dict(zip(ranges, point, strict=True)) for point in zip(*columns, strict=True))


def check_configurations(configurations: Iterable[Mapping[str, Any]]) -> list[Configuration]:
    """Returns the configurations as dictionaries.

    Raises a ValueError or TypeError unless there is at least one and all are distinct and JSON.
    """
    checked: dict[str, Configuration] = {}
    for index, configuration in enumerate(configurations):
        if not isinstance(configuration, Mapping):
            raise TypeError(f"Expected every configuration to be a dictionary but number {index} is {configuration!r}.")
        for name in configuration:
            if not isinstance(name, str) or name in RESERVED:
                raise ValueError(
                    f"Expected parameter names to be strings other than {RESERVED}, columns of the table, but got {name!r}."
                )
        key = configuration_key(configuration)
        if key in checked:
            raise ValueError(
                f"Expected distinct configurations but numbers {list(checked).index(key)} and {index} are the same: "
                f"{dict(configuration)}. Each one is run once; add a parameter such as `seed` to repeat it."
            )
        checked[key] = dict(configuration)
    if not checked:
        raise ValueError("Expected at least one configuration but got none: a sweep of zero trials has no result.")
    return list(checked.values())


def configuration_key(configuration: Mapping[str, Any]) -> str:
    """A string that is equal exactly for equal configurations.

    64 and 64.0 are equal, 1 and True are not.

    Example:
        >>> configuration_key({"lr": 1.0, "bias": True}) == configuration_key({"bias": True, "lr": 1})
        True
    """
    canonical = {name: _canonical(name, value) for name, value in configuration.items()}
    return json.dumps(canonical, sort_keys=True, separators=(",", ":"))


def _canonical(name: str, value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [_canonical(name, entry) for entry in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _canonical(name, entry) for key, entry in value.items()}
    raise ValueError(
        f"Expected the values of parameter {name!r} to be finite numbers, strings, booleans, None, or lists and dictionaries "
        f"of them, which a storage can keep, but got {value!r} of type {type(value).__name__}. Give its name or number "
        "instead and build the object in the objective."
    )


def _at(choices: Range | Sequence[Any], fraction: float) -> Any:
    return choices.at(fraction) if isinstance(choices, Range) else choices[int(fraction * len(choices))]


def _is_list(choices: Any) -> bool:
    return isinstance(choices, Sequence) and not isinstance(choices, str)


def _check_samples(ranges: Mapping[str, Range | Sequence[Any]], samples: int) -> None:
    require_integer("samples", samples, least=1)
    if not ranges:
        raise ValueError("Expected a range for at least one parameter but got none.")
    for name, choices in ranges.items():
        if not isinstance(choices, Range) and not (_is_list(choices) and choices):
            raise ValueError(f"Expected a Range or a list of values for the parameter {name!r} but got {choices!r}.")
