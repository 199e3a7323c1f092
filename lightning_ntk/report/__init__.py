"""A run on one page: its verdict, a table for the terminal, and an HTML file with figures."""

from lightning_ntk.report.page import write_report
from lightning_ntk.report.table import summarize

__all__ = ["summarize", "write_report"]
