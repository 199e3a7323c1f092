"""Seconds, the machine on which they passed, and the table of all comparisons."""

import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

Function = Callable[[], object]


class Comparison(NamedTuple):
    """One line of the table.

    Attributes:
        case: What is computed, on what.
        ours: Seconds of this package.
        other: What it is compared with: a peer's way to the same numbers, or a floor below which no way can be.
        seconds: Those of the other.
        notes: Further measurements.
    """

    case: str
    ours: float
    other: str
    seconds: float
    notes: dict[str, float] = {}  # noqa: RUF012  # never written to

    @property
    def ratio(self) -> float:
        """Seconds of the other in ours: larger is better."""
        return self.seconds / self.ours

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        return {**self._asdict(), "ratio": self.ratio}


def seconds(function: Function, repeats: int = 3, *, warm_up: bool = True) -> float:
    """Median of several runs, after one that warms up."""
    return interleaved({"": function}, repeats, warm_up=warm_up)[""]


def interleaved(functions: dict[str, Function], repeats: int, *, warm_up: bool = True) -> dict[str, float]:
    """Median seconds of each function, run in turn so that a drifting machine affects all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(-int(warm_up), repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if repeat >= 0:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> dict[str, Any]:
    """Processor, cores, threads, memory, versions, the library of matrix products, and how busy it all was."""
    configuration = torch.__config__.show()
    blas = re.search(r"BLAS_INFO=([^,]+)", configuration)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory GiB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "BLAS": blas.group(1) if blas else "unknown",
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "load before": os.getloadavg()[0],
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def header() -> str:
    """The head of the table."""
    return f"{'case':<48}{'ours [s]':>10}   {'compared with':<60}{'[s]':>10}{'ratio':>9}"


def line(comparison: Comparison) -> str:
    """A line of the table, with its notes below."""
    text = f"{comparison.case:<48}{comparison.ours:10.4f}   {comparison.other:<60}"
    text += f"{comparison.seconds:10.4f}{comparison.ratio:9.2f}"
    if comparison.notes:
        text += "\n    " + ", ".join(f"{name} {value:.3g}" for name, value in comparison.notes.items())
    return text
