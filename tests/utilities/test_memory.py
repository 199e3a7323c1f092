"""Memory for large matrices."""

import pytest
import torch

from lightning_ntk.utilities.memory import available_memory, empty_matrix


@pytest.mark.parametrize("rows", [3, 4096])  # the second is above the size from which huge pages are used
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrices_of_any_size_are_ordinary_tensors(rows: int, dtype: torch.dtype) -> None:
    matrix = empty_matrix(rows, 4100, dtype=dtype, device=torch.device("cpu"))
    assert matrix.shape == (rows, 4100)
    assert matrix.dtype == dtype
    matrix.copy_(torch.arange(rows).unsqueeze(1))
    assert torch.equal(matrix[:, 0], torch.arange(rows).to(dtype))
    torch.testing.assert_close(matrix.clone(), matrix)
    assert available_memory() > 0
