"""The queue alone: who gets a trial, and what becomes of it."""

import math
import threading
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from lightning_ntk.sweep.liveness import Observer, worker_identity
from lightning_ntk.sweep.queue import MAX_DEATHS, Queue
from lightning_ntk.sweep.storage import open_storage

ME = worker_identity("me")
GONE = {**worker_identity("gone"), "pid": 2**22 + 1, "started": "12345"}
ELSEWHERE = {**worker_identity("elsewhere"), "machine": "another"}
POINTS = [{"width": w, "name": n} for w in (16, 32) for n in ("a", "b")]


@pytest.fixture(params=["journal", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "sweep.journal") if request.param == "journal" else f"sqlite:///{tmp_path}/sweep.db"


@pytest.fixture
def queue(url: str) -> Queue:
    return Queue(open_storage(url), "sweep", "tests:objective")


def states(queue: Queue) -> list[str]:
    return [entry.state for entry in queue.entries().values()]


def test_every_configuration_is_given_out_once_in_order(queue: Queue) -> None:
    assert queue.enqueue(POINTS) == 4
    assert queue.enqueue(POINTS) == 0
    taken = [queue.claim(ME) for _ in range(5)]
    assert [task and task.configuration for task in taken] == [*POINTS, None]
    assert states(queue) == ["running"] * 4


def test_a_result_is_read_back_bit_by_bit(queue: Queue, url: str) -> None:
    queue.enqueue([{"width": 3}])
    task = queue.claim(ME)
    rows = [
        {"step": float(s), "ntk/x": 0.1 + 0.2 + s, "y": math.pi ** (s % 500), "z": math.nan if s else math.inf}
        for s in range(2000)
    ]
    assert queue.complete(task, rows, "ntk/x")
    (entry,) = Queue(open_storage(url), "sweep").entries(rows=True).values()
    assert entry.state == "complete"
    assert repr(entry.rows) == repr(rows)  # longer than one attribute may be
    assert entry.worker == ME
    assert entry.seconds is not None


def test_optuna_sees_parameters_curves_and_values(queue: Queue, url: str) -> None:
    queue.enqueue([{"width": 64, "name": "tanh", "flag": True}])
    queue.complete(queue.claim(ME), [{"step": 0.0, "d": 0.5}, {"step": 7.0, "d": 0.25}], "d")
    study = optuna.load_study(study_name="sweep", storage=open_storage(url))
    assert study.best_trial.params == {"width": 64.0}
    assert study.best_trial.user_attrs["parameter name"] == "tanh"
    assert study.best_trial.user_attrs["parameter flag"] is True
    assert study.best_trial.value == 0.25
    assert study.best_trial.user_attrs["scalar d"] == 0.25
    assert study.metric_names == ["d"]
    assert study.best_trial.intermediate_values == {0: 0.5, 7: 0.25}


def test_a_verdict_is_kept_and_shown(queue: Queue, url: str) -> None:
    queue.enqueue([{"width": 64}, {"width": 16}])
    queue.complete(queue.claim(ME), [{"d": 0.5}], "d", ("rich", "the distance is at least 0.5"))
    queue.complete(queue.claim(ME), [{"d": 0.5}], "d")
    kept = [entry.verdict for entry in Queue(open_storage(url), "sweep").entries().values()]
    assert kept == [("rich", "the distance is at least 0.5"), None]
    trials = optuna.load_study(study_name="sweep", storage=open_storage(url)).trials
    assert [trial.user_attrs.get("verdict") for trial in trials] == ["rich", None]


def test_a_value_that_is_not_a_number_is_complete_all_the_same(queue: Queue, url: str) -> None:
    queue.enqueue([{"lr": 5.0}])
    assert queue.complete(queue.claim(ME), [{"d": math.nan}], "d")
    (entry,) = queue.entries(rows=True).values()
    assert math.isnan(entry.rows[0]["d"])
    assert optuna.load_study(study_name="sweep", storage=open_storage(url)).trials[0].value == math.inf


def test_a_grid_may_grow_by_values_of_another_type(queue: Queue) -> None:
    queue.enqueue([{"depth": 1, "norm": "batch"}])
    assert (
        queue.enqueue([{"depth": 1.5, "norm": "layer"}, {"depth": "deep", "norm": None}, {"depth": 2**70, "norm": 3}])
        == 3
    )
    assert len(queue.entries()) == 4


def test_the_trial_of_a_dead_process_is_run_again(queue: Queue) -> None:
    queue.enqueue(POINTS)
    assert queue.claim(GONE).configuration == POINTS[0]
    queue.recover(Observer(1e9))
    assert states(queue) == ["waiting"] * 4
    assert [queue.claim(ME).configuration for _ in range(4)] == [*POINTS[1:], POINTS[0]]


def test_the_trial_of_a_living_process_is_left_alone(queue: Queue) -> None:
    queue.enqueue(POINTS)
    queue.claim(ME)
    queue.recover(Observer(1e-9))
    assert states(queue) == ["running", "waiting", "waiting", "waiting"]


def test_another_machine_is_judged_by_its_heartbeat_on_the_own_clock(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.enqueue(POINTS[:1])
    task = queue.claim(ELSEWHERE)
    now = 1000.0
    monkeypatch.setattr("lightning_ntk.sweep.liveness.time.monotonic", lambda: now)
    observer = Observer(60)
    queue.recover(observer)
    now += 59
    queue.beat(task, 5.0)  # the other machine's clock is wrong by years
    queue.recover(observer)
    now += 59
    queue.recover(observer)
    assert states(queue) == ["running"]
    now += 2
    queue.recover(observer)
    assert states(queue) == ["waiting"]


def test_the_late_result_of_a_worker_taken_for_dead_is_refused(queue: Queue) -> None:
    queue.enqueue(POINTS[:1])
    late = queue.claim(GONE)
    queue.recover(Observer(60))
    again = queue.claim(ME)
    assert queue.complete(again, [{"d": 1.0}], "d")
    assert not queue.complete(late, [{"d": 2.0}], "d")
    assert not queue.fail(late, ValueError())
    (entry,) = queue.entries(rows=True).values()
    assert entry.rows == [{"d": 1.0}]


def test_of_two_trials_for_one_configuration_the_older_is_run(queue: Queue) -> None:
    queue.enqueue(POINTS[:1])
    (entry,) = queue.entries()
    queue._add(POINTS[0], entry, attempt=0)  # as two processes do that enqueue at once
    first = queue.claim(ME)
    assert first.number == 0
    assert queue.claim(ME) is None
    assert [trial.state for trial in queue._trials()] == [TrialState.RUNNING, TrialState.PRUNED]
    queue.complete(first, [{"d": 1.0}], "d")
    queue._add(POINTS[0], entry, attempt=0)
    assert queue.claim(ME) is None  # complete: never again
    assert states(queue) == ["complete"]


def test_the_younger_trial_yields_even_while_the_older_only_waits(queue: Queue) -> None:
    queue.enqueue(POINTS[:1])
    (key,) = queue.entries()
    queue._add(POINTS[0], key, attempt=0)
    younger = queue._trials()[1]
    assert queue.storage.set_trial_state_values(younger._trial_id, TrialState.RUNNING)
    assert not queue._keep(younger, ME)
    assert queue.claim(ME).number == 0


def test_a_failure_is_kept_and_tried_again_only_when_asked(queue: Queue) -> None:
    queue.enqueue(POINTS[:1])
    try:
        raise RuntimeError("out of luck")
    except RuntimeError as error:
        queue.fail(queue.claim(ME), error)
    queue.enqueue(POINTS[:1])
    assert queue.claim(ME) is None
    (entry,) = queue.entries().values()
    assert entry.state == "failed"
    assert "Traceback" in entry.error
    assert entry.error.endswith("RuntimeError: out of luck\n")
    queue.enqueue(POINTS[:1], retry_failed=True)
    assert states(queue) == ["waiting"]
    queue.complete(queue.claim(ME), [{"d": 1.0}], "d")
    assert states(queue) == ["complete"]
    queue.enqueue(POINTS[:1], retry_failed=True)
    assert states(queue) == ["complete"]


def test_the_reason_of_a_failure_is_its_last_sentence(queue: Queue) -> None:
    queue.enqueue(POINTS[:1])
    queue.fail(queue.claim(ME), ValueError("Expected a width:\n  it is missing\n    in the file."))
    (entry,) = queue.entries().values()
    assert entry.reason == "ValueError: Expected a width: it is missing in the file."


def test_a_configuration_that_kills_its_workers_is_given_up(queue: Queue) -> None:
    queue.enqueue(POINTS[:1])
    for _ in range(MAX_DEATHS):
        assert queue.claim(GONE) is not None
        queue.recover(Observer(60))
    assert queue.claim(ME) is None
    (entry,) = queue.entries().values()
    assert entry.state == "failed"
    assert "died in each of 3 tries" in entry.error
    queue.enqueue([], retry_failed=True)
    assert queue.claim(ME) is not None


def test_interrupts_do_not_count_as_deaths(queue: Queue) -> None:
    queue.enqueue(POINTS[:1])
    for _ in range(MAX_DEATHS + 2):
        queue.release(queue.claim(ME).trial_id)
        assert states(queue) == ["missing"]
        queue.enqueue()
    assert states(queue) == ["waiting"]


def test_many_workers_at_once_share_the_queue_without_overlap(url: str) -> None:
    points = [{"index": i} for i in range(20)]
    taken: list[int] = []

    def worker(number: int) -> None:
        barrier.wait()
        queue = Queue(open_storage(url), "sweep", "tests:objective")  # all of them make it
        queue.enqueue(points)
        while (task := queue.claim(worker_identity(str(number)))) is not None:
            taken.append(task.configuration["index"])
            assert queue.complete(task, [{"d": 1.0}], "d")

    barrier = threading.Barrier(4)
    threads = [threading.Thread(target=worker, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(20))
    trials = Queue(open_storage(url), "sweep")._trials()
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) == 20


def test_a_study_of_something_else_is_refused_untouched(url: str) -> None:
    study = optuna.create_study(study_name="sweep", storage=open_storage(url))
    study.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(
        ValueError, match="Expected the study 'sweep' to be a sweep of tests:objective but it is not a sweep"
    ):
        Queue(open_storage(url), "sweep", "tests:objective")
    assert study.user_attrs == {}


def test_a_sweep_of_another_objective_is_refused(queue: Queue, url: str) -> None:
    with pytest.raises(ValueError, match="to be a sweep of other:f but it is one of tests:objective"):
        Queue(open_storage(url), "sweep", "other:f")


def test_a_sweep_that_is_not_there_is_named_with_those_that_are(queue: Queue, url: str) -> None:
    with pytest.raises(ValueError, match=r"Expected a sweep named 'widths' in the storage but it has \['sweep'\]"):
        Queue(open_storage(url), "widths")


def test_trials_added_by_hand_are_ignored(queue: Queue, url: str) -> None:
    queue.enqueue(POINTS[:1])
    optuna.load_study(study_name="sweep", storage=open_storage(url)).enqueue_trial({"width": 3})
    assert len(queue.entries()) == 1
    assert queue.claim(ME).configuration == POINTS[0]
    assert queue.claim(ME) is None
