"""Kernels that are symmetric to the last bit, of memory that holds nothing before it is written."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_ntk.data.reference import Reference
from lightning_ntk.kernel import compute_kernel
from lightning_ntk.kernel.planning import make_plan
from lightning_ntk.linearization import Linearization
from tests.kernel.agreement import relative_error
from tests.kernel.test_networks import LanguageModel, ResidualNetwork

SAMPLES = 9
NETWORKS = {
    "mlp": (nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3)), torch.randn(SAMPLES, 6)),
    "convolutions": (ResidualNetwork(), torch.randn(SAMPLES, 1, 6, 6)),
    "transformer": (LanguageModel(), torch.randint(0, 7, (SAMPLES, 5))),
}


@pytest.mark.parametrize("tile", [(1, 1), (512, 2560)], ids=str)
@pytest.mark.parametrize("memory_limit", [1, 1 << 16, 1 << 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["structured", "contraction"])
@pytest.mark.parametrize("network", NETWORKS)
def test_symmetric_to_the_last_bit(monkeypatch, network, method, dtype, memory_limit, tile):
    monkeypatch.setattr("lightning_ntk.kernel.assembly._TILE_ROWS", tile[0])
    monkeypatch.setattr("lightning_ntk.kernel.assembly._TILE_COLUMNS", tile[1])
    module, inputs = NETWORKS[network]
    options = {"method": method, "memory_limit": memory_limit, "dtype": dtype}
    kernel = compute_kernel(Linearization(module), Reference(inputs), **options)
    assert torch.equal(kernel, kernel.T)
    assert kernel.diagonal().gt(0).all()


@pytest.mark.parametrize("kernels", ["COMPATIBLE", "AVX2"])
def test_symmetric_to_the_last_bit_on_other_processors(kernels):
    """MKL reads the variable once, when it is loaded."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--numprocesses=0", __file__]
    command += ["-k", "test_symmetric_to_the_last_bit and float32 and (mlp or convolutions) and not processors"]
    result = subprocess.run(command, env=os.environ | {"MKL_CBWR": kernels}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "24 passed" in result.stdout


@pytest.mark.parametrize("memory_limit", [1, 1 << 32])
@pytest.mark.parametrize("method", ["structured", "contraction"])
@pytest.mark.parametrize("network", NETWORKS)
def test_no_memory_is_read_before_it_is_written(poisoned, network, method, memory_limit):
    module, inputs = NETWORKS[network]
    linearization, rows, columns = Linearization(module), Reference(inputs), Reference(inputs[:5])
    torch.use_deterministic_algorithms(False)
    expected = compute_kernel(linearization, rows, dtype=torch.float64)
    torch.use_deterministic_algorithms(True)
    options = {"method": method, "memory_limit": memory_limit, "dtype": torch.float64}
    assert relative_error(compute_kernel(linearization, rows, **options), expected) < 1e-5
    rectangle = compute_kernel(linearization, rows, columns, **options)
    assert relative_error(rectangle, expected[:, : rectangle.shape[1]]) < 1e-5


def test_no_memory_is_read_where_the_outputs_are_detached_from_layers(poisoned):
    """The layer's part is zero, and that of the parameter that has no rule is not."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.layer(x).detach() * torch.sin(self.scale)

    torch.manual_seed(0)
    network, inputs = Network().double(), torch.randn(5, 4).double()
    linearization, rows = Linearization(network), Reference(inputs)
    assert make_plan(linearization, rows).contracted == ("scale",)  # and not, for its NaN, the layer
    kernel = compute_kernel(linearization, rows)
    outputs = network.layer(inputs).detach() * torch.cos(network.scale).detach()
    jacobian = torch.diag_embed(outputs).flatten(0, 1)
    torch.testing.assert_close(kernel, jacobian @ jacobian.T)
