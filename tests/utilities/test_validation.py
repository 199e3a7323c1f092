"""Checks that raise a sentence."""

import pytest
import torch

from lightning_ntk.utilities.validation import require_device, require_matching


def test_matching_tensors_come_in_the_expected_order() -> None:
    expected = {"a": torch.zeros(2), "b": torch.zeros(1, 3)}
    tensors = {"b": torch.ones(1, 3), "a": torch.ones(2).double()}
    matching = require_matching(tensors, expected)
    assert list(matching) == ["a", "b"]
    assert matching["a"] is tensors["a"]
    with pytest.raises(ValueError, match=r"Expected buffers with the names .* but these names differ: \['b', 'c'\]"):
        require_matching({"a": torch.ones(2), "c": torch.ones(1, 3)}, expected, "buffers")
    with pytest.raises(ValueError, match=r"Expected weights with `b` of shape \(1, 3\) but got \(3,\)"):
        require_matching({"a": torch.ones(2), "b": torch.ones(3)}, expected, "weights")


def test_devices_are_names_of_devices_with_float64() -> None:
    for value in (None, "cpu", "cuda:3"):
        require_device("device", value)
    for value in ("gpu", torch.device("cpu"), 0):
        with pytest.raises(ValueError, match='Expected argument `device` to be a device such as "cpu"'):
            require_device("device", value)
    with pytest.raises(ValueError, match='"mps" has none'):
        require_device("device", "mps")
