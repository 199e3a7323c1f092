"""A whole sweep in this process."""

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest

from lightning_ntk.sweep import Sweep
from tests.sweep.objectives import failing, power

WIDTHS = {"width": [16, 32, 64], "seed": [0, 1]}


def make(tmp_path: Path, objective: Any = power, points: Any = WIDTHS, **options: Any) -> Sweep:
    return Sweep(objective, points, storage=tmp_path / "sweep.journal", **options)


def test_a_sweep_gives_a_tidy_table(tmp_path: Path) -> None:
    results = make(tmp_path).run(workers=0, progress=False)
    assert len(results) == 6
    assert results.rows[1] == {"trial": 1, "width": 16, "seed": 1, "loss": pytest.approx(3 / 4 * 1.01)}


def test_the_same_call_runs_nothing_again(tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []

    def objective(config: dict[str, Any]) -> dict[str, float]:
        calls.append(config)
        return {"loss": 1.0}

    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            results = make(tmp_path, objective).run(workers=0, progress=False)
        assert len(calls) == len(results) == 6


def test_a_grid_that_grows_runs_what_is_new_and_one_that_shrinks_keeps_what_was(tmp_path: Path) -> None:
    make(tmp_path, points={"width": [16, 32]}).run(workers=0, progress=False)
    with pytest.warns(UserWarning, match="configurations") as said:
        results = make(tmp_path, points={"width": [64, 32]}).run(workers=0, progress=False)
    assert [row["width"] for row in results.rows] == [16, 32, 64]
    sentences = "\n".join(str(warning.message) for warning in said)
    assert "1 new configurations were added to the sweep 'sweep'" in sentences
    assert "has 1 configurations of earlier calls that are not in this one, for example {'width': 16}" in sentences
    assert "They stay in the storage and in its table. Give another `name`" in sentences


def test_a_failure_is_recorded_and_does_not_stop_the_others(tmp_path: Path) -> None:
    points = {"width": [16, 32, 64], "repaired": [str(tmp_path / "repaired")]}
    with pytest.warns(
        UserWarning, match=r"1 of 3 configurations failed, the first, .*RuntimeError: no luck with 32\. `lightning-ntk"
    ):
        results = make(tmp_path, failing, points).run(workers=0, progress=False)
    assert [row["width"] for row in results.rows] == [16, 64]
    (tmp_path / "repaired").touch()
    with pytest.warns(UserWarning, match="1 of 3 configurations failed"):
        make(tmp_path, failing, points).run(workers=0, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = make(tmp_path, failing, points).run(workers=0, retry_failed=True, progress=False)
    assert sorted(row["width"] for row in results.rows) == [16, 32, 64]


def test_an_objective_that_returns_nothing_is_a_failure_in_words(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match="TypeError: Expected the objective to return a LinearizationMonitor .* returned None"
    ):
        assert len(make(tmp_path, lambda config: None).run(workers=0, progress=False)) == 0


def test_a_scalar_with_the_name_of_a_parameter_is_a_failure_in_words(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"Expected scalars with other names than the parameters but both have \['width'\]"
    ):
        make(tmp_path, lambda config: {"width": 1.0}).run(workers=0, progress=False)


def test_an_objective_that_exits_is_a_failure(tmp_path: Path) -> None:
    def objective(config: dict[str, Any]) -> dict[str, float]:
        raise SystemExit(3)

    with pytest.warns(UserWarning, match="6 of 6 configurations failed, .* with: SystemExit: 3"):
        make(tmp_path, objective).run(workers=0, progress=False)


@pytest.mark.parametrize("how", ["raised", "swallowed", "turned into an exit"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_puts_the_trial_back(tmp_path: Path, how: str, number: signal.Signals) -> None:
    interrupting = True

    def objective(config: dict[str, Any]) -> dict[str, float]:
        if interrupting and config["width"] == 32:
            try:
                os.kill(os.getpid(), number)
            except KeyboardInterrupt:
                if how == "raised":
                    raise
                if how == "turned into an exit":  # as Lightning's Trainer does
                    raise SystemExit(1) from None
        return {"loss": 1.0}

    sweep = make(tmp_path, objective)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(workers=0, progress=False)
    assert signal.getsignal(number) is before
    assert [entry.state for entry in sweep.queue.entries().values()].count("complete") == 2
    interrupting = False
    assert len(sweep.run(workers=0, progress=False)) == 6


def test_an_interrupt_that_nobody_sent_is_a_failure_like_any_other(tmp_path: Path) -> None:
    def objective(config: dict[str, Any]) -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="6 of 6 configurations failed, .* with: KeyboardInterrupt"):
        make(tmp_path, objective).run(workers=0, progress=False)


def test_configurations_may_be_generated(tmp_path: Path) -> None:
    results = make(tmp_path, points=({"width": w} for w in (16, 64))).run(workers=0, progress=False)
    assert [row["width"] for row in results.rows] == [16, 64]


def test_a_directory_for_logs_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    with pytest.raises(FileExistsError, match=r"/logs'$"):
        make(tmp_path, logs=tmp_path / "logs").run(workers=1, progress=False)


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs" / "worker-1.log").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=r"worker-1\.log'$"):
        make(tmp_path, power, logs=tmp_path / "logs").run(workers=1, progress=False)


def test_the_objective_cannot_change_what_is_stored(tmp_path: Path) -> None:
    def objective(config: dict[str, Any]) -> dict[str, float]:
        config.clear()
        return {"loss": 1.0}

    assert make(tmp_path, objective).run(workers=0, progress=False).configurations[0] == {"width": 16, "seed": 0}


def test_progress_is_over_all_configurations(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, points={"width": [16, 32]}).run(workers=0, progress=False)
    assert capfd.readouterr().err == ""
    with pytest.warns(UserWarning, match="4 new configurations"):
        make(tmp_path, points={"width": [16, 32, 64, 128, 256, 512]}).run(workers=0)
    shown = capfd.readouterr().err
    assert "2/6 [" in shown
    assert "6/6 [" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, "Expected argument `workers` to be an integer, at least 0"),
        ({"workers": 1.5}, "Expected argument `workers`"),
        ({"threads": 0}, "Expected argument `threads` to be an integer, at least 1"),
    ],
)
def test_wrong_numbers_of_processes_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path).run(**options)


def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Expected argument `objective` to be a function"):
        make(tmp_path, "objective")
    with pytest.raises(ValueError, match="Expected argument `patience` to be a positive number of seconds"):
        make(tmp_path, patience=0)
    with pytest.raises(ValueError, match="zero trials"):
        make(tmp_path, points=[])
    assert list(tmp_path.iterdir()) == []
