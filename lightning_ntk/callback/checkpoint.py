"""What a checkpoint stores about a monitor, and whether a run may resume."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

if TYPE_CHECKING:
    from lightning_ntk.callback.monitor import LinearizationMonitor


NO_STATE: dict[str, Any] = {
    "started": True, "step": None, "history": [], "start": 0, "reported": {}, "lost": False, "exact": True, "options": {},
    "capture": None,
}  # fmt: skip
"""What a checkpoint holds that was written without a monitor."""


def options_of(monitor: "LinearizationMonitor") -> dict[str, str]:
    """The arguments that define the comparison, as strings.

    A resumed run must have the same.
    """
    named = {name: _describe(getattr(monitor, name)) for name in ("loss", "predict", "unpack")}
    plain = {name: repr(getattr(monitor, name)) for name in ("network", "dtype", "capture_at")}
    return named | plain


def arguments_of(monitor: "LinearizationMonitor") -> str:
    """The arguments that decide what processes exchange, and when.

    All processes must have the same.
    """
    names = (
        "steps", "dynamics", "capture_at", "mismatch", "solver", "jacobian", "batch_size", "dtype", "per_parameter", "taylor",
        "closest", "modes", "kernel_probe", "kernels", "regime", "reference_samples", "network", "strict", "is_given_loss",
    )  # fmt: skip
    own = {name: getattr(monitor, name) for name in names}
    return repr(own | {"evaluation": monitor.evaluation is not None, "reference": monitor.reference is not None})


def require_resumable(monitor: "LinearizationMonitor", state: Mapping[str, Any], global_step: int) -> None:
    """Refuses a saved state that does not fit its checkpoint or the monitor."""
    missing = sorted(NO_STATE.keys() - state.keys())
    if missing:
        raise incomplete(monitor, ", ".join(map(repr, missing)))
    waits = global_step - state["start"] <= monitor.capture_at
    if not waits and not (state["capture"] or state["lost"]):
        raise MisconfigurationException(
            f"LinearizationMonitor {monitor.name!r} expects a checkpoint of a run that it has watched, with save_state=True, "
            "but this one does not hold the weights at which to linearize. Remove the callback, or start a new run."
        )
    if not state["capture"]:
        return
    if state["step"] != global_step:
        raise MisconfigurationException(
            f"LinearizationMonitor {monitor.name!r} expects a checkpoint in which run and linearized network have taken the same "
            f"steps but the run is at step {global_step} and the linearized network at "
            f"{'an unknown one' if state['step'] is None else state['step']}: it was saved in the middle of an optimizer step. "
            "Resume from another checkpoint, or start a new run."
        )
    own = options_of(monitor)
    for name in sorted(own.keys() | state["options"].keys()):
        _require_same(monitor, name, own.get(name), state["options"].get(name))
    used = state["capture"].get("comparison", {}).get("dynamics")
    if monitor.dynamics != "auto" and used is not None:
        _require_same(monitor, "dynamics", repr(monitor.dynamics), repr(used))


def incomplete(monitor: "LinearizationMonitor", what: str) -> MisconfigurationException:
    """The error of a checkpoint without something that is needed."""
    return MisconfigurationException(
        f"LinearizationMonitor {monitor.name!r} expects a checkpoint with all that it goes on from but this one lacks {what}: "
        "another version of lightning_ntk has written it, or it is incomplete. Resume with that version, or start a new run."
    )


def _require_same(monitor: "LinearizationMonitor", name: str, own: str | None, saved: str | None) -> None:
    if own != saved:
        raise MisconfigurationException(
            f"LinearizationMonitor {monitor.name!r} expects argument `{name}` as the run began with it, {saved}, but got {own}: "
            "distances before and after would be of two different networks. Give the same, or start a new run."
        )


def _describe(value: Any) -> str:
    """Describes a function or a loss, in the same words in every process."""
    if value is None or isinstance(value, nn.Module):
        return repr(value)
    if isinstance(value, partial):
        arguments = [*map(_describe, value.args), *(f"{k}={_describe(v)}" for k, v in value.keywords.items())]
        return f"{_describe(value.func)}({', '.join(arguments)})"
    code = getattr(value, "__code__", None)
    if code is not None:
        constants = [constant for constant in code.co_consts if isinstance(constant, str | int | float | None)]
        return f"{value.__qualname__} of {[*code.co_names, *constants[1:]]}"
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    return repr(value)
