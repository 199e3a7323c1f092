"""Attention on dual numbers, without the passes that PyTorch's composite form spends on them."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import once_differentiable


def dual_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """`scaled_dot_product_attention` of dual numbers; None where not covered.

    It takes about half the time of the composite form.

    The fused kernels of PyTorch have no forward-mode derivative. Its composite form has one, by differentiating each of a dozen
    operations. Here the derivative is two products of concatenated factors and one softmax derivative, and the backward pass
    keeps the attention weights alone. Dropout, grouped heads, masks with a derivative and tensors without tangents are left to
    PyTorch.
    """
    masked = attn_mask is not None and (_is_differentiated(attn_mask) or attn_mask.requires_grad)
    plain = dropout_p == 0 and not enable_gqa and not masked and min(query.dim(), key.dim(), value.dim()) >= 3
    if not plain or not any(map(_is_differentiated, (query, key, value))):
        return None
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    result: Tensor = _Attention.apply(query, key, value, attn_mask, is_causal, scale)[0]  # type: ignore[no-untyped-call]
    return result


def _is_differentiated(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and unpack_dual(tensor)[1] is not None  # type: ignore[no-untyped-call]


class _Attention(torch.autograd.Function):
    """Outputs and attention weights, differentiable once, forward and backward.

    The weights carry no derivative of their own.
    """

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        scores = (query @ key.mT) * scale
        if is_causal:
            shape = scores.shape[-2:]
            later = torch.ones(shape, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        # With a mask a row may have nothing to attend to: zeros.
        weights = scores.softmax(-1) if mask is None else torch.ops.aten._safe_softmax(scores, -1)
        return weights @ value, weights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, _, _, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(query, key, value, output[1])
        ctx.save_for_forward(query, key, value, output[1])

    @staticmethod
    def jvp(
        ctx: Any, d_query: Tensor | None, d_key: Tensor | None, d_value: Tensor | None, *_: Any
    ) -> tuple[Tensor, None]:
        query, key, value, weights = ctx.saved_tensors
        d_query, d_key, d_value = (
            torch.zeros_like(tensor) if tangent is None else tangent
            for tensor, tangent in ((query, d_query), (key, d_key), (value, d_value))
        )
        d_scores = torch.cat((d_query, query), -1) @ torch.cat((key, d_key), -1).mT
        d_weights = _softmax_derivative(d_scores, weights) * ctx.scale
        # One product of (dP, P) and (V, dV).
        changed = torch.cat((d_weights, weights), -1) @ torch.cat((value, d_value), -2)
        return changed, None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        d_scores = _softmax_derivative(cotangent @ value.mT, weights) * ctx.scale
        return d_scores @ key, d_scores.mT @ query, weights.mT @ cotangent, None, None, None


def _softmax_derivative(change: Tensor, weights: Tensor) -> Tensor:
    """The derivative of the softmax times a change of scores or weights.

    It is a symmetric matrix for each row.
    """
    return torch._softmax_backward_data(change, weights, -1, weights.dtype)
