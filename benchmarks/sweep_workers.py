"""How much sooner two workers finish a sweep than one."""

import tempfile
import time
from pathlib import Path

from timing import Comparison

from lightning_ntk.sweep import Sweep
from lightning_ntk.sweep.objective import ImportedObjective


def two_workers(trials: int = 8, width: int = 256, steps: int = 3000) -> Comparison:
    """The objective of examples/sweep.py, with as many seeds as trials, from scratch by one worker and by two.

    Each worker has one thread. Times are of the whole `run`, with the start of the worker processes.
    """
    two, one = (_seconds(workers, trials, width, steps) for workers in (2, 1))
    return Comparison(
        f"sweep of {trials} trials by two workers", two, "one worker", one, {"trials": trials, "steps": steps}
    )


def _seconds(workers: int, trials: int, width: int, steps: int) -> float:
    grid = {"width": [width], "steps": [steps], "seed": list(range(trials))}
    objective = ImportedObjective("sweep.py:objective", str(Path(__file__).parent.parent / "examples"))
    with tempfile.TemporaryDirectory() as directory:
        sweep = Sweep(objective, grid, storage=Path(directory) / "sweep.journal", logs=Path(directory) / "logs")
        started = time.perf_counter()
        results = sweep.run(workers=workers, threads=1, progress=False)
        elapsed = time.perf_counter() - started
    if len(results) != trials:
        raise RuntimeError(f"Expected {trials} complete results but got {len(results)}.")
    return elapsed
