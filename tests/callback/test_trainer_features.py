"""What a Trainer can do during a fit, with monitors of all dynamics beside it: training unchanged, distances still right.

Most networks here are linear, their own linearization: whatever the Trainer does, every distance of dynamics that follow it is
rounding.
"""

import warnings
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_ntk import LinearizationMonitor
from tests.callback.trainer_runs import (
    DYNAMICS,
    Task,
    Wobbly,
    assert_trains_alike,
    digits,
    distance,
    linear,
    loader,
    make,
    train,
    watch,
)  # fmt: skip
from tests.problems import mlp

MINIBATCH = ("replay", "twin")
EXACT = 1e-12


def check(monitors: list[LinearizationMonitor], exact=DYNAMICS, steps: int | None = None) -> None:
    for monitor in monitors:
        if steps is not None:
            assert [row["step"] for row in monitor.history] == list(range(steps + 1))
        if monitor.name in exact:
            assert distance(monitor) < EXACT, monitor.name
        else:
            assert distance(monitor) > 1e-6, f"{monitor.name} has no reason to be exact here"


SCHEDULES = {
    "step of epochs": lambda o: {"scheduler": StepLR(o, 3, 0.5), "interval": "epoch"},
    "cosine of steps": lambda o: {"scheduler": CosineAnnealingLR(o, 5), "interval": "step"},
    "warm-up from nothing": lambda o: {"scheduler": LambdaLR(o, lambda step: min(1, step / 4)), "interval": "step"},
    "one cycle": lambda o: {"scheduler": OneCycleLR(o, 0.5, total_steps=9), "interval": "step"},
    "every second epoch": lambda o: {"scheduler": StepLR(o, 1, 0.7), "interval": "epoch", "frequency": 2},
    "plateau": lambda o: {"scheduler": ReduceLROnPlateau(o, patience=0, threshold=0.9), "monitor": "train_loss"},
}


class Rates(Callback):
    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.tested("learning-rate schedule", "gradient_descent", "replay", "twin")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rates_are_followed_as_they_are_used(schedule: str) -> None:
    rates = Rates()

    def run(callbacks):
        module = make(momentum=0.6, lr=0.3, scheduler=SCHEDULES[schedule])
        train(module, loader(11), [*callbacks, rates], max_epochs=8)
        return module

    monitors = watch()
    assert_trains_alike(run, monitors)
    assert len(set(rates.rates)) > 1
    check(monitors, steps=8)


SETTINGS = {
    "plain": ({}, {}, {}),
    "accumulation with a remainder": ({}, {"accumulate_grad_batches": 2}, {}),
    "scheduled accumulation": ({}, {"callbacks": [(GradientAccumulationScheduler, {"scheduling": {0: 1, 2: 3}})]}, {}),
    "clipping by norm": ({"momentum": 0.9, "weight_decay": 0.1}, {"gradient_clip_val": 0.3}, {}),
    "fewer batches": ({"momentum": 0.9}, {"limit_train_batches": 2}, {}),
    "validation between steps": (
        {"momentum": 0.9}, {"val_check_interval": 1, "val": True, "num_sanity_val_steps": 1}, {},
    ),
    "workers": ({}, {"max_epochs": 2}, {"num_workers": 1, "persistent_workers": True}),
    "drop_last": ({"nesterov": True, "momentum": 0.9}, {}, {"drop_last": True}),
    "inference between epochs": ({}, {"val": True, "inference_mode": True, "check_val_every_n_epoch": 2}, {}),
    "deterministic and profiled": ({}, {"deterministic": True, "profiler": "simple", "detect_anomaly": True}, {}),
}  # fmt: skip


