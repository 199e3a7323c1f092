"""The linearized network trained in lockstep with the real one, in weight space: any optimizer, no kernel."""

import copy
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam

from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.objective import Objective
from lightning_ntk.linearization.parameters import Tensors


class Twin:
    r"""The network :math:`f_\text{lin}(w) = f(w_0) + J (w - w_0)`, trained on the same batches by a copy of the optimizer.

    Every batch costs one Jacobian-vector product, :math:`f_\text{lin} = f_0 + J (w_\text{lin} - w_0)`, and one
    vector-Jacobian product, the gradient :math:`J^T \partial L / \partial f_\text{lin}`; the memory is that of a few copies
    of the weights. The optimizer is a deep copy, of the same class with the same state, and its hyperparameters are those of
    the run in every step. Parameters that the optimizer does not hold stay at w0. Hooks registered on the optimizer are not
    copied.

    Args:
        linearization: The network at w0. The twin's weights have its type.
        optimizer: The optimizer of the run, before its step, with the state that it has when the weights are w0.
        parameters: The live parameters that the optimizer steps, under the names of `linearization.params`.
        objective: The loss of a batch in its outputs. It may be set later, before the first batch.
        start: Weights that the twin starts from, with the names and shapes of `linearization.params`. Default: w0.

    Raises:
        TypeError: If `optimizer` is not a `torch.optim.Optimizer`.
        ValueError: If the optimizer cannot be copied to the twin (see `require_supported_optimizer`), steps trainable
            parameters that are not in `parameters`, or if gradients are sparse.
    """

    def __init__(
        self,
        linearization: Linearization,
        optimizer: Optimizer,
        parameters: Mapping[str, Tensor],
        objective: Objective | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        require_supported_optimizer(optimizer)
        _require_dense_gradients(linearization.module)
        _require_names(parameters, linearization.params, "parameters")
        _require_names(start or linearization.params, linearization.params, "start")
        self._linearization = linearization
        self.objective = objective
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._live = {id(parameter): parameter for parameter in parameters.values()}  # keeps their ids theirs
        with torch.inference_mode(False), torch.no_grad():
            self._weights: dict[str, nn.Parameter] = {
                name: nn.Parameter(value.detach().to(linearization.params[name], copy=True))
                for name, value in (start or linearization.params).items()
            }
            self._require_known(optimizer.param_groups)
            self._optimizer = self._copy(optimizer)
        self.steps = 0

    @property
    def weights(self) -> Tensors:
        """The weights of the linearized network, views without a gradient."""
        return {name: weight.detach() for name, weight in self._weights.items()}

    @property
    def displacement(self) -> Tensors:
        """How far the weights of the linearized network are from w0, in float64."""
        start = self._linearization.params
        return {name: weight.detach().double() - start[name].double() for name, weight in self._weights.items()}

    @property
    def gradients(self) -> Tensors:
        """Clones of the gradients accumulated since the last step, zero where there are none."""
        return {
            name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
            for name, weight in self._weights.items()
        }

    @gradients.setter
    def gradients(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.grad = values[name].clone()

    def accumulate(self, inputs: Any, target: Tensor, *, scale: float = 1.0) -> None:
        """Adds the gradient of the loss on one batch, at the weights of the linearized network, to its gradients.

        Args:
            inputs: What the network predicts from.
            target: Targets of the batch, as the data gives them.
            scale: Factor of the loss, 1/n when the gradients of n batches are accumulated before a step.

        Raises:
            ValueError: If a gradient is sparse, or if the loss refuses the predictions of the linearized network.
        """

        def cotangent(outputs: Tensor, derivative: Tensor) -> Tensor:
            predictions = outputs.double() + derivative.double()
            if not predictions.isfinite().all():
                return torch.full_like(predictions, float("nan"))  # found by the step
            return scale * self._loss_gradient(predictions, target)

        gradients = self._linearization.predict_jvp_and_vjp(self._tangent(), inputs, cotangent)
        for name, gradient in gradients.items():
            if gradient.layout != torch.strided:
                raise ValueError(
                    f"Expected dense gradients but that of `{name}` is sparse. Build its layer with `sparse=False`."
                )
            weight = self._weights[name]
            if weight.grad is None:
                # A copy, because autograd may return one tensor for several parameters, or an expanded one.
                weight.grad = torch.empty_like(weight).copy_(gradient)
            else:
                weight.grad.add_(gradient)

    def step(
        self,
        groups: Sequence[Mapping[str, Any]],
        *,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        frozen: Collection[str] = (),
    ) -> None:
        """One step of the twin's optimizer along the accumulated gradients, which are then cleared.

        Args:
            groups: The parameter groups of the run's optimizer with the hyperparameters of this step; groups of known
                parameters that were added during the run are added here too.
            clip_norm: Largest norm of the gradients of all parameters that the optimizer holds, as `clip_grad_norm_`.
            clip_value: Largest absolute value of a gradient's entries, as `clip_grad_value_`.
            frozen: Parameters without a gradient in the run, as frozen and unused ones: the optimizer skips them.

        Raises:
            OverflowError: If a gradient or a weight is not finite, because the training of the linearized network
                diverges. A gradient is found before the step, so that the weights are then those of the step before.
            ValueError: If the groups hold trainable parameters that are not in `parameters`.
        """
        self._follow(groups)
        for name in frozen:
            self._weights[name].grad = None
        held = [weight for weight in _held_by(self._optimizer) if weight.grad is not None]
        self._require_finite([weight.grad for weight in held if weight.grad is not None], "gradients")
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(held, clip_norm)
        if clip_value is not None:
            torch.nn.utils.clip_grad_value_(held, clip_value)
        self._optimizer.step()
        self._require_finite(held, "weights")
        self.forget()
        self.steps += 1

    def forget(self) -> None:
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
        """Continues from what `state_dict` returned, on any device.

        Raises:
            ValueError: If it is of another network or optimizer.
        """
        _require_names(state["weights"], self._weights, "state")
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(state["weights"][name])
                gradient = state["gradients"].get(name)
                weight.grad = None if gradient is None else gradient.to(weight, copy=True)
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # which would share its tensors
        self.steps = state["steps"]

    def _loss_gradient(self, predictions: Tensor, target: Tensor) -> Tensor:
        assert self.objective is not None
        prepared = self.objective.prepare(target, predictions)
        try:
            return self.objective.gradient(predictions, prepared)
        except RuntimeError as error:
            raise ValueError(
                "Expected a loss that takes any outputs, because those of the linearized network leave the range of "
                f"a sigmoid or softmax, but it failed on outputs from {predictions.min():.3g} to {predictions.max():.3g}: "
                f"{error}. Use a loss of logits, such as nn.BCEWithLogitsLoss(), with a `predict` that returns them."
            ) from error

    def _tangent(self) -> Tensors | None:
        names = list(self._weights)
        start = [self._linearization.params[name] for name in names]
        with torch.no_grad():
            difference = torch._foreach_sub(list(self._weights.values()), start)
        # Before the first step there is nothing to push forward. Other steps are not tested: it would read all weights.
        if self.steps == 0 and not any(bool(value.any()) for value in difference):
            return None
        return dict(zip(names, difference, strict=True))

    def _copy(self, optimizer: Optimizer) -> Optimizer:
        # Frozen parameters that the optimizer holds get no copy, and leave the groups of the twin.
        stand_in = torch.empty(0)
        memo: dict[int, Any] = {id(p): stand_in for p in _held_by(optimizer)}
        memo |= {key: self._weights[name] for key, name in self._names.items()}
        twin = copy.deepcopy(optimizer, memo)
        # Optimizer.__getstate__ leaves out whatever else an instance has; a scheduler's wrapper of `step` stays behind.
        for name, value in vars(optimizer).items():
            if name not in vars(twin) and name not in ("step", "_opt_called"):
                setattr(twin, name, copy.deepcopy(value, memo))
        for group in twin.param_groups:
            group["params"] = [p for p in group["params"] if p is not stand_in]
        twin.state.pop(stand_in, None)
        for key, name in self._names.items():
            weight = self._weights[name]
            for entry, value in twin.state.get(weight, {}).items():
                # The state has the type of the run's parameters, except for a count of steps.
                if isinstance(value, Tensor) and entry != "step" and value.dtype == self._live[key].dtype:
                    twin.state[weight][entry] = value.to(weight)
        return twin

    def _follow(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Takes over hyperparameters and groups of known parameters that were added."""
        self._require_known(groups)
        for group in groups[len(self._optimizer.param_groups) :]:
            self._optimizer.add_param_group(
                _hyperparameters(group)
                | {"params": [self._weights[self._names[id(p)]] for p in group["params"] if id(p) in self._names]}
            )
        for own, group in zip(self._optimizer.param_groups, groups, strict=True):
            own.update(_hyperparameters(group))

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


def require_supported_optimizer(optimizer: Optimizer) -> None:
    """Refuses an optimizer that does not step once from gradients that are there.

    Raises:
        TypeError: If it is not a `torch.optim.Optimizer`.
        ValueError: If it needs a closure, gradients at two points, or sparse gradients.
    """
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"Expected a torch.optim.Optimizer but got {kind}.")
    reason = None
    if isinstance(optimizer, LBFGS) or _needs_closure(optimizer):
        reason = "evaluates the loss several times within a step, through a closure"
    elif hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
        reason = "takes the gradient at two points in a step"
    elif isinstance(optimizer, SparseAdam):
        reason = "takes sparse gradients"
    if reason is not None:
        raise ValueError(
            f"Expected an optimizer that steps once from the gradients of its parameters but {kind} {reason}. "
            "Use torch.optim.SGD, Adam, AdamW, RMSprop, Adagrad, or another that steps from `.grad`."
        )


def _needs_closure(optimizer: Optimizer) -> bool:
    arguments = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(a.default is inspect.Parameter.empty and a.kind not in optional for a in arguments)


def _require_dense_gradients(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse:
            raise ValueError(f"Expected dense gradients but `{name}` was built with `sparse=True`. Use `sparse=False`.")


def _require_names(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], argument: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    differing = sorted(set(shapes.items()) ^ {(name, tuple(tensor.shape)) for name, tensor in expected.items()})
    if differing:
        raise ValueError(
            f"Expected argument `{argument}` to hold the trainable parameters of the linearized network, but these names "
            f"or shapes differ: {differing[:6]}."
        )


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: v.clone() if isinstance(v, Tensor) else v for key, v in group.items() if key != "params"}


def _held_by(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
