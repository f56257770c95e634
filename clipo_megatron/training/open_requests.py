"""The requests of a rank that outlive a round: those carried over, and those that the engine still generates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from clipo_megatron.data.prompt_table import PromptsById
from clipo_megatron.flow import Prompt, Rollout
from clipo_megatron.rollout.engine import Generation, Request
from clipo_megatron.rollout.generate_all import with_partial
from clipo_megatron.training.partial_rollouts import count_unfinished, is_complete


class OpenRequests:
    """This rank's requests that have not trained yet, and the step by which each has to.

    Attributes:
        carried: to be sent again; complete ones wait for their step. Ordered by position.
        running: those that the engine still generates.
        generation: the detached generation that `running` belongs to, if there is one.
        due: position -> the step that trains the request, or has to at the latest.
    """

    def __init__(self) -> None:
        self.carried: list[Request] = []
        self.running: list[Request] = []
        self.generation: Generation | None = None
        self.due: dict[int, int] = {}

    def __iter__(self) -> Iterator[Request]:
        return iter([*self.carried, *self.running])

    def carry(self, requests: Iterable[Request]) -> None:
        """Set which requests are carried over."""
        self.carried = sorted(requests, key=_position)

    def forget_the_others(self) -> None:
        """Forget the steps of requests that are not open any more."""
        self.due = {each.position: self.due[each.position] for each in self if each.position in self.due}

    def stop(self) -> None:
        """End what the engine still generates, and carry its rollouts over as far as they are; frees the engine."""
        if self.generation is not None:
            self.carry([*self.carried, *with_partial(self.generation.stop(), self.running)])
            self.generation, self.running = None, []

    def step_of(self, request: Request) -> int:
        """The step by which a request has to train; 0 for one that a run without such steps has left."""
        return self.due.get(request.position, 0)

    def by_step(self, step: int, *, samples: int, unfinished_rollouts: bool) -> Counter[int]:
        """How much of each batch from `step` on is open: requests, or unfinished rollouts of `samples` a request.

        Requests of earlier steps count for `step`.
        """
        count: Counter[int] = Counter()
        for each in self:
            count[max(step, self.step_of(each))] += count_unfinished([each], samples) if unfinished_rollouts else 1
        return count

    def assign_steps(self, steps: Mapping[int, int]) -> None:
        """Give the requests steps in order of position: so many of each step."""
        in_order = [step for step in sorted(steps) for _ in range(steps[step])]
        pairs = zip(sorted(self, key=_position), in_order, strict=True)
        self.due |= {each.position: step for each, step in pairs}

    def restart_too_old(self, ahead: int) -> int:
        """Let carried rollouts begin anew that would be older than `ahead` updates when they train.

        Only a run that was resumed with a smaller bound has any.

        Returns:
            The number of prompts that begin anew.
        """

        def in_time(rollout: Rollout, step: int) -> bool:
            version = oldest(rollout)
            return version is None or version >= step - ahead

        fresh = [
            each._replace(begun=tuple(kept for kept in each.begun if in_time(kept, self.step_of(each))))
            for each in self.carried
        ]
        changed = sum(len(new.begun) < len(old.begun) for new, old in zip(fresh, self.carried, strict=True))
        self.carried = fresh
        return changed

    def facts(self) -> dict[int, dict[str, Any]]:
        """What a checkpoint holds of each request, by position."""
        return {
            each.position: {
                "id": each.prompt.id,
                "begun": [_facts(rollout) for rollout in each.begun],
                "position": each.position,
                **({"due": self.due[each.position]} if each.position in self.due else {}),
                **({"occurrence": each.prompt.occurrence} if each.prompt.occurrence else {}),
            }
            for each in self
        }


def distribute(
    saved: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt], *, among: int, keeps: Callable[[Rollout], bool]
) -> list[OpenRequests]:
    """The open requests of a checkpoint, in turn to each of so many ranks.

    Args:
        saved: what `OpenRequests.facts` told of each request, in order of position.
        prompts: all training prompts.
        among: the number of ranks.
        keeps: whether a begun rollout can go on; where one of a prompt cannot, the prompt starts again.

    Raises:
        ValueError: a prompt is not among the training prompts.
    """
    by_id = PromptsById(prompts)
    shares = [OpenRequests() for _ in range(among)]
    for place, each in enumerate(saved):
        if each["id"] not in by_id:
            raise ValueError(
                f"the checkpoint holds rollouts of prompt {each['id']}, which is not among the training prompts: "
                "restore data.train, or choose another train.output"
            )
        position = each.get("position", place - len(saved))  # older checkpoints lack it: before all others
        rollouts = tuple(Rollout(**facts) for facts in each["begun"])
        prompt = by_id[each["id"]]
        if occurrence := each.get("occurrence", 0):
            prompt = replace(prompt, occurrence=occurrence)
        share = shares[place % among]
        share.carried.append(Request(position, prompt, rollouts if all(map(keeps, rollouts)) else ()))
        share.due[position] = each.get("due", 0)
    return shares


def oldest(rollout: Rollout) -> int | None:
    """The version of the oldest weights that produced a token which has not trained yet; None if all have trained."""
    return None if rollout.spent else int(rollout.versions[rollout.trained])


def complete_and_waiting(requests: Iterable[Request], samples: int) -> tuple[list[Request], list[Request]]:
    """The requests whose rollouts have all ended, and the others."""
    complete: list[Request] = []
    waiting: list[Request] = []
    for each in requests:
        (complete if is_complete(each, samples) else waiting).append(each)
    return complete, waiting


def _position(request: Request) -> int:
    return request.position


def _facts(rollout: Rollout) -> dict[str, Any]:
    return {each.name: getattr(rollout, each.name) for each in fields(Rollout)}
