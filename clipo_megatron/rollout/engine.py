"""The contract of every rollout engine: which calls it answers, in which order, and what may fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from torch import Tensor

from clipo_megatron.flow import Finish, Prompt, Rollout, RolloutGroup


class EngineError(RuntimeError):
    """The engine cannot go on; the message says what happened, to which request, and what to do."""


class Routing(NamedTuple):
    """The experts of a model, which answers name for each token (`Rollout.routes`)."""

    layers: int  # of the model, those without experts too
    per_token: int  # experts that a token is sent to
    experts: int  # of a layer


class EngineLostError(EngineError):
    """Every server was lost, but servers may come back.

    The `unanswered` requests can be sent again once the engine has been given weights. Groups that were yielded before
    are complete and stay valid.
    """

    def __init__(self, message: str, unanswered: Sequence[Request]):
        super().__init__(message)
        self.unanswered = tuple(unanswered)


class Cancelled(RuntimeError):
    """Generation was cancelled because the run is to end. Its results are discarded, and none of it still runs."""

    def __init__(self) -> None:
        super().__init__("generation was cancelled, because the run is to end; the same command generates again")


# Tokens that top_p chooses among where nothing else bounds them.
TOP_P_CANDIDATES = 64


def never() -> bool:
    """The default of `should_cancel`: nobody cancels."""
    return False


def ignore(group: RolloutGroup) -> None:
    """The default of `on_group`: nobody wants to know."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How responses are sampled. `temperature == 0` is greedy."""

    samples: int = 1
    max_new_tokens: int = 1024
    window_tokens: int | None = None  # tokens a rollout may grow by in one step; it then finishes as "window"
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps every token
    stop_ids: tuple[int, ...] = ()
    seed: int = 0  # the run's; the engine derives a seed from (seed, step, prompt id, occurrence, sample)
    step: int = 0
    # log-probs must be those of the distribution that was drawn from, with its support; evaluation reads neither
    exact_logprobs: bool = True
    routing: Routing | None = None  # of the model, if rollouts must have their routes

    def token_limit(self, trained: int = 0) -> int:
        """Length at which a response ends, or its window does; its first `trained` tokens are of earlier windows."""
        return min(self.max_new_tokens, trained + (self.window_tokens or self.max_new_tokens))

    def finish_at(self, tokens: int) -> Finish:
        """The finish of a response that reached its token limit at this length."""
        return "length" if tokens >= self.max_new_tokens else "window"

    @property
    def wants_support(self) -> bool:
        """Whether top-p or top-k truncate what is drawn from, and rollouts say to what (`Rollout.support`)."""
        return self.exact_logprobs and self.temperature > 0 and (self.top_p < 1 or self.top_k > 0)

    @property
    def most_support(self) -> int:
        """The largest support: engines may keep more than top_k tokens where several are as likely as the last."""
        return 2 * self.top_k

    def could_give(self, rollout: Rollout) -> bool:
        """Whether a rollout has a number and a length that these allow, and supports and routes if they want them."""
        fits = rollout.sample < self.samples and rollout.tokens.numel() <= self.max_new_tokens
        fits = fits and (rollout.support is not None) == self.wants_support
        if self.routing is None:
            return fits and rollout.routes is None
        return fits and (rollout.routes is not None or rollout.finish == "abort")  # which gets them when it goes on

    def check(self) -> None:
        """Raise EngineError for a value that no engine can follow."""
        rules = {
            "samples": (self.samples >= 1, "at least 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "window_tokens": (self.window_tokens is None or self.window_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            # Without top_k nothing bounds the support.
            "top_k": (self.top_k >= self.wants_support, "0 (off) or more, and with top_p below 1 at least 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise EngineError(f"Sampling parameter {name} is {getattr(self, name)}; it must be {rule}.")


class Request(NamedTuple):
    """One prompt to answer."""

    position: int  # unique among unanswered requests; the request's group carries it
    prompt: Prompt
    begun: tuple[Rollout, ...] = ()  # partial rollouts of an interrupted request; aborted ones continue


def name_prompts(requests: Iterable[Request]) -> str:
    """The ids of the requests' prompts for a message, the first eight spelled out."""
    names = [request.prompt.id for request in requests]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def check_prompts(requests: Iterable[Request], vocabulary: int) -> None:
    """Raise EngineError for a prompt that is empty or has a token id outside `vocabulary` (0: its size is unknown)."""
    for request in requests:
        tokens = request.prompt.tokens
        if not tokens.numel():
            raise EngineError(f"Prompt {request.prompt.id} has no tokens; give it a message.")
        if int(tokens.min()) < 0 or (vocabulary and int(tokens.max()) >= vocabulary):
            raise EngineError(
                f"Prompt {request.prompt.id} has a token outside the model's vocabulary of {vocabulary} (smallest "
                f"{int(tokens.min())}, largest {int(tokens.max())}); tokenise it with the tokenizer of the same folder."
            )


class Generation(Iterator[RolloutGroup]):
    """Yields groups as they finish, in any order. The caller exhausts, stops, closes or detaches it."""

    def __init__(self, groups: Iterator[RolloutGroup]):
        self._groups = groups

    def __next__(self) -> RolloutGroup:
        return next(self._groups)

    def stop(self) -> list[RolloutGroup]:
        """End unfinished requests and return their partial groups, in which some rollouts are aborted.

        Rollouts without a token are left out. An engine that keeps no partial rollouts returns no groups.
        """
        self.close()
        return []

    def detach(self, on_group: Callable[[RolloutGroup], None] = ignore) -> None:
        """Let unfinished requests continue, across an update of the weights too.

        The next `generate` also yields their groups, and lists them in `EngineLostError.unanswered` when it fails.
        Until then `stop` and `close` of this generation end them.

        Args:
            on_group: called in a thread of the engine with each group that is complete from now on, before it is
                yielded; it returns at once.

        Raises:
            EngineError: this engine keeps nothing running between two steps.
        """
        raise EngineError("This engine keeps nothing running between two steps; set rollout.unfinished=drop.")

    def close(self) -> None:
        """End unfinished requests and discard them. Idempotent."""
        if close := getattr(self._groups, "close", None):
            close()


class Memory(str, Enum):
    """GPU memory that an engine can give back to a trainer on the same GPUs."""

    weights = "weights"
    kv_cache = "kv_cache"


class InFlight(str, Enum):
    """What happens to requests in flight when an engine pauses."""

    abort = "abort"  # they end with the tokens they have
    retract = "retract"  # they wait, then continue under the weights of that time with their cache recomputed


class Engine(Protocol):
    """Generates responses with the newest weights it was given.

    Lifecycle: construct -> load_weights(version=0) -> (generate | load_weights | pause .. resume)* -> close. An engine
    has one caller; a `Generation` is exhausted, stopped, closed or detached before the next one starts. The caller
    owns the tensors it passes in and the tensors it gets back.
    """

    @property
    def version(self) -> int:
        """The version of the weights in use; -1 before the first load."""
        ...

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        *,
        deadline_s: float,
        should_cancel: Callable[[], bool] = never,
    ) -> Generation:
        """Yield one group for each request. Token ids and log-probs are the engine's own; text is never re-tokenised.

        Args:
            should_cancel: asked about once a second while the next group is awaited; True ends the generation.

        Raises:
            EngineError: when the deadline passes or generation fails; names the prompts without an answer.
            Cancelled: `should_cancel` returned True.
        """
        ...

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Replace the weights, given by Hugging Face name. After it returns, only the new weights generate.

        Raises:
            EngineError: lists every name or shape that does not fit the model, and every name that is missing.
        """
        ...

    def pause(self, in_flight: InFlight = InFlight.abort) -> None:
        """Stop generating until `resume`. Idempotent."""
        ...

    def resume(self) -> None:
        """Generate again after `pause`. Idempotent."""
        ...

    def offload(self, *what: Memory) -> None:
        """Give GPU memory back while nothing is in flight. Offloaded weights have to be loaded again. Idempotent."""
        ...

    def onload(self, *what: Memory) -> None:
        """Take offloaded memory back; its contents are undefined until loaded. Idempotent."""
        ...

    def take_statistics(self) -> dict[str, float]:
        """Return counters since the last call, for the step's report. Counters of several engines can be added."""
        ...

    def health(self) -> None:
        """Raise EngineError, with the reason, unless the engine can serve."""
        ...

    def close(self) -> None:
        """Free all resources. Idempotent."""
        ...
