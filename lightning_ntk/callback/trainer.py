"""Reads what the callback needs from a Trainer and its optimizer."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightning_ntk.comparison.optimizer import some
from lightning_ntk.data.reference import NoFixedOrderError, seen_samples
from lightning_ntk.linearization.parameters import plain_name, trainable_parameters
from lightning_ntk.training.base import StepSettings
from lightning_ntk.utilities.distributed import ALONE, Processes

NOT_DATA = (Trainer, Callback, Optimizer, Logger, _BaseDataLoaderIter)
"""What belongs to the run, and goes on."""

# WeightAveraging came with Lightning 2.6.
_AVERAGING = (StochasticWeightAveraging, getattr(lightning_callbacks, "WeightAveraging", StochasticWeightAveraging))


def require_supported_strategy(trainer: Trainer) -> None:
    """Refuses strategies in which no process holds the whole network."""
    strategy = trainer.strategy
    supported = isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
    if not supported or isinstance(strategy, DeepSpeedStrategy):  # which derives from DDPStrategy
        raise MisconfigurationException(
            "LinearizationMonitor expects training on a single device, or on several with DDPStrategy, where every process "
            f'holds the whole network, but got {type(strategy).__name__}. Use Trainer(devices=1) or Trainer(strategy="ddp").'
        )


def processes_of(trainer: Trainer) -> Processes:
    """The processes of the run.

    All of them must ask, once training is set up.
    """
    if trainer.world_size == 1:
        return ALONE
    return Processes.of_process_group(trainer.strategy.root_device)


def single_optimizer(trainer: Trainer) -> Optimizer:
    """The only optimizer of the run; refuses runs with none, or several."""
    if len(trainer.optimizers) != 1:
        raise MisconfigurationException(
            f"LinearizationMonitor expects a LightningModule with one optimizer but it has {len(trainer.optimizers)}. "
            "Linearized training is defined for one optimizer that minimizes one loss."
        )
    return trainer.optimizers[0]


def require_available(device: str | None) -> None:
    """Refuses a device that this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter in builds of PyTorch without CUDA
        raise MisconfigurationException(
            f"LinearizationMonitor expects a device that can hold a kernel but got device={device!r}: {error}. "
            'Use device="cpu", or None for that of the module.'
        ) from error


