"""After one step the linearized network is where the run is, whatever the training step does, and the run is as without it."""

import random
import warnings
from typing import Any

import numpy
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader

from lightning_ntk import LinearizationMonitor
from tests.training_steps import zoo
from tests.training_steps.zoo import MODULES, Tutorial

NAMES = [make.__name__ for make in MODULES]
# Networks whose trained part is linear are their own linearization.
LINEAR = {"TransferLearning"}
# What the monitor has to say of some. A teacher that follows the student follows the trained one, not the linearized one.
SAID = {"MomentumContrast": "does not follow the loss of this run in step 2"}


def make(name: str, optimizer: str) -> Tutorial:
    seed_everything(0, verbose=False)
    module = getattr(zoo, name)()
    module.optimizer = optimizer
    return module


def fit(module: Tutorial, callbacks: list[Callback], precision: str, steps: int = 3) -> Trainer:
    seed_everything(1, verbose=False)
    loader = DataLoader(module.dataset(), batch_size=16, shuffle=True, collate_fn=module.collate)
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", precision=precision, logger=False, callbacks=callbacks,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of training batches|The '.*_dataloader' does not have")
        trainer.fit(module, loader)
    return trainer


def what_is_left(trainer: Trainer, module: Tutorial) -> dict[str, Any]:
    """Everything that a run leaves behind: weights, buffers, modes, states of optimizers, random states, logged values."""
    return {
        "weights": dict(module.state_dict()),
        "modes": [submodule.training for submodule in module.modules()],
        "optimizer": trainer.optimizers[0].state_dict(),
        "random": [torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()],
        "logged": {name: value for name, value in trainer.callback_metrics.items() if not name.startswith("ntk/")},
    }


def assert_same(actual: Any, expected: Any, path: str = "") -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), path
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), path
        for name, value in expected.items():
            assert_same(actual[name], value, f"{path}/{name}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), path
        for index, value in enumerate(expected):
            assert_same(actual[index], value, f"{path}/{index}")
    else:
        assert actual == expected, path


def train_both(name: str, optimizer: str, precision: str, monitor: LinearizationMonitor) -> list[str]:
    """Trains without and with a monitor, requires the same of both runs, and returns what the monitor has warned of."""
    plain = make(name, optimizer)
    expected = what_is_left(fit(plain, [], precision), plain)
    module = make(name, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, [monitor], precision)
    assert_same(what_is_left(trainer, module), expected)
    messages = [str(w.message) for w in caught]
    return [m for m in messages if "LinearizationMonitor" in m or "linearized" in m]


def watch(name: str, optimizer: str, precision: str, **options: Any) -> list[dict[str, float]]:
    """What a monitor measures beside a run that is as it would have been without."""
    monitor = LinearizationMonitor(steps=1, strict=True, progress=False, **options)
    said = train_both(name, optimizer, precision, monitor)
    assert all(name in SAID and SAID[name] in message for message in said), said
    assert [row["step"] for row in monitor.history] == [0, 1, 2, 3]
    assert monitor.linearized_outputs
    return monitor.history


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_between_run_and_linearized_network_after_one_step(name: str) -> None:
    optimizer = ("sgd", "adamw")[NAMES.index(name) % 2]
    history = watch(name, optimizer, "64-true", reference=None)
    assert history[1]["relative_weight_distance"] <= 1e-12
    if name in LINEAR:
        assert history[-1]["relative_weight_distance"] <= 1e-12
    else:
        assert history[-1]["relative_weight_distance"] > 1e-5


# With SGD: Adam makes full steps of gradients that are zero but for rounding.
@pytest.mark.parametrize(
    "name",
    [
        "Classifier",
        "ResNet",
        "VisionTransformer",
        "VariationalAutoencoder",
        "LSTMRegression",
        "SimCLR",
        "bert",
        "llama",
    ],
)
def test_in_single_precision_only_rounding_is(name: str) -> None:
    assert watch(name, "sgd", "32-true", reference=None)[1]["relative_weight_distance"] <= 1e-5


# Kernel dynamics are chosen for some of these, such as FrozenLayers.
@pytest.mark.parametrize(
    "name",
    [
        "Classifier", "TrainerReader", "FrozenLayers", "MixtureOfExperts", "StochasticDepth", "DeviceAugmentation",
        "RandomTransforms", "Detection", "VariationalAutoencoder", "PackedGRU", "CenteredTeacher", "UserDictBatch",
        "bert_with_batch_encoding", "lora",
    ],
)  # fmt: skip
def test_functions_are_the_same_too_before_the_first_step(name: str) -> None:
    history = watch(name, "sgd", "64-true")
    assert history[1]["relative_weight_distance"] <= 1e-12
    for tag in {"loss", "accuracy"} & set(history[0]):
        assert history[0][tag] == pytest.approx(history[0][f"linearized_{tag}"], rel=1e-12)
    assert history[0]["prediction_rmse"] <= 1e-12
    assert history[1]["prediction_rmse"] < history[-1]["prediction_rmse"]


def test_a_network_without_second_derivatives_is_said_to_be_lost_and_trains_on() -> None:
    monitor = LinearizationMonitor(steps=1, reference=None, progress=False)
    (said,) = train_both("BagOfWords", "sgd", "64-true", monitor)
    assert "embedding_bag" in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("GradientPenalty", "differentiates its network"),
    ],
)
def test_steps_that_cannot_be_followed_are_refused_before_they_are_taken(name: str, message: str) -> None:
    module = make(name, "sgd")
    before = {parameter: value.double() for parameter, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, [LinearizationMonitor(reference=None, progress=False)], "64-true")
    assert_same(dict(module.state_dict()), before)
