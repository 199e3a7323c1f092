"""The command line: `lightning-ntk sweep run | worker | status | table | plot | report FILE.yaml`, `lightning-ntk report LOG`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_ntk import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status.

    It is 0, 1 if configurations failed or an argument is wrong, or 130 on Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    if options.command == "report":
        return _report(options)
    try:
        # Here, so that --help and a wrong option are answered at once.
        from lightning_ntk.sweep.commands import run_command
    except ModuleNotFoundError as error:
        print(
            f"lightning-ntk sweep needs optuna, PyYAML and scipy, but {(error.name or '').partition('.')[0]} is not installed: "
            "pip install 'lightning-ntk[sweep]'",
            file=sys.stderr,
        )
        return 1
    try:
        status = run_command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python writes when it ends
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-ntk", description="Comparing networks with their linearization.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    sweep = commands.add_parser("sweep", help="run one objective for many configurations")
    actions = sweep.add_subparsers(required=True, metavar="ACTION", dest="action")

    def action(name: str, description: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=description, description=description)
        added.add_argument("file", metavar="FILE.yaml", help="describes the sweep")
        added.add_argument("--storage", help="path or URL that replaces the one in the file")
        added.add_argument("--name", help="name of the sweep that replaces the one in the file")
        return added

    run = action("run", "run, or resume, all configurations in worker processes")
    run.add_argument("--workers", type=int, help="number of processes; 0: run in this one")
    run.add_argument("--retry-failed", action="store_true", help="try failed configurations again")
    run.add_argument("--quiet", action="store_true", help="show no progress bar")
    worker = action("worker", "add one worker, on this machine or another, until nothing waits")
    worker.add_argument("--wait", action="store_true", help="stay until everything has ended, to replace dead workers")
    action("status", "show the state of every configuration, with the tracebacks of failures")
    table = action("table", "print the results as a table, the last step of each configuration")
    table.add_argument("--format", choices=("markdown", "csv"), default="markdown", help="csv has all columns")
    table.add_argument(
        "--columns", nargs="+", metavar="NAME", help="columns; default: those that fit in 100 characters"
    )
    table.add_argument("--all-columns", action="store_true", help="print every column")
    table.add_argument("--all-steps", action="store_true", help="print a row for each step")
    table.add_argument("--at", type=_loss, metavar="loss=VALUE", help="interpolate each run where it reaches a loss")
    table.add_argument("--output", type=Path, help="file; default: the terminal")
    plot = action("plot", "plot one scalar over one parameter, log-log, with fitted slopes and their intervals")
    plot.add_argument("--x", required=True, help="numeric parameter, for example width")
    plot.add_argument("--y", required=True, help="scalar, for example ntk/relative_weight_distance")
    plot.add_argument("--group", help="parameter whose values are repetitions, for example seed")
    when = plot.add_mutually_exclusive_group()
    when.add_argument("--step", type=float, help="step of the measurement; default: the last")
    when.add_argument("--at", type=_loss, metavar="loss=VALUE", help="compare at equal loss, not at equal steps")
    plot.add_argument("--confidence", type=float, default=0.95, help="probability of the intervals")
    plot.add_argument("--output", type=Path, help="figure file; default: NAME.png")
    page = action(
        "report", "write verdicts, distances and curves of all runs, at equal steps and loss, as one HTML page"
    )
    page.add_argument("--x", help="parameter to draw over; default: the numeric one with the most values")
    page.add_argument("--group", help="parameter whose values are repetitions; default: a seed")
    page.add_argument("--at", type=_loss, metavar="loss=VALUE", help="default: the smallest loss that all runs reach")
    page.add_argument("--output", type=Path, help="the page; default: NAME.html")
    report = commands.add_parser("report", help="write a run's verdict and figures as one HTML page")
    report.add_argument("log", type=Path, metavar="LOG", help="metrics.csv of Lightning's CSVLogger, or its folder")
    report.add_argument("--name", default="ntk", help="name of the monitor, the prefix of its columns")
    report.add_argument("--output", type=Path, help="the page; default: report.html beside the log")
    return parser


def _loss(text: str) -> float:
    name, _, value = text.partition("=")
    try:
        loss = float(value)
    except ValueError:
        loss = 0.0
    if name != "loss" or not 0 < loss < float("inf"):
        raise argparse.ArgumentTypeError(f"expected loss=VALUE, such as loss=0.5, but got {text!r}")
    return loss


def _report(options: argparse.Namespace) -> int:
    from lightning_ntk.functional import judge
    from lightning_ntk.plots import read_history
    from lightning_ntk.report import summarize, write_report

    try:
        history = read_history(options.log, options.name)
        folder = options.log if options.log.is_dir() else options.log.parent
        verdict = judge(history)
        title = f"Lazy or rich? {folder.resolve().name}"
        path = write_report(options.output or folder / "report.html", history, verdict, title=title)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"lightning-ntk report: {error}", file=sys.stderr)
        return 1
    print(f"{summarize(history, verdict)}\n\nWritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
