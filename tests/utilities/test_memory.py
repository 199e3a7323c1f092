"""Memory for large matrices."""

import os
import resource
from pathlib import Path

import pytest
import torch

from lightning_ntk import empirical_ntk
from lightning_ntk.utilities.memory import _cgroup_memory, available_memory, empty_matrix


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


@pytest.mark.parametrize(("version", "own"), [(1, True), (2, True), (1, False), (2, False)])
def test_what_cgroups_leave(tmp_path: Path, version: int, own: bool) -> None:
    """Of the group itself and of those around it, without the files that the system keeps in memory."""
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    cached = "inactive_file 30\n" if version == 2 else "inactive_file 7\ntotal_inactive_file 30\n"
    line = "0::/job/step" if version == 2 else "5:cpu,memory:/job/step\n4:pids:/else"
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(line + "\n")
    mount = tmp_path / "sys/fs/cgroup" / ("" if version == 2 else "memory")
    for path, limit in {".": "1000", "job": "500", "job/step": "max"}.items() if own else {".": "1000"}.items():
        (mount / path).mkdir(parents=True, exist_ok=True)
        for name, content in zip((*names, "memory.stat"), (limit, "200", f"active_file 9\n{cached}"), strict=True):
            (mount / path / name).write_text(content)
    assert list(_cgroup_memory(tmp_path)) == ([330, 830] if own else [830])
    assert list(_cgroup_memory(tmp_path / "nowhere")) == []


def test_systems_that_say_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without cgroups and limits, as on macOS; and without `sysconf`, as on Windows."""

    def no_file(*_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", no_file)
    monkeypatch.setattr("lightning_ntk.utilities.memory._cgroup_memory", lambda root: _cgroup_memory(root / "nowhere"))
    monkeypatch.setattr("lightning_ntk.utilities.memory._process_memory", lambda: iter(()))
    assert available_memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    monkeypatch.delattr(os, "sysconf")
    assert available_memory() == 1 << 32


def test_the_limit_of_the_process_counts() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 28), hard))
    try:
        assert 0 < available_memory() <= 1 << 28
        with pytest.raises(
            MemoryError, match=r"20000 x 20000 numbers needs 3\.0 GiB, which cannot be allocated"
        ) as caught:
            empty_matrix(20_000, 20_000, dtype=torch.float64, device=torch.device("cpu"))
        assert isinstance(caught.value.__cause__, OSError)
        with pytest.raises(MemoryError, match=r"10000 samples .* needs 762\.9 MiB but .* are free"):
            empirical_ntk(torch.nn.Linear(3, 1).double(), torch.ones(10_000, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
