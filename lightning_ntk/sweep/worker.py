"""One process that takes trials from the queue until nothing waits."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from lightning_ntk.sweep.liveness import Heartbeat, Identity, Observer, worker_identity
from lightning_ntk.sweep.objective import Objective, headline, rows_of
from lightning_ntk.sweep.queue import Queue, Task
from lightning_ntk.sweep.storage import open_storage

# Heartbeats in the time after which a silent worker is taken for dead.
_BEATS = 6
# Seconds between two looks at the queue.
POLL = 0.5


def work(
    queue: Queue,
    objective: Objective,
    *,
    identity: Identity | None = None,
    patience: float = 120.0,
    wait: bool = False,
    after_trial: Callable[[], None] = lambda: None,
) -> int:
    """Runs waiting trials one after another.

    A trial that raises is recorded with its traceback, and the next one is taken. If this process is asked to stop (SIGINT or
    SIGTERM), the trial in flight goes back to the queue.

    Args:
        queue: Of the sweep.
        objective: Called with the configuration of each trial.
        identity: Of this worker; default: made from this process.
        patience: Seconds without a heartbeat after which workers on other machines are taken for dead.
        wait: Whether to stay until every configuration has ended, ready for those of workers that die.
        after_trial: Called after each trial.

    Returns:
        How many trials this worker ended.
    """
    identity = identity or worker_identity()
    observer = Observer(patience)
    ended = 0
    parent = parent_process()
    while parent is None or parent.is_alive():  # a worker whose `run` was killed ends after its trial
        if queue.recover(observer):
            queue.enqueue([])
        task = queue.claim(identity)
        if task is not None:
            try:
                _run(queue, objective, task, patience / _BEATS)
            except (KeyboardInterrupt, SystemExit):
                # Also if it came before the trial started: in a notebook this process lives on and would seem to work on it.
                queue.release(task.trial_id, interrupted=True)
                raise
            ended += 1
            after_trial()
        elif wait and any(entry.state in ("running", "waiting", "missing") for entry in queue.entries().values()):
            queue.enqueue([])
            time.sleep(POLL)
        else:
            break
    return ended


def _run(queue: Queue, objective: Objective, task: Task, beat_every: float) -> None:
    with _stop_signals() as stopped:
        try:
            with Heartbeat(lambda now: queue.beat(task, now), beat_every):
                rows = rows_of(objective(dict(task.configuration)))
                clash = sorted({tag for row in rows for tag in row} & set(task.configuration))
                if clash:
                    raise ValueError(f"Expected scalars with other names than the parameters but both have {clash}.")
            if not stopped:
                queue.complete(task, rows, headline(rows))
        except Exception as error:
            if not stopped:
                queue.fail(task, error)
        except BaseException as error:
            # Lightning turns an interrupt into sys.exit; the sys.exit of an objective itself is a failure like any other.
            if isinstance(error, SystemExit) and not stopped:
                queue.fail(task, error)
            else:
                stopped.append(signal.SIGINT)
        if stopped:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects the signals that ask this process to stop, and raises KeyboardInterrupt for the first one."""
    received: list[int] = []

    def stop(number: int, frame: Any) -> None:
        received.append(number)
        if len(received) == 1:
            raise KeyboardInterrupt

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            # Workers of `run` ignore SIGINT, which the terminal sends to all of them: their parent decides.
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, stop)
    except ValueError:
        pass  # not the main thread, to which no signal comes
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Job:
    """What a worker process needs to know, all of it picklable.

    Args:
        objective: Called with the configuration of each trial.
        storage: Path or URL.
        name: Of the sweep in its storage.
        patience: Seconds without a heartbeat after which workers on other machines are taken for dead.
    """

    objective: Objective
    storage: str
    name: str
    patience: float


def work_in_process(job: Job, identity: str, threads: int, log: str, path: list[str]) -> None:
    """The whole life of a worker process started by `Sweep.run`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.path[:] = path
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        set_threads(threads)
        with contextlib.suppress(KeyboardInterrupt):
            queue = Queue(open_storage(job.storage), job.name)
            work(queue, job.objective, identity=worker_identity(identity), patience=job.patience)


def set_threads(threads: int) -> None:
    """Limits PyTorch to so many threads in this process."""
    import torch

    torch.set_num_threads(threads)
