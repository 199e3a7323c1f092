"""The callback in real Trainer runs."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from lightning_ntk import LinearizationMonitor, LinearizedTraining
from tests.problems import ConvNet, LinearModel, flatten, mlp

MSE = nn.MSELoss()
SCALARS = {
    "weight_distance", "relative_weight_distance", "weight_cosine", "weight_norm_ratio", "displacement",
    "prediction_rmse", "loss", "linearized_loss", "taylor_gap", "exact",
}  # fmt: skip


class Regression(LightningModule):
    """An ordinary LightningModule; what differs from plain gradient descent is given as options."""

    def __init__(self, body: nn.Module | None = None, lr=0.1, optimizer=torch.optim.SGD, schedule=None, **options):
        super().__init__()
        self.body = mlp(3) if body is None else body
        self.lr, self.optimizer, self.schedule, self.options = lr, optimizer, schedule, options

    def forward(self, inputs):
        return self.body(inputs)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = nn.functional.mse_loss(self(inputs), targets)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters(), lr=self.lr, **self.options)
        if self.schedule is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def digits(samples: int = 11) -> TensorDataset:
    """Six pixels of real digits, and a regression target of three numbers."""
    data = load_digits()
    images = torch.tensor(data.data[:samples, 18:24], dtype=torch.float32) / 16
    return TensorDataset(images, torch.tensor(data.data[:samples, 42:45], dtype=torch.float32) / 16)


def fit(
    monitor: LinearizationMonitor | None,
    module: LightningModule | None = None,
    data: Dataset | None = None,
    batch_size: int | None = None,
    shuffle: bool = False,
    **options,
) -> tuple[Trainer, LightningModule]:
    seed_everything(1, verbose=False)
    data = digits() if data is None else data
    module = Regression() if module is None else module
    defaults = {
        "max_steps": 30, "max_epochs": -1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    callbacks = [monitor] if monitor is not None else []
    trainer = Trainer(**(defaults | options | {"callbacks": callbacks + options.pop("callbacks", [])}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of training batches|The 'train_dataloader' does not have")
        trainer.fit(module, DataLoader(data, batch_size=batch_size or len(data), shuffle=shuffle))
    return trainer, module


def make_module(body=mlp, **options) -> Regression:
    torch.manual_seed(0)
    return Regression(body(3), **options)


def test_a_run_has_a_row_of_every_scalar_for_every_measured_step() -> None:
    monitor = LinearizationMonitor(steps=10, per_parameter=True)
    trainer, _ = fit(monitor, make_module(), max_steps=25)
    assert [row["step"] for row in monitor.history] == [0, 10, 20, 25]
    names = {f"parameter/body.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    for row in monitor.history:
        compared = {"gradient_mismatch"} if row["step"] else set()
        assert set(row) == SCALARS | names | compared | {"step"}
        assert all(type(value) is float and math.isfinite(value) for value in row.values())
    for tag in SCALARS:
        assert trainer.callback_metrics[f"ntk/{tag}"] == pytest.approx(monitor.history[-1][tag], rel=1e-6)
    assert monitor.history[0]["weight_distance"] == 0
    assert monitor.history[-1]["relative_weight_distance"] > 1e-3


@pytest.mark.tested("precision 64-true", "gradient_descent")
@pytest.mark.tested("learning-rate schedule", "gradient_descent")
def test_distances_equal_brute_force_in_float64() -> None:
    def schedule(step: int) -> float:
        return 0.5 * (1 + math.cos(step / 10))

    module = make_module(lr=0.2, schedule=schedule).double()
    data = TensorDataset(*(tensor.double() for tensor in digits().tensors))
    inputs, targets = data.tensors
    model = LinearModel(module.body, inputs)
    monitor = LinearizationMonitor(steps=[7, 40], strict=True)
    fit(monitor, module, data, max_steps=40, precision="64-true")
    linearized = model.train(targets, nn.MSELoss(), 40, lr=lambda step: 0.2 * schedule(step))
    trained = flatten(dict(module.body.named_parameters())).detach()
    row = monitor.history[-1]
    distance = (trained - linearized).norm().item()
    assert row["weight_distance"] == pytest.approx(distance, rel=1e-9)
    displacement = (trained - model.start).norm().item()
    assert row["displacement"] == pytest.approx(displacement, rel=1e-9)
    assert row["relative_weight_distance"] == pytest.approx(distance / displacement, rel=1e-9)
    cosine = torch.cosine_similarity(trained - model.start, linearized - model.start, dim=0).item()
    assert row["weight_cosine"] == pytest.approx(cosine, rel=1e-9)
    ratio = (linearized - model.start).norm().item() / displacement
    assert row["weight_norm_ratio"] == pytest.approx(ratio, rel=1e-9)
    outputs, prediction = module.body(inputs).detach(), model.predict(linearized)
    assert row["prediction_rmse"] == pytest.approx((outputs - prediction).square().mean().sqrt().item(), rel=1e-9)
    assert row["loss"] == pytest.approx(nn.functional.mse_loss(outputs, targets).item(), rel=1e-9)
    assert row["linearized_loss"] == pytest.approx(nn.functional.mse_loss(prediction, targets).item(), rel=1e-9)


@pytest.mark.tested("training bitwise unchanged", "gradient_descent", "replay")
@pytest.mark.parametrize("body", [mlp, ConvNet])
@pytest.mark.parametrize("batch_size", [11, 4])
def test_training_is_bitwise_the_same_with_and_without(body, batch_size: int) -> None:
    def run(monitor):
        module = make_module(body)
        trainer, module = fit(monitor, module, batch_size=batch_size, shuffle=True, max_steps=13)
        return module, trainer, torch.rand(3)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watched = LinearizationMonitor(steps=1, strict=True)
        (expected, _, rng), (actual, _, rng_watched) = run(None), run(watched)
    assert len(watched.history) == 14
    for name, value in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], value), name
    assert torch.equal(rng, rng_watched)
    assert actual.training == expected.training


def test_after_one_full_batch_step_every_network_is_its_linearization() -> None:
    monitor = LinearizationMonitor(strict=True)
    module = make_module().double()
    data = TensorDataset(*(tensor.double() for tensor in digits().tensors))
    fit(monitor, module, data, max_steps=1, precision="64-true")
    assert monitor.history[-1]["step"] == 1
    assert monitor.history[-1]["relative_weight_distance"] < 1e-13
    single = LinearizationMonitor(strict=True)
    fit(single, make_module(), max_steps=1)
    assert single.history[-1]["relative_weight_distance"] < 1e-5


def test_an_exactly_linear_model_stays_at_distance_zero() -> None:
    monitor = LinearizationMonitor(steps=50, strict=True)
    module = make_module(body=lambda outputs: nn.Linear(6, outputs)).double()
    data = TensorDataset(*(tensor.double() for tensor in digits().tensors))
    fit(monitor, module, data, max_steps=400, precision="64-true")
    assert len(monitor.history) == 9
    for row in monitor.history:
        assert row["relative_weight_distance"] < 1e-12
        assert row["prediction_rmse"] < 1e-12
        assert row["loss"] == pytest.approx(row["linearized_loss"], rel=1e-11)


def test_the_first_step_of_the_linearized_weights_is_the_gradient_of_the_module_itself() -> None:
    module = make_module(ConvNet).double().eval()  # S5, through the training_step of the user
    data = TensorDataset(*(tensor.double() for tensor in digits().tensors))
    module.log = lambda *args, **kwargs: None
    module.training_step(data.tensors, 0).backward()
    training = LinearizedTraining(module, data, lr=0.3, batch_size=4, progress=False)
    for name, p in module.named_parameters():
        torch.testing.assert_close(training.displacement(1)[name], -0.3 * p.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.tested("TensorBoard and CSV loggers", "gradient_descent")
def test_tensorboard_has_every_tag_at_the_right_steps(tmp_path: Path) -> None:
    monitor = LinearizationMonitor(name="lazy")
    logger = TensorBoardLogger(tmp_path)
    csv = CSVLogger(tmp_path)
    fit(monitor, make_module(), max_steps=42, logger=[logger, csv], log_every_n_steps=4)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("lazy/")} == {
        f"lazy/{tag}" for tag in SCALARS | {"gradient_mismatch"}
    }
    for tag in SCALARS:
        scalars = events.Scalars(f"lazy/{tag}")
        assert [event.step for event in scalars] == [0, 1, 2, 3, 4, 6, 7, 10, 13, 18, 24, 32, 42]
        assert [event.value for event in scalars] == pytest.approx([row[tag] for row in monitor.history], rel=1e-6)
    header = Path(csv.log_dir, "metrics.csv").read_text().splitlines()[0]
    assert "lazy/relative_weight_distance" in header


@pytest.mark.tested("ModelCheckpoint and EarlyStopping", "gradient_descent")
def test_metrics_can_be_monitored_by_other_callbacks(tmp_path: Path) -> None:
    monitor = LinearizationMonitor(steps=1)
    best = ModelCheckpoint(tmp_path, monitor="ntk/loss", every_n_epochs=1)
    stop = EarlyStopping("ntk/relative_weight_distance", patience=3, mode="min", check_on_train_epoch_end=True)
    trainer, _ = fit(monitor, make_module(), max_steps=50, enable_checkpointing=True, callbacks=[best, stop])
    assert trainer.global_step < 50  # the distance only grows
    assert monitor.history[-1]["step"] == trainer.global_step
    assert float(best.best_model_score) == pytest.approx(min(row["loss"] for row in monitor.history), rel=1e-5)


@pytest.mark.tested("end by max_steps, max_epochs or a callback", "gradient_descent")
def test_the_last_step_is_measured_however_training_ends() -> None:
    class StopAtEleven(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.global_step == 11

    for options, last in (
        ({"max_steps": 11}, 11),
        ({"max_steps": -1, "max_epochs": 5}, 5),
        ({"callbacks": [StopAtEleven()]}, 11),
        ({"max_steps": -1, "max_epochs": 5, "batch_size": 4}, 15),
    ):
        monitor = LinearizationMonitor(steps=1000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(monitor, make_module(), **options)
        assert [row["step"] for row in monitor.history] == [0, last]


@pytest.mark.tested("gradient accumulation", "gradient_descent")
def test_accumulated_batches_count_as_one_step() -> None:
    monitor = LinearizationMonitor(steps=1, strict=True)
    data = TensorDataset(*(tensor[:10].double() for tensor in digits().tensors))
    module = make_module().double()
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=UserWarning)
        warnings.filterwarnings("ignore", "The 'train_dataloader'|The number of training batches")
        fit(monitor, module, data, batch_size=5, accumulate_grad_batches=2, max_steps=3, precision="64-true")
    assert [row["step"] for row in monitor.history] == [0, 1, 2, 3]
    assert monitor.history[1]["relative_weight_distance"] < 1e-12


@pytest.mark.tested("second fit", "gradient_descent")
def test_a_second_fit_captures_anew() -> None:
    monitor = LinearizationMonitor(steps=10)
    _, module = fit(monitor, make_module(), max_steps=20)
    first = monitor.training
    fit(monitor, module, max_steps=10)
    assert monitor.training is not first
    assert [row["step"] for row in monitor.history] == [0, 10]
    assert monitor.history[0]["weight_distance"] == 0


@pytest.mark.tested("passes in float64", "gradient_flow")
def test_gradient_flow_and_float64_passes() -> None:
    monitor = LinearizationMonitor(dynamics="gradient_flow", dtype="float64", steps=[30], jacobian="stored")
    fit(monitor, make_module(lr=0.01))
    assert monitor.training.dynamics == "gradient_flow"
    assert monitor.training.initial_predictions.dtype == torch.float64
    displacement = monitor.training.displacement(30)
    length = sum(value.square().sum() for value in displacement.values()).sqrt().item()
    row = monitor.history[-1]
    assert row["weight_norm_ratio"] * row["displacement"] == pytest.approx(length, rel=1e-9)


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"module": {"optimizer": torch.optim.Adam, "lr": 1e-3}}, "its optimizer is Adam"),
        ({"module": {"momentum": 0.9}, "monitor": {"dynamics": "gradient_flow"}}, "it uses momentum 0.9"),
        ({"module": {"weight_decay": 0.01}, "monitor": {"dynamics": "gradient_flow"}}, "it uses weight decay 0.01"),
        ({"module": {"maximize": True, "lr": 1e-3}}, "it maximizes its loss"),
        (
            {"module": {"body": ConvNet}, "monitor": {"loss": nn.MSELoss(), "mismatch": "log"}},
            "batch statistics in BatchNorm.*; it trains with dropout",
        ),
        ({"batch_size": 4}, "each step sees 4 of 11 samples"),
        ({"batch_size": 4, "accumulate_grad_batches": 2}, "each step sees 8 of 11 samples"),
        ({"batch_size": 6, "accumulate_grad_batches": 2}, "batches of unequal size"),
        ({"accumulate_grad_batches": 2}, "divides gradients by 2 though an epoch has 1 batches"),
        ({"gradient_clip_val": 0.5}, "clips gradients at 0.5"),
        ({"monitor": {"reference": digits(5)}}, "trains on 11 samples while the reference has 5"),
    ],
)
def test_what_the_dynamics_do_not_describe_is_said_once(options: dict, phrase: str) -> None:
    options = dict(options)
    monitor = LinearizationMonitor(**({"dynamics": "gradient_descent"} | options.pop("monitor", {})))
    module = make_module(**options.pop("module", {}))
    with pytest.warns(UserWarning, match=phrase) as record:
        fit(monitor, module, max_steps=5, **options)
    assert sum("compares this run with gradient" in str(warning.message) for warning in record) == 1


def test_parameter_groups_that_do_not_commute_are_said() -> None:
    class Groups(Regression):
        def configure_optimizers(self):
            groups = [{"params": self.body[0].parameters(), "weight_decay": 0.1}, {"params": self.body[2].parameters()}]
            return torch.optim.SGD(groups, lr=0.1)

    with pytest.warns(UserWarning, match=r"different values of weight decay \(0, 0.1\)"):
        fit(LinearizationMonitor(dynamics="replay"), Groups(), max_steps=3)


def test_a_sampler_that_draws_otherwise_is_said() -> None:
    loader = DataLoader(digits(), batch_size=11, sampler=WeightedRandomSampler([1.0] * 11, 11))
    trainer = Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[LinearizationMonitor(dynamics="gradient_descent")],
    )  # fmt: skip
    with pytest.warns(UserWarning, match="draws its samples with WeightedRandomSampler"):
        trainer.fit(make_module(), loader)


def test_full_batch_gradient_descent_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=UserWarning)
        warnings.filterwarnings("ignore", "The 'train_dataloader'|The number of training batches")
        fit(LinearizationMonitor(), make_module(), max_steps=3)


@pytest.mark.tested("divergence", "gradient_descent")
def test_a_schedule_that_becomes_unstable_is_named_once_and_training_goes_on() -> None:
    monitor = LinearizationMonitor(steps=200, loss=MSE)
    module = make_module(body=lambda outputs: nn.Sequential(nn.Linear(6, outputs), nn.Tanh()), lr=0.5)
    module.schedule = lambda step: 1.0 if step < 5 else 40.0
    with pytest.warns(UserWarning, match="Step 6: the learning rate 20 is above") as record:
        trainer, _ = fit(monitor, module, max_steps=1200)
    assert trainer.global_step == 1200
    messages = [str(warning.message) for warning in record]
    assert sum("Step 6" in message for message in messages) == 1
    assert sum("diverged beyond" in message for message in messages) == 1
    assert monitor.history[-1]["step"] < 1200


@pytest.mark.tested("failing measurement", "gradient_descent")
def test_a_failing_measurement_is_reported_once_and_does_not_end_training() -> None:
    class Broken(Dataset):
        calls = 0

        def __len__(self):
            return 11

        def __getitem__(self, index):
            Broken.calls += 1
            if Broken.calls > 300:
                raise OSError("the disk is gone")
            return tuple(tensor[index] for tensor in digits().tensors)

    options = {"module": make_module(), "data": digits(), "max_steps": 30}
    monitor = LinearizationMonitor(reference=Broken(), steps=1)
    with pytest.warns(UserWarning, match="training goes on. OSError: the disk is gone") as record:
        trainer, _ = fit(monitor, **options)
    assert trainer.global_step == 30
    assert sum("the disk is gone" in str(warning.message) for warning in record) == 1
    assert 2 < len(monitor.history) < 31
    Broken.calls = 0
    with pytest.raises(OSError, match="the disk is gone"):
        fit(LinearizationMonitor(reference=Broken(), steps=1, strict=True), **options)


class TwoOptimizers(Regression):
    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.body[0], self.body[2])]

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        raise AssertionError("training must not start")


class Untouched(Regression):
    def training_step(self, batch, batch_idx):
        raise AssertionError("training must not start")


@pytest.mark.parametrize(
    ("monitor", "run", "message"),
    [
        ({}, {"module": TwoOptimizers}, "one optimizer but it has 2"),
        ({"loss": nn.functional.cross_entropy, "dynamics": "gradient_descent"}, {}, "squared loss"),
        ({"loss": nn.NLLLoss()}, {}, "failed on them"),
        ({"loss": MSE, "reference": TensorDataset(torch.zeros(0, 6), torch.zeros(0, 3))}, {}, "empty"),
        (
            {"loss": MSE, "reference": TensorDataset(torch.full((4, 6), torch.nan), torch.zeros(4, 3))},
            {},
            "finite inputs",
        ),
        (
            {"loss": MSE, "reference": TensorDataset(torch.zeros(4, 6), torch.zeros(4, 2))},
            {},
            r"\(4, 3\), but got \(4, 2\)",
        ),
        ({"predict": lambda module, inputs: module(inputs)[:, :, None]}, {}, r"\(batch,\) but got shape \(\d+, 3, 1\)"),
    ],
)
def test_bad_input_ends_the_run_before_training_starts(monitor: dict, run: dict, message: str) -> None:
    module = run.pop("module", Untouched)()
    with pytest.raises(MisconfigurationException, match=message):
        fit(LinearizationMonitor(**monitor), module, **run)


def test_more_memory_than_there_is_ends_the_run_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ntk.utilities.distributed.available_memory", lambda *_: 1000)
    with pytest.raises(MisconfigurationException, match="Use at most"):
        fit(LinearizationMonitor(loss=MSE), Untouched())


@pytest.mark.tested("several monitors", "gradient_descent", "gradient_flow")
def test_equal_names_are_refused() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback"):  # Lightning's own check of `state_key`
        fit(LinearizationMonitor(), make_module(), callbacks=[LinearizationMonitor(steps=5)])
    both = LinearizationMonitor(), LinearizationMonitor(steps=5, name="other", dynamics="gradient_flow")
    fit(both[0], make_module(), max_steps=5, callbacks=[both[1]])
    assert both[0].history[-1]["step"] == both[1].history[-1]["step"] == 5


@pytest.mark.parametrize(
    ("argument", "value"),
    [("steps", 0), ("steps", "often"), ("steps", [1, -2]), ("steps", True), ("dynamics", "adam"), ("reference", "val"),
     ("dtype", "float16")],
)  # fmt: skip
def test_bad_arguments_are_named(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"argument `{argument}`"):
        LinearizationMonitor(**{argument: value})


@pytest.mark.tested("batch transfer hooks", "gradient_descent")
def test_data_module_hooks_apply_to_the_reference() -> None:
    class Scaled(Regression):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return 3 * batch[0], batch[1]

    monitor = LinearizationMonitor(steps=1, strict=True)
    fit(monitor, Scaled(make_module().body), max_steps=1)
    assert monitor.history[-1]["relative_weight_distance"] < 1e-5


def test_logarithmic_steps() -> None:
    monitor = LinearizationMonitor()
    steps = [step for step in range(10_001) if monitor.should_measure(step)]
    assert steps[:12] == [0, 1, 2, 3, 4, 6, 7, 10, 13, 18, 24, 32]
    assert len(steps) == 32
    assert {100, 1000, 10_000} <= set(steps)


def test_figure(tmp_path: Path) -> None:
    monitor = LinearizationMonitor()
    with pytest.raises(ValueError, match="empty"):
        monitor.plot()
    fit(monitor, make_module(), max_steps=100)
    figure, (distance, loss) = monitor.plot()
    assert len(distance.lines[0].get_xdata()) == len(monitor.history) - 1
    assert list(loss.lines[1].get_ydata()) == [row["linearized_loss"] for row in monitor.history]
    assert "relative weight distance" in distance.get_ylabel()
    assert distance.get_xlabel() == "optimizer step"
    figure.savefig(tmp_path / "figure.png")
