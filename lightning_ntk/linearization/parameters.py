"""Parameters of a network by name, and which of them are variables."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_ntk.utilities.validation import require_instance, require_values

Tensors: TypeAlias = dict[str, Tensor]


def plain_name(name: str) -> str:
    """The name of a parameter without `_orig_mod`, under which `torch.compile` puts submodules."""
    return name.replace("_orig_mod.", "")


def trainable_parameters(module: nn.Module) -> Tensors:
    """The live parameters that require a gradient, by name.

    The names are those of `named_parameters()`; tied parameters occur once.
    """
    require_instance("module", module, nn.Module, "an nn.Module, an object and not its class,")
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
        require_values(f"the parameter `{name}`", tensor)
        if not tensor.is_floating_point():
            raise ValueError(f"Expected real floating-point parameters but `{name}` has dtype {tensor.dtype}.")
    return parameters


def call_with(module: nn.Module, state: Mapping[str, Tensor], args: tuple[Any, ...]) -> Any:
    """Calls a module with other tensors as parameters and buffers, by name.

    On its own, `torch.func.functional_call` replaces the tensors of a submodule that has two names twice, and leaves
    the first replacement in the module.
    """
    names: dict[int, str] = {}
    places: Tensors = {}
    for prefix, submodule in module.named_modules():
        for own in (submodule.named_parameters, submodule.named_buffers):
            for place, tensor in own(prefix, recurse=False, remove_duplicate=False):
                name = names.setdefault(id(tensor), place)  # tied tensors have the name of the first
                if name in state:
                    places[place] = state[name]
    return functional_call(module, places, args, tie_weights=False)


def overwritten(copies: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> set[str]:
    """The names of the fresh copies into which a forward has written."""
    # The version of a copy counts operations in place, but not those through `.data`.
    return {name for name, copy in copies.items() if copy._version > 0 or not torch.equal(copy, originals[name])}
