"""A run when its loss first reaches a value, between two measurements."""

import math
from collections.abc import Mapping, Sequence


def row_at_loss(rows: Sequence[Mapping[str, float]], loss: float, tag: str) -> dict[str, float]:
    r"""Interpolates a run's scalars where its loss first falls to a value.

    Between the last measurement above the value and the first one that is not, every scalar, the step too, is linear in the
    logarithm of the loss, and so monotone; in the loss itself where it falls to zero or below. `exact` is the smaller of both.

    Args:
        rows: The measurements, in the order of the steps. Those without a finite loss are left out.
        loss: The value, positive.
        tag: The name of the loss in the rows.

    Returns:
        The scalars that both measurements have; NaN for all, where the loss never falls to the value or begins below it.

    Example:
        >>> rows = [{"step": 1.0, "loss": 1.0}, {"step": 3.0, "loss": 0.01}]
        >>> round(row_at_loss(rows, 0.1, "loss")["step"], 12)
        2.0
    """
    measured = [row for row in rows if math.isfinite(row.get(tag, math.nan))]
    after = next((index for index, row in enumerate(measured) if row[tag] <= loss), 0)
    if after == 0:
        return dict.fromkeys(dict.fromkeys(name for row in rows for name in row), math.nan)
    first, last = measured[after - 1], measured[after]
    scale = math.log if last[tag] > 0 else float
    share = (scale(first[tag]) - scale(loss)) / (scale(first[tag]) - scale(last[tag]))
    row = {name: _between(first[name], last[name], share) for name in first if name in last}
    row |= {name: min(first[name], last[name]) for name in row if name.rpartition("/")[2] == "exact"}
    return row | {tag: loss}


def _between(first: float, last: float, share: float) -> float:
    return first if first == last else first + share * (last - first)
