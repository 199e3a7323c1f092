"""Hooks right before and right after the step of an optimizer."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

Called = Callable[[Optimizer], None]


class StepHooks:
    """Calls functions right before and right after an optimizer changes weights.

    The first comes after all other hooks on the step, the second before all others.

    Lightning hands its backward pass to the optimizer as a closure, so that hooks on a step come before the gradients are there.
    The closure is wrapped here.

    Args:
        before: Called with the optimizer when its gradients are final.
        after: Called with the optimizer when its weights are new.
    """

    def __init__(self, before: Called, after: Called) -> None:
        self._before, self._after = before, after
        self._handles: tuple[RemovableHandle, ...] = ()

    def attach(self, optimizer: Optimizer) -> None:
        """Attaches to an optimizer behind all its present hooks, and detaches from any other."""
        self.detach()
        before = optimizer.register_step_pre_hook(self._about_to_step)
        after = optimizer.register_step_post_hook(self._stepped)
        hooks: Any = after.hooks_dict_ref()
        hooks.move_to_end(after.id, last=False)
        self._handles = before, after

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    def _about_to_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> "tuple[Any, Any] | None":
        positional = len(args) > 1
        closure = args[1] if positional else kwargs.get("closure")
        if closure is None:
            self._before(optimizer)
            return None

        def wrapped(*arguments: Any, **options: Any) -> Any:
            result = closure(*arguments, **options)
            self._before(optimizer)
            return result

        return ((args[0], wrapped, *args[2:]), kwargs) if positional else (args, {**kwargs, "closure": wrapped})

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._after(optimizer)
