"""The HTML document: sections, the bar on top, style and script, in one file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from clipo_megatron import __version__
from clipo_megatron.report.chart import SLOTS
from clipo_megatron.report.contrast import contrast
from clipo_megatron.report.grouping import RunGroup
from clipo_megatron.report.learning import everything_else, held_out, learning
from clipo_megatron.report.overview import overview, settings
from clipo_megatron.report.parts import Section
from clipo_megatron.report.representation import pairs, representation
from clipo_megatron.report.scales import safe
from clipo_megatron.report.timing import timing

# Whatever the text of a rollout contains, the page fetches, sends and frames nothing.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)


def document(groups: Sequence[RunGroup], *, made: str) -> str:
    """The HTML of the report on `groups`, at least one; `made` is the date for the footer."""
    parts = [
        held_out(groups),
        learning(groups),
        contrast(groups),
        representation(groups),
        pairs(groups),
        timing(groups),
    ]
    parts += [everything_else(groups), settings(groups)]
    sections = [
        overview(groups),
        *(part for part in parts if part.body),
    ]  # made last: it lists what the other sections could not read
    title = " vs ".join(group.label for group in groups)
    keys = "".join(
        f'<button class="key c{group.slot % SLOTS}" data-slot="{group.slot}" aria-pressed="true" '
        f'title="Show or hide"><i class="swatch"></i>{safe(group.label)}</button>'
        for group in groups
    )
    entries = "".join(f'<li><a href="#{each.id}">{safe(each.title)}</a></li>' for each in sections)
    style, script = (
        files("clipo_megatron.report").joinpath(name).read_text("utf-8") for name in ("style.css", "script.js")
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{safe(title)} · clipo report</title>
<style>
{style}</style>
</head>
<body>
<div class="bar"><span class="brand">clipo report</span><div class="keys">{keys}</div>
<button class="switch" id="smooth" aria-pressed="false" title="Exponential moving average of the curves">Smooth</button>
<button class="switch" id="theme">Dark</button></div>
<div class="layout">
<nav aria-label="Contents"><ol>{entries}</ol></nav>
<main>
<h1>{safe(title)}</h1>
{"".join(_section(each) for each in sections)}
<footer>Made by clipo-megatron {__version__}, {safe(made)}.</footer>
</main>
</div>
<div class="tip" role="status"></div>
<script>
{script}</script>
</body>
</html>
"""


def _section(each: Section) -> str:
    title = f"<h2>{safe(each.title)}</h2>"
    return f'<section id="{each.id}">{title}<p class="lead">{each.lead}</p>{each.body}</section>'
