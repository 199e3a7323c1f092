"""Worker processes: what is killed is run again, and nothing twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ntk.sweep import Sweep
from lightning_ntk.sweep.queue import Queue
from lightning_ntk.sweep.storage import open_storage
from tests.sweep.objectives import dying, noting

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import sys
from pathlib import Path
from lightning_ntk.sweep import Sweep
from tests.sweep.objectives import noting

if __name__ == "__main__":
    here = Path(sys.argv[1])
    grid = {"index": list(range(8)), "directory": [str(here)]}
    results = Sweep(noting, grid, storage=here / "sweep.journal", logs=here / "logs").run(workers=2)
    print(len(results), "results")
"""


def start(directory: Path) -> subprocess.Popen[str]:
    script = directory / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(script), str(directory)],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def starts(directory: Path, index: int) -> list[int]:
    path = directory / f"starts-{index}"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition: Any, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def complete(directory: Path) -> dict[int, int]:
    """How many complete trials each configuration has."""
    counts = dict.fromkeys(range(8), 0)
    for trial in Queue(open_storage(directory / "sweep.journal"), "sweep")._trials():
        if trial.state.name == "COMPLETE":
            counts[trial.user_attrs["configuration"]["index"]] += 1
    return counts


def test_a_worker_killed_in_mid_trial_loses_only_that_trial(tmp_path: Path) -> None:
    """Its `run` is killed too, so that nobody is left to notice: the next call does."""
    (tmp_path / "hang-3").touch()
    process = start(tmp_path)
    wait_for(lambda: starts(tmp_path, 3) and not (tmp_path / "hang-3").exists())
    process.kill()
    os.kill(starts(tmp_path, 3)[0], signal.SIGKILL)
    process.communicate()
    assert complete(tmp_path)[3] == 0

    output, errors = start(tmp_path).communicate(timeout=120)
    assert "8 results" in output, errors
    assert complete(tmp_path) == dict.fromkeys(range(8), 1)
    assert [len(starts(tmp_path, index)) for index in range(8)] == [1, 1, 1, 2, 1, 1, 1, 1]


def test_run_itself_replaces_a_worker_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "hang-2").touch()
    process = start(tmp_path)
    wait_for(lambda: starts(tmp_path, 2) and not (tmp_path / "hang-2").exists())
    os.kill(starts(tmp_path, 2)[0], signal.SIGKILL)
    output, errors = process.communicate(timeout=120)
    assert "8 results" in output, errors
    assert "ended with SIGKILL" in errors
    assert complete(tmp_path) == dict.fromkeys(range(8), 1)
    assert [len(starts(tmp_path, index)) for index in range(8)] == [1, 1, 2, 1, 1, 1, 1, 1]


def test_two_runs_at_once_share_the_work(tmp_path: Path) -> None:
    first, second = start(tmp_path), start(tmp_path)
    for process in (first, second):
        output, errors = process.communicate(timeout=180)
        assert "8 results" in output, errors
    assert complete(tmp_path) == dict.fromkeys(range(8), 1)
    assert [len(starts(tmp_path, index)) for index in range(8)] == [1] * 8


def test_an_interrupt_stops_promptly_and_the_same_command_resumes(tmp_path: Path) -> None:
    (tmp_path / "hang-0").touch()
    (tmp_path / "hang-1").touch()
    process = start(tmp_path)
    wait_for(lambda: starts(tmp_path, 0) and starts(tmp_path, 1))
    workers = [starts(tmp_path, 0)[0], starts(tmp_path, 1)[0]]
    interrupted = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does on Ctrl-C
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - interrupted < 30
    assert "Interrupted; the same command resumes." in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    states = [entry.state for entry in Queue(open_storage(tmp_path / "sweep.journal"), "sweep").entries().values()]
    assert "running" not in states
    output, errors = start(tmp_path).communicate(timeout=120)
    assert "8 results" in output, errors
    assert complete(tmp_path) == dict.fromkeys(range(8), 1)


def test_a_configuration_that_kills_its_worker_fails_and_the_others_do_not(tmp_path: Path) -> None:
    sweep = Sweep(dying, {"width": [16, 32, 64]}, storage=tmp_path / "j", logs=tmp_path / "logs")
    with pytest.warns(
        UserWarning,
        match=r"1 of 3 configurations failed, .* The process of its worker died in each of 3 tries, .*: SIGTERM",
    ):
        results = sweep.run(workers=1, progress=False)
    assert [row["width"] for row in results.rows] == [16, 64]


def test_workers_that_cannot_start_end_the_run_with_what_they_printed(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(SCRIPT.replace('if __name__ == "__main__":', "if True:"))
    finished = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, capture_output=True, timeout=180, check=False,
    )  # fmt: skip
    assert finished.returncode == 1
    assert 'A script must call run() under if __name__ == "__main__":' in finished.stderr.replace("\n", " ")


def test_workers_have_their_share_of_threads_and_write_what_they_print_to_logs(tmp_path: Path) -> None:
    sweep = Sweep(threads_of_worker, {"a": [1]}, storage=f"sqlite:///{tmp_path}/sweep.db", logs=tmp_path / "logs")
    results = sweep.run(threads=3, progress=False)
    assert results.rows[0]["torch"] == 3
    assert results.rows[0]["environment"] == 3
    assert "heard in the log" in (tmp_path / "logs" / "worker-1.log").read_text()


def threads_of_worker(config: dict[str, Any]) -> dict[str, float]:
    print("heard in the log")
    return {"torch": torch.get_num_threads(), "environment": float(os.environ["OMP_NUM_THREADS"])}


def test_the_objective_of_a_killed_trial_is_counted(tmp_path: Path) -> None:
    """The instrument of the tests above: every start of `noting` leaves its line."""
    config = {"index": 4, "directory": str(tmp_path)}
    assert noting(config) == {"value": 16.0}
    noting(config)
    assert starts(tmp_path, 4) == [os.getpid()] * 2
