"""Histories: rows of scalars, from a monitor, a table or a log file."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from pandas import DataFrame


class HasHistory(Protocol):
    """What has measured a run: a `LinearizationMonitor`, or the `LinearizationCallback` of transformers."""

    history: list[dict[str, float]]


History: TypeAlias = Sequence[Mapping[str, float]]
Run: TypeAlias = "History | HasHistory | DataFrame"
"""What plots take, rows with "step" and scalars as a list or a DataFrame, or what has measured them."""

# Axis labels.
LABELS = {
    "weight_distance": "weight distance\n" r"$\|w_t - w_\mathrm{lin}(t)\|$",
    "relative_weight_distance": "relative weight distance\n" r"$\|w_t - w_\mathrm{lin}(t)\| \,/\, \|w_t - w_0\|$",
    "weight_cosine": r"cosine of $w_t - w_0$ and $w_\mathrm{lin}(t) - w_0$",
    "weight_norm_ratio": "norm ratio\n" r"$\|w_\mathrm{lin}(t) - w_0\| \,/\, \|w_t - w_0\|$",
    "displacement": "displacement\n" r"$\|w_t - w_0\|$",
    "prediction_rmse": "prediction RMSE\n" r"$\mathrm{rms}\,(f_t - f_\mathrm{lin}(t))$",
    "loss": "loss on the reference set",
    "linearized_loss": "loss of the linearized network",
    "taylor_gap": "Taylor gap\n" r"$\|f_t - f_0 - J(w_t - w_0)\| \,/\, \|f_t - f_0\|$",
    "accuracy": "accuracy on the reference set",
    "linearized_accuracy": "accuracy of the linearized network",
    "taylor_accuracy": "accuracy of the expansion at the trained weights",
    "perplexity": "perplexity on the reference set",
    "linearized_perplexity": "perplexity of the linearized network",
    "taylor_perplexity": "perplexity of the expansion at the trained weights",
    "kernel_distance": "kernel distance\n" r"$1 - \cos(\Theta_0, \Theta_t)$",
    "kernel_change": "kernel change\n" r"$\|\Theta_t - \Theta_0\| \,/\, \|\Theta_0\|$",
    "kernel_velocity": "kernel velocity (per step)\n" r"$(1 - \cos(\Theta_s, \Theta_t)) \,/\, (t - s)$",
    "closest_time": "closest time of the linearized network (steps)",
    "closest_distance": "relative weight distance at the closest time",
    "distance_floor": "lower bound of the relative weight distance",
}


def read_history(path: str | Path, name: str = "ntk") -> list[dict[str, float]]:
    """Reads a monitor's history from the log of Lightning's CSVLogger.

    Args:
        path: The file `metrics.csv`, or its directory (`logger.log_dir`).
        name: The monitor's `name`, the prefix of its columns.

    Returns:
        One row for each measured step, in the order of the log, with "step" and the scalars without the prefix.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has no "step" or no column of this monitor.
    """
    path = Path(path)
    path = path / "metrics.csv" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"Expected a log of the CSVLogger but there is no file {path}.")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        prefix = f"{name}/"
        if "step" not in columns or not any(column.startswith(prefix) for column in columns):
            raise ValueError(
                f'Expected columns "step" and "{prefix}..." in {path} but it has {list(columns)}. '
                "Pass the monitor's `name`, and the log of a run with a LinearizationMonitor."
            )
        rows: dict[float, dict[str, float]] = {}
        for line in reader:
            scalars = {
                key[len(prefix) :]: float(value) for key, value in line.items() if value and key.startswith(prefix)
            }
            if scalars:
                step = float(line["step"])
                rows.setdefault(step, {"step": step}).update(scalars)
    return list(rows.values())


def rows_of(run: Run) -> History:
    """The rows of a run, without the missing cells of a DataFrame.

    Raises:
        TypeError: If `run` is none of a history, a DataFrame and a monitor.
    """
    rows: Any = getattr(run, "history", run)
    if hasattr(rows, "to_dict"):
        rows = [{key: value for key, value in row.items() if value == value} for row in rows.to_dict("records")]
    if (
        isinstance(rows, str | Mapping)
        or not isinstance(rows, Sequence)
        or not all(isinstance(r, Mapping) for r in rows)
    ):
        raise TypeError(
            "Expected a monitor, its `history`, or a DataFrame with a row for each measurement but got "
            f"{type(run).__name__}."
        )
    return rows


def tells_at_start(key: str) -> bool:
    """Whether a scalar says something at step 0, where distances are zero by definition."""
    return key.endswith(("loss", "accuracy", "perplexity", "residual"))


def series(history: History, key: str, x: str = "step") -> tuple[list[float], list[float]]:
    """The finite values of a scalar, with steps or another scalar `x`."""
    points = [
        (row[x], row[key])
        for row in history
        if math.isfinite(row.get(key, math.nan))
        and math.isfinite(row.get(x, math.nan))
        and (row["step"] > 0 or tells_at_start(key))
    ]
    return [at for at, _ in points], [value for _, value in points]


def require_any(history: History, keys: Sequence[str]) -> list[str]:
    """The `keys` that occur in the history; raises a ValueError if none does."""
    if not history:
        raise ValueError("Expected a history with at least one measurement but it is empty: plot after training.")
    present = [key for key in keys if any(key in row for row in history)]
    if not present:
        found = sorted({key for row in history for key in row if not key.startswith("parameter/")})
        raise ValueError(f"Expected a history with {' or '.join(keys)} but it has {found}.")
    return present
