"""Distances between kernels."""

import pytest
import torch

from lightning_ntk.functional import kernel_change, kernel_distance


def test_small_kernel_distances_keep_their_digits() -> None:
    initial = torch.eye(7, dtype=torch.float64)
    turned = initial.clone()
    turned[0, 1] = turned[1, 0] = 1e-9
    # 1 - 1 / sqrt(1 + x) with x = 2e-18 / 7; the textbook form gives 0.
    assert kernel_distance(initial, turned) == pytest.approx(1e-18 / 7, rel=1e-7)
    assert kernel_distance(initial, 3 * initial) == pytest.approx(0, abs=1e-15)
    assert kernel_distance(initial, -initial) == pytest.approx(2, rel=1e-14)


def test_kernels_that_are_zero() -> None:
    zero, one = torch.zeros(3, 3), torch.eye(3)
    assert kernel_distance(zero, zero) == kernel_change(zero, zero) == 0
    assert kernel_change(zero, one) == float("inf")
