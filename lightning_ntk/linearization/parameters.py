"""Parameters of a network by name: which ones are variables, and tensors that belong to them."""

from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor, nn

Tensors: TypeAlias = dict[str, Tensor]


def plain_name(name: str) -> str:
    """The name that a parameter has without `torch.compile`, which puts submodules below `_orig_mod`."""
    return name.replace("_orig_mod.", "")


def trainable_parameters(module: nn.Module) -> Tensors:
    """The live parameters that require a gradient, tied ones once, under their names in `named_parameters()`.

    Raises:
        ValueError: If there are none, if one is not initialized yet (lazy modules), or not real-valued.
    """
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"Expected initialized parameters but got the uninitialized `{name}` of a lazy module. "
                "Run one batch through the module before capturing it."
            )
    parameters: Tensors = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            "Expected argument `module` to have trainable parameters but none has requires_grad=True. "
            "Unfreeze the parameters whose linearized training is wanted."
        )
    for name, tensor in parameters.items():
        if not tensor.is_floating_point():
            raise ValueError(f"Expected real floating-point parameters but `{name}` has dtype {tensor.dtype}.")
    return parameters


def matching(tensors: Mapping[str, Tensor] | None, expected: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`tensors` in the order of `expected`, or `expected` itself if None; other names or shapes are refused."""
    if tensors is None:
        return expected
    differing = sorted(expected.keys() ^ tensors.keys())
    if differing:
        raise ValueError(f"Expected tensors with the names {sorted(expected)} but these names differ: {differing}.")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"Expected `{name}` of shape {tuple(expected[name].shape)} but got {tuple(tensor.shape)}.")
    return {name: tensors[name] for name in expected}
