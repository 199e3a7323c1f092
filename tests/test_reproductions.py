"""The reproductions of published results run at a small size, print their tables and draw their figures."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPRODUCTIONS = Path(__file__).parent.parent / "examples" / "reproductions"
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.syspath_prepend(str(REPRODUCTIONS))

    def run(script: str, options: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *options.split(), "--output", str(tmp_path)])
        runpy.run_path(str(REPRODUCTIONS / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def table(printed: str, first: str) -> list[list[str]]:
    """The lines of the Markdown table whose header begins with `first`, without the header."""
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} "))
    body = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        body.append([cell.strip() for cell in line.strip("|").split("|")])
    return body


def require_figures(directory: Path, *names: str) -> None:
    for name in names:
        assert (directory / name).stat().st_size > 10_000


def test_slopes_over_the_width(tmp_path: Path, run: Run) -> None:
    options = "--widths 16 256 --seeds 0 --steps 4 --samples 20 --workers 0"
    printed = run("widths.py", options)
    found = {tuple(cells[:2]): float(cells[2].split()[0]) for cells in table(printed, "quantity")}
    assert len(found) == 12
    assert found["relative weight distance", "tanh"] < 0
    assert found["kernel change", "tanh"] < -0.3
    assert found["change/hidden", "tanh"] < -0.5  # at these widths; the exponents of wide networks are -1/2, -1 and -1
    assert len(table(printed, "steps")) == 2
    require_figures(tmp_path, "widths-ntk.svg", "widths-standard.svg")
    assert (tmp_path / "widths.csv").read_text().count("\n") == 1 + 8 * 3


def test_slopes_over_the_output_scale(tmp_path: Path, run: Run) -> None:
    printed = run("output_scale.py", "--scales 10 100 --seeds 0 --width 16 --steps 5 --samples 20 --workers 0")
    found = {tuple(cells[:2]): float(cells[2].split()[0]) for cells in table(printed, "quantity")}
    for quantity in ("relative weight distance", "taylor gap", "kernel change", "relative displacement"):
        assert found[quantity, "centered"] == pytest.approx(-1, abs=0.01)
        assert found[quantity, "not centered"] == pytest.approx(0, abs=0.1)
    require_figures(tmp_path, "output-scale.svg")


def test_kernels_through_training(tmp_path: Path, run: Run) -> None:
    printed = run("late_kernels.py", "--seeds 0 --width 16 --steps 12 --captures 0 4 --samples 64")
    kernels = table(printed, "step")
    assert [cells[0] for cells in kernels] == ["0", "1", "2", "3", "4", "6", "12"]
    assert float(kernels[0][2]) == float(kernels[-1][3]) == 0
    assert float(kernels[-1][2]) == float(kernels[0][3]) > 0
    captured = table(printed, "captured")
    assert [cells[:2] for cells in captured] == [["0", "12"], ["4", "8"]]
    require_figures(tmp_path, "late-kernels.svg")


def test_learning_rates_through_the_edge(tmp_path: Path, run: Run) -> None:
    printed = run("learning_rate.py", "--fractions 0.5 2 --seeds 0 --width 128 --steps 30 --samples 20 --workers 0")
    for activation in ("tanh", "relu"):
        assert f"{activation}: the linearized predictions differ by less than 0.5 of what they changed up to" in printed
    assert "= 0.5, and no longer at 2." in printed
    stable, unstable = table(printed, "lr")
    assert float(stable[3]) < 1 < 1e6 < float(unstable[3])  # the loss of the linearized network
    require_figures(tmp_path, "learning-rate.svg")


def test_published_formulas(tmp_path: Path, run: Run) -> None:
    printed = run("closed_forms.py", "--width 32 --steps 200 --samples 60 --sigma-w 1")
    rows = table(printed, "regime")
    assert len(rows) == 2 * 2 * 4
    errors: dict[str, list[float]] = {"lightning_ntk": [], "published": []}
    for row in rows:
        errors[row[2]].append(float(row[3]))
    assert 5 * max(errors["lightning_ntk"]) < max(errors["published"]) < 1e-2
    assert "sigma_w = 1: condition number of the kernel" in printed
    require_figures(tmp_path, "closed-forms.svg")


def test_kernels_before_and_after_training(tmp_path: Path, run: Run) -> None:
    printed = run("after_kernel.py", "--widths 16 24 --seeds 0 --steps 300 --samples 128")
    (first, *_, last) = table(printed, "step")
    assert (first[0], last[0], len(first)) == ("0", "300", 5)
    for before, after in zip(first[1:], last[1:], strict=True):  # the kernels' errors and the networks'
        assert float(after) < float(before)
    require_figures(tmp_path, "after-kernel.svg")


def test_sharpness_of_the_panel_is_that_of_the_hessian(tmp_path: Path, run: Run) -> None:
    printed = run("sharpening.py", "--lrs 0.5 --width 8 --steps 20 --samples 40")
    rows = table(printed, "lr")
    assert [row[1] for row in rows] == ["0", "3", "7", "20"]
    for _, _, few, all_images, hessian, loss, _ in rows:
        # On most of the images, and without the part of the Hessian that vanishes with the residual.
        assert float(few) == pytest.approx(float(all_images), rel=0.1)
        assert float(hessian) == pytest.approx(float(all_images), rel=2 * float(loss))
    assert "lr = 0.5: the edge goes from" in printed
    require_figures(tmp_path, "sharpening.svg")


def test_generalization_after_the_fit(tmp_path: Path, run: Run) -> None:
    printed = run("grokking.py", "--alphas 1 4 --epsilon 0.25 --steps 150 --inputs 16 --width 40")
    rows = {tuple(row[:2]): row for row in table(printed, "alpha")}
    for alpha in ("1", "4"):
        _, _, training, test, linearized, linearized_test, _ = rows[alpha, "0.5"]
        assert 0 < int(training) <= int(linearized)
        assert int(training) < int(test)
        assert linearized_test == "> 150"
    assert float(rows["4", "0.2"][-1]) < float(rows["1", "0.2"][-1])  # lazier
    require_figures(tmp_path, "grokking.svg")


def test_alignment_by_layer(tmp_path: Path, run: Run) -> None:
    printed = run("alignment.py", "--seeds 0 --depth 2 --width 16 --steps 60 --samples 256")
    rows = table(printed, "kernel")
    assert [row[0] for row in rows] == ["all", "layer 1", "layer 2", "layer 3"]
    assert float(rows[0][3].split()[0]) > 1.1
    require_figures(tmp_path, "alignment.svg")
