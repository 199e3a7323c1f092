"""The kernel captured by two processes, next to one: one thread each, gloo. Run as a script, it is one of the processes."""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from models import MODELS, digits
from timing import Comparison

from lightning_ntk.data.reference import Reference
from lightning_ntk.kernel import compute_kernel
from lightning_ntk.linearization import Linearization
from lightning_ntk.utilities.distributed import ALONE, Processes

CASES = (("MLP", 1000), ("CNN", 512), ("CNN", 1024), ("transformer", 512))
REPEATS = 3


def two_processes() -> Iterator[Comparison]:
    """Seconds of the slower of two processes, from a common start until it holds the whole kernel, and of one process."""
    alone = [capture(name, samples, ALONE) for name, samples in CASES]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | address | {"LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    together = json.loads(outputs[0].splitlines()[-1])
    for (name, samples), one, two in zip(CASES, alone, together, strict=True):
        assert abs(two["sum"] - one["sum"]) <= 1e-5 * abs(one["sum"]), name
        case = f"kernel by two processes, {name}, N = {samples}"
        yield Comparison(case, two["seconds"], "one process", one["seconds"])


def capture(name: str, samples: int, processes: Processes) -> dict[str, float]:
    """Median seconds of several captures after one that warms up, and the kernel's sum, which is the same everywhere."""
    torch.manual_seed(0)
    linearization, reference = Linearization(MODELS[name]().eval()), Reference(digits(name, samples)[0])
    times, total = [], 0.0
    for _ in range(REPEATS + 1):
        if processes.size > 1:
            dist.barrier()
        started = time.perf_counter()
        kernel = compute_kernel(linearization, reference, processes=processes)
        times.append(-processes.minimum(started - time.perf_counter()))
        total = kernel.sum(dtype=torch.float64).item()
        del kernel
    return {"seconds": statistics.median(times[1:]), "sum": total}


def main() -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    processes = Processes.of_process_group(torch.device("cpu"))
    results = [capture(name, samples, processes) for name, samples in CASES]
    if processes.rank == 0:
        print(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
