"""The kernel of language models, whose last layer has more outputs than features and may be the embedding's, in float64."""

import pytest
import torch
from torch import nn

from lightning_ntk.data.reference import Reference
from lightning_ntk.kernel import compute_kernel
from lightning_ntk.kernel.planning import make_plan, verify
from lightning_ntk.linearization import Linearization
from tests.kernel.agreement import ALL, relative_error

SAMPLES, LENGTH = 5, 6


class LanguageModel(nn.Module):
    """Attention to what came before, padding left out, a layer with or without a bias, and a last one tied or not."""

    def __init__(self, vocabulary, width, *, tied=False, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(2 * LENGTH, width)
        self.norm, self.hidden = nn.LayerNorm(width), nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, batch):
        tokens = batch["input_ids"]
        mask = batch["attention_mask"].bool()[:, None, :] & torch.ones(2 * (tokens.shape[1],), dtype=torch.bool).tril()
        h = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        h = h + torch.where(mask, h @ h.mT, -1e9).softmax(2) @ h
        return self.head(h + self.hidden(self.norm(h)).tanh())


def last(module, batch):
    return module(batch)[:, -1]


def last_of_each(module, batch):
    lengths = batch["attention_mask"].sum(1)
    return module(batch)[torch.arange(len(lengths)), lengths - 1]


def two_positions(module, batch):
    return module(batch)[:, -2:].flatten(1)


def words(module, batch):
    return last(module, batch)[:, [2, 0, 3]]


def words_of_each(module, batch):
    return last_of_each(module, batch).gather(1, batch["input_ids"][:, :2])


def probabilities(module, batch):
    return last(module, batch).log_softmax(1)[:, :3]


PREDICTS = [last, last_of_each, two_positions, words, words_of_each, probabilities]


def inputs_of(samples, vocabulary):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, LENGTH + 1, (samples, 1), generator=generator)
    tokens = torch.randint(1, vocabulary, (samples, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}


def agree(module, predict, vocabulary, lr_scales=None):
    """The plan, once the kernels of one data set, block by block, and of two agree with those of explicit Jacobians."""
    linearization = Linearization(module.double(), predict=predict)
    rows, columns = (Reference((inputs_of(n, vocabulary), torch.zeros(n))) for n in (SAMPLES, 3))
    jacobians = [explicit(linearization, data, lr_scales or {}) for data in (rows, columns)]
    for others, right, limit in ((None, jacobians[0], 1), (columns, jacobians[1], ALL)):
        kernel = compute_kernel(linearization, rows, others, memory_limit=limit, lr_scales=lr_scales)
        assert relative_error(kernel, jacobians[0] @ right.T) < 1e-10
    return verify(make_plan(linearization, rows))


def explicit(linearization, data, lr_scales):
    """J D^(1/2), from a backward pass for each row."""
    inputs = data.read(0, len(data)).inputs
    shape = linearization.predict(inputs).shape
    rows = torch.eye(shape.numel(), dtype=torch.float64).view(-1, *shape)
    products = linearization.predict_and_vjp(rows, inputs)[1]
    return torch.stack(
        [torch.cat([lr_scales.get(k, 1.0) ** 0.5 * v.flatten() for k, v in row.items()]) for row in products]
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("predict", PREDICTS)
@pytest.mark.parametrize(
    ("vocabulary", "bias"), [(30, False), (30, True), (7, True)], ids=["words", "bias", "few words"]
)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_every_choice_of_outputs(predict, vocabulary, bias, tied):
    plan = agree(LanguageModel(vocabulary, 8, tied=tied, bias=bias), predict, vocabulary)
    assert not plan.contracted


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "trained", [["head"], ["embedding"], ["hidden", "head"], ["head.bias", "embedding"], ["hidden"]]
)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("predict", [last_of_each, words])
def test_some_parameters_train(predict, tied, trained):
    module = LanguageModel(30, 8, tied=tied, bias=True)
    for name, parameter in module.named_parameters():
        # Of two names for one tensor the first is the parameter's.
        parameter.requires_grad_(any(name.startswith(start) for start in trained))
    agree(module, predict, 30)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("predict", [last, words])
def test_learning_rates_of_their_own(predict, tied):
    scales = {"embedding.weight": 0.5, "head.bias": 2.0, "hidden.weight": 0.25}
    agree(LanguageModel(30, 8, tied=tied, bias=True), predict, 30, scales)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_a_vocabulary_is_read_out_from_the_features(tied):
    module = LanguageModel(30, 8, tied=tied, bias=True).double()
    rows = Reference((inputs_of(SAMPLES, 30), torch.zeros(SAMPLES)))
    assert make_plan(Linearization(module, predict=last), rows).readout is not None
    plan = make_plan(Linearization(module, predict=words), rows)
    assert plan.readout is None
    assert "head.bias" in plan.chosen
    assert all(unit.cost.factor_bytes < module.embedding.weight.nbytes for unit in plan.units)
