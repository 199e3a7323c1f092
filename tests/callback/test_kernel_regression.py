"""Kernel regression with the kernels before and after a run, beside the network."""

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ntk import LinearizationMonitor
from lightning_ntk.callback import extras
from lightning_ntk.plots.history import read_history
from lightning_ntk.training import kernel_regression
from tests.callback.test_monitor import Regression, fit, make_module
from tests.callback.trainer_runs import Task, Wobbly, assert_trains_alike, digits, loader, make, train

BOTH = ("before", "after")
OWN = {"loss", "ridge"}


class Classifier(Task):
    """Cross-entropy of three classes."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def labeled() -> TensorDataset:
    return TensorDataset(digits().tensors[0], torch.arange(11) % 3)


def scalars(monitor: LinearizationMonitor, kernel: str, prefix: str = "") -> dict[str, float]:
    start = f"{prefix}kernel_regression/{kernel}/"
    return {name[len(start) :]: value for name, value in monitor.history[-1].items() if name.startswith(start)}


@pytest.mark.parametrize("dynamics", ["gradient_descent", "replay", "twin"])
def test_both_kernels_are_those_of_the_network_before_and_after(dynamics: str, tmp_path) -> None:
    data = TensorDataset(*(tensor.double() for tensor in digits().tensors))
    other = TensorDataset(data.tensors[0][:5] + 0.1, data.tensors[1][:5])
    module = make_module(lr=0.3).double()
    start = copy.deepcopy(module)
    monitor = LinearizationMonitor(data, 10, dynamics=dynamics, evaluation=other, kernels=BOTH, strict=True)
    logger = CSVLogger(tmp_path)
    trainer, _ = fit(monitor, module, data, precision="64-true", logger=logger)
    for kernel, network in (("before", start), ("after", module)):
        found = kernel_regression(network, data, other, ridge="loo", centered=True)
        left_out = {"leave_one_out_loss": found.leave_one_out.loss} if kernel == "before" else {}
        assert scalars(monitor, kernel) == pytest.approx(
            {"loss": found.train.loss, "ridge": found.ridge} | left_out, rel=1e-6
        )
        assert scalars(monitor, kernel, "evaluation/") == pytest.approx({"loss": found.test.loss}, rel=1e-6)
    first, last = monitor.history[0], monitor.history[-1]
    assert first["kernel_regression/before/loss"] == last["kernel_regression/before/loss"]
    assert [row["step"] for row in monitor.history if "kernel_regression/after/loss" in row] == [30]
    assert trainer.callback_metrics["ntk/kernel_regression/after/loss"] == last["kernel_regression/after/loss"]
    logger.save()
    logged = read_history(f"{logger.log_dir}/metrics.csv")
    assert [row["kernel_regression/after/loss"] for row in logged if "kernel_regression/after/loss" in row] == [
        pytest.approx(last["kernel_regression/after/loss"])
    ]


def test_of_labels_there_are_accuracies_whatever_the_loss_of_the_run() -> None:
    monitor = LinearizationMonitor(kernels=BOTH, evaluation=labeled(), strict=True)
    fit(monitor, make(lambda outputs: Regression().body, Classifier), labeled())
    assert monitor.dynamics_used == "replay"
    for kernel in BOTH:
        own = scalars(monitor, kernel)
        left_out = {"leave_one_out_loss", "leave_one_out_accuracy"} if kernel == "before" else set()
        assert own.keys() == OWN | {"accuracy"} | left_out
        # The evaluation set is the training set here.
        evaluation = scalars(monitor, kernel, "evaluation/")
        assert evaluation == pytest.approx({name: own[name] for name in ("loss", "accuracy")}, rel=1e-6)
    target = nn.functional.one_hot(labeled().tensors[1], 3).double()
    assert scalars(monitor, "after")["loss"] < target.square().mean().item()


def test_with_batch_statistics_the_kernel_after_is_that_of_eval_mode() -> None:
    module = make(Wobbly, Classifier)
    monitor = LinearizationMonitor(kernels=BOTH, strict=True)
    fit(monitor, module, labeled(), batch_size=4)
    assert monitor.dynamics_used == "twin"
    found = kernel_regression(module, labeled(), ridge="loo", centered=True)
    assert scalars(monitor, "after")["ridge"] == pytest.approx(found.ridge, rel=1e-5)
    assert scalars(monitor, "after")["loss"] == pytest.approx(found.train.loss, rel=1e-5)


@pytest.mark.tested("kernel regression", "gradient_descent", "replay", "twin")
@pytest.mark.parametrize("body", [lambda outputs: Regression().body, Wobbly])
def test_training_is_bitwise_the_same(body) -> None:
    def run(callbacks) -> LightningModule:
        module = make(body)
        train(module, loader(batch_size=4, shuffle=True), callbacks, max_epochs=3)
        return module

    assert_trains_alike(run, [LinearizationMonitor(steps=2, kernels=BOTH, strict=True)])


def test_a_run_that_another_callback_stops_has_the_kernel_after_it() -> None:
    class Stop(EarlyStopping):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 7

        def on_train_epoch_end(self, *_):
            pass

        def on_validation_end(self, *_):
            pass

    monitor = LinearizationMonitor(steps=[1, 3], kernels=["after"], strict=True)
    fit(monitor, make_module(), callbacks=[Stop("none")])
    assert monitor.history[-1]["step"] == 7
    assert scalars(monitor, "after").keys() == OWN
    assert scalars(monitor, "before") == {}


def test_samples_are_at_most_those_asked_for_and_rows_are_bounded(monkeypatch) -> None:
    sizes = []
    real = extras.RegressionComparison

    def spy(problem, evaluation, kernels):
        sizes.append((len(problem.reference), len(evaluation)))
        return real(problem, evaluation, kernels)

    monkeypatch.setattr(extras, "RegressionComparison", spy)
    monkeypatch.setattr(extras, "_REGRESSION_ROWS", 16)
    for most in (4, 9, None):
        fit(LinearizationMonitor(kernels=["before"], evaluation=digits(), reference_samples=most), max_steps=1)
    assert sizes == [(4, 4), (5, 9), (11, 11)]


def test_a_failure_after_training_is_reported(monkeypatch) -> None:
    def fail(*_):
        raise MemoryError("too large")

    monkeypatch.setattr(extras.RegressionComparison, "after", fail)
    monitor = LinearizationMonitor(kernels=["after"])
    with pytest.warns(UserWarning, match=r"with the kernel after training failed. MemoryError: too large"):
        fit(monitor, make_module(), max_steps=2)
    assert monitor.history[-1]["step"] == 2
    with pytest.raises(MemoryError):
        fit(LinearizationMonitor(kernels=["after"], strict=True), make_module(), max_steps=2)


def test_a_resumed_run_has_the_same_kernels(tmp_path) -> None:
    def run(steps: int, resume_from=None) -> LinearizationMonitor:
        monitor = LinearizationMonitor(steps=5, kernels=BOTH, strict=True)
        module = make(lambda outputs: Regression().body).double()  # else a checkpoint is rounded when it is loaded
        trainer = train(
            module,
            DataLoader(digits(), batch_size=11),
            [monitor],
            max_epochs=-1,
            max_steps=steps,
            resume_from=resume_from,
        )
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return monitor

    whole = run(20)
    run(10)
    resumed = run(20, tmp_path / "10.ckpt")
    for kernel in BOTH:
        assert scalars(resumed, kernel) == pytest.approx(scalars(whole, kernel), rel=1e-9)


def test_what_has_no_kernel_regression_is_refused() -> None:
    for value in ("before", ["later"], None, 1):
        with pytest.raises(ValueError, match='`kernels` to be a list of "before" and "after" but got'):
            LinearizationMonitor(kernels=value)
    with pytest.raises(ValueError, match="`kernels` to be empty with reference=None"):
        LinearizationMonitor(None, kernels=["before"])

    class Twice(Classifier):
        def training_step(self, batch, batch_idx):
            return 2 * super().training_step(batch, batch_idx)

    with pytest.raises(
        MisconfigurationException, match=r"for argument `kernels` but the loss is more than one.*Leave out"
    ):
        fit(LinearizationMonitor(kernels=["before"]), make(lambda outputs: Regression().body, Twice), labeled())

    class Tokens(Classifier):
        """A label for each of several positions."""

        def forward(self, inputs):
            return super().forward(inputs).unsqueeze(2).expand(-1, -1, 4)

    positions = TensorDataset(digits().tensors[0], torch.arange(44).view(11, 4) % 3)
    with pytest.raises(MisconfigurationException, match="for argument `kernels` but"):
        fit(LinearizationMonitor(kernels=["before"]), make(lambda outputs: Regression().body, Tokens), positions)