@pytest.mark.tested("minibatches", "replay", "twin")
@pytest.mark.tested("gradient accumulation", "replay", "twin")
@pytest.mark.tested("clipping by norm", "replay", "twin")
@pytest.mark.tested("limit_train_batches", "replay", "twin")
@pytest.mark.tested("validation between steps", "replay", "twin")
@pytest.mark.parametrize("setting", SETTINGS)
def test_minibatches_are_followed(setting: str) -> None:
    of_module, of_trainer, of_loader = SETTINGS[setting]

    def run(callbacks):
        module = make(**of_module)
        options = dict(of_trainer)
        val = loader() if options.pop("val", False) else None
        callbacks = [*callbacks, *(kind(**arguments) for kind, arguments in options.pop("callbacks", []))]
        train(module, loader(4, shuffle=True, **of_loader), callbacks, val=val, **options)
        return module

    monitors = watch()
    assert_trains_alike(run, monitors)
    check(monitors, MINIBATCH)


@pytest.mark.tested("Adam and other optimizers", "twin")
@pytest.mark.tested("clipping by value", "twin")
def test_any_optimizer_is_followed_by_the_twin() -> None:
    for optimizer in (torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam):

        def run(callbacks, optimizer=optimizer):
            module = make(optimizer=optimizer, lr=0.01)
            options = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2}
            train(module, loader(4, shuffle=True), callbacks, **options)
            return module

        monitors = watch(("twin",))
        assert_trains_alike(run, monitors)
        check(monitors, steps=8)


def test_a_run_that_maximizes_its_loss_gets_the_twin() -> None:
    monitor = LinearizationMonitor(steps=1, strict=True)
    train(make(maximize=True, lr=0.01), loader(11), [monitor])
    assert monitor.dynamics_used == "twin"
    assert "it maximizes its loss" in monitor.reason
    assert distance(monitor) < EXACT


def test_scheduled_accumulation_is_no_gradient_descent() -> None:
    """Gradients of a full batch are divided by two from the third epoch on."""
    monitor = LinearizationMonitor(steps=1, strict=True)
    train(make(), loader(11), [monitor, GradientAccumulationScheduler({2: 2})])
    assert monitor.dynamics_used == "replay"
    assert distance(monitor) < EXACT
    with pytest.warns(UserWarning, match="it changes over how many batches it accumulates gradients"):
        train(make(), loader(11), [*watch(("gradient_descent",)), GradientAccumulationScheduler({2: 2})])


