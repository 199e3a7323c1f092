"""A frozen network stays as it was captured, whatever its forward writes into."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lightning_ntk import Linearization, LinearizedTraining, empirical_ntk
from lightning_ntk.linearization.network import FrozenNetwork
from tests.problems import flatten, mlp, relative_error


class Normalizing(nn.Module):
    """Writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.sub_(0.5).div_(0.5))


class Rectifying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Clamping(nn.Module):
    """Writes into its weights and into a frozen one, as written in place or through `.data`."""

    def __init__(self, data: bool) -> None:
        super().__init__()
        self.body = mlp(3)
        self.scale = nn.Parameter(torch.full((3,), 3.0), requires_grad=False)
        self.data = data

    def forward(self, x: Tensor) -> Tensor:
        weight = self.body[0].weight
        with torch.no_grad():
            (weight.data if self.data else weight).clamp_(-0.1, 0.1)
            (self.scale.data if self.data else self.scale).mul_(0.9)
        return self.body(x) * self.scale


class Looking(nn.Module):
    """Rescales the rows of a table that it looks up to a norm of at most 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, max_norm=0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).tanh())


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 3)
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x) * self.calls


CASES = {
    "input": Normalizing,
    "input of a layer": Rectifying,
    "weights": lambda: Clamping(data=False),
    "weights through data": lambda: Clamping(data=True),
    "embedding": Looking,
    "buffer": Counting,
}


def problem(case: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    module = CASES[case]().double()
    inputs = torch.tensor([0, 3, 5, 3, 6]) if case == "embedding" else torch.randn(5, 6).double()
    return module, inputs, torch.randn(5, 3).double()


def explicit(linearization: Linearization, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and Jacobian by plain autograd, every pass on copies of everything."""

    def outputs(weights: dict[str, Tensor]) -> Tensor:
        state = {n: v.clone() for n, v in (linearization._frozen | linearization.buffers | weights).items()}
        return torch.func.functional_call(linearization.module, state, (inputs.clone(),))

    leaves = {name: p.clone().requires_grad_() for name, p in linearization.params.items()}
    rows = [torch.autograd.grad(f, list(leaves.values()), retain_graph=True) for f in outputs(leaves).flatten()]
    return outputs(leaves).detach(), torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.parametrize("first", ["predict", "vjp", "jvp", "both"])
@pytest.mark.parametrize("case", CASES)
def test_what_a_forward_overwrites_stays(case: str, first: str) -> None:
    module, inputs, _ = problem(case)
    module.eval()
    before = [value.clone() for value in (inputs, *module.state_dict().values())]
    linearization = Linearization(module)
    tangent = {name: torch.randn_like(p) for name, p in linearization.params.items()}
    cotangent = torch.randn(5, 3).double()
    outputs, jacobian = explicit(linearization, inputs)
    pushed, pulled = (jacobian @ flatten(tangent)).reshape(5, 3), jacobian.T @ cotangent.flatten()
    passes = {
        "predict": lambda: torch.testing.assert_close(linearization.predict(inputs), outputs),
        "vjp": lambda: torch.testing.assert_close(flatten(linearization.vjp(cotangent, inputs)), pulled),
        "jvp": lambda: torch.testing.assert_close(linearization.jvp(tangent, inputs), pushed),
        "both": lambda: torch.testing.assert_close(
            flatten(linearization.predict_jvp_and_vjp(tangent, inputs, lambda f, jv: cotangent)), pulled
        ),
    }
    for name in (first, *passes, first):
        passes[name]()
    live = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert torch.equal(linearization.predict_at(live, inputs), linearization.predict(inputs))
    captured = linearization.state_dict()
    for value, old in zip((inputs, *module.state_dict().values()), before, strict=True):
        assert torch.equal(value, old)
    for name, value in module.state_dict().items():
        assert torch.equal(next(part[name] for part in captured.values() if name in part), value)


@pytest.mark.filterwarnings("ignore:Per-sample Jacobians|There is a performance drop|The kernel|.*by contraction")
@pytest.mark.parametrize("method", ["structured", "contraction"])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_of_a_network_that_overwrites(case: str, method: str) -> None:
    module, inputs, targets = problem(case)
    module.eval()
    before = [value.clone() for value in (inputs, *module.state_dict().values())]
    _, jacobian = explicit(Linearization(module), inputs)
    kernel = empirical_ntk(module, inputs, method=method)
    assert relative_error(kernel, jacobian @ jacobian.T) < 1e-12
    training = LinearizedTraining(module, (inputs, targets), lr=0.01, progress=False)
    assert relative_error(training.ntk, jacobian @ jacobian.T) < 1e-12
    for value, old in zip((inputs, *module.state_dict().values()), before, strict=True):
        assert torch.equal(value, old)


@pytest.mark.parametrize("data", [False, True], ids=["in place", "through data"])
def test_weights_that_are_overwritten_for_some_batches_only(data: bool) -> None:
    """Weights that were given stay; the capture is lost, and says so."""

    def predict(module: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = module[0].weight
            if len(x) == 1 or weight.abs().max() > 1:
                (weight.data if data else weight).clamp_(-0.1, 0.1)
        return module(x)

    network = FrozenNetwork(mlp(3), predict=predict)
    network.predict(torch.randn(5, 6))
    live = {name: torch.full_like(value, 2) for name, value in network.params.items()}
    network.predict_at(live, torch.randn(5, 6))
    assert all((value == 2).all() for value in live.values())
    if not data:
        with pytest.raises(RuntimeError, match=r"did so for this batch .* Let it write into copies"):
            network.predict(torch.randn(1, 6))


def test_weights_are_copied_only_where_they_are_overwritten_and_inputs_always() -> None:
    seen = []

    def predict(module: nn.Module, x: Tensor) -> Tensor:
        seen.append((x.data_ptr(), module[0].weight.data_ptr()))
        return module(x)

    inputs = torch.randn(5, 6)
    network = FrozenNetwork(mlp(3), predict=predict)
    own = network.params["0.weight"].data_ptr()
    for _ in range(3):
        network.predict(inputs)
    assert all(data != inputs.data_ptr() for data, _ in seen)
    assert seen[0][1] != own
    assert [weight for _, weight in seen[1:]] == [own, own]


def test_a_device_without_float64_is_refused() -> None:
    with FakeTensorMode():
        module = nn.Module()
        module.weight = nn.Parameter(torch.empty(3, 6, device="mps"))
        with pytest.raises(ValueError, match=r"\"mps\" has none\. Move the module to the CPU"):
            Linearization(module)


def test_a_submodule_with_two_names_stays_in_its_module() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
            self.body = nn.Sequential(self.encoder, nn.Tanh(), nn.Linear(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    module, x = Shared().double(), torch.randn(5, 6).double()
    before = {name: id(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    outputs = module.eval()(x)
    linearization = Linearization(module)
    with torch.no_grad():
        module.encoder[0].weight.mul_(2)
    assert torch.equal(linearization.predict(x), outputs)
    tangent, cotangent = {n: torch.randn_like(p) for n, p in linearization.params.items()}, torch.randn_like(outputs)
    pulled = sum((gradient * tangent[n]).sum() for n, gradient in linearization.vjp(cotangent, x).items())
    assert (linearization.jvp(tangent, x) * cotangent).sum().item() == pytest.approx(pulled.item(), rel=1e-12)
    assert before == {name: id(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
