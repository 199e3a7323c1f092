"""What the callback reads off a Trainer and its optimizer."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_ntk.following import StepSettings
from lightning_ntk.linearization import trainable_parameters


def single_optimizer(trainer: Trainer) -> Optimizer:
    """The optimizer of the run.

    Raises:
        MisconfigurationException: If there is none, or several.
    """
    if len(trainer.optimizers) != 1:
        raise MisconfigurationException(
            f"LinearizationMonitor expects a LightningModule with one optimizer but it has {len(trainer.optimizers)}. "
            "Linearised training is defined for one optimizer that minimises one loss."
        )
    return trainer.optimizers[0]


def step_settings(trainer: Trainer, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> StepSettings:
    """What the coming optimizer step depends on, of the live parameters that were linearised."""
    clip = trainer.gradient_clip_val or None  # the Trainer takes 0 for none, too
    by_value = trainer.gradient_clip_algorithm == "value"
    return StepSettings(
        groups=[dict(group) for group in optimizer.param_groups],
        clip_norm=None if clip is None or by_value else float(clip),
        clip_value=float(clip) if clip is not None and by_value else None,
        frozen=[name for name, parameter in parameters.items() if parameter.grad is None],
    )


def momentum_buffers(module: LightningModule, optimizer: Optimizer) -> dict[str, Tensor] | None:
    """Clones of the momentum buffers that SGD has by now, zero where a parameter has none; None if none has."""
    buffers = {
        name: optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in trainable_parameters(module).items()
        if parameter in optimizer.state and optimizer.state[parameter].get("momentum_buffer") is not None
    }
    if not buffers:
        return None
    return {
        name: buffers[name].detach().clone() if name in buffers else torch.zeros_like(parameter)
        for name, parameter in trainable_parameters(module).items()
    }


def horizon(trainer: Trainer) -> float | None:
    """Optimizer steps of the run, or None if they have no end in sight."""
    steps = float(trainer.estimated_stepping_batches)
    return steps if math.isfinite(steps) else None


def is_last_step(trainer: Trainer) -> bool:
    """Whether no batch comes after this one."""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.should_stop or (trainer.is_last_batch and last_epoch)


def training_data(trainer: Trainer) -> DataLoader[Any]:
    """The training DataLoader.

    Raises:
        ValueError: If there are several, or none.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f'Expected one training DataLoader for reference="train" but got {type(loader).__name__}. '
            "Give the reference data set itself."
        )
    return loader


def precision(trainer: Trainer, module: LightningModule) -> torch.dtype:
    """The least precise type in which the run computes its gradients."""
    by_name = {"16": torch.float16, "bf16": torch.bfloat16, "64": torch.float64}
    own = next(iter(module.parameters())).dtype
    if own == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        own = torch.float16  # TF32 has as many digits
    return by_name.get(str(trainer.precision).split("-")[0], own)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """All callbacks of a Trainer."""
    return list(getattr(trainer, "callbacks", []))
