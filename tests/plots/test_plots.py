"""What figures show: the data of their lines, labels, scales and limits."""

import io
import math
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ntk import LinearizationMonitor
from lightning_ntk.functional.verdict import LAZY, RICH
from lightning_ntk.plots import (
    plot_accuracies,
    plot_effective_time,
    plot_history,
    plot_kernel,
    plot_over_loss,
    plot_parameters,
    plot_predictions,
    plot_regimes,
    plot_runs,
    plot_spectrum,
    plot_values,
    read_history,
)

STEPS = [0, 1, 2, 5, 10, 30, 100]


def make_history(scale: float = 1.0) -> list[dict[str, float]]:
    """A made-up history; at step 1 distances are zero to rounding, as after one full-batch step."""
    return [
        {
            "step": float(step),
            "relative_weight_distance": scale * (0.0 if step == 0 else 1e-7 if step == 1 else 0.003 * step),
            "prediction_rmse": scale * 0.01 * step,
            "loss": scale / (1 + step),
            "linearized_loss": scale / (1 + 0.9 * step),
            "accuracy": 0.1 + 0.009 * step,
            "linearized_accuracy": 0.1 + 0.008 * step,
            "taylor_accuracy": 0.1 + 0.007 * step,
            "kernel_distance": 1e-5 * step**2,
            "kernel_change": 0.01 * step,
            "parameter/body.0.weight": 1e-6 if step < 2 else 0.01 * step,
            "parameter/body.0.bias": 0.0 if step == 1 else 0.02 * step,
            "closest_time": 0.8 * step,
            "closest_distance": 0.002 * step,
            "distance_floor": 0.001 * step,
        }
        | ({"kernel_velocity": 1e-6 * step} if step else {})
        for step in STEPS
    ]


def column(history: list[dict[str, float]], key: str, start: int = 0) -> list[float]:
    return [row[key] for row in history[start:]]


def curves(axis: Any) -> list[Any]:
    """The lines of an axis over its data, without thresholds and what stands at its bottom."""
    return [line for line in axis.lines if line.get_transform() == axis.transData]


def save(figure: Any, tmp_path: Path) -> None:
    """Renders the figure, where errors of layout and text would show."""
    figure.savefig(tmp_path / "figure.png")


def test_history(tmp_path: Path) -> None:
    history = make_history()
    figure, (distance, loss) = plot_history(history, "A run")
    assert list(distance.lines[0].get_xdata()) == STEPS[1:]
    assert list(distance.lines[0].get_ydata()[1:]) == column(history, "relative_weight_distance", 2)
    assert [list(line.get_ydata()) for line in loss.lines] == [column(history, k) for k in ("loss", "linearized_loss")]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["trained network", "linearized network"]
    assert loss.lines[0].get_color() != loss.lines[1].get_color()
    assert loss.lines[0].get_linestyle() != loss.lines[1].get_linestyle()
    assert (distance.get_xscale(), loss.get_xscale()) == ("log", "symlog")
    assert {axis.get_yscale() for axis in (distance, loss)} == {"log"}
    assert {axis.get_xlabel() for axis in (distance, loss)} == {"optimizer step"}
    assert distance.get_ylabel().startswith("relative weight distance\n")
    assert loss.get_ylabel() == "loss on the reference set"
    assert figure.get_suptitle() == "A run"
    # The point at rounding does not take most of the axis, and no line goes there.
    assert 1e-3 < distance.get_ylim()[0] < 0.006
    assert math.isnan(distance.lines[0].get_ydata()[0])
    bottom = distance.lines[1]
    assert (list(bottom.get_xdata()), list(bottom.get_ydata()), bottom.get_linestyle()) == ([1], [0], "None")
    assert bottom.get_transform() == distance.get_xaxis_transform()
    save(figure, tmp_path)


def test_thresholds_of_the_verdict_are_lines_with_a_name_where_they_are_in_view() -> None:
    def thresholds(axis: Any) -> list[float]:
        return [line.get_ydata()[0] for line in axis.lines if line.get_transform() == axis.get_yaxis_transform("grid")]

    _, (distance, loss) = plot_history(make_history())
    assert thresholds(distance) == [LAZY]
    assert [text.get_text() for text in distance.texts] == ["lazy below 0.1"]
    assert thresholds(loss) == []
    assert thresholds(plot_history(make_history(10)).axes[0]) == [LAZY, RICH]
    _, axes = plot_runs([(f"{i}", make_history(10)) for i in range(7)])
    assert [thresholds(axis) for axis in axes] == [[LAZY, RICH]] * 7


