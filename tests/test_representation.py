"""Every public object says what it holds: counts and shapes, without addresses and without the numbers of whole tensors."""

import importlib
import inspect
import pkgutil
from typing import Any

import pytest
import torch
from torch import nn

import lightning_ntk
from lightning_ntk import LinearizationMonitor, LinearizedTraining
from lightning_ntk.comparison import OutputComparison, RegimePanel, RegressionComparison, RunComparison, StepComparison
from lightning_ntk.data.reference import Reference
from lightning_ntk.functional import kernel_moments, probe_vectors
from lightning_ntk.kernel import KernelProbe, PlannedKernel
from lightning_ntk.linearization import PairLoss, StepLinearization
from lightning_ntk.sweep import Results, Sweep
from lightning_ntk.training import LinearizedProblem, Replay, StepSettings, StoredLoss, Twin

# Protocols have no objects.
WITHOUT_OBJECTS = {"BatchLoss", "OnlineTraining"}


def public_classes() -> dict[str, type]:
    modules = [lightning_ntk]
    modules += [
        importlib.import_module(f"lightning_ntk.{module.name}")
        for module in pkgutil.iter_modules(lightning_ntk.__path__)
    ]
    named = {name: getattr(module, name) for module in modules for name in getattr(module, "__all__", ())}
    return {name: value for name, value in named.items() if inspect.isclass(value) and name not in WITHOUT_OBJECTS}


def test_no_public_class_has_the_repr_of_an_object() -> None:
    pytest.importorskip("transformers")
    classes = public_classes()
    assert {"LinearizationMonitor", "LinearizationCallback", "Sweep", "Drawing", "WeightDistance"} <= classes.keys()
    assert [name for name, value in classes.items() if value.__repr__ is object.__repr__] == []


@pytest.fixture
def objects(tmp_path) -> dict[str, Any]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    inputs, targets = torch.randn(7, 4), torch.randn(7, 3)
    problem = LinearizedProblem(module, (inputs, targets), jacobian="stored")
    training = LinearizedTraining(problem, lr=0.1)
    network, data = problem.linearization, problem.reference
    pairs = PairLoss(network, nn.MSELoss())
    step = StepLinearization(module, lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]))
    optimizer = torch.optim.Adam(module.parameters())
    twin = Twin(pairs, optimizer, dict(module.named_parameters()))
    reference = OutputComparison(problem)
    made = [
        LinearizationMonitor(),
        network,
        problem,
        training,
        training.state(10),
        training.modes,
        problem.objective,
        LinearizedTraining(problem, lr=[0.1] * 9),
        LinearizedTraining(problem, lr=0.1, batches=[[0, 1]] * 3),
        Replay(problem, training.hyperparameters),
        StoredLoss(problem, pairs),
        pairs,
        step,
        twin,
        StepSettings.of(optimizer, dict(module.named_parameters())),
        reference,
        StepComparison(step, Reference((inputs, targets))),
        RegimePanel(network, data, nn.MSELoss()),
        RegressionComparison(problem, None, ("before", "after")),
        RunComparison(pairs, twin, reference=reference),
        KernelProbe(network, data),
        PlannedKernel(network, data),
        probe_vectors(torch.eye(6).reshape(1, 6, 6), 3, torch.Generator()),
        kernel_moments(torch.eye(6), 1),
        Sweep(print, {"width": [8, 16], "seed": [0]}, storage=tmp_path / "sweep.journal"),
        Results([]),
    ]  # fmt: skip
    return {type(each).__name__: repr(each) for each in reversed(made)}


def test_objects_say_what_they_hold_in_a_line(objects: dict[str, str]) -> None:
    for name, text in objects.items():
        assert text.startswith(name), text
        assert " at 0x" not in text, text
        assert "tensor(" not in text, text
        assert "\n" not in text, text
    assert objects["Linearization"] == "Linearization(Sequential, 43 parameters, torch.float32, cpu)"
    assert objects["LinearizedProblem"] == "LinearizedProblem(7 samples x 3 outputs, 43 parameters, loss=MSELoss())"
    assert objects["LinearizedTraining"].startswith(
        f"LinearizedTraining({objects['LinearizedProblem']}, gradient_descent, "
    )
    assert "lr=0.1, 21 modes, max_learning_rate=" in objects["LinearizedTraining"]
    assert objects["Twin"] == "Twin(Adam, 43 parameters, 0 steps)"
    assert objects["RunComparison"] == "RunComparison(twin, 0 steps, reference of 7 samples)"
    assert "coefficients=float64 (7, 3)" in objects["LinearizedState"]
    assert objects["Results"] == "Results(0 configurations, 0 rows, 0 scalars)"
    assert objects["Sweep"].startswith("Sweep('sweep', 2 configurations of width, seed, storage=")
