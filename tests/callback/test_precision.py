"""Precisions and devices of the run: half, mixed with a GradScaler, double, TF32."""

import math
from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ntk import LinearizationMonitor
from lightning_ntk.data.reference import Reference
from lightning_ntk.kernel import PlannedKernel, compute_kernel
from lightning_ntk.linearization import Linearization
from lightning_ntk.linearization.batch_loss import PairLoss
from lightning_ntk.training.twin import Twin
from lightning_ntk.utilities.contexts import full_precision
from tests.callback.trainer_runs import (
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
)
from tests.problems import FULL, mlp, precisions_of_products


def scaled(**options) -> MixedPrecision:
    """Half precision with a GradScaler, which Lightning does not choose on the CPU by itself."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", **options))


def with_precision(precision: str) -> dict:
    return (
        {"precision": None, "plugins": [scaled(init_scale=2.0**20)]}
        if precision == "16-mixed"
        else {"precision": precision}
    )


@pytest.mark.tested("training bitwise unchanged", "gradient_descent", "replay", "twin")
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"])
def test_training_is_bitwise_the_same_in_every_precision(precision: str) -> None:
    def run(callbacks):
        module = make(Wobbly, momentum=0.9)
        train(module, loader(shuffle=True), callbacks, **with_precision(precision))
        return module

    assert_trains_alike(run, watch(evaluation=digits(5)), follows=False)


# The largest distance of a network that is its own linearization is the rounding of the run. Measured over 24 steps: 1e-15, 2e-7,
# 2e-3, 2e-4, 1.3e-2, 1.7e-3.
ROUNDING = {"64-true": 1e-14, "32-true": 1e-6, "bf16-mixed": 5e-3, "16-mixed": 5e-4, "bf16-true": 0.03, "16-true": 5e-3}


@pytest.mark.tested("precision 32-true", "gradient_descent", "replay", "twin")
@pytest.mark.tested("precision 64-true", "gradient_descent", "replay", "twin")
@pytest.mark.tested("precision 16-mixed", "gradient_descent", "replay", "twin")
@pytest.mark.tested("precision 16-true", "gradient_descent", "replay", "twin")
@pytest.mark.tested("precision bf16-mixed", "gradient_descent", "replay", "twin")
@pytest.mark.tested("precision bf16-true", "gradient_descent", "replay", "twin")
@pytest.mark.parametrize("precision", ROUNDING)
def test_a_linear_network_stays_as_close_as_the_precision_of_the_run(precision: str) -> None:
    monitors = watch(("replay", "twin"))
    train(make(momentum=0.5), loader(shuffle=True), monitors, max_epochs=8, **with_precision(precision))
    descent = watch(("gradient_descent",))
    train(make(momentum=0.5), loader(11), descent, max_epochs=24, **with_precision(precision))
    for monitor in monitors + descent:
        assert monitor.history[-1]["step"] == 24
        assert distance(monitor) < ROUNDING[precision]
        assert monitor.history[-1]["displacement"] > 0.1


@pytest.mark.parametrize(("precision", "phrase"), [
    ("bf16-mixed", "its passes run in bf16-mixed precision"),
    ("bf16-true", "it keeps weights in bfloat16, where the linearized network has float32"),
])  # fmt: skip
def test_half_precision_is_said(precision: str, phrase: str) -> None:
    with pytest.warns(UserWarning, match=phrase):
        train(make(), loader(), watch(("twin",)), max_epochs=1, precision=precision)


class NoAutocast(MixedPrecision):
    """A GradScaler alone, so that nothing is rounded and skipped steps are all that is tested."""

    def forward_context(self):
        return nullcontext()


class Overflowing(Task):
    """Its loss overflows in some batches, from the first on."""

    BATCHES = (0, 1, 5, 6, 13)
    micro = -1

    def training_step(self, batch, batch_idx):
        self.micro += 1
        loss = super().training_step(batch, batch_idx)
        return loss * math.inf if self.micro in self.BATCHES else loss


@pytest.mark.tested("steps skipped by a GradScaler", "gradient_descent", "replay", "twin")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_that_a_grad_scaler_skips_are_skipped_by_the_linearized_network(accumulate: int, fused: bool) -> None:
    def run(callbacks, batch_size, momentum):
        plugin = NoAutocast("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", growth_interval=3))
        module = make(task=Overflowing, momentum=0.0 if fused else momentum, fused=fused).double()
        options = {"precision": None, "plugins": [plugin], "max_epochs": 8, "accumulate_grad_batches": accumulate}
        trainer = train(module, loader64(batch_size), callbacks, **options)
        assert plugin.scaler.get_scale() != 2.0**16
        return module, trainer

    def loader64(batch_size):
        data = TensorDataset(*(tensor.double() for tensor in digits().tensors))
        return DataLoader(data, batch_size=batch_size, shuffle=True)

    monitors = [*watch(("replay",), loss=nn.MSELoss()), *watch(("twin",))]
    assert_trains_alike(lambda callbacks: run(callbacks, 4, 0.9)[0], monitors)
    if accumulate == 1:
        descent = watch(("gradient_descent",), loss=nn.MSELoss())
        run(descent, 11, 0.9)
        monitors += descent
    for monitor in monitors:
        taken = [
            later["displacement"] != row["displacement"]
            for row, later in zip(monitor.history, monitor.history[1:], strict=False)
        ]
        assert not taken[0]
        assert 0 < sum(taken) < len(taken)
        assert distance(monitor) < 1e-12


def test_a_measurement_falls_on_the_counted_step_even_if_it_is_skipped() -> None:
    plugin = NoAutocast("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    monitor = LinearizationMonitor(dynamics="twin", steps=[1, 6, 7], strict=True)
    train(make(task=Overflowing), loader(), [monitor], precision=None, plugins=[plugin])
    assert [row["step"] for row in monitor.history] == [0, 1, 6, 7, 12]
    assert monitor.history[1]["displacement"] == 0
    assert monitor.history[2]["displacement"] > 0


def test_the_samples_of_half_precision_batches_are_recognized() -> None:
    """The reference is read in the precision of the run, in which samples are compared."""
    inputs, targets = (tensor / 3 for tensor in digits().tensors)  # numbers that have no bfloat16 of their own
    monitor = LinearizationMonitor(dynamics="auto", steps=1, strict=True)
    data = DataLoader(TensorDataset(inputs, targets), batch_size=4, shuffle=True)
    train(make(), data, [monitor], precision="bf16-true")
    assert monitor.dynamics_used == "replay"
    assert monitor.comparison.initial_weights["body.weight"].dtype == torch.float32
    rows = torch.tensor([3, 1])
    batch = [tensor[rows].bfloat16() for tensor in (inputs, targets)]
    assert not torch.equal(batch[0].float(), inputs[rows])
    assert torch.equal(monitor.comparison.online.rows(batch), rows)


def test_reference_and_evaluation_are_converted_as_batches_are() -> None:
    seen = set()

    def unpack(batch):
        seen.update(tensor.dtype for tensor in batch)
        return tuple(batch)

    monitors = watch(("replay",), unpack=unpack, evaluation=digits(5))
    train(make(), loader(), monitors)
    assert seen == {torch.float64}


def test_float64_passes_beside_a_float32_run() -> None:
    monitors = watch(dtype="float64")
    train(make(mlp), loader(11), monitors, precision="32-true")
    for monitor in monitors:
        assert monitor.comparison.initial_weights["body.0.weight"].dtype == torch.float64
    a, b, c = (monitor.history[-1]["weight_distance"] for monitor in monitors)
    assert a == pytest.approx(b, rel=1e-9)
    assert a == pytest.approx(c, rel=1e-9)


def test_the_device_of_kernel_and_modes() -> None:
    here, default = watch(device="cpu"), watch()
    train(make(mlp), loader(11), here)
    train(make(mlp), loader(11), default)
    for one, other in zip(here, default, strict=True):
        assert one.history == other.history
    with pytest.raises(ValueError, match=r"Expected argument `device` to be a device .* but got 'nowhere'"):
        LinearizationMonitor(device="nowhere")
    with pytest.raises(ValueError, match=r"Expected argument `device` to be a device .* but got 3"):
        LinearizationMonitor(device=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused_before_training() -> None:
    with pytest.raises(MisconfigurationException, match=r"but got device='cuda': .* Use device=\"cpu\""):
        train(make(), loader(), [LinearizationMonitor(device="cuda")])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernel_and_modes_beside_passes_on_a_gpu() -> None:
    here, there = watch(device="cpu"), watch()
    train(make(mlp), loader(11), here, accelerator="gpu", devices=1)
    train(make(mlp), loader(11), there, accelerator="gpu", devices=1)
    for one, other in zip(here, there, strict=True):
        assert one.history[-1] == pytest.approx(other.history[-1], rel=1e-9, abs=1e-12)
    assert here[0].training.ntk.device.type == "cpu"
    assert here[0].training.linearization.device.type == "cuda"


@pytest.mark.parametrize("method", ["structured", "contraction"])
def test_a_kernel_is_kept_on_another_device_than_that_of_the_passes(method: str) -> None:
    """The meta device stands for any other: tensors there have no values, but they have a place."""
    linearization = Linearization(mlp(3))
    reference = Reference(digits(), batch_size=4)
    kernel = compute_kernel(linearization, reference, method=method, device=torch.device("meta"))
    assert kernel.device.type == "meta"
    assert kernel.shape == (33, 33)
    assert compute_kernel(linearization, reference, method=method).device.type == "cpu"


@pytest.mark.parametrize("dynamics", ["gradient_descent", "replay"])
def test_a_monitor_hands_its_device_to_the_kernel(dynamics: str, monkeypatch) -> None:
    places = []

    class Spy(PlannedKernel):
        def compute(self, *, device=None, **options):
            places.append(device)
            return super().compute(device=device, **options)

    monkeypatch.setattr("lightning_ntk.training.problem.PlannedKernel", Spy)
    train(make(), loader(11), watch((dynamics,), device="cpu:0"), max_epochs=1)
    assert places == [torch.device("cpu:0")]


class Spying(nn.Module):
    """Notes the switches that let float32 products run in fewer digits; for eval mode in the class, where it stays."""

    in_evaluation: ClassVar[set[str]] = set()

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(6, outputs)
        self.in_training: set[str] = set()

    def forward(self, inputs):
        seen = self.in_training if self.training else self.in_evaluation
        seen.update(precisions_of_products())
        return self.layer(inputs)


@pytest.fixture
def medium():
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def test_reduced_precision_of_products_is_off_inside_and_on_outside(medium) -> None:
    module = make(Spying)

    def run(callbacks):
        module = make(Spying)
        train(module, loader(), callbacks, precision="32-true")
        return module

    module = assert_trains_alike(run, watch(evaluation=digits(5)))
    assert torch.get_float32_matmul_precision() == "medium"
    assert module.body.in_evaluation == {FULL}
    assert FULL not in module.body.in_training


def test_reduced_precision_is_restored_after_an_error(medium) -> None:
    before = precisions_of_products()
    with pytest.raises(ZeroDivisionError), full_precision("cpu"):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "medium"
    assert precisions_of_products() == before
    assert FULL not in before


def test_what_was_seen_for_a_skipped_step_is_forgotten_by_the_twin() -> None:
    module = linear(3).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    twin = Twin(PairLoss(Linearization(module), nn.MSELoss()), optimizer, dict(module.named_parameters()))
    twin.accumulate((torch.ones(2, 6), torch.ones(2, 3)))
    gradients = twin.state_dict()["gradients"]
    assert gradients.keys() == dict(module.named_parameters()).keys()
    assert all(value.any() for value in gradients.values())
    twin.discard()
    assert not twin.state_dict()["gradients"]
