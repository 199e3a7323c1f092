"""What a run does with its weights besides following the gradient, found around its optimizer steps."""

import math
from collections.abc import Callable, Mapping

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_ntk.comparison.run_comparison import RunComparison
from lightning_ntk.linearization.parameters import plain_name
from lightning_ntk.training.base import StepSettings

Report = Callable[[str, str], None]

# The share by which the first step of the run may differ from that of the linearized network beyond rounding.
_FIRST_STEP_TOLERANCE = 1e-2
# Optimizers such as Adam make full steps of gradients that are zero but for rounding: what is smaller than this share of the
# largest entry is left out.
_ROUNDING_SHARE = 1e3


class StepWatch:
    """Compares what the run does around a step with what the optimizer alone would do.

    Attributes:
        mismatch: The relative difference of the gradient of the last step; None where it was not compared.
    """

    def __init__(self) -> None:
        self.mismatch: float | None = None
        self._gradients: Mapping[str, Tensor | None] = {}
        self._settings: StepSettings | None = None
        self._agrees = False
        self._weights: dict[str, Tensor] = {}

    def note_gradient(
        self, relative: float, gradients: Mapping[str, Tensor | None], settings: StepSettings | None, *, agrees: bool
    ) -> None:
        """Keeps the gradients of the step to come, as they are before clipping."""
        self.mismatch, self._gradients, self._settings, self._agrees = relative, gradients, settings, agrees

    def note_weights(self, module: LightningModule) -> None:
        """Keeps what tells the weights at the end of a step."""
        self._weights = _norms({name: p.detach() for name, p in module.named_parameters()})

    def discard(self) -> None:
        """Forgets the gradients: the step was not taken."""
        self.mismatch, self._gradients = None, {}

    def next_batch(self, module: LightningModule, report: Report, step: int) -> None:
        """Reports weights that have changed since the end of the last step."""
        if not self._weights:
            return
        now = _norms({name: p.detach() for name, p in module.named_parameters()})
        changed = [plain_name(n) for n, norm in self._weights.items() if n in now and not torch.equal(now[n], norm)]
        self._weights = {}
        if changed:
            report(
                "weights",
                f"The weights of the run changed between step {step} and the batch after it, for example "
                f"`{changed[0]}`: something besides the optimizer writes into them, which the linearized network does not.",
            )

    def after_step(self, module: LightningModule, comparison: RunComparison, report: Report, step: int) -> None:
        """Reports gradients that changed before the step, and a first step that is no step of the optimizer."""
        gradients, self._gradients = self._gradients, {}
        if not gradients:
            self.mismatch = None
            return
        parameters = dict(module.named_parameters())
        self._check_clipping(gradients, {n: parameters[n].grad for n in gradients}, report, step)
        if comparison.steps_taken == 1 and comparison.dynamics == "twin" and self._agrees:
            live = {name: parameters[name].detach() for name in comparison.initial_weights}
            distance = _first_distance(gradients, live, comparison)
            if distance > _FIRST_STEP_TOLERANCE:
                report(
                    "first step",
                    f"The first step of the run differs from that of the linearized network by {distance:.2g} of its length, "
                    "though their gradients agree: the run changes its weights by more than its optimizer does.",
                )
        if comparison.steps_taken == 1:
            self.note_weights(module)

    def _check_clipping(
        self, before: Mapping[str, Tensor | None], after: Mapping[str, Tensor | None], report: Report, step: int
    ) -> None:
        settings = self._settings
        if settings is None or settings.clip_value is not None:
            return
        if any((before[name] is None) != (after[name] is None) for name in before):
            return  # cleared after the step
        norm, now = _total(before), _total(after)
        # As `clip_grad_norm_` computes it.
        expected = norm if settings.clip_norm is None else norm * min(1.0, settings.clip_norm / (norm + 1e-6))
        eps = max((torch.finfo(g.dtype).eps for g in before.values() if g is not None), default=0.0)
        if math.isfinite(norm) and abs(now - expected) > math.sqrt(eps) * max(norm, now):
            report(
                "clipping",
                f"Step {step}: the run changed its gradients after its backward pass, from a norm of {norm:.4g} to {now:.4g}, "
                "which the linearized network does not follow. Clip with Trainer(gradient_clip_val=...) instead of in a hook.",
            )


def _first_distance(
    gradients: Mapping[str, Tensor | None], live: Mapping[str, Tensor], comparison: RunComparison
) -> float:
    """The distance of both networks after one step, where the gradient is more than rounding, less what rounding explains."""
    linearized = comparison.online.displacement()
    largest = max((float(g.abs().max()) for g in gradients.values() if g is not None), default=0.0)
    error, length = 0.0, 0.0
    for name, start in comparison.initial_weights.items():
        gradient = gradients.get(name)
        if gradient is None:
            continue
        eps = torch.finfo(gradient.dtype).eps
        counts = gradient.abs() > _ROUNDING_SHARE * eps * largest
        moved = (live[name].double() - start.double())[counts]
        apart = (moved - linearized[name].to(moved.device)[counts]).abs()
        rounding = 4 * torch.finfo(live[name].dtype).eps * start.abs().double()[counts]
        error += float((apart - rounding).clamp_min(0).square().sum())
        length += float(moved.square().sum())
    return math.sqrt(error / length) if length > 0 else 0.0


def _norms(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(tensors, torch._foreach_norm(list(tensors.values())), strict=True))


def _total(gradients: Mapping[str, Tensor | None]) -> float:
    given = [gradient.detach() for gradient in gradients.values() if gradient is not None]
    return float(torch.nn.utils.get_total_norm(given)) if given else 0.0
