"""Names in metrics.jsonl that more than one package reads."""

PHASES = ("generate", "exchange", "score", "update", "sync")  # of a step, in order; each has a `phase_time`
ALL_PHASES = (*PHASES, "other")  # with the time of a step that no phase covers
STEP_TIME = "time/step_s"
TOKENS_PER_S = "speed/tokens_per_s_per_rank"  # prompt and response tokens of a step over its time and the ranks

AGE_MEAN, AGE_MAX = "off_policy/age_mean", "off_policy/age_max"  # updates between a token's weights and its step
SPANNING_GROUPS = "off_policy/spanning_groups"  # share of groups with tokens of several versions
EFFECTIVE_SAMPLES = "off_policy/effective_samples"  # share of the tokens that still counts under importance weights


def age_share(age: int) -> str:
    """The name of the share of a step's tokens that are so many updates old."""
    return f"off_policy/age_{age}"


def phase_time(phase: str) -> str:
    """The name of the seconds that a phase of a step took."""
    return f"time/{phase}_s"
