"""Attention on dual numbers against derivatives of its formula."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn import functional as F

from lightning_ntk.utilities import attention
from lightning_ntk.utilities.attention import dual_attention
from lightning_ntk.utilities.contexts import forward_mode

SHAPES = (2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)


def tensors(shapes: tuple[tuple[int, ...], ...] = SHAPES, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def formula(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float) -> Tensor:
    exponentials = torch.exp(query @ key.mT * scale) * allowed
    return exponentials / exponentials.sum(-1, keepdim=True).clamp_min(1e-300) @ value


def holes() -> Tensor:
    mask = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0, 0, 1] = False  # nothing to attend to
    return mask


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, torch.ones(5, 7, dtype=torch.bool)),
        ({"scale": 0.3}, torch.ones(5, 7, dtype=torch.bool)),
        ({"is_causal": True}, torch.ones(5, 7, dtype=torch.bool).tril()),
        ({"attn_mask": holes()}, holes()),
    ],
)
@pytest.mark.parametrize("moved", [(0, 1, 2), (1,)])
def test_derivatives_are_those_of_the_formula(
    options: dict[str, Any], allowed: Tensor, moved: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Tensor | None] = []

    def spy(*args: Any, **kwargs: Any) -> Tensor | None:
        used.append(dual_attention(*args, **kwargs))
        return used[-1]

    monkeypatch.setattr("lightning_ntk.utilities.contexts.dual_attention", spy)
    inputs, tangents = [tensor.requires_grad_() for tensor in tensors()], tensors(seed=1)
    with forward_mode(), dual_level():
        duals = [make_dual(x, t) if i in moved else x for i, (x, t) in enumerate(zip(inputs, tangents, strict=True))]
        result, change = unpack_dual(F.scaled_dot_product_attention(*duals, **options))
    (found,) = used
    assert found is not None
    cotangent = tensors((tuple(result.shape),), seed=2)[0]
    gradients = torch.autograd.grad(result, inputs, cotangent)

    scale = options.get("scale", 1 / math.sqrt(4))
    steps = tuple(t if i in moved else torch.zeros_like(t) for i, t in enumerate(tangents))
    expected, expected_change = torch.func.jvp(lambda *x: formula(*x, allowed, scale), tuple(tensors()), steps)
    again = [tensor.requires_grad_() for tensor in tensors()]
    expected_gradients = torch.autograd.grad(formula(*again, allowed, scale), again, cotangent)
    for own, theirs in zip((result, change, *gradients), (expected, expected_change, *expected_gradients), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-11, atol=1e-13)


def test_what_is_not_covered_is_left_to_pytorch() -> None:
    query, key, value = tensors()
    assert attention.dual_attention(query, key, value) is None  # no tangent
    with dual_level():
        dual = make_dual(query, torch.ones_like(query))
        assert attention.dual_attention(dual, key, value, dropout_p=0.1) is None
        bias = make_dual(torch.zeros(5, 7, dtype=torch.float64), torch.ones(5, 7, dtype=torch.float64))
        assert attention.dual_attention(dual, key, value, attn_mask=bias) is None
        # The composite form sees the derivative of the mask.
        with forward_mode():
            moved = unpack_dual(F.scaled_dot_product_attention(query, key, value, attn_mask=bias))[1]
        assert moved is not None


def test_a_second_derivative_is_refused() -> None:
    query, key, value = tensors()
    query.requires_grad_()
    with dual_level():
        result = unpack_dual(dual_attention(make_dual(query, torch.ones_like(query)), key, value))[0]
    (gradient,) = torch.autograd.grad(result.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
