"""The optimizer of a run as linearized dynamics see it: its settings at capture, and what changes of them later."""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from lightning_ntk.dynamics.sgd import Hyperparameters, SGDSettings
from lightning_ntk.training.base import StepSettings


class ObservedOptimizer:
    """The parameter groups of an optimizer, as they were when the network was linearized.

    Args:
        optimizer: The optimizer of the run.
        parameters: The live parameters that were linearized, by name.
        late: Whether the run has taken steps already. Before the first one, a warm-up may have set the learning rate to
            nothing; then the base rate or the largest rate that its schedule has noted counts.
        settings: The settings at capture, if that was in an earlier part of the run.

    Attributes:
        optimizer: The optimizer.
        settings: The SGD settings of every group at capture. What the optimizer does not have is 0.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Mapping[str, Tensor],
        *,
        late: bool = False,
        settings: Sequence[Sequence[float]] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self._parameters = parameters
        if settings is None:
            own = [SGDSettings.of(group) for group in optimizer.param_groups]
            rates = [_base_rate(group) for group in optimizer.param_groups]
            warms_up = not late or not any(group.lr for group in own)
            self.settings = (
                [group._replace(lr=rate) for group, rate in zip(own, rates, strict=True)] if warms_up else own
            )
        else:
            self.settings = [SGDSettings.of(dict(zip(SGDSettings._fields, group, strict=True))) for group in settings]
        self._first_frozen: set[str] | None = None

    @property
    def hyperparameters(self) -> Hyperparameters:
        """Those of the first group."""
        return Hyperparameters(self.settings[0].lr, self.settings[0])

    @property
    def lr_scales(self) -> dict[str, float]:
        """By parameter, the learning rate in units of the first group's, and 0 for those that the optimizer leaves out."""
        groups = {id(p): n for n, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        first = self.settings[0].lr
        scales = {}
        for name, parameter in self._parameters.items():
            number = groups.get(id(parameter))
            known = number is not None
            scales[name] = self.settings[number].lr / first if number is not None and first else float(known)
        return scales

    def changes(self, step: StepSettings) -> Iterator[tuple[str, str]]:
        """What a step had otherwise than the capture: kinds, and what the run did, to follow "the run"."""
        rates = [float(group["lr"]) * self.settings[0].lr for group in step.groups]
        expected = [float(step.groups[0]["lr"]) * own.lr for own in self.settings]
        if any(abs(a - b) > 1e-9 * max(a, b) for a, b in zip(rates, expected, strict=False)):
            yield "rates", "changed the ratio of the learning rates of its parameter groups"
        self._first_frozen = set(step.frozen) if self._first_frozen is None else self._first_frozen
        changed = sorted(self._first_frozen ^ set(step.frozen))
        if changed:
            some = ", ".join(changed[:3]) + (" and others" if changed[3:] else "")
            yield "frozen", f"began or ceased to train {some}"


def _base_rate(group: Mapping[str, object]) -> float:
    return max(float(group.get(name) or 0) for name in ("lr", "initial_lr", "max_lr"))  # type: ignore[arg-type]
