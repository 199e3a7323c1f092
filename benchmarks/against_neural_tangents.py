"""The kernels of three networks against neural-tangents, on one core.

    python -m venv .venv-peers && .venv-peers/bin/pip install -r benchmarks/peers/requirements.txt
    python benchmarks/against_neural_tangents.py --peer-python .venv-peers/bin/python

Float32, K = 10, N = 128 digits. Both run on the same core, ours before and after the peer; compile time is not counted.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path

import torch
from kernel import seconds
from models import MODELS, digits

from lightning_ntk import empirical_ntk

HERE = Path(__file__).parent


def ours(samples: int, repeats: int) -> dict[str, float]:
    """Median seconds of `empirical_ntk` for each network."""
    times = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        module, inputs = make().eval(), digits(name, samples)[0]
        times[name] = seconds(lambda module=module, inputs=inputs: empirical_ntk(module, inputs), repeats)  # type: ignore[misc]
    return times


def main() -> None:
    """Prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="interpreter that has benchmarks/peers/requirements.txt")
    parser.add_argument("--implementations", nargs="+", default=["structured derivatives"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "against_neural_tangents.json")
    arguments = parser.parse_args()
    # One core for this process and the peer's: XLA's thread pool does not listen to a number of threads.
    os.sched_setaffinity(0, {0})
    torch.set_num_threads(1)
    before = ours(arguments.samples, arguments.repeats)
    script = [arguments.peer_python, str(HERE / "peers" / "neural_tangents_kernel.py")]
    options = [str(arguments.samples), str(arguments.repeats), *arguments.implementations]
    printed = subprocess.run([*script, *options], check=True, capture_output=True, text=True).stdout
    peer = json.loads(printed.splitlines()[-1])
    after = ours(arguments.samples, arguments.repeats)
    results = {}
    for name, times in peer.items():
        mean = (before[name] + after[name]) / 2
        results[name] = {"ours": mean, "neural-tangents": times, "ratio": min(times.values()) / mean}
        shown = ", ".join(f"{key} {value:.3f} s" for key, value in times.items())
        print(f"{name:<12} ours {mean:.3f} s   neural-tangents: {shown}   ratio {results[name]['ratio']:.2f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"samples": arguments.samples, "seconds": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
