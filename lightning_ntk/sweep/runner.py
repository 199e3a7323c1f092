"""`Sweep`: an objective, its configurations and their storage; runs them in worker processes."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_ntk.sweep.configurations import check_configurations, configuration_key, grid
from lightning_ntk.sweep.objective import Objective, objective_identity, require_for_processes
from lightning_ntk.sweep.processes import ProgressBar, WorkerProcesses, processors
from lightning_ntk.sweep.queue import Queue
from lightning_ntk.sweep.results import Results
from lightning_ntk.sweep.storage import open_storage
from lightning_ntk.sweep.worker import Job, work


class Sweep:
    """Runs an objective once for each of many configurations, in as many processes as wanted, and keeps every result.

    The storage is a queue: the same call resumes what was interrupted, runs what was added, and repeats nothing that is
    complete. Any number of processes may work on one storage at once.

    Args:
        objective: Called with a configuration, a dictionary; trains, and returns the `LinearizationMonitor` of the run or a
            dictionary of scalars. A function at the top level of a file, because worker processes import it.
        configurations: A list of dictionaries, or one dictionary of lists, of which every combination is run.
        storage: Path of a journal file, or an Optuna storage URL such as "sqlite:///sweep.db" or "postgresql://...".
        name: Of the sweep in its storage, which may hold several.
        patience: Seconds without a sign of life after which a worker on another machine is taken for dead.
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
        configurations: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
        *,
        storage: str | os.PathLike[str] = "sweep.journal",
        name: str = "sweep",
        patience: float = 120.0,
        logs: str | os.PathLike[str] | None = None,
    ) -> None:
        if not callable(objective):
            raise TypeError(f"Expected argument `objective` to be a function of a configuration but got {objective!r}.")
        if not patience > 0:
            raise ValueError(f"Expected argument `patience` to be a positive number of seconds but got {patience!r}.")
        self.objective = objective
        if isinstance(configurations, Mapping):
            self.configurations = grid(configurations)
        else:
            self.configurations = check_configurations(configurations)
        self.storage = os.fspath(storage)
        self.name = name
        self.patience = patience
        self.logs = Path(f"{name}.logs" if logs is None else logs)
        self._queue: Queue | None = None

    @property
    def queue(self) -> Queue:
        """The study in its storage, opened, or created, when it is first needed."""
        if self._queue is None:
            self._queue = Queue(open_storage(self.storage), self.name, objective_identity(self.objective))
        return self._queue

    @property
    def results(self) -> Results:
        """Everything that is complete so far."""
        return Results(self.queue.entries(rows=True).values())

    def enqueue(self, *, retry_failed: bool = False) -> None:
        """Puts the configurations that have no result and no trial into the queue, and says what the storage has besides.

        Args:
            retry_failed: Whether configurations that failed are tried again.
        """
        known = self.queue.entries()
        wanted = {configuration_key(configuration) for configuration in self.configurations}
        other = [entry for key, entry in known.items() if key not in wanted]
        added = self.queue.enqueue(self.configurations, retry_failed=retry_failed)
        if other:
            unfinished = sum(entry.state in ("waiting", "missing", "running") for entry in other)
            warnings.warn(
                f"The sweep {self.name!r} has {len(other)} configurations of earlier calls that are not asked for now, for "
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
            progress: Whether to show a bar over all configurations.

        Returns:
            All results in the storage, also those of earlier calls. Failed configurations are not among them; a warning says
            how many there are.

        Raises:
            RuntimeError: If worker processes die as soon as they are started.
            KeyboardInterrupt: On Ctrl-C, after the trials in flight went back to the queue.
        """
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
            raise ValueError(f"Expected argument `workers` to be a number of processes, or 0, but got {workers!r}.")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise ValueError(f"Expected argument `threads` to be a positive integer but got {threads!r}.")
        if workers:
            require_for_processes(self.objective)
        self.enqueue(retry_failed=retry_failed)
        with ProgressBar(self.queue, enabled=progress) as bar:
            if workers:
                job = Job(self.objective, self.storage, self.name, self.patience)
                share = threads or max(1, processors() // workers)
                WorkerProcesses(self.queue, job, workers, share, self.logs, bar).run()
            else:
                work(self.queue, self.objective, patience=self.patience, wait=True, after_trial=bar.update)
        entries = self.queue.entries()
        failed = [entry for entry in entries.values() if entry.state == "failed"]
        if failed:
            reason = (failed[0].error or "").strip().splitlines()[-1]
            warnings.warn(
                f"{len(failed)} of {len(entries)} configurations failed, the first, {failed[0].configuration}, with: {reason} "
                "The tracebacks are kept in the storage, `lightning-ntk sweep status` shows them; retry_failed=True tries again.",
                stacklevel=2,
            )
        return self.results
