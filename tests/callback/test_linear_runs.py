"""A network that is linear in its weights is its own linearization: every distance is 0, whatever the run does."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset

from lightning_ntk import LinearizationMonitor
from lightning_ntk.callback import captured_run
from tests.callback.test_monitor import Regression, digits
from tests.callback.trainer_runs import WEIGHTS_ONLY, distance, make, train


def twelve() -> TensorDataset:
    return digits(12)


@pytest.mark.tested("unequal micro-batches", "replay")
@pytest.mark.parametrize(("batch_size", "options", "sampler", "phrase"), [
    (5, {"accumulate_grad_batches": 3}, None, "unequal size"),
    (12, {}, lambda data: RandomSampler(data, replacement=True), "with replacement"),
    (6, {}, lambda data: RandomSampler(data, num_samples=6), "6 of 12 samples"),
    (5, {}, lambda data: SequentialSampler(range(5)), "5 of 12 samples"),
])  # fmt: skip
def test_runs_that_are_not_full_batch_are_not_taken_for_it(batch_size, options, sampler, phrase: str) -> None:
    data = twelve()
    monitor = LinearizationMonitor(steps=1, strict=True)
    chosen = {} if sampler is None else {"sampler": sampler(data)}
    train(make(), DataLoader(data, batch_size=batch_size, **chosen), [monitor], **options)
    assert phrase in monitor.reason
    assert monitor.dynamics_used == "replay"
    assert monitor.history[-1]["step"] >= 4
    assert distance(monitor) < 1e-12


def test_the_twin_that_takes_over_has_the_batches_that_the_replay_has_seen() -> None:
    class Augmented(Dataset):
        """The last samples are another thing in training."""

        def __init__(self) -> None:
            self.inputs, self.targets = twelve().tensors

        def __len__(self) -> int:
            return len(self.inputs)

        def __getitem__(self, index):
            return self.inputs[index] + (0.5 if index >= 6 else 0.0), self.targets[index]

    monitor = LinearizationMonitor(twelve(), steps=1, strict=True)
    with pytest.warns(UserWarning, match="follows the run with the linearized twin"):
        train(make(lr=0.1), DataLoader(Augmented(), batch_size=5), [monitor], accumulate_grad_batches=3)
    assert monitor.dynamics_used == "twin"
    assert distance(monitor) < 1e-12


def test_a_late_capture_goes_by_the_learning_rate_that_is_left() -> None:
    monitor = LinearizationMonitor(
        dynamics="gradient_descent", steps=1, capture_at=3, closest=True, taylor=False, strict=True
    )
    module = make(lr=20.0, scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: 1.0 if epoch < 3 else 1e-3
    ))  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(module, DataLoader(digits(), batch_size=11), [monitor], max_epochs=13)
    assert not [w for w in caught if "learning rate" in str(w.message)]
    assert monitor.training.lr == pytest.approx(0.02)
    assert monitor.history[-1]["closest_time"] == 10


def test_a_stop_that_the_trainer_does_not_heed_yet_is_not_the_last_step() -> None:
    class Stopping(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.should_stop or trainer.global_step >= 3

    monitor = LinearizationMonitor(steps=[20], strict=True)
    train(make(), DataLoader(digits(), batch_size=11), [Stopping(), monitor], min_steps=12, max_epochs=50)
    assert [row["step"] for row in monitor.history] == [0, 12]


def test_a_late_capture_that_fails_is_not_tried_again(tmp_path) -> None:
    class Fails(TensorDataset):
        reads = 0

        def __getitem__(self, index):
            Fails.reads += 1
            raise OSError("the disk is gone")

    def fit(monitor: LinearizationMonitor, steps: int, **options) -> Trainer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = Trainer(
                max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[monitor],
                enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=3,
            )  # fmt: skip
            trainer.fit(make(), DataLoader(digits(), batch_size=4), **WEIGHTS_ONLY, **options)
            return trainer

    monitor = LinearizationMonitor(Fails(*digits().tensors), capture_at=2)
    trainer = fit(monitor, 5)
    assert Fails.reads == 1
    assert monitor.history == []
    trainer.save_checkpoint(tmp_path / "lost.ckpt")
    resumed = LinearizationMonitor(Fails(*digits().tensors), capture_at=2)
    fit(resumed, 8, ckpt_path=tmp_path / "lost.ckpt")
    assert Fails.reads == 1
    assert resumed.comparison is None


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_what_needs_the_modes_is_said_where_the_choice_has_none() -> None:
    monitor = LinearizationMonitor(closest=True, modes=2)
    with pytest.warns(UserWarning, match="logs nothing for `closest` and `modes`"):
        train(make(), DataLoader(digits(), batch_size=4), [monitor])
    assert not any(tag.startswith(("mode/", "closest")) for tag in monitor.history[-1])


def test_differences_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, look = [], captured_run.run_differences

    def spy(trainer, module, optimizer, dynamics, size):
        asked.append(dynamics)
        return look(trainer, module, optimizer, dynamics, size)

    monkeypatch.setattr(captured_run, "run_differences", spy)
    train(make(), DataLoader(digits(), batch_size=4), [LinearizationMonitor()])
    assert sorted(asked) == ["gradient_descent", "replay"]


def test_signs_of_modes_do_not_jump_when_lanczos_goes_on() -> None:
    torch.manual_seed(0)
    module = Regression(nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3)), lr=0.5).double()
    options = {"dynamics": "gradient_descent", "steps": 1, "modes": 2, "strict": True, "taylor": False}
    monitors = [LinearizationMonitor(solver=solver, name=solver, **options) for solver in ("eigh", "lanczos")]
    data = TensorDataset(*(tensor.double() for tensor in digits(60).tensors))
    train(module, DataLoader(data, batch_size=60), monitors, max_epochs=150)
    assert monitors[1].training.num_products > 10
    for row, other in zip(*(monitor.history for monitor in monitors), strict=True):
        for tag in ("mode/1/residual", "mode/2/residual"):
            assert other[tag] == pytest.approx(row[tag], rel=1e-2, abs=1e-4), row["step"]
