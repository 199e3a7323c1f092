"""The steps after which a run is compared with its linearized network."""

import math
from collections.abc import Sequence
from typing import Literal

# Measurements per factor of ten in the number of steps, with steps="log".
_LOG_POINTS_PER_DECADE = 8


def is_scheduled(steps: int | Sequence[int] | Literal["log"], step: int) -> bool:
    """Whether to measure `step` optimizer steps after the capture.

    Measurements are every n steps, at listed steps, or at logarithmic ones.

    Example:
        >>> [step for step in range(100) if is_scheduled("log", step)]
        [0, 1, 2, 3, 4, 6, 7, 10, 13, 18, 24, 32, 42, 56, 75]
    """
    if isinstance(steps, int):
        return step % steps == 0
    if steps == "log":
        exponent = round(_LOG_POINTS_PER_DECADE * math.log10(step)) if step else 0
        return step in (0, round(10 ** (exponent / _LOG_POINTS_PER_DECADE)))
    return step in steps
