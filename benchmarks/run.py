"""Every comparison of speed, in one run and one table.

    python benchmarks/run.py [--sections modes kernel passes steps training_step low_rank gpt processes] [--threads 1]
        [--output benchmarks/results/run.json]

Float32, K = 10, scikit-learn's digits; an MLP 64-512-512-10, a convolutional network and a transformer (models.py). Each
line is the time of this package, that of another way to the same numbers or of a floor (work that no way can avoid),
measured in the same run, and their ratio. The JSON file has all of it, and the machine.

neural-tangents needs an old JAX, and so an environment of its own:

    python -m venv .venv-peers && .venv-peers/bin/pip install -r benchmarks/peers/requirements.txt
    python benchmarks/run.py --neural-tangents .venv-peers/bin/python
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import ddp
import kernels
import low_rank
import measuring_pass
import modes
import steps
import sweep_workers
import torch
import training_step
from timing import Comparison, header, line, machine

RESULTS = Path(__file__).parent / "results" / "run.json"
SECTIONS = ("modes", "kernel", "language_models", "passes", "steps", "training_step", "low_rank", "gpt", "processes")


def comparisons(arguments: argparse.Namespace) -> Iterator[tuple[str, Comparison]]:
    """All lines of the chosen sections."""
    if "modes" in arguments.sections:
        yield "modes", modes.matrix_free()  # first, as its peak memory is that of the process so far
    if "kernel" in arguments.sections:
        yield "kernel", kernels.full_training_set()  # then this one
        yield from (("kernel", row) for row in kernels.against_plain_torch())
    if "language_models" in arguments.sections:
        yield from (("language_models", row) for row in kernels.language_models())
    if "modes" in arguments.sections:
        yield "modes", modes.lanczos()
        yield from (("modes", row) for row in modes.against_the_inverse())
    if "passes" in arguments.sections:
        yield from (("passes", row) for row in measuring_pass.against_an_epoch())
        yield "passes", measuring_pass.share_of_the_example()
    if "steps" in arguments.sections:
        yield "steps", steps.between_measurements()
        yield from (("steps", row) for row in steps.replay())
        yield from (("steps", row) for row in steps.twin())
    if "training_step" in arguments.sections:
        yield from (("training_step", row) for row in training_step.per_step())
        yield from (("training_step", row) for row in training_step.whole_runs())
        yield "training_step", training_step.memory()
    if "low_rank" in arguments.sections:
        yield from (("low_rank", row) for row in low_rank.per_step())
        yield from (("low_rank", row) for row in low_rank.memory())
    if "gpt" in arguments.sections:
        yield "gpt", training_step.language_model()
        yield "gpt", training_step.memory("GPT")
    if "processes" in arguments.sections:
        yield from (("processes", row) for row in ddp.two_processes())
        yield "processes", sweep_workers.two_workers()
    if arguments.neural_tangents:
        rows = kernels.against_neural_tangents(arguments.neural_tangents, arguments.implementations)
        yield from (("neural-tangents", row) for row in rows)


def main() -> None:
    """Prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--neural-tangents", metavar="PYTHON", help="an interpreter that has peers/requirements.txt")
    parser.add_argument(
        "--implementations", nargs="+", default=["structured derivatives"], help="those of neural-tangents"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    described = machine()
    print(", ".join(f"{key} {value}" for key, value in described.items()))
    print(header(), flush=True)
    rows = []
    for section, comparison in comparisons(arguments):
        print(line(comparison), flush=True)
        rows.append({"section": section, **comparison.record()})
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"machine": described, "comparisons": rows}, indent=2) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":  # worker processes of a sweep import this file
    main()
