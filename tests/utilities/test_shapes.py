"""Shapes in annotations are checked in the tests, and cost users nothing."""

import random
import subprocess
import sys

import pytest
import torch

from lightning_ntk.dynamics.filters import gradient_flow_slope
from lightning_ntk.functional import kernel_change
from lightning_ntk.linearization import Linearization
from lightning_ntk.metrics import LowRankMeasure
from lightning_ntk.solvers.base import Modes
from tests.shape_checks import ShapeError

VECTOR, MATRIX = torch.ones(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        pytest.param(lambda: gradient_flow_slope(VECTOR, VECTOR[:1], 1.0), "filtered", id="would broadcast"),
        pytest.param(lambda: gradient_flow_slope(VECTOR.float(), VECTOR, 1.0), "eigenvalues", id="float32"),
        pytest.param(lambda: LowRankMeasure().update(MATRIX, MATRIX[:2]), "outputs", id="metric"),
        pytest.param(lambda: Modes(VECTOR, MATRIX, VECTOR[:2]), "coordinates", id="dataclass"),
        pytest.param(lambda: LowRankMeasure().update(VECTOR, MATRIX), "features", id="missing axis"),
    ],
)
def test_wrong_shapes_that_a_function_lets_through_are_found(call, wrong) -> None:
    with pytest.raises(ShapeError, match=f"Expected `{wrong}` of"):
        call()


def test_wrong_results_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Linearization, "predict_at", lambda self, params, inputs: torch.ones(3))
    with pytest.raises(ShapeError, match=r"Expected `return` of FrozenNetwork.predict as .*'B K'.* but got .*\(3,\)"):
        Linearization(torch.nn.Linear(2, 1)).predict(torch.ones(3, 2))


def test_what_a_function_refuses_raises_its_own_sentence() -> None:
    with pytest.raises(
        ValueError, match=r"Expected tensors of one shape but got `initial` \(3, 3\), `kernel` \(2, 2\)"
    ):
        kernel_change(MATRIX, MATRIX[:2, :2])


def test_checking_draws_no_random_numbers() -> None:
    """Beartype looks at a random member of a sequence."""
    linearization, state = Linearization(torch.nn.Linear(2, 1)), random.getstate()
    linearization.predict_and_vjp([torch.ones(3, 1), torch.zeros(3, 1)], torch.ones(3, 2))
    assert random.getstate() == state


def test_users_need_no_jaxtyping() -> None:
    code = """
import sys
sys.modules["jaxtyping"] = sys.modules["beartype"] = None  # not installed
import torch
from typing import get_type_hints
from lightning_ntk import Linearization, LinearizationMonitor, LinearizedTraining, empirical_ntk, functional, metrics
assert get_type_hints(functional.kernel_change)["kernel"] is torch.Tensor
functional.kernel_change(torch.eye(3), torch.eye(2))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stderr.endswith(
        "ValueError: Expected tensors of one shape but got `initial` (3, 3), `kernel` (2, 2).\n"
    ), run.stderr
