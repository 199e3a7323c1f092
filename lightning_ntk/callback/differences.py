"""Describes what a run does that linearized dynamics cannot."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import SGD, Optimizer
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_ntk.data.reference import seen_samples
from lightning_ntk.dynamics.sgd import SGD_OPTIONS

_HALF = (torch.float16, torch.bfloat16)


def run_differences(
    trainer: Trainer, module: LightningModule, optimizer: Optimizer, dynamics: str, reference_size: int | None
) -> list[str]:
    """Phrases for what the optimizer of a run does and the dynamics do not.

    An example is "its optimizer is Adam".
    """
    phrases = list(_of_training_step(trainer, module))
    if dynamics == "twin":
        return phrases
    phrases += _of_optimizer(optimizer, dynamics, clips=bool(trainer.gradient_clip_val))
    if trainer.gradient_clip_val and (dynamics != "replay" or trainer.gradient_clip_algorithm == "value"):
        by = " by value" if trainer.gradient_clip_algorithm == "value" else ""
        phrases.append(f"it clips gradients{by} at {trainer.gradient_clip_val}")
    loader: Any = trainer.train_dataloader
    samples = seen_samples(loader, trainer.num_training_batches) if isinstance(loader, DataLoader) else None
    if samples is None:
        return [*phrases, "its training data is no data set of known size"]
    if samples != reference_size:
        phrases.append(f"it trains on {samples} samples while the reference has {reference_size}")
    if dynamics != "replay":
        phrases += _of_batches(trainer, loader, samples)
    return phrases


def forward_differences(trainer: Trainer, module: LightningModule, *, in_eval_mode: bool = True) -> list[str]:
    """Phrases for what the run's forward passes do and the linearized ones do not."""
    modes = {"batch statistics in BatchNorm": nn.modules.batchnorm._BatchNorm, "dropout": nn.modules.dropout._DropoutNd}
    half = {str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.dtype in _HALF}
    phrases = [f"it keeps weights in {dtype}, where the linearized network has float32" for dtype in sorted(half)]
    if str(trainer.precision).endswith("-mixed"):
        phrases.append(f"its passes run in {trainer.precision} precision, those of the linearized network do not")
    return phrases + [
        f"it trains with {phrase}, where the linearized network is in eval mode"
        for phrase, kind in modes.items()
        if in_eval_mode and any(isinstance(m, kind) and m.training and getattr(m, "p", 1) > 0 for m in module.modules())
    ]


def _of_training_step(trainer: Trainer, module: LightningModule) -> Iterable[str]:
    if not module.automatic_optimization:
        yield "it optimizes manually"
    if is_overridden("backward", module):
        yield "it has a `backward` of its own"
    if getattr(trainer.strategy, "_ddp_comm_hook", None) is not None:
        yield "its processes exchange gradients through a communication hook"
    if getattr(trainer.strategy, "_model_averager", None) is not None:
        yield "its processes average weights, not gradients"


def _of_optimizer(optimizer: Optimizer, dynamics: str, *, clips: bool) -> Iterable[str]:
    if type(optimizer) is not SGD:
        yield f"its optimizer is {type(optimizer).__name__}"
        return
    groups = optimizer.param_groups
    if any(group["maximize"] for group in groups):
        yield "it maximizes its loss"
    if dynamics == "gradient_flow":
        for option in ("momentum", "weight_decay"):
            values = {group[option] for group in groups}
            if values != {0}:
                yield f"it uses {option.replace('_', ' ')} {', '.join(map(str, sorted(values)))}"
    for option in SGD_OPTIONS:
        values = {float(group[option]) for group in groups}
        # Rates that differ are coordinates of the weights, unless something else acts on the weights themselves.
        scaled = option == "lr" and not clips and not any(group["weight_decay"] for group in groups)
        if len(values) > 1 and not scaled:
            name = "learning rates" if option == "lr" else f"values of {option.replace('_', ' ')}"
            yield f"its parameter groups have different {name} ({', '.join(f'{value:g}' for value in sorted(values))})"


def _of_batches(trainer: Trainer, loader: DataLoader[Any], samples: int) -> Iterable[str]:
    """What keeps a step from seeing every sample once, with equal weight."""
    sampler, own, processes = loader.sampler, samples, 1
    known = isinstance(sampler, SequentialSampler | RandomSampler | DistributedSampler)
    if not known or type(loader.batch_sampler) is not BatchSampler:
        yield f"it draws its samples with {type(sampler).__name__}"
    elif isinstance(sampler, RandomSampler) and sampler.replacement:
        yield "it draws its samples with replacement"
    elif isinstance(sampler, DistributedSampler):
        own, processes = sampler.num_samples, sampler.num_replicas
        if processes * own != samples:
            extra = processes * own - samples
            does = f"repeats {extra}" if extra > 0 else f"omits {-extra}"
            yield f"it {does} of {samples} samples in every epoch so that all {processes} processes have {own}"
    elif len(sampler) < len(loader.dataset):  # type: ignore[arg-type]
        yield f"it draws {len(sampler)} of {len(loader.dataset)} samples in an epoch"  # type: ignore[arg-type]
    if any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks):  # type: ignore[attr-defined]
        yield "it changes over how many batches it accumulates gradients"
    micro_batches = min(trainer.accumulate_grad_batches, int(trainer.num_training_batches))
    size = loader.batch_size or 1
    if micro_batches * size < own:
        yield f"each step sees {micro_batches * size * processes} of {samples} samples"
    elif micro_batches < trainer.accumulate_grad_batches:
        yield f"it divides gradients by {trainer.accumulate_grad_batches} though an epoch has {micro_batches} batches"
    elif micro_batches > 1 and micro_batches * size != own:
        yield "it accumulates over batches of unequal size"
