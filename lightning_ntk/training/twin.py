"""The linearized network trained in lockstep with the real one.

It trains in weight space, with any optimizer and without a kernel.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ntk.functional.weights import difference
from lightning_ntk.linearization.batch_loss import BatchLoss
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.training.base import StepSettings
from lightning_ntk.training.optimizer_copy import copy_optimizer, held_by, hyperparameters, require_supported_optimizer
from lightning_ntk.utilities.contexts import preserved_rng
from lightning_ntk.utilities.distributed import ALONE, Processes, mean_over
from lightning_ntk.utilities.representation import parameter_count, represent
from lightning_ntk.utilities.validation import require_matching


class Twin:
    r"""The linearized network, trained by a copy of the run's optimizer.

    The network is :math:`f_\text{lin}(w) = f(w_0) + J (w - w_0)`. It trains on the batches of the run.

    Every batch costs one Jacobian-vector product, :math:`f_\text{lin} = f_0 + J (w_\text{lin} - w_0)`, and one
    vector-Jacobian product, the gradient :math:`J^T \partial L / \partial f_\text{lin}`. The memory is that of a few copies
    of the weights and, during a batch, of the graph of one step. The optimizer is a deep copy, and its hyperparameters are
    those of the run in every step. Parameters that the optimizer does not hold stay at w0.

    Args:
        loss: The loss of the network, linearized at w0. The twin's weights have the type of w0.
        optimizer: The optimizer of the run, before its step, with the state that it has when the weights are w0.
        parameters: The live parameters that the optimizer steps, under the names of `loss.params`.
        start: Weights that the twin starts from, with the names and shapes of `loss.params`. Default: w0.
        processes: The processes whose gradients a step averages, as distributed training does. Each accumulates its own
            batches.

    Raises:
        TypeError: If `optimizer` is not a `torch.optim.Optimizer`.
        ValueError: If the optimizer cannot be copied (see `require_supported_optimizer`), steps trainable parameters that
            are not in `parameters`, or if gradients are sparse.
    """

    dynamics = "twin"

    def __init__(
        self,
        loss: BatchLoss,
        optimizer: Optimizer,
        parameters: Mapping[str, Tensor],
        *,
        start: Mapping[str, Tensor] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        require_supported_optimizer(optimizer)
        _require_dense_gradients(loss.module)
        parameters = require_matching(parameters, loss.params, "parameters")
        self._loss = loss
        self._processes = processes
        self._parameters = dict(parameters)  # keeps the live ones alive, and with them their ids
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        with torch.inference_mode(False), torch.no_grad():
            self._weights: dict[str, nn.Parameter] = {
                name: nn.Parameter(value.detach().to(loss.params[name], copy=True))
                for name, value in require_matching(start or loss.params, loss.params).items()
            }
            self._require_known(optimizer.param_groups)
            self._optimizer = copy_optimizer(optimizer, parameters, self._weights)
        self.steps = 0

    @property
    def weights(self) -> Tensors:
        """The weights of the linearized network, views without a gradient."""
        return {name: weight.detach() for name, weight in self._weights.items()}

    def displacement(self) -> Mapping[str, Tensor]:
        """w_lin - w0, by parameter name in float64, without a pass.

        It is computed when it is read.
        """
        return difference(self.weights, self._loss.params)

    def predictions(self) -> None:
        """None: the twin sees batches, not the training set."""

    @preserved_rng()
    def accumulate(self, batch: Any, *, scale: float = 1.0) -> None:
        """Adds the loss gradient of one batch to the gradient of the next step.

        It is taken at the weights of the linearized network.

        Args:
            batch: The batch, as the loss takes it.
            scale: Factor of the loss, 1/n when the gradients of n batches are accumulated before a step.

        Raises:
            ValueError: If a gradient is sparse, or if the loss refuses the outputs of the linearized network.
        """
        gradients = self._loss.gradient(batch, self._tangent()) or {}
        for name in list(gradients):
            gradient = gradients.pop(name)
            if gradient.layout != torch.strided:
                raise ValueError(
                    f"Expected dense gradients but that of `{name}` is sparse. Build its layer with `sparse=False`."
                )
            weight = self._weights[name]
            if weight.grad is None:
                weight.grad = gradient.to(weight) if scale == 1 else gradient.to(weight).mul_(scale)
            else:
                weight.grad.add_(gradient, alpha=scale)

    @preserved_rng()
    def step(self, settings: StepSettings) -> None:
        """Takes one optimizer step along the accumulated gradients, and clears them.

        Groups of known parameters that were added to the run's optimizer are added here too, and parameters that moved to
        another group move here. Parameters that had no gradient in the run, frozen and unused ones, are skipped. Clipping acts on
        all parameters that the optimizer holds, as `clip_grad_norm_` and `clip_grad_value_` do.

        Raises:
            OverflowError: If a gradient or a weight is not finite, because the training of the linearized network
                diverges. A gradient is found before the step, so that the weights are then those of the step before.
            ValueError: If the groups hold trainable parameters that are unknown here.
        """
        if self._processes.size > 1:
            own = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in self._weights.items()}
            for name, gradient in mean_over(self._processes, own).items():
                self._weights[name].grad = gradient
        self._follow(settings.groups)
        for name in settings.frozen:
            self._weights[name].grad = None
        for name in settings.at_zero:
            self._weights[name].grad = torch.zeros_like(self._weights[name])
        held = [weight for weight in held_by(self._optimizer) if weight.grad is not None]
        gradients = [weight.grad for weight in held if weight.grad is not None]
        self._require_finite(gradients, "gradients")
        if settings.gradient_factor != 1 and gradients:
            torch._foreach_mul_(gradients, settings.gradient_factor)
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(held, settings.clip_norm)
        if settings.clip_value is not None:
            torch.nn.utils.clip_grad_value_(held, settings.clip_value)
        self._optimizer.step()
        self._require_finite(held, "weights")
        self.discard()
        self.steps += 1

    def replace_optimizer(self, optimizer: Optimizer) -> None:
        """Continues with a copy of another optimizer and its state.

        Call it before that optimizer's first step.
        """
        require_supported_optimizer(optimizer)
        self._require_known(optimizer.param_groups)
        self._optimizer = copy_optimizer(optimizer, self._parameters, self._weights)

    def forget_state(self, names: Sequence[str]) -> None:
        """Removes what the optimizer remembers of some parameters."""
        for name in names:
            self._optimizer.state.pop(self._weights[name], None)

    def discard(self) -> None:
        """Clears the gradients accumulated since the last step."""
        for weight in self._weights.values():
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Weights, accumulated gradients and state of the optimizer, as tensors, numbers, dicts and lists."""
        return {
            "weights": {name: weight.detach().clone() for name, weight in self._weights.items()},
            "gradients": {name: w.grad.clone() for name, w in self._weights.items() if w.grad is not None},
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned, whose tensors may be on any device.

        Raises:
            ValueError: If it is of another network or optimizer.
        """
        with torch.no_grad():
            for name, value in require_matching(state["weights"], self._weights).items():
                weight, gradient = self._weights[name], state["gradients"].get(name)
                weight.copy_(value)
                weight.grad = None if gradient is None else gradient.to(weight, copy=True)
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # which would share its tensors
        self.steps = state["steps"]

    def _tangent(self) -> Mapping[str, Tensor] | None:
        tangent = difference(self.weights, self._loss.params, dtype=None)
        # Before the first step there is nothing to push forward. Other steps are not tested: it would read all weights.
        if self.steps == 0 and not any(bool(value.any()) for value in tangent.values()):
            return None
        return tangent

    def _follow(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Takes over hyperparameters, and which of the known parameters are in which group."""
        self._require_known(groups)
        held = [[self._weights[self._names[id(p)]] for p in g["params"] if id(p) in self._names] for g in groups]
        own = self._optimizer.param_groups
        del own[len(groups) :]
        for group, theirs, parameters in zip(own, groups, held, strict=False):
            group.update(hyperparameters(theirs) | {"params": parameters})
        for theirs, parameters in list(zip(groups, held, strict=True))[len(own) :]:
            self._optimizer.add_param_group(hyperparameters(theirs) | {"params": parameters})

    def _require_known(self, groups: Sequence[Mapping[str, Any]]) -> None:
        for number, group in enumerate(groups):
            count = sum(parameter.requires_grad and id(parameter) not in self._names for parameter in group["params"])
            if count:
                raise ValueError(
                    f"Expected the optimizer to step parameters that were trainable when the network was linearized, but its "
                    f"parameter group {number} holds {count} trainable tensors that were not. Leave requires_grad=True on "
                    "parameters that are unfrozen during the run, or linearize after they are."
                )

    def _require_finite(self, tensors: Sequence[Tensor], what: str) -> None:
        # The Euclidean norm overflows a little earlier than the entries do, and takes a tenth of the time of the largest one.
        if tensors and not torch.nn.utils.get_total_norm([tensor.detach() for tensor in tensors]).isfinite():
            raise OverflowError(
                f"Expected finite {what} of the linearized network but got NaN or infinity in its step {self.steps + 1}: its "
                "training diverges, as it does above the largest stable learning rate. Lower the learning rate."
            )

    def __repr__(self) -> str:
        return represent(self, type(self._optimizer).__name__, parameter_count(self._weights), f"{self.steps} steps")


def _require_dense_gradients(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse:
            raise ValueError(f"Expected dense gradients but `{name}` was built with `sparse=True`. Use `sparse=False`.")
