"""`Sweep`: an objective, its configurations and their storage; runs them in worker processes."""

import multiprocessing
import os
import signal
import sys
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lightning_ntk.sweep.configurations import check_configurations, configuration_key, grid
from lightning_ntk.sweep.liveness import Observer
from lightning_ntk.sweep.objective import Objective, objective_identity, require_for_processes
from lightning_ntk.sweep.queue import Queue, State
from lightning_ntk.sweep.results import Results
from lightning_ntk.sweep.storage import open_storage
from lightning_ntk.sweep.worker import POLL, stop_signals, work, work_in_process
from lightning_ntk.utilities.representation import represent
from lightning_ntk.utilities.validation import require_integer

# Worker processes that may die in a row before they took a trial: then something is wrong with all of them.
_EARLY_DEATHS = 2
# Seconds that a worker gets to put its trial back after an interrupt.
_GRACE = 10.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Sweep:
    """Runs an objective once for each of many configurations and keeps every result.

    The storage is a queue: the same call resumes what was interrupted, runs what was added, and repeats nothing that is
    complete. Any number of processes may work on one storage at once.

    Args:
        objective: Called with a configuration, a dictionary; trains, and returns the run's `LinearizationMonitor` or a
            dictionary of scalars. It must be a function at the top level of a file, because worker processes import it.
        configurations: Dictionaries, or one dictionary of lists, every combination of which is run.
        storage: Path of a journal file, or an Optuna storage URL such as "sqlite:///sweep.db" or "postgresql://...".
        name: The sweep's name in its storage, which may hold several.
        patience: Seconds without a sign of life after which a worker on another machine counts as dead.
        logs: Directory for what the workers print. Default: "{name}.logs".

    Raises:
        ValueError: If there are no configurations, two are the same, a value cannot be stored, or the storage has another sweep
            of this name.
        TypeError: If an argument has another type.

    Example:
        >>> sweep = Sweep(lambda c: {"loss": c["width"] ** -0.5}, {"width": [16, 64, 256]}, storage=getfixture("tmp_path") / "j")
        >>> results = sweep.run(workers=0, progress=False)
        >>> round(results.slope("width", "loss").slope, 6)
        -0.5
    """

    def __init__(
        self,
        objective: Objective,
        configurations: Iterable[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
        *,
        storage: str | os.PathLike[str] = "sweep.journal",
        name: str = "sweep",
        patience: float = 120.0,
        logs: str | os.PathLike[str] | None = None,
    ) -> None:
        if not callable(objective):
            raise TypeError(f"Expected argument `objective` to be a function of a configuration but got {objective!r}.")
        if not (isinstance(patience, int | float) and patience > 0):
            raise ValueError(f"Expected argument `patience` to be a positive number of seconds but got {patience!r}.")
        self.objective = objective
        self.configurations = (
            grid(configurations) if isinstance(configurations, Mapping) else check_configurations(configurations)
        )
        self.storage, self.name, self.patience = os.fspath(storage), name, patience
        self.logs = Path(f"{name}.logs" if logs is None else logs)

    @cached_property
    def queue(self) -> Queue:
        """The study in its storage, opened or created when it is first needed."""
        return Queue(open_storage(self.storage), self.name, objective_identity(self.objective))

    @property
    def results(self) -> Results:
        """Everything that is complete so far."""
        return Results(self.queue.entries(rows=True).values())

    def enqueue(self, *, retry_failed: bool = False) -> None:
        """Enqueues configurations without a result.

        With `retry_failed` it includes failed ones. It warns if the storage has more.
        """
        known = self.queue.entries()
        wanted = {configuration_key(configuration) for configuration in self.configurations}
        other = [entry for key, entry in known.items() if key not in wanted]
        added = self.queue.enqueue(self.configurations, retry_failed=retry_failed)
        if other:
            unfinished = sum(entry.state in ("waiting", "missing", "running") for entry in other)
            warnings.warn(
                f"The sweep {self.name!r} has {len(other)} configurations of earlier calls that are not in this one, for "
                f"example {other[0].configuration}. They stay in the storage and in its table"
                + (f", and the {unfinished} unfinished ones are run" if unfinished else "")
                + ". Give another `name` for a sweep without them.",
                stacklevel=3,
            )
        if known and added:
            warnings.warn(f"{added} new configurations were added to the sweep {self.name!r}.", stacklevel=3)

    def run(
        self, workers: int = 1, *, threads: int | None = None, retry_failed: bool = False, progress: bool = True
    ) -> Results:
        """Runs everything that has no result yet.

        Args:
            workers: Number of processes, started by spawning: a script must call this under `if __name__ == "__main__":`. 0 runs
                the trials one after another in this process, for a debugger or a notebook.
            threads: Threads of each worker. Default: its share of the processors that this process may use.
            retry_failed: Whether configurations that failed are tried again.
            progress: Whether to show a progress bar over all configurations.

        Returns:
            All results in the storage, including those of earlier calls. Failed configurations are not among them; a warning
            says how many there are.

        Raises:
            RuntimeError: If worker processes die as soon as they are started.
            OSError: If a log cannot be written.
            KeyboardInterrupt: On Ctrl-C or SIGTERM, after the trials in flight went back to the queue.
        """
        require_integer("workers", workers, least=0)
        if threads is not None:
            require_integer("threads", threads, least=1)
        if workers:
            require_for_processes(self.objective)
        self.enqueue(retry_failed=retry_failed)
        counts = self.queue.counts()
        # Without smoothing: trials end in bursts, and the mean rate since the start is the better guess.
        with tqdm(
            total=counts.total(), initial=_ended(counts), desc="sweep", unit="trial", smoothing=0,
            disable=not progress, dynamic_ncols=True,
        ) as bar:  # fmt: skip
            show = partial(_show, bar, self.queue)
            if workers:
                processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
                _Workers(self, workers, threads or max(1, processors // workers)).run(show)
            else:
                work(self.queue, self.objective, patience=self.patience, wait=True, after_trial=show)
        entries = self.queue.entries()
        failed = [entry for entry in entries.values() if entry.state == "failed"]
        if failed:
            warnings.warn(
                f"{len(failed)} of {len(entries)} configurations failed, the first, {failed[0].configuration}, with: "
                f"{failed[0].reason.rstrip('.')}. "
                "`lightning-ntk sweep status` shows the tracebacks, which the storage keeps; retry_failed=True (--retry-failed) "
                "tries again.",
                stacklevel=2,
            )
        return self.results

    def __repr__(self) -> str:
        parameters = dict.fromkeys(key for configuration in self.configurations for key in configuration)
        return represent(
            self,
            repr(self.name),
            f"{len(self.configurations)} configurations of {', '.join(parameters)}",
            f"storage={self.storage!r}",
        )


class _Workers:
    """Worker processes: started while trials wait, replaced when they die."""

    def __init__(self, sweep: Sweep, count: int, threads: int) -> None:
        self._queue, self._threads = sweep.queue, threads
        self._observer = Observer(sweep.patience)
        self._target = partial(work_in_process, sweep.objective, sweep.storage, sweep.name, sweep.patience)
        self._logs = [sweep.logs / f"worker-{slot}.log" for slot in range(1, count + 1)]
        self._processes: dict[Path, BaseProcess] = {}  # by log; a process is named by the id of its worker
        self._ended: dict[str, str | None] = {}
        self._early_deaths: list[Path] = []

    def run(self, show: Callable[[], Counter[State]]) -> None:
        """Returns when every configuration has ended, wherever it was run."""
        self._logs[0].parent.mkdir(parents=True, exist_ok=True)
        for log in self._logs:
            log.open("a").close()  # raises here rather than in every worker
        with stop_signals():
            self._run(show)

    def _run(self, show: Callable[[], Counter[State]]) -> None:
        try:
            while True:
                self._collect()
                self._queue.recover(self._observer, self._ended)
                counts = show()
                if _ended(counts) == counts.total():
                    break
                if len(self._early_deaths) >= _EARLY_DEATHS:
                    log = self._early_deaths[-1]
                    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
                    tail = "\n".join(text.splitlines()[-15:])
                    raise RuntimeError(
                        f"{len(self._early_deaths)} worker processes in a row ended before they took a trial. The last lines "
                        f'of {log}:\n{tail}\nA script must call run() under if __name__ == "__main__":, because worker '
                        "processes import it."
                    )
                free = [log for log in self._logs if log not in self._processes]
                for log in free[: counts["waiting"]]:
                    self._start(log)
                time.sleep(POLL)
        except KeyboardInterrupt:
            tqdm.write("Interrupted; the same command resumes.", file=sys.stderr)
            raise
        finally:
            self._stop()

    def _start(self, log: Path) -> None:
        identity = uuid.uuid4().hex
        process = multiprocessing.get_context("spawn").Process(
            target=self._target, args=(identity, self._threads, log), name=identity
        )
        saved = {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ}
        os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(self._threads)))
        try:
            process.start()
        finally:
            for name in _THREAD_VARIABLES:
                del os.environ[name]
            os.environ.update(saved)
        self._processes[log] = process

    def _collect(self) -> None:
        for log, process in list(self._processes.items()):
            if process.is_alive():
                continue
            del self._processes[log]
            self._ended[process.name] = _how_it_ended(process.exitcode or 0)
            took_a_trial = self._queue.knows(process.name)
            if took_a_trial:
                self._early_deaths.clear()
            elif process.exitcode:
                self._early_deaths.append(log)
            if process.exitcode:
                tqdm.write(
                    f"A worker process ended with {self._ended[process.name]} (log: {log})"
                    + ("; its configuration is run again." if took_a_trial else "."),
                    file=sys.stderr,
                )

    def _stop(self) -> None:
        for process in self._processes.values():
            process.terminate()
        deadline = time.monotonic() + _GRACE
        for process in self._processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
            self._ended[process.name] = None
        self._queue.recover(self._observer, self._ended)


def _how_it_ended(exit_code: int) -> str:
    try:
        return signal.Signals(-exit_code if exit_code < 0 else exit_code - 128).name
    except ValueError:
        return f"exit code {exit_code}"


def _show(bar: tqdm, queue: Queue) -> Counter[State]:
    counts = queue.counts()
    bar.total = counts.total()
    bar.set_postfix({state: counts[state] for state in ("running", "failed") if counts[state]}, refresh=False)
    if _ended(counts) > bar.n or sys.stderr.isatty():
        # The clock of a terminal goes on; a log file gets a line only when a trial has ended.
        bar.n = _ended(counts)
        bar.refresh()
    return counts


def _ended(counts: Counter[State]) -> int:
    return counts["complete"] + counts["failed"]