def test_negative_values_have_a_linear_axis_and_are_shown() -> None:
    history = [{"step": float(s), "weight_cosine": 1 - 0.02 * s} for s in range(0, 100, 10)]
    _, (axis,) = plot_runs({"a": history}, ["weight_cosine"])
    assert axis.get_yscale() == "linear"
    assert list(axis.lines[0].get_ydata()) == column(history, "weight_cosine", 1)


def test_history_with_some_scalars_only() -> None:
    history = make_history()
    _, axes = plot_history([{"step": row["step"], "loss": row["loss"]} for row in history])
    assert len(axes) == 1
    assert len(axes[0].lines) == 1
    _, axes = plot_history([{k: row[k] for k in ("step", "relative_weight_distance")} for row in history])
    assert [axis.get_ylabel().split("\n")[0] for axis in axes] == ["relative weight distance"]


def test_missing_and_infinite_values_are_left_out() -> None:
    history = make_history()
    history[3]["linearized_loss"] = math.inf
    history[4]["linearized_loss"] = math.nan
    del history[5]["linearized_loss"]
    _, (_, loss) = plot_history(history)
    assert list(loss.lines[1].get_xdata()) == [0, 1, 2, 100]
    assert list(loss.lines[0].get_xdata()) == STEPS


def test_short_runs_and_narrow_ranges_have_linear_axes() -> None:
    history = [{"step": float(s), "relative_weight_distance": 0.1 + 0.01 * s, "loss": 1.0} for s in range(6)]
    _, (distance, loss) = plot_history(history)
    assert {axis.get_xscale() for axis in (distance, loss)} == {"linear"}
    assert {axis.get_yscale() for axis in (distance, loss)} == {"linear"}


def test_axes_of_one_decade_have_more_labels_than_one(tmp_path: Path) -> None:
    history = [{"step": float(s), "loss": 0.1 / (1 + 0.01 * s)} for s in range(0, 1000, 100)]
    figure, (loss,) = plot_history(history)
    save(figure, tmp_path)
    low, high = loss.get_ylim()
    labels = [t.get_text() for t in loss.get_yticklabels() if low <= t.get_position()[1] <= high]
    assert labels == ["0.01", "0.02", "0.05", "0.1"]


def test_accuracies_are_in_percent(tmp_path: Path) -> None:
    history = make_history()
    figure, axis = plot_accuracies(history)
    for line, key in zip(axis.lines, ("accuracy", "linearized_accuracy", "taylor_accuracy"), strict=True):
        assert list(line.get_ydata()) == column(history, key)
    assert axis.get_ylabel() == "accuracy on the reference set"
    assert axis.get_yscale() == "linear"
    assert axis.get_ylim()[0] >= 0
    assert 1 <= axis.get_ylim()[1] <= 1.01
    assert len({line.get_linestyle() for line in axis.lines}) == 3
    save(figure, tmp_path)
    assert "40%" in [label.get_text() for label in axis.get_yticklabels()]


def test_kernel(tmp_path: Path) -> None:
    history = make_history()
    figure, axes = plot_kernel(history)
    for axis, key in zip(axes, ("kernel_distance", "kernel_change", "kernel_velocity"), strict=True):
        assert list(axis.lines[0].get_xdata()) == STEPS[1:]
        assert list(axis.lines[0].get_ydata()) == column(history, key, 1)
        assert axis.get_ylabel().startswith(key.replace("_", " "))
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert "per step" in axes[2].get_ylabel()
    _, axes = plot_kernel([{"step": row["step"], "kernel_change": row["kernel_change"]} for row in history])
    assert len(axes) == 1
    save(figure, tmp_path)


def test_effective_time(tmp_path: Path) -> None:
    history = make_history()
    figure, (time, distance) = plot_effective_time(history)
    closest, diagonal = time.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == STEPS[1:]
    assert list(closest.get_ydata()) == column(history, "closest_time", 1)
    assert "steps" in time.get_ylabel()
    drawn = [list(line.get_ydata()) for line in curves(distance)]
    keys = "relative_weight_distance", "closest_distance", "distance_floor"
    assert [line[1:] for line in drawn] == [column(history, key, 2) for key in keys]
    assert len(distance.get_legend().get_texts()) == 3
    save(figure, tmp_path)


