"""Whether the answers of a run's problems can be graded as the section `reward` says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from clipo_megatron.config.errors import ConfigProblem
from clipo_megatron.config.schema import GraderMode, GraderSandbox, RewardConfig
from clipo_megatron.rewards import sandbox
from clipo_megatron.rewards.modes import mode_for
from clipo_megatron.rewards.reasoning_gym import PREFIX, known_name
from clipo_megatron.rewards.row_checks import source_problems


def grading_problems(reward: RewardConfig, data_sources: Mapping[str, int]) -> Iterator[ConfigProblem]:
    """What is wrong with how the answers of these data sources are graded.

    Args:
        reward: the section.
        data_sources: how many rows each data source has, over training and held-out problems.
    """
    yield from source_problems(reward, data_sources)
    sandboxed = reward.sandbox is not GraderSandbox.none
    layers = sandbox.layers_of_this_machine() if sandboxed else ()
    if sandboxed and not layers:
        reason = "no grader process can be started on this machine, so no answer would get a verdict"
        remedy = "Free memory and processes, or mend this Python environment: `clipo doctor` shows what graders have"
        yield ConfigProblem("reward", reason, remedy, show_value=False)
    elif reward.sandbox is GraderSandbox.required and (reason := sandbox.missing(layers)):
        yield ConfigProblem("reward.sandbox", reason, sandbox.REMEDY, reward.sandbox)
    for name in sorted(data_sources):
        mode = reward.by_source.get(name, reward.mode)
        if mode is GraderMode.auto:
            mode = GraderMode(mode_for(name))
        if mode is GraderMode.reasoning_gym and not known_name(name.removeprefix(PREFIX)):
            reason = f"{data_sources[name]} rows are to be graded by reasoning-gym, which has no such data set"
            remedy = f"Write {PREFIX}NAME with one of its names into the rows, or give reward.by_source another mode"
            yield ConfigProblem("data_source", reason, remedy, name)


def sandbox_here() -> tuple[str, str]:
    """The layers of the sandbox that graders have on this machine, and what its lack of others means."""
    layers = sandbox.layers_of_this_machine()
    return ", ".join(layers) or "none", sandbox.missing(layers)
