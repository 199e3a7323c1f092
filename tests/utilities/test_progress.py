"""Progress bars of captures and measurements, below those of a Trainer, and interruptions."""

import io
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from rich.console import Console
from rich.progress import Progress
from torch.utils.data import DataLoader

from lightning_ntk import LinearizationMonitor, LinearizedTraining
from lightning_ntk.callback import progress_bars as trainer_bars
from lightning_ntk.callback.progress_bars import RichBar, nested_bars
from lightning_ntk.callback.status import say
from lightning_ntk.solvers.eigh import eigh_modes
from lightning_ntk.utilities import progress
from lightning_ntk.utilities.progress import Work, bars_made_by, track, track_operations
from tests.callback.test_loggers import Regression, data
from tests.problems import mlp

pytestmark = pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have|The number of training batches")


class Recorded:
    """A bar that keeps what it was told."""

    made: list["Recorded"]

    def __init__(self, work: Work) -> None:
        self.work, self.done, self.closed = work, 0.0, False
        type(self).made.append(self)

    def update(self, n: float) -> None:
        assert not self.closed
        self.done += n

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def recorded() -> Iterator[list[Recorded]]:
    Recorded.made = []
    with bars_made_by(Recorded):
        yield Recorded.made


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars of fast work are shown too."""
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0)
    monkeypatch.setattr(trainer_bars, "DELAY_SECONDS", 0)
    monkeypatch.setattr(trainer_bars, "_SECONDS_BETWEEN_DRAWINGS", 0)


def fit(monitor: LinearizationMonitor, *callbacks: Callback, **options: object) -> Trainer:
    seed_everything(1, verbose=False)
    defaults = {"max_steps": 6, "max_epochs": -1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
                "enable_model_summary": False}  # fmt: skip
    trainer = Trainer(**(defaults | options | {"callbacks": [monitor, *callbacks]}))
    trainer.fit(Regression(), DataLoader(data(), batch_size=11))
    return trainer


def test_work_inside_of_work_is_deeper_and_every_bar_is_closed(recorded: list[Recorded]) -> None:
    with track_operations("outer", total=7.5) as advance:
        for _ in track([1, 2, 3], "inner"):
            advance(2.5)
    for _ in track(iter("ab"), "after", total=2):
        break  # given up
    assert [bar.work for bar in recorded] == [Work("outer", 7.5, False, 0), Work("inner", 3, True, 1), Work("after", 2)]
    assert [bar.done for bar in recorded] == [7.5, 3, 0]
    assert all(bar.closed for bar in recorded)


def test_a_bar_is_closed_when_its_work_fails(recorded: list[Recorded]) -> None:
    with pytest.raises(RuntimeError), track_operations("fails", total=1.0):
        raise RuntimeError
    assert recorded[0].closed
    list(track([1], "next"))
    assert recorded[1].work.depth == 0


def test_no_bar_is_made_where_it_is_switched_off(recorded: list[Recorded]) -> None:
    assert list(track("ab", "letters", enabled=False)) == ["a", "b"]
    with track_operations("operations", total=1.0, enabled=False) as advance:
        advance(1.0)
    assert recorded == []


def test_only_a_long_decomposition_shows_a_bar(recorded: list[Recorded], monkeypatch: pytest.MonkeyPatch) -> None:
    factor = torch.randn(40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eigh_modes(factor @ factor.T, factor[0], progress=True)
    assert recorded == []
    monkeypatch.setattr("lightning_ntk.solvers.eigh._ROWS_OF_SECONDS", 30)
    eigh_modes(factor @ factor.T, factor[0], progress=True)
    assert [bar.work for bar in recorded] == [Work("eigendecomposition of the kernel", None, False)]
    eigh_modes(factor @ factor.T, factor[0], progress=False)
    assert len(recorded) == 1


def test_a_call_that_cannot_report_its_progress_is_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with track_operations("decomposing", total=None):
        assert capsys.readouterr().err.endswith("\rdecomposing ...")


@pytest.mark.parametrize("options", [{"solver": "eigh"}, {"solver": "lanczos", "matrix_free": True}])
def test_every_bar_of_a_capture_knows_how_much_there_is_to_do(recorded: list[Recorded], options: dict) -> None:
    training = LinearizedTraining(mlp(3), data(), lr=0.1, batch_size=4, horizon=50, **options)
    training.weights(50)
    descriptions = {bar.work.description for bar in recorded}
    assert "initial predictions of 11 samples" in descriptions
    assert ("modes of the kernel (Lanczos)" in descriptions) == (options["solver"] == "lanczos")
    for bar in recorded:
        assert bar.work.total, bar.work
        assert bar.closed
    passes = [bar for bar in recorded if "product" in bar.work.description and bar.work.depth]
    assert all(bar.done == bar.work.total == 3 for bar in passes)  # 11 samples in batches of 4
    assert bool(passes) == (options["solver"] == "lanczos")


@pytest.mark.tested("TQDM progress bar", "gradient_descent")
def test_tqdm_bars_are_below_those_of_the_trainer(
    at_once: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []

    class Noted(Tqdm):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, mininterval=0, **options)
            made.append((self.desc, options, self.pos))

    monkeypatch.setattr(trainer_bars, "Tqdm", Noted)
    fit(LinearizationMonitor(steps=2, kernel_probe=3, batch_size=4), TQDMProgressBar(process_position=1))
    descriptions = {description for description, _, _ in made}
    works = "initial predictions", "predictions", "vector-Jacobian product", "Jacobian-vector product"
    assert {f"{work} of 11 samples" for work in works} <= descriptions
    for _, options, position in made:
        assert options["position"] == -position == 3  # the Trainer's are 2 and, for validation, 3
        assert options["file"] is sys.stdout
        assert options["leave"] is False
        assert not options["disable"]
    shown = capsys.readouterr()
    assert re.search(
        r"initial predictions of 11 samples:\s+33%.*1/3 \[\d\d:\d\d<\d\d:\d\d", shown.out
    )  # with the time left
    assert "predictions" not in shown.err


@pytest.mark.tested("Rich progress bar", "gradient_descent")
def test_rich_bars_use_one_task_again_and_hide_it(at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, seen = io.StringIO(), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *arguments: object) -> None:
            tasks = trainer.progress_bar_callback.progress.tasks
            seen.append([(task.id, task.visible) for task in tasks])

    bar = RichProgressBar(console_kwargs={"file": terminal, "force_terminal": True, "width": 120})
    monitor = LinearizationMonitor(steps=1, kernel_probe=3, batch_size=4)
    trainer = fit(monitor, Watch(), bar)
    assert len(monitor.history) == 7
    assert seen[-1] == seen[1] == [(0, True), (1, False)]  # no task more for six measurements, and ours hidden
    output = terminal.getvalue()
    for description in ("predictions", "vector-Jacobian product"):
        assert description in output
    assert "2/3" in output  # batches, as whole numbers
    assert bar.train_progress_bar.description.startswith("Epoch 5")
    assert bar.train_progress_bar.completed == 1
    assert trainer.state.finished


def test_a_rich_bar_of_its_own_where_the_trainer_has_none_yet(
    at_once: None, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich import reconfigure

    def fail(trainer: SimpleNamespace) -> None:
        with nested_bars(trainer):
            list(track([1, 2], "interrupted"))
            raise RuntimeError

    terminal = io.StringIO()
    reconfigure(file=terminal, force_terminal=True, width=120)
    try:
        with nested_bars(SimpleNamespace(progress_bar_callback=RichProgressBar())):
            with track_operations("capturing", total=4.0e12) as advance:
                for _ in track([1, 2, 3, 4], "inside"):
                    advance(0.5e12)
            list(track([1, 2], "after"))
        with pytest.raises(RuntimeError):
            fail(SimpleNamespace(progress_bar_callback=RichProgressBar()))
    finally:
        reconfigure()
    assert re.search(r"capturing.*50%", terminal.getvalue())
    for description in ("inside", "after", "interrupted"):
        assert description in terminal.getvalue()
    end = terminal.getvalue().rpartition("\x1b[2K")[2]
    assert end.lstrip("\n") == "\x1b[?25h\r"  # erased, and the cursor is back; Rich 13 leaves an empty line


def test_rich_says_how_much_time_is_left(at_once: None) -> None:
    with Progress(auto_refresh=False, disable=True) as display:
        bar = RichBar(display, Work("capturing", 100))
        for _ in range(4):
            time.sleep(0.01)
            bar.update(10.0)
        (task,) = display.tasks
        assert task.completed == 40
        assert task.time_remaining is not None
        bar.close()
        assert not task.visible
        nobody_knows = RichBar(display, Work("something", None))
        nobody_knows.update(10.0)
        assert len(display.tasks) == 1
        assert (task.description, task.completed, task.total) == ("something", 0, 1)


def test_short_work_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    fit(LinearizationMonitor(steps=2), TQDMProgressBar())
    assert "predictions" not in capsys.readouterr().out
    with Progress(auto_refresh=False, disable=True) as display:
        bar = RichBar(display, Work("short", 1.0))
        bar.update(1.0)
        bar.close()
        assert display.tasks == []


@pytest.mark.parametrize("off", ["none", "refresh_rate", "rich", "argument", "rank"])
def test_bars_that_are_off_are_not_made(off: str, at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a bar was made")

    monkeypatch.setattr(trainer_bars, "tqdm_bar", refuse)
    monkeypatch.setattr(trainer_bars, "RichBar", refuse)
    if off == "rank":
        monkeypatch.setattr(Trainer, "is_global_zero", property(lambda trainer: False))
    bars = {"none": [], "refresh_rate": [TQDMProgressBar(refresh_rate=0)], "rich": [RichProgressBar(refresh_rate=0)]}
    monitor = LinearizationMonitor(steps=2, progress=off != "argument", strict=True, batch_size=4)
    fit(monitor, *bars.get(off, [TQDMProgressBar()]), enable_progress_bar=off != "none")
    assert len(monitor.history) == 4


SCRIPT = """
import sys, time, torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_ntk import LinearizationMonitor

