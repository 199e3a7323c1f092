"""Objectives that worker processes import."""

import os
import signal
import time
from pathlib import Path
from typing import Any

NEVER = 600.0


def power(config: dict[str, Any]) -> dict[str, float]:
    return {"loss": 3 * config["width"] ** -0.5 * 1.01 ** config.get("seed", 0)}


def noting(config: dict[str, Any]) -> dict[str, float]:
    """Leaves a line for each start, so that a test can count them, and hangs where it is told to, once."""
    directory = Path(config["directory"])
    with (directory / f"starts-{config['index']}").open("a") as file:
        file.write(f"{os.getpid()}\n")
    hang = directory / f"hang-{config['index']}"
    if hang.exists():
        hang.unlink()
        time.sleep(NEVER)
    time.sleep(0.1)
    return {"value": float(config["index"] ** 2)}


def failing(config: dict[str, Any]) -> dict[str, float]:
    if config["width"] == 32 and not Path(config["repaired"]).exists():
        raise RuntimeError(f"no luck with {config['width']}")
    return {"loss": 1.0}


def dying(config: dict[str, Any]) -> dict[str, float]:
    if config["width"] == 32:
        os.kill(os.getpid(), signal.SIGTERM)  # no Python error, and nobody asked for it
    return {"loss": 1.0}
