import torch
from torch import nn

from lightning_ntk.kernel.per_sample import sample_jacobians
from lightning_ntk.linearization import Linearization
from tests.kernel.agreement import outputs_of


def test_operations_for_which_vmap_is_wrong():
    inputs = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    linearization = Linearization(nn.PReLU(4).double(), predict=outputs_of)
    jacobian = sample_jacobians(linearization, inputs)["weight"]
    for sample in range(3):
        for output in range(3):
            row = torch.zeros(1, 3, dtype=torch.float64)
            row[0, output] = 1
            expected = linearization.vjp(row, inputs[sample : sample + 1])["weight"]
            torch.testing.assert_close(jacobian[sample, output], expected)


def test_only_the_named_parameters():
    linearization = Linearization(nn.Linear(3, 2))
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    chosen = sample_jacobians(linearization, inputs, ["bias"])
    assert list(chosen) == ["bias"]
    torch.testing.assert_close(chosen["bias"], sample_jacobians(linearization, inputs)["bias"])
