"""The empirical kernel of a few samples, followed while a network trains."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ntk.data.reference import Reference
from lightning_ntk.functional.kernels import kernel_change, kernel_distance
from lightning_ntk.kernel import compute_kernel
from lightning_ntk.linearization.linearization import Linearization


class KernelProbe:
    r"""How the empirical kernel :math:`\Theta_t` of a few samples moves away from :math:`\Theta_0` during training.

    The samples are evenly spaced in the reference, so that they are the same in every process and every run. Kernels are
    evaluated with the buffers of the capture: only the weights move. One kernel of n samples takes n K backward passes
    of a sample at most, and the two that are kept have :math:`(n K)^2` numbers each.

    Args:
        linearization: The network at its initial weights.
        reference: The data set of which some samples are taken.
        samples: How many; all of them if there are fewer.
        step: The optimizer step of the initial weights.

    Raises:
        ValueError: If `samples` is not a positive integer.

    Example:
        >>> module = torch.nn.Linear(2, 1, bias=False)
        >>> probe = KernelProbe(Linearization(module), Reference(torch.eye(2)))
        >>> probe.compare({"weight": torch.ones(1, 2)}, step=10)  # the kernel of a linear model never moves
        {'kernel_distance': 0.0, 'kernel_change': 0.0, 'kernel_velocity': 0.0}
    """

    rows: list[int]
    """The samples' places in the reference."""
    initial: Tensor
    """:math:`\\Theta_0`, `(n K, n K)` in float64 on the CPU."""

    def __init__(
        self, linearization: Linearization, reference: Reference, *, samples: int = 16, step: float = 0
    ) -> None:
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            raise ValueError(f"Expected argument `samples` to be a positive integer but got {samples!r}.")
        samples = min(samples, len(reference))
        self.rows = [index * len(reference) // samples for index in range(samples)]
        self._linearization = linearization
        self._reference = reference.subset(self.rows)
        self.initial = self.kernel(linearization.params)
        self._previous, self._step = self.initial, float(step)

    def kernel(self, weights: Mapping[str, Tensor]) -> Tensor:
        r""":math:`\Theta` of the samples at `weights`, `(n K, n K)` in float64 on the CPU.

        Raises:
            ValueError: If names or shapes of the weights are not those of the capture, or if they are not finite.
        """
        for name, value in weights.items():
            if not value.isfinite().all():
                raise ValueError(f"Expected finite weights but `{name}` holds NaN or infinity: it has no kernel.")
        return compute_kernel(self._linearization.at(weights), self._reference, dtype=torch.float64).cpu()

    def compare(self, weights: Mapping[str, Tensor], step: float | None = None) -> dict[str, float]:
        r"""How far the kernel at `weights` is from the initial one, and how fast it moves.

        Args:
            weights: The trained weights, by parameter name.
            step: The optimizer step of the weights; those of successive calls must not decrease.

        Returns:
            `kernel_distance` :math:`S(\Theta_0, \Theta_t)` with
            :math:`S(A, B) = 1 - \langle A, B\rangle / (\|A\| \|B\|)`, and `kernel_change`
            :math:`\|\Theta_t - \Theta_0\| / \|\Theta_0\|`. With `step` also `kernel_velocity`
            :math:`S(\Theta_{t'}, \Theta_t) / (t - t')`, per optimizer step (Fort et al., 2020), where t' is the previous call's
            step, at first that of the initial weights; it is left out where t = t'.

        Raises:
            ValueError: If the weights cannot be used, or if `step` is before that of the previous call.
        """
        if step is not None and step < self._step:
            raise ValueError(f"Expected argument `step` to be at least {self._step:g}, the last one, but got {step}.")
        kernel = self.kernel(weights)
        scalars = {
            "kernel_distance": kernel_distance(self.initial, kernel),
            "kernel_change": kernel_change(self.initial, kernel),
        }
        if step is not None:
            if step > self._step:
                scalars["kernel_velocity"] = kernel_distance(self._previous, kernel) / (step - self._step)
            self._previous, self._step = kernel, float(step)
        return scalars

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the initial kernel, the last one, and its step."""
        return {"rows": list(self.rows), "initial": self.initial, "previous": self._previous, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()` of a probe of the same network and data.

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
        self.initial, self._previous, self._step = initial, state["previous"], float(state["step"])
