"""`clipo report`: runs as one HTML page."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

_DESCRIPTION = """\
One HTML page about one or several runs: what differs, held-out accuracy with intervals, curves, what CLIPO did to the
representation, pairs of rollouts with their texts, and where the time goes. It needs nothing else and no network.

RUN is the folder that a run writes to, its train.output; it may still be going. Runs that differ only in their seed are
drawn as one line with a band. Traced steps are also written beside the page, for chrome://tracing or Perfetto.
"""
_EXAMPLES = """\
examples:
  clipo report runs/quickstart
  clipo report runs/grpo-* runs/clipo-* -o compared.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run")
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("report.html"), help="page to write; default report.html"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from clipo_megatron.page.reading import PageError

    if options.out.is_dir():
        raise PageError(
            f"--out {options.out} is a folder. Give the file to write, such as {options.out / 'report.html'}"
        )
    written = write_page(options.runs, options.out)
    for path in written:
        print(path)
    return 0


def write_page(folders: list[Path], out: Path) -> list[Path]:
    """Read runs and write the page, and beside it the trace of those that have one.

    Returns:
        What was written.

    Raises:
        PageError: a folder is no run's, or the page cannot be written; says which and why.
    """
    from clipo_megatron.files import write_durably
    from clipo_megatron.page.document import document
    from clipo_megatron.page.grouping import group_runs
    from clipo_megatron.page.reading import PageError, read_run
    from clipo_megatron.page.timing import chrome_trace

    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    page = document(group_runs(runs), made=time.strftime("%Y-%m-%d %H:%M"))
    written = {out: page}
    if traced := [run for run in runs if run.traces]:
        written[out.with_suffix(".trace.json")] = json.dumps(chrome_trace(traced))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, text in written.items():
            write_durably(path, text)
    except OSError as error:
        raise PageError(f"{out} cannot be written: {error.strerror or error}. Choose another --out") from error
    return list(written)
