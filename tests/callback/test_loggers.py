"""What is written to loggers, read back from their files."""

import csv
import io
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_ntk import Linearization, LinearizationMonitor
from lightning_ntk.callback import loggers as reporting
from lightning_ntk.data.reference import Reference
from lightning_ntk.kernel.probe import KernelProbe
from tests.callback.trainer_runs import WEIGHTS_ONLY
from tests.problems import mlp

pytestmark = pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have|The number of training batches")

PANELS = {f"ntk/figure/{name}" for name in ("relative_weight_distance", "loss", "kernel_distance", "kernel_change",
                                             "kernel_velocity")}  # fmt: skip
FIGURES = PANELS | {f"ntk/figure/{name}" for name in ("parameters", "spectrum", "predictions")}


class Regression(LightningModule):
    """With hyperparameters that are logged."""

    def __init__(self, lr: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(seed)
        self.body = mlp(3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.body(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


def data(samples: int = 11) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(
        torch.randn(samples, 6, generator=generator), 0.3 * torch.randn(samples, 3, generator=generator)
    )


def fit(
    *monitors: LinearizationMonitor, logger: object = False, module: LightningModule | None = None, **options: object
) -> Trainer:
    seed_everything(1, verbose=False)
    defaults = {"max_steps": 12, "max_epochs": -1, "accelerator": "cpu", "enable_checkpointing": False,
                "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 5}  # fmt: skip
    callbacks = [*monitors, *options.pop("callbacks", [])]
    trainer = Trainer(**(defaults | options | {"logger": logger, "callbacks": callbacks}))
    trainer.fit(module or Regression(), DataLoader(data(), batch_size=11))
    return trainer


def monitor(**options: object) -> LinearizationMonitor:
    return LinearizationMonitor(**{"steps": 4, "per_parameter": True, "kernel_probe": 5, "strict": True} | options)


def events(directory: str | Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(directory), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def charts(directory: str | Path) -> dict[str, dict[str, list[str]]]:
    event = events(directory).Tensors("custom_scalars__config__")[-1]
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in layout.category
    }


def described(directory: str | Path) -> tuple[set[str], set[str]]:
    """Names of hyperparameters and of metrics as TensorBoard's HParams tab reads them."""
    contents = events(directory).PluginTagToContent("hparams")
    experiment = metadata.parse_experiment_plugin_data(contents["_hparams_/experiment"])
    start = metadata.parse_session_start_info_plugin_data(contents["_hparams_/session_start_info"])
    assert set(start.hparams) == {info.name for info in experiment.hparam_infos}
    return set(start.hparams), {info.name.tag for info in experiment.metric_infos}


@pytest.mark.tested("TensorBoard scalars and figures", "gradient_descent")
def test_tensorboard_has_scalars_and_every_figure_once(tmp_path: Path) -> None:
    logger, watching = TensorBoardLogger(tmp_path), monitor(figures=True)
    fit(watching, logger=logger)
    written = events(logger.log_dir)
    for key in watching.history[-1].keys() - {"step"}:
        values = [(event.step, event.value) for event in written.Scalars(f"ntk/{key}")]
        expected = [(int(row["step"]), numpy.float32(row[key])) for row in watching.history if key in row]
        assert values == expected, key
    (text,) = written.Tensors("ntk/verdict/text_summary")
    assert text.step == 12
    assert watching.summary().splitlines()[-1] in text.tensor_proto.string_val[0].decode()
    assert set(written.Tags()["images"]) == FIGURES
    for tag in FIGURES:
        (image,) = written.Images(tag)
        assert image.step == 12
        pixels = numpy.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
        assert min(pixels.shape[:2]) > 300
        assert tag not in PANELS or pixels.shape == (540, 720, 3)  # 4:3 at 150 dots per inch
        assert 20 < pixels.std() < 120  # neither blank nor noise


def test_figures_are_of_the_weights_at_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    monkeypatch.setattr(reporting, "plot_predictions", lambda *outputs: drawn.update(predictions=outputs))
    monkeypatch.setattr(reporting, "plot_spectrum", lambda *modes, time: drawn.update(spectrum=modes, time=time))
    watching, module = monitor(figures=True, strict=False), Regression()
    with pytest.warns(UserWarning, match="no figure"):
        fit(watching, logger=TensorBoardLogger(tmp_path), module=module)
    inputs, targets = data().tensors
    trained, linearized = drawn["predictions"]
    torch.testing.assert_close(trained, module(inputs).detach().double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(linearized, watching.training.predictions(12).double(), rtol=0, atol=1e-6)
    initial = watching.training.initial_predictions.double()
    assert drawn["spectrum"][1].norm() == pytest.approx((initial - targets.double()).norm().item(), rel=1e-12)
    assert drawn["time"] == pytest.approx(12 * 0.1 * 2 / 33)  # steps, rate, and the factor of a mean over 11 x 3


@pytest.mark.tested("TensorBoard custom scalars", "gradient_descent")
def test_layout_overlays_real_and_linearized_and_has_no_chart_of_what_is_not_logged(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    everything, little = (
        monitor(evaluation=data(5)),
        LinearizationMonitor(None, steps=5, name="twin-only", dynamics="twin"),
    )
    fit(everything, little, logger=logger)
    layout = charts(logger.log_dir)
    assert list(layout) == ["ntk", "twin-only"]
    assert [next(iter(layout[name].items())) for name in layout] == [
        ("relative weight distance", [f"^{name}/relative_weight_distance$"]) for name in ("ntk", r"twin\-only")
    ]
    assert ["^ntk/loss$", "^ntk/linearized_loss$"] in layout["ntk"].values()
    assert ["^ntk/evaluation/loss$", "^ntk/evaluation/linearized_loss$"] in layout["ntk"].values()
    logged = set(events(logger.log_dir).Tags()["scalars"])
    for name in layout:
        for title, tags in layout[name].items():
            plain = {tag.strip("^$").replace("\\", "") for tag in tags}
            assert plain <= logged, title


def test_the_address_without_smoothing_is_said_once_for_all_monitors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(monitor(), monitor(name="b"), logger=TensorBoardLogger(tmp_path, name="my runs"))
        fit(monitor())
    said = [message for message in caplog.messages if "smoothing" in message]
    assert said == [
        "LinearizationMonitor: Curves: `tensorboard --logdir 'my runs'`, without smoothing at "
        "http://localhost:6006/#custom_scalars&_smoothingWeight=0"
    ]
    assert sum(message.startswith("LinearizationMonitor 'b': After 12 steps") for message in caplog.messages) == 1


def test_layout_has_a_monitor_that_captures_late(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(monitor(), monitor(name="late", capture_at=5), logger=logger)
    assert list(charts(logger.log_dir)) == ["ntk", "late"]


def test_a_layout_that_the_run_adds_itself_comes_later_and_counts(tmp_path: Path) -> None:
    class Own(Regression):
        def on_train_batch_start(self, batch, batch_idx) -> None:
            self.logger.experiment.add_custom_scalars({"mine": {"losses": ["Multiline", ["train_loss"]]}})

    logger = TensorBoardLogger(tmp_path)
    fit(monitor(), logger=logger, module=Own())
    last = events(logger.log_dir).Tensors("custom_scalars__config__")[-1]
    assert b"mine" in last.tensor_proto.string_val[0]


@pytest.mark.tested("TensorBoard HParams", "gradient_descent")
def test_runs_compare_by_the_last_distances_of_all_monitors_in_the_hparams_tab(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    monitors = [monitor(), monitor(name="flow", dynamics="gradient_flow")]
    fit(*monitors, logger=logger, module=Regression(lr=0.2))
    parameters, metrics = described(logger.log_dir)
    assert parameters == {"lr", "seed"}
    assert metrics == {f"{name}/{tag}" for name in ("ntk", "flow") for tag in reporting.COMPARED}
    for watching in monitors:
        for tag in reporting.COMPARED:  # the tab shows the last value of the scalar of this tag
            last = events(logger.log_dir).Scalars(f"{watching.name}/{tag}")[-1]
            assert (last.step, last.value) == (12, numpy.float32(watching.history[-1][tag]))
    assert "lr: 0.2" in (Path(logger.log_dir) / "hparams.yaml").read_text()


def test_a_logger_with_a_metric_of_its_own_describes_the_run_once(tmp_path: Path) -> None:
    logger, watching = TensorBoardLogger(tmp_path), monitor()
    fit(watching, logger=logger)
    assert described(logger.log_dir) == ({"lr", "seed"}, {"hp_metric"})
    assert len(events(logger.log_dir).Scalars("ntk/loss")) == len(watching.history)


def test_hparams_that_a_run_describes_itself_are_kept(tmp_path: Path) -> None:
    class Own(Regression):
        def on_train_start(self) -> None:
            self.logger.log_hyperparams(self.hparams, {"best_loss": 7.0})

    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    fit(monitor(), logger=logger, module=Own())
    assert described(logger.log_dir) == ({"lr", "seed"}, {"best_loss"})


def test_hyperparameters_that_are_not_to_be_logged_are_not(tmp_path: Path) -> None:
    class Silent(Regression):
        def __init__(self) -> None:
            super().__init__()
            self._log_hyperparams = False

    logger = TensorBoardLogger(tmp_path)
    fit(monitor(), logger=logger, module=Silent())
    assert not [tag for tag in events(logger.log_dir).Tags()["tensors"] if "hparams" in tag]


@pytest.mark.tested("CSV logger, no logger", "gradient_descent")
def test_csv_takes_scalars_only_and_no_logger_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("drawn for nobody")

    monkeypatch.setattr(reporting, "plot_history", refuse)
    logger, watching, unlogged = CSVLogger(tmp_path), monitor(figures=True), monitor(figures=True)
    fit(watching, logger=logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["ntk/kernel_distance"]]
    assert [float(row["ntk/kernel_distance"]) for row in rows] == [row["kernel_distance"] for row in watching.history]
    fit(unlogged)
    assert unlogged.history == watching.history


def test_a_figure_that_fails_costs_nothing_but_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(reporting, "plot_spectrum", fail)
    logger = TensorBoardLogger(tmp_path)
    with pytest.warns(UserWarning, match="writes no figure 'spectrum' of this run. RuntimeError: no ink"):
        trainer = fit(monitor(figures=True), logger=logger)
    assert trainer.state.finished
    assert set(events(logger.log_dir).Tags()["images"]) == FIGURES - {"ntk/figure/spectrum"}


def test_charts_and_hparams_that_fail_cost_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Logger(TensorBoardLogger):
        def log_hyperparams(self, params: dict, metrics: dict | None = None, step: int | None = None) -> None:
            super().log_hyperparams(params, metrics, step)
            if metrics is not None:
                raise AttributeError("of another version")

    def fail(*arguments: object) -> None:
        raise AttributeError("of another version")

    logger, watching = Logger(tmp_path, default_hp_metric=False), monitor()
    monkeypatch.setattr(logger.experiment, "add_custom_scalars", fail)
    with (
        pytest.warns(UserWarning, match="writes no charts of this run. AttributeError: of another version"),
        pytest.warns(UserWarning, match="writes no HParams of this run. AttributeError: of another version"),
    ):
        fit(watching, logger=logger)
    assert len(events(logger.log_dir).Scalars("ntk/weight_distance")) == len(watching.history) == 4


def test_a_verdict_and_a_page_that_fail_cost_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    def fail(*arguments: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger, board, watching = (
        MLFlowLogger("test", tracking_uri=f"file:{tmp_path}"),
        TensorBoardLogger(tmp_path),
        monitor(figures=True),
    )
    for method in ("set_tag", "log_text"):
        monkeypatch.setattr(logger.experiment, method, fail)
    monkeypatch.setattr(board.experiment, "add_text", fail)
    with (
        pytest.warns(UserWarning, match="writes no verdict to MLFlowLogger of this run. OSError: no network"),
        pytest.warns(UserWarning, match="writes no verdict to TensorBoardLogger"),
        pytest.warns(UserWarning, match="writes no page to MLFlowLogger"),
    ):
        trainer = fit(watching, logger=[logger, board])
    assert trainer.state.finished
    assert set(events(board.log_dir).Tags()["images"]) == FIGURES


def test_figures_of_a_run_stopped_early_and_of_the_twin(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    stop = EarlyStopping("train_loss", patience=0, stopping_threshold=1e9, check_on_train_epoch_end=True)
    fit(monitor(figures=True, dynamics="twin", per_parameter=False, kernel_probe=0), logger=logger, callbacks=[stop])
    written = events(logger.log_dir)
    assert set(written.Tags()["images"]) == {
        f"ntk/figure/{name}" for name in ("relative_weight_distance", "loss", "predictions")
    }
    assert [image.step for image in written.Images("ntk/figure/loss")] == [1]


def test_by_default_nothing_is_drawn_and_matplotlib_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_ntk.callback.arguments.find_spec", lambda name: None)
    logger = TensorBoardLogger(tmp_path)
    fit(LinearizationMonitor(steps=6), logger=logger)
    assert events(logger.log_dir).Tags()["images"] == []
    with pytest.raises(ModuleNotFoundError, match=r"`figures` needs matplotlib.*lightning-ntk\[plot\]"):
        LinearizationMonitor(figures=True)


def leveldb_records(data: bytes, offset: int, block: int = 32768) -> Iterator[bytes]:
    """The records of a LevelDB log, in blocks that began `offset` bytes before `data`."""
    at, parts = 0, b""
    while at + 7 <= len(data):
        left = block - (at + offset) % block
        if left < 7:  # the end of a block is filled up
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):  # being written
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.tested("Weights & Biases, offline", "gradient_descent")
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    watching = monitor(figures=True)
    fit(watching, logger=WandbLogger(project="test", offline=True, save_dir=str(tmp_path)))
    assert wandb.run.summary["ntk/verdict"] == watching.verdict.word
    wandb.finish()
    (page,) = tmp_path.rglob("*.html")
    assert page.read_text() == watching.report(tmp_path / "page").read_text()
    pictures = {path.relative_to(next(tmp_path.rglob("images"))).as_posix() for path in tmp_path.rglob("*.png")}
    assert {picture.rsplit("_", 2)[0] for picture in pictures} == FIGURES
    log, records, deadline = next(tmp_path.rglob("*.wandb")), [], time.monotonic() + 30
    # The process that writes the file may do so after `finish` has returned.
    while not any(record.HasField("exit") for record in records) and time.monotonic() < deadline:
        time.sleep(0.1)
        records = [Record.FromString(found) for found in leveldb_records(log.read_bytes()[7:], offset=7)]
    distances = []
    for record in records:
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if "ntk/relative_weight_distance" in items:
            distances.append((int(items["trainer/global_step"]), float(items["ntk/relative_weight_distance"])))
    assert distances == [(int(row["step"]), row["relative_weight_distance"]) for row in watching.history]


@pytest.mark.tested("MLflow, in files", "gradient_descent")
def test_mlflow_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    watching = monitor(figures=True)
    logger = MLFlowLogger("test", tracking_uri=f"file:{tmp_path}")
    fit(watching, logger=logger)
    assert {f"ntk/figure/{path.stem}" for path in tmp_path.rglob("ntk/figure/*.png")} == FIGURES
    assert next(tmp_path.rglob("ntk/report.html")).read_text() == watching.report(tmp_path / "page").read_text()
    assert logger.experiment.get_run(logger.run_id).data.tags["ntk/verdict"] == watching.verdict.word
    history = logger.experiment.get_metric_history(logger.run_id, "ntk/weight_distance")
    assert [(m.step, m.value) for m in history] == [(int(r["step"]), r["weight_distance"]) for r in watching.history]


@pytest.mark.tested("several loggers", "gradient_descent")
def test_several_loggers_get_the_same(tmp_path: Path) -> None:
    loggers: list[Logger] = [TensorBoardLogger(tmp_path, name="a"), TensorBoardLogger(tmp_path, name="b")]
    fit(monitor(figures=True), logger=loggers)
    first, second = (events(logger.log_dir) for logger in loggers)
    assert first.Tags() == second.Tags()


def test_the_kernel_of_the_probe_is_that_of_the_run() -> None:
    class Watched(Regression):
        """Keeps its weights at every step."""

        def __init__(self) -> None:
            super().__init__()
            self.kept: dict[int, dict[str, Tensor]] = {}

        def on_train_batch_end(self, *arguments: object) -> None:
            self.kept[self.trainer.global_step] = {n: p.detach().clone() for n, p in self.named_parameters()}

    module = Watched()
    probe = KernelProbe(Linearization(module), Reference(data()), samples=5)
    watching = monitor()
    fit(watching, module=module)
    assert [row["step"] for row in watching.history] == [0, 4, 8, 12]
    keys = ("kernel_distance", "kernel_change", "kernel_velocity")
    for row in watching.history[1:]:
        kernel = probe.kernel(module.kept[int(row["step"])])
        expected = probe.compare(kernel, step=row["step"])
        probe.advance(kernel, step=row["step"])
        assert {key: row[key] for key in keys} == pytest.approx({key: expected[key] for key in keys}, rel=1e-9)
        assert row["kernel_distance"] > 0


@pytest.mark.tested("kernel of a probe, resumed", "gradient_descent", "replay", "twin")
@pytest.mark.parametrize("dynamics", ["gradient_descent", "replay", "twin"])
def test_the_kernel_is_followed_with_all_dynamics_and_over_a_resumed_run(tmp_path: Path, dynamics: str) -> None:
    def watch() -> LinearizationMonitor:
        return monitor(dynamics=dynamics)

    whole, first, second = watch(), watch(), watch()
    fit(whole)
    fit(first, max_steps=6).save_checkpoint(tmp_path / "half.ckpt")
    seed_everything(1, verbose=False)
    trainer = Trainer(max_steps=12, max_epochs=-1, accelerator="cpu", logger=False, callbacks=[second],
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(Regression(), DataLoader(data(), batch_size=11), ckpt_path=str(tmp_path / "half.ckpt"), **WEIGHTS_ONLY)
    rows = {row["step"]: row for row in second.history}
    assert rows.keys() == {0, 4, 6, 8, 12}
    for row in whole.history:
        for key in ("kernel_distance", "kernel_change"):
            assert rows[row["step"]][key] == pytest.approx(row[key], rel=1e-9, abs=1e-12)
    # The last measurement before step 8 was that of step 6, where the first part ended.
    assert rows[12]["kernel_velocity"] == pytest.approx(whole.history[-1]["kernel_velocity"], rel=1e-6)
    assert rows[8]["kernel_velocity"] != pytest.approx(whole.history[-2]["kernel_velocity"], rel=1e-6)


def test_a_probe_needs_samples() -> None:
    with pytest.raises(ValueError, match="`kernel_probe` to be an integer, at least 0, but got -1"):
        LinearizationMonitor(kernel_probe=-1)
    with pytest.raises(ValueError, match="`kernel_probe` to be 0 with reference=None"):
        LinearizationMonitor(None, dynamics="twin", kernel_probe=3)


def test_a_probe_of_data_without_an_order_is_refused() -> None:
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from data()

    seed_everything(1, verbose=False)
    trainer = Trainer(max_steps=2, accelerator="cpu", logger=False, callbacks=[monitor()], enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    endless: Dataset = Endless()
    with pytest.raises(Exception, match="Leave out `kernel_probe`"):
        trainer.fit(Regression(), DataLoader(endless, batch_size=5))
