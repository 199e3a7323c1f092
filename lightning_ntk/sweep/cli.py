"""The command line: `lightning-ntk sweep run | worker | status | table | plot FILE.yaml`."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_ntk.sweep.objective import ImportedObjective
from lightning_ntk.sweep.plot import plot_scaling
from lightning_ntk.sweep.queue import Queue
from lightning_ntk.sweep.results import Results
from lightning_ntk.sweep.runner import Sweep
from lightning_ntk.sweep.storage import open_storage
from lightning_ntk.sweep.sweep_file import SweepFile
from lightning_ntk.sweep.worker import work


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 if configurations failed or an argument is wrong, or 130 on Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            file = SweepFile.read(options.file, storage=options.storage, name=options.name)
            status: int = options.command(file, options)
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        print(f"lightning-ntk: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _run(file: SweepFile, options: argparse.Namespace) -> int:
    _import_objective(file.sweep)
    workers = file.workers if options.workers is None else options.workers
    file.sweep.run(workers, threads=file.threads, retry_failed=options.retry_failed, progress=not options.quiet)
    return _summary(file.sweep.queue)


def _worker(file: SweepFile, options: argparse.Namespace) -> int:
    _import_objective(file.sweep)
    if file.threads is not None:
        torch.set_num_threads(file.threads)
    file.sweep.enqueue()
    ended = work(file.sweep.queue, file.sweep.objective, patience=file.sweep.patience, wait=options.wait)
    print(f"This worker ended {ended} trials.")
    return 0


def _status(file: SweepFile, options: argparse.Namespace) -> int:
    queue = _existing(file.sweep)
    for entry in queue.entries().values():
        where = f"  on {entry.worker['host']}, process {entry.worker['pid']}" if entry.worker else ""
        took = f", {entry.seconds:.1f} s" if entry.seconds is not None else ""
        print(f"{entry.state:<9} {entry.configuration}{where}{took}")
        if entry.error:
            print("    " + entry.error.strip().replace("\n", "\n    "))
    return _summary(queue)


def _table(file: SweepFile, options: argparse.Namespace) -> int:
    results = _results(file.sweep)
    rows = results.rows if options.all_steps else results.final
    text = results.csv(rows) if options.format == "csv" else results.markdown(rows) + "\n"
    if options.output:
        options.output.write_text(text)
    else:
        sys.stdout.write(text)
    return 0


def _plot(file: SweepFile, options: argparse.Namespace) -> int:
    figure, axis = plot_scaling(
        _results(file.sweep), options.x, options.y,
        over=options.group, step=options.step, confidence=options.confidence,
    )  # fmt: skip
    output = options.output or Path(f"{file.sweep.name}.png")
    figure.savefig(output, dpi=150)
    for text in axis.get_legend().get_texts():
        print(text.get_text())
    print(f"Figure: {output}")
    return 0


def _import_objective(sweep: Sweep) -> None:
    # An error is reported once, here, not as the failure of every configuration.
    if isinstance(sweep.objective, ImportedObjective):
        sweep.objective.load()


def _existing(sweep: Sweep) -> Queue:
    if "://" not in sweep.storage and not Path(sweep.storage).exists():
        raise FileNotFoundError(f"Expected the storage {sweep.storage} but it does not exist: run the sweep first.")
    return Queue(open_storage(sweep.storage), sweep.name)


def _results(sweep: Sweep) -> Results:
    results = Results(_existing(sweep).entries(rows=True).values())
    if not results.configurations:
        raise ValueError(f"Expected complete results in the sweep {sweep.name!r} but it has none yet.")
    return results


def _summary(queue: Queue) -> int:
    counts = queue.counts()
    print(
        f"{counts.total()} configurations: {counts['complete']} complete, {counts['failed']} failed, "
        f"{counts['running']} running, {counts['waiting'] + counts['missing']} waiting"
    )
    return 1 if counts["failed"] else 0


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    # The user of a command needs the sentence, not the line of code that says it.
    print(f"{category.__name__}: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-ntk", description="Comparing networks with their linearization.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sweep = commands.add_parser("sweep", help="run one objective for many configurations")
    actions = sweep.add_subparsers(required=True, metavar="ACTION")

    def action(name: str, command: Any, description: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=description, description=description)
        added.add_argument("file", metavar="FILE.yaml", help="describes the sweep")
        added.add_argument("--storage", help="path or URL that replaces the one in the file")
        added.add_argument("--name", help="name of the sweep that replaces the one in the file")
        added.set_defaults(command=command)
        return added

    run = action("run", _run, "run, or resume, all configurations in worker processes")
    run.add_argument("--workers", type=int, help="number of processes; 0: run in this one")
    run.add_argument("--retry-failed", action="store_true", help="try failed configurations again")
    run.add_argument("--quiet", action="store_true", help="show no progress bar")
    worker = action("worker", _worker, "add one worker, on this machine or another, until nothing waits")
    worker.add_argument("--wait", action="store_true", help="stay until everything has ended, to replace dead workers")
    action("status", _status, "show the state of every configuration, with the tracebacks of failures")
    table = action("table", _table, "print the results as a table, the last step of each configuration")
    table.add_argument("--format", choices=("markdown", "csv"), default="markdown")
    table.add_argument("--all-steps", action="store_true", help="print a row for each step")
    table.add_argument("--output", type=Path, help="file; default: the terminal")
    plot = action("plot", _plot, "plot one scalar over one parameter, log-log, with fitted slopes and their intervals")
    plot.add_argument("--x", required=True, help="numeric parameter, for example width")
    plot.add_argument("--y", required=True, help="scalar, for example ntk/relative_weight_distance")
    plot.add_argument("--group", help="parameter whose values are repetitions, for example seed")
    plot.add_argument("--step", type=float, help="step of the measurement; default: the last")
    plot.add_argument("--confidence", type=float, default=0.95, help="probability of the intervals")
    plot.add_argument("--output", type=Path, help="figure file; default: NAME.png")
    return parser


if __name__ == "__main__":
    sys.exit(main())
