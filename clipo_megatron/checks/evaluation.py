"""Checks of the section `eval`."""

from __future__ import annotations

from collections.abc import Iterator

from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.schema import RunConfig


def evaluation_problems(config: RunConfig) -> Iterator[ConfigProblem]:
    """Problems of `eval`: several greedy samples, which would all be the same, or a k of pass@k above their number."""
    settings = config.eval
    if settings.samples > 1 and settings.temperature == 0:
        reason = "eval.temperature is 0, so all samples of a problem would be the same greedy answer"
        remedy = "Set it to 1, or eval.temperature above 0; the paper uses 0.6"
        yield ConfigProblem("eval.samples", reason, remedy, settings.samples)
    for k in settings.ks:
        if not 1 <= k <= settings.samples:
            reason = f"pass@{k} is about {k} of the samples of a problem, and eval.samples is {settings.samples}"
            yield ConfigProblem("eval.ks", reason, "Keep each between 1 and eval.samples", settings.ks)
            break
