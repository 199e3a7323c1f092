"""Detects changes of gradients and weights outside of backward passes and steps."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_ntk.linearization.parameters import plain_name
from lightning_ntk.training.base import StepSettings

Report = Callable[[str, str], None]
Gradients = Mapping[str, Tensor | None]


class _Sums(NamedTuple):
    """A few sums that distinguish gradients, or detect multiples, at little cost."""

    names: tuple[str, ...]
    norms: Tensor  # of each tensor
    sums: Tensor  # of its entries
    sizes: Tensor

    @classmethod
    def of(cls, gradients: Gradients, *, scale: float = 1.0, clip_value: float | None = None) -> "_Sums":
        dense = {n: g.detach() for n, g in gradients.items() if g is not None and g.layout == torch.strided}
        given = dense
        if clip_value is not None:
            given, scale = {n: (g / scale).clamp(-clip_value, clip_value) for n, g in dense.items()}, 1.0
        values = list(given.values())
        sizes = torch.tensor([float(value.numel()) for value in values], dtype=torch.float64)
        if not values:
            return cls((), sizes, sizes, sizes)
        norms = torch.stack([norm.double() for norm in torch._foreach_norm(values)]).cpu() / scale
        # Rows first: a sum in float64 would copy the whole tensor to it.
        sums = torch.stack([value.sum(-1).sum(dtype=torch.float64) for value in values]).cpu() / scale
        return cls(tuple(given), norms, sums, sizes)

    @property
    def total(self) -> float:
        return float(self.norms.norm())

    def factor_to(self, other: "_Sums", tolerance: float) -> float | None:
        """The c for which the other gradient is c times this one, or None.

        Norms and sums decide this.
        """
        if self.names != other.names or self.total == 0:
            return 1.0 if self.names == other.names and other.total == 0 else None
        size = float(self.norms @ other.norms) / self.total**2
        for factor in (size, -size):
            off = (other.norms - abs(factor) * self.norms).abs().max()
            sums = ((other.sums - factor * self.sums).abs() / self.sizes.sqrt()).max()
            if max(off, sums) <= tolerance * max(self.total * size, other.total):
                return 1.0 if abs(factor - 1) <= tolerance else factor
        return None


class StepWatch:
    """Detects what changes gradients and weights around an optimizer step.

    Attributes:
        mismatch: The relative difference between the gradient of the last step and the expected one; None where it was not
            compared.
        factor: The factor that the run gave its gradient in the coming step, before clipping.
    """

    def __init__(self) -> None:
        self.mismatch: float | None = None
        self.factor = 1.0
        self._first_factor: float | None = None
        self._gradient: _Sums | None = None  # after the last backward pass
        self._clip_value: float | None = None
        self._weights: dict[str, Tensor] = {}
        self._versions: dict[str, tuple[int, int]] = {}

    def begin_batch(self, module: LightningModule, report: Report, step: int) -> None:
        """Checks whether weights have changed since the last step."""
        self.check_weights(module, report, step)
        self._versions = _versions(module)

    def begin_backward(self, gradients: Gradients, scale: float, report: Report, step: int) -> None:
        """Checks whether gradients have changed since the last backward pass.

        In the first pass of a step it checks for gradients that an earlier step has left.
        """
        if self._gradient is None:
            if _Sums.of(gradients, scale=scale).total > 0:
                report(
                    "gradients",
                    f"Step {step + 1}: the run adds to gradients of an earlier step that were not set to zero, which the "
                    "linearized network does not follow.",
                )
            return
        if not self._gradient.norms.isfinite().all():
            return
        now = _Sums.of(gradients, scale=scale, clip_value=self._clip_value)
        if self._gradient.factor_to(now, _tolerance(gradients)) != 1:
            report(
                "gradients",
                f"Step {step + 1}: the run changed its gradients between the batches that it accumulates, which the "
                "linearized network does not follow.",
            )

    def end_backward(self, gradients: Gradients, scale: float, clip_value: float | None) -> None:
        """Records the gradients after a backward pass, times a GradScaler's scale."""
        self._clip_value = clip_value
        self._gradient = _Sums.of(gradients, scale=scale, clip_value=clip_value)

    def before_step(
        self,
        module: LightningModule,
        gradients: Gradients,
        scale: float,
        settings: StepSettings,
        report: Report,
        step: int,
    ) -> None:
        """Compares the optimizer's gradients with those of the last backward pass."""
        written = [n for n, version in _versions(module).items() if self._versions.get(n, version) != version]
        if written:
            self._report_written(written[0], "before", step, report)
        before, self._gradient, self.factor = self._gradient, None, 1.0
        if before is None or not before.norms.isfinite().all():
            return
        now, tolerance = _Sums.of(gradients, scale=scale), _tolerance(gradients)
        factor = before.factor_to(now, tolerance)
        norm = before.total
        # As `clip_grad_norm_` computes it.
        clipped = 1.0 if settings.clip_norm is None else min(1.0, settings.clip_norm / (norm + 1e-6))
        if factor is not None and abs(factor - clipped) <= tolerance * clipped:
            factor = 1.0
        elif settings.clip_value is not None or now.total > (settings.clip_norm or math.inf) * (1 - 1e-3):
            factor = None  # clipped and multiplied, in an unknown order
        first = self._first_factor = self._first_factor if self._first_factor is not None else factor
        self.factor = 1.0 if factor is None else factor
        if factor is None or first is None or abs(factor - first) > tolerance * abs(first):
            report(
                "clipping",
                f"Step {step}: the run changed its gradients after its backward pass, from a norm of {norm:.4g} to "
                f"{now.total:.4g}, in a way that the linearized network cannot follow. Clip with "
                "Trainer(gradient_clip_val=...) instead of in a hook.",
            )

    def after_step(self, module: LightningModule) -> None:
        """Records what identifies the weights at the end of a step."""
        self._weights = _norms(module)

    def discard(self) -> None:
        """Forgets the gradients of a step that was not taken."""
        self.mismatch, self._gradient = None, None

    def check_weights(self, module: LightningModule, report: Report, step: int) -> None:
        """Checks whether weights have changed since the end of the last step."""
        if not self._weights:
            return
        now = _norms(module)
        for name, norm in self._weights.items():
            if name in now and not torch.equal(now[name], norm):
                self._report_written(name, "after", step, report)
                break
        self._weights = now

    def _report_written(self, name: str, when: str, step: int, report: Report) -> None:
        report(
            "weights",
            f"The weights of the run changed {when} step {step} by more than its optimizer does, for example "
            f"`{plain_name(name)}`: something else writes into them, which the linearized network does not follow.",
        )


def _norms(module: LightningModule) -> dict[str, Tensor]:
    tensors = {name: p.detach() for name, p in module.named_parameters()}
    return dict(zip(tensors, torch._foreach_norm(list(tensors.values())), strict=True))


def _versions(module: LightningModule) -> dict[str, tuple[int, int]]:
    return {name: (id(p), p._version) for name, p in module.named_parameters() if p.requires_grad}


def _tolerance(gradients: Gradients) -> float:
    return math.sqrt(max((torch.finfo(g.dtype).eps for g in gradients.values() if g is not None), default=0.0))
