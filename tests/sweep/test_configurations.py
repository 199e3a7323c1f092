import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ntk.sweep import Range, grid, latin_hypercube, product, random_sample
from lightning_ntk.sweep.configurations import check_configurations, configuration_key


def test_a_grid_is_every_combination_and_the_last_parameter_varies_fastest() -> None:
    points = grid({"a": [1, 2], "b": ["x"], "c": [None, True, [1, 2]]})
    assert [tuple(p.values()) for p in points] == [
        (1, "x", None), (1, "x", True), (1, "x", [1, 2]), (2, "x", None), (2, "x", True), (2, "x", [1, 2]),
    ]  # fmt: skip


@pytest.mark.parametrize("values", [[64, 64], [64, 64.0], [[1, 2], (1, 2)], [{"a": 1, "b": 2}, {"b": 2, "a": 1}]])
def test_a_duplicate_value_is_refused(values: list[object]) -> None:
    with pytest.raises(
        ValueError, match=r"Expected distinct configurations but numbers 0 and 1 are the same: {'width':"
    ):
        grid({"width": values})


def test_a_duplicate_configuration_is_refused_by_its_numbers() -> None:
    with pytest.raises(ValueError, match=r"numbers 0 and 2 are the same: \{'b': 1, 'a': 2.0\}"):
        check_configurations([{"a": 2, "b": 1}, {"a": 1, "b": 1}, {"b": 1, "a": 2.0}])


def test_one_and_true_are_different_values() -> None:
    assert len(grid({"flag": [1, True]})) == 2


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, np.int64(3), np.arange(2), len, {1: 2}, object(), b"x", {"a": [math.nan]}, (1, {2})]
)
def test_a_value_that_no_storage_keeps_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="Expected the values of parameter 'p' to be finite numbers, strings"):
        grid({"p": [value]})
    with pytest.raises(ValueError, match="Expected the values of parameter 'p'"):
        check_configurations([{"p": value}])


@pytest.mark.parametrize("nothing", [{}, {"a": []}, {"a": [1], "b": []}])
def test_an_empty_grid_is_refused(nothing: dict[str, list[int]]) -> None:
    with pytest.raises(ValueError, match="a sweep of zero trials"):
        grid(nothing)


def test_a_single_value_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(TypeError, match="Expected a list of values for the parameter 'name' but got 'tanh'"):
        grid({"name": "tanh"})
    with pytest.raises(TypeError, match="Expected a list of values"):
        grid({"width": 64})  # type: ignore[dict-item]


@pytest.mark.parametrize("name", ["step", "trial", 3])
def test_names_of_other_columns_are_refused(name: object) -> None:
    with pytest.raises(ValueError, match="Expected parameter names to be strings other than"):
        check_configurations([{name: 1}])  # type: ignore[dict-item]


def test_a_product_multiplies_and_refuses_a_parameter_in_two_parts() -> None:
    points = product(random_sample({"lr": Range(1e-3, 1, log=True)}, samples=3), grid({"seed": [0, 1]}))
    assert len(points) == 6
    assert len({p["lr"] for p in points}) == 3
    with pytest.raises(ValueError, match=r"but \['a'\] are in several"):
        product([{"a": 1}], [{"a": 2}])


RANGES = {"lr": Range(1e-4, 1.0, log=True), "width": Range(16, 4096, log=True, integer=True), "scale": Range(-1, 1)}


@pytest.mark.parametrize("sampler", [random_sample, latin_hypercube])
def test_samples_are_in_range_and_the_same_for_the_same_seed(sampler) -> None:
    points = sampler(RANGES, samples=40, seed=3)
    assert points == sampler(RANGES, samples=40, seed=3)
    assert points != sampler(RANGES, samples=40, seed=4)
    assert all(1e-4 <= p["lr"] <= 1 and 16 <= p["width"] <= 4096 and -1 <= p["scale"] <= 1 for p in points)
    assert all(isinstance(p["width"], int) for p in points)


@given(st.integers(2, 30), st.integers(0, 1000))
def test_a_latin_hypercube_has_one_point_in_every_part_of_every_range(samples: int, seed: int) -> None:
    points = latin_hypercube({"lr": Range(1e-4, 1.0, log=True), "x": Range(2, 5)}, samples=samples, seed=seed)
    parts = sorted(int((math.log10(p["lr"]) + 4) / 4 * samples) for p in points)
    assert parts == list(range(samples))
    assert sorted(int((p["x"] - 2) / 3 * samples) for p in points) == list(range(samples))


def test_a_latin_hypercube_of_choices_is_balanced() -> None:
    points = latin_hypercube({"f": ["relu", "tanh"], "x": Range(0, 1)}, samples=10)
    assert sum(p["f"] == "relu" for p in points) == 5


def test_both_ends_of_a_whole_range_are_as_likely_as_its_middle() -> None:
    values = [Range(1, 4, integer=True).at((i + 0.5) / 4000) for i in range(4000)]
    assert [values.count(v) for v in (1, 2, 3, 4)] == [1000, 1000, 1000, 1000]


@pytest.mark.parametrize("arguments", [(2, 1), (1, 1), (0, math.inf), (math.nan, 1)])
def test_an_empty_range_is_refused(arguments: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="Expected a range with low < high"):
        Range(*arguments)


def test_a_logarithmic_range_that_reaches_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected a positive `low` for a logarithmic range"):
        Range(0, 1, log=True)


def test_an_integer_range_between_fractions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected whole numbers as ends of an integer range but got 0\.2 and 0\.4"):
        Range(0.2, 0.4, integer=True)


@pytest.mark.parametrize("samples", [0, -1, 2.5, True])
def test_no_samples_are_refused(samples: int) -> None:
    with pytest.raises(ValueError, match="Expected argument `samples` to be an integer, at least 1"):
        random_sample({"x": Range(0, 1)}, samples=samples)


def test_ranges_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected a Range or a list of values for the parameter 'x' but got 3"):
        latin_hypercube({"x": 3}, samples=2)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="Expected a range for at least one parameter"):
        random_sample({}, samples=2)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from([0.5, 2.0]) | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from("abc"), json_values), st.dictionaries(st.sampled_from("abc"), json_values))
def test_keys_are_equal_exactly_for_equal_configurations(first, second) -> None:
    assert configuration_key(first) == configuration_key(dict(reversed(first.items())))
    if first != second:
        assert configuration_key(first) != configuration_key(second)
