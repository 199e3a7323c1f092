"""What all tests have in common."""

import os

import pytest
import torch
import torch.utils.deterministic
from hypothesis import HealthCheck, settings

from tests import shape_checks

shape_checks.install()

# Tests run in two processes, on small tensors: threads of their own would only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# How long an example takes says something about the machine, not about the code.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("any machine")


@pytest.fixture
def poisoned(monkeypatch):
    """Memory is NaN before it is written."""

    def empty_matrix(rows, columns, **options):
        return torch.full((rows, columns), torch.nan, **options)

    monkeypatch.setattr("lightning_ntk.kernel.assembly.empty_matrix", empty_matrix)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    assert torch.ones(1).new_empty(3).isnan().all()
    assert torch.empty_like(torch.ones(3)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
