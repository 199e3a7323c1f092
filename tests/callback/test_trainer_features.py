"""Tuners, compiled modules and several fits of a Trainer, with monitors of all dynamics beside them."""

from pathlib import Path

import pytest
import torch
import torch._inductor.config
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
)
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_ntk import LinearizationMonitor
from tests.callback.trainer_runs import (
    DYNAMICS,
    EXACT,
    MINIBATCH,
    Task,
    Wobbly,
    assert_trains_alike,
    check,
    digits,
    distance,
    loader,
    make,
    train,
    watch,
)  # fmt: skip
from tests.problems import mlp

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


def draws_otherwise(graph, inputs):
    """A backend whose dropout has other random numbers, as the default one's."""

    def call(*values):
        torch.rand(1)
        return graph.forward(*values)

    return call


@pytest.mark.parametrize("whole", [True, False])
def test_the_dropout_of_a_compiled_network_is_named(whole: bool, fresh_dynamo) -> None:
    def run() -> None:
        torch._dynamo.reset()
        body = nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 3))
        module = Quiet(body if whole else torch.compile(body, backend=draws_otherwise))
        train(
            torch.compile(module, backend=draws_otherwise) if whole else module,
            loader(4),
            watch(("twin",), mismatch="refuse"),
        )

    with pytest.raises(
        MisconfigurationException, match=r"draws .* set `torch._inductor.config.fallback_random = True`"
    ):
        run()
    generator = pytest.raises(MisconfigurationException, match="draws random numbers from a generator of its own")
    with torch._inductor.config.patch(fallback_random=True), generator:
        run()


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
