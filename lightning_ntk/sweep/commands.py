"""What the commands of `lightning-ntk sweep` do."""

import argparse
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

from optuna.exceptions import OptunaError
from sqlalchemy.exc import SQLAlchemyError

from lightning_ntk.sweep.objective import ImportedObjective
from lightning_ntk.sweep.queue import Entry, Queue
from lightning_ntk.sweep.results import Results
from lightning_ntk.sweep.runner import Sweep
from lightning_ntk.sweep.storage import open_storage, storage_reason
from lightning_ntk.sweep.sweep_file import SweepFile
from lightning_ntk.sweep.worker import work


def run_command(options: argparse.Namespace) -> int:
    """Runs `options.action` and returns the exit status.

    An error is printed as a sentence and gives 1; Ctrl-C gives 130.
    """
    commands = {"run": _run, "worker": _worker, "status": _status, "table": _table, "plot": _plot, "report": _report}
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            file = SweepFile.read(options.file, storage=options.storage, name=options.name)
            return commands[options.action](file, options)
    except BrokenPipeError:
        raise
    except (OptunaError, SQLAlchemyError) as error:
        sentence = f"The storage cannot be used: {storage_reason(error)}."
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        sentence = str(error)
    except KeyboardInterrupt:
        return 130
    print(f"lightning-ntk: {sentence}", file=sys.stderr)
    return 1


def _run(file: SweepFile, options: argparse.Namespace) -> int:
    _import_objective(file.sweep)
    workers = file.workers if options.workers is None else options.workers
    file.sweep.run(workers, threads=file.threads, retry_failed=options.retry_failed, progress=not options.quiet)
    status = _summary(file.sweep.queue)
    print(_next("status" if status else "table", options))
    return status


def _worker(file: SweepFile, options: argparse.Namespace) -> int:
    _import_objective(file.sweep)
    if file.threads is not None:
        import torch

        torch.set_num_threads(file.threads)
    file.sweep.enqueue()
    ended = work(file.sweep.queue, file.sweep.objective, patience=file.sweep.patience, wait=options.wait)
    print(f"This worker ended {ended} trials.")
    return 0


def _status(file: SweepFile, options: argparse.Namespace) -> int:
    queue = _existing(file.sweep)
    entries = list(queue.entries().values())
    names = [", ".join(f"{name}={value}" for name, value in entry.configuration.items()) for entry in entries]
    width = max(map(len, names), default=0)
    failures: dict[str, list[str]] = {}
    for name, entry in zip(names, entries, strict=True):
        print(f"{entry.state:<9} {name:<{width}}  {_detail(entry)}".rstrip())
        if entry.error:
            failures.setdefault(entry.error.strip(), []).append(name)
    for error, failed in failures.items():
        others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        print(f"\n{failed[0]}{others} failed with:\n    " + error.replace("\n", "\n    "))
    if failures:
        print()
    status = _summary(queue)
    if status:
        print(_next("run", options, "--retry-failed"))
    return status


def _table(file: SweepFile, options: argparse.Namespace) -> int:
    results = _compared(file.sweep, options)
    rows = results.rows if options.all_steps else results.final
    if options.format == "csv":
        text = results.csv(rows, options.columns)
    else:
        columns = results.columns if options.all_columns else options.columns or results.columns_within(100, rows)
        text = results.markdown(rows, columns) + "\n"
        if len(columns) < len(results.columns) and not options.columns:
            print(f"{len(results.columns) - len(columns)} more columns: --all-columns, or --columns", file=sys.stderr)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


def _plot(file: SweepFile, options: argparse.Namespace) -> int:
    from lightning_ntk.sweep.plot import plot_scaling  # its package imports torch, which the other commands do without

    figure, axis = plot_scaling(
        _compared(file.sweep, options), options.x, options.y,
        over=options.group, step=options.step, confidence=options.confidence,
    )  # fmt: skip
    if options.at is not None:
        axis.set_title(f"at a loss of {options.at:g}", fontsize=10)
    output = options.output or Path(f"{file.sweep.name}.png")
    figure.savefig(output, dpi=150)
    for text in axis.get_legend().get_texts():
        print(text.get_text())
    print(f"Figure: {output}")
    return 0


def _report(file: SweepFile, options: argparse.Namespace) -> int:
    results, output = _results(file.sweep), options.output or Path(f"{file.sweep.name}.html")
    title = f"Lazy or rich? {file.sweep.name}"
    print(f"Page: {results.report(output, x=options.x, over=options.group, loss=options.at, title=title)}")
    return 0


def _import_objective(sweep: Sweep) -> None:
    # An error is reported once, here, not as the failure of every configuration.
    if isinstance(sweep.objective, ImportedObjective):
        sweep.objective.load()


def _existing(sweep: Sweep) -> Queue:
    path = sweep.storage.removeprefix("sqlite:///")
    if not ("://" in path or "?" in path or Path(path).exists()):
        raise FileNotFoundError(f"Expected the storage {sweep.storage} but it does not exist: run the sweep first.")
    return Queue(open_storage(sweep.storage), sweep.name)


def _results(sweep: Sweep) -> Results:
    results = Results(_existing(sweep).entries(rows=True).values())
    if not results.configurations:
        raise ValueError(f"Expected complete results in the sweep {sweep.name!r} but it has none yet.")
    return results


def _compared(sweep: Sweep, options: argparse.Namespace) -> Results:
    results = _results(sweep)
    return results if options.at is None else results.at(loss=options.at)


def _detail(entry: Entry) -> str:
    if entry.error:
        return entry.reason[:80]
    if entry.state == "running" and entry.worker:
        return f"{entry.worker['host']}, process {entry.worker['pid']}"
    return f"{entry.seconds:.1f} s" if entry.seconds is not None else ""


def _summary(queue: Queue) -> int:
    counts = queue.counts()
    print(
        f"{counts.total()} configurations: {counts['complete']} complete, {counts['failed']} failed, "
        f"{counts['running']} running, {counts['waiting'] + counts['missing']} waiting"
    )
    return 1 if counts["failed"] else 0


def _next(action: str, options: argparse.Namespace, *arguments: str) -> str:
    replaced = [part for key in ("storage", "name") if (value := vars(options)[key]) for part in (f"--{key}", value)]
    return "Next: " + shlex.join(["lightning-ntk", "sweep", action, options.file, *replaced, *arguments])


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    # The user of a command needs the sentence, not the line of code that says it.
    print(f"{category.__name__}: {message}", file=sys.stderr)
