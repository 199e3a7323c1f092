import os
import subprocess
import sys
import threading
import time

import pytest
from optuna.exceptions import UpdateFinishedTrialError

from lightning_ntk.sweep import liveness
from lightning_ntk.sweep.liveness import WORKER, Observer, heartbeat, worker_identity


def test_a_heart_beats_until_its_trial_is_over() -> None:
    beats: list[float] = []
    with heartbeat(beats.append, 0.01):
        deadline = time.monotonic() + 10
        while len(beats) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    ended = len(beats)
    time.sleep(0.05)
    assert len(beats) == ended
    assert beats == sorted(beats)


@pytest.mark.parametrize(("error", "goes_on"), [(OSError("no database"), True), (UpdateFinishedTrialError(), False)])
def test_a_storage_out_of_reach_does_not_stop_a_heart_but_the_end_of_its_trial_does(
    error: Exception, goes_on: bool
) -> None:
    beaten = threading.Semaphore(0)

    def beat(now: float) -> None:
        beaten.release()
        raise error

    with heartbeat(beat, 0.01):
        assert beaten.acquire(timeout=10)
        assert beaten.acquire(timeout=10 if goes_on else 0.1) == goes_on


def test_this_process_lives_and_one_that_was_killed_does_not() -> None:
    observer = Observer(patience=1e9)
    assert not observer.is_gone(0, {WORKER: worker_identity()})
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    worker = {**worker_identity(), "pid": child.pid, "started": liveness._start_time(child.pid)}
    assert not observer.is_gone(0, {WORKER: worker})
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, but nobody has asked for its status: a zombie
    assert observer.is_gone(0, {WORKER: worker})
    child.wait()
    assert observer.is_gone(0, {WORKER: worker})


def test_another_process_under_the_same_number_is_another_process() -> None:
    assert Observer(1e9).is_gone(0, {WORKER: {**worker_identity(), "started": "1"}})


def test_a_trial_whose_worker_died_before_it_said_its_name_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("lightning_ntk.sweep.liveness.time.monotonic", lambda: now)
    observer = Observer(patience=60)
    assert not observer.is_gone(3, {})
    now = 61.0
    assert observer.is_gone(3, {})
    assert not observer.is_gone(4, {})


def test_without_proc_heartbeats_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("lightning_ntk.sweep.liveness.time.monotonic", lambda: now)
    monkeypatch.setattr("lightning_ntk.sweep.liveness._machine", lambda: None)
    worker = {**worker_identity(), "started": "1"}
    observer = Observer(patience=60)
    assert not observer.is_gone(0, {WORKER: worker})
    now = 61.0
    assert observer.is_gone(0, {WORKER: worker})
