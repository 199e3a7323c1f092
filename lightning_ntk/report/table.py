"""The verdict and a table of a run, for a terminal of 80 columns."""

import math
import textwrap
from collections.abc import Mapping, Sequence

from lightning_ntk.functional.verdict import Verdict

# Scalars with their headings, as far as they fit.
COLUMNS = {
    "relative_weight_distance": "distance",
    "weight_cosine": "cosine",
    "taylor_gap": "Taylor",
    "loss": "loss",
    "linearized_loss": "lin. loss",
    "accuracy": "accuracy",
    "linearized_accuracy": "lin. acc.",
}
_LINES = 8
_WIDTH = 9


def summarize(history: Sequence[Mapping[str, float]], verdict: Verdict) -> str:
    """Writes the verdict and at most eight measurements of a run, in 80 columns.

    Args:
        history: Rows with "step" and the scalars of a monitor, in the order of the steps.
        verdict: What `lightning_ntk.functional.judge` says of them.

    Example:
        >>> from lightning_ntk.functional import judge
        >>> rows = [{"step": s, "relative_weight_distance": s / 1000, "loss": 1 / s} for s in (1, 10, 50)]
        >>> print(summarize(rows, judge(rows)))
        After 50 steps the trained weights are 0.05 of their displacement away from the
        linearized ones: lazy.
        <BLANKLINE>
            step  distance      loss
               1     0.001         1
              10      0.01       0.1
              50      0.05      0.02
    """
    lines = textwrap.wrap(verdict.describe(), 80)
    columns = [key for key in COLUMNS if any(key in row for row in history)]
    if columns:
        lines += ["", f"{'step':>8}" + "".join(f" {COLUMNS[key]:>{_WIDTH}}" for key in columns).rstrip()]
        lines += [_line(row, columns) for row in evenly_spaced(history, _LINES)]
    return "\n".join(lines)


def evenly_spaced(history: Sequence[Mapping[str, float]], count: int) -> list[Mapping[str, float]]:
    """At most `count` rows, the first and the last among them."""
    if len(history) <= count:
        return list(history)
    return [history[round(i * (len(history) - 1) / (count - 1))] for i in range(count)]


def spread(history: Sequence[Mapping[str, float]], count: int) -> list[Mapping[str, float]]:
    """Picks at most `count` rows, from the first to the last.

    Half of them are evenly spaced, half logarithmically.
    """
    if len(history) <= count:
        return list(history)
    last, half = len(history) - 1, count // 2
    evenly = {round(i * last / (half - 1)) for i in range(half)}
    return [history[i] for i in sorted(evenly | {round(last ** (i / (half - 1))) for i in range(half)})]


def number(value: float) -> str:
    """A number with three digits; a dash where there is none."""
    return "-" if math.isnan(value) else f"{value:.3g}"


def _line(row: Mapping[str, float], columns: Sequence[str]) -> str:
    return f"{row['step']:>8g}" + "".join(f" {number(row.get(key, math.nan)):>{_WIDTH}}" for key in columns)
