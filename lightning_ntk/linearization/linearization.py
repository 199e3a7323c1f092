"""The first-order expansion of a network around its weights at construction, one batch at a time."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointError

from lightning_ntk.linearization.parameters import Tensors, matching, trainable_parameters
from lightning_ntk.utilities.contexts import isolated_pass, without_library_kernels

T = TypeVar("T")
Predict: TypeAlias = Callable[[nn.Module, Any], Tensor]


def call_module(module: nn.Module, inputs: Any) -> Tensor:
    """The default `predict`: `module(inputs)`, or `module(*inputs)` when the inputs are a tuple or list."""
    outputs: Tensor = module(*inputs) if isinstance(inputs, tuple | list) else module(inputs)
    return outputs


class _Predictor(nn.Module):
    """`predict` as the forward of a module, so that `functional_call` can replace the weights it uses."""

    def __init__(self, module: nn.Module, predict: Predict) -> None:
        super().__init__()
        self.module = module
        self.predict = predict
        self.flat = False

    def forward(self, inputs: Any, then: Callable[[Tensor], T]) -> T:
        outputs = _require_outputs(self.predict(self.module, inputs))
        self.flat = outputs.dim() == 1
        return then(outputs.unsqueeze(1) if self.flat else outputs)


class Linearization:
    r"""The network :math:`f_\text{lin}(w) = f(w_0) + J (w - w_0)` at the weights that `module` has now.

    Parameters and buffers are cloned, so that training the module afterwards changes nothing here. Only parameters
    with `requires_grad=True` are variables, frozen ones are constants, and tied ones count once. Every pass runs in
    eval mode, outside autocast and `torch.inference_mode`, with TF32 off, and leaves the module as it was.

    Args:
        module: Any network whose output is `(B, K)`, or `(B,)` for a single output.
        predict: Maps `(module, inputs)` to the outputs. Default: `module(inputs)`, or `module(*inputs)` when the
            inputs are a tuple or list.
        dtype: Floating-point type of the passes; parameters, buffers and inputs are converted. Default: that of the
            parameters, and float32 for those in half precision.
        params: Weights to linearize at instead of the module's own, with the same names and shapes.

    Raises:
        ValueError: If the module has no trainable parameters or uninitialized ones, or if `params` does not match.

    Example:
        >>> module = torch.nn.Linear(3, 2)
        >>> linearization = Linearization(module)
        >>> inputs = torch.ones(4, 3)
        >>> outputs = linearization(dict(module.named_parameters()), inputs)
        >>> torch.allclose(outputs, module(inputs))
        True
    """

    params: Tensors
    """Clones of the trainable parameters, under their names in `named_parameters()`."""
    buffers: Tensors
    """Clones of the buffers."""

    def __init__(
        self,
        module: nn.Module,
        *,
        predict: Predict | None = None,
        dtype: torch.dtype | None = None,
        params: Mapping[str, Tensor] | None = None,
    ) -> None:
        live = trainable_parameters(module)
        first = next(iter(live.values()))
        self.dtype = dtype or (first.dtype if first.dtype in (torch.float32, torch.float64) else torch.float32)
        self.device = first.device
        self._predictor = _Predictor(module, predict or call_module)
        self._jvp_rung = 0
        self._shares_forward = True
        with torch.inference_mode(False), torch.no_grad():
            self.params = {name: self._clone(p) for name, p in matching(params, live).items()}
            self._frozen = {n: self._clone(p) for n, p in module.named_parameters() if not p.requires_grad}
            self.buffers = {name: self._clone(buffer) for name, buffer in module.named_buffers()}

    @property
    def module(self) -> nn.Module:
        """The live module, whose forward is used but whose weights are not."""
        return self._predictor.module

    @property
    def flat(self) -> bool:
        """Whether the network's own outputs, in the last pass, were `(B,)`, so that K = 1."""
        return self._predictor.flat

    @property
    def num_parameters(self) -> int:
        """P, the number of trainable weights."""
        return sum(p.numel() for p in self.params.values())

    def at(self, params: Mapping[str, Tensor]) -> "Linearization":
        """The expansion of the same network around other weights, with the captured buffers and frozen weights.

        Args:
            params: Weights with the names and shapes of `params`; they are cloned.

        Raises:
            ValueError: If names or shapes differ.
        """
        other = copy(self)
        with torch.inference_mode(False), torch.no_grad():
            other.params = {name: value.clone() for name, value in self._convert_all(params).items()}
        return other

    def state_dict(self) -> dict[str, Tensors]:
        """What was captured, by "params", "frozen" and "buffers": the tensors themselves."""
        return {"params": dict(self.params), "frozen": dict(self._frozen), "buffers": dict(self.buffers)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes over clones of what `state_dict` returned, on the device of the network.

        Raises:
            ValueError: If it is of a network with other trainable parameters, frozen ones or buffers.
        """
        own = self.state_dict()
        with torch.inference_mode(False), torch.no_grad():
            for kind, name in (("params", "params"), ("frozen", "_frozen"), ("buffers", "buffers")):
                tensors = matching(state[kind], own[kind])
                setattr(self, name, {key: self._clone(value.to(self.device)) for key, value in tensors.items()})

    def unused(self, inputs: Any) -> set[str]:
        """The names of the parameters that the outputs do not depend on, for which a backward pass leaves no gradient."""
        leaves = {name: p.detach().requires_grad_() for name, p in self.params.items()}

        def find(outputs: Tensor) -> set[str]:
            if not outputs.requires_grad:
                return set(leaves)
            gradients = torch.autograd.grad(outputs.sum(), list(leaves.values()), allow_unused=True)
            return {name for name, gradient in zip(leaves, gradients, strict=True) if gradient is None}

        with isolated_pass(self.module, self.device.type), torch.enable_grad():
            return self.apply(leaves, self.convert(inputs), find)

    def restricted(self, names: Sequence[str]) -> "Linearization":
        """The same network with only these parameters as variables, the others as constants."""
        other = copy(self)
        other.params = {name: p for name, p in self.params.items() if name in names}
        other._frozen = self._frozen | {name: p for name, p in self.params.items() if name not in names}
        return other

    def predict(self, inputs: Any) -> Tensor:
        """Outputs of the network at the captured weights, `(B, K)`."""
        return self.predict_at(self.params, inputs)

    def predict_at(self, params: Mapping[str, Tensor], inputs: Any) -> Tensor:
        """Outputs `(B, K)` of the (non-linear) network at other weights, with the captured buffers and frozen weights."""
        with isolated_pass(self.module, self.device.type), torch.no_grad():
            return self.forward(self._convert_all(params), self.convert(inputs))

    def __call__(self, params: Mapping[str, Tensor], inputs: Any) -> Tensor:
        """Outputs of the linearized network, `f0 + J (params - params0)`, `(B, K)`."""
        params = self._convert_all(params)
        tangent = {name: params[name] - start for name, start in self.params.items()}
        outputs, derivative = self.predict_and_jvp(tangent, inputs)
        return outputs + derivative

    def jvp(self, tangent: Mapping[str, Tensor], inputs: Any) -> Tensor:
        """The Jacobian-vector product `J v`, `(B, K)`, for a tangent with the names and shapes of `params`.

        Forward mode; operations without a forward-mode derivative are retried without the fused kernels and at last
        through two reverse passes, `J v = d/du <J^T u, v>`.
        """
        return self.predict_and_jvp(tangent, inputs)[1]

    def vjp(self, cotangent: Tensor, inputs: Any) -> Tensors:
        """The vector-Jacobian product `J^T u` for a cotangent `(B, K)`, with the names and shapes of `params`."""
        return self.predict_and_vjp([cotangent], inputs)[1][0]

    def predict_and_jvp(self, tangent: Mapping[str, Tensor], inputs: Any) -> tuple[Tensor, Tensor]:
        """Outputs and `J v`, both `(B, K)`, in one pass."""
        tangent = self._convert_all(tangent)
        inputs = self.convert(inputs)
        with ExitStack() as stack:
            stack.enter_context(isolated_pass(self.module, self.device.type))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            while True:
                if self._jvp_rung > 0:
                    stack.enter_context(without_library_kernels())
                if self._jvp_rung > 1:
                    return self._double_vjp(tangent, inputs)
                try:
                    with torch.no_grad():
                        outputs, derivative = jvp(lambda p: self.forward(p, inputs), (self.params,), (tangent,))[:2]
                        return outputs, derivative
                except (NotImplementedError, RuntimeError) as error:
                    if not _lacks_forward_mode(error):
                        raise
                    self._jvp_rung += 1

    def predict_and_vjp(self, cotangents: list[Tensor] | Tensor, inputs: Any) -> tuple[Tensor, list[Tensors]]:
        """Outputs `(B, K)` and `J^T u` for each of several cotangents `(B, K)`: one forward pass, many backward."""
        inputs = self.convert(inputs)
        leaves = {name: p.detach().requires_grad_() for name, p in self.params.items()}

        def pull_back(outputs: Tensor) -> tuple[Tensor, list[Tensors]]:
            if not outputs.requires_grad:
                return outputs, [{name: torch.zeros_like(p) for name, p in leaves.items()} for _ in cotangents]
            last = len(cotangents) - 1
            gradients = [
                _gradient(outputs, leaves, u.to(outputs), retain_graph=i < last) for i, u in enumerate(cotangents)
            ]
            return outputs.detach(), gradients

        # torch.autograd and not torch.func: older custom autograd Functions have no torch.func support.
        with isolated_pass(self.module, self.device.type), torch.enable_grad():
            return self.apply(leaves, inputs, pull_back)

    def predict_jvp_and_vjp(
        self, tangent: Mapping[str, Tensor] | None, inputs: Any, cotangent_of: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensors:
        """`J^T u` for a cotangent that depends on the outputs and on `J v`, in one forward and one backward pass.

        Args:
            tangent: v, with the names and shapes of `params`; None for zero, which costs nothing.
            inputs: One batch.
            cotangent_of: Maps the outputs and `J v`, both `(B, K)`, to the cotangent u, `(B, K)`.

        Returns:
            `J^T u`, with the names and shapes of `params`.
        """
        inputs = self.convert(inputs)
        tangent = None if tangent is None else self._convert_all(tangent)
        if tangent is None or (self._shares_forward and self._jvp_rung == 0):
            try:
                return self._shared_forward(tangent, inputs, cotangent_of)
            except (NotImplementedError, RuntimeError) as error:
                # Activation checkpointing refuses a forward that records more than its repetition.
                if tangent is None or not (_lacks_forward_mode(error) or isinstance(error, CheckpointError)):
                    raise
                self._shares_forward = False
        return self.predict_and_vjp([cotangent_of(*self.predict_and_jvp(tangent, inputs))], inputs)[1][0]

    def forward(self, params: Mapping[str, Tensor], inputs: Any) -> Tensor:
        """Outputs `(B, K)` at `params`: differentiable, for use under `torch.func` inside `isolated_pass`."""
        return self.apply(params, inputs, lambda outputs: outputs)

    def apply(self, params: Mapping[str, Tensor], inputs: Any, then: Callable[[Tensor], T]) -> T:
        """`then(outputs)`, called while `params` still stand in for the weights of the module.

        A backward pass belongs in `then`: activation checkpointing runs parts of the forward again during it.
        """
        # Clones, because functional_call lets a forward overwrite the buffers that it is given.
        constants = self._frozen | {name: buffer.clone() for name, buffer in self.buffers.items()}
        state = {f"module.{name}": value for name, value in (constants | dict(params)).items()}
        result: T = functional_call(self._predictor, state, (inputs, then))
        return result

    def convert(self, inputs: Any) -> Any:
        """The inputs on the device of the weights, floating-point ones in the type of the passes."""

        def convert(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            # Autograd cannot save tensors made under inference_mode.
            leaf = leaf.clone() if leaf.is_inference() else leaf
            return leaf.to(self.device, self.dtype if leaf.is_floating_point() else None)

        with torch.inference_mode(False):
            return pytree.tree_map(convert, inputs)

    def _shared_forward(
        self, tangent: Tensors | None, inputs: Any, cotangent_of: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensors:
        leaves = {name: p.detach().requires_grad_() for name, p in self.params.items()}

        def pull_back(outputs: Tensor) -> Tensors:
            primal, derivative = unpack_dual(outputs) if tangent else (outputs, None)  # type: ignore[no-untyped-call]
            derivative = torch.zeros_like(primal) if derivative is None else derivative.detach()
            # Without the tangents, or the backward pass would differentiate itself along them.
            duals.close()
            cotangent = cotangent_of(primal.detach(), derivative).to(primal)
            if not primal.requires_grad:
                return {name: torch.zeros_like(p) for name, p in leaves.items()}
            return _gradient(primal, leaves, cotangent)

        with ExitStack() as stack, ExitStack() as duals:
            stack.enter_context(isolated_pass(self.module, self.device.type))
            stack.enter_context(torch.enable_grad())
            if tangent is None:
                return self.apply(leaves, inputs, pull_back)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            duals.enter_context(dual_level())
            params = {n: make_dual(leaf, tangent[n]) for n, leaf in leaves.items()}  # type: ignore[no-untyped-call]
            return self.apply(params, inputs, pull_back)

    def _double_vjp(self, tangent: Tensors, inputs: Any) -> tuple[Tensor, Tensor]:
        leaves = {name: p.detach().requires_grad_() for name, p in self.params.items()}

        def push_forward(outputs: Tensor) -> tuple[Tensor, Tensor]:
            if not outputs.requires_grad:
                return outputs, torch.zeros_like(outputs)
            cotangent = torch.zeros_like(outputs, requires_grad=True)
            gradient = _gradient(outputs, leaves, cotangent, create_graph=True)
            product = torch.stack([(gradient[name] * tangent[name]).sum() for name in leaves]).sum()
            (derivative,) = torch.autograd.grad(product, cotangent)
            return outputs.detach(), derivative

        with torch.enable_grad():
            return self.apply(leaves, inputs, push_forward)

    def _clone(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.dtype if tensor.is_floating_point() else None).clone()

    def _convert_all(self, tensors: Mapping[str, Tensor]) -> Tensors:
        return {n: t.detach().to(self.device, self.dtype) for n, t in matching(tensors, self.params).items()}


def _require_outputs(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.dim() not in (1, 2):
        got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise ValueError(
            f"Expected outputs that are a tensor of shape (batch, outputs) or (batch,) but got {got}. "
            "Give `predict=lambda module, inputs: ...` that returns such a tensor."
        )
    return outputs


def _gradient(outputs: Tensor, leaves: Tensors, cotangent: Tensor, **options: bool) -> Tensors:
    """`J^T u` with zeros for parameters that the outputs do not use."""
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), cotangent, allow_unused=True, materialize_grads=True, **options
    )
    return dict(zip(leaves, gradients, strict=True))


def _lacks_forward_mode(error: Exception) -> bool:
    message = str(error)
    return any(
        hint in message for hint in ("forward AD", "forward mode AD", "forward-mode", "setup_context", "jvp function")
    )
