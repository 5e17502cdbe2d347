"""`megatrain report`: write the HTML page of a run or a sweep. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from megatrain.config import ReportConfig
from megatrain.report.page import is_standard_output
from megatrain.report.run_page import report as report_run
from megatrain.report.sweep_page import report_sweep
from megatrain.tracking.sweep_record import is_sweep_folder


def report(config: ReportConfig) -> None:
    """Write the page, and print its path unless the page itself went to standard output."""
    path = Path(config.path)
    write = report_sweep if is_sweep_folder(path) else report_run
    out = write(path, Path(config.out) if config.out is not None else None)
    if not is_standard_output(out):
        print(out)
