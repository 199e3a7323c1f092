import csv
import io
import math
from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet
import pytest

from lightning_ntk.sweep import Results, plot_scaling
from lightning_ntk.sweep.queue import Entry


def entry(trial: int, configuration: dict[str, Any], rows: list[dict[str, float]], state: Any = "complete") -> Entry:
    return Entry(configuration, state, trial, 0, rows, None, None, 1.0)


def law(width: int, seed: int, step: float) -> float:
    return 2 * width**-0.5 * 1.1**seed * (step + 1)


@pytest.fixture
def results() -> Results:
    """Three widths, three seeds, two activations with exponents -1/2 and -1/4; two steps each."""
    points = [(w, s, a) for a in ("tanh", "relu") for w in (16, 64, 256) for s in (-1, 0, 1)]
    entries = [
        entry(
            number,
            {"width": w, "seed": s, "activation": a, "shape": [8, 8]},
            [{"step": t, "d": law(w, s, t) ** (1 if a == "tanh" else 0.5)} for t in (0.0, 9.0)],
        )
        for number, (w, s, a) in enumerate(points)
    ]
    return Results([*entries, entry(99, {"width": 1024}, [], "running")])


def test_one_row_for_each_configuration_and_step(results: Results) -> None:
    assert len(results.rows) == 36
    assert results.rows[0] == {
        "trial": 0, "width": 16, "seed": -1, "activation": "tanh", "shape": [8, 8], "step": 0.0, "d": law(16, -1, 0),
    }  # fmt: skip
    assert len(results.final) == len(results) == 18
    assert {row["step"] for row in results.final} == {9.0}
    assert {row["step"] for row in results.at_step(0)} == {0.0}
    assert results.columns == ["trial", "width", "seed", "activation", "shape", "step", "d"]


def test_configurations_may_have_other_parameters_and_rows_other_scalars() -> None:
    results = Results([entry(0, {"a": 1}, [{"x": 1.0}]), entry(1, {"b": "s"}, [{"step": 2.0, "y": math.nan}])])
    assert results.columns == ["trial", "a", "b", "step", "x", "y"]
    assert results.csv() == "trial,a,b,step,x,y\n0,1,,,1.0,\n1,,s,2.0,,nan\n"


def test_csv_is_read_back_exactly(results: Results, tmp_path: Path) -> None:
    results.to_csv(tmp_path / "t.csv")
    read = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text())))
    assert [float(row["d"]) for row in read] == [row["d"] for row in results.rows]


