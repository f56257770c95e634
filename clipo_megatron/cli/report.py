"""`clipo report`: writes one HTML page about one or several runs."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

DESCRIPTION = """\
One HTML page about one or several runs: what differs, held-out accuracy with intervals, curves, what CLIPO did to the
representation, pairs of rollouts with their texts, and where the time goes. It needs nothing else and no network.

RUN is the folder that a run writes to, its train.output; it may still be going. Runs that differ only in their seed are
drawn as one line with a band, and are a group. Every group is compared with the first one, or with the one of
--against. Traced steps are also written beside the page, for chrome://tracing or Perfetto.
"""
EXAMPLES = """\
examples:
  clipo report runs/quickstart
  clipo report runs/grpo-* runs/clipo-* -o compared.html
  clipo report runs/*/seed* --against grpo
"""


_TELLING = 12  # characters at the beginning of a page, or of traced steps, that tell it from other files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run")
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("report.html"), help="page to write; default report.html"
    )
    parser.add_argument(
        "--against",
        metavar="NAME",
        help="group that the others are compared with, as the page calls it; default: the first",
    )


def run(options: argparse.Namespace) -> int:
    written = write_page(options.runs, options.out, against=options.against)
    for path in written:
        print(path)
    return 0


def write_page(folders: list[Path], out: Path, *, against: str | None = None) -> list[Path]:
    """Write the page about some runs, and beside it the traced steps of those that have any.

    Args:
        folders: the runs' output folders; one that is given twice is read once.
        out: the page to write.
        against: label of the group that the others are compared with; None: the first.

    Returns:
        The files that were written.

    Raises:
        PageError: a folder is not a run's, no group has that label, or the page cannot be written.
    """
    from clipo_megatron.report import grouping
    from clipo_megatron.report.document import document
    from clipo_megatron.report.reading import PageError, read_run
    from clipo_megatron.report.timing import chrome_trace
    from clipo_megatron.runtime.durable_files import refuse_special, write_output

    try:
        if out.is_dir():
            raise PageError(f"--out {out} is a folder. Give the file to write, such as {out / 'report.html'}")
    except OSError as error:  # a name that is too long
        raise PageError(f"{out} cannot be written: {error.strerror or error}. Choose another --out") from error
    groups = grouping.group_runs([read_run(folder) for folder in {each.resolve(): each for each in folders}.values()])
    if against is not None:
        groups = grouping.against(groups, against)
    page = document(groups, made=time.strftime("%Y-%m-%d %H:%M"))
    written = {out: page}
    if traced := [run for group in groups for run in group.runs if run.traces]:
        written[out.with_suffix(".trace.json")] = json.dumps(chrome_trace(traced))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path in written:
            refuse_special(path, written[path][:_TELLING])
        for path, text in written.items():
            write_output(path, text)
    except OSError as error:
        raise PageError(f"{out} cannot be written: {error.strerror or error}. Choose another --out") from error
    return list(written)
