"""`report`: write the reproduction report."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

from cod_lightning._torchmetrics import import_torchmetrics
from cod_lightning.commands.options import add_results, nonempty_path
from cod_lightning.errors import UserError, plural
from cod_lightning.files import check_writable, write_atomic

HELP = "Write REPRODUCTION.md, an HTML page, CSV and figures: the claims of the paper beside the results of runs."
ESTIMATED_FOR = "one H100 at 40 % of its peak"
"""Default hardware of `estimate`."""
LISTED = 5
"""The most runs that a message names."""


def add_arguments(parser: ArgumentParser) -> None:
    add_results(parser)
    parser.add_argument("--output", type=nonempty_path, default=Path(), help="folder of the files (default: here)")
    parser.add_argument("--pdf", action="store_true", help="write every figure as PDF as well")


def run(results: Path | None, output: Path, pdf: bool) -> None:
    from cod_lightning.paper.claims import SCALES
    from cod_lightning.paper.experiments import experiment_rows, reproducible_experiments, with_results
    from cod_lightning.paper.pretrained_models import load_pretrained_models
    from cod_lightning.paper.report import CSV, FIGURES, HTML, MARKDOWN, build_report
    from cod_lightning.paper.results import RESULTS, load_notes, load_runs
    from cod_lightning.plots import FORMATS
    from cod_lightning.train.record import FAILURE, RECORD

    if results is not None and not results.is_dir():
        raise UserError(f"--results={results} is not a folder")
    check_writable(output, "--output=")
    import_torchmetrics()
    results = results or RESULTS
    runs, models = load_runs(results), load_pretrained_models(results)
    if not runs and not models:
        raise UserError(f"{results} has no results: run reproduce, or name the folder by --results")
    recorded = {run.record.get("config", {}).get("scale", run.folder.parent.name) for run in runs.values()}
    scales = [scale for scale in SCALES if scale == "paper" or scale in recorded]
    names = reproducible_experiments()
    rows = (row for scale in scales for row in experiment_rows(names, scale))
    experiments = with_results(rows, runs)
    folders = {path.parent for name in (RECORD, FAILURE) for path in results.glob(f"*/*/{name}")}
    if others := sorted(map(str, folders - {run.folder for e in experiments for row in e.rows for run in row.runs})):
        listed = ", ".join(others[:LISTED]) + ", ..." * (len(others) > LISTED)
        print(
            f"left out {plural(len(others), 'run')} with settings of no experiment, or of a run that is in the report: "
            f"{listed}",
            file=sys.stderr,
        )
    formats = FORMATS if pdf else FORMATS[:1]
    report = build_report(experiments, ESTIMATED_FOR, formats, models, load_notes(results))
    files = {MARKDOWN: report.markdown.encode(), HTML: report.html.encode(), CSV: report.csv.encode()}
    files |= {f"{FIGURES}/{name}": image for name, image in report.figures.items()}
    for name, content in files.items():
        path = output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
        print(path)
