"""Sweeps under fire: their processes are ended by `kill -9` at random moments, and what is left is counted.

    python benchmarks/sweep_storm.py [--storms 40] [--kills 4] [--seed 0]

A storm is one sweep, on a journal or on SQLite, worked on by one or two `run` calls with one or two workers each. A kill hits a
`run` or one of its workers; a `run` that was killed is started again. In the end every configuration must have exactly one
complete trial, whose numbers are right to the last bit. Linux only, as it looks up processes in /proc.
"""

import argparse
import contextlib
import math
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

CONFIGURATIONS = 8
SECONDS = 0.4  # of one trial
SCALARS = 100  # of its result, so that a result is many writes


class Storm(NamedTuple):
    """One line of the table."""

    storage: str
    runs: int  # calls of `run` at once
    workers: int  # of each
    killed_runs: int
    killed_workers: int
    starts: int  # of the objective
    exact: int  # configurations with exactly one complete trial and the right result


def numbers(index: int) -> dict[str, float]:
    """The right result of a configuration."""
    return {f"value_{i}": math.sin(index + 0.1 * i) for i in range(SCALARS)}


def objective(config: dict[str, Any]) -> dict[str, float]:
    """Leaves a byte for each start."""
    with Path(config["directory"], "starts").open("a") as file:
        file.write(".")
    time.sleep(SECONDS)
    return numbers(config["index"])


def sweep(directory: str, storage: str) -> Any:
    """The sweep of a storm."""
    from lightning_ntk.sweep.runner import Sweep  # not above: worker processes import this file, and need it not

    grid: dict[str, list[Any]] = {"index": list(range(CONFIGURATIONS)), "directory": [directory]}
    return Sweep(objective, grid, storage=storage, logs=Path(directory, "logs"))


def run(directory: str, storage: str, workers: int) -> None:
    """One call of `run`, which prints to a file."""
    with Path(directory, "output").open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # A configuration whose worker was killed three times is given up, and tried again by the next call.
    sweep(directory, storage).run(workers=workers, threads=1, retry_failed=True, progress=False)


def storm(generator: random.Random, kind: str, kills: int, directory: str) -> Storm:
    """Lets a sweep run to its end, with kills on the way."""
    storage = f"{directory}/sweep.journal" if kind == "journal" else f"sqlite:///{directory}/sweep.db"
    runs, workers = generator.choice([1, 2]), generator.choice([1, 2])

    def start() -> BaseProcess:
        process = multiprocessing.get_context("spawn").Process(target=run, args=(directory, storage, workers))
        process.start()
        return process

    processes = [start() for _ in range(runs)]
    killed = Counter[str]()
    for _ in range(kills):
        if generator.random() < 0.8:
            # The kill hits a trial, the writing of its result, or the claim of the next one.
            wait_for_a_start(directory, processes)
        time.sleep(generator.uniform(0, 1.25 * SECONDS))
        slot = generator.randrange(runs)
        victims = workers_of(processes[slot]) if generator.random() < 0.6 else []
        if victims:
            killed["worker"] += kill(generator.choice(victims))
        elif processes[slot].is_alive():
            killed["run"] += kill(processes[slot].pid or 0)
            processes[slot].join()
            processes[slot] = start()
    for process in processes:
        process.join()
    # Until nothing is given up: a call ends in a moment where nothing is left to do.
    while any(entry.state != "complete" for entry in sweep(directory, storage).queue.entries().values()):
        last = start()
        last.join()
    return Storm(
        kind, runs, workers, killed["run"], killed["worker"], starts(directory), exact(sweep(directory, storage))
    )


def exact(finished: Any) -> int:
    """How many configurations have one complete trial, and the right numbers."""
    import optuna

    study = optuna.load_study(study_name=finished.name, storage=finished.queue.storage)
    complete = Counter(t.user_attrs["configuration"]["index"] for t in study.trials if t.state.name == "COMPLETE")
    results = {row["index"]: {tag: row[tag] for tag in numbers(0)} for row in finished.results.rows}
    return sum(complete[index] == 1 and results.get(index) == numbers(index) for index in range(CONFIGURATIONS))


def starts(directory: str) -> int:
    """How often the objective was started."""
    path = Path(directory, "starts")
    return path.stat().st_size if path.exists() else 0


def workers_of(process: BaseProcess) -> list[int]:
    """The process numbers of the workers of a `run`."""
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except OSError:
        return []  # it has ended meanwhile


def kill(number: int) -> int:
    """Whether a process was there to be killed."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)
        return 1
    return 0


def wait_for_a_start(directory: str, processes: Sequence[BaseProcess]) -> None:
    """Returns when the objective is started again, or every `run` has ended."""
    known = starts(directory)
    while starts(directory) == known and any(process.is_alive() for process in processes):
        time.sleep(0.02)


def main() -> int:
    """Prints the table; returns 1 if a configuration has no, several or wrong results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storms", type=int, default=40)
    parser.add_argument("--kills", type=int, default=4, help="in each storm")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}, {CONFIGURATIONS} configurations in each storm")
    print(f"{'storm':>5}  {'storage':<8}" + "".join(f"{field.replace('_', ' '):>16}" for field in Storm._fields[1:]))
    storms = []
    for number in range(options.storms):
        generator = random.Random(f"{options.seed} {number}")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
            line = storm(generator, ("journal", "sqlite")[number % 2], options.kills, directory)
        storms.append(line)
        print(f"{number:>5}  {line.storage:<8}" + "".join(f"{value:>16}" for value in line[1:]), flush=True)
    runs, workers, right = (
        sum(getattr(s, name) for s in storms) for name in ("killed_runs", "killed_workers", "exact")
    )
    wanted = CONFIGURATIONS * len(storms)
    print(
        f"{len(storms)} storms, {runs} runs and {workers} workers killed: {right} of {wanted} configurations have exactly one "
        "complete trial with the right result"
    )
    return int(right != wanted)


if __name__ == "__main__":
    sys.exit(main())
