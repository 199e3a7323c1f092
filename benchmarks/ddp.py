"""The kernel captured by two processes, next to one: one thread each, gloo.

    python benchmarks/ddp.py [--output benchmarks/results/ddp.json]

The networks are those of `models.py`. Needs two free cores. Times are those of the slower process, from a common start until it
holds the whole kernel.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from models import MODELS, digits

from lightning_ntk.kernel import compute_kernel
from lightning_ntk.linearization import Linearization
from lightning_ntk.reference import Reference
from lightning_ntk.shards import ALONE, Shards

CASES = (("MLP", 1000), ("CNN", 512), ("CNN", 1024))
REPEATS = 3


def capture(name: str, samples: int, shards: Shards) -> dict[str, float]:
    """Median seconds of several captures after one that warms up, and the kernel's sum, which is the same everywhere."""
    torch.manual_seed(0)
    linearization, reference = Linearization(MODELS[name]().eval()), Reference(digits(name, samples)[0])
    times, total = [], 0.0
    for _ in range(REPEATS + 1):
        if shards.size > 1:
            dist.barrier()
        started = time.perf_counter()
        kernel = compute_kernel(linearization, reference, shards=shards)
        times.append(-shards.minimum(started - time.perf_counter()))
        total = kernel.sum(dtype=torch.float64).item()
        del kernel
    return {"seconds": statistics.median(times[1:]), "sum": total}


def main() -> None:
    """Measures one process, starts two, prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "ddp.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if "LOCAL_RANK" in os.environ:
        dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
        shards = Shards.of_process_group(torch.device("cpu"))
        results = {f"{name}, N = {samples}": capture(name, samples, shards) for name, samples in CASES}
        if shards.rank == 0:
            print(json.dumps(results))
        dist.destroy_process_group()
        return
    alone = {f"{name}, N = {samples}": capture(name, samples, ALONE) for name, samples in CASES}
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
    results = {}
    for title, one in alone.items():
        two = together[title]
        assert abs(two["sum"] - one["sum"]) <= 1e-5 * abs(one["sum"]), title
        results[title] = {
            "one process": one["seconds"],
            "two processes": two["seconds"],
            "speed-up": one["seconds"] / two["seconds"],
        }
        print(f"{title:<16}" + "   ".join(f"{key} {value:.4g}" for key, value in results[title].items()), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1}
    arguments.output.write_text(json.dumps({"machine": machine, "seconds": results}, indent=2) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
