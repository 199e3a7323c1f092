"""The first-order expansion of a network around frozen weights, one batch at a time."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import jvp
from torch.utils.checkpoint import CheckpointError

from lightning_ntk.linearization.network import FrozenNetwork, Predict
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.utilities.contexts import forward_mode, isolated_pass, without_library_kernels
from lightning_ntk.utilities.representation import parameter_count, represent
from lightning_ntk.utilities.shapes import Float
from lightning_ntk.utilities.validation import require_instance

__all__ = ["Linearization", "Predict"]

T = TypeVar("T")


class Linearization(FrozenNetwork):
    r"""A network, linearized at the weights that `module` has now.

    The network is :math:`f_\text{lin}(w) = f(w_0) + J (w - w_0)`.

    Parameters and buffers are cloned, so that training the module afterwards changes nothing here. Only parameters
    with `requires_grad=True` are variables, frozen ones are constants, and tied ones count once. Every pass runs in
    eval mode, outside autocast and `torch.inference_mode`, with TF32 off. It leaves the module, its inputs and its
    weights as they were, even if the forward writes into them.

    Args:
        module: Any network whose output is `(B, K)`, or `(B,)` for a single output.
        predict: Maps `(module, inputs)` to the outputs. Default: `module(inputs)`, or `module(*inputs)` if the
            inputs are a tuple or list.
        dtype: Floating-point type of the passes; parameters, buffers and inputs are converted. Default: that of the
            parameters, and float32 for those in half precision.
        params: Weights to linearize at instead of the module's own, with the same names and shapes.

    Raises:
        ValueError: If the module has no trainable parameters or uninitialized ones, if its device has no float64, or
            if `params` does not match.

    Example:
        >>> module = torch.nn.Linear(3, 2)
        >>> linearization = Linearization(module)
        >>> inputs = torch.ones(4, 3)
        >>> outputs = linearization(dict(module.named_parameters()), inputs)
        >>> torch.allclose(outputs, module(inputs))
        True
    """

    # What works for this network: forward mode, then without library kernels, then two reverse passes.
    _jvp_rung = 0
    _shares_forward = True

    def __call__(self, params: Mapping[str, Tensor], inputs: Any) -> Float[Tensor, "B K"]:
        """Outputs of the linearized network, `f0 + J (params - params0)`, `(B, K)`."""
        params = self._convert_all(params)
        tangent = {name: params[name] - start for name, start in self.params.items()}
        outputs, derivative = self.predict_and_jvp(tangent, inputs)
        return outputs + derivative

    def jvp(self, tangent: Mapping[str, Tensor], inputs: Any) -> Float[Tensor, "B K"]:
        """Computes the Jacobian-vector product `J v`, `(B, K)`.

        The tangent has the names and shapes of `params`.

        Forward mode. Operations without a forward-mode derivative are retried without fused kernels, and at last
        through two reverse passes, `J v = d/du <J^T u, v>`.
        """
        return self.predict_and_jvp(tangent, inputs)[1]

    def vjp(self, cotangent: Float[Tensor, "B K"], inputs: Any) -> Tensors:
        """Computes the vector-Jacobian product `J^T u`.

        The cotangent is `(B, K)`; the result has the names and shapes of `params`.
        """
        require_instance("cotangent", cotangent, Tensor, "a tensor (B, K)")
        return self.predict_and_vjp([cotangent], inputs)[1][0]

    def predict_and_jvp(
        self, tangent: Mapping[str, Tensor], inputs: Any
    ) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B K"]]:
        """Outputs and `J v`, both `(B, K)`, in one pass."""
        tangent = self._convert_all(tangent)
        inputs = self.convert(inputs)
        if self._overwrites is None:
            self.predict(inputs)
        with ExitStack() as stack:
            for context in (
                self.explained(inputs),
                isolated_pass(self.module, self.device.type),
                forward_mode(),
            ):
                stack.enter_context(context)
            while True:
                # Reverse mode does not see what a forward writes into weights under `no_grad`; forward mode does.
                rung = 2 if self._overwrites else self._jvp_rung
                if rung > 0:
                    stack.enter_context(without_library_kernels())
                if rung > 1:
                    return self._double_vjp(tangent, inputs)
                try:
                    outputs, derivative = jvp(lambda p: self.forward(p, inputs), (self.params,), (tangent,))[:2]
                    return outputs.detach(), derivative.detach()
                except (NotImplementedError, RuntimeError) as error:
                    if not lacks_forward_mode(error):
                        raise
                    self._jvp_rung += 1

    def predict_and_vjp(
        self, cotangents: Sequence[Float[Tensor, "B K"]] | Float[Tensor, "T B K"], inputs: Any
    ) -> tuple[Float[Tensor, "B K"], list[Tensors]]:
        """Computes outputs `(B, K)` and `J^T u` for several cotangents `(B, K)`.

        It takes one forward pass and a backward pass for each cotangent.
        """

        def pull_back(outputs: Tensor, leaves: Tensors) -> tuple[Tensor, list[Tensors]]:
            last = len(cotangents) - 1
            gradients = [pulled_back([outputs], [u], leaves, retain_graph=i < last) for i, u in enumerate(cotangents)]
            return outputs.detach(), gradients

        with self.explained(inputs):
            return self._backward(inputs, pull_back)

    def predict_jvp_and_vjp(
        self, tangent: Mapping[str, Tensor] | None, inputs: Any, cotangent_of: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensors:
        """Computes `J^T u` for a cotangent that depends on outputs and `J v`.

        It takes one forward and one backward pass.

        Args:
            tangent: v, with the names and shapes of `params`; None for zero, which costs nothing.
            inputs: One batch.
            cotangent_of: Maps the outputs and `J v`, both `(B, K)`, to the cotangent u, `(B, K)`.

        Returns:
            `J^T u`, with the names and shapes of `params`, each tensor with memory of its own.
        """
        duals = ExitStack()

        def pull_back(outputs: Tensor, leaves: Tensors) -> Tensors:
            primal, derivative = unpack_dual(outputs)  # type: ignore[no-untyped-call]
            derivative = torch.zeros_like(primal) if derivative is None else derivative
            # Without the tangents, or the backward pass would differentiate itself along them.
            duals.close()
            return pulled_back([primal], [cotangent_of(primal.detach(), derivative.detach())], leaves)

        with self.explained(inputs):
            if tangent is None:
                return self._backward(inputs, pull_back)
            tangent = self._convert_all(tangent)
            if self._shares_forward and self._jvp_rung == 0 and self._overwrites is False:
                try:
                    with forward_mode(), duals:
                        duals.enter_context(dual_level())
                        return self._backward(inputs, pull_back, tangent)
                except (NotImplementedError, RuntimeError) as error:
                    # Activation checkpointing refuses a forward that records more than its repetition.
                    if not (lacks_forward_mode(error) or isinstance(error, CheckpointError)):
                        raise
                    self._shares_forward = False
            return self.vjp(cotangent_of(*self.predict_and_jvp(tangent, inputs)), inputs)

    def unused(self, inputs: Any) -> set[str]:
        """The names of the parameters on which the outputs do not depend.

        They have no gradient.
        """

        def find(outputs: Tensor, leaves: Tensors) -> set[str]:
            if not outputs.requires_grad:
                return set(leaves)
            gradients = torch.autograd.grad(outputs.sum(), list(leaves.values()), allow_unused=True)
            return {name for name, gradient in zip(leaves, gradients, strict=True) if gradient is None}

        return self._backward(inputs, find)

    def _backward(
        self, inputs: Any, then: Callable[[Tensor, Tensors], T], tangent: Mapping[str, Tensor] | None = None
    ) -> T:
        """Calls `then(outputs, leaves)` on a graph from the weights as leaves.

        The graph runs along a tangent if there is one.
        """
        # torch.autograd and not torch.func: older custom autograd Functions have no torch.func support.
        with isolated_pass(self.module, self.device.type), torch.enable_grad():
            leaves = params = {name: p.detach().requires_grad_() for name, p in self.params.items()}
            if tangent is not None:
                params = {n: make_dual(leaf, tangent[n]) for n, leaf in leaves.items()}  # type: ignore[no-untyped-call]
            return self.apply(self.spare(params), self.convert(inputs), lambda outputs: then(outputs, leaves))

    def _double_vjp(self, tangent: Tensors, inputs: Any) -> tuple[Tensor, Tensor]:
        def push_forward(outputs: Tensor, leaves: Tensors) -> tuple[Tensor, Tensor]:
            if not outputs.requires_grad:
                return outputs, torch.zeros_like(outputs)
            cotangent = torch.zeros_like(outputs, requires_grad=True)
            gradients = torch.autograd.grad(
                outputs, list(leaves.values()), cotangent, create_graph=True, allow_unused=True, materialize_grads=True
            )
            products = [(g * tangent[name]).sum() for name, g in zip(leaves, gradients, strict=True)]
            product = torch.stack(products).sum()
            (derivative,) = torch.autograd.grad(product, cotangent)
            return outputs.detach(), derivative

        return self._backward(inputs, push_forward)

    def __repr__(self) -> str:
        return represent(
            self, type(self.module).__name__, parameter_count(self.params), str(self.dtype), str(self.device)
        )


def pulled_back(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor], leaves: Tensors, *, retain_graph: bool = False
) -> Tensors:
    """Computes `J^T u` by one backward pass.

    Each result has memory of its own. Parameters without a path get zeros.
    """
    pairs = [(o, u.to(o)) for o, u in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if pairs:
        # Into `.grad`, which copies a gradient that something else holds; `torch.autograd.grad` returns it as it is.
        torch.autograd.backward(
            [o for o, _ in pairs], [u for _, u in pairs], retain_graph=retain_graph, inputs=list(leaves.values())
        )
    gradients: Tensors = {}
    taken = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}
    for name, leaf in leaves.items():
        gradient, leaf.grad = leaf.grad, None
        if gradient is None:
            gradient = torch.zeros_like(leaf)
        elif gradient.layout == torch.strided:
            memory = gradient.untyped_storage()
            if memory.data_ptr() in taken or memory.nbytes() != gradient.numel() * gradient.element_size():
                gradient = gradient.clone()  # a view of another one, or an expanded one
            taken.add(memory.data_ptr())
        gradients[name] = gradient
    return gradients


def lacks_forward_mode(error: Exception) -> bool:
    """Whether an operation has no forward-mode derivative."""
    message = str(error)
    return any(
        hint in message for hint in ("forward AD", "forward mode AD", "forward-mode", "setup_context", "jvp function")
    )
