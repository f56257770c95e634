"""Names in metrics.jsonl that more than one package reads."""

PHASES = ("generate", "exchange", "score", "update", "sync")  # of a step, in order; each has a `phase_time`
ALL_PHASES = (*PHASES, "other")  # with the time of a step that no phase covers
STEP_TIME = "time/step_s"
TOKENS_PER_S = "speed/tokens_per_s_per_rank"  # prompt and response tokens of a step over its time and the ranks


def phase_time(phase: str) -> str:
    """The name of the seconds that a phase of a step took."""
    return f"time/{phase}_s"
