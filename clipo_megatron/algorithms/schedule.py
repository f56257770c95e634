"""What changes over the first steps of a run."""

from __future__ import annotations

from typing import Any

from clipo_megatron.algorithms.hook import Hook
from clipo_megatron.flow import Experience


class Scheduled(Hook):
    """A hook that counts the steps in which the policy learned; steps in which a hook froze it do not count."""

    steps = 0  # in which the policy learned, before the current one

    def linear(self, start: float, end: float, steps: int) -> float:
        """The current value of a schedule: linearly from `start` in the first step to `end` after `steps` steps."""
        share = min(self.steps / steps, 1.0) if steps > 0 else 1.0
        return start + (end - start) * share

    def after_update(self, experience: Experience, *, learned: bool) -> None:
        self.steps += learned

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
