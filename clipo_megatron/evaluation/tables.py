"""Evaluations and comparisons as tables of text for a terminal. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from clipo_megatron.data.sources import source_of
from clipo_megatron.evaluation.comparing import Comparison, comparisons
from clipo_megatron.evaluation.results import Evaluation, Figures

Table = tuple[list[str], list[list[str]]]
_MOST_KS = 3  # columns of pass@k and of maj@k; the file has all of them


def summary_line(result: Evaluation) -> str:
    """An evaluation as one line: accuracy, standard error, accuracy of each of several sets, truncated and ungraded."""
    whole = result.figures()
    error = "" if not whole.error else f" ± {_points(whole.error)} (SE)"
    line = f"held-out accuracy after {result.step} steps: {whole.accuracy:.1%}{error} of {whole.problems} problems"
    if len(result.sources) > 1:
        line += f" ({', '.join(f'{source} {value:.1%}' for source, value in result.by_source().items())})"
    if missing := sum(result.left_out.values()):
        line += f" ({missing} more are too long and were not asked)"
    line += f" ({whole.truncated:.0%} cut at the length limit"
    return line + (f", {whole.ungraded:.1%} could not be graded and count as wrong)" if whole.ungraded else ")")


def result_table(result: Evaluation) -> Table:
    """A row for each set; with several sets also for all problems and for the mean of sets."""
    ks = [k for k in result.settings.ks if k > 1][-_MOST_KS:]
    headings = ["set", "problems", "pass@1", "± SE"]
    headings += [f"{kind}@{k}" for kind in ("pass", "maj") for k in ks]
    headings += ["tokens", "cut", "ungraded"]
    rows = [_row(source, result.figures(source), ks) for source in result.sources]
    if len(rows) > 1:
        rows.append(_row("all problems", result.figures(), ks))
        mean, error = result.mean_of_sets
        rows.append(["mean of sets", "", f"{mean:.1%}", _points(error), *[""] * (len(headings) - 4)])
    return headings, rows


def left_out_lines(result: Evaluation) -> list[str]:
    """A sentence for each set of which problems were not asked."""
    asked = Counter(map(source_of, result.problems))
    return [
        f"{source}: {count} of {count + asked[source]} problems have prompts of more than data.max_prompt_tokens "
        f"tokens and were not asked; {'the figures are of the others' if asked[source] else 'it has no figures'}"
        for source, count in sorted(result.left_out.items())
    ]


def _row(name: str, figures: Figures, ks: Sequence[int]) -> list[str]:
    of_k = [f"{values[k]:.1%}" if k in values else "-" for values in (figures.pass_at, figures.majority_at) for k in ks]
    return [
        name,
        str(figures.problems),
        f"{figures.accuracy:.1%}",
        _points(figures.error),
        *of_k,
        f"{figures.length:.0f}",
        f"{figures.truncated:.1%}",
        f"{figures.ungraded:.1%}",
    ]


def _points(error: float | None) -> str:
    """A standard error in points; "-" for one problem, or for figures that are all equal."""
    return f"{100 * error:.1f}" if error else "-"


def progress_table(before: Evaluation, after: Evaluation) -> Table:
    """What training changed: a row for each set, and with several one for all problems. It fits into 80 columns.

    `gained` counts the problems solved only after training, `lost` those solved only before.
    """
    headings = ["set", "problems", "before", "after", "points", "gained", "lost", "p"]
    rows = [[*row[:5], *row[6:]] for row in comparison_table(comparisons(before, after))[1]]
    return headings, rows[:-1] if len(rows) > 1 else rows


def comparison_table(found: Sequence[Comparison]) -> Table:
    """A row for each comparison; the difference is in points, hundredths of an accuracy."""
    headings = ["set", "problems", "A", "B", "B - A", "95%", "only B", "only A", "p"]
    rows = [
        [
            each.source,
            str(each.problems),
            f"{each.before:.1%}",
            f"{each.after:.1%}",
            f"{100 * each.difference:+.1f}",
            f"{100 * each.low:+.1f} .. {100 * each.high:+.1f}" if each.has_interval else "-",
            str(each.gained),
            str(each.lost),
            "-" if each.p_value is None else f"{each.p_value:.2g}",
        ]
        for each in found
    ]
    return headings, rows


def lines_of(table: Table) -> list[str]:
    """A table as lines of text, with the first column left-aligned and the others right-aligned."""
    headings, rows = table
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (headings, *rows)
    ]
