r"""Learning rates that differ between parameters: multiples of one rate, as coordinates in which they are equal.

With rates :math:`\eta D` the weights are :math:`w = w_0 + D^{1/2} u`, where u is trained with the one rate :math:`\eta`. Its
Jacobian is :math:`J D^{1/2}`, its kernel :math:`\Theta_D = J D J^\top = \sum_g d_g J_g J_g^\top`.
"""

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_ntk.kernel import compute_kernel
from lightning_ntk.linearization.jacobian import Jacobian, StoredJacobian
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.training.problem import Capture, training_kernel


class ScaledJacobian:
    """J D^(1/2), however J is held.

    Args:
        jacobian: J.
        roots: The square root of the learning-rate multiple of every parameter.
    """

    def __init__(self, jacobian: Jacobian, roots: Mapping[str, float]) -> None:
        self._jacobian = jacobian
        self._roots = roots

    def jvp(self, tangent: Mapping[str, Tensor]) -> Tensor:
        """J D^(1/2) v, `(N, K)` in float64."""
        return self._jacobian.jvp({name: self._roots[name] * value for name, value in tangent.items()})

    def vjp(self, cotangents: Tensor) -> Tensors:
        """D^(1/2) J^T u for cotangents `(T, N, K)`."""
        return {name: self._roots[name] * value for name, value in self._jacobian.vjp(cotangents).items()}


class Scaling:
    """Coordinates in which all parameters have the same learning rate.

    Args:
        capture: The network at w0.
        multiples: By parameter, the multiple of the learning rate; 0 freezes it, and parameters without one have 1.

    Attributes:
        capture: The same network in the scaled coordinates.
        roots: By parameter, the square root of its multiple.

    Raises:
        ValueError: If a name is not of a trainable parameter, or a multiple is negative or not finite, or all are 0.
    """

    def __init__(self, capture: Capture, multiples: Mapping[str, float]) -> None:
        names = capture.initial_weights
        unknown = sorted(multiples.keys() - names.keys())
        if unknown:
            raise ValueError(
                f"Expected argument `lr_scales` to name trainable parameters, of {sorted(names)}, but got {unknown}."
            )
        for name, value in multiples.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"Expected argument `lr_scales` to be finite and at least 0 but got {value} for {name!r}."
                )
        self.multiples = {name: float(multiples.get(name, 1.0)) for name in names}
        if not any(self.multiples.values()):
            raise ValueError("Expected argument `lr_scales` to leave a parameter to train but all multiples are 0.")
        self.roots = {name: math.sqrt(value) for name, value in self.multiples.items()}
        self._original = capture
        self.capture = copy.copy(capture)
        self.capture.jacobian = (
            StoredJacobian({name: self.roots[name] * block for name, block in capture.jacobian.blocks.items()})
            if isinstance(capture.jacobian, StoredJacobian)
            else ScaledJacobian(capture.jacobian, self.roots)
        )

    @property
    def freezes_only(self) -> bool:
        """Whether all learning rates are equal but for frozen parameters."""
        return set(self.multiples.values()) <= {0.0, 1.0}

    def require_commuting(self, weight_decay: float) -> None:
        """Raises a ValueError where weight decay and unequal learning rates meet."""
        if weight_decay != 0 and not self.freezes_only:
            raise ValueError(
                f"Expected no weight decay with learning rates that differ between parameters but got {weight_decay}: weights "
                'that shrink at different rates leave the modes of the kernel. Use dynamics="twin", which trains the '
                "linearized network itself."
            )

    def kernel(self, given: Tensor | None, *, dtype: torch.dtype) -> Tensor:
        """J D J^T of the training set, `(N K, N K)`, `given` or the sum over the groups of equal rates, and verified."""
        scaled = self.capture
        if given is not None or isinstance(scaled.jacobian, StoredJacobian):
            return training_kernel(given, scaled, dtype=dtype)
        capture = self._original
        total: Tensor | None = None
        for multiple in sorted(set(self.multiples.values()) - {0.0}):
            group = capture.linearization.restricted([n for n, value in self.multiples.items() if value == multiple])
            part = multiple * compute_kernel(
                group,
                capture.reference,
                dtype=dtype,
                device=capture.device,
                progress=capture.progress,
                processes=capture.processes,
            )
            total = part if total is None else total.add_(part)
        assert total is not None
        return training_kernel(total, scaled, dtype=dtype)

    def of_gradients(self, gradients: Mapping[str, Tensor]) -> Tensors:
        """D^(1/2) g, a gradient with respect to u from one with respect to w."""
        return self.to_weights(gradients)

    def to_weights(self, coordinates: Mapping[str, Tensor]) -> Tensors:
        """D^(1/2) u, the displacement of the weights."""
        return {name: self.roots[name] * value for name, value in coordinates.items()}
