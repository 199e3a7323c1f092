"""The judge of the structured kernel: the contraction of per-sample Jacobians, in float64."""

import torch

from lightning_ntk.data.reference import Reference
from lightning_ntk.kernel import compute_kernel
from lightning_ntk.kernel.planning import make_plan, verify
from lightning_ntk.linearization import Linearization

ALL = 1 << 32


def outputs_of(module, inputs):
    """K = 3 outputs, through which every element of the module's result reaches every output."""
    result = module(*inputs) if isinstance(inputs, tuple | list) else module(inputs)
    flat = result.tanh().flatten(1)
    mixing = torch.linspace(-1, 1, 3 * flat.shape[1], dtype=flat.dtype).reshape(flat.shape[1], 3).cos()
    return flat @ mixing


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def assert_agrees(module, inputs, *, predict=outputs_of, contracted=(), tolerance=1e-10, randomize=True, others=None):
    """The kernels agree, and none but the parameters `contracted` went through the contraction."""
    torch.manual_seed(0)
    module = module.double()
    if randomize:  # scales that start as ones and shifts that start as zeros would hide errors
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    linearization = Linearization(module, predict=predict)
    rows = Reference((inputs, torch.zeros(len(_first(inputs)))))
    columns = None if others is None else Reference((others, torch.zeros(len(_first(others)))))
    assert verify(make_plan(linearization, rows, columns)).contracted == tuple(contracted)
    expected = compute_kernel(linearization, rows, columns, method="contraction", memory_limit=ALL)
    for limit in (ALL, 1):  # all samples at once, and one by one
        actual = compute_kernel(linearization, rows, columns, method="structured", memory_limit=limit)
        assert relative_error(actual, expected) < tolerance
    return expected


def assert_every_method_agrees(monkeypatch, module, inputs, **options):
    """As `assert_agrees`, with Gram matrices of positions and with dense Jacobians, whichever is cheaper."""
    for cost in (0.0, 1e12):
        monkeypatch.setattr("lightning_ntk.kernel.costs._POSITIONS_COST", cost)
        monkeypatch.setattr("lightning_ntk.kernel.costs._ELEMENTWISE_COST", cost)
        assert_agrees(module, inputs, **options)


def _first(inputs):
    return inputs[0] if isinstance(inputs, tuple | list) else inputs
