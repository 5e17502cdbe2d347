"""`megatrain report`: write the HTML page of a run, a sweep, a model, or prepared datasets. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from megatrain.checkpoint.find import is_checkpoint
from megatrain.checkpoint.lineage import LINEAGE
from megatrain.config import ReportConfig
from megatrain.data.card import CARD
from megatrain.report.corpus_page import prepared_in, report_corpus
from megatrain.report.dataset_page import report_dataset
from megatrain.report.model_page import report_model
from megatrain.report.page import is_standard_output
from megatrain.report.run_page import RECORDS
from megatrain.report.run_page import report as report_run
from megatrain.report.sweep_page import report_sweep
from megatrain.resilience.terminal import say
from megatrain.tracking.sweep_record import is_sweep_folder
from megatrain.verbs.places import has_steps


def report(config: ReportConfig) -> None:
    """Write the page, and print its path unless the page itself went to standard output.

    Raises `ConfigError` if the folder is none of these, `DataError` if a file of it is damaged.
    """
    path = Path(config.path)
    out = Path(config.out) if config.out is not None else None
    if is_sweep_folder(path):
        written = report_sweep(path, out)
    elif (path / CARD).is_file():
        written = report_dataset(path, out)
    elif not any((path / name).exists() for name in RECORDS) and prepared_in(path):
        written = report_corpus(path, out)
    elif is_checkpoint(path) or (path / LINEAGE).is_file():
        written = report_model(path, out)
    else:
        written = report_run(path, out)
        if not has_steps(path):
            say(f"{path} has no steps yet, so the page shows only its config and events")
    if not is_standard_output(written):
        print(written)
