"""Checks of the section `eval`."""

from __future__ import annotations

from collections.abc import Iterator

from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.schema import RunConfig

MOST_SAMPLES = 1000  # of a problem: numbers of draws then stay below what float64 can hold


def evaluation_problems(config: RunConfig) -> Iterator[ConfigProblem]:
    """How evaluation samples, and which k's its figures are for."""
    settings = config.eval
    if not 0 < settings.top_p <= 1:
        reason = "it is a share of the probability mass"
        yield ConfigProblem(
            "eval.top_p", reason, "Set it above 0 and at most to 1 (off); the paper uses 0.95", settings.top_p
        )
    if settings.samples > MOST_SAMPLES:
        reason = f"votes are counted for at most {MOST_SAMPLES} samples of a problem"
        yield ConfigProblem("eval.samples", reason, "Lower it; 16 and 64 are usual", settings.samples)
    if settings.samples > 1 and settings.temperature == 0:
        reason = "eval.temperature is 0, so all samples of a problem would be the same greedy answer"
        remedy = "Set it to 1, or eval.temperature above 0; the paper uses 0.6"
        yield ConfigProblem("eval.samples", reason, remedy, settings.samples)
    for k in settings.ks:
        if not 1 <= k <= settings.samples:
            reason = f"pass@{k} is about {k} of the samples of a problem, and eval.samples is {settings.samples}"
            yield ConfigProblem("eval.ks", reason, "Keep each between 1 and eval.samples", settings.ks)
            break
