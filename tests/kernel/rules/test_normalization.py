import pytest
import torch
from torch import nn

from tests.kernel.agreement import assert_agrees


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


CASES = {
    "layer, vector": (nn.LayerNorm(4), (3, 4)),
    "layer, sequence": (nn.LayerNorm(4), (3, 5, 4)),
    "layer, image": (nn.LayerNorm((2, 3, 3)), (4, 2, 3, 3)),
    "layer, no bias": (nn.LayerNorm(4, bias=False), (3, 5, 4)),
    "rms": (nn.RMSNorm(4), (3, 5, 4)),
    "group": (nn.GroupNorm(2, 4), (3, 4, 3, 3)),
    "group, vector": (nn.GroupNorm(2, 4), (3, 4)),
    "instance": (nn.InstanceNorm1d(3, affine=True), (4, 3, 5)),
    "instance, running statistics": (nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (4, 3, 2, 2)),
    "batch, vector": (nn.BatchNorm1d(4), (3, 4)),
    "batch, sequence": (nn.BatchNorm1d(4), (3, 4, 5)),
    "batch, image": (nn.BatchNorm2d(2), (3, 2, 3, 3)),
    "batch, volume": (nn.BatchNorm3d(2), (3, 2, 2, 2, 2)),
    "prelu, one slope": (nn.PReLU(), (3, 4, 5)),
    "prelu, one a channel": (nn.PReLU(4), (3, 4, 5)),
    "prelu, vector": (nn.PReLU(4), (3, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_normalization(case):
    layer, shape = CASES[case]
    for name, buffer in layer.named_buffers():
        if name.startswith("running"):
            buffer.uniform_(0.5, 2)
    assert_agrees(layer, randn(*shape))
