"""The results of a sweep as a tidy table: one row for each configuration and step."""

import csv
import io
import itertools
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_ntk.sweep.configurations import Configuration
from lightning_ntk.sweep.entry import Entry
from lightning_ntk.sweep.statistics import Mean, PowerLaw, log_log_slope, mean_interval

if TYPE_CHECKING:
    import pandas

TableRow = dict[str, Any]


class Results:
    """Complete results of a sweep.

    Args:
        entries: Of the queue, with their rows; those that are not complete are left out.
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
        tags = itertools.chain.from_iterable(row for entry in self._entries for row in entry.rows)
        self.scalars = [tag for tag in dict.fromkeys(tags) if tag != "step"]

    @property
    def rows(self) -> list[TableRow]:
        """One row for each configuration and step: "trial", the parameters, "step" and every scalar of that measurement."""
        return [self._row(entry, measured) for entry in self._entries for measured in entry.rows]

    @property
    def final(self) -> list[TableRow]:
        """The last row of each configuration."""
        return [self._row(entry, entry.rows[-1]) for entry in self._entries]

    def at_step(self, step: float | None) -> list[TableRow]:
        """The row of each configuration at a step; None: the last one.

        Raises:
            ValueError: If no configuration was measured at that step.
        """
        if step is None:
            return self.final
        found = [row for row in self.rows if row.get("step") == step]
        if not found:
            steps = sorted({row["step"] for row in self.rows if "step" in row})
            raise ValueError(f"Expected a step at which something was measured but got {step}; there are {steps}.")
        return found

    @staticmethod
    def _row(entry: Entry, measured: Mapping[str, float]) -> TableRow:
        return {"trial": entry.trial, **entry.configuration, **measured}

    def series(
        self, x: str, y: str, *, over: str | None = None, step: float | None = None
    ) -> dict[tuple[tuple[str, Any], ...], list[tuple[float, float]]]:
        """Points (x, y), one for each configuration, in one list for each combination of the other parameters.

        Args:
            x: A numeric parameter.
            y: A scalar.
            over: A parameter whose values are repetitions, such as the seed; its points share a list.
            step: Of the measurement; None: the last one of each configuration.

        Returns:
            Lists of points, sorted by x, by the names and values of the parameters other than `x` and `over` that vary. Points
            without a place in log-log axes, such as those of diverged runs, are left out, and a warning says how many.

        Raises:
            ValueError: If there is no such parameter, scalar or step.
        """
        self._require("x", x, self.parameters)
        self._require("y", y, self.scalars)
        if over is not None:
            self._require("over", over, self.parameters)
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
                left_out.append(row)
                continue
            key = tuple((name, _hashable(row.get(name))) for name in others)
            lists.setdefault(key, []).append((row[x], row[y]))
        if left_out:
            first = {name: left_out[0][name] for name in (*self.parameters, y) if name in left_out[0]}
            warnings.warn(
                f"{len(left_out)} of {len(table)} points have no positive, finite {x!r} and {y!r} and are left out, for example "
                f"{first}.",
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
        """The exponent s of y = c x^s by least squares in log-log axes, every configuration one point.

        Args:
            x: A numeric parameter.
            y: A scalar.
            where: Values of other parameters; only configurations that have them count.
            step: Of the measurement; None: the last one of each configuration.
            confidence: Probability of the interval.

        Raises:
            ValueError: If a name is unknown, no configuration is left, or there is no slope; see `log_log_slope`.
        """
        kept = self.where(where or {})
        points = list(itertools.chain.from_iterable(kept.series(x, y, step=step).values()))
        return log_log_slope([point[0] for point in points], [point[1] for point in points], confidence)

    def where(self, values: Mapping[str, Any]) -> "Results":
        """The results of the configurations with these values.

        Raises:
            ValueError: If there is none.
        """
        for name in values:
            self._require("where", name, self.parameters)
        kept = [e for e in self._entries if all(e.configuration.get(name) == value for name, value in values.items())]
        if not kept:
            raise ValueError(f"Expected complete configurations with {dict(values)} but there is none.")
        return Results(kept)

    def mean(
        self, y: str, *, over: str = "seed", step: float | None = None, confidence: float = 0.95
    ) -> list[tuple[Configuration, Mean]]:
        """Mean and confidence interval of a scalar over repetitions.

        Args:
            y: A scalar.
            over: The parameter whose values are repetitions.
            step: Of the measurement; None: the last one of each configuration.
            confidence: Probability of the interval.

        Returns:
            For each combination of the other parameters, it and the mean.

        Raises:
            ValueError: If there is no such parameter, scalar or step.
        """
        self._require("y", y, self.scalars)
        self._require("over", over, self.parameters)
        groups: dict[str, tuple[Configuration, list[float]]] = {}
        for row in self.at_step(step):
            rest = {name: row[name] for name in self.parameters if name != over and name in row}
            if y in row:
                groups.setdefault(repr(rest), (rest, []))[1].append(row[y])
        return [(rest, mean_interval(values, confidence)) for rest, values in groups.values()]

    @property
    def columns(self) -> list[str]:
        """Of the table."""
        step = ["step"] if any("step" in row for entry in self._entries for row in entry.rows) else []
        return ["trial", *self.parameters, *step, *self.scalars]

    def csv(self, rows: Sequence[TableRow] | None = None) -> str:
        """The table as CSV; what a row lacks is empty.

        Args:
            rows: Of the table. Default: all.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows if rows is None else rows)
        return text.getvalue()

    def markdown(self, rows: Sequence[TableRow] | None = None, columns: Sequence[str] | None = None) -> str:
        """The table as Markdown, numbers with five digits.

        Args:
            rows: Of the table. Default: the last one of each configuration.
            columns: Names of columns. Default: all.

        Raises:
            ValueError: If there is no such column.
        """
        for column in columns or ():
            self._require("columns", column, self.columns)
        columns = self.columns if columns is None else columns
        cells = [[_shown(row.get(name, "")) for name in columns] for row in (self.final if rows is None else rows)]
        widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
        lines = [list(columns), ["-" * width for width in widths], *cells]
        return "\n".join(
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in lines
        )

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the whole table to a CSV file."""
        with open(path, "w", newline="") as file:
            file.write(self.csv())

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Writes the whole table to a Parquet file.

        Raises:
            ModuleNotFoundError: If pyarrow is not installed.
        """
        try:
            import pyarrow
            import pyarrow.parquet
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Parquet files need pyarrow, which is not installed: pip install pyarrow."
            ) from error
        columns = {name: [row.get(name) for row in self.rows] for name in self.columns}
        pyarrow.parquet.write_table(pyarrow.table(columns), os.fspath(path))

    def to_pandas(self) -> "pandas.DataFrame":
        """The whole table as a data frame.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("Data frames need pandas, which is not installed: pip install pandas.") from error
        return pandas.DataFrame(self.rows, columns=self.columns)

    @staticmethod
    def _require(argument: str, name: str, known: Sequence[str]) -> None:
        if name not in known:
            raise ValueError(f"Expected argument `{argument}` to be one of {list(known)} but got {name!r}.")

    def __len__(self) -> int:
        return len(self._entries)


def _hashable(value: Any) -> Any:
    return repr(value) if isinstance(value, list | dict) else value


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if math.isfinite(value) and value.is_integer() and abs(value) < 1e9 else f"{value:.5g}"
    return str(value)
