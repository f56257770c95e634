"""Lines of rollouts.jsonl and trace.jsonl that a page can show: with every field that it reads, in its type."""

from __future__ import annotations

from typing import Any

from clipo_megatron.telemetry.sinks import is_number


def is_group(line: dict[str, Any]) -> bool:
    """Whether a line is a group of rollouts with their texts, as `SampleLog` writes it."""
    messages, rollouts = line.get("messages", []), line.get("rollouts")
    return (
        isinstance(line.get("prompt_id"), str)
        and isinstance(messages, list)
        and isinstance(rollouts, list)
        and all(isinstance(each, dict) and _is_rollout(each) for each in rollouts)
    )


def is_trace(line: dict[str, Any]) -> bool:
    """Whether a line is a step's phases by rank, as `Recorder` writes it."""
    ranks = line.get("ranks")
    return isinstance(ranks, list) and all(isinstance(each, dict) and _is_rank(each) for each in ranks)


def _is_rollout(facts: dict[str, Any]) -> bool:
    return (
        isinstance(facts.get("text"), str)
        and "correct" in facts
        and isinstance(facts["correct"], bool | None)
        and all(facts.get(name) is None or is_number(facts[name]) for name in ("reward", "bonus"))
    )


def _is_rank(facts: dict[str, Any]) -> bool:
    spans, peak = facts.get("spans", []), facts.get("peak_memory")
    return isinstance(spans, list) and all(map(_is_span, spans)) and (peak is None or is_number(peak))


def _is_span(span: Any) -> bool:
    return (
        isinstance(span, list)
        and len(span) == 3
        and isinstance(span[0], str)
        and is_number(span[1])
        and is_number(span[2])
        and span[1] <= span[2]
    )
