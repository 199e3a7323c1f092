"""Records activations of a network's layers on a batch.

The hooks are removed afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_ntk.linearization.network import FrozenNetwork
from lightning_ntk.linearization.parameters import plain_name
from lightning_ntk.utilities.shapes import Float


class Activations(NamedTuple):
    """What one forward pass computes.

    Attributes:
        outputs: Outputs of the network, `(B, K)`.
        layers: Outputs of every module without children that has parameters, by its name; of all its calls, flattened.
        features: Inputs of the last such module, `(B, p)`, where that is an `nn.Linear` with K outputs; else None.
    """

    outputs: Float[Tensor, "B K"]
    layers: dict[str, Tensor]
    features: Float[Tensor, "B p"] | None


def activations_of(network: FrozenNetwork, inputs: Any) -> Activations:
    """Runs one pass at the weights of `network`, in eval mode."""
    layers: dict[str, list[Tensor]] = {}
    last: list[tuple[nn.Module, Tensor | None]] = []

    def note(name: str, module: nn.Module, given: tuple[Any, ...], outputs: Any) -> None:
        # Clones: the next layer may write into them.
        found = [leaf.detach().flatten().clone() for leaf in pytree.tree_leaves(outputs) if _is_real(leaf)]
        layers.setdefault(name, []).extend(found)
        features = given[0].detach().clone() if given and isinstance(given[0], Tensor) else None
        last[:] = [(module, features)]

    with _hooked(network.module, note):
        outputs = network.predict(inputs)
    features = None
    for module, given in last:
        if isinstance(module, nn.Linear) and module.out_features == outputs.shape[1] and given is not None:
            features = given if given.shape == (len(outputs), module.in_features) else None
    return Activations(outputs, {name: torch.cat(parts) for name, parts in layers.items() if parts}, features)


@contextmanager
def _hooked(module: nn.Module, note: Any) -> Iterator[None]:
    def hook(name: str) -> Any:
        return lambda layer, given, outputs: note(name, layer, given, outputs)

    handles = [
        layer.register_forward_hook(hook(plain_name(name)))
        for name, layer in module.named_modules()
        if not any(True for _ in layer.children()) and any(True for _ in layer.parameters())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_real(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
