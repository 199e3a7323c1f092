"""What is done without this package: kernels and solutions in plain PyTorch."""

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

Weights = dict[str, Tensor]


def _weights(module: nn.Module) -> Weights:
    return {name: p.detach() for name, p in module.named_parameters()}


def _one_sample(module: nn.Module, weights: Weights, sample: Tensor) -> Tensor:
    result: Tensor = functional_call(module, weights, (sample.unsqueeze(0),))
    return result.squeeze(0)


def vmap_jacrev(module: nn.Module, inputs: Tensor) -> Tensor:
    """The kernel as PyTorch's tutorial makes it: all Jacobians, then their products."""
    jacobians = vmap(jacrev(lambda w, x: _one_sample(module, w, x)), (None, 0))(_weights(module), inputs)
    flat = [jacobian.reshape(jacobian.shape[:2].numel(), -1) for jacobian in jacobians.values()]
    return torch.stack([jacobian @ jacobian.T for jacobian in flat]).sum(0)


def ntk_vector_products(module: nn.Module, inputs: Tensor) -> Tensor:
    """The tutorial's other way: J(x_i) J(x_j)^T e_k for every pair of samples and every output, no Jacobian held."""
    weights = _weights(module)

    def block(first: Tensor, second: Tensor) -> Tensor:
        products = vjp(lambda w: _one_sample(module, w, second), weights)
        outputs, pull_back = products[0], products[1]

        def product(cotangent: Tensor) -> Tensor:
            tangent = pull_back(cotangent)[0]
            result: Tensor = jvp(lambda w: _one_sample(module, w, first), (weights,), (tangent,))[1]
            return result

        basis = torch.eye(len(outputs), dtype=outputs.dtype)
        columns: Tensor = vmap(product)(basis)
        return columns.T

    # Fused attention has no forward-mode derivative.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            blocks: Tensor = vmap(vmap(block, (None, 0)), (0, None))(inputs, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return blocks.transpose(1, 2).flatten(2).flatten(0, 1)


def row_by_row_jacobian(module: nn.Module, inputs: Tensor) -> Tensor:
    """All of J, `(N K, P)`: one backward pass for each sample and output, the gradients stacked."""
    parameters = list(module.parameters())
    rows = []
    for sample in inputs:
        for output in module(sample.unsqueeze(0)).squeeze(0):
            gradients = torch.autograd.grad(output, parameters, retain_graph=True)
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def row_by_row(module: nn.Module, inputs: Tensor) -> Tensor:
    """The kernel as a product of stacked gradients."""
    jacobian = row_by_row_jacobian(module, inputs)
    return jacobian.mm(jacobian.T)


def flow_by_inverse(kernel: Tensor, residual: Tensor, rate: float, t: float) -> Tensor:
    """Coefficients of gradient flow at time t in the kernel's type: `-Theta^-1 (I - exp(-rate t Theta)) r`."""
    decay = torch.matrix_exp(-rate * t * kernel)
    coefficients: Tensor = -torch.linalg.inv(kernel) @ (residual - decay @ residual)
    return coefficients


def descent_by_inverse(kernel: Tensor, residual: Tensor, rate: float, t: int) -> Tensor:
    """Coefficients of gradient descent after t steps: `-Theta^-1 (I - (I - rate Theta)^t) r`."""
    step = torch.eye(len(kernel), dtype=kernel.dtype) - rate * kernel
    coefficients: Tensor = -torch.linalg.inv(kernel) @ (residual - torch.linalg.matrix_power(step, t) @ residual)
    return coefficients
