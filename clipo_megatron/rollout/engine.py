"""The contract every rollout engine keeps: who calls what, when, and what may fail."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from clipo_megatron.flow import Prompt, RolloutGroup


class EngineError(RuntimeError):
    """The engine cannot go on; the message says what happened, to which request, and what to do."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How responses are drawn. `temperature == 0` is greedy."""

    samples: int = 1
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    stop_ids: tuple[int, ...] = ()
    seed: int = 0  # of the run; the engine derives one seed per (seed, step, prompt id, sample)
    step: int = 0


class Engine(Protocol):
    """Generates responses with the newest weights it was given.

    Lifecycle: construct -> load_weights(version=0) -> (generate | load_weights)* -> close. A single caller per engine;
    `generate` is exhausted or closed before the next call. The caller owns the tensors it passes and gets.
    """

    @property
    def version(self) -> int:
        """Of the weights in use; -1 before the first load."""
        ...

    def generate(
        self, prompts: Sequence[tuple[int, Prompt]], params: SamplingParams, *, deadline_s: float
    ) -> Iterator[RolloutGroup]:
        """Yield one group per (position, prompt), as each finishes, in any order.

        Raises:
            EngineError: when the deadline passes or generation fails; names the prompts without an answer.
        """
        ...

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Take new weights, by Hugging Face name and shape. After it returns, only the new weights generate.

        Raises:
            EngineError: a name or shape that the model lacks, or one that never came; all are listed.
        """
        ...

    def health(self) -> None:
        """Return when the engine can serve.

        Raises:
            EngineError: with the reason when it cannot.
        """
        ...

    def close(self) -> None:
        """Free everything. Idempotent."""
        ...