def test_parquet_and_pandas_have_the_same_table(results: Results, tmp_path: Path) -> None:
    results.to_parquet(tmp_path / "t.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pylist() == results.rows
    frame = results.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.groupby(["activation", "step"])["d"].count().tolist() == [9] * 4
    assert frame["d"].tolist() == [row["d"] for row in results.rows]


@pytest.mark.parametrize(("method", "missing"), [("to_parquet", "pyarrow"), ("to_pandas", "pandas")])
def test_optional_packages_are_named_when_they_lack(
    results: Results, method: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {missing}"):
        getattr(results, method)(*["x"] * (method == "to_parquet"))


def test_markdown_is_aligned_and_short(results: Results) -> None:
    lines = results.markdown(columns=["width", "activation", "d"]).splitlines()
    assert lines[0] == "| width | activation | d      |"
    assert lines[2] == "| 16    | tanh       | 4.5455 |"
    assert len(lines) == 20
    assert results.markdown().splitlines()[0] == "| trial | width | seed | activation | shape  | step | d      |"
    assert results.columns_within(34) == ["trial", "width", "seed", "step"]
    with pytest.raises(ValueError, match="Expected argument `columns` to be one of"):
        results.markdown(columns=["loss"])


def test_slopes_are_those_of_the_law_and_seeds_are_repetitions(results: Results) -> None:
    slope = results.slope("width", "d", where={"activation": "tanh"})
    assert slope.slope == pytest.approx(-0.5)
    assert slope.low < -0.5 < slope.high
    assert slope.count == 9
    assert results.slope("width", "d", where={"activation": "relu"}).slope == pytest.approx(-0.25)
    assert results.slope("width", "d", where={"activation": "tanh"}, step=0).at(16) == pytest.approx(0.5)


def test_means_are_over_seeds_only(results: Results) -> None:
    means = results.mean("d", over="seed")
    assert len(means) == 6
    configuration, mean = means[0]
    assert configuration == {"width": 16, "activation": "tanh", "shape": [8, 8]}
    assert mean.mean == pytest.approx(law(16, 0, 9) * (1.1 + 1 + 1 / 1.1) / 3)
    assert mean.count == 3
    _, mean = results.mean("d", over="seed", geometric=True)[0]
    assert mean.mean == pytest.approx(law(16, 0, 9))
    assert mean.low > 0


def test_series_are_split_by_the_parameters_that_vary(results: Results) -> None:
    series = results.series("width", "d", over="seed")
    assert list(series) == [(("activation", "tanh"),), (("activation", "relu"),)]
    assert [x for x, _ in series[(("activation", "tanh"),)]] == [16] * 3 + [64] * 3 + [256] * 3
    assert len(results.series("width", "d")) == 6


def test_points_without_a_logarithm_are_left_out_and_this_is_said(results: Results) -> None:
    diverged = entry(50, {"width": 4096, "seed": 0, "activation": "tanh"}, [{"step": 9.0, "d": math.nan}])
    with pytest.warns(
        UserWarning, match=r"1 of 19 points have no positive, finite 'width' and 'd' and are left out, .*4096"
    ):
        series = Results([*results._entries, diverged]).series("width", "d", over="seed")
    assert sum(len(points) for points in series.values()) == 18


def test_unknown_names_are_refused_with_those_that_are_known(results: Results) -> None:
    with pytest.raises(ValueError, match=r"Expected argument `x` to be one of \['width', .* but got 'depth'"):
        results.slope("depth", "d")
    with pytest.raises(ValueError, match=r"Expected argument `y` to be one of \['d'\] but got 'e'"):
        results.slope("width", "e")
    with pytest.raises(ValueError, match="Expected argument `over` to be one of"):
        results.mean("d", over="sede")
    with pytest.raises(ValueError, match="Expected argument `where` to be one of"):
        results.where({"act": 1})
    with pytest.raises(ValueError, match=r"Expected complete configurations with {'width': 3} but there is none"):
        results.where({"width": 3})
    with pytest.raises(ValueError, match=r"at which something was measured but got 5; there are \[0.0, 9.0\]"):
        results.slope("width", "d", step=5)
    with pytest.raises(ValueError, match="numbers for the x axis but 'activation' has the value 'tanh'"):
        results.slope("activation", "d")


def test_a_plot_has_a_line_with_its_slope_for_each_series(results: Results) -> None:
    _, axis = plot_scaling(results, "width", "d", over="seed")
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels[0].startswith("activation=tanh: slope -0.50, 95% [-0.5")
    assert labels[1].startswith("activation=relu: slope -0.25, 95% [")
    assert axis.get_xscale() == axis.get_yscale() == "log"
    assert len(axis.containers) == 6  # a mean with its interval for each width and activation
    means = results.where({"activation": "tanh"}).mean("d", over="seed", geometric=True)
    bars = [container.lines[2][0].get_segments()[0][:, 1].tolist() for container in axis.containers[:3]]
    assert bars == [pytest.approx([mean.low, mean.high]) for _, mean in means]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["16", "64", "256"]
    _, axis = plot_scaling(results.where({"activation": "tanh"}), "width", "d", over="seed", step=0)
    assert axis.get_ylabel() == "d at step 0"
    fitted = axis.get_lines()[1].get_ydata()
    assert fitted.tolist() == pytest.approx([0.5, 0.125])
