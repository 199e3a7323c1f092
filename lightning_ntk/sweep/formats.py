"""Rows of a table as text, files and data frames."""

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_ntk.utilities.lazy import optional_module

Rows = Sequence[Mapping[str, Any]]


def as_csv(rows: Rows, columns: Sequence[str]) -> str:
    """Columns of rows as CSV.

    Missing values are empty.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: Rows, columns: Sequence[str]) -> str:
    """Columns of rows as a Markdown table, padded to be read as it is."""
    cells = [[as_cell(row.get(name, "")) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def as_cell(value: Any) -> str:
    """A value as text, floating-point numbers with five digits."""
    if isinstance(value, float):
        return f"{value:.0f}" if math.isfinite(value) and value.is_integer() and abs(value) < 1e9 else f"{value:.5g}"
    return str(value)


def as_data_frame(rows: Rows, columns: Sequence[str]) -> Any:
    """Columns of rows as a data frame of pandas."""
    return optional_module("pandas", "A table").DataFrame(rows, columns=columns)


def write_parquet(path: str | os.PathLike[str], rows: Rows, columns: Sequence[str]) -> None:
    """Writes columns of rows to a Parquet file, with pyarrow."""
    values = {name: [row.get(name) for row in rows] for name in columns}
    table = optional_module("pyarrow", "A Parquet file").table(values)
    optional_module("pyarrow.parquet", "A Parquet file").write_table(table, os.fspath(path))