class Absent(Task):
    """Some batches are left out, the first one among them."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if (self.trainer.current_epoch + batch_idx) % 3 == 0 else loss


@pytest.mark.tested("batches left out by training_step", "gradient_descent", "replay", "twin")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_that_training_step_leaves_out(accumulate: int) -> None:
    def run(callbacks):
        module = make(task=Absent, momentum=0.9, weight_decay=0.1)
        train(module, loader(4), callbacks, accumulate_grad_batches=accumulate)
        return module

    monitors = [*watch(("replay",), loss=nn.MSELoss()), *watch(("twin",))]
    assert_trains_alike(run, monitors)
    check(monitors)
    if accumulate == 1:
        descent = watch(("gradient_descent",), loss=nn.MSELoss())
        train(make(task=Absent, momentum=0.9), loader(11), descent, max_epochs=9)
        check(descent, steps=9)


def test_a_constant_factor_of_ones_own_is_followed() -> None:
    class Clipping(Task):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(0.5)

    monitors = watch(("twin",))
    train(make(task=Clipping), loader(), monitors)
    check(monitors)
    assert all(row["exact"] for row in monitors[0].history)


class Manual(Task):
    """Manual optimization, with a step after every second batch if `every` is 2."""

    every = 1

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(nn.functional.mse_loss(self(batch[0]), batch[1]))
        if (batch_idx + 1) % self.every == 0:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.tested("manual optimization", "replay", "twin")
@pytest.mark.parametrize("every", [1, 2])
def test_manual_optimization_with_one_optimizer(every: int) -> None:
    def run(callbacks):
        module = make(task=Manual, momentum=0.9, lr=0.05)
        module.every = every
        train(module, loader(4, shuffle=True, drop_last=every == 2), callbacks)
        return module

    monitors = watch(MINIBATCH, loss=nn.MSELoss())
    assert_trains_alike(run, monitors)
    check(monitors)
    with pytest.warns(UserWarning, match="it optimizes manually"):
        train(make(task=Manual), loader(), watch(("twin",), loss=nn.MSELoss()), max_epochs=1)


def test_manual_optimization_is_refused_without_a_loss() -> None:
    with pytest.raises(MisconfigurationException, match=r"the module optimizes manually.*Give `loss`"):
        train(make(task=Manual), loader(), [LinearizationMonitor()])


def test_two_steps_in_a_batch_are_not_followed() -> None:
    class Twice(Manual):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            super().training_step(batch, batch_idx)

    monitor = LinearizationMonitor(dynamics="twin", steps=1, loss=nn.MSELoss(), mismatch="log")
    with pytest.warns(UserWarning, match="at most one optimizer step in a batch but `training_step` took 2"):
        trainer = train(make(task=Twice), loader(), [monitor])
    assert trainer.global_step == 24
    assert [row["step"] for row in monitor.history] == [0]


class SAM(torch.optim.SGD):
    def first_step(self):
        pass

    def second_step(self):
        pass


@pytest.mark.parametrize(("optimizer", "phrase"), [
    (torch.optim.LBFGS, "LBFGS evaluates the loss several times"), (SAM, "SAM takes the gradient at two points"),
])  # fmt: skip
@pytest.mark.parametrize("dynamics", ["auto", "twin", "replay"])
def test_optimizers_of_several_gradients_are_refused(optimizer, phrase: str, dynamics: str) -> None:
    with pytest.raises(MisconfigurationException, match=phrase):
        train(make(optimizer=optimizer), loader(), [LinearizationMonitor(dynamics=dynamics)])


# --- Weights that are averaged


# WeightAveraging and EMAWeightAveraging came with Lightning 2.6.
averages_weights = pytest.mark.skipif(
    not hasattr(lightning_callbacks, "WeightAveraging"), reason="this Lightning has no WeightAveraging"
)


class EveryStep(getattr(lightning_callbacks, "WeightAveraging", Callback)):
    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None


@pytest.mark.tested("WeightAveraging and StochasticWeightAveraging", "replay", "twin")
@pytest.mark.parametrize("body", [linear, Wobbly])
@pytest.mark.parametrize("averaging", [
    pytest.param(EveryStep, marks=averages_weights),
    pytest.param(getattr(lightning_callbacks, "EMAWeightAveraging", None), marks=averages_weights, id="EMAWeightAveraging"),
    StochasticWeightAveraging,
])  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_the_weights_compared_are_those_of_the_run_not_their_average(averaging, body, first: bool) -> None:
    """StochasticWeightAveraging adds an epoch, in which BatchNorm sees the averaged weights."""

    def run(callbacks):
        module = make(body, lr=0.2).double()  # whose copy Lightning makes before it converts the weights
        average = averaging(swa_lrs=0.1) if averaging is StochasticWeightAveraging else averaging()
        train(
            module, loader(4), [*callbacks, average] if first else [average, *callbacks], max_epochs=6, val=loader(11)
        )
        return module

    monitors = watch()
    last = LinearizationMonitor(dynamics="twin", name="last", steps=100, strict=True)
    assert_trains_alike(run, [*monitors, last], follows=body is linear)
    for monitor in monitors:
        assert [row["step"] for row in monitor.history] == list(range(19))
    assert [row["step"] for row in last.history] == [0, 18]
    if body is linear:
        check([*monitors, last], (*MINIBATCH, "last"))


@averages_weights
def test_the_last_weights_of_a_run_that_was_stopped_are_measured_before_they_are_averaged() -> None:
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    for order, last in (([0, 1], 3), ([1, 0], 0)):
        monitor = LinearizationMonitor(dynamics="twin", steps=100, strict=True)
        callbacks = [monitor, EveryStep()]
        train(make(), loader(), [Stop(), *(callbacks[i] for i in order)])
        assert monitor.history[-1]["step"] == last
        assert distance(monitor) < EXACT


# --- Tuners


class Tuned(Task):
    """It has the attributes that tuners look for, and a loader of its own."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.batch_size = 2

    def train_dataloader(self):
        return loader(self.batch_size, shuffle=True)

    def val_dataloader(self):
        return loader()


