"""`regime=True` in real runs: what it logs, that the run does not notice, and what is refused."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_ntk import LinearizationMonitor
from lightning_ntk.comparison.regimes import RegimePanel
from lightning_ntk.data.reference import Reference
from lightning_ntk.linearization.linearization import Linearization
from tests.callback.trainer_runs import Task, Wobbly, assert_trains_alike, digits, loader, make, train, watch
from tests.problems import mlp

QUANTITIES = {"alignment", "centered_alignment", "curvature", "edge", "effective_rank", "trace"}
BY_LAYER = ("alignment", "centered_alignment", "activation_change")
LAYERS = {f"layer/body.{number}/{quantity}" for number in (0, 2) for quantity in BY_LAYER}


@pytest.mark.parametrize("dynamics", ["gradient_descent", "twin"])
def test_scalars_are_those_of_the_weights_at_each_step(dynamics: str) -> None:
    (monitor,) = watch([dynamics], regime=True, steps=3, loss=nn.MSELoss() if dynamics != "twin" else None)
    module = make(mlp, lr=0.05)
    start = Linearization(make(mlp).double())
    train(module, loader(), [monitor], max_steps=6, max_epochs=-1)
    first, *_, last = monitor.history
    estimated = QUANTITIES | {name for name in LAYERS if name.endswith("alignment")}
    expected = (
        QUANTITIES
        | LAYERS
        | {"low_rank", "curvature_of_halves"}
        | {f"{name}_{end}" for name in estimated for end in ("low", "high")}
    )
    assert {key.removeprefix("regime/") for key in last if key.startswith("regime/")} == expected
    assert all(first[f"regime/{name}"] == 0 for name in LAYERS if name.endswith("change"))
    panel = RegimePanel(start, Reference(digits()), nn.MSELoss())
    measured = panel.measure(dict(module.named_parameters()))
    assert {key: last[key] for key in measured} == pytest.approx(measured, rel=1e-9)
    assert last["regime/edge"] == pytest.approx(0.05 * last["regime/curvature"] / 2, rel=1e-12)


def test_adam_has_no_edge_of_stability() -> None:
    (monitor,) = watch(["twin"], regime=True, steps=3)
    train(make(mlp, optimizer=torch.optim.Adam, lr=0.01), loader(), [monitor], max_steps=3, max_epochs=-1)
    assert "regime/curvature" in monitor.history[-1]
    assert "regime/edge" not in monitor.history[-1]


def test_the_run_does_not_notice() -> None:
    def run(callbacks: list) -> Task:
        module = make(Wobbly, lr=0.05)
        train(module, loader(shuffle=True), callbacks)
        return module

    monitors = watch(["twin"], regime=True, steps=2, loss=nn.MSELoss())
    assert_trains_alike(run, monitors, follows=False)
    assert "regime/trace" in monitors[0].history[-1]


def test_what_has_no_panel_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="regime=False with reference=None"):
        LinearizationMonitor(None, dynamics="twin", regime=True)
    with pytest.raises(ValueError, match="`regime`"):
        LinearizationMonitor(regime=3)

    class TwoLosses(Task):
        def training_step(self, batch, batch_idx):
            return nn.functional.l1_loss(self(batch[0]), batch[1]) + nn.functional.mse_loss(self(batch[0]), batch[1])

    with pytest.raises(MisconfigurationException, match="`regime` but the loss is more than one"):
        train(make(mlp, TwoLosses), loader(), watch(["twin"], regime=True))
    with pytest.raises(ValueError, match="hold inputs only"):
        RegimePanel(Linearization(mlp(3)), Reference(torch.ones(4, 6)), nn.MSELoss())
