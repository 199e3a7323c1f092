"""Runs as people really do them, followed by the modes, replay and the twin: against each other and brute force."""

import copy
import math
import warnings

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_ntk import LinearizationMonitor, LinearizedTraining
from tests.callback.test_monitor import Regression, digits, fit, make_module
from tests.problems import LinearModel, flatten, mlp


class Classifier(Regression):
    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return nn.functional.cross_entropy(self(inputs), labels)


def classes(samples: int = 31) -> TensorDataset:
    data = load_digits(n_class=3)
    images = torch.tensor(data.data[:samples, 18:24]).double() / 16
    return TensorDataset(images, torch.tensor(data.target[:samples]))


def classifier(body=mlp, **options) -> Classifier:
    torch.manual_seed(0)
    return Classifier(body(3), **options).double()


def rows(dynamics: str, module, data: Dataset, run: dict, **monitor) -> list[dict[str, float]]:
    watching = LinearizationMonitor(dynamics=dynamics, strict=True, **({"steps": 5} | monitor))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(watching, module, data, **({"max_steps": 31, "precision": "64-true"} | run))
    return watching.history


def assert_same(first: list[dict[str, float]], second: list[dict[str, float]], tolerance: float) -> None:
    assert len(first) == len(second) > 2
    for row, other in zip(first, second, strict=True):
        assert row.keys() == other.keys()
        for tag, value in row.items():
            assert other[tag] == pytest.approx(value, rel=tolerance, abs=tolerance * 1e-3), (tag, row["step"])


