"""Notices a run that goes on without learning: no correct answer, or nothing but; a head that pays everybody alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from clipo_megatron.config.schema import RunConfig

STREAK = 5  # steps in a row that show the same before it is said
_SAME = 1e-3  # rewards that differ by less are alike
_ALIKE = 0.999  # cosine from which embeddings are one direction


@dataclass(frozen=True, slots=True)
class Sign:
    """One sign that a run does not learn: what a step shows, and what a user can do if it goes on."""

    name: str
    seen: str  # continues "for 5 steps"
    advice: str


_NO_REWARD = Sign(
    "no reward",
    "no answer was correct, so nothing is learned",
    "Read rollouts.jsonl: do answers have the form that the grader reads (reward.mode), do they end before "
    "rollout.max_new_tokens, and does the model solve these problems at all?",
)
_ALL_RIGHT = Sign(
    "all correct",
    "every answer was correct, so nothing is learned",
    "Take harder problems, or a grader that is harder to please (reward.mode)",
)
_AT_FLOOR = Sign(
    "head at its floor",
    "the bonus of nearly all correct rollouts was clipo.floor, so it tells none of them from another: the head is "
    "saturated",
    "Set clipo.calibrate=true, lower clipo.weight, or lower clipo.floor",
)
_EVEN_BONUS = Sign(
    "even bonus",
    "correct rollouts of a prompt got the same bonus to a thousandth, so it tells none of them from another: the head "
    "is saturated",
    "Raise clipo.temperature, choose clipo.loss=supcon_out, or lower clipo.learning_rate",
)
_COLLAPSED = Sign(
    "collapsed head",
    "the embeddings of correct and wrong rollouts were one direction, so the head sees no difference",
    "Set clipo.debias=mean or layer_norm, raise clipo.learning_rate, or leave clipo.frozen=false",
)


@dataclass
class Standstill:
    """Counts for how many steps in a row each sign was seen; says so after STREAK of them, and at each doubling.

    Args:
        config: the configuration of the run.
    """

    config: RunConfig
    _streaks: dict[str, int] = field(default_factory=dict)

    def warnings(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """The lines to print after a step."""
        lines = []
        seen = self._signs(step, metrics)
        for sign in (_NO_REWARD, _ALL_RIGHT, _AT_FLOOR, _EVEN_BONUS, _COLLAPSED):
            streak = self._streaks[sign.name] = self._streaks.get(sign.name, 0) + 1 if sign in seen else 0
            if streak and streak % STREAK == 0 and _is_power_of_two(streak // STREAK):
                lines.append(f"warning: for {streak} steps {sign.seen}. {sign.advice}.")
        return lines

    def _signs(self, step: int, metrics: Mapping[str, float]) -> list[Sign]:
        found = []
        accuracy = metrics.get("reward/accuracy")
        # With dynamic sampling a step may hold only mixed groups; then accuracy is neither.
        if accuracy == 0.0:
            found.append(_NO_REWARD)
        elif accuracy == 1.0:
            found.append(_ALL_RIGHT)
        if step < self.config.clipo.warmup_steps:
            return found  # the bonus is not paid yet
        positive, negative = metrics.get("clipo/positive_cosine"), metrics.get("clipo/negative_cosine")
        if positive is not None and negative is not None and min(positive, negative) > _ALIKE:
            found.append(_COLLAPSED)
        elif metrics.get("clipo/bonus_at_floor", 0.0) > 1 - _SAME:
            found.append(_AT_FLOOR)
        elif metrics.get("clipo/bonus_spread", 1.0) < _SAME and self.config.clipo.weight:
            found.append(_EVEN_BONUS)
        return found


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
