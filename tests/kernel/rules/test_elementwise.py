import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.kernel.agreement import assert_agrees, assert_every_method_agrees


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class With(nn.Module):
    """One parameter, and the layer whose output it meets."""

    def __init__(self, shape, combine, inner=None):
        super().__init__()
        self.inner = inner or nn.Identity()
        self.parameter = nn.Parameter(torch.randn(shape))
        self.combine = combine

    def forward(self, x):
        return self.combine(self.inner(x), self.parameter)


COMBINE = {
    "x + p": lambda x, p: x + p,
    "p + x": lambda x, p: p + x,
    "x + 3 p": lambda x, p: torch.add(x, p, alpha=3),
    "x * p": lambda x, p: x * p,
    "p * x": lambda x, p: torch.mul(p, x),
    "2 * p": lambda x, p: x * (2 * p),
}


@settings(max_examples=25, deadline=None)
@given(
    combine=st.sampled_from(sorted(COMBINE.keys() - {"2 * p"})),
    samples=st.integers(1, 5),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    data=st.data(),
)
def test_any_broadcast_shape(combine, samples, shape, data):
    own = [data.draw(st.sampled_from([1, size])) for size in shape]
    own = own[data.draw(st.integers(0, len(own))) :]
    leading = [1] if len(own) == len(shape) and data.draw(st.booleans()) else []
    assert_agrees(With(leading + own, COMBINE[combine]), randn(samples, *shape))


@pytest.mark.parametrize("combine", ["x + p", "x * p"])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (1, 3, 4), (3, 1), ()])
def test_both_methods(monkeypatch, combine, shape):
    network = With(shape, COMBINE[combine], nn.Linear(2, 4))
    assert_every_method_agrees(monkeypatch, network, randn(5, 3, 2))


def test_samples_on_the_second_axis():
    network = With((3, 1, 4), lambda x, p: (x.transpose(0, 1) + p).transpose(0, 1))
    assert_agrees(network, randn(5, 3, 4))


def test_scaled_parameter_has_no_samples_and_is_contracted():
    assert_agrees(With((4,), COMBINE["2 * p"]), randn(5, 4), contracted=["parameter"])


SELECT = {
    "first positions": lambda p: p[:3],
    "middle positions": lambda p: p[1:4],
    "every second": lambda p: p[::2],
    "narrow": lambda p: p.narrow(0, 2, 3),
    "with an axis": lambda p: p.unsqueeze(0)[:, :3],
    "expanded": lambda p: p[:3].expand(1, -1, -1),
    "rows in disorder": lambda p: p.view(5, 2, 2).flatten(1)[:3],
    "columns": lambda p: p.t()[:, :3].transpose(0, 1),
    "one row": lambda p: p[2],
    "two chunks": lambda p: p.chunk(2)[0] + p[2:].narrow(0, 0, 3),
}


@pytest.mark.parametrize("select", sorted(SELECT.keys() - {"two chunks"}))
@pytest.mark.parametrize("combine", ["x + p", "x * p"])
def test_selected_positions(monkeypatch, select, combine):
    network = With((5, 4), lambda x, p: COMBINE[combine](x, SELECT[select](p)), nn.Linear(2, 4))
    assert_every_method_agrees(monkeypatch, network, randn(6, 3, 2))


def test_sum_of_two_selections_is_contracted():
    network = With((5, 4), lambda x, p: x + SELECT["two chunks"](p), nn.Linear(2, 4))
    assert_agrees(network, randn(6, 3, 2), contracted=["parameter"])


def test_detached_selection_has_no_gradient():
    network = With((5, 4), lambda x, p: x + p[:3].detach() + p[2:].data, nn.Linear(2, 4))
    assert_agrees(network, randn(6, 3, 2), contracted=["parameter"])


@pytest.mark.parametrize(
    "multiply",
    [
        lambda x, w: x @ w.T,
        lambda x, w: torch.matmul(x, w.t()),
        lambda x, w: nn.functional.linear(x, w[:3]) * 2,
        lambda x, w: torch.cat([nn.functional.linear(x, part) for part in w.split([3, 2])], -1),
        lambda x, w: nn.functional.linear(x, w[1:4]) + nn.functional.linear(x.tanh(), w[2:]),
        lambda x, w: nn.functional.linear(x[..., :3], w[:, :3]),
        lambda x, w: x @ w.reshape(4, 5),
    ],
)
def test_parts_of_a_weight(monkeypatch, multiply):
    network = With((5, 4), multiply, nn.Linear(2, 4))
    assert_every_method_agrees(monkeypatch, network, randn(6, 3, 2))


def test_root_mean_square_norm_by_hand():
    def norm(x, p):
        return p * x * x.square().mean(-1, keepdim=True).add(1e-5).rsqrt()

    assert_agrees(With((4,), norm, nn.Linear(2, 4)), randn(5, 3, 2))
