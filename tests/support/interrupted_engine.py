"""The local engine with planned interruptions.

Like servers it continues partial rollouts, returns them when it is stopped, continues requests across an update of the
weights, and is lost, at moments that are drawn from a seed. It records the requests it gets and answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from clipo_megatron.flow import RolloutGroup
from clipo_megatron.rollout.engine import Cancelled, EngineLostError, Generation, Request, SamplingParams, ignore, never
from clipo_megatron.rollout.local.engine import LocalEngine


class InterruptedEngine:
    """Is lost with probability `loss` before each group, at most `limit` times. Answers in any order, or `in_order`."""

    def __init__(
        self, engine: LocalEngine, seed: int, *, loss: float = 0.0, limit: int = 1 << 30, in_order: bool = False
    ):
        self.engine, self.random = engine, random.Random(seed)
        self.loss, self.limit, self.in_order = loss, limit, in_order
        self.up = True
        self.detached: dict[int, Request] = {}
        self.asked: list[int] = []  # positions in order, once for each time they were sent
        self.answered: list[int] = []
        self.losses = self.stops = self.resumed = 0

    @property
    def version(self) -> int:
        return self.engine.version

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        self.engine.load_weights(tensors, version=version)
        self.up = True

    def take_statistics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.engine.close()

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        *,
        deadline_s: float,
        should_cancel: Callable[[], bool] = never,
    ) -> Generation:
        open_ = {request.position: request for request in (*self.detached.values(), *requests)}
        assert len(open_) == len(self.detached) + len(requests)
        self.asked += [request.position for request in requests]
        self.detached = {}
        return _Interrupted(self, open_, params, deadline_s, should_cancel)

    def complete(self, request: Request, params: SamplingParams, deadline_s: float) -> RolloutGroup:
        """Generate all rollouts of a request; partial ones continue under the current weights."""
        self.resumed += sum(each.finish == "abort" for each in request.begun)
        (group,) = self.engine.generate([request], params, deadline_s=deadline_s)
        return group

    def interrupt(self, request: Request, params: SamplingParams) -> Request:
        """Interrupt the request at a random moment, when some rollouts are complete, some partial and some missing."""
        begun = []
        for rollout in self.complete(request, params, 60.0).rollouts:
            had = max((each.tokens.numel() for each in request.begun if each.sample == rollout.sample), default=0)
            kept = self.random.randint(had, rollout.tokens.numel())
            if kept == rollout.tokens.numel():
                begun.append(rollout)
            elif kept:
                parts = {name: getattr(rollout, name)[:kept] for name in ("tokens", "logprobs", "versions")}
                begun.append(replace(rollout, **parts, text="", finish="abort"))
        return request._replace(begun=tuple(begun))


class _Interrupted(Generation):
    def __init__(
        self,
        engine: InterruptedEngine,
        open_: dict[int, Request],
        params: SamplingParams,
        deadline_s: float,
        should_cancel: Callable[[], bool],
    ):
        self.engine, self.open, self.params, self.deadline_s, self.should_cancel = (
            engine,
            open_,
            params,
            deadline_s,
            should_cancel,
        )
        super().__init__(self._answers())

    def _answers(self) -> Iterator[RolloutGroup]:
        engine = self.engine
        while self.open:
            if self.should_cancel():
                raise Cancelled
            if not engine.up or (engine.losses < engine.limit and engine.random.random() < engine.loss):
                engine.losses += 1
                engine.up = False
                have = [
                    engine.interrupt(each, self.params) if engine.random.random() < 0.5 else each
                    for each in self.open.values()
                ]
                raise EngineLostError("lost on purpose", have)
            position = min(self.open) if engine.in_order else engine.random.choice(sorted(self.open))
            group = engine.complete(self.open.pop(position), self.params, self.deadline_s)
            engine.answered.append(position)
            yield group

    def stop(self) -> list[RolloutGroup]:
        self.engine.stops += 1
        have = [self.engine.interrupt(each, self.params) for each in self.open.values()]
        self.close()
        return [RolloutGroup(each.position, each.prompt, list(each.begun)) for each in have if each.begun]

    def detach(self, on_group: Callable[[RolloutGroup], None] = ignore) -> None:
        """Some requests get on while the caller does other things."""
        engine = self.engine
        engine.detached = {
            position: engine.interrupt(each, self.params) if engine.random.random() < 0.5 else each
            for position, each in self.open.items()
        }

    def close(self) -> None:
        self.open = {}
        self.engine.detached = {}
        super().close()
