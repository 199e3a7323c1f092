"""The panel of regimes against brute force: the explicit Jacobian, and the loss's own Hessian in the outputs."""

import pytest
import torch
from torch import Tensor, nn

from lightning_ntk import Linearization
from lightning_ntk.comparison.regimes import RegimePanel
from lightning_ntk.data.reference import Reference
from lightning_ntk.dynamics.sgd import SGDSettings
from tests.problems import LinearModel, make


def moved(network: str, **options: int) -> tuple[nn.Module, Linearization, Tensor, Tensor, dict[str, Tensor]]:
    """A network, its linearization at other weights and buffers than it has, data, and the weights and buffers."""
    module, inputs, targets = make(network, **options)
    linearization = Linearization(module)
    with torch.no_grad():
        for tensor in [*(p for p in module.parameters() if p.requires_grad), *module.buffers()]:
            tensor.add_(0.1) if tensor.is_floating_point() else tensor.add_(1)
    return module, linearization, inputs, targets, {**dict(module.named_parameters()), **dict(module.named_buffers())}


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets)


def center(samples: int, outputs: int) -> Tensor:
    return torch.kron(torch.eye(samples) - 1 / samples, torch.eye(outputs)).double()


@pytest.mark.parametrize("network", ["mlp", "conv", "tied", "frozen", "unused"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_complete_basis_gives_the_numbers_of_the_dense_kernel(network: str, outputs: int) -> None:
    """With as many vectors as the kernel has rows nothing is estimated, at the weights and buffers of w_t, by layer too."""
    module, linearization, inputs, targets, weights = moved(network, outputs=outputs, samples=7)
    panel = RegimePanel(linearization, Reference((inputs, targets), batch_size=4), nn.MSELoss(), random=40, products=25)
    scalars = panel.measure(weights, SGDSettings(lr=0.3, momentum=0.5))
    jacobian = LinearModel(module, inputs).jacobian
    kernel, centering = jacobian @ jacobian.T, center(7, outputs)
    around, around_targets = centering @ kernel @ centering, centering @ targets.flatten()
    largest = 2 / targets.numel() * torch.linalg.eigvalsh(kernel)[-1]
    expected = {
        "trace": kernel.trace(),
        "effective_rank": kernel.trace() ** 2 / kernel.square().sum(),
        "alignment": targets.flatten() @ kernel @ targets.flatten() / kernel.norm() / targets.square().sum(),
        "centered_alignment": around_targets @ around @ around_targets / around.norm() / around_targets.square().sum(),
        "curvature": largest,
        "edge": 0.3 * largest / (2 * 1.5),
    }
    model = LinearModel(module, inputs)
    for layer in {name.rpartition(".")[0] for name in model.names}:
        parts = jacobian.split([shape.numel() for shape in model.shapes], 1)
        own = torch.cat(
            [part for name, part in zip(model.names, parts, strict=True) if name.rpartition(".")[0] == layer], 1
        )
        own = own @ own.T
        aligned = targets.flatten() @ own @ targets.flatten() / own.norm() / targets.square().sum()
        expected[f"layer/{layer}/alignment"] = torch.nan_to_num(aligned)
        own = centering @ own @ centering
        aligned = around_targets @ own @ around_targets / own.norm() / around_targets.square().sum()
        expected[f"layer/{layer}/centered_alignment"] = torch.nan_to_num(aligned)
    for name, value in expected.items():
        for suffix in ("", "_low", "_high"):
            assert scalars[f"regime/{name}{suffix}"] == pytest.approx(value.item(), rel=1e-9), name + suffix


def test_curvature_is_that_of_the_gauss_newton_matrix() -> None:
    module, linearization, inputs, _, weights = moved("mlp")
    labels = torch.arange(11) % 3
    panel = RegimePanel(linearization, Reference((inputs, labels)), cross_entropy, products=40)
    model = LinearModel(module, inputs)
    outputs = model.outputs.clone().requires_grad_()
    hessian = torch.autograd.functional.hessian(lambda f: cross_entropy(f, labels), outputs).reshape(33, 33)
    expected = torch.linalg.eigvalsh(model.jacobian.T @ hessian @ model.jacobian)[-1].item()
    scalars = panel.measure(weights)
    assert scalars["regime/curvature"] == pytest.approx(expected, rel=1e-9)
    halves = []
    for half in (range(0, 11, 2), range(1, 11, 2)):
        rows = [3 * i + k for i in half for k in range(3)]
        root = model.jacobian[rows].T @ (hessian[rows][:, rows] * 11 / len(half)) @ model.jacobian[rows]
        halves.append(torch.linalg.eigvalsh(root)[-1].item())
    assert scalars["regime/curvature_of_halves"] == pytest.approx(sum(halves) / 2, rel=1e-6)
    assert "regime/edge" not in panel.measure(weights)


def test_features_and_activations() -> None:
    """Those of the samples' own layers: at w_0 with the buffers of the capture, at w_t with those of w_t."""
    module, linearization, inputs, targets, weights = moved("conv", samples=40)
    panel = RegimePanel(linearization, Reference((inputs, targets), batch_size=16), nn.MSELoss())
    scalars = panel.measure(weights)
    at_start = make("conv", samples=40)[0].eval()
    module.eval()

    def layers(network: nn.Module) -> tuple[Tensor, ...]:
        convolved = network.conv(inputs.reshape(-1, 1, 2, 3))
        normed = network.norm(convolved)
        features = normed.relu().flatten(1)
        return convolved, normed, features, network.head(features)

    with torch.no_grad():
        now, start = layers(module), layers(at_start)
    for name, index in (("conv", 0), ("norm", 1), ("head", 3)):
        expected = (now[index] - start[index]).norm() / start[index].norm()
        assert scalars[f"regime/layer/{name}/activation_change"] == pytest.approx(expected.item(), rel=1e-9)
    centering = center(40, 1)
    projection = now[3] @ torch.linalg.pinv(now[3])
    kernels = [centering @ k @ centering for k in (now[2] @ now[2].T, projection)]
    expected = 1 - (kernels[0] * kernels[1]).sum() / kernels[0].norm() / kernels[1].norm()
    assert scalars["regime/low_rank"] == pytest.approx(expected.item(), rel=1e-9)


def test_intervals_hold_the_dense_kernels_numbers() -> None:
    """A kernel of 160 rows from a third as many vectors: the intervals are narrow, and repeat with the seed."""
    module, linearization, inputs, targets, weights = moved("mlp", outputs=5, samples=64)
    reference = Reference((inputs, targets))
    scalars = RegimePanel(linearization, reference, nn.MSELoss(), seed=1).measure(weights)
    assert scalars == RegimePanel(linearization, reference, nn.MSELoss(), seed=1).measure(weights)
    jacobian = LinearModel(module, inputs[::2]).jacobian
    kernel = jacobian @ jacobian.T
    for name, value in (("trace", kernel.trace()), ("effective_rank", kernel.trace() ** 2 / kernel.square().sum())):
        low, high = scalars[f"regime/{name}_low"], scalars[f"regime/{name}_high"]
        assert low < scalars[f"regime/{name}"] < high < 1.5 * low
        assert low < value < high