FULL_BATCH = {
    "plain": {"lr": 0.3},
    "schedule": {"lr": 0.5, "schedule": lambda step: 0.5 * (1 + math.cos(step / 10))},
    "Nesterov": {"lr": 0.2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "dampening": {"lr": 0.2, "momentum": 0.9, "dampening": 0.1},
    "warm-up from zero": {"lr": 0.5, "momentum": 0.5, "schedule": lambda step: min(step / 10, 1.0)},
}


@pytest.mark.tested("capture_at", "gradient_descent", "replay", "twin")
@pytest.mark.tested("momentum, dampening, Nesterov", "gradient_descent", "replay", "twin")
@pytest.mark.tested("learning-rate schedule", "gradient_descent", "replay", "twin")
@pytest.mark.tested("weight decay", "gradient_descent", "replay", "twin")
@pytest.mark.tested("precision 64-true", "gradient_descent", "replay", "twin")
@pytest.mark.parametrize("name", FULL_BATCH)
@pytest.mark.parametrize("capture_at", [0, 6])
def test_modes_replay_and_twin_agree_on_a_full_batch_run(name: str, capture_at: int) -> None:
    data = TensorDataset(*(tensor.double() for tensor in digits().tensors))
    first, second, third = (
        rows(dynamics, make_module(**FULL_BATCH[name]).double(), data, {}, capture_at=capture_at)
        for dynamics in ("gradient_descent", "replay", "twin")
    )
    assert first[-1]["relative_weight_distance"] > 1e-4
    assert_same(first, second, 1e-11)
    assert_same(first, third, 1e-11)


MINIBATCH = {
    "momentum and clipping": ({"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, {"gradient_clip_val": 0.3}),
    "accumulation": ({"lr": 0.3, "momentum": 0.9, "nesterov": True}, {"accumulate_grad_batches": 3}),
    "schedule": ({"lr": 0.5, "schedule": lambda step: 1 / (1 + step)}, {}),
}


@pytest.mark.tested("minibatches", "replay", "twin")
@pytest.mark.tested("gradient accumulation", "replay", "twin")
@pytest.mark.tested("clipping by norm", "replay", "twin")
@pytest.mark.tested("cross-entropy and other losses", "replay", "twin")
@pytest.mark.tested("evaluation set", "replay", "twin")
@pytest.mark.parametrize("name", MINIBATCH)
def test_replay_and_twin_agree_on_minibatches(name: str) -> None:
    options, run = MINIBATCH[name]
    run = {"batch_size": 7, "shuffle": True} | run
    first, second = (
        rows(dynamics, classifier(**options), classes(), run, loss=nn.CrossEntropyLoss(), evaluation=classes(50))
        for dynamics in ("replay", "twin")
    )
    assert first[-1]["relative_weight_distance"] > 1e-4
    assert_same(first, second, 1e-11)


@pytest.mark.tested("Adam and other optimizers", "twin")
def test_the_twin_of_an_adam_run_is_brute_force() -> None:
    data, module = classes(), classifier(lr=0.02, optimizer=torch.optim.AdamW, weight_decay=0.1)
    inputs, labels = data.tensors
    model = LinearModel(module.body, inputs)
    steps = 13
    monitor = LinearizationMonitor(dynamics="twin", loss=nn.CrossEntropyLoss(), steps=[steps], strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(
            monitor,
            module,
            data,
            max_steps=steps,
            batch_size=7,
            accumulate_grad_batches=2,
            gradient_clip_val=0.5,
            precision="64-true",
        )
    micro = [torch.arange(i, min(i + 7, 31)) for i in range(0, 31, 7)]
    # Lightning divides by two in the last step of an epoch too, which has one batch.
    weights = model.start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([weights], lr=0.02, weight_decay=0.1)
    epoch = [micro[:2], micro[2:4], micro[4:]]
    for step in range(steps):
        optimizer.zero_grad()
        for batch in epoch[step % 3]:
            (nn.functional.cross_entropy(model.predict(weights)[batch], labels[batch]) / 2).backward()
        torch.nn.utils.clip_grad_norm_([weights], 0.5)
        optimizer.step()
    linearized = weights.detach()
    row = monitor.history[-1]
    trained = flatten(dict(module.body.named_parameters())).detach()
    assert row["weight_distance"] == pytest.approx((trained - linearized).norm().item(), rel=1e-10)
    outputs, linear_outputs = module.body(inputs).detach(), model.predict(linearized)
    expanded = model.predict(trained)
    assert row["loss"] == pytest.approx(nn.functional.cross_entropy(outputs, labels).item(), rel=1e-10)
    assert row["linearized_loss"] == pytest.approx(
        nn.functional.cross_entropy(linear_outputs, labels).item(), rel=1e-10
    )
    gap = ((outputs - expanded).norm() / (outputs - model.outputs).norm()).item()
    assert row["taylor_gap"] == pytest.approx(gap, rel=1e-9)
    for kind, values in (("", outputs), ("linearized_", linear_outputs), ("taylor_", expanded)):
        assert row[f"{kind}accuracy"] == pytest.approx((values.argmax(1) == labels).double().mean().item())


OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
}


@pytest.mark.tested("Adam and other optimizers", "twin")
@pytest.mark.tested("precision 32-true", "replay", "twin")
@pytest.mark.parametrize("precision", ["64-true", "32-true"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_linear_model_is_its_linearization_under_every_optimizer(name: str, precision: str) -> None:
    optimizer, options = OPTIMIZERS[name]
    double = precision == "64-true"
    for dynamics in ("replay", "twin") if name == "SGD" else ("twin",):
        module = classifier(lambda outputs: nn.Linear(6, outputs), optimizer=optimizer, **options)
        data = classes()
        if not double:
            module, data = module.float(), TensorDataset(data.tensors[0].float(), data.tensors[1])
        run = {"batch_size": 7, "shuffle": True, "precision": precision, "gradient_clip_val": 0.5, "max_steps": 40}
        history = rows(dynamics, module, data, run, loss=nn.CrossEntropyLoss())
        assert max(row["relative_weight_distance"] for row in history) <= (1e-12 if double else 1e-5)
        assert history[-1]["displacement"] > 0.1


@pytest.mark.parametrize(
    ("module", "run", "monitor", "dynamics", "reason"),
    [
        ({}, {}, {}, "gradient_descent", "the run is full-batch SGD"),
        ({"momentum": 0.9, "weight_decay": 0.1}, {}, {}, "gradient_descent", "the run is full-batch SGD"),
        ({}, {"batch_size": 4}, {}, "replay", "each step sees 4 of 11 samples"),
        ({}, {}, {"loss": nn.SmoothL1Loss(beta=0.1), "mismatch": "log"}, "replay", "its loss is not a squared one"),
        ({"optimizer": torch.optim.Adam}, {}, {}, "twin", "its optimizer is Adam"),
        ({}, {"gradient_clip_val": 1.0}, {}, "replay", "it clips gradients at 1.0"),
        (
            {},
            {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
            {},
            "twin",
            "clips gradients by value at 1.0",
        ),
        ({}, {}, {"reference": digits(5)}, "twin", "trains on 11 samples while the reference has 5"),
        ({}, {}, {"reference": None}, "twin", "there is no reference set"),
    ],
)
def test_the_first_exact_dynamics_are_taken(
    module: dict, run: dict, monitor: dict, dynamics: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    watching = LinearizationMonitor(steps=2, strict=True, **monitor)
    with caplog.at_level("INFO", logger="lightning.pytorch"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(watching, make_module(**module), max_steps=3, **run)
    assert watching.comparison is not None
    assert watching.dynamics_used == dynamics
    assert sum(reason in message for message in caplog.messages) == 1
    assert watching.history[-1]["step"] == 3


def test_a_kernel_that_does_not_fit_leaves_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ntk.utilities.distributed.available_memory", lambda *_: 1000)
    monitor = LinearizationMonitor(steps=2, strict=True)
    fit(monitor, make_module(), max_steps=3, batch_size=4)
    assert monitor.comparison is not None
    assert monitor.dynamics_used == "twin"


class Noisy(Dataset):
    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = (tensor[index] for tensor in digits().tensors)
        return inputs + 0.01 * torch.randn(6), targets


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(*digits().tensors, strict=True)


@pytest.mark.tested("augmented or streamed data", "twin")
@pytest.mark.parametrize("data", [Noisy(), Stream()])
def test_data_without_a_fixed_order_is_for_the_twin_alone(data: Dataset) -> None:
    def run(dynamics: str) -> LinearizationMonitor:
        monitor = LinearizationMonitor(steps=2, strict=True, dynamics=dynamics)
        trainer = Trainer(
            max_steps=5,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            callbacks=[monitor],
        )
        trainer.fit(make_module(), DataLoader(data, batch_size=11))
        return monitor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monitor = run("auto")
        assert monitor.dynamics_used == "twin"
        weights = {
            "step", "weight_distance", "relative_weight_distance", "weight_cosine", "weight_norm_ratio", "displacement",
            "gradient_mismatch", "exact",
        }  # fmt: skip
        functions = {"loss", "linearized_loss", "prediction_rmse", "taylor_gap"} if isinstance(data, Noisy) else set()
        assert set(monitor.history[-1]) == weights | functions
        assert 0 < monitor.history[-1]["relative_weight_distance"] < 1
        for dynamics in ("gradient_descent", "replay"):
            with pytest.raises(MisconfigurationException, match=r"Expected .* fixed order|two reads"):
                run(dynamics)


def test_samples_that_are_changed_in_training_only_are_noticed_on_the_first_batch() -> None:
    class Augmented(Regression):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return (batch[0] + 0.1, batch[1]) if self.training else batch

    other = TensorDataset(digits().tensors[0] + 1, digits().tensors[1])
    torch.manual_seed(0)
    monitor = LinearizationMonitor(steps=2, strict=True, reference=other)
    with pytest.warns(
        UserWarning, match="follows the run with the linearized twin.*11 of its 11 samples are not in it"
    ):
        fit(monitor, Regression(mlp(3), lr=0.3, weight_decay=0.1), max_steps=5, gradient_clip_val=10.0)
    assert monitor.comparison is not None
    assert monitor.dynamics_used == "twin"
    assert monitor.history[-1]["step"] == 5
    with pytest.raises(MisconfigurationException, match=r"cannot replay this run.*11 of its 11 samples"):
        fit(LinearizationMonitor(dynamics="replay", reference=other), make_module(), max_steps=5)


@pytest.mark.parametrize("dynamics", ["gradient_descent", "replay", "twin"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_not_that_of_the_run_is_found_in_the_first_step(dynamics: str, accumulate: int) -> None:
    class Doubled(Regression):
        def training_step(self, batch, batch_idx):
            return 2 * super().training_step(batch, batch_idx)

    run = {"batch_size": 5, "accumulate_grad_batches": accumulate, "max_steps": 3}
    for monitor, body, phrase in (
        ({"dynamics": dynamics, "loss": nn.MSELoss()}, Doubled, r"gradient is 2 times that of the loss"),
        (
            {"dynamics": "twin", "loss": nn.HuberLoss(delta=0.1)},
            Regression,
            "gradient differs from that of the loss.*of its norm",
        ),
    ):
        torch.manual_seed(0)
        module = body(mlp(3))
        start = copy.deepcopy(module.state_dict())
        with pytest.raises(MisconfigurationException, match=rf"first step. The run's {phrase}.*Leave out `loss`"):
            fit(LinearizationMonitor(**monitor), module, **run)
        assert all(torch.equal(value, start[name]) for name, value in module.state_dict().items())
        logged = LinearizationMonitor(**monitor, mismatch="log", steps=1)
        with pytest.warns(UserWarning, match=f"does not follow the loss of this run.*{phrase}") as record:
            fit(logged, module, **run)
        assert sum("does not follow the loss" in str(warning.message) for warning in record) == 1
        assert logged.history[-1]["gradient_mismatch"] > 0.1


def test_layers_in_another_mode_are_one_warning_at_the_line_of_the_fit_with_what_to_do() -> None:
    body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, 3))
    monitor = LinearizationMonitor(loss=nn.MSELoss(), dynamics="twin", mismatch="log", steps=1, dtype=torch.float64)
    with pytest.warns(UserWarning, match="with its linearized twin.*Without `loss`, `predict` and `unpack`") as record:
        fit(monitor, Regression(body), max_steps=3)
    (warning,) = [w for w in record if "LinearizationMonitor" in str(w.message)]
    assert warning.filename == fit.__code__.co_filename
    assert monitor.history[1]["gradient_mismatch"] > 0.1
    assert [row["exact"] for row in monitor.history] == [0, 0, 0, 0]
    assert monitor.dtype == "float64"


def test_the_loss_of_a_run_without_surprises_is_not_reported() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=UserWarning)
        warnings.filterwarnings(
            "ignore", "The 'train_dataloader'|The number of training batches|does not have many workers"
        )
        fit(LinearizationMonitor(dynamics="twin"), make_module(), max_steps=3)
    with pytest.warns(UserWarning, match="mixed precision|bf16") as record:
        fit(LinearizationMonitor(dynamics="twin"), make_module(), max_steps=3, precision="bf16-mixed")
    assert not any("does not follow the loss" in str(warning.message) for warning in record)


def test_parameters_that_thaw_or_freeze_are_said() -> None:
    class Thaw(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.body[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 2:
                self.unfreeze_and_add_param_group(pl_module.body[0], optimizer)

    class Partly(Regression):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    for dynamics, phrase in (
        ("gradient_descent", "frozen when the network was linearized"),
        ("twin", "linearized network is lost in step 3.*not"),
    ):
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match=phrase):
            trainer, _ = fit(
                LinearizationMonitor(dynamics=dynamics, steps=1), Partly(mlp(3)), max_steps=5, callbacks=[Thaw()]
            )
        assert trainer.global_step == 5

    class Freezing(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == 3:
                self.body[0].requires_grad_(False)

        def on_before_zero_grad(self, optimizer):
            pass

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"Step 4: the run began or ceased to train body.0.bias, body.0.weight"):
        fit(LinearizationMonitor(dynamics="replay", steps=1), Freezing(mlp(3)), max_steps=6)
    torch.manual_seed(0)
    frozen = Freezing(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), optimizer=torch.optim.Adam, lr=1e-3)
    monitor = LinearizationMonitor(steps=1, per_parameter=True, strict=True)
    fit(monitor, frozen, max_steps=12)
    # Frozen in both networks alike: their first layers stay as near as they were.
    ratios = {row["parameter/body.0.weight"] for row in monitor.history if row["step"] >= 3}
    assert len(ratios) == 1


@pytest.mark.tested("residuals of leading modes", "gradient_descent")
def test_gradient_flow_is_the_idealized_question_whatever_the_optimizer_does() -> None:
    data = TensorDataset(*(tensor.double() for tensor in digits().tensors))
    options = {"momentum": 0.9, "weight_decay": 0.01, "lr": 0.05}
    module = make_module(**options).double()
    monitor = LinearizationMonitor(dynamics="gradient_flow", steps=[8], strict=True)
    with pytest.warns(UserWarning, match="it uses momentum 0.9; it uses weight decay 0.01"):
        fit(monitor, module, data, max_steps=8, precision="64-true")
    flow = LinearizedTraining(make_module(**options).double(), data, lr=0.05, dynamics="gradient_flow", progress=False)
    moved = flatten(flow.displacement(8)).norm().item()
    row = monitor.history[-1]
    assert row["weight_norm_ratio"] * row["displacement"] == pytest.approx(moved, rel=1e-9)


@pytest.mark.parametrize("dynamics", ["replay", "twin"])
def test_a_linearized_network_that_diverges_is_reported_once_and_training_goes_on(dynamics: str) -> None:
    module = make_module(body=lambda outputs: nn.Sequential(nn.Linear(6, outputs), nn.Tanh()), lr=30.0)
    monitor = LinearizationMonitor(dynamics=dynamics, steps=5, loss=nn.MSELoss())
    with pytest.warns(UserWarning, match=r"step \d+.*training goes on. OverflowError") as record:
        trainer, _ = fit(monitor, module, max_steps=1500, batch_size=5)
    assert trainer.global_step == 1500
    assert sum("OverflowError" in str(warning.message) for warning in record) == 1
    assert len(monitor.history) > 2


def test_residuals_of_leading_modes() -> None:
    data, module = digits(), make_module(lr=0.2)
    monitor = LinearizationMonitor(
        steps=[20], modes=2, dtype="float64", strict=True, dynamics="gradient_descent", solver="eigh"
    )
    fit(monitor, module, data, max_steps=20)
    training, row = monitor.training, monitor.history[-1]
    assert isinstance(training, LinearizedTraining)
    top = training.modes.basis[:, -1]
    linearized = (training.predictions(20).double() - training.targets).flatten() @ top
    assert row["mode/1/linearized_residual"] == pytest.approx(linearized.item(), rel=1e-5)
    trained = (training.problem.predict(dict(module.named_parameters())) - training.targets).flatten() @ top
    assert row["mode/1/residual"] == pytest.approx(trained.item(), rel=1e-6)
    assert "mode/2/residual" in row
    assert "mode/3/residual" not in row


@pytest.mark.tested("closest time", "gradient_descent")
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_closest_time_is_that_of_a_search_by_brute_force(momentum: float) -> None:
    data = TensorDataset(*(tensor.double() for tensor in digits().tensors))
    module = make_module(lr=0.3, momentum=momentum, schedule=lambda step: 1 / (1 + step / 20)).double()
    model = LinearModel(module.body, data.tensors[0])
    history = rows("gradient_descent", module, data, {"max_steps": 40}, closest=True, solver="eigh", steps=[40])
    row = history[-1]
    assert history[0]["closest_time"] == 0
    trained = flatten(dict(module.body.named_parameters())).detach()
    linearized = [model.train(data.tensors[1], nn.MSELoss(), s, lr=0.3, momentum=momentum) for s in range(60)]
    distances = torch.stack([(trained - weights).norm() for weights in linearized]) / (trained - model.start).norm()
    assert row["closest_time"] == distances.argmin()
    assert 0 < row["closest_time"] < 59
    assert row["closest_distance"] == pytest.approx(distances.min().item(), rel=1e-8)
    moved = trained - model.start
    in_span = model.jacobian.T @ torch.linalg.lstsq(model.jacobian.T, moved.unsqueeze(1), driver="gelsd").solution
    floor = ((moved - in_span.squeeze(1)).norm() / moved.norm()).item()
    assert row["distance_floor"] == pytest.approx(floor, rel=1e-9)
    assert row["distance_floor"] <= row["closest_distance"] <= row["relative_weight_distance"]


def test_what_needs_modes_is_refused_without_them() -> None:
    with pytest.raises(ValueError, match="which need the modes"):
        LinearizationMonitor(dynamics="twin", closest=True)


def test_optimizers_that_step_otherwise_are_refused_before_training() -> None:
    class Untouched(Regression):
        def training_step(self, batch, batch_idx):
            raise AssertionError("training must not start")

    torch.manual_seed(0)
    with pytest.raises(MisconfigurationException, match="LBFGS evaluates the loss several times"):
        fit(LinearizationMonitor(), Untouched(mlp(3), optimizer=torch.optim.LBFGS))
