"""The first-order expansion of a network around its weights at construction, one batch at a time."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from lightning_ntk.isolation import isolated_pass, without_library_kernels

T = TypeVar("T")
Tensors: TypeAlias = dict[str, Tensor]
Predict: TypeAlias = Callable[[nn.Module, Any], Tensor]


def call_module(module: nn.Module, inputs: Any) -> Tensor:
    """The default `predict`: `module(inputs)`, or `module(*inputs)` when the inputs are a tuple or list."""
    outputs: Tensor = module(*inputs) if isinstance(inputs, tuple | list) else module(inputs)
    return outputs


def trainable_parameters(module: nn.Module) -> Tensors:
    """The live parameters that require a gradient, tied ones once, under their names in `named_parameters()`.

    Raises:
        ValueError: If there are none, if one is not initialised yet (lazy modules), or not real-valued.
    """
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"Expected initialised parameters but got the uninitialised `{name}` of a lazy module. "
                "Run one batch through the module before capturing it."
            )
    parameters: Tensors = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            "Expected argument `module` to have trainable parameters but none has requires_grad=True. "
            "Unfreeze the parameters whose linearised training is wanted."
        )
    for name, tensor in parameters.items():
        if not tensor.is_floating_point():
            raise ValueError(f"Expected real floating-point parameters but `{name}` has dtype {tensor.dtype}.")
    return parameters


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
        params: Weights to linearise at instead of the module's own, with the same names and shapes.

    Raises:
        ValueError: If the module has no trainable parameters or uninitialised ones, or if `params` does not match.

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
        with torch.inference_mode(False), torch.no_grad():
            self.params = {name: self._clone(p) for name, p in _matching(params, live).items()}
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

    def restricted(self, names: Sequence[str]) -> "Linearization":
        """The same network with only these parameters as variables, the others as constants."""
        other = copy.copy(self)
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
        """Outputs of the linearised network, `f0 + J (params - params0)`, `(B, K)`."""
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
        return {n: t.detach().to(self.device, self.dtype) for n, t in _matching(tensors, self.params).items()}


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


def _matching(tensors: Mapping[str, Tensor] | None, expected: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`tensors` in the order of `expected`, or `expected` itself if None; other names or shapes are refused."""
    if tensors is None:
        return expected
    differing = sorted(expected.keys() ^ tensors.keys())
    if differing:
        raise ValueError(
            f"Expected tensors for the trainable parameters {sorted(expected)} but these names differ: {differing}."
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"Expected `{name}` of shape {tuple(expected[name].shape)} but got {tuple(tensor.shape)}.")
    return {name: tensors[name] for name in expected}


def _lacks_forward_mode(error: Exception) -> bool:
    message = str(error)
    return any(
        hint in message for hint in ("forward AD", "forward mode AD", "forward-mode", "setup_context", "jvp function")
    )
