"""The loss of a linearized network whose Jacobian is stored.

A batch takes two products with its rows, and no pass.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ntk.data.sample_index import UnknownSamplesError
from lightning_ntk.linearization.batch_loss import BatchLoss, PairLoss, loss_gradient
from lightning_ntk.linearization.jacobian import StoredJacobian
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.training.problem import LinearizedProblem
from lightning_ntk.utilities.representation import represent
from lightning_ntk.utilities.shapes import Int
from lightning_ntk.utilities.validation import require_matching


class StoredLoss:
    r"""A `BatchLoss` for the twin, from stored rows of the Jacobian.

    For the rows r of a batch,

    .. math:: f_\text{lin} = f_0[r] + J[r]\, \delta, \qquad
        \text{gradient} = J[r]^\top\, \partial L / \partial f\,(f_\text{lin}).

    The samples of a batch are found by their content, whatever padding they have. A batch with a sample that is not in the
    training set takes a pass through the network instead.

    Args:
        problem: The network on its training set, with `jacobian="stored"`.
        pairs: The loss of outputs and targets.
        streamed: The same loss through passes of the network, for batches that are not found. Default: `pairs`.

    Attributes:
        unknown: What was unknown in the first batch with unknown samples; empty if all were found.

    Raises:
        ValueError: If the Jacobian of the problem is not stored.

    Example:
        >>> from lightning_ntk.training import Twin
        >>> network, inputs, targets = nn.Linear(2, 1), torch.eye(2), torch.ones(2, 1)
        >>> problem = LinearizedProblem(network, (inputs, targets), jacobian="stored")
        >>> stored = StoredLoss(problem, PairLoss(problem.linearization, nn.MSELoss()))
        >>> twin = Twin(stored, torch.optim.AdamW(network.parameters()), dict(network.named_parameters()))
        >>> twin.accumulate((inputs[[1]], targets[[1]]))  # the second sample is found by its content
    """

    def __init__(self, problem: LinearizedProblem, pairs: PairLoss, streamed: BatchLoss | None = None) -> None:
        if not isinstance(problem.jacobian, StoredJacobian):
            raise ValueError('Expected a problem with jacobian="stored" but its Jacobian is streamed.')
        self.streamed: BatchLoss = pairs if streamed is None else streamed
        self.unknown = ""
        self._problem, self._pairs, self._jacobian = problem, pairs, problem.jacobian
        self._start = problem.predictions.double()

    @property
    def module(self) -> nn.Module:
        """The network."""
        return self.streamed.module

    @property
    def params(self) -> Tensors:
        """w0, the trainable parameters by name."""
        return self.streamed.params

    def rows(self, batch: Any) -> Int[Tensor, "B"]:
        """The rows of a batch's samples in the training set, `(B,)`.

        Raises:
            UnknownSamplesError: If the batch has samples that are not in the training set.
        """
        return self._problem.rows(batch)

    def gradient(self, batch: Any, tangent: Mapping[str, Tensor] | None = None) -> Tensors | None:
        """The gradient for the linearized network at w0 + tangent, `(*shape)` by parameter name.

        Raises:
            ValueError: If the loss refuses the outputs of the linearized network.
        """
        try:
            rows = self.rows(batch)
        except UnknownSamplesError as error:
            self.unknown = self.unknown or str(error)
            return self.streamed.gradient(batch, tangent)
        target = self._problem.reference.unpack(batch)[1]
        assert target is not None  # as in the training set
        objective, jacobian = self._problem.objective, self._jacobian.at(rows)
        with torch.inference_mode(False), torch.no_grad():
            outputs = self._start[rows.to(self._start.device)]
            if tangent is not None:
                outputs = outputs + jacobian.jvp(require_matching(tangent, self.params))
            cotangent = loss_gradient(objective, outputs.to(objective.dtype), target)
            return {name: value[0] for name, value in jacobian.vjp(cotangent.unsqueeze(0)).items()}

    def gradient_at(self, batch: Any, weights: Mapping[str, Tensor]) -> Tensors:
        """Computes the network's own gradient, at weights by name.

        It takes a pass with the loss of outputs and targets.
        """
        return self._pairs.gradient_at(batch, weights)

    def state_dict(self) -> dict[str, Tensors]:
        """The tensors of the network, under "params", "frozen" and "buffers"."""
        return self.streamed.state_dict()

    def __repr__(self) -> str:
        return represent(self, f"{self._problem}")
