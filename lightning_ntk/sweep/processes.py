"""The worker processes of one `Sweep.run`, and the bar that shows what they do."""

import contextlib
import multiprocessing
import os
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from tqdm import tqdm

from lightning_ntk.sweep.entry import Entry
from lightning_ntk.sweep.liveness import Observer
from lightning_ntk.sweep.queue import Queue
from lightning_ntk.sweep.worker import POLL, Job, work_in_process

# Worker processes that may die in a row before they took a trial: then something is wrong with all of them.
_EARLY_DEATHS = 2
# Seconds that a worker gets to put its trial back after an interrupt.
_GRACE = 10.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerProcesses:
    """Worker processes of one `run`: started while trials wait, replaced when they die.

    Args:
        queue: Of the sweep.
        job: What each worker does.
        count: Number of processes.
        threads: Of each one.
        logs: Directory for what they print.
        bar: Shown meanwhile.
    """

    def __init__(self, queue: Queue, job: Job, count: int, threads: int, logs: Path, bar: "ProgressBar") -> None:
        self._queue, self._job, self._count, self._threads = queue, job, count, threads
        self._logs, self._bar = logs, bar
        self._slots: dict[int, tuple[str, BaseProcess]] = {}
        self._ended: dict[str, bool] = {}
        self._early_deaths = 0
        self._last_log = logs

    def run(self) -> None:
        """Returns when every configuration has ended, wherever it was run.

        Raises:
            RuntimeError: If processes die one after another before they take a trial.
        """
        queue, observer = self._queue, Observer(self._job.patience)
        try:
            while True:
                self._collect()
                queue.recover(observer, dead=self._ended)
                queue.enqueue([])
                entries = queue.entries()
                self._bar.show(entries.values())
                states = [entry.state for entry in entries.values()]
                if states.count("complete") + states.count("failed") == len(states):
                    break
                if self._early_deaths >= _EARLY_DEATHS:
                    raise RuntimeError(
                        f"{self._early_deaths} worker processes in a row ended before they took a trial. The last lines that the "
                        f"latest printed are in {self._logs}:\n{self._tail()}\nA script must call run() under "
                        'if __name__ == "__main__":, because worker processes import it.'
                    )
                self._start(states.count("waiting"))
                time.sleep(POLL)
        except KeyboardInterrupt:
            tqdm.write("Interrupted; the same command resumes.", file=sys.stderr)
            raise
        finally:
            self._stop()
            queue.recover(observer, dead=self._ended)

    def _start(self, waiting: int) -> None:
        free = [slot for slot in range(1, self._count + 1) if slot not in self._slots]
        for slot in free[:waiting]:
            identity = uuid.uuid4().hex
            process = multiprocessing.get_context("spawn").Process(
                target=work_in_process,
                args=(self._job, identity, self._threads, str(self._log(slot)), sys.path),
                name=f"sweep worker {slot}",
            )  # fmt: skip
            with _environment(dict.fromkeys(_THREAD_VARIABLES, str(self._threads))):
                process.start()
            self._slots[slot] = (identity, process)

    def _collect(self) -> None:
        for slot, (identity, process) in list(self._slots.items()):
            if process.is_alive():
                continue
            del self._slots[slot]
            self._ended[identity] = False
            took_a_trial = self._queue.knows(identity)
            self._early_deaths = 0 if took_a_trial else self._early_deaths + bool(process.exitcode)
            if process.exitcode:
                self._last_log = self._log(slot)
                tqdm.write(
                    f"A worker process ended with exit code {process.exitcode} (log: {self._log(slot)})"
                    + ("; its configuration is run again." if took_a_trial else "."),
                    file=sys.stderr,
                )

    def _stop(self) -> None:
        for _, process in self._slots.values():
            process.terminate()
        deadline = time.monotonic() + _GRACE
        for identity, process in self._slots.values():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
            self._ended[identity] = True
        self._slots.clear()

    def _log(self, slot: int) -> Path:
        return self._logs / f"worker-{slot}.log"

    def _tail(self) -> str:
        return (
            "\n".join(self._last_log.read_text(errors="replace").splitlines()[-15:]) if self._last_log.is_file() else ""
        )


class ProgressBar:
    """A tqdm bar over all configurations, with the time that remains."""

    def __init__(self, queue: Queue, *, enabled: bool) -> None:
        self._queue, self._enabled = queue, enabled

    def __enter__(self) -> "ProgressBar":
        entries = self._queue.entries().values()
        done = sum(entry.state in ("complete", "failed") for entry in entries)
        # Without smoothing: trials end in bursts, and the mean rate since the start is the better guess.
        self._bar = tqdm(
            total=len(entries), initial=done, desc="sweep", unit="trial", smoothing=0,
            disable=not self._enabled, dynamic_ncols=True,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self) -> None:
        """Reads the queue and shows it."""
        self.show(self._queue.entries().values())

    def show(self, entries: Iterable[Entry]) -> None:
        """Shows these entries of the queue."""
        states = [entry.state for entry in entries]
        counts = {state: states.count(state) for state in ("running", "failed")}
        ended = states.count("complete") + states.count("failed") - self._bar.n
        self._bar.total = len(states)
        self._bar.set_postfix({state: count for state, count in counts.items() if count}, refresh=False)
        if ended or sys.stderr.isatty():
            # The clock of a terminal goes on; a log file gets a line only when a trial has ended.
            self._bar.n += ended
            self._bar.refresh()


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
