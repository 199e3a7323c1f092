"""Adapters of peft: only they are linearized, under the names that peft gives them."""

import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ntk import LinearizationMonitor
from tests.training_steps import zoo
from tests.training_steps.test_families import Family, exactly, fit, gpt2, watch

peft = pytest.importorskip("peft")

ATTENTION = {"target_modules": ["c_attn"], "fan_in_fan_out": True}


def adapted(config: Any) -> nn.Module:
    return peft.get_peft_model(gpt2(), config)


def lora(**options: Any) -> nn.Module:
    return adapted(peft.LoraConfig(r=2, lora_alpha=4, **ATTENTION, **options))


def ia3() -> nn.Module:
    config = {"target_modules": ["c_attn", "c_proj"], "feedforward_modules": ["c_proj"], "fan_in_fan_out": True}
    return adapted(peft.IA3Config(**config))


def prompt_tuning() -> nn.Module:
    return adapted(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def prefix_tuning() -> nn.Module:
    return adapted(peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


@pytest.mark.parametrize(
    ("make", "trained"),
    [
        pytest.param(
            partial(lora, lora_dropout=0.1), {"lora_A.default.weight", "lora_B.default.weight"},
            marks=pytest.mark.tested("LoRA (peft)", "twin"),
        ),
        pytest.param(
            partial(lora, use_dora=True),
            {"lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight"},
            marks=pytest.mark.tested("DoRA (peft)", "twin"),
        ),
        pytest.param(ia3, {"ia3_l.default"}, marks=pytest.mark.tested("IA3 (peft)", "twin")),
        pytest.param(
            prompt_tuning, {"prompt_encoder.default.embedding.weight"},
            marks=pytest.mark.tested("prompt tuning (peft)", "twin"),
        ),
        pytest.param(
            prefix_tuning, {"prompt_encoder.default.embedding.weight"},
            marks=pytest.mark.tested("prefix tuning (peft)", "twin"),
        ),
    ],
    ids=["LoRA", "DoRA", "IA3", "prompt tuning", "prefix tuning"],
)  # fmt: skip
def test_only_what_trains_is_linearized(make: Callable[[], nn.Module], trained: set[str]) -> None:
    monitor = watch(make, "next tokens", "sgd")
    names = set(monitor.comparison.initial_weights)
    assert all(any(name.endswith(end) for end in trained) for name in names)
    assert all(any(name.endswith(end) for name in names) for end in trained)
    distances = {n: v for n, v in monitor.history[-1].items() if n.startswith("parameter/")}
    assert distances.keys() == {f"parameter/{name}" for name in names}
    for name, distance in distances.items():
        # The output is linear in A with the factor B, which is zero at first: the linearized network never moves A.
        assert distance == 1 if "lora_A" in name else distance < 0.1


def test_after_some_steps_both_factors_move() -> None:
    with exactly():
        seed_everything(0, verbose=False)
        module = Family(lora(), "next tokens").double()
        module.optimizer = "sgd"
        monitor = LinearizationMonitor(
            reference=None, steps=1, capture_at=1, per_parameter=True, strict=True, progress=False
        )
        fit(module, monitor)
    last = monitor.history[-1]
    assert all(value < 0.9 for name, value in last.items() if name.startswith("parameter/"))


def test_no_linearized_training_comes_closer_than_what_the_first_factor_moves() -> None:
    """Its tangent is zero, so that all that it moves is outside of the span of the Jacobian."""

    class Regression(zoo.Tutorial):
        def __init__(self) -> None:
            super().__init__()
            network = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3))
            self.model = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=["0", "2"]))

        def forward(self, x):
            return self.model(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.mse_loss(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1)

        def dataset(self):
            x, y = zoo.digits()
            return TensorDataset(x[:12].double(), y[:12, None].double() / 10 * torch.tensor([1.0, -1.0, 2.0]))

    seed_everything(0, verbose=False)
    module = Regression().double()
    start = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    monitor = LinearizationMonitor(steps=8, closest=True, strict=True, progress=False)
    trainer = Trainer(
        max_steps=8, max_epochs=-1, accelerator="cpu", precision="64-true", logger=False, callbacks=[monitor],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(module.dataset(), 12))
    moved = {name: (module.get_parameter(name).detach() - value).square().sum() for name, value in start.items()}
    share = (sum(v for n, v in moved.items() if "lora_A" in n) / sum(moved.values())).sqrt().item()
    assert monitor.dynamics_used == "gradient_descent"
    assert 0.01 < share <= monitor.history[-1]["distance_floor"] * (1 + 1e-9)


class AfterFirstStep(Callback):
    def __init__(self, change: Callable[[Any], None]) -> None:
        self.change = change

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 1:
            self.change(pl_module.model)


def switch(model: Any) -> None:
    model.set_adapter("other")


def merge(model: Any) -> None:
    """Merges the adapter into the weights and begins a new one, as ReLoRA does."""
    layer = model.get_submodule("transformer.h.0.attn.c_attn")
    layer.merge()
    layer.merged_adapters.clear()
    layer.reset_lora_parameters("default", init_lora_weights=True)


@pytest.mark.parametrize(
    ("change", "expected"), [(merge, "weights of the run changed"), (switch, "From step 2 on the run trains .*other")]
)
def test_adapters_that_change_during_a_run_are_noticed(change: Callable[[Any], None], expected: str) -> None:
    seed_everything(0, verbose=False)
    model = lora()
    model.add_adapter("other", peft.LoraConfig(r=2, **ATTENTION))
    module = Family(model, "next tokens")
    module.configure_optimizers = lambda: module.make_optimizer(module.parameters())
    monitor = LinearizationMonitor(reference=None, steps=1, progress=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, monitor, AfterFirstStep(change))
    said = [str(w.message) for w in caught if "linearized" in str(w.message)]
    assert any(re.search(expected, sentence) for sentence in said), said
