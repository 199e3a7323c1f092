"""Per-sample Jacobians of any module, by vmap over vector-Jacobian products."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from lightning_ntk.linearization.linearization import Linearization
from lightning_ntk.linearization.parameters import Tensors
from lightning_ntk.utilities.contexts import full_precision, isolated_pass
from lightning_ntk.utilities.shapes import Float
from lightning_ntk.utilities.user_warnings import warn_user

# Samples whose activations, K times each, are held at once while their Jacobians are made.
_VMAP_CHUNK = 32


def sample_jacobians(
    linearization: Linearization, inputs: object, names: Sequence[str] | None = None
) -> dict[str, Float[Tensor, "B K ..."]]:
    """Computes every sample's Jacobian, `(B, K, *shape)` for each parameter.

    `names` restricts the parameters.

    Operations that vmap does not support, or for which it is wrong (that of `nn.PReLU`, in some versions of PyTorch), are
    differentiated sample by sample, K backward passes each.
    """
    inputs = linearization.convert(inputs)
    leaves, structure = pytree.tree_flatten(inputs)
    variables = {name: linearization.params[name] for name in names or linearization.params}
    in_dims = tuple(0 if isinstance(leaf, Tensor) else None for leaf in leaves)

    def jacobian(*sample: object) -> Tensors:
        batch_of_one = [leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf for leaf in sample]
        rebuilt = pytree.tree_unflatten(batch_of_one, structure)

        def outputs(chosen: Tensors) -> Tensor:
            return linearization.forward(linearization.params | chosen, rebuilt).squeeze(0)

        return dict(jacrev(outputs)(variables))

    jacobians: Tensors | None = None
    with isolated_pass(linearization.module, linearization.device.type), sdpa_kernel(SDPBackend.MATH):
        try:
            jacobians = dict(vmap(jacobian, in_dims, chunk_size=_VMAP_CHUNK)(*leaves))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            reason = f"vmap does not support an operation of the network: {error}"
        else:
            reason = "vmap differentiates an operation of the network wrongly, as a plain backward pass shows."
    if jacobians is not None and _match_autograd(linearization, inputs, jacobians):
        return jacobians
    warn_user(f"Per-sample Jacobians are computed one sample at a time, which is slow, because {reason}")
    return _row_by_row(linearization, leaves, structure, list(variables))


def random_cotangent(shape: torch.Size, like: Tensor) -> Tensor:
    """Draws normal numbers that are the same on every device.

    They have the type and the device of another tensor.
    """
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)


def _match_autograd(linearization: Linearization, inputs: object, jacobians: Tensors) -> bool:
    """Whether J^T u agrees with plain autograd.

    It is tested for a random u and every parameter.
    """
    first = next(iter(jacobians.values()))
    cotangent = random_cotangent(first.shape[:2], like=first)
    expected = linearization.predict_and_vjp([cotangent], inputs)[1][0]
    tolerance = 1e4 * torch.finfo(first.dtype).eps
    close = []
    with full_precision(linearization.device.type):
        for name, block in jacobians.items():
            product = cotangent.flatten() @ block.reshape(block.shape[:2].numel(), -1)
            scale = (block.reshape(*cotangent.shape, -1).square().sum(2) * cotangent.square()).sum().sqrt()
            close.append((product - expected[name].flatten()).norm() <= tolerance * scale)
    return bool(torch.stack(close).all())


def _row_by_row(
    linearization: Linearization, leaves: list[object], structure: pytree.TreeSpec, names: Sequence[str]
) -> Tensors:
    batch = next(leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor))
    samples = []
    basis: Tensor | None = None
    for index in range(batch):
        sample = [leaf[index : index + 1] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        rebuilt = pytree.tree_unflatten(sample, structure)
        if basis is None:
            classes = linearization.predict(rebuilt).shape[1]
            basis = torch.eye(classes, dtype=linearization.dtype, device=linearization.device).unsqueeze(1)
        rows = linearization.predict_and_vjp(basis, rebuilt)[1]
        samples.append({name: torch.stack([row[name] for row in rows]) for name in names})
    return {name: torch.stack([sample[name] for sample in samples]) for name in names}


def contract(
    first: Mapping[str, Float[Tensor, "B1 K ..."]],
    second: Mapping[str, Float[Tensor, "B2 K ..."]],
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "B1*K B2*K"]:
    """Computes J1 J2^T, `(B1 K, B2 K)`, in `dtype`.

    The Jacobians are `(B1, K, *shape)` and `(B2, K, *shape)` for every parameter.
    """
    total: Tensor | None = None
    for name, block in first.items():
        rows, columns = (
            jacobian.reshape(jacobian.shape[:2].numel(), -1).to(dtype) for jacobian in (block, second[name])
        )
        total = rows @ columns.T if total is None else total.addmm_(rows, columns.T)
    assert total is not None
    return total
