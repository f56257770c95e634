"""Texts of a few rollouts of each step, to read what the policy does: rollouts.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from torch import Tensor

from clipo_megatron.flow import RolloutTable, ScoredGroup
from clipo_megatron.telemetry.sinks import append, keep_before


class SampleLog:
    """Writes the texts of the first `groups` groups that this rank generated in a step."""

    def __init__(self, path: Path, *, groups: int):
        self.path, self.groups = path, groups
        self._file: TextIO | None = None

    def open(self, *, from_step: int) -> None:
        """Open the log; lines of steps from `from_step` on are dropped."""
        keep_before(self.path, from_step)
        self._file = self.path.open("a", buffering=1)

    def write(
        self,
        scored: Sequence[ScoredGroup],
        table: RolloutTable,
        reward: Tensor,
        advantage: Tensor,
        bonus: Tensor | None = None,
        *,
        groups: int | None = None,
    ) -> None:
        """Write a line for each group: question, responses, verdicts, rewards, advantages and contrastive bonuses.

        A larger `groups` than the usual number takes groups with right and wrong rollouts first.
        """
        if self._file is None:
            return
        wanted, listed = self.groups, list(scored)
        if groups is not None and groups > wanted:
            wanted = groups
            listed.sort(key=lambda each: len({verdict.correct for verdict in each.verdicts} - {None}) < 2)
        for each in listed[:wanted]:
            group = each.group
            rows = (table.group == group.position).nonzero().squeeze(1).tolist()
            line = {
                "step": table.step,
                "prompt_id": group.prompt.id,
                "messages": [dict(message) for message in group.prompt.messages],
                "ground_truth": group.prompt.ground_truth,
                "rollouts": [
                    {
                        "text": rollout.text,
                        "correct": verdict.correct,
                        "why_ungraded": verdict.reason,
                        "reward": float(reward[row]),
                        "advantage": float(advantage[row]),
                        "bonus": None if bonus is None else float(bonus[row]),
                        "finish": rollout.finish,
                        "version": rollout.version,
                    }
                    for rollout, verdict, row in zip(group.rollouts, each.verdicts, rows, strict=True)
                ],
            }
            append(self._file, json.dumps(line) + "\n")

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None