@pytest.mark.tested("LearningRateFinder and BatchSizeFinder", "replay", "twin")
@pytest.mark.parametrize("finder", [
    lambda: LearningRateFinder(num_training_steps=30, min_lr=1e-3),
    lambda: BatchSizeFinder(steps_per_trial=2, max_trials=2),
], ids=["learning rate", "batch size"])  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_finders_leave_a_monitor_alone(finder, first: bool, tmp_path: Path, monkeypatch) -> None:
    captured = []
    linearize = LinearizationMonitor._linearize
    monkeypatch.setattr(
        LinearizationMonitor, "_linearize", lambda self, *a: captured.append(self.name) or linearize(self, *a)
    )
    chosen = []

    def run(callbacks):
        module = make(task=Tuned)
        order = [*callbacks, finder()] if first else [finder(), *callbacks]
        train(module, None, order, default_root_dir=tmp_path)
        chosen.append((module.lr, module.batch_size))
        return module

    monitors = watch()
    assert_trains_alike(run, monitors)
    assert chosen[0] == chosen[1] != (0.1, 2)
    assert sorted(captured) == sorted(DYNAMICS)
    for monitor in monitors:
        assert [row["step"] for row in monitor.history] == list(range(len(monitor.history)))
        assert monitor.history[0]["displacement"] == 0
    check(monitors, MINIBATCH)


def test_a_finder_in_a_second_fit_does_not_bring_back_the_first(tmp_path: Path) -> None:
    monitor = LinearizationMonitor(dynamics="twin", steps=1, strict=True)
    module, finder = make(task=Tuned), LearningRateFinder(num_training_steps=30, min_lr=1e-3)
    trainer = train(module, None, [monitor, finder], default_root_dir=tmp_path, max_epochs=2)
    between = [p.detach().clone() for p in module.parameters()]
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module)
    assert monitor.history[0]["displacement"] == 0
    assert len(monitor.history) > 2
    for start, expected in zip(monitor.comparison.initial_weights.values(), between, strict=True):
        assert torch.equal(start, expected)
    assert distance(monitor) < EXACT


@pytest.mark.tested("Tuner", "replay", "twin")
def test_the_tuner_before_a_fit(tmp_path: Path) -> None:
    monitors = watch()
    module = make(task=Tuned)
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", precision="64-true", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(monitors), default_root_dir=tmp_path,
    )  # fmt: skip
    tuner = Tuner(trainer)
    tuner.scale_batch_size(module, steps_per_trial=2, max_trials=2)
    tuner.lr_find(module, num_training=30, min_lr=1e-3)
    assert all(monitor.history == [] for monitor in monitors)
    trainer.fit(module)
    for monitor in monitors:
        assert monitor.history[0] == pytest.approx(monitor.history[0] | {"step": 0, "displacement": 0})
    check(monitors, MINIBATCH)


# --- Compiled and late modules


class Quiet(Task):
    """Without `self.log`, which PyTorch 2.13 cannot compile."""

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])


