import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_ntk import empirical_ntk
from lightning_ntk.data.reference import Reference
from lightning_ntk.kernel import Dense, Outer, compute_kernel, register_rule
from lightning_ntk.kernel.planning import make_plan, verify
from lightning_ntk.kernel.rules.layers import RULES
from lightning_ntk.linearization import Linearization
from tests.kernel.agreement import ALL, assert_agrees, relative_error


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class ResidualNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.block = nn.Sequential(
            nn.Conv2d(4, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4),
        )  # fmt: skip
        self.shortcut = nn.Conv2d(4, 4, 1, stride=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        x = (self.block(x) + self.shortcut(x)).relu_()
        return self.head(x.mean((2, 3)))


class LanguageModel(nn.Module):
    """A GPT-like block: causal attention, and an embedding tied to the output layer."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.places = nn.Parameter(torch.randn(5, 4))
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
        self.attention = nn.Linear(4, 12)
        self.out = nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places[: tokens.shape[1]]
        heads = self.attention(self.norms[0](x)).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norms[1](x))
        return self.head(x)[:, -1]


class Functional(nn.Module):
    """A weight used by its layer, and by its parent in another way."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second((self.first(x) * self.first.weight.sum()).tanh())


def test_residual_network():
    network = ResidualNetwork()
    network.train()(randn(16, 1, 6, 6).float())  # running statistics other than 0 and 1
    assert_agrees(network, randn(4, 1, 6, 6), predict=None, tolerance=1e-8)
    assert network.training


def test_language_model():
    tokens = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(0))
    assert_agrees(LanguageModel(), tokens, predict=None, tolerance=1e-8)


def test_lstm():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(2, 4, num_layers=2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    assert_agrees(Classifier(), randn(4, 5, 2), predict=None, tolerance=1e-8)


def test_weight_used_functionally_is_contracted_and_no_other():
    assert_agrees(Functional(), randn(4, 4), predict=None, contracted=["first.weight"], tolerance=1e-8)


def test_parametrised_weight_is_contracted():
    network = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))
    originals = [f"0.parametrizations.weight.original{i}" for i in (0, 1)]
    assert_agrees(network, randn(4, 3), contracted=originals)


def test_subclass_with_another_forward():
    class Doubled(nn.Linear):
        def forward(self, x):
            return F.linear(x, 2 * self.weight, self.bias)

    assert_agrees(Doubled(3, 4), randn(4, 3), contracted=["weight"])


def test_hooks_that_change_inputs_and_outputs():
    layer = nn.Linear(3, 4)
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    layer.register_forward_hook(lambda module, args, output: output.square())
    assert_agrees(layer, randn(4, 3))


def test_activation_checkpointing():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False))

    module = Checkpointed().double()
    plain = nn.Sequential(module.body, module.head)
    kernels = [empirical_ntk(m, randn(4, 3), method="structured") for m in (module, plain)]
    torch.testing.assert_close(*kernels)


def test_weight_hidden_from_the_rules_is_found_named_and_contracted():
    @torch.jit.script
    def hidden(x, weight):
        return x @ weight

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.second(hidden(self.first(x).tanh(), self.first.weight))

    linearization, rows = Linearization(Hidden().double()), Reference(randn(5, 4))
    seen = make_plan_or_warn(linearization, rows)
    expected = compute_kernel(linearization, rows, method="contraction", memory_limit=ALL)
    assert "first.weight" in seen.contracted
    assert "second.weight" not in seen.contracted
    assert relative_error(compute_quietly(linearization, rows), expected) < 1e-10


def test_wrong_rule_is_found_named_and_contracted(monkeypatch):
    right = RULES[F.linear]

    def wrong(gradients, input, weight, bias=None):
        for tensor, factor in right(gradients, input, weight, bias):
            if len(weight) == 4 and isinstance(factor, Outer):
                factor = Outer(1.01 * factor.inputs, factor.gradients, factor.shape)
            yield tensor, factor

    monkeypatch.setitem(RULES, F.linear, wrong)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs = randn(5, 3)
    with pytest.warns(UserWarning, match=r"`0\.bias`, `0\.weight` disagree with plain autograd"):
        kernel = empirical_ntk(network, inputs, method="structured")
    assert relative_error(kernel, empirical_ntk(network, inputs, method="contraction")) < 1e-10


def test_a_rule_of_ones_own():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return torch.atan2(x, self.scale)

    assert_agrees(Scale(), randn(5, 4), contracted=["scale"])

    @register_rule(torch.atan2)
    def angle(gradients, input, other):
        yield other, Dense((-gradients * input / (input**2 + other**2)).transpose(0, 1))

    try:
        assert_agrees(Scale(), randn(5, 4))
    finally:
        del RULES[torch.atan2]


@pytest.mark.parametrize("memory_limit", [1, 20_000, ALL])
def test_result_does_not_depend_on_the_blocks(memory_limit):
    linearization = Linearization(nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 5)))
    samples = (15, 7) if memory_limit == 1 else (150, 70)  # sample by sample
    rows, columns = (Reference(randn(n, 3).float()) for n in samples)
    for other in (None, columns):
        blocks = compute_kernel(linearization, rows, other, method="structured", memory_limit=memory_limit)
        whole = compute_kernel(linearization, rows, other, method="contraction", memory_limit=ALL)
        assert relative_error(blocks, whole) < 1e-6


def test_two_data_sets_other_weights_and_one_sample():
    network = ResidualNetwork().double()
    params = {name: p + 0.1 for name, p in network.named_parameters()}
    for first, second in ((4, 3), (1, 5), (1, 1)):
        x1, x2 = randn(first, 1, 6, 6), randn(second, 1, 6, 6)
        kernels = [empirical_ntk(network, x1, x2, params=params, method=m) for m in ("structured", "contraction")]
        assert relative_error(*kernels) < 1e-8


def test_products_summed_in_a_wider_type():
    linearization, rows = Linearization(ResidualNetwork()), Reference(randn(6, 1, 6, 6))
    kernels = [
        compute_kernel(linearization, rows, method=m, memory_limit=ALL, dtype=torch.float64)
        for m in ("structured", "contraction")
    ]
    assert {kernel.dtype for kernel in kernels} == {torch.float64}
    assert relative_error(*kernels) < 1e-6  # the Jacobians are of float32
    assert torch.linalg.eigvalsh(kernels[0])[0] > -1e-10 * kernels[0].norm()


def test_module_is_left_as_it_was():
    network = ResidualNetwork().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    hooks = [len(m._forward_hooks) for m in network.modules()]
    empirical_ntk(network, randn(4, 1, 6, 6), method="structured")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [len(m._forward_hooks) for m in network.modules()] == hooks
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


def make_plan_or_warn(linearization, rows):
    with pytest.warns(UserWarning, match=r"`first\.weight`.* disagree with plain autograd"):
        return verify(make_plan(linearization, rows))


def compute_quietly(linearization, rows):
    with pytest.warns(UserWarning, match="disagree"):
        return compute_kernel(linearization, rows, method="structured", memory_limit=ALL)