def step_settings(trainer: Trainer, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> StepSettings:
    """The settings of the coming step, for the linearized parameters."""
    clip = float(trainer.gradient_clip_val or 0) or None  # the Trainer takes 0 for none, too
    by_value = trainer.gradient_clip_algorithm == "value"
    return StepSettings.of(
        optimizer, parameters, clip_norm=None if by_value else clip, clip_value=clip if by_value else None
    )


def momentum_buffers(module: LightningModule, optimizer: Optimizer) -> dict[str, Tensor] | None:
    """Clones of SGD's momentum buffers; None if there are none.

    A parameter without a buffer gets zeros.
    """
    parameters = trainable_parameters(module)
    # `optimizer.state` makes an entry for whatever is looked up.
    found = {n: optimizer.state[p].get("momentum_buffer") for n, p in parameters.items() if p in optimizer.state}
    buffers = {name: buffer.detach().clone() for name, buffer in found.items() if buffer is not None}
    if not buffers:
        return None
    return {name: buffers[name] if name in buffers else torch.zeros_like(p) for name, p in parameters.items()}


def loss_scale(trainer: Trainer) -> float | None:
    """The factor that a GradScaler gives the loss at present; None without one."""
    plugin = trainer.precision_plugin
    return plugin.scaler.get_scale() if isinstance(plugin, MixedPrecision) and plugin.scaler is not None else None


def overflowed(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer skips its step because a GradScaler found an overflow."""
    verdict = getattr(optimizer, "found_inf", None)
    return verdict is not None and bool(verdict)


def scale_of_gradients(optimizer: Optimizer, scale: float | None) -> float:
    """The GradScaler factor that gradients still carry right before the step.

    Fused optimizers remove it themselves.
    """
    return scale if scale is not None and any(group.get("fused") for group in optimizer.param_groups) else 1.0


def gradients(optimizer: Optimizer, parameters: Mapping[str, Tensor], scale: float | None) -> dict[str, Tensor | None]:
    """The gradients of the coming step, without a GradScaler's factor.

    They are None for parameters without one.
    """
    factor = scale_of_gradients(optimizer, scale)

    def unscaled(gradient: Tensor) -> Tensor:
        return gradient.detach() if factor == 1 else gradient.detach() / factor

    return {name: None if p.grad is None else unscaled(p.grad) for name, p in parameters.items()}


def live_parameters(module: LightningModule, names: Iterable[str]) -> dict[str, Tensor]:
    """The parameters of a module by name; a ValueError where some are gone."""
    parameters = dict(module.named_parameters())
    gone = [plain_name(name) for name in names if name not in parameters]
    if gone:
        raise ValueError(
            f"Expected the parameters that were linearized but the module has no {some(gone)} any more. They were pruned, "
            "merged, renamed or removed, and the linearized network does not follow that."
        )
    return {name: parameters[name] for name in names}


def tensors_of(module: LightningModule) -> dict[str, Tensor]:
    """The weights and buffers of a module by name, detached."""
    own = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach() for name, tensor in own}


def training_batch(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """Converts a batch to what `training_step` gets.

    This applies the precision and the hooks of the run and moves the batch to its device.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    data = getattr(trainer, "datamodule", None)
    source = module if data is None or not is_overridden("on_before_batch_transfer", data) else data
    batch = source.on_before_batch_transfer(batch, 0)
    return trainer.strategy.batch_to_device(batch)


def bystanders(trainer: Trainer, module: LightningModule) -> list[Any]:
    """Objects outside the network that reading data and passes may change."""
    return [*data_parts(trainer.train_dataloader), getattr(trainer, "datamodule", None), module]


def data_parts(data: Any) -> list[Any]:
    """The objects that are called to read data in the main process."""
    return [data.dataset, data.collate_fn] if isinstance(data, DataLoader) else [data]


def horizon(trainer: Trainer) -> float | None:
    """Optimizer steps of the run, or None if they have no end in sight."""
    steps = float(trainer.estimated_stepping_batches)
    return steps if math.isfinite(steps) else None


def is_last_step(trainer: Trainer) -> bool:
    """Whether no batch comes after this one."""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    # One epoch more follows where BatchNorm has to see the averaged weights.
    last_epoch |= any(trainer.current_epoch == averaging.swa_end for averaging in _averaging(trainer))
    may_stop = trainer.global_step >= (trainer.min_steps or 0) and trainer.current_epoch >= (trainer.min_epochs or 0)
    return (trainer.should_stop and may_stop) or (trainer.is_last_batch and last_epoch)


def has_averaged_weights(trainer: Trainer) -> bool:
    """Whether this epoch only updates BatchNorm for StochasticWeightAveraging."""
    return any(trainer.current_epoch > averaging.swa_end for averaging in _averaging(trainer))


def ends_with_averaged_weights(trainer: Trainer, callback: Callback) -> bool:
    """Whether a callback before this one replaces the weights when training ends."""
    callbacks = callbacks_of(trainer)
    return any(isinstance(c, _AVERAGING) for c in callbacks[: callbacks.index(callback)])


def _averaging(trainer: Trainer) -> list[StochasticWeightAveraging]:
    ends = trainer.max_epochs not in (None, -1)
    return [c for c in callbacks_of(trainer) if isinstance(c, StochasticWeightAveraging)] if ends else []


def training_data(trainer: Trainer) -> DataLoader[Any]:
    """The samples that training sees.

    These are the samples of its DataLoader, or the first of them if it sees no others.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        got = f"{len(loader)} of them" if isinstance(loader, list | tuple | dict) else f"a {type(loader).__name__}"
        raise NoFixedOrderError(
            f'Expected one training DataLoader for reference="train" but got {got}. Give the reference data set itself.'
        )
    seen = seen_samples(loader, trainer.num_training_batches)
    if seen is None or seen == len(loader.dataset):  # type: ignore[arg-type]
        return loader
    first = Subset(loader.dataset, range(seen))
    return DataLoader(first, loader.batch_size, collate_fn=loader.collate_fn, num_workers=loader.num_workers)


def is_compiled(module: LightningModule) -> bool:
    """Whether the Trainer was given a compiled module, of which it keeps the plain one."""
    return module._compiler_ctx is not None


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
