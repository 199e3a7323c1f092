"""Chooses the dynamics with which to compare a run."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from lightning_ntk.utilities.memory import format_bytes

TWIN = "Linearized twin, trained beside the network on the same batches"
# Share of the free memory that the kernel of a replay may take.
_KERNEL_SHARE = 0.5


class DynamicsChoice(NamedTuple):
    """The first dynamics that are exact for a run and affordable.

    Attributes:
        dynamics: Their name.
        reason: Why these, in a sentence.
    """

    dynamics: Literal["gradient_descent", "replay", "twin"]
    reason: str


def choose_dynamics(
    differences: Callable[[str], Sequence[str]],
    *,
    no_kernel: str | None,
    not_squared: bool,
    kernel_bytes: float,
    free: float,
) -> DynamicsChoice:
    """Takes gradient descent, replay or the twin, in this order.

    Args:
        differences: Maps the name of dynamics to phrases on what the run does and they do not describe.
        no_kernel: Why the run has no training set in a fixed order, as a phrase; None if it has one.
        not_squared: Whether the loss is not a squared one.
        kernel_bytes: Size of the kernel that a replay needs.
        free: Free memory in bytes.
    """
    if no_kernel is not None:
        return DynamicsChoice("twin", f"{TWIN}, because {no_kernel.rstrip('.')}.")
    descent = ["its loss is not a squared one"] if not_squared else []
    descent += differences("gradient_descent")
    if not descent:
        return DynamicsChoice(
            "gradient_descent", "Gradient descent on the modes of the kernel: the run is full-batch SGD."
        )
    replay = list(differences("replay"))
    if kernel_bytes > _KERNEL_SHARE * free:
        replay.append(f"a kernel of {format_bytes(kernel_bytes)} is too much for {format_bytes(free)} of free memory")
    head = f"it is not full-batch gradient descent on a squared loss ({'; '.join(descent)})"
    if not replay:
        return DynamicsChoice("replay", f"Replay of the run's minibatches on the kernel, because {head}.")
    return DynamicsChoice("twin", f"{TWIN}, because no kernel dynamics describe the run: {'; '.join(replay)}.")
