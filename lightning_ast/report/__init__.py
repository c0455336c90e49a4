"""A report of training runs from their logs alone: one HTML page, and its figures."""

from lightning_ast.errors import ReportError
from lightning_ast.report.runs import read_runs
from lightning_ast.report.series import Run
from lightning_ast.report.write import write_report

__all__ = ["ReportError", "Run", "read_runs", "write_report"]