def test_parameters_are_cells_in_logarithmic_color(tmp_path: Path) -> None:
    history = make_history()
    figure, axis = plot_parameters(history)
    mesh = axis.collections[0]
    cells = mesh.get_array()
    assert cells.shape == (2, 6)  # two parameters, six measurements after step 0
    torch.testing.assert_close(torch.tensor(cells[:, -1]), torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert type(mesh.norm).__name__ == "LogNorm"
    # Zero and rounding have the color of a thousandth of the largest, and do not stretch the scale.
    assert (mesh.norm.vmin, mesh.norm.vmax) == (pytest.approx(0.002), pytest.approx(2.0))
    assert cells[0, 0] == cells[1, 0] == mesh.norm.vmin
    assert [label.get_text() for label in axis.get_yticklabels()] == ["body.0.weight", "body.0.bias"]
    assert axis.yaxis_inverted()
    labels = {label.get_position()[0]: label.get_text() for label in axis.get_xticklabels()}
    assert labels == {column + 0.5: f"{STEPS[1:][column]}" for column in range(6)}
    assert figure.axes[1].get_ylabel() == "relative weight distance"
    save(figure, tmp_path)


def test_many_parameters_with_long_names_stay_readable(tmp_path: Path) -> None:
    names = [f"parameter/transformer.encoder.layers.{i}.attention.projection.weight" for i in range(200)]
    history = [{"step": float(s)} | dict.fromkeys(names, 0.01 * s) for s in range(1, 61)]
    del history[5][names[7]]
    figure, axis = plot_parameters(history)
    assert figure.get_figheight() <= 14
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert len(labels) <= 90
    assert labels[0] == "…ayers.0.attention.projection.weight"
    assert len(set(labels)) == len(labels)
    assert all(len(label) <= 36 for label in labels)
    assert len(axis.get_xticklabels()) <= 14
    assert "60" in [label.get_text() for label in axis.get_xticklabels()]
    assert axis.collections[0].get_array().mask[7, 5]
    save(figure, tmp_path)


def test_long_names_are_cut_at_the_front() -> None:
    names = ["a.weight", "a" * 36, "b" * 40 + ".weight"]
    _, axis = plot_parameters([{"step": 1.0} | {f"parameter/{name}": 0.5 for name in names}])
    assert [label.get_text() for label in axis.get_yticklabels()] == [*names[:2], "…" + "b" * 28 + ".weight"]


def test_spectrum(tmp_path: Path) -> None:
    eigenvalues = torch.tensor([0.0, 1e-3, 100.0, 1.0] + [1e-4] * 30, dtype=torch.float64)
    residual = torch.tensor([1.0, 2.0, 4.0, 2.0] + [0.0] * 30, dtype=torch.float64)
    figure, (spectrum, energy) = plot_spectrum(eigenvalues, residual, time=10.0)
    assert list(spectrum.lines[0].get_ydata()[:3]) == [100.0, 1.0, 1e-3]
    assert len(spectrum.lines[0].get_ydata()) == 33  # a zero has no place on a logarithmic axis
    shares, cumulative = (torch.as_tensor(line.get_ydata()) for line in energy.lines)
    torch.testing.assert_close(shares[:3], torch.tensor([16.0, 4.0, 4.0], dtype=torch.float64) / 25)
    torch.testing.assert_close(cumulative, shares.cumsum(0))
    assert shares[-1] == 1 / 25
    assert spectrum.get_yscale() == energy.get_yscale() == energy.get_xscale() == "log"
    assert "eigenvalue" in spectrum.get_ylabel()
    assert "energy" in energy.get_ylabel()
    assert "rank" in energy.get_xlabel()
    # 100 and 1 are above 1 / 10, and have 20 of 25 parts of the energy.
    assert "2 of 34 modes" in spectrum.get_title()
    assert "80.0%" in spectrum.get_title()
    _, (spectrum, _) = plot_spectrum(eigenvalues, residual)
    assert "modes learned" not in spectrum.get_title()
    save(figure, tmp_path)


def test_predictions_of_few_outputs_have_a_panel_each(tmp_path: Path) -> None:
    real = torch.randn(11, 3)
    linear = real + 0.1
    figure, axes = plot_predictions(real, linear, names=["cat", "dog", "cow"])
    for k, (axis, name) in enumerate(zip(axes, ("cat", "dog", "cow"), strict=True)):
        points = axis.lines[1]
        torch.testing.assert_close(torch.as_tensor(points.get_xdata()), real[:, k].double())
        torch.testing.assert_close(torch.as_tensor(points.get_ydata()), linear[:, k].double())
        assert axis.get_title() == f"{name}  rms 0.1"
        assert axis.get_xlim() == axis.get_ylim() == axes[0].get_xlim()
        assert axis.get_aspect() == 1
    assert axes[0].get_xlim()[0] < real.min()
    assert axes[0].get_xlim()[1] > linear.max()
    assert figure.get_supxlabel() == "output of the trained network"
    assert figure.get_supylabel() == "output of the linearized network"
    save(figure, tmp_path)


def test_predictions_of_many_outputs_share_a_density(tmp_path: Path) -> None:
    real = torch.randn(400, 13)
    figure, axes = plot_predictions(real, 0.5 * real)
    assert len(axes) == 1
    assert axes[0].get_title().startswith("all 13 outputs  rms")
    assert axes[0].collections[0].get_array().sum() == real.numel()  # every point is in a cell
    save(figure, tmp_path)


def test_one_output_and_many_panels() -> None:
    _, (axis,) = plot_predictions(torch.randn(5, 1), torch.randn(5, 1))
    assert axis.get_title().startswith("rms")
    figure, axes = plot_predictions(torch.randn(5, 10), torch.randn(5, 10))
    assert [axis.get_title().split("  ")[0] for axis in axes] == [f"output {k}" for k in range(10)]
    assert sum(axis.get_visible() for axis in figure.axes) == 10


def test_few_runs_share_panels(tmp_path: Path) -> None:
    runs = [(f"width {width}", make_history(1 / width)) for width in (64, 128, 256)]
    figure, axes = plot_runs(runs, title="Width")
    keys = ("relative_weight_distance", "prediction_rmse", "loss")
    for axis, key in zip(axes, keys, strict=True):
        start = 1 + (key != "loss")  # at step 0 distances are zero, and at step 1 they may be zero to rounding
        lines = curves(axis)
        assert [list(line.get_ydata())[1:] for line in lines] == [column(h, key, start) for _, h in runs]
        assert len({line.get_color() for line in lines}) == 3
        assert len({line.get_marker() for line in lines}) == 3
        assert axis.get_yscale() == "log"
        assert axis.get_xlabel() == "optimizer step"
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["width 64", "width 128", "width 256"]
    save(figure, tmp_path)


def test_runs_at_equal_loss() -> None:
    histories = {"slow": make_history(), "fast": make_history(0.5)}
    _, (axis, _) = plot_runs(list(histories.items()), x="loss")
    for line, history in zip(curves(axis), histories.values(), strict=True):
        assert list(line.get_xdata()) == [row["loss"] for row in history if row["step"] > 0]
    assert axis.get_xlim()[0] > axis.get_xlim()[1]  # it falls from left to right
    _, alone = plot_over_loss(make_history())
    assert list(alone.lines[0].get_ydata()[1:]) == list(axis.lines[0].get_ydata()[1:])
    with pytest.raises(ValueError, match="loss"):
        plot_over_loss([{"step": 1.0, "relative_weight_distance": 0.1}])


def test_marked_rows_have_hollow_markers_and_no_label() -> None:
    history = [row | {"exact": float(row["step"] < 10)} for row in make_history()]
    figure, axes = plot_runs([("one", history), ("other", make_history())], ["relative_weight_distance"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "other"]
    hollow = curves(axes[0])[1]
    assert list(hollow.get_xdata()) == [10, 30, 100]
    assert (hollow.get_markerfacecolor(), hollow.get_linestyle()) == ("white", "None")


def test_many_runs_have_small_multiples(tmp_path: Path) -> None:
    runs = [(f"seed {seed}", make_history(1 + seed)) for seed in range(7)]
    figure, axes = plot_runs(runs, ["kernel_change"])
    assert len(axes) == 7
    for axis, (label, history) in zip(axes, runs, strict=True):
        assert axis.get_title() == label
        assert len(axis.lines) == 8
        assert list(axis.lines[-1].get_ydata()) == column(history, "kernel_change", 1)
        assert {line.get_color() for line in axis.lines[:-1]} == {"#999999"}
    assert figure.get_supylabel().startswith("kernel change")
    assert [axis.get_visible() for axis in figure.axes] == [True] * 7 + [False] * 2
    save(figure, tmp_path)


def test_runs_keep_small_losses_and_the_start_of_the_evaluation_set() -> None:
    history = [{"step": float(s), "evaluation/loss": 10.0**-s} for s in range(9)]
    _, (axis,) = plot_runs([("a", history)], ["evaluation/loss"])
    assert list(axis.lines[0].get_xdata()) == list(range(9))
    assert axis.get_ylim()[0] < 1e-8


def test_runs_are_monitors_histories_or_tables() -> None:
    monitor, history = LinearizationMonitor(name="tangent"), make_history()
    monitor.history = history
    table = pandas.DataFrame([*history, {"step": 200.0, "loss": 0.1}])  # with cells that are missing
    for run in (monitor, history, pandas.DataFrame(history), monitor.to_pandas()):
        for draw in (plot_history, plot_kernel, plot_parameters, plot_over_loss, plot_accuracies, plot_effective_time):
            draw(run)
    figure, axes = plot_runs({"a": monitor, "b": history, "c": table})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
    first, second, third = (line.get_ydata() for line in curves(axes[2]))
    assert list(first) == list(second) == list(third)[:-1]
    figure, _ = plot_runs([monitor, ("b", history), history])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["tangent", "b", "run 3"]


def test_single_panels_go_on_axes_of_the_user() -> None:
    from matplotlib.figure import Figure

    figure, history = Figure(), make_history()
    for draw in (plot_history, plot_accuracies, plot_over_loss, plot_parameters):
        axis = figure.subplots()
        assert draw(history, "Title", ax=axis) == (figure, axis)
        assert axis.get_title() == "Title"
    monitor, axis = LinearizationMonitor(), figure.subplots()
    monitor.history = history
    assert monitor.plot("A run", axis) == (figure, axis)
    assert monitor.plot(title="A run").figure.get_suptitle() == "A run"
    part = figure.subfigures().subplots()
    assert plot_runs({"a": history, "b": history}, ax=part, title="Two") == (figure, part)
    assert [text.get_text() for text in part.get_legend().get_texts()] == ["a", "b"]
    with pytest.raises(ValueError, match="at most 6 runs with argument `ax` but got 7"):
        plot_runs([history] * 7, ax=axis)


def test_a_notebook_shows_a_picture_that_is_sharp_and_as_large_as_the_figure() -> None:
    drawing = plot_history(make_history())
    assert repr(drawing) == repr(drawing.figure) == "<Figure size 960x360 with 2 Axes>"
    data, size = drawing._repr_png_()
    assert size == {"width": 768, "height": 288}
    assert Image.open(io.BytesIO(data)).size == (2 * 768, 2 * 288)


def test_small_ticks_are_powers_of_ten(tmp_path: Path) -> None:
    history = [{"step": float(s), "kernel_velocity": 1e-5 * s} for s in range(1, 9)]
    figure, (axis,) = plot_kernel(history)
    save(figure, tmp_path)
    labels = {label.get_text() for label in axis.get_yticklabels()}
    assert {"$10^{-5}$", r"$2\times10^{-5}$"} <= labels


def test_values_of_a_quantity() -> None:
    figure, axis = plot_values([0.3, 0.2, 0.1], "distance (m)")
    assert (axis.get_ylabel(), axis.get_xlabel(), axis.get_yscale()) == ("distance (m)", "measurement", "linear")
    assert list(axis.lines[0].get_xdata()) == [1, 2, 3]
    assert plot_values([1.0], "other", axis) == (figure, axis)


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        return self.body(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_log_read_back_is_the_history(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(7, 4), torch.randn(7, 3))
    logger = CSVLogger(tmp_path)
    monitor = LinearizationMonitor(steps=[0, 1, 5, 30], per_parameter=True, name="tangent")
    trainer = Trainer(
        max_steps=30,
        max_epochs=-1,
        accelerator="cpu",
        logger=logger,
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
    )
    trainer.fit(Regression(), DataLoader(data, batch_size=7))
    history = read_history(logger.log_dir, name="tangent")
    assert history == monitor.history == read_history(Path(logger.log_dir) / "metrics.csv", "tangent")
    figure, (distance, _) = plot_history(history)
    assert list(distance.lines[0].get_xdata()) == [1, 5, 30]
    figure, axis = plot_parameters(history)
    assert len(axis.get_yticklabels()) == 4
    save(figure, tmp_path)
    with pytest.raises(ValueError, match='Expected columns "step" and "ntk/'):
        read_history(logger.log_dir)


def test_rows_of_one_step_are_merged_and_blank_cells_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(
        "epoch,step,ntk/loss,ntk/kernel_change,train_loss\n0,0,1.5,,\n0,0,,,0.7\n0,4,0.5,,\n0,4,,0.25,\n1,9,inf,,\n"
    )
    assert read_history(tmp_path) == [
        {"step": 0.0, "loss": 1.5},
        {"step": 4.0, "loss": 0.5, "kernel_change": 0.25},
        {"step": 9.0, "loss": math.inf},
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot_history([]), "empty"),
        (lambda: plot_history([{"step": 0.0, "accuracy": 1.0}]), r"loss or linearized_loss but it has \['accuracy'"),
        (lambda: plot_accuracies([]), "empty"),
        (lambda: plot_kernel([{"step": 0.0}]), "kernel_distance or kernel_change"),
        (lambda: plot_effective_time([{"step": 0.0}]), "closest_time"),
        (lambda: plot_parameters([{"step": 5.0, "loss": 1.0}]), "per_parameter=True"),
        (lambda: plot_parameters([{"step": 0.0, "parameter/a": 0.0}]), "after step 0"),
        (lambda: plot_spectrum(torch.ones(3), torch.ones(2)), r"shape \(m,\) but got \(3,\) and \(2,\)"),
        (lambda: plot_spectrum(torch.zeros(3), torch.ones(3)), "nothing to learn"),
        (lambda: plot_predictions(torch.ones(3, 1), torch.ones(3)), "one shape"),
        (lambda: plot_predictions(torch.ones(3), torch.ones(3)), r"shape \(N, K\) but got \(3,\)"),
        (lambda: plot_predictions(torch.ones(3, 2), torch.ones(3, 2), names=["a"]), "2 names.*got 1"),
        (lambda: plot_runs([]), "at least one run"),
        (lambda: plot_runs([("a", make_history())], ["no_such_scalar"]), "no_such_scalar"),
        (lambda: plot_values([], "x"), "at least one value"),
        (lambda: plot_history("metrics.csv"), "DataFrame with a row for each measurement but got str"),
        (lambda: plot_runs({"a": 3}), "but got int"),
        (lambda: plot_runs(make_history()), "the rows of one history"),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        read_history(tmp_path)


def test_figures_are_not_those_of_pyplot() -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    plot_history(make_history())
    plot_values([1.0], "x")
    assert pyplot.get_fignums() == before


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (lambda: plot_history(make_history()), lambda: plot_values([1.0], "x")):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-ntk\[plot\]'"):
            draw()


def test_regimes_have_bands_where_they_are_estimated() -> None:
    def row(step: int) -> dict[str, float]:
        value = 0.1 + step / 200
        numbers = dict.fromkeys(
            ("alignment", "effective_rank", "edge", "low_rank", "layer/body.0/activation_change"), value
        )
        bars = {
            f"{name}_{end}": value + sign * 0.05
            for name in ("alignment", "effective_rank")
            for end, sign in (("low", -1), ("high", 1))
        }
        return {"step": float(step)} | {f"regime/{name}": number for name, number in (numbers | bars).items()}

    _, axes = plot_regimes([row(step) for step in STEPS])
    titles = [axis.get_title() for axis in axes]
    assert titles == [
        "Alignment of kernel and labels", "Effective rank of the kernel", "Edge of stability",
        "Low-rank measure of the features", "Change of activations by layer",
    ]  # fmt: skip
    assert [len(axis.collections) for axis in axes] == [1, 1, 0, 0, 0]
    corners = axes[0].collections[0].get_paths()[0].vertices
    for step in STEPS:
        heights = sorted({round(y, 9) for x, y in corners if x == step})
        assert heights == pytest.approx([0.05 + step / 200, 0.15 + step / 200])
    assert axes[4].get_legend().get_texts()[0].get_text() == "body.0"

    halves = [row(step) | {"regime/curvature": 2.0, "regime/curvature_of_halves": 3.0} for step in STEPS]
    _, axes = plot_regimes(halves)
    assert [axis.get_title() for axis in axes] == titles
    (dotted,) = [line for line in axes[2].get_lines() if line.get_label() == "half of the samples"]
    assert dotted.get_ydata() == pytest.approx([1.5 * row["regime/edge"] for row in halves])
    with pytest.raises(ValueError, match="regime/alignment"):
        plot_regimes(make_history())
