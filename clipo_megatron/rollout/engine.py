"""The contract every rollout engine keeps: who calls what, when, and what may fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from torch import Tensor

from clipo_megatron.flow import Finish, Prompt, Rollout, RolloutGroup


class EngineError(RuntimeError):
    """The engine cannot go on; the message says what happened, to which request, and what to do."""


class EngineLostError(EngineError):
    """Nothing is left that generates, but it may come back: `unanswered` requests can be asked again after new weights
    were loaded. Groups that were yielded before are complete and stay valid."""

    def __init__(self, message: str, unanswered: Sequence[Request]):
        super().__init__(message)
        self.unanswered = tuple(unanswered)


class Cancelled(RuntimeError):
    """Generation was given up because the run is to end; nothing of it counts, and nothing of it runs any more."""

    def __init__(self) -> None:
        super().__init__("generation was given up, because the run is to end; the same command generates again")


def never() -> bool:
    """For generation that nobody gives up."""
    return False


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How responses are drawn. `temperature == 0` is greedy."""

    samples: int = 1
    max_new_tokens: int = 1024
    window_tokens: int | None = None  # by which a rollout grows at most before it finishes as "window"; None: any
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    stop_ids: tuple[int, ...] = ()
    seed: int = 0  # of the run; the engine derives one seed per (seed, step, prompt id, sample)
    step: int = 0
    exact_logprobs: bool = True  # those of the policy, before truncation; evaluation does not read them

    def limit(self, trained: int = 0) -> int:
        """Tokens at which a response ends or its window does, when `trained` of them are those of earlier windows."""
        return min(self.max_new_tokens, trained + (self.window_tokens or self.max_new_tokens))

    def cut(self, tokens: int) -> Finish:
        """What the finish of a response is that was ended after so many tokens."""
        return "length" if tokens >= self.max_new_tokens else "window"

    def check(self) -> None:
        """Raise EngineError for a value that no engine can follow."""
        rules = {
            "samples": (self.samples >= 1, "at least 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "window_tokens": (self.window_tokens is None or self.window_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise EngineError(f"Sampling parameter {name} is {getattr(self, name)}; it must be {rule}.")


class Request(NamedTuple):
    """One prompt to answer."""

    position: int  # its group carries it; no other request that is unanswered has the same
    prompt: Prompt
    begun: tuple[Rollout, ...] = ()  # rollouts of an interrupted request: aborted ones go on from their tokens


class Generation(Iterator[RolloutGroup]):
    """Groups as they finish, in any order. Exhaust it, `stop`, `close` or `leave` it."""

    def __init__(self, groups: Iterator[RolloutGroup]):
        self._groups = groups

    def __next__(self) -> RolloutGroup:
        return next(self._groups)

    def stop(self) -> list[RolloutGroup]:
        """End what still runs, and return what there is of it: groups in which some rollouts are aborted.

        A rollout without a token yet is left out. An engine that keeps nothing of unfinished groups returns none.
        """
        self.close()
        return []

    def leave(self) -> None:
        """Let what still runs go on, while the weights are updated too.

        The next `generate` yields these groups besides those of its own requests, and an `EngineLostError` of it has
        them among its `unanswered`. Until then `stop` and `close` of this generation end them. An engine that keeps
        nothing running raises EngineError.
        """
        raise EngineError("This engine keeps nothing running between two steps; set rollout.unfinished=drop.")

    def close(self) -> None:
        """End what still runs and forget it. Idempotent."""
        if close := getattr(self._groups, "close", None):
            close()


class Memory(str, Enum):
    """What an engine that shares its GPUs with the trainer can give back."""

    weights = "weights"
    kv_cache = "kv_cache"


class InFlight(str, Enum):
    """What becomes of generation in flight when an engine pauses."""

    abort = "abort"  # it ends, with the tokens it has
    retract = "retract"  # it waits, and goes on under the weights of then; its cache is computed again


class Engine(Protocol):
    """Generates responses with the newest weights it was given.

    Lifecycle: construct -> load_weights(version=0) -> (generate | load_weights | pause .. resume)* -> close. A single
    caller per engine; a `Generation` is exhausted, stopped, closed or left before the next one. The caller owns the
    tensors it passes and gets.
    """

    @property
    def version(self) -> int:
        """Of the weights in use; -1 before the first load."""
        ...

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        *,
        deadline_s: float,
        should_cancel: Callable[[], bool] = never,
    ) -> Generation:
        """One group a request. Token ids and log-probs are the engine's own; no text is tokenised again.

        Args:
            give_up: looked at about every second while a group is waited for; True ends the generation.

        Raises:
            EngineError: when the deadline passes or generation fails; names the prompts without an answer.
            Abandoned: `should_cancel` said so.
        """
        ...

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Take new weights, by Hugging Face name and shape. After it returns, only the new weights generate.

        Raises:
            EngineError: a name or shape that the model lacks, or one that never came; all are listed.
        """
        ...

    def pause(self, in_flight: InFlight = InFlight.abort) -> None:
        """Generate nothing until `resume`. Idempotent."""
        ...

    def resume(self) -> None:
        """Go on after `pause`. Idempotent."""
        ...

    def offload(self, *what: Memory) -> None:
        """Give GPU memory back; nothing is in flight. Weights released have to be loaded again. Idempotent."""
        ...

    def onload(self, *what: Memory) -> None:
        """Take the memory again; its contents are undefined until loaded. Idempotent."""
        ...

    def take_statistics(self) -> dict[str, float]:
        """Counts of what happened since the last call, for the step's report; those of several engines add up."""
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
