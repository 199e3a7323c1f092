"""A copy of a LightningModule that repeats training steps without side effects."""

import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric

from lightning_ntk.utilities.preserved_objects import (
    class_generators,
    is_random_generator,
    preserved_objects,
    random_state,
    set_random_state,
)

_HALF = (torch.float16, torch.bfloat16)
# Values that a run may set on its modules between steps, and a shadow has to follow.
_PLAIN = (bool, int, float, str, type(None))


class _Silent:
    """Accepts every call and attribute, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> "_Silent":
        return self

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *args: Any) -> None: ...


def require_followable_step(module: LightningModule) -> None:
    """Refuses modules whose training step takes optimizer steps, which a copy must not repeat."""
    if not module.automatic_optimization:
        raise ValueError(
            "Expected automatic optimization but the module optimizes manually: its training step takes optimizer steps, "
            "which a copy must not repeat. Give `loss`, and `predict` and `unpack` where needed."
        )


class ShadowStep:
    """The training step of a copy of a LightningModule.

    It is called as Lightning calls the run's own.

    The copy has the weights and buffers that the module has now. It shares the Trainer for reading; what it logs goes nowhere.

    Args:
        trainer: The Trainer.
        module: The LightningModule that it trains.
        dtype: The floating-point type of the copy. Default: that of the module, and single precision for half precision.

    Attributes:
        module: The copy.
        batch_index: The index of the batch, set before each call.
        batch_dtype: The type that floating-point tensors of a batch need; None if it is their own.

    Raises:
        ValueError: If the module cannot be copied.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, *, dtype: torch.dtype | None = None) -> None:
        self._trainer = trainer
        self._live = module
        self.batch_index = 0
        self.module = _shadow_of(module)
        if dtype is None and any(p.dtype in _HALF for p in module.parameters()):
            dtype = torch.float32
        self.batch_dtype = dtype
        if dtype is not None:
            self.module.to(dtype)
        step = module.training_step
        self._takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)

    def __call__(self, batch: Any) -> Tensor | None:
        """The loss of a batch, or None."""
        self._take_over_attributes()
        # Those that belong to classes are shared with the run.
        shared = {id(g): g for m in self.module.modules() for g in class_generators(type(m))}
        with preserved_objects(*shared.values()):
            return self._loss_of(batch)

    def _loss_of(self, batch: Any) -> Tensor | None:
        arguments = (batch, self.batch_index) if self._takes_index else (batch,)
        plugin = self._trainer.precision_plugin
        if isinstance(plugin, DoublePrecision):  # whose context makes new tensors double; no other one is wanted
            with plugin.train_step_context():
                outputs = self.module.training_step(*arguments)
        else:
            outputs = self.module.training_step(*arguments)
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is None:
            return None
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(f"Expected `training_step` to return a loss, one number, but got {got}.")
        return loss.reshape(()) if loss.dim() else loss

    def follow(self, batch_index: int) -> None:
        """Copies the batch index and the train or eval mode of every module."""
        self.batch_index = batch_index
        for own, live in zip(self.module.modules(), self._live.modules(), strict=False):
            own.training = live.training

    def _take_over_attributes(self) -> None:
        """Copies numbers, flags and random states of the run's modules.

        The run may have changed them, or an earlier pass of the step.
        """
        for own, live in zip(self.module.modules(), self._live.modules(), strict=False):
            now = {name: value for name, value in vars(live).items() if _is_followed(name, value)}
            for name in [name for name, value in vars(own).items() if _is_followed(name, value) and name not in now]:
                del own.__dict__[name]
            own.__dict__.update(now)
            for name, value in vars(live).items():
                if is_random_generator(value) and is_random_generator(vars(own).get(name)):
                    set_random_state(vars(own)[name], random_state(value))
            if isinstance(own, Metric):  # or its lists would grow with every batch
                own.reset()


def _is_followed(name: str, value: Any) -> bool:
    return isinstance(value, _PLAIN) and not name.startswith("_") and name != "training"


def _shadow_of(module: LightningModule) -> LightningModule:
    memo: dict[int, Any] = {}
    for submodule in module.modules():
        for value in vars(submodule).values():
            if isinstance(value, (Trainer, Dataset, DataLoader)):
                memo[id(value)] = value
    for name in ("_trainer", "_fabric"):
        value = getattr(module, name, None)
        if value is not None:
            memo[id(value)] = value
    gradients = {p: p.grad for p in module.parameters()}
    try:
        for parameter in gradients:
            parameter.grad = None
        shadow = copy.deepcopy(module, memo)
    except Exception as error:
        raise ValueError(
            f"Expected a LightningModule that can be copied but it cannot: {type(error).__name__}: {error}. Give `loss`, and "
            "`predict` and `unpack` where needed, which do without a copy."
        ) from error
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
    shadow.__class__ = type(type(module).__name__, (_Muted, type(module)), {})
    if getattr(shadow, "_compiler_ctx", None):  # compiled methods belong to the module itself
        for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            shadow.__dict__.pop(name, None)
        shadow._compiler_ctx = None
    shadow._trainer = module._trainer  # a copy of a LightningModule forgets it, and with it global_step
    for own, live in zip(shadow.modules(), module.modules(), strict=True):
        own.training = live.training
    return shadow


class _Muted(LightningModule):
    """Blocks what a shadow must not do."""

    def log(self, *args: Any, **kwargs: Any) -> None: ...

    def log_dict(self, *args: Any, **kwargs: Any) -> None: ...

    def print(self, *args: Any, **kwargs: Any) -> None: ...

    @property
    def logger(self) -> Any:
        return _Silent()

    @property
    def loggers(self) -> Any:
        return [_Silent()]
