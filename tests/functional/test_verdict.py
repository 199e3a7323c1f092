"""The word that a run gets, and where it gets none."""

import math

import pytest

from lightning_ntk.functional import judge


def rows(distance: float, *, steps: int = 100, **last: float) -> list[dict[str, float]]:
    start = {"step": 0.0, "relative_weight_distance": 0.0, "displacement": 0.0, "linearized_loss": 1.0}
    end = {"step": float(steps), "relative_weight_distance": distance, "displacement": 1.0, "linearized_loss": 0.1}
    return [start, end | last]


@pytest.mark.parametrize(
    ("distance", "gap", "word"),
    [
        (0.0999, math.nan, "lazy"), (0.1, math.nan, "intermediate"), (0.4999, 0.3, "intermediate"), (0.5, 0.1, "rich"),
        (0.5, 0.0999, "intermediate"), (0.05, 0.4999, "lazy"), (0.05, 0.5, "intermediate"), (3.0, math.nan, "rich"),
    ],
)  # fmt: skip
def test_the_word_follows_from_distance_and_taylor_gap(distance: float, gap: float, word: str) -> None:
    verdict = judge(rows(distance, taylor_gap=gap))
    assert (verdict.word, verdict.distance, verdict.step) == (word, distance, 100)


@pytest.mark.parametrize(
    ("history", "options", "reason"),
    [
        ([], {}, "nothing was measured"),
        (rows(0.01, steps=9), {}, "9 steps"),
        (rows(0.01, linearized_loss=2.1), {}, "edge of stability"),
        (rows(0.01, linearized_loss=math.nan), {}, "edge of stability"),
        (rows(math.inf), {}, "edge of stability"),
        (rows(0.01, gradient_mismatch=0.2), {}, "20% of the run's gradient"),
        (rows(0.01, exact=0.0), {}, "does not follow"),
        (rows(0.01), {"resolution": 0.0101}, "99 times their rounding"),
        (rows(0.01), {"doubts": ["the batches were others"]}, "the batches were others"),
    ],
)
def test_a_number_that_would_mislead_gets_no_word(history, options, reason: str) -> None:
    verdict = judge(history, **options)
    assert verdict.word == "undecided"
    assert reason in verdict.reason
    assert reason in verdict.describe()


def test_the_sentence_has_the_accuracies_of_both_networks() -> None:
    sentence = judge(rows(0.671, accuracy=0.971, linearized_accuracy=0.913)).describe()
    assert sentence == (
        "After 100 steps the trained weights are 0.67 of their displacement away from the linearized ones; accuracy 97.1%, "
        "linearized 91.3%: not lazy."
    )


def test_steps_are_counted_from_the_capture() -> None:
    late = [{"step": 1000.0, "relative_weight_distance": 0.0}, {"step": 1005.0, "relative_weight_distance": 0.01}]
    assert "5 steps" in judge(late).reason