class CompiledBody(Task):
    def __init__(self, body, **options):
        super().__init__(torch.compile(body, backend="aot_eager"), **options)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_modules(whole: bool, fresh_dynamo) -> None:
    """A LightningModule that is compiled, or a submodule of it, whose parameters have other names then."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def run(callbacks):
        torch._dynamo.reset()
        if whole:
            module = make(Wobbly, task=Quiet, momentum=0.9)
            train(torch.compile(module, backend=count), loader(4, shuffle=True), callbacks)
            return module
        module = make(Wobbly, task=CompiledBody, momentum=0.9)
        train(module, loader(4, shuffle=True), callbacks)
        return module

    monitors = watch(per_parameter=True, evaluation=digits(5))
    assert_trains_alike(run, monitors, follows=False)
    assert bool(graphs) == whole
    names = {f"parameter/{name}" for name, _ in make(Wobbly).named_parameters()}
    for monitor in monitors:
        assert {tag for tag in monitor.history[-1] if tag.startswith("parameter/")} == names


@pytest.mark.tested("torch.compile", "gradient_descent", "replay", "twin")
def test_a_compiled_network_has_the_distances_of_a_plain_one(fresh_dynamo) -> None:
    compiled, plain = watch(per_parameter=True), watch(per_parameter=True)
    train(make(mlp, task=CompiledBody), loader(11), compiled, max_epochs=6)
    train(make(mlp), loader(11), plain, max_epochs=6)
    for one, other in zip(compiled, plain, strict=True):
        assert one.history[-1] == pytest.approx(other.history[-1], rel=1e-9, abs=1e-12)


def test_passes_compile_nothing(fresh_dynamo) -> None:
    graphs = []

    class Counting(Task):
        def __init__(self, body, **options):
            def backend(graph, inputs):
                graphs.append(graph)
                return graph.forward

            super().__init__(torch.compile(body, backend=backend), **options)

    train(make(mlp, task=Counting), loader(11), max_epochs=2)
    expected = len(graphs)
    torch._dynamo.reset()
    train(make(mlp, task=Counting), loader(11), watch(evaluation=digits(5)), max_epochs=2)
    assert len(graphs) == 2 * expected > 0


class Late(Task):
    """Parameters that exist from `configure_model` on."""

    def __init__(self, **options):
        super().__init__(nn.Identity(), **options)
        self.head = None

    def configure_model(self):
        if self.head is None:
            self.head = nn.Linear(6, 3)

    def forward(self, inputs):
        return self.head(inputs)


@pytest.mark.tested("configure_model", "replay", "twin")
def test_parameters_made_in_configure_model() -> None:
    def run(callbacks):
        module = Late()
        train(module, loader(4, shuffle=True), callbacks)
        return module

    monitors = watch(per_parameter=True)
    assert_trains_alike(run, monitors)
    check(monitors, MINIBATCH, steps=12)
    assert "parameter/head.weight" in monitors[0].history[-1]


# --- Parts of the data


@pytest.mark.tested("overfit_batches", "gradient_descent", "replay", "twin")
def test_overfit_batches_are_the_reference() -> None:
    """Training sees the same first samples in every epoch, and as one batch they are gradient descent."""

    def run(callbacks, batches):
        module = make()
        train(module, loader(4, shuffle=True), callbacks, overfit_batches=batches, max_epochs=6)
        return module

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You requested to overfit but enabled train dataloader shuffling")
        monitors = watch()
        assert_trains_alike(lambda callbacks: run(callbacks, 2), monitors)
        check(monitors, MINIBATCH, steps=12)
        assert all(len(monitor.comparison.reference) == 8 for monitor in monitors)
        whole = LinearizationMonitor(steps=1, strict=True)
        run([whole], 1)
        assert whole.dynamics_used == "gradient_descent"
        assert len(whole.comparison.reference) == 4
        assert distance(whole) < EXACT
        said = watch(("gradient_descent",), reference=digits(11))
        with pytest.warns(UserWarning, match="it trains on 4 samples while the reference has 11"):
            run(said, 1)


@pytest.mark.parametrize(("options", "samples"), [
    ({"limit_train_batches": 2}, 8), ({"limit_train_batches": 1}, 4), ({"limit_train_batches": 0.7}, 8), ({}, 11),
])  # fmt: skip
def test_the_reference_is_what_training_sees(options: dict, samples: int) -> None:
    ordered, shuffled = watch(("replay",)), watch(("replay",))
    train(make(), loader(4), ordered, **options)
    train(make(), loader(4, shuffle=True), shuffled, **options)
    assert len(ordered[0].comparison.reference) == samples
    assert len(shuffled[0].comparison.reference) == 11
    check(ordered + shuffled)
    outputs = ordered[0].comparison.reference.problem.predictions
    assert outputs.shape == (samples, 3)


def test_drop_last_in_order_leaves_the_last_samples_out_of_the_reference() -> None:
    ordered, shuffled = watch(("twin",)), watch(("twin",))
    train(make(), loader(4, drop_last=True), ordered)
    train(make(), loader(4, drop_last=True, shuffle=True), shuffled)
    assert len(ordered[0].comparison.reference) == 8
    assert len(shuffled[0].comparison.reference) == 11


@pytest.mark.tested("fast_dev_run", "gradient_descent", "replay", "twin")
@pytest.mark.parametrize("batches", [True, 3])
def test_fast_dev_run(batches, tmp_path: Path) -> None:
    monitors = watch()
    trainer = train(make(), loader(4), monitors, fast_dev_run=batches, logger=CSVLogger(tmp_path), val=loader())
    assert trainer.global_step == int(batches)
    check(monitors, DYNAMICS if batches is True else MINIBATCH, steps=int(batches))
    assert not list(tmp_path.rglob("*.csv"))


class Standardized(LightningDataModule):
    """A data module whose hooks change every batch."""

    def __init__(self, shuffle: bool = True) -> None:
        super().__init__()
        self.shuffle = shuffle

    def train_dataloader(self):
        inputs, targets = digits().tensors
        return DataLoader(TensorDataset((inputs * 255).to(torch.uint8), targets), batch_size=4, shuffle=self.shuffle)

    def val_dataloader(self):
        return self.train_dataloader()

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0].double() / 255, batch[1]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (batch[0] - 0.5) * 2, batch[1]


@pytest.mark.tested("datamodule", "replay", "twin")
@pytest.mark.tested("batch transfer hooks", "replay", "twin")
@pytest.mark.tested("evaluation set", "replay", "twin")
def test_the_hooks_of_a_datamodule_are_part_of_the_reference() -> None:
    def run(callbacks):
        module = make()
        train(module, Standardized(), callbacks)
        return module

    evaluation = TensorDataset((digits().tensors[0] * 255).to(torch.uint8), digits().tensors[1])
    monitors = watch(evaluation=evaluation)
    assert_trains_alike(run, monitors)
    check(monitors, MINIBATCH)
    for monitor in monitors:
        assert monitor.history[-1]["loss"] == pytest.approx(monitor.history[-1]["evaluation/loss"], rel=1e-12)


def test_the_hooks_of_the_module_are_part_of_the_reference() -> None:
    class Hooks(Task):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch["x"] * 2, batch["y"]

    class Dicts(Dataset):
        def __len__(self):
            return 11

        def __getitem__(self, index):
            inputs, targets = digits()[index]
            return {"x": inputs, "y": targets}

    monitors = watch(MINIBATCH)
    train(make(task=Hooks), DataLoader(Dicts(), batch_size=4, shuffle=True), monitors)
    check(monitors)


class Stream(IterableDataset):
    def __iter__(self):
        yield from (digits()[i] for i in (5, 2, 9, 0, 7, 1, 10))


@pytest.mark.tested("augmented or streamed data", "twin")
def test_iterable_data_is_followed_by_the_twin_and_refused_by_the_kernel() -> None:
    def run(callbacks):
        module = make(momentum=0.9)
        train(module, DataLoader(Stream(), batch_size=3), callbacks)
        return module

    monitors = [*watch(("twin",)), LinearizationMonitor(dynamics="auto", name="auto", steps=1, strict=True)]
    assert_trains_alike(run, monitors)
    check(monitors, exact=("twin", "auto"), steps=12)
    assert monitors[1].dynamics_used == "twin"
    for dynamics in ("gradient_descent", "replay"):
        with pytest.raises(MisconfigurationException, match=r"Stream can only be iterated. Give a map-style data set"):
            run([LinearizationMonitor(dynamics=dynamics)])


class Several(Task):
    """Trains on the first of two loaders, whose batches come together."""

    def training_step(self, batch, batch_idx):
        return super().training_step(first_of(batch), batch_idx)


def first_of(batch):
    batch = batch["a"] if isinstance(batch, dict) else batch[0] if isinstance(batch[0], list | tuple) else batch
    return tuple(batch)


@pytest.mark.tested("several training loaders", "replay", "twin")
@pytest.mark.parametrize("combine", [
    lambda a, b: {"a": a, "b": b}, lambda a, b: [a, b], lambda a, b: CombinedLoader({"a": a, "b": b}, "max_size_cycle"),
], ids=["dict", "list", "CombinedLoader"])  # fmt: skip
def test_several_train_loaders(combine) -> None:
    def run(callbacks):
        module = make(task=Several, momentum=0.9)
        train(module, combine(loader(4, shuffle=True), loader(3, shuffle=True)), callbacks)
        return module

    twin = LinearizationMonitor(dynamics="auto", name="auto", unpack=first_of, steps=1, strict=True)
    replay = LinearizationMonitor(digits(), name="replay", dynamics="replay", unpack=first_of, steps=1, strict=True)
    assert_trains_alike(run, [twin, replay])
    assert twin.dynamics_used == "twin"
    check([twin, replay], exact=("auto", "replay"))
    with pytest.raises(MisconfigurationException, match=r"Expected one training DataLoader .* but got 2 of them"):
        run([LinearizationMonitor(dynamics="replay", unpack=first_of)])


# --- Several fits, and what is no fit


@pytest.mark.tested("second fit", "gradient_descent", "replay", "twin")
def test_a_second_fit_captures_anew_whatever_the_dynamics() -> None:
    monitors = watch()
    module = make(mlp)
    trainer = train(module, loader(11), monitors, max_epochs=3)
    between = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer.fit_loop.max_epochs = 7
    trainer.fit(module, loader(11))
    for monitor in monitors:
        assert [row["step"] for row in monitor.history] == [3, 4, 5, 6, 7]
        assert monitor.history[0]["displacement"] == 0
        for name, start in monitor.comparison.initial_weights.items():
            assert torch.equal(start, between[name])


@pytest.mark.tested("validate, test, predict", "gradient_descent", "replay", "twin")
def test_validation_and_test_leave_a_monitor_as_it_is() -> None:
    fresh = watch()
    trainer = train(make(), loader(), [], max_epochs=1)
    other = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=list(fresh)
    )
    other.validate(make(), loader(), verbose=False)
    other.test(make(), loader(), verbose=False)
    other.predict(make(), DataLoader(digits().tensors[0], batch_size=4))
    assert all(monitor.history == [] and monitor.comparison is None for monitor in fresh)
    used = watch()
    module = make(mlp)
    trainer = train(module, loader(), used, max_epochs=1)
    histories = [[dict(row) for row in monitor.history] for monitor in used]
    trainer.validate(module, loader(), verbose=False)
    trainer.test(module, loader(), verbose=False)
    assert [monitor.history for monitor in used] == histories
    assert all(len(history) == 4 for history in histories)


@pytest.mark.tested("several monitors", "gradient_descent", "replay", "twin")
def test_several_monitors_do_not_disturb_each_other() -> None:
    """Each has the history that it has alone."""
    references = {"whole": digits(), "part": Subset(digits(), [3, 1, 4])}

    def monitors():
        return [
            LinearizationMonitor(
                data, dynamics=dynamics, name=f"{dynamics}/{name}", steps=2, strict=True, mismatch="log"
            )
            for name, data in references.items()
            for dynamics in DYNAMICS
            if dynamics != "replay" or name == "whole"
        ]

    together = monitors()
    trainer = train(make(Wobbly), loader(11), together)
    for monitor, alone in zip(together, monitors(), strict=True):
        train(make(Wobbly), loader(11), [alone])
        assert monitor.history == alone.history
        assert f"{monitor.name}/loss" in trainer.callback_metrics


@pytest.mark.tested("end by max_steps, max_epochs or a callback", "gradient_descent", "replay", "twin")
def test_early_stopping_ends_with_a_measurement_in_all_dynamics() -> None:
    def run(callbacks):
        module = make(mlp, lr=1e-6)
        stop = EarlyStopping("val_loss", patience=1, min_delta=1.0)
        train(module, loader(4, shuffle=True), [*callbacks, stop], val=loader(), max_epochs=9)
        return module

    monitors = watch(steps=100)
    assert_trains_alike(run, monitors)
    assert {monitor.history[-1]["step"] for monitor in monitors} == {6}
