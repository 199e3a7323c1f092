"""The optimizer of a run as linearized dynamics see it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_ntk.dynamics.sgd import SGD_OPTIONS, Hyperparameters, SGDSettings
from lightning_ntk.training.base import StepSettings

Change: TypeAlias = tuple[str, str]
"""A kind, and what the run does, to follow "the run"."""

_ROUNDING = 1e-9


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
        self._own = {
            name: self.settings[number] for name, number in _group_numbers(optimizer.param_groups, parameters).items()
        }
        self._maximizes = _maximizes(optimizer.param_groups)
        self._first: StepSettings | None = None
        self._state: dict[int, _Stamp] | None = None  # after the last step, by the id of the parameter

    @property
    def hyperparameters(self) -> Hyperparameters:
        """Those of the first group."""
        return Hyperparameters(self.settings[0].lr, self.settings[0])

    @property
    def lr_scales(self) -> dict[str, float]:
        """Learning rates by parameter, relative to the first group's.

        They are 0 for parameters that the optimizer leaves out.
        """
        first = self.settings[0].lr
        rates = {name: own.lr / first if first else 1.0 for name, own in self._own.items()}
        return {name: rates.get(name, 0.0) for name in self._parameters}

    @property
    def sgd_settings(self) -> SGDSettings | None:
        """The present SGD settings that all linearized parameters share.

        None if they share none, or with another optimizer.
        """
        groups = _group_numbers(self.optimizer.param_groups, self._parameters)
        own = {SGDSettings.of(self.optimizer.param_groups[number]) for number in groups.values()}
        followed = type(self.optimizer) is SGD and groups.keys() == self._parameters.keys() and len(own) == 1
        return own.pop() if followed and not _maximizes(self.optimizer.param_groups) else None

    def replace(self, optimizer: Optimizer) -> bool:
        """Continues with another optimizer of the run.

        Returns whether it starts without a state.
        """
        self.optimizer, self._state = optimizer, None
        return not self.has_state

    @property
    def has_state(self) -> bool:
        """Whether the optimizer remembers anything of earlier steps, for parameters that were linearized."""
        return any(_stamp(self.optimizer.state[p]) for p in self._held())

    def note_state(self) -> None:
        """Records what identifies the optimizer's state at the end of its step."""
        self._state = {id(p): _stamp(self.optimizer.state[p]) for p in self._held()}

    def state_changes(self) -> tuple[list[str], list[str]]:
        """The parameters whose state was removed, and those whose state was written.

        Both count from the last step.
        """
        if self._state is None:
            return [], []
        now = {id(p): _stamp(self.optimizer.state[p]) for p in self._held()}
        changed = {n: now.get(id(p), ()) for n, p in self._parameters.items() if self._differs(id(p), now)}
        return [n for n, stamp in changed.items() if not stamp], [n for n, stamp in changed.items() if stamp]

    def changes(self, step: StepSettings, *, full_batch: bool) -> Iterator[Change]:
        """Changes since the capture that the dynamics cannot follow.

        The dynamics have one learning rate and one momentum.

        Args:
            step: The settings of the step.
            full_batch: Whether the dynamics are gradient descent or flow, which do not clip.
        """
        first = self._first = self._first or step
        now = {n: step.groups[number] for n, number in _group_numbers(step.groups, self._parameters).items()}
        moved = sorted(now.keys() ^ self._own.keys())
        if moved:
            yield "members", f"added to its optimizer, or removed from it, {some(moved)}"
        common = SGDSettings.of(step.groups[0])
        differing = {option for option in SGD_OPTIONS[1:] if _differs(option, self.settings)}
        for name in now.keys() & self._own.keys():
            own, group = self._own[name], SGDSettings.of(now[name])
            rate, expected = group.lr * self.settings[0].lr, common.lr * own.lr
            if abs(rate - expected) > _ROUNDING * max(rate, expected):
                yield "rates", "changed the ratio of the learning rates of its parameter groups"
            for option in SGD_OPTIONS[1:]:
                if option not in differing and getattr(group, option) != getattr(common, option):
                    yield f"{option} of a group", f"changed the {option.replace('_', ' ')} of a part of its parameters"
        if _maximizes(step.groups) != self._maximizes:
            yield "maximize", "changed whether it maximizes its loss"
        clips = step.clip_norm is not None or step.clip_value is not None
        if clips and first.clip_norm is None and first.clip_value is None:
            scaled = len({own.lr for own in self._own.values()}) > 1
            if full_batch or scaled:
                yield "clips", "began to clip its gradients"
        frozen_since_capture = {name for name, p in self._parameters.items() if not p.requires_grad}
        unfollowed = frozen_since_capture | ({*first.frozen, *first.at_zero} ^ {*step.frozen, *step.at_zero})
        if unfollowed:
            yield "frozen", f"began or ceased to train {some(sorted(unfollowed))}"

    def _held(self) -> list[Tensor]:
        # `optimizer.state` makes an entry for whatever is looked up.
        return [p for p in self._parameters.values() if p in self.optimizer.state]

    def _differs(self, key: int, now: "Mapping[int, _Stamp]") -> bool:
        assert self._state is not None
        before = self._state.get(key, ())
        return bool(before or now.get(key)) and before != now.get(key, ())


def some(names: Sequence[str]) -> str:
    """The first names of many, in words."""
    return ", ".join(names[:3]) + (" and others" if names[3:] else "")


_Stamp: TypeAlias = tuple[Any, ...]


def _stamp(state: Mapping[str, Any]) -> _Stamp:
    """Identifies the tensors of a parameter's state and their versions."""
    return tuple((name, id(v), v._version) for name, v in state.items() if isinstance(v, Tensor))


def _group_numbers(groups: Iterable[Mapping[str, Any]], parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the group of every parameter that an optimizer holds."""
    numbers = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
    return {name: numbers[id(p)] for name, p in parameters.items() if id(p) in numbers}


def _differs(option: str, settings: Sequence[SGDSettings]) -> bool:
    return len({getattr(group, option) for group in settings}) > 1


def _maximizes(groups: Iterable[Mapping[str, Any]]) -> bool:
    return any(group.get("maximize") for group in groups)


def _base_rate(group: Mapping[str, object]) -> float:
    return max(float(group.get(name) or 0) for name in ("lr", "initial_lr", "max_lr"))  # type: ignore[arg-type]
