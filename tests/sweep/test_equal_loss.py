"""Runs at equal loss."""

import math

import pytest

from lightning_ntk.sweep import Results, log_log_slope
from lightning_ntk.sweep.equal_loss import row_at_loss
from tests.sweep.test_results import entry


def exponential(width: int, seed: int = 0) -> list[dict[str, float]]:
    """A run whose loss falls exponentially, the faster the wider, and whose distance is linear in the logarithm of the loss."""
    return [
        {
            "step": t,
            "ntk/loss": math.exp(-width * t / 1000),
            "ntk/d": width**-0.5 * 1.1**seed * width * t / 1000,
            "ntk/exact": 1.0,
        }
        for t in (0.0, 1.0, 3.0, 10.0, 40.0)
    ]


@pytest.fixture
def results() -> Results:
    points = [(width, seed) for width in (64, 128, 256) for seed in (-1, 0, 1)]
    return Results([entry(i, {"width": w, "seed": s}, exponential(w, s)) for i, (w, s) in enumerate(points)])


def test_what_is_linear_in_the_logarithm_of_the_loss_is_interpolated_exactly(results: Results) -> None:
    at = results.at(loss=0.3)
    for row in at.final:
        assert row["step"] == pytest.approx(-math.log(0.3) * 1000 / row["width"], rel=1e-12)
        assert row["ntk/d"] == pytest.approx(-math.log(0.3) * row["width"] ** -0.5 * 1.1 ** row["seed"], rel=1e-12)
        assert row["ntk/loss"] == 0.3
    assert at.slope("width", "ntk/d").slope == pytest.approx(-0.5)  # falls at equal loss
    assert results.slope("width", "ntk/d", step=10).slope == pytest.approx(0.5)  # and rises at equal steps


def test_the_first_time_counts_and_a_row_that_is_not_exact_stays_so() -> None:
    rows = [
        {"step": 0.0, "loss": 4.0, "exact": 1.0},
        {"step": 2.0, "loss": 1.0, "exact": 0.0, "late": 3.0},
        {"step": 3.0, "loss": 3.0, "exact": 0.0},
        {"step": 4.0, "loss": 0.5, "exact": 0.0},
    ]
    assert row_at_loss(rows, 2.0, "loss") == {"step": 1.0, "loss": 2.0, "exact": 0.0}
    assert row_at_loss(rows, 0.5, "loss")["step"] == 4.0
    values = [row_at_loss(rows, loss, "loss")["step"] for loss in (3.9, 3.0, 2.0, 1.1, 1.0)]
    assert values == sorted(values)


def test_a_loss_that_falls_below_zero_is_interpolated_itself() -> None:
    rows = [{"step": 0.0, "loss": 1.0}, {"step": 1.0, "loss": math.nan}, {"step": 4.0, "loss": -1.0}]
    assert row_at_loss(rows, 0.5, "loss") == {"step": 1.0, "loss": 0.5}


def test_runs_that_never_reach_the_loss_are_nan_and_this_is_said(results: Results) -> None:
    with pytest.warns(UserWarning, match=r"3 of 9 runs never fall to ntk/loss = 0.05, .* for example {'width': 64"):
        at = results.at(loss=0.05)
    assert [math.isnan(row["ntk/d"]) for row in at.final] == [True] * 3 + [False] * 6
    with pytest.warns(UserWarning, match="9 of 9 runs never fall to ntk/loss = 2, or begin below it"):
        results.at(loss=2.0)
    with pytest.warns(UserWarning, match="3 of 9 points have no positive, finite"):
        series = at.series("width", "ntk/d", over="seed")
    ((_, points),) = series.items()
    assert log_log_slope(*zip(*points, strict=True)).slope == pytest.approx(-0.5)


def test_what_cannot_be_a_loss_is_refused(results: Results) -> None:
    with pytest.raises(ValueError, match="`loss` to be a positive number but got 0"):
        results.at(loss=0)
    with pytest.raises(ValueError, match=r"Expected results with the scalar 'loss' but there are \['x'\]"):
        Results([entry(0, {"a": 1}, [{"x": 1.0}])]).at(loss=1)
