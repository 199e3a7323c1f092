"""The arguments of a monitor, checked before anything runs."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, get_args

from torch.utils.data import DataLoader, Dataset

from lightning_ntk.comparison.regression import Kernel
from lightning_ntk.solvers.selection import Solver
from lightning_ntk.utilities.validation import (
    require_callable,
    require_choice,
    require_device,
    require_integer,
    require_steps,
)

if TYPE_CHECKING:
    from lightning_ntk.callback.monitor import LinearizationMonitor

FollowedJacobian = Literal["auto", "streamed", "stored"]
FollowedDynamics = Literal["auto", "gradient_descent", "gradient_flow", "replay", "twin"]


def require_valid(monitor: "LinearizationMonitor") -> None:
    """Raises an error unless every argument has a valid value.

    The error is a ValueError, or a ModuleNotFoundError for a missing package.
    """
    for name, data, also in (("reference", monitor.reference, '"train" '), ("evaluation", monitor.evaluation, "")):
        indexed = hasattr(data, "__getitem__") and not isinstance(data, str | bytes | dict | type)
        named = name == "reference" and isinstance(data, str) and data == "train"
        if not (data is None or named or indexed or isinstance(data, Dataset | DataLoader)):
            raise ValueError(
                f"Expected argument `{name}` to be a data set, a DataLoader, {also}or None but got {data!r:.100}."
            )
    require_steps(monitor.steps)
    for name in ("loss", "predict", "unpack"):
        require_callable(name, getattr(monitor, name))
    if not all(isinstance(name, str) for name in monitor.network):
        raise ValueError(f"Expected argument `network` to be names of submodules but got {monitor.network!r:.100}.")
    if not isinstance(monitor.name, str) or not monitor.name:
        raise ValueError(f"Expected argument `name` to be a prefix of tags but got {monitor.name!r}.")
    flags = "per_parameter", "taylor", "closest", "regime", "figures", "prog_bar", "save_state", "strict", "progress"
    for name in flags:
        require_choice(name, getattr(monitor, name), Literal[True, False])
    require_choice("solver", monitor.solver, Solver)
    require_choice("jacobian", monitor.jacobian, FollowedJacobian)
    require_integer("batch_size", monitor.batch_size, least=1)
    require_choice("dynamics", monitor.dynamics, FollowedDynamics)
    require_choice("mismatch", monitor.mismatch, Literal["refuse", "log"])
    require_choice("dtype", monitor.dtype, Literal["float32", "float64", None])
    require_device("device", monitor.device)
    require_integer("capture_at", monitor.capture_at, least=0)
    if monitor.reference_samples is not None:
        require_integer("reference_samples", monitor.reference_samples, least=1)
    if monitor.network and monitor.is_given_loss:
        raise ValueError(
            "Expected either argument `network`, which cuts the training step, or `loss`, `predict` and `unpack`, which "
            "stand in its place, but got both."
        )
    require_integer("modes", monitor.modes, least=0)
    require_integer("kernel_probe", monitor.kernel_probe, least=0)
    listed = isinstance(monitor.kernels, list | tuple)
    if not listed or not all(kernel in get_args(Kernel) for kernel in monitor.kernels):
        raise ValueError(
            f'Expected argument `kernels` to be a list of "before" and "after" but got {monitor.kernels!r:.100}.'
        )
    if monitor.dynamics in ("replay", "twin") and (monitor.closest or monitor.modes):
        raise ValueError(
            f'Expected `closest=False` and `modes=0` with dynamics="{monitor.dynamics}" but got {monitor.closest} and '
            f'{monitor.modes}, which need the modes of the kernel, so dynamics="gradient_descent" or "gradient_flow".'
        )
    if monitor.figures and find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "Argument `figures` needs matplotlib, which is not installed: pip install 'lightning-ntk[plot]'."
        )
    if monitor.reference is None and monitor.kernel_probe:
        raise ValueError(
            "Expected argument `kernel_probe` to be 0 with reference=None but got "
            f"{monitor.kernel_probe}: it takes samples of the reference."
        )
    if monitor.reference is None and monitor.kernels:
        raise ValueError(
            f"Expected argument `kernels` to be empty with reference=None but got {monitor.kernels}: kernel regression "
            "takes samples of the reference."
        )
    if monitor.reference is None and monitor.regime:
        raise ValueError(
            "Expected regime=False with reference=None but got True: the panel of regimes takes samples of the reference."
        )
    if monitor.reference is None and monitor.dynamics not in ("auto", "twin"):
        raise ValueError(
            f'Expected a reference set for dynamics="{monitor.dynamics}" but got None: only "twin" goes without.'
        )
