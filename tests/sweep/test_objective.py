import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_ntk import LinearizationMonitor
from lightning_ntk.sweep import Sweep
from lightning_ntk.sweep.objective import (
    ImportedObjective,
    headline,
    objective_identity,
    require_for_processes,
    rows_of,
    verdict_of,
)
from tests.sweep.objectives import power


def test_a_monitor_gives_its_history_under_the_tags_that_it_logs() -> None:
    monitor = LinearizationMonitor(name="lazy")
    monitor.history = [{"step": 0.0, "loss": 2.0, "parameter/a.weight": 0.0}, {"step": 3.0, "loss": 1.0}]
    assert rows_of(monitor) == [
        {"step": 0.0, "lazy/loss": 2.0, "lazy/parameter/a.weight": 0.0},
        {"step": 3.0, "lazy/loss": 1.0},
    ]


def test_a_monitor_gives_its_verdict_and_scalars_have_none() -> None:
    assert verdict_of(LinearizationMonitor()) == ("undecided", "nothing was measured")
    assert verdict_of({"loss": 1.0}) is None


def test_scalars_of_any_library_become_floats() -> None:
    result = {"a": 1, "b": torch.tensor(0.5), "c": np.float32(0.25), "d": np.array([2.0]), "e": math.inf, "f": True}
    (row,) = rows_of(result)
    assert row == {"a": 1.0, "b": 0.5, "c": 0.25, "d": 2.0, "e": math.inf, "f": 1.0}
    assert {type(value) for value in row.values()} == {float}


@pytest.mark.parametrize("result", [None, 0.5, [1.0], (), "loss"])
def test_other_results_are_refused(result: object) -> None:
    with pytest.raises(
        TypeError, match="Expected the objective to return a LinearizationMonitor or a dictionary of scalars"
    ):
        rows_of(result)


def test_a_result_of_nothing_says_so() -> None:
    with pytest.raises(TypeError, match="but it returned None"):
        rows_of(None)
    with pytest.raises(ValueError, match="at least one scalar besides the step"):
        rows_of({"step": 3.0})
    with pytest.raises(ValueError, match="after `fit` of the Trainer to which it was given"):
        rows_of(LinearizationMonitor())


@pytest.mark.parametrize("value", ["0.5", None, torch.zeros(2), 1j, np.zeros(0)])
def test_a_scalar_that_is_no_number_is_refused_by_name(value: object) -> None:
    with pytest.raises(TypeError, match="Expected the scalar 'loss' of a result to be a number"):
        rows_of({"loss": value})


def test_the_distance_stands_for_a_trial_else_the_first_scalar() -> None:
    assert (
        headline([{"step": 1.0, "ntk/loss": 1.0, "ntk/relative_weight_distance": 0.1}])
        == "ntk/relative_weight_distance"
    )
    assert headline([{"step": 1.0, "b": 1.0, "a": 1.0}]) == "b"
    assert headline([{"a": 1.0, "step": 0.0}, {"step": 1.0}]) == "a"


def test_an_objective_is_found_by_module_or_by_file(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("def objective(config):\n    return {'loss': 2.0 * config['a']}\n")
    by_file = ImportedObjective("train.py:objective", str(tmp_path))
    by_module = ImportedObjective("tests.sweep.objectives:power")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "train.py").write_text("def objective(config):\n    return {'loss': 5.0}\n")
    assert by_file({"a": 3}) == {"loss": 6.0}
    assert ImportedObjective("elsewhere/train.py:objective", str(tmp_path))({}) == {"loss": 5.0}
    assert by_module.load() is power
    assert by_file.identity == "train:objective"
    assert by_module.identity == objective_identity(power) == "objectives:power"


@pytest.mark.parametrize("path", ["objective", "a:b:c", ":f", "m:", 3])
def test_an_import_path_of_another_form_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r'Expected the objective as "package\.module:function"'):
        ImportedObjective(path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"Expected to import 'nothing\.py:f', .*FileNotFoundError: .*/nothing\.py"):
        ImportedObjective("nothing.py:f", str(tmp_path)).load()
    with pytest.raises(ImportError, match=r"module 'tests\.sweep\.objectives' has no attribute 'f'"):
        ImportedObjective("tests.sweep.objectives:f").load()
    with pytest.raises(ImportError, match="to be a function of a configuration but it is 600"):
        ImportedObjective("tests.sweep.objectives:NEVER").load()


def test_workers_need_an_objective_that_they_can_import(tmp_path: Path) -> None:
    require_for_processes(power)
    with pytest.raises(TypeError, match="a function at the top level of a file"):
        Sweep(lambda config: {"a": 1.0}, {"a": [1]}, storage=tmp_path / "j").run(workers=1)
    assert not (tmp_path / "j").exists()
