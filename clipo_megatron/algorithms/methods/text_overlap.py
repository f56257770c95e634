"""A control that reads no hidden state: correct responses in the words of the others get the bonus."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.clipo.reward import comparable, standardised_reward
from clipo_megatron.algorithms.hook import Hook, MethodOptions
from clipo_megatron.config.ranges import within
from clipo_megatron.flow import Prompt, Rollout, RolloutTable

if TYPE_CHECKING:
    from torch import Tensor

Grams = Counter[tuple[str, ...]]


@dataclass
class TextOverlapOptions(MethodOptions):
    weight: float = 0.2  # bonus of one standard deviation among a group's correct rollouts
    n: int = within(2, 1)  # tokens of the runs that are compared


class TextOverlap(Hook):
    """A control: the bonus of a correct rollout is the mean overlap of its tokens with those of each other correct one
    of its group, standardised as `likelihood` does.

    Responses are compared by their n-grams, runs of n tokens, each as often as it occurs: 2 |X and Y| / (|X| + |Y|). A
    shorter response is one run. Token ids travel between ranks as text. Paid where CLIPO pays at group level: in
    groups with two correct rollouts or more and a wrong one.
    """

    source = "control"
    summary = "bonus by common tokens with other correct responses"
    options_class = TextOverlapOptions

    def observe(self, prompt: Prompt, rollout: Rollout) -> dict[str, float | str]:
        return {"text_overlap/tokens": " ".join(map(str, rollout.tokens.tolist()))}

    def bonus(self, table: RolloutTable) -> Tensor:
        paid, score = comparable(table), torch.zeros(table.size, dtype=torch.float64)
        for group in range(len(table.prompt_ids)):
            rows = (paid & (table.group == group)).nonzero().squeeze(1).tolist()
            grams = {row: self._grams(table.text_columns["text_overlap/tokens"][row]) for row in rows}
            for row in rows:
                score[row] = sum(_overlap(grams[row], grams[other]) for other in rows if other != row) / (len(rows) - 1)
        return standardised_reward(score, paid, table.group, weight=self.options.weight).float()

    def _grams(self, text: str) -> Grams:
        tokens = text.split()
        n = min(self.options.n, len(tokens))
        return Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def _overlap(one: Grams, other: Grams) -> float:
    return 2 * (one & other).total() / (one.total() + other.total())
