"""Error bounds: never below the error, and not far above it."""

import importlib
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_ntk import LinearizedTraining
from lightning_ntk.dynamics.closed_form import ClosedForm
from lightning_ntk.dynamics.error_bounds import (
    divided_differences,
)
from lightning_ntk.solvers.eigh import eigh_modes
from lightning_ntk.solvers.rounding import Rounding
from tests.problems import flatten
from tests.solvers.spectra import DTYPE, decaying

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def test_errors_of_random_problems_are_below_their_bounds_and_most_are_near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    judge = importlib.import_module("bounds").judge
    answers = [answer for seed in range(200) for answer in judge(seed, longest=200)]
    assert [answer for answer in answers if answer.error > answer.bound] == []
    visible = [answer for answer in answers if answer.error > 1e-13]
    single = [answer for answer in visible if answer.words["type"] == "float32"]
    for judged, share in ((visible, 0.9), (single, 0.9)):
        assert sum(answer.bound <= 100 * answer.error for answer in judged) >= share * len(judged)


@pytest.mark.parametrize(
    "options", [{"solver": "eigh"}, *({"solver": "lanczos", "matrix_free": m} for m in (False, True))]
)
def test_passes_in_float32_on_some_hundred_rows_are_within_their_bound(options: dict) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    data = torch.randn(300, 16), torch.randn(300, 1)
    described = {
        "lr": 0.45 * LinearizedTraining(module, data, lr=1.0, progress=False).max_learning_rate,
        "progress": False,
    }
    exact = LinearizedTraining(module, data, solver="eigh", dtype=torch.float64, **described)
    single = LinearizedTraining(module, data, solver="eigh", **described)
    training = LinearizedTraining(module, data, **options, **described)
    for t in (10, 1000, 20000):
        expected = flatten(exact.weights(t))
        error, best = ((flatten(other.weights(t)).double() - expected).norm().item() for other in (training, single))
        assert error <= training.error_bound(t) <= 100 * error
        assert training.error_bound(t, relative=True) < 1e-2
        if not options.get("matrix_free"):  # Lanczos on the kernel is as good as its eigendecomposition
            assert error <= 1.2 * best


def test_float32_does_not_determine_every_limit() -> None:
    module = nn.Linear(3, 1, bias=False)
    scales = torch.tensor([1.0, 1e-2, 1e-5])  # eigenvalues 1, 1e-4 and 1e-10, of which the last counts as zero
    data = torch.diag(scales), torch.ones(3, 1)
    exact = flatten(LinearizedTraining(module, data, lr=0.1, dtype=torch.float64, progress=False).displacement(None))
    training = LinearizedTraining(module, data, lr=0.1, progress=False)
    error = (flatten(training.displacement(None)) - exact).norm().item()
    assert 0.9 * exact.norm() < error <= training.error_bound(None) <= 2 * error
    free = LinearizedTraining(module, data, lr=0.1, solver="lanczos", matrix_free=True, progress=False)
    assert free.error_bound(None) == math.inf
    assert free.error_bound(1000) < 1e-4
    full = LinearizedTraining(module, (torch.diag(scales.clamp_min(0.1)), torch.ones(3, 1)), lr=0.1, progress=False)
    assert full.error_bound(None, relative=True) < 1e-4


def test_divided_differences_are_those_of_the_function() -> None:
    values = torch.tensor([1e-3, 0.5, 0.5, 2.0], dtype=DTYPE)
    differences = divided_differences(values, 1 / values, -1 / values**2, torch.arange(4))
    torch.testing.assert_close(differences, 1 / torch.outer(values, values))


def test_unlike_errors_of_the_jacobian_those_of_a_kernel_grow_with_time() -> None:
    case = decaying()
    modes = eigh_modes(case.kernel, case.residual)
    growth = {}
    for name, rounding in (("jacobian", Rounding(1e-7, 1e-7)), ("kernel", Rounding(kernel=1e-7))):
        form = ClosedForm("gradient_flow", 1.0, DTYPE, rounding=rounding)
        early, late = (form.solve(modes, t).bound.rounding for t in (1e2, 1e4))
        growth[name] = late / early
    assert growth["kernel"] > 5 * growth["jacobian"]
