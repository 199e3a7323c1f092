"""What a run does that full-batch gradient descent on its training set does not, in words."""

from collections.abc import Iterable, Sized

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import SGD, Optimizer
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler


def run_differences(
    trainer: Trainer, module: LightningModule, optimizer: Optimizer, reference_size: int
) -> Iterable[str]:
    """Phrases, one for each respect in which the run is not full-batch gradient descent on the reference set.

    Args:
        trainer: The Trainer, at the start of training.
        module: The module that it trains, in the modes in which it is trained.
        optimizer: Its only optimizer.
        reference_size: Samples in the reference set.

    Yields:
        Phrases such as "it uses momentum 0.9".
    """
    yield from _of_optimizer(optimizer)
    if trainer.gradient_clip_val:
        yield f"it clips gradients at {trainer.gradient_clip_val}"
    yield from _of_batches(trainer, reference_size)
    yield from _of_module(module, optimizer)


def _of_optimizer(optimizer: Optimizer) -> Iterable[str]:
    if type(optimizer) is not SGD:
        yield f"its optimizer is {type(optimizer).__name__}"
        return
    for option in ("momentum", "weight_decay"):
        values = {group[option] for group in optimizer.param_groups}
        if values != {0}:
            yield f"it uses {option.replace('_', ' ')} {', '.join(map(str, sorted(values)))}"
    if any(group["maximize"] for group in optimizer.param_groups):
        yield "it maximises its loss"
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    if len(rates) > 1:
        yield f"its parameter groups have different learning rates ({', '.join(f'{rate:g}' for rate in sorted(rates))})"


def _of_batches(trainer: Trainer, reference_size: int) -> Iterable[str]:
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, Sized):
        yield "its training data is no data set of known size"
        return
    samples = len(loader.dataset)
    if samples != reference_size:
        yield f"it trains on {samples} samples while the reference has {reference_size}"
    if (
        not isinstance(loader.sampler, SequentialSampler | RandomSampler)
        or type(loader.batch_sampler) is not BatchSampler
    ):
        yield f"it draws its samples with {type(loader.sampler).__name__}"
    micro_batches = min(trainer.accumulate_grad_batches, int(trainer.num_training_batches))
    seen = micro_batches * (loader.batch_size or 1)
    if seen < samples:
        yield f"each step sees {seen} of {samples} samples"
    elif micro_batches < trainer.accumulate_grad_batches:
        yield f"it divides gradients by {trainer.accumulate_grad_batches} though an epoch has {micro_batches} batches"
    elif micro_batches > 1 and samples % micro_batches:
        yield "it accumulates over batches of unequal size"


def _of_module(module: LightningModule, optimizer: Optimizer) -> Iterable[str]:
    modes = {
        "batch statistics in BatchNorm": nn.modules.batchnorm._BatchNorm,
        "dropout": nn.modules.dropout._DropoutNd,
    }
    for phrase, kind in modes.items():
        if any(isinstance(m, kind) and m.training and getattr(m, "p", 1) > 0 for m in module.modules()):
            yield f"it trains with {phrase}, where the linearised network is in eval mode"
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left_out = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in optimized]
    if left_out:
        yield f"its optimizer leaves out {', '.join(left_out[:3])}{' and others' if left_out[3:] else ''}"
