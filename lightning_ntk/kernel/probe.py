"""The empirical kernel of a few samples, followed while a network trains."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ntk.data.reference import Reference, evenly_spaced_rows
from lightning_ntk.functional.kernels import kernel_change, kernel_distance
from lightning_ntk.kernel.ntk import compute_kernel
from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.utilities.representation import represent
from lightning_ntk.utilities.shapes import Float64
from lightning_ntk.utilities.validation import require_integer


class KernelProbe:
    r"""Measures how far the kernel of a few samples moves during training.

    The kernel is the empirical :math:`\Theta_t`, compared with :math:`\Theta_0`.

    The samples are evenly spaced in the reference, so that every process and every run has the same ones. Only the
    weights move: kernels are evaluated with the buffers of `linearization`. A kernel of n samples with K outputs has
    :math:`(n K)^2` numbers, and two of them are kept.

    Args:
        linearization: The network at its initial weights.
        reference: The data set from which the samples are taken.
        samples: Number of samples; all of them if there are fewer.
        step: The optimizer step of the initial weights.

    Raises:
        ValueError: If `samples` is not a positive integer.

    Example:
        >>> module = torch.nn.Linear(2, 1, bias=False)
        >>> probe = KernelProbe(Linearization(module), Reference(torch.eye(2)))
        >>> kernel = probe.kernel({"weight": torch.ones(1, 2)})
        >>> probe.compare(kernel, step=10)  # the kernel of a linear model never moves
        {'kernel_distance': 0.0, 'kernel_change': 0.0, 'kernel_velocity': 0.0}
        >>> probe.advance(kernel, step=10)  # the next velocity is measured from here
    """

    rows: list[int]
    """The samples' places in the reference."""
    initial: Float64[Tensor, "rows rows"]
    """:math:`\\Theta_0`, `(n K, n K)` in float64 on the CPU."""
    previous: Float64[Tensor, "rows rows"]
    """The kernel from which the next velocity is measured, at first the initial one."""
    step: float
    """The optimizer step of `previous`."""

    def __init__(
        self, linearization: Linearization, reference: Reference, *, samples: int = 16, step: float = 0
    ) -> None:
        require_integer("samples", samples, least=1)
        self.rows = evenly_spaced_rows(len(reference), samples)
        self._linearization = linearization
        self._reference = reference.subset(self.rows)
        self.initial = self.kernel(linearization.params)
        self.advance(self.initial, step)

    def kernel(self, weights: Mapping[str, Tensor]) -> Float64[Tensor, "rows rows"]:
        r"""Computes :math:`\Theta` of the samples at `weights`, `(n K, n K)`.

        It is in float64 on the CPU.

        Raises:
            ValueError: If the weights have other names or shapes than those of `linearization`, or are not finite.
        """
        for name, value in weights.items():
            if not value.isfinite().all():
                raise ValueError(f"Expected finite weights but `{name}` holds NaN or infinity: it has no kernel.")
        return compute_kernel(self._linearization.at(weights), self._reference, dtype=torch.float64).cpu()

    def compare(self, kernel: Float64[Tensor, "rows rows"], step: float | None = None) -> dict[str, float]:
        r"""Computes a kernel's distance from the initial one, and its velocity.

        The kernel is not stored.

        Args:
            kernel: :math:`\Theta_t`, as `kernel` returns it.
            step: Its optimizer step t.

        Returns:
            `kernel_distance` :math:`S(\Theta_0, \Theta_t)`, where
            :math:`S(A, B) = 1 - \langle A, B\rangle / (\|A\| \|B\|)`, and `kernel_change`
            :math:`\|\Theta_t - \Theta_0\| / \|\Theta_0\|`. With `step` also `kernel_velocity`
            :math:`S(\Theta_{t'}, \Theta_t) / (t - t')`, per optimizer step (Fort et al., 2020), where t' is the step to which
            the probe has advanced; it is left out where t = t'.

        Raises:
            ValueError: If `step` is before t'.
        """
        scalars = {
            "kernel_distance": kernel_distance(self.initial, kernel),
            "kernel_change": kernel_change(self.initial, kernel),
        }
        if step is None:
            return scalars
        if step < self.step:
            raise ValueError(f"Expected argument `step` to be at least {self.step:g}, the last one, but got {step}.")
        if step > self.step:
            scalars["kernel_velocity"] = kernel_distance(self.previous, kernel) / (step - self.step)
        return scalars

    def advance(self, kernel: Float64[Tensor, "rows rows"], step: float) -> None:
        """Makes this kernel the reference for the next velocity.

        It is the kernel at this optimizer step.
        """
        self.previous, self.step = kernel, float(step)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the initial kernel, the last one, and its step."""
        return {"rows": list(self.rows), "initial": self.initial, "previous": self.previous, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict()` of a probe of the same network and data.

        Raises:
            ValueError: If the samples or the initial kernel are others.
        """
        if state["rows"] != self.rows:
            raise ValueError(f"Expected the state of a probe of the samples {self.rows} but got {state['rows']}.")
        tolerance = 1e4 * torch.finfo(self._linearization.dtype).eps
        initial: Tensor = state["initial"]
        if initial.shape != self.initial.shape or kernel_change(self.initial, initial) > tolerance:
            raise ValueError(
                "Expected the state of a probe of this network and data but its initial kernel is another: "
                "initial weights, buffers or samples have changed."
            )
        self.initial = initial
        self.advance(state["previous"], state["step"])

    def __repr__(self) -> str:
        return represent(self, f"{len(self.rows)} samples", f"{self._linearization}")
