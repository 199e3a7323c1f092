"""How much sooner two workers finish a sweep than one.

    python benchmarks/sweep_workers.py [--trials 8] [--steps 2000] [--output benchmarks/results/sweep_workers.json]

The objective of examples/sweep.py, with as many seeds as trials, is run from scratch by one worker and by two, in turn. One
worker has all processors of the machine for its threads, two have half of them each, as `Sweep.run` shares them. Times are of
the whole `run`, with the start of the worker processes.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from lightning_ntk.sweep import Sweep
from lightning_ntk.sweep.objective import ImportedObjective
from lightning_ntk.sweep.processes import processors


def seconds(workers: int, trials: int, width: int, steps: int) -> dict[str, float]:
    """Seconds of a whole run, and the mean of one trial in it."""
    grid = {"width": [width], "steps": [steps], "seed": list(range(trials))}
    objective = ImportedObjective("sweep.py:objective", str(Path(__file__).parent.parent / "examples"))
    with tempfile.TemporaryDirectory() as directory:
        sweep = Sweep(objective, grid, storage=Path(directory) / "sweep.journal", logs=Path(directory) / "logs")
        started = time.perf_counter()
        results = sweep.run(workers=workers, progress=False)
        elapsed = time.perf_counter() - started
        if len(results) != trials:
            raise RuntimeError(f"Expected {trials} complete results but got {len(results)}.")
        lengths = [entry.seconds for entry in sweep.queue.entries().values() if entry.seconds is not None]
    return {"run": elapsed, "trial": statistics.mean(lengths)}


def main() -> None:
    """Prints the times and their ratio, and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of a trial")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "sweep_workers.json")
    options = parser.parse_args()
    measured: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for _ in range(options.repeats):
        for workers, runs in measured.items():
            runs.append(seconds(workers, options.trials, options.width, options.steps))
            last = runs[-1]
            print(
                f"{workers} worker(s): {last['run']:.1f} s for {options.trials} trials, {last['trial']:.1f} s each",
                flush=True,
            )
    median = {workers: statistics.median(run["run"] for run in runs) for workers, runs in measured.items()}
    ratio = median[1] / median[2]
    print(
        f"two workers finish {ratio:.2f} times sooner, on {processors()} processors with load {os.getloadavg()[0]:.1f}"
    )
    record = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "processors": processors(),
            "load_at_end": os.getloadavg()[0],
            "torch": torch.__version__,
        },
        "settings": {key: value for key, value in vars(options).items() if key != "output"},
        "results": {"seconds": measured, "ratio": ratio},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":  # worker processes import this file
    main()
