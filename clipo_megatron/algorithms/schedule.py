"""What changes over the first steps of a run."""

from __future__ import annotations

from typing import Any

from clipo_megatron.algorithms.hook import Hook
from clipo_megatron.flow import Experience


class Scheduled(Hook):
    """A stage that counts the steps in which the policy learned: those in which another stage held it do not count."""

    def __init__(self) -> None:
        self.steps = 0  # before this one

    def linear(self, start: float, end: float, steps: int) -> float:
        """From `start` in the first step to `end` after `steps` of them, and `end` from then on."""
        share = min(self.steps / steps, 1.0) if steps > 0 else 1.0
        return start + (end - start) * share

    def learned(self, experience: Experience) -> None:
        """Count the step."""
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.steps = int(state["steps"])