passing = []

class Network(LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, inputs):
        if not passing:
            print("passing", flush=True)
        passing.append(True)
        time.sleep(0.1)
        return self.body(inputs)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def on_train_start(self):
        print("captured", flush=True)

class Told(Callback):
    def on_exception(self, trainer, module, error):
        print("told", type(error).__name__, flush=True)

torch.manual_seed(0)
data = TensorDataset(torch.randn(300, 8), torch.randn(300, 1))
monitor = LinearizationMonitor(solver="lanczos", batch_size=1, progress=False)
trainer = Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[monitor, Told()],
                  enable_model_summary=False, enable_progress_bar=False)  # older versions of Lightning draw it on stdout
trainer.fit(Network(), DataLoader(data, batch_size=300))
"""


def test_an_interrupted_pass_ends_at_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path,
    )  # fmt: skip
    try:
        for line in process.stdout:
            if line.startswith("passing"):
                break
        time.sleep(0.5)
        assert process.poll() is None
        began = time.perf_counter()
        process.send_signal(signal.SIGINT)
        reaction = process.stdout.readline()
        seconds = time.perf_counter() - began
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert reaction == "told KeyboardInterrupt\n"
    assert "captured" not in output
    assert "Detected KeyboardInterrupt, attempting graceful shutdown" in errors
    assert process.returncode == 1, errors  # Lightning's own
    assert seconds < 2  # a tenth where no other process takes the time; the captures take half a minute and more


@pytest.mark.parametrize("kind", ["tqdm", "rich"])
def test_a_message_stands_on_a_line_of_its_own(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lightning.pytorch")  # whatever an example has set
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)  # with the stream from before the bars, as that of Lightning
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "handlers", [handler])
    if kind == "tqdm":
        with Tqdm(total=3, file=terminal, desc="Epoch 0", ncols=60):
            say("here I am")
        cleared = "\r" + " " * 60 + "\r"
        shown = terminal.getvalue()
        assert "\rLinearizationMonitor: here I am\n\rEpoch 0" in shown, shown
        assert cleared.strip("\r") in shown
    else:
        console = Console(file=terminal, force_terminal=True, width=60)
        with Progress(console=console) as progress:
            progress.add_task("Epoch 0")
            progress.refresh()
            say("here I am")
        lines = terminal.getvalue().splitlines()
        assert any(line.endswith("LinearizationMonitor: here I am") and "Epoch" not in line for line in lines)
    assert handler.stream is terminal
