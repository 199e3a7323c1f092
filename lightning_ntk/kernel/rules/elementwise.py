"""Rules for parameters that are added to activations or multiply them.

Examples are position embeddings, scales and hand-written norms.
"""

import torch
from torch import Tensor

from lightning_ntk.kernel.factors import Factor, Outer
from lightning_ntk.kernel.rules.layers import Jacobians, register_rule


@register_rule(torch.add, torch.Tensor.add)
def addition(
    gradients: Tensor, input: Tensor | float, other: Tensor | float, *, alpha: float = 1, **options: object
) -> Jacobians:
    """`input + alpha * other`, either of which may be broadcast."""
    if options:
        return
    if isinstance(input, Tensor):
        yield input, _broadcast(input, gradients)
    if isinstance(other, Tensor):
        yield other, _broadcast(other, gradients if alpha == 1 else alpha * gradients)


@register_rule(torch.mul, torch.Tensor.mul)
def product(gradients: Tensor, input: Tensor | float, other: Tensor | float, **options: object) -> Jacobians:
    """`input * other`, either of which may be broadcast."""
    if options:
        return
    if isinstance(input, Tensor):
        yield input, _broadcast(input, gradients * other)
    if isinstance(other, Tensor):
        yield other, _broadcast(other, gradients * input)


def _broadcast(term: Tensor, gradients: Tensor) -> Factor:
    """Makes rows of the places to which the term was copied.

    What a row holds there are positions, with one-hot inputs.
    """
    shape = gradients.shape[1:]
    own = (1,) * (len(shape) - term.dim()) + tuple(term.shape)
    copied = [axis for axis, size in enumerate(own) if size == 1]
    kept = [axis for axis, size in enumerate(own) if size > 1]
    size = own[kept[-1]] if kept else 1
    places = gradients.permute([1 + axis for axis in copied] + [0] + [1 + axis for axis in kept])
    rows = torch.Size(shape[axis] for axis in copied).numel()
    places = places.reshape(rows, len(gradients), 1, term.numel() // size, size)
    index = torch.arange(places.shape[3], device=term.device).expand(rows, 1, -1)
    return Outer(index, places, term.shape, input_first=True)
