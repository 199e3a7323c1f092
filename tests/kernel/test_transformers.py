"""The kernel of some outputs of transformers, chosen by `predict`: label words, the class token, the last position."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import TensorDataset

from lightning_ntk import empirical_ntk
from tests.training_steps.test_families import bert, exactly, gpt2, llama

pytest.importorskip("transformers")


def label_words(module: nn.Module, tokens: Tensor) -> Tensor:
    return module(input_ids=tokens).logits[:, -1, [2, 5]]


def class_token(module: nn.Module, tokens: Tensor) -> Tensor:
    return module.bert(input_ids=tokens).last_hidden_state[:, 0, :3]


def last_position(module: nn.Module, tokens: Tensor) -> Tensor:
    return module(input_ids=tokens).logits[:, -1]


@pytest.mark.parametrize(
    ("make", "predict"), [(gpt2, label_words), (bert, class_token), (llama, last_position)],
    ids=["tied label words", "class token", "last position"],
)  # fmt: skip
def test_the_kernel_of_chosen_outputs(
    make: Callable[[], nn.Module], predict: Callable[[nn.Module, Any], Tensor]
) -> None:
    with exactly():
        seed_everything(0, verbose=False)
        module, tokens = make().double().eval(), torch.randint(1, 11, (4, 5))
        kernel = empirical_ntk(module, TensorDataset(tokens), predict=predict)
        params = {name: p.detach() for name, p in module.named_parameters()}

        class Predictor(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.module = module

            def forward(self, tokens: Tensor) -> Tensor:
                return predict(self.module, tokens)

        def outputs(*values: Tensor) -> Tensor:
            named = {f"module.{name}": value for name, value in zip(params, values, strict=True)}
            return functional_call(Predictor(), named, (tokens,)).flatten()

        rows = torch.autograd.functional.jacobian(outputs, tuple(params.values()), vectorize=True)
    jacobian = torch.cat([row.flatten(1) for row in rows], 1)
    torch.testing.assert_close(kernel, jacobian @ jacobian.T, rtol=1e-10, atol=1e-12)
