"""Who runs a trial, and whether that process still lives: at once on the same machine, by heartbeats on another."""

import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError

WORKER, HEARTBEAT = "worker", "heartbeat"

Identity = dict[str, Any]


def worker_identity(name: str | None = None) -> Identity:
    """What tells this process from every other one: a name, host, machine, process number and start time."""
    return {
        "id": name or uuid.uuid4().hex,
        "host": platform.node(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
    }


class Heartbeat:
    """A thread that calls `beat` with the time of day every `interval` seconds, from entering to leaving the context."""

    def __init__(self, beat: Callable[[float], None], interval: float) -> None:
        self._beat, self._interval = beat, interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweep heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self._beat(time.time())
            except UpdateFinishedTrialError:
                return  # given to somebody else: the result will be refused
            except Exception:
                # A storage out of reach for a moment: the next beat tries again, and the result itself must get through.
                continue


class Observer:
    """Judges whether the worker of a running trial is gone.

    A process of this machine is looked up: its number and start time. For any other one the heartbeat must have changed within
    `patience` seconds of this observer's own clock, so that clocks of different machines need not agree.

    Args:
        patience: Seconds without a new heartbeat after which a worker is taken for dead.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._machine = _machine()
        self._seen: dict[int, tuple[Any, float]] = {}

    def is_gone(self, number: int, attributes: dict[str, Any]) -> bool:
        """Whether nobody works on trial `number`, which is marked as running and has these user attributes."""
        worker = attributes.get(WORKER)
        if worker and self._machine is not None and worker["machine"] == self._machine:
            return bool(_start_time(worker["pid"]) != worker["started"])
        state = (worker, attributes.get(HEARTBEAT))
        now = time.monotonic()
        known, since = self._seen.get(number, (None, now))
        if number not in self._seen or known != state:
            self._seen[number] = (state, now)
            return False
        return now - since > self._patience


def _machine() -> str | None:
    """This boot of this machine as process numbers see it, or None where /proc cannot be read."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _start_time(pid: int) -> str | None:
    """When a process of this machine started, in ticks since boot; None if it is gone, or waits only to be buried."""
    try:
        # The name in parentheses may hold spaces and parentheses itself.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
