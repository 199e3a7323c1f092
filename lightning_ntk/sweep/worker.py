"""One process that takes trials from the queue until nothing waits."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from lightning_ntk.sweep.liveness import Identity, Observer, heartbeat, worker_identity
from lightning_ntk.sweep.objective import Objective, headline, rows_of, verdict_of
from lightning_ntk.sweep.queue import Queue, Task
from lightning_ntk.sweep.storage import open_storage

# Seconds between two looks at the queue.
POLL = 0.5
# Heartbeats in the time after which a silent worker counts as dead.
_BEATS = 6


def work(
    queue: Queue,
    objective: Objective,
    *,
    patience: float,
    identity: Identity | None = None,
    wait: bool = False,
    supervised: bool = False,
    after_trial: Callable[[], object] = lambda: None,
) -> int:
    """Runs waiting trials one after another; returns how many.

    A trial that raises is recorded with its traceback, and the next one is taken. If this process is asked to stop (SIGINT or
    SIGTERM), the trial in flight goes back to the queue; that of a `supervised` worker is left to the process that started it,
    which knows whether it sent the signal. With `wait`, the worker stays until every configuration has ended, to run those of
    workers that die.
    """
    identity = identity or worker_identity()
    observer = Observer(patience)
    ended = 0
    parent = parent_process()
    while parent is None or parent.is_alive():  # a worker whose `run` was killed ends after its trial
        queue.recover(observer)
        task = queue.claim(identity)
        if task is not None:
            try:
                _run(queue, objective, task, patience / _BEATS)
            except (KeyboardInterrupt, SystemExit):
                # Also if it came before the trial started: a notebook's process lives on and would seem to work on it.
                if not supervised:
                    queue.release(task.trial_id)
                raise
            ended += 1
            after_trial()
        elif wait and queue.counts().keys() - {"complete", "failed"}:
            time.sleep(POLL)
        else:
            break
    return ended


def _run(queue: Queue, objective: Objective, task: Task, beat_every: float) -> None:
    with stop_signals() as stopped:
        try:
            with heartbeat(lambda now: queue.beat(task, now), beat_every):
                result = objective(dict(task.configuration))
                rows, verdict = rows_of(result), verdict_of(result)
            clash = sorted({tag for row in rows for tag in row} & set(task.configuration))
            if clash:
                raise ValueError(f"Expected scalars with other names than the parameters but both have {clash}.")
            if not stopped:
                queue.complete(task, rows, headline(rows), verdict)
        except BaseException as error:
            # Also sys.exit, into which Lightning turns an interrupt, and an interrupt that the objective raised by itself.
            if not stopped:
                queue.fail(task, error)
        if stopped:
            raise KeyboardInterrupt


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects the signals that ask this process to stop; the first one raises KeyboardInterrupt."""
    received: list[int] = []

    def stop(number: int, frame: Any) -> None:
        received.append(number)
        if len(received) == 1:
            raise KeyboardInterrupt

    previous = {}
    with contextlib.suppress(ValueError):  # outside of the main thread, to which no signal comes
        for number in (signal.SIGINT, signal.SIGTERM):
            # Workers of `run` ignore SIGINT, which the terminal sends to all of them: their parent decides.
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, stop)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def work_in_process(
    objective: Objective, storage: str, name: str, patience: float, identity: str, threads: int, log: Path
) -> None:
    """The whole life of a worker process that `Sweep.run` started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with log.open("a", buffering=1, encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        import torch  # not above: most commands do without

        torch.set_num_threads(threads)
        queue = Queue(open_storage(storage), name)
        try:
            work(queue, objective, patience=patience, identity=worker_identity(identity), supervised=True)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGTERM)
