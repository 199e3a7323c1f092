"""Judges from its scalars whether a run was lazy or rich."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

Word = Literal["lazy", "intermediate", "rich", "undecided"]

LAZY = 0.1
"""Below this relative weight distance a run is lazy; the kernel at initialization tells nine tenths of where the weights went."""
RICH = 0.5
"""From this relative weight distance on a run is rich; the linearized network misses half of the way or more."""
LEAST_STEPS = 10
"""Fewer steps than these decide nothing, because after one step both networks are the same by construction."""
LEAST_ROUNDINGS = 100
"""A displacement of fewer roundings of the weights than these has too few correct digits."""
GROWN = 2.0
"""A linearized network whose loss has grown by more than this factor has diverged."""
_EXPLAINED = 0.1


class Verdict(NamedTuple):
    """What a run was, and why.

    Attributes:
        word: "lazy", "intermediate", "rich" or "undecided".
        reason: Why, in a phrase.
        step: The step of the last measurement.
        distance: The relative weight distance there; NaN without a measurement.
        taylor_gap: The Taylor gap there; NaN where it was not measured.
        accuracy: The accuracies of the trained and the linearized network there; NaN where they were not measured.
    """

    word: Word
    reason: str
    step: int
    distance: float
    taylor_gap: float
    accuracy: tuple[float, float]

    def state(self) -> str:
        """The word and when, in a phrase."""
        return "nothing measured" if math.isnan(self.distance) else f"{self.word} after {self.step} steps"

    def describe(self) -> str:
        """One sentence: the distance, the accuracies and the word."""
        if math.isnan(self.distance):
            return f"Undecided: {self.reason}."
        trained, linearized = self.accuracy
        accuracies = (
            "" if math.isnan(trained + linearized) else f"; accuracy {trained:.1%}, linearized {linearized:.1%}"
        )
        word = {"lazy": "lazy", "rich": "not lazy", "intermediate": "partly lazy", "undecided": "undecided"}[self.word]
        why = f", because {self.reason}" if self.word == "undecided" else ""
        return (
            f"After {self.step} steps the trained weights are {self.distance:.2g} of their displacement away from the "
            f"linearized ones{accuracies}: {word}{why}."
        )


def judge(history: Sequence[Mapping[str, float]], *, resolution: float = 0.0, doubts: Sequence[str] = ()) -> Verdict:
    r"""Judges from the scalars of a run whether it was lazy.

    The word follows from the last relative weight distance :math:`d = |w_t - w_\text{lin}| / |w_t - w_0|`: "lazy" for
    :math:`d < 0.1`, "rich" for :math:`d \ge 0.5`, "intermediate" between them. It is "intermediate" too where the functions
    disagree with the weights: a large distance with a Taylor gap below 0.1 (linear there, but elsewhere), or a small one with
    a Taylor gap of 0.5 or more. It is "undecided" where the number would mislead.

    Args:
        history: Rows with "step" and the scalars of a monitor (see docs/scalars.md), in the order of the steps.
        resolution: The rounding of the weights, :math:`\epsilon |w_0|`; 0 if it is not known.
        doubts: Phrases on what makes the distances doubtful, such as a loss that is not the one that was linearized.

    Example:
        >>> rows = [{"step": 0, "relative_weight_distance": 0.0}, {"step": 50, "relative_weight_distance": 0.04}]
        >>> judge(rows).word
        'lazy'
    """
    measured = [row for row in history if "relative_weight_distance" in row]
    if not measured:
        return Verdict("undecided", "nothing was measured", 0, math.nan, math.nan, (math.nan, math.nan))
    last = measured[-1]
    distance, gap = last["relative_weight_distance"], last.get("taylor_gap", math.nan)
    accuracy = last.get("accuracy", math.nan), last.get("linearized_accuracy", math.nan)
    word, reason = _word(measured, distance, gap, resolution, doubts)
    return Verdict(word, reason, int(last["step"]), distance, gap, accuracy)


def _word(
    measured: Sequence[Mapping[str, float]], distance: float, gap: float, resolution: float, doubts: Sequence[str]
) -> tuple[Word, str]:
    first, last = measured[0], measured[-1]
    moved = last.get("displacement", math.inf)
    losses = [row["linearized_loss"] for row in measured if "linearized_loss" in row]
    if doubts:
        return "undecided", "; ".join(doubts)
    if last.get("gradient_mismatch", 0.0) > _EXPLAINED:
        return (
            "undecided",
            f"{last['gradient_mismatch']:.0%} of the run's gradient is not that of the loss that is linearized",
        )
    if last.get("exact", 1.0) == 0:
        return "undecided", "the run did what the linearized network does not follow"
    if last["step"] - first["step"] < LEAST_STEPS:
        return (
            "undecided",
            f"the run has {last['step'] - first['step']:g} steps, and fewer than {LEAST_STEPS} decide nothing",
        )
    if not math.isfinite(distance) or (losses and not losses[-1] <= GROWN * losses[0]):
        return "undecided", "the linearized network diverges at this learning rate, beyond the edge of stability"
    if moved < LEAST_ROUNDINGS * resolution:
        return (
            "undecided",
            f"the weights have moved by {moved:.2g}, which is {moved / resolution:.2g} times their rounding",
        )
    if distance >= RICH and gap < LAZY:
        return (
            "intermediate",
            f"the network is still linear where it went, with a Taylor gap of {gap:.2g}, but went elsewhere",
        )
    if distance < LAZY and gap >= RICH:
        return (
            "intermediate",
            f"the weights are close, but the outputs are not linear in them, with a Taylor gap of {gap:.2g}",
        )
    if distance < LAZY:
        return "lazy", f"the distance is below {LAZY}"
    if distance >= RICH:
        return "rich", f"the distance is at least {RICH}"
    return "intermediate", f"the distance is between {LAZY} and {RICH}"
