"""Configurations of a sweep: grids, lists and samples, and the key that says which two are the same."""

import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Configuration = dict[str, Any]
"""Parameter names and values, all of them JSON: what one call of the objective gets."""

# Columns of the result table that are no parameters.
RESERVED = ("step", "trial")


@dataclass(frozen=True)
class Range:
    """An interval from which a parameter is sampled.

    Args:
        low: Smallest value.
        high: Largest value.
        log: Whether the logarithm of the value is uniform, instead of the value.
        integer: Whether values are whole numbers, both ends included.

    Raises:
        ValueError: If the interval is empty, or has a logarithm and reaches zero.
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"Expected a range with low < high, both finite, but got low={self.low}, high={self.high}."
            )
        if self.log and self.low <= 0:
            raise ValueError(f"Expected a positive `low` for a logarithmic range but got {self.low}.")

    def at(self, fraction: float) -> float:
        """The value below which this `fraction`, in [0, 1), of the distribution lies."""
        # A whole number stands for the unit interval around it, so that both ends are as likely as the others.
        low, high = (self.low - 0.5, self.high + 0.5) if self.integer else (self.low, self.high)
        value = low * (high / low) ** fraction if self.log else low + fraction * (high - low)
        return int(min(max(round(value), self.low), self.high)) if self.integer else value


def grid(values: Mapping[str, Sequence[Any]]) -> list[Configuration]:
    """Every combination of the values of each parameter; the last parameter varies fastest.

    Args:
        values: A list of values for each parameter.

    Raises:
        ValueError: If a list is empty, a value occurs twice, or a value cannot be written as JSON.
        TypeError: If something is no list.

    Example:
        >>> grid({"width": [64, 128], "seed": [0, 1]})[:3]
        [{'width': 64, 'seed': 0}, {'width': 64, 'seed': 1}, {'width': 128, 'seed': 0}]
    """
    for name, choices in values.items():
        if isinstance(choices, str) or not isinstance(choices, Sequence):
            raise TypeError(f"Expected a list of values for the parameter {name!r} but got {choices!r}.")
        seen: dict[str, Any] = {}
        for value in choices:
            key = configuration_key({name: value})
            if key in seen:
                raise ValueError(f"Expected distinct values for the parameter {name!r} but {value!r} occurs twice.")
            seen[key] = value
    return check_configurations(
        [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values()) if values]
    )


def product(*parts: Sequence[Configuration]) -> list[Configuration]:
    """Every combination of configurations from each part, for example a sample times seeds.

    Example:
        >>> product([{"lr": 0.1}, {"lr": 0.3}], grid({"seed": [0, 1]}))[1]
        {'lr': 0.1, 'seed': 1}
    """
    merged = []
    for point in itertools.product(*parts):
        names = [name for part in point for name in part]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"Expected every parameter in one part of the product but {twice} are in several.")
        merged.append({name: value for part in point for name, value in part.items()})
    return check_configurations(merged)


def random_sample(ranges: Mapping[str, Range | Sequence[Any]], *, samples: int, seed: int = 0) -> list[Configuration]:
    """Independent uniform draws; the same seed gives the same configurations, also in another process.

    Args:
        ranges: For each parameter a `Range`, or a list of values to choose from.
        samples: Number of configurations.
        seed: Of the draws.

    Raises:
        ValueError: If there are no samples or no ranges, or two samples are the same.
    """
    generator = random.Random(seed)
    _require_samples(ranges, samples)
    return check_configurations(
        [{name: _at(choices, generator.random()) for name, choices in ranges.items()} for _ in range(samples)]
    )


def latin_hypercube(ranges: Mapping[str, Range | Sequence[Any]], *, samples: int, seed: int = 0) -> list[Configuration]:
    """A sample in which every parameter takes one value in each of `samples` equally likely parts of its range.

    Source: McKay, Beckman and Conover, "A comparison of three methods for selecting values of input variables", 1979.

    Args:
        ranges: For each parameter a `Range`, or a list of values to choose from.
        samples: Number of configurations.
        seed: Of the draws.

    Raises:
        ValueError: If there are no samples or no ranges, or two samples are the same.
    """
    generator = random.Random(seed)
    _require_samples(ranges, samples)
    columns = {}
    for name, choices in ranges.items():
        parts = list(range(samples))
        generator.shuffle(parts)
        columns[name] = [_at(choices, (part + generator.random()) / samples) for part in parts]
    return check_configurations([{name: columns[name][row] for name in ranges} for row in range(samples)])


def check_configurations(configurations: Sequence[Mapping[str, Any]]) -> list[Configuration]:
    """The configurations as dictionaries, once they are known to be distinct and to survive the storage.

    Raises:
        ValueError: If there are none, two are the same, a name is reserved, or a value is not JSON.
        TypeError: If one is no mapping.
    """
    if not configurations:
        raise ValueError("Expected at least one configuration but got none: a sweep of zero trials has no result.")
    seen: dict[str, int] = {}
    for index, configuration in enumerate(configurations):
        if not isinstance(configuration, Mapping):
            raise TypeError(f"Expected every configuration to be a dictionary but number {index} is {configuration!r}.")
        for name, value in configuration.items():
            if not isinstance(name, str) or name in RESERVED:
                raise ValueError(
                    f"Expected parameter names to be strings other than {RESERVED}, columns of the table, but got {name!r}."
                )
            _require_json(name, value)
        key = configuration_key(configuration)
        if key in seen:
            raise ValueError(
                f"Expected distinct configurations but numbers {seen[key]} and {index} are the same: {dict(configuration)}. "
                "Each one is run once; add a parameter such as `seed` to repeat it."
            )
        seen[key] = index
    return [dict(configuration) for configuration in configurations]


def configuration_key(configuration: Mapping[str, Any]) -> str:
    """A string that is the same for the same configuration: 64 and 64.0 are, 1 and True are not, order does not count.

    Example:
        >>> configuration_key({"lr": 1.0, "bias": True}) == configuration_key({"bias": True, "lr": 1})
        True
    """
    for name, value in configuration.items():
        _require_json(name, value)
    return json.dumps(_canonical(configuration), sort_keys=True, separators=(",", ":"))


def _canonical(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _canonical(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(entry) for entry in value]
    return value


def _require_json(name: Any, value: Any) -> None:
    if value is None or isinstance(value, str | bool | int):
        return
    if isinstance(value, float) and math.isfinite(value):
        return
    if isinstance(value, list | tuple):
        for entry in value:
            _require_json(name, entry)
        return
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        for entry in value.values():
            _require_json(name, entry)
        return
    raise ValueError(
        f"Expected the values of parameter {name!r} to be finite numbers, strings, booleans, None, or lists and dictionaries "
        f"of them, which a storage can keep, but got {value!r} of type {type(value).__name__}. Give its name or number "
        "instead and build the object in the objective."
    )


def _at(choices: Range | Sequence[Any], fraction: float) -> Any:
    return choices.at(fraction) if isinstance(choices, Range) else choices[int(fraction * len(choices))]


def _require_samples(ranges: Mapping[str, Range | Sequence[Any]], samples: int) -> None:
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"Expected argument `samples` to be a positive integer but got {samples!r}.")
    if not ranges:
        raise ValueError("Expected a range for at least one parameter but got none.")
    for name, choices in ranges.items():
        if not isinstance(choices, Range) and (
            isinstance(choices, str) or not isinstance(choices, Sequence) or not choices
        ):
            raise ValueError(f"Expected a Range or a list of values for the parameter {name!r} but got {choices!r}.")
