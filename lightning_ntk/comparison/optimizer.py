"""The optimizer of a run as the linearized dynamics see it: its settings at capture, and what changes of them later."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_ntk.training.base import StepSettings


class ObservedOptimizer:
    """The parameter groups of an optimizer, as they were when the network was linearized.

    Args:
        optimizer: The optimizer of the run.
        parameters: The live parameters that were linearized, by name.
        settings: Its settings then, if that was in an earlier part of the run.

    Attributes:
        optimizer: The optimizer.
        settings: For every group the numbers that SGD depends on.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Mapping[str, Tensor],
        settings: Sequence[dict[str, float]] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self._parameters = parameters
        self.settings = (
            [_hyperparameters(group) for group in optimizer.param_groups] if settings is None else list(settings)
        )
        self._first_frozen: set[str] | None = None

    def multiples(self) -> dict[str, float] | None:
        """By parameter, the learning rate in units of that of the first group, 0 for those that the optimizer leaves out.

        None where all of them are 1.
        """
        groups = {id(p): n for n, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        first = self.settings[0]["lr"]
        multiples = {}
        for name, parameter in self._parameters.items():
            number = groups.get(id(parameter))
            rate = 0.0 if number is None else self.settings[number]["lr"]
            multiples[name] = rate / first if first and number is not None else float(number is not None)
        return None if set(multiples.values()) == {1.0} else multiples

    def changes(self, step: StepSettings) -> Iterator[tuple[str, str]]:
        """What is no longer as at the capture, with a step that was just taken: kinds, and beginnings of sentences."""
        rates = [float(group["lr"]) * self.settings[0]["lr"] for group in step.groups]
        expected = [float(step.groups[0]["lr"]) * own["lr"] for own in self.settings]
        if any(abs(a - b) > 1e-9 * max(a, b) for a, b in zip(rates, expected, strict=False)):
            yield "rates", "the run changed the ratio of the learning rates of its parameter groups"
        self._first_frozen = set(step.frozen) if self._first_frozen is None else self._first_frozen
        changed = sorted(self._first_frozen ^ set(step.frozen))
        if changed:
            some = ", ".join(changed[:3]) + (" and others" if changed[3:] else "")
            yield "frozen", f"the run began or ceased to train {some}"


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a parameter group that SGD depends on, 0 for those that it has not."""
    names = ("momentum", "dampening", "nesterov", "weight_decay", "maximize")
    # A warm-up begins with a rate of nothing: schedules note their base rate, and the largest, in the group.
    rate = max(float(group.get(name) or 0) for name in ("lr", "initial_lr", "max_lr"))
    return {"lr": rate} | {name: float(group.get(name) or 0) for name in names}
