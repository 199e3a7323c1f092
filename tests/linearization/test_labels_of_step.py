"""The loss function of a step that has no pairs: found with its outputs and labels, or refused with a reason."""

import copy
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ntk import Linearization
from lightning_ntk.linearization.batch_loss import PairLoss
from lightning_ntk.linearization.labels_of_step import labeled_pair
from lightning_ntk.linearization.pair_of_step import NoPairError
from lightning_ntk.linearization.step import StepLinearization
from tests.problems import flatten, relative_error

Loss = Callable[[Tensor, dict[str, Tensor]], Tensor]


class Tagger(nn.Module):
    """Scores of tokens, and of sentences their mean over what is no padding."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.dropout, self.head = nn.Embedding(11, 5), nn.Dropout(dropout), nn.Linear(5, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.head(self.dropout(self.embed(ids).tanh()))
        return tokens, (tokens * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(4) < torch.tensor([[4], [2], [3], [1], [4]])
    labels = torch.tensor([2, 0, 1, 1, 2])
    return {
        "input_ids": torch.randint(1, 11, (5, 4), generator=generator), "attention_mask": mask.long(), "index": labels.clone(),
        "labels": labels, "several": torch.eye(3)[labels].double(), "value": torch.randn(5, generator=generator).double(),
    }  # fmt: skip


def step_of(loss: Loss, *, tokens: bool = False, **options: Any) -> StepLinearization:
    torch.manual_seed(0)
    module = Tagger(**options).double()
    shadow = copy.deepcopy(module)
    return StepLinearization(
        shadow, lambda b: loss(shadow(b["input_ids"], b["attention_mask"])[0 if tokens else 1], dict(b))
    )


FOUND: dict[str, Loss] = {
    "classes": lambda f, b: F.cross_entropy(f.view(-1, 3), b["labels"].view(-1)),
    "weighted classes": lambda f, b: nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]).double(), label_smoothing=0.1)(
        f, b["labels"]
    ),
    "several labels": lambda f, b: nn.BCEWithLogitsLoss()(f, b["several"]),
    "a value": lambda f, b: F.mse_loss(f[:, 0].squeeze(), b["value"].squeeze()),
}


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("name", FOUND)
def test_the_pair_has_the_gradient_of_the_step(name: str, kind: type) -> None:
    step = step_of(FOUND[name])
    pair = labeled_pair(step, kind(batch()))
    linearization = Linearization(step.module, predict=pair.predict)
    loss = PairLoss(linearization, pair.loss, unpack=pair.unpack)
    tangent = {name: 0.3 * torch.randn_like(value) for name, value in step.params.items()}
    other = {key: value[:3] for key, value in batch().items()}
    expected = step.gradient(kind(other), tangent)
    assert expected is not None
    assert relative_error(flatten(loss.gradient(kind(other), tangent)), flatten(expected)) < 1e-13


@pytest.mark.parametrize(
    ("loss", "options", "reason"),
    [
        (lambda f, b: F.cross_entropy(f.flatten(0, 1), b["input_ids"].flatten() % 3), {"tokens": True}, "of the targets"),
        (lambda f, b: F.mse_loss(f, torch.zeros_like(f)), {}, "transformation of the targets"),
        (lambda f, b: F.cross_entropy(f.view(-1, 3), b["attention_mask"].view(-1)), {"tokens": True}, "no outputs .samples"),
        (lambda f, b: F.cross_entropy(f, b["labels"]) + f.square().mean(), {}, "does not return one loss function"),
        (lambda f, b: F.cross_entropy(f, b["labels"]), {"dropout": 0.5}, "as with dropout"),
        (lambda f, b: F.cross_entropy(2 * f, b["labels"]).relu(), {}, "does not return one loss function"),
        (lambda f, b: F.cross_entropy(5 * f.tanh(), b["labels"]), {}, "transformation of the outputs that are linearized"),
    ],
    ids=["computed targets", "no target", "tokens", "two losses", "dropout", "changed loss", "changed outputs"],
)  # fmt: skip
def test_says_why_there_is_none(loss: Loss, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(NoPairError, match=reason):
        labeled_pair(step_of(loss, **options), batch())
