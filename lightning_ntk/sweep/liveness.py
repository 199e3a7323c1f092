"""Checks whether the worker of a trial is alive.

It looks on this machine, and relies on heartbeats on another.
"""

import contextlib
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError

WORKER, HEARTBEAT = "worker", "heartbeat"

Identity = dict[str, Any]


def worker_identity(name: str | None = None) -> Identity:
    """Identifies this process: name, host, machine, process number, start time."""
    return {
        "id": name or uuid.uuid4().hex,
        "host": platform.node(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
    }


@contextlib.contextmanager
def heartbeat(beat: Callable[[float], None], interval: float) -> Iterator[None]:
    """A context in which a thread calls `beat` with the time every `interval` seconds."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(interval):
            try:
                beat(time.time())
            except UpdateFinishedTrialError:
                return  # the trial was taken away, and its result will be refused
            except Exception:
                # The storage is out of reach for a moment: the next beat tries again, and the result itself must get through.
                continue

    thread = threading.Thread(target=run, name="sweep heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Observer:
    """Judges whether the worker of a running trial is dead.

    A process of this machine is looked up by its number and start time. The heartbeat of any other one must change within
    `patience` seconds of the observer's own clock, so the clocks of different machines need not agree.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._machine = _machine()
        self._seen: dict[int, tuple[Any, float]] = {}

    def is_gone(self, number: int, attributes: dict[str, Any]) -> bool:
        """Whether the worker of a running trial, with these user attributes, is dead."""
        worker = attributes.get(WORKER)
        if worker and self._machine is not None and worker["machine"] == self._machine:
            return bool(_start_time(worker["pid"]) != worker["started"])
        sign, now = (worker, attributes.get(HEARTBEAT)), time.monotonic()
        seen, since = self._seen.get(number, (None, now))
        if seen != sign:
            self._seen[number] = (sign, now)
            return False
        return now - since > self._patience


def _machine() -> str | None:
    """Identifies this boot of this machine and its process namespace.

    None where /proc cannot be read.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _start_time(pid: int) -> str | None:
    """When a process of this machine started, in ticks since boot.

    None if it has ended.
    """
    try:
        # The name in parentheses may itself contain spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # a zombie has ended, too
