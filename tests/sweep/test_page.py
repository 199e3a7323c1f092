"""The page of a sweep."""

import math
import re

import pytest

from lightning_ntk.sweep import Results
from lightning_ntk.sweep.queue import Entry
from tests.report.test_report import Tags

LAZY = ("lazy", "the distance is below 0.1")
UNSTABLE = ("undecided", "the learning rate is above the largest for which the linearized network is stable")


def history(width: int, seed: int, steps=(0, 1, 2, 5, 10, 20, 50, 100, 200)) -> list[dict[str, float]]:
    """The wider, the faster, and the less far at equal loss."""
    rows = []
    for step in steps:
        progress = 0.01 * width**0.5 * step
        distance = 0.2 * width**-0.2 * 1.05**seed * progress
        rows.append(
            {"step": float(step), "ntk/relative_weight_distance": distance, "ntk/taylor_gap": distance / 2,
             "ntk/loss": 2 * math.exp(-progress)}
        )  # fmt: skip
    return rows


def sweep(widths=(16, 64, 256), seeds=(-1, 0, 1), verdict=LAZY, **others) -> Results:
    points = [(width, seed) for width in widths for seed in seeds]
    return Results(
        Entry({"width": w, "seed": s, "lr": 0.1, **others}, "complete", i, 0, history(w, s), None, None, 1.0, verdict)
        for i, (w, s) in enumerate(points)
    )


def text(page: str) -> str:
    return re.sub(r"<svg.*?</svg>|<[^>]*>", " ", page, flags=re.DOTALL)


def test_the_page_stands_alone_and_says_what_happens_at_equal_steps_and_loss(tmp_path) -> None:
    results = sweep()
    path = results.report(tmp_path / "new" / "sweep.html", title="A < B")
    page = path.read_text()
    tags = Tags(page)
    assert (tags.open, tags.addresses) == ([], [])
    assert len(page) < 500_000
    assert page.count("<figure") == 6
    shown = text(page)
    assert "A &lt; B" in shown
    assert "9 runs: 9 lazy." in shown
    assert "Over width, the distance rises at step 200 (slope 0.30," in shown
    # The narrowest ends at 2 exp(-8) = 0.00067, which all reach.
    assert "and falls at loss 0.00068 (slope -0.20," in shown
    assert "What to be careful with" not in shown
    assert page == results.report(path, title="A < B").read_text()


def test_the_table_has_geometric_means_over_seeds(tmp_path) -> None:
    page = sweep(widths=(16,)).report(tmp_path / "sweep.html", loss=1.0).read_text()
    expected = sweep(widths=(16,)).at(loss=1.0).mean("ntk/relative_weight_distance", geometric=True)[0][1]
    assert f"<td>{expected.mean:.3g} [{expected.low:.3g}, {expected.high:.3g}]</td>" in page
    assert "<td>3 lazy</td>" in page
    assert "How far, over" not in page  # of one configuration


def test_what_decides_nothing_is_said(tmp_path) -> None:
    entries = [*sweep(verdict=None)._entries, *sweep(widths=(1024,), seeds=(0,), verdict=UNSTABLE)._entries]
    stuck = Entry({"width": 4, "seed": 0, "lr": 0.1}, "complete", 77, 0, history(4, 0, (0, 1, 200)), None, None, 1.0)
    for row in stuck.rows:
        row["ntk/loss"] = 2.0
    page = text(Results([*entries, stuck]).report(tmp_path / "sweep.html").read_text())
    assert "1 undecided" in page
    assert "Undecided, 1 of 11 runs (width=1024, seed=0): the learning rate is above the largest" in page
    assert "1 of 11 runs never fall to a loss of" in page
    assert "The study keeps no verdicts" in page


def test_curves_of_long_runs_and_of_many_configurations_keep_the_page_small(tmp_path) -> None:
    for widths, steps in ((61, range(0, 300, 2)), (7, range(300))):
        entries = [
            Entry({"width": width, "seed": 0}, "complete", width, 0, history(width, 0, steps), None, None, 1.0)
            for width in range(1, widths)
        ]
        assert len(Results(entries).report(tmp_path / "sweep.html").read_text()) < 500_000


def test_what_is_swept_need_not_be_a_number(tmp_path) -> None:
    entries = [e for name in ("tanh", "relu") for e in sweep(widths=(64,), activation=name)._entries]
    page = text(Results(entries).report(tmp_path / "sweep.html").read_text())
    assert "activation" in page
    assert "6 runs: 6 lazy." in page


def test_a_page_needs_a_monitor_and_known_names(tmp_path) -> None:
    with pytest.raises(ValueError, match="Return the LinearizationMonitor from the objective"):
        Results([Entry({"a": 1}, "complete", 0, 0, [{"loss": 1.0}], None, None, 1.0)]).report(tmp_path / "x.html")
    with pytest.raises(ValueError, match="Expected argument `x` to be one of"):
        sweep().report(tmp_path / "x.html", x="depth")
