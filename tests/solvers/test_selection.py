"""The choice between an eigendecomposition and Lanczos with or without the kernel."""

import math

import pytest
import torch

from lightning_ntk.solvers.selection import Sizes, choose_solver, expected_products

GIB = 2**30


def test_a_small_problem_is_decomposed() -> None:
    choice = choose_solver(Sizes(20, 3, 500, torch.float64), free_memory=16 * GIB)
    assert choice.way.solver == "eigh"
    assert "eigendecomposition for 60 rows" in choice.reason


def test_a_large_problem_goes_without_a_kernel() -> None:
    choice = choose_solver(Sizes(1797, 10, 301_066, torch.float32, horizon=1000), free_memory=16 * GIB)
    assert (choice.way.solver, choice.way.kernel_dtype) == ("lanczos", None)
    assert "counted operations" in choice.reason


def test_a_given_large_kernel_gets_lanczos_on_it() -> None:
    choice = choose_solver(
        Sizes(512, 10, 301_066, torch.float32, horizon=1000, kernel_given=True), free_memory=16 * GIB
    )
    assert (choice.way.solver, choice.way.kernel_dtype) == ("lanczos", torch.float64)


def test_many_steps_on_few_rows_get_the_eigendecomposition() -> None:
    sizes = Sizes(120, 10, 5_000_000, torch.float32, horizon=math.inf, kernel_given=True)
    assert choose_solver(sizes, free_memory=16 * GIB).way.solver == "eigh"


def test_memory_decides_before_operations() -> None:
    sizes = Sizes(4000, 1, 10**6, torch.float32, horizon=1e6)
    dense = choose_solver(sizes, solver="lanczos", free_memory=GIB)
    tight = choose_solver(sizes, solver="lanczos", free_memory=GIB / 10)
    assert dense.way.kernel_dtype == torch.float64
    assert tight.way.kernel_dtype is None
    assert "too much" in tight.reason
    with pytest.raises(MemoryError, match="matrix_free=True"):
        choose_solver(sizes, solver="eigh", free_memory=GIB / 10)


def test_products_grow_with_the_horizon_up_to_the_rows() -> None:
    assert [expected_products(5000, t) for t in (10, 1000, 10**4)] == sorted(
        expected_products(5000, t) for t in (10, 1000, 10**4)
    )
    assert expected_products(30, 10**6) == expected_products(30, math.inf) == 30
