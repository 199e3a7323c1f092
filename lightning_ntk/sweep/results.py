"""The results of a sweep as a tidy table.

It has one row per configuration and step.
"""

import itertools
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ntk.functional.verdict import Verdict, judge
from lightning_ntk.sweep import formats
from lightning_ntk.sweep.configurations import Configuration
from lightning_ntk.sweep.equal_loss import row_at_loss
from lightning_ntk.sweep.queue import Entry
from lightning_ntk.sweep.statistics import Mean, PowerLaw, geometric_mean_interval, log_log_slope, mean_interval
from lightning_ntk.utilities.representation import represent

if TYPE_CHECKING:
    import pandas

TableRow = dict[str, Any]


class Results:
    """The complete results of a sweep.

    Methods raise a ValueError, which lists what there is, for a parameter, scalar or step that does not exist.

    Args:
        entries: The queue's entries, with their rows; those that are not complete are left out.
    """

    parameters: list[str]
    """Names of the parameters, in the order in which configurations have them."""
    scalars: list[str]
    """Names of the scalars, in the order in which results have them; "step" is not among them."""
    configurations: list[Configuration]
    """The configurations that are complete."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = [entry for entry in entries if entry.state == "complete"]
        self.configurations = [entry.configuration for entry in self._entries]
        self.parameters = list(dict.fromkeys(itertools.chain.from_iterable(self.configurations)))
        tags = dict.fromkeys(tag for entry in self._entries for row in entry.rows for tag in row)
        self._step = ["step"] if "step" in tags else []
        self.scalars = [tag for tag in tags if tag != "step"]

    @property
    def rows(self) -> list[TableRow]:
        """A row for each configuration and step, with "trial", parameters, "step" and scalars."""
        return [self._row(entry, measured) for entry in self._entries for measured in entry.rows]

    @property
    def final(self) -> list[TableRow]:
        """The last row of each configuration."""
        return [self._row(entry, entry.rows[-1]) for entry in self._entries]

    @property
    def columns(self) -> list[str]:
        """The names of the table's columns."""
        return ["trial", *self.parameters, *self._step, *self.scalars]

    @property
    def varying(self) -> list[str]:
        """The parameters that have several values."""
        return [name for name in self.parameters if len({repr(c.get(name)) for c in self.configurations}) > 1]

    @property
    def runs(self) -> list[tuple[str, list[dict[str, float]]]]:
        """The label and the history of each run.

        The names have no monitor prefix, as `lightning_ntk.plots.plot_runs` takes them.
        """
        prefix = self.tag("relative_weight_distance").removesuffix("relative_weight_distance")
        return [
            (
                ", ".join(
                    f"{name}={entry.configuration[name]}" for name in self.varying if name in entry.configuration
                ),
                [{tag.removeprefix(prefix): value for tag, value in row.items()} for row in entry.rows],
            )
            for entry in self._entries
        ]

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdicts of all runs, as their monitors gave them.

        Where the study does not keep a verdict, it is judged from the scalars.
        """
        judged = [judge(history) for _, history in self.runs]
        stored = [entry.verdict for entry in self._entries]
        return [
            verdict if said is None else verdict._replace(word=said[0], reason=said[1])  # type: ignore[arg-type]
            for verdict, said in zip(judged, stored, strict=True)
        ]

    @property
    def has_verdicts(self) -> bool:
        """Whether the study keeps the verdicts of the monitors.

        Studies of earlier versions do not.
        """
        return all(entry.verdict is not None for entry in self._entries)

    def tag(self, name: str) -> str:
        """The scalar of this name, whatever the monitor is called: "ntk/loss" for "loss"."""
        found = [tag for tag in self.scalars if tag.rpartition("/")[2] == name and "evaluation/" not in tag]
        if not found:
            raise ValueError(
                f"Expected results with the scalar {name!r} but there are {self.scalars}. Return the LinearizationMonitor "
                "from the objective."
            )
        return found[0]

    def columns_within(self, width: int, rows: Sequence[TableRow] | None = None) -> list[str]:
        """The columns of a Markdown table that fit into `width` characters.

        Parameters that vary come first, then the step, the relative weight distance, and the others in their order.
        """
        rows = self.final if rows is None else rows
        varying = [name for name in self.parameters if len({repr(row.get(name)) for row in rows}) > 1]
        distances = [tag for tag in self.scalars if tag.endswith("/relative_weight_distance")]
        kept, left = set(), width - 1
        for name in dict.fromkeys(["trial", *varying, *self._step, *distances, *self.columns]):
            needed = 3 + max(len(name), *(len(formats.as_cell(row.get(name, ""))) for row in rows))
            if needed <= left:
                kept.add(name)
                left -= needed
        return [name for name in self.columns if name in kept]

    def at_step(self, step: float | None) -> list[TableRow]:
        """The row of each configuration at a step; None: the last one."""
        if step is None:
            return self.final
        found = [row for row in self.rows if row.get("step") == step]
        if not found:
            steps = sorted({row["step"] for row in self.rows if "step" in row})
            raise ValueError(f"Expected a step at which something was measured but got {step}; there are {steps}.")
        return found

    def at(self, *, loss: float) -> "Results":
        """Each run where its training loss first falls to a value.

        This compares runs at equal loss.

        Between two measurements every scalar, the step too, is linear in the logarithm of the loss.

        Args:
            loss: The value of the monitor's `loss`.

        Returns:
            Results with one row for each run, for `final`, `mean`, `slope`, `markdown` and `plot_scaling`. Runs that never
            fall to this loss, or begin below it, are NaN, and a warning says how many.

        Example:
            >>> from lightning_ntk.sweep import Sweep
            >>> sweep = Sweep(lambda c: {"loss": 1.0}, {"width": [16, 64]}, storage=getfixture("tmp_path") / "j")
            >>> sweep.run(workers=0, progress=False).at(loss=0.5).final[0]["loss"]
            nan
        """
        if not (isinstance(loss, int | float) and 0 < loss < math.inf):
            raise ValueError(f"Expected argument `loss` to be a positive number but got {loss!r}.")
        tag = self.tag("loss")
        entries = [replace(entry, rows=[row_at_loss(entry.rows, loss, tag)]) for entry in self._entries]
        missing = [entry.configuration for entry in entries if math.isnan(entry.rows[0][tag])]
        if missing:
            warnings.warn(
                f"{len(missing)} of {len(entries)} runs never fall to {tag} = {loss:g}, or begin below it, and are NaN, for "
                f"example {missing[0]}.",
                stacklevel=2,
            )
        return Results(entries)

    def where(self, values: Mapping[str, Any]) -> "Results":
        """The results of the configurations with these values, at least one."""
        for name in values:
            _require("where", name, self.parameters)
        kept = [e for e in self._entries if all(e.configuration.get(name) == value for name, value in values.items())]
        if not kept:
            raise ValueError(f"Expected complete configurations with {dict(values)} but there is none.")
        return Results(kept)

    def series(
        self, x: str, y: str, *, over: str | None = None, step: float | None = None
    ) -> dict[tuple[tuple[str, Any], ...], list[tuple[float, float]]]:
        """Points (x, y) for each combination of the other parameters that vary.

        Args:
            x: A numeric parameter.
            y: A scalar.
            over: A parameter whose values are repetitions, such as the seed; its points share a list.
            step: The step of the measurement. Default: the last one of each configuration.

        Returns:
            Lists of points, sorted by x. A key has the names and values of the parameters other than `x` and `over` that vary.
            Points without a place in log-log axes, such as those of diverged runs, are left out with a warning.
        """
        _require("x", x, self.parameters)
        _require("y", y, self.scalars)
        if over is not None:
            _require("over", over, self.parameters)
        table = [row for row in self.at_step(step) if x in row and y in row]
        others = [
            name for name in self.parameters if name not in (x, over) and len({repr(r.get(name)) for r in table}) > 1
        ]
        lists: dict[tuple[tuple[str, Any], ...], list[tuple[float, float]]] = {}
        left_out = []
        for row in table:
            if isinstance(row[x], bool) or not isinstance(row[x], int | float):
                raise ValueError(
                    f"Expected a parameter with numbers for the x axis but {x!r} has the value {row[x]!r}."
                )
            if not (0 < row[x] < math.inf and 0 < row[y] < math.inf):
                left_out.append({name: row[name] for name in (*self.parameters, y) if name in row})
                continue
            values = [(name, row.get(name)) for name in others]
            key = tuple((name, repr(value) if isinstance(value, list | dict) else value) for name, value in values)
            lists.setdefault(key, []).append((row[x], row[y]))
        if left_out:
            warnings.warn(
                f"{len(left_out)} of {len(table)} points have no positive, finite {x!r} and {y!r} and are left out, for example "
                f"{left_out[0]}.",
                stacklevel=3,
            )
        return {key: sorted(points, key=lambda point: point[0]) for key, points in lists.items()}

    def slope(
        self,
        x: str,
        y: str,
        *,
        where: Mapping[str, Any] | None = None,
        step: float | None = None,
        confidence: float = 0.95,
    ) -> PowerLaw:
        """The exponent s of y = c x^s by least squares in log-log axes.

        Args:
            x: A numeric parameter.
            y: A scalar.
            where: Values of other parameters; only configurations with these values count, each as one point.
            step: The step of the measurement. Default: the last one of each configuration.
            confidence: Probability of the interval.

        Raises:
            ValueError: If there is no slope; see `log_log_slope`.
        """
        kept = self.where(where or {})
        points = list(itertools.chain.from_iterable(kept.series(x, y, step=step).values()))
        return log_log_slope([point[0] for point in points], [point[1] for point in points], confidence)

    def mean(
        self,
        y: str,
        *,
        over: str = "seed",
        step: float | None = None,
        confidence: float = 0.95,
        geometric: bool = False,
    ) -> list[tuple[Configuration, Mean]]:
        """Mean and confidence interval of a scalar over repetitions.

        Args:
            y: A scalar.
            over: The parameter whose values are repetitions.
            step: The step of the measurement. Default: the last one of each configuration.
            confidence: Probability of the interval.
            geometric: Whether to average logarithms, as `plot_scaling` does; the interval of a distance is then positive.

        Returns:
            Each combination of the other parameters, and its mean.
        """
        _require("y", y, self.scalars)
        _require("over", over, self.parameters)
        groups: dict[str, tuple[Configuration, list[float]]] = {}
        for row in self.at_step(step):
            rest = {name: row[name] for name in self.parameters if name != over and name in row}
            if y in row:
                groups.setdefault(repr(rest), (rest, []))[1].append(row[y])
        interval = geometric_mean_interval if geometric else mean_interval
        return [(rest, interval(values, confidence)) for rest, values in groups.values()]

    def csv(self, rows: Sequence[TableRow] | None = None, columns: Sequence[str] | None = None) -> str:
        """The table, or some rows and columns of it, as CSV.

        Missing values are empty.
        """
        return formats.as_csv(self.rows if rows is None else rows, self._names(columns))

    def markdown(self, rows: Sequence[TableRow] | None = None, columns: Sequence[str] | None = None) -> str:
        """The table as Markdown, numbers with five digits.

        Args:
            rows: Rows of the table. Default: the last one of each configuration.
            columns: Names of columns. Default: those that fit into 100 characters, see `columns_within`.
        """
        rows = self.final if rows is None else rows
        names = self._names(self.columns_within(100, rows) if columns is None else columns)
        return formats.as_markdown(rows, names)

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        x: str | None = None,
        over: str | None = None,
        loss: float | None = None,
        title: str = "Lazy or rich?",
    ) -> Path:
        """Writes one self-contained HTML page about the sweep.

        It shows configurations with verdicts, at equal steps and at equal loss.

        Needs matplotlib, and results of a `LinearizationMonitor`.

        Args:
            path: The file to write. Its folder is made.
            x: The parameter over which to draw the distance. Default: the one of positive numbers with the most values.
            over: The parameter whose values are repetitions. Default: one that is called a seed.
            loss: The loss at which to compare. Default: the smallest that all runs reach; those that do not halve theirs
                do not count.
            title: The heading.

        Returns:
            The path.
        """
        from lightning_ntk.sweep.page import write_sweep_report  # matplotlib, which tables do without

        for argument, name in (("x", x), ("over", over)):
            if name is not None:
                _require(argument, name, self.parameters)
        return write_sweep_report(os.fspath(path), self, x=x, over=over, loss=loss, title=title)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the whole table to a CSV file."""
        Path(path).write_text(self.csv(), newline="", encoding="utf-8")

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Writes the whole table to a Parquet file, with pyarrow."""
        formats.write_parquet(path, self.rows, self.columns)

    def to_pandas(self) -> "pandas.DataFrame":
        """The whole table as a data frame of pandas."""
        return formats.as_data_frame(self.rows, self.columns)

    def _names(self, columns: Sequence[str] | None) -> list[str]:
        names = list(self.columns if columns is None else columns)
        for name in names:
            _require("columns", name, self.columns)
        return names

    @staticmethod
    def _row(entry: Entry, measured: Mapping[str, float]) -> TableRow:
        return {"trial": entry.trial, **entry.configuration, **measured}

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        of = f" of {', '.join(self.parameters)}" if self.parameters else ""
        counts = f"{len(self.rows)} rows", f"{len(self.scalars)} scalars"
        return represent(self, f"{len(self.configurations)} configurations{of}", *counts)


def _require(argument: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"Expected argument `{argument}` to be one of {list(known)} but got {name!r}.")
