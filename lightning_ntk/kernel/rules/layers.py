"""Rules: the per-sample Jacobian of every operation through which layers use their parameters.

A rule belongs to a function of PyTorch and not to a class of layers, so that it holds for every layer, subclass or
functional call that uses the function, and for none that uses its weights in another way.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_ntk.kernel.factors import Dense, Factor, Outer

Jacobians: TypeAlias = Iterable[tuple[Tensor | None, Factor]]
Rule: TypeAlias = Callable[..., Jacobians]

RULES: dict[Callable[..., Any], Rule] = {}
"""The rule of every function that has one."""


def register_rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    r"""Makes a function the rule for the parameters in the arguments of `functions`.

    A rule is called as `rule(gradients, *args, **kwargs)` with the arguments of one call of the function and the
    gradients of the K outputs of the network with respect to what the call returned, `(K, *shape)`. It yields, for each
    tensor argument that may be a parameter, the pair of that argument and its Jacobian, for R rows: consecutive,
    independent parts of the call's output, such as its samples, or its samples times its positions. Which rows are
    whose sample is found out by the caller. A Jacobian is an `Outer` (a sum over positions of products
    gradient :math:`\otimes` input, contracted through Gram matrices) or, for small parameters, a `Dense` tensor
    `(R, K, *shape)`. A call that the rule does not describe yields nothing: its parameters then go through the
    contraction. Every rule is verified against plain autograd, on a few samples, before each use.

    Args:
        functions: Functions of `torch` or `torch.nn.functional`, or any that dispatch on `__torch_function__`.

    Returns:
        A decorator.

    Example:
        >>> @register_rule(torch.sub)  # torch.sub(input, shift), for inputs (N, D) and a parameter (D,)
        ... def shifted(gradients, input, shift):
        ...     yield shift, Dense(-gradients.transpose(0, 1))
        >>> RULES.pop(torch.sub) is shifted
        True
    """

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


@register_rule(F.linear)
def linear(gradients: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Jacobians:
    """`nn.Linear`, at one position or at many: a row is one position."""
    if weight.dim() != 2:
        return
    rows = gradients.reshape(len(gradients), -1, 1, 1, len(weight)).transpose(0, 1)
    yield weight, Outer(input.reshape(-1, 1, 1, input.shape[-1]), rows, weight.shape)
    yield from _bias(bias, rows)


@register_rule(torch.addmm)
def addmm(gradients: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: float) -> Jacobians:
    """`bias + input @ weight`, the transposed linear layer of GPT-2."""
    if scales or input.dim() != 1:
        return
    yield from matmul(gradients, mat1, mat2)
    yield from _bias(input, gradients[:, :, None, None, :].transpose(0, 1))


@register_rule(torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)
def matmul(gradients: Tensor, input: Tensor, other: Tensor) -> Jacobians:
    """`input @ weight` for a matrix: a row is one position."""
    if other.dim() != 2 or input.dim() < 2:
        return
    rows = gradients.reshape(len(gradients), -1, 1, 1, other.shape[1]).transpose(0, 1)
    yield other, Outer(input.reshape(-1, 1, 1, len(other)), rows, other.shape, input_first=True)


@register_rule(torch.conv1d, torch.conv2d, torch.conv3d)
def convolution(
    gradients: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Jacobians:
    """`nn.Conv1d` to `nn.Conv3d`: the inputs of a position are its patch."""
    kernel = weight.shape[2:]
    spatial = len(kernel)
    if input.dim() != spatial + 2:
        return
    steps, gaps = _per_axis(stride, spatial), _per_axis(dilation, spatial)
    if padding == "same":
        total = [d * (size - 1) for d, size in zip(gaps, kernel, strict=True)]
        before = [t // 2 for t in total]
        after = [t - b for t, b in zip(total, before, strict=True)]
    else:
        before = after = [0] * spatial if isinstance(padding, str) else _per_axis(padding, spatial)
    patches = _patches(_pad(input, before, after), kernel, steps, gaps, groups)
    rows = _rows(_grouped_positions(gradients.flatten(0, 1), groups), gradients)
    yield weight, Outer(patches, rows, weight.shape)
    yield from _bias(bias, rows)


@register_rule(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def transposed_convolution(
    gradients: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
) -> Jacobians:
    """The rule of `nn.ConvTranspose1d` to `3d`.

    It is a convolution in which input and output gradient have exchanged their places.
    """
    kernel = weight.shape[2:]
    spatial = len(kernel)
    if input.dim() != spatial + 2:
        return
    steps, gaps, border = (_per_axis(value, spatial) for value in (stride, dilation, padding))
    padded = _pad(gradients.flatten(0, 1), border, border)
    patches = _patches(padded, kernel, steps, gaps, groups, positions=input.shape[2:])
    rows = _rows(patches, gradients)
    yield weight, Outer(_grouped_positions(input, groups), rows, weight.shape, input_first=True)
    if bias is not None:
        yield bias, Dense(gradients.flatten(3).sum(3).transpose(0, 1))


@register_rule(F.embedding)
def embedding(
    gradients: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Jacobians:
    """`nn.Embedding`: a linear layer on one-hot inputs; a row is one index."""
    if max_norm is not None or scale_grad_by_freq:
        return
    rows = gradients.reshape(len(gradients), -1, 1, 1, weight.shape[1]).transpose(0, 1)
    index = input.reshape(-1, 1, 1).long()
    if padding_idx is not None:
        rows = rows.masked_fill((index == padding_idx % len(weight))[:, None, :, :, None], 0)
    yield weight, Outer(index, rows, weight.shape, input_first=True)


def _normalization(function: Callable[..., Tensor], *, channels: bool) -> Rule:
    """The rule of `weight * normalized + bias`.

    The parameters belong to the channels (the second axis) or to the last axes.
    """
    signature = inspect.signature(function)

    def rule(gradients: Tensor, *args: Any, **kwargs: Any) -> Jacobians:
        call = signature.bind(*args, **kwargs).arguments
        if call.get("training"):
            return  # statistics of the batch couple its samples
        weight, bias = call.pop("weight", None), call.pop("bias", None)
        if weight is not None:
            yield weight, jacobian(gradients * function(**call), weight)
        if bias is not None:
            yield bias, jacobian(gradients, bias)

    def jacobian(products: Tensor, parameter: Tensor) -> Dense:
        if channels:
            return Dense(products.unsqueeze(-1).flatten(3).sum(3).transpose(0, 1))
        return Dense(products.reshape(len(products), -1, *parameter.shape).transpose(0, 1))

    return rule


register_rule(F.layer_norm)(_normalization(F.layer_norm, channels=False))
register_rule(F.rms_norm)(_normalization(F.rms_norm, channels=False))
register_rule(F.group_norm)(_normalization(F.group_norm, channels=True))
register_rule(F.instance_norm)(_normalization(F.instance_norm, channels=True))
register_rule(F.batch_norm)(_normalization(F.batch_norm, channels=True))


@register_rule(torch.prelu)
def prelu(gradients: Tensor, input: Tensor, weight: Tensor) -> Jacobians:
    """`nn.PReLU`, with one slope or one a channel."""
    slopes = (gradients * input.clamp_max(0)).transpose(0, 1).unsqueeze(-1)
    yield weight, Dense(slopes.flatten(2).sum(2, keepdim=True) if len(weight) == 1 else slopes.flatten(3).sum(3))


@register_rule(torch.bilinear)
def bilinear(
    gradients: Tensor, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Jacobians:
    """`nn.Bilinear`: linear in the products of its two inputs."""
    rows = gradients.reshape(len(gradients), -1, 1, 1, len(weight)).transpose(0, 1)
    products = input1.unsqueeze(-1) * input2.unsqueeze(-2)
    yield weight, Outer(products.reshape(len(rows), 1, 1, -1), rows, weight.shape)
    yield from _bias(bias, rows)


def _bias(bias: Tensor | None, gradients: Tensor) -> Jacobians:
    """A bias is a weight whose input is one."""
    if bias is not None:
        rows, _, groups, positions, _ = gradients.shape
        yield bias, Outer(gradients.new_ones(1).expand(rows, groups, positions, 1), gradients, bias.shape)


def _per_axis(value: int | Iterable[int], axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def _pad(images: Tensor, before: list[int], after: list[int]) -> Tensor:
    # F.pad starts with the last axis.
    return F.pad(images, [side for pair in zip(before[::-1], after[::-1], strict=True) for side in pair])


def _rows(stacked: Tensor, gradients: Tensor) -> Tensor:
    """Reshapes `(K * R, ...)` to `(R, K, ...)`.

    K and R are those of the gradients.
    """
    return stacked.reshape(*gradients.shape[:2], *stacked.shape[1:]).transpose(0, 1)


def _grouped_positions(images: Tensor, groups: int) -> Tensor:
    """`(R, C, *spatial)` as vectors at positions, `(R, G, T, C/G)`."""
    rows, channels = images.shape[:2]
    return images.reshape(rows, groups, channels // groups, -1).transpose(2, 3)


def _patches(
    images: Tensor,
    kernel: torch.Size,
    stride: list[int],
    dilation: list[int],
    groups: int,
    positions: torch.Size | None = None,
) -> Tensor:
    """The patches under the convolution kernel, `(R, G, T, C/G * kernel)`.

    There is one for each of its positions.
    """
    windows = images
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        windows = windows.unfold(axis, gap * (size - 1) + 1, step)[..., ::gap]
        if positions is not None:
            windows = windows.narrow(axis, 0, positions[axis - 2])
    spatial = len(kernel)
    channels = images.shape[1] // groups
    windows = windows.reshape(len(images), groups, channels, *windows.shape[2:])
    places, offsets = range(3, 3 + spatial), range(3 + spatial, 3 + 2 * spatial)
    return windows.permute(0, 1, *places, 2, *offsets).flatten(2, 1 + spatial).flatten(3)
