"""Former experiences in checkpoints: gathered from the ranks that trained them, distributed again in any layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.hook import Replay
from clipo_megatron.flow import Experience, MicroBatch, RolloutTable, Sample
from clipo_megatron.policy.batch.batching import Batcher
from clipo_megatron.policy.batch.columns import by_rollout, with_columns

HOST = torch.device("cpu")
SAMPLED = ("response", "logprobs", "support")  # columns that rollouts come with; scoring adds the others
# Names in checkpoints of earlier versions.
OLD_NAMES = {"words": "text_columns", "signals.advantage": "token_advantages"}


class ReplayCheckpointer:
    """Saves and restores what the `Replay` hooks of an algorithm keep. All ranks call both methods.

    A state holds whole tables, and, for each rollout in the order of rows, its tokens and the columns that the last
    pipeline stage has of them. So a run in another layout can distribute the rollouts again, and one in the same layout
    gets the same micro-batches.
    """

    def __init__(self, algorithm: Algorithm, batcher: Batcher):
        self.algorithm, self.batcher = algorithm, batcher

    def state_dict(self) -> dict[str, Any]:
        """The experiences, by the hook's index in the algorithm; complete on rank 0 only."""
        return {
            str(place): self._gathered(hook.previous)
            for place, hook in enumerate(self.algorithm.hooks)
            if isinstance(hook, Replay) and hook.previous is not None
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        for place, hook in enumerate(self.algorithm.hooks):
            if isinstance(hook, Replay):
                hook.previous = self._restored(state[str(place)]) if str(place) in state else None

    def _gathered(self, experience: Experience) -> dict[str, Any]:
        layout, table = self.batcher.layout, experience.table
        mine: dict[int, dict[str, Tensor]] = {}
        if layout.is_last_stage and layout.tp_rank == 0 and layout.share.rank == 0:
            for batch in experience.mini_batches:
                mine |= {row: facts for micro in batch.micro_batches for row, facts in _rollouts_of(micro)}
        everybody: list[dict[int, dict[str, Tensor]]] = [{} for _ in range(layout.world)]
        dist.gather_object(mine, everybody if layout.rank == 0 else None)
        by_row = {row: facts for part in everybody for row, facts in part.items()}
        if not by_row:
            return {}
        names = list(by_row[0])
        return {
            "table": {each.name: getattr(table, each.name) for each in fields(table)},
            "columns": {"reward": experience.reward, "advantage": experience.advantage, "keep": experience.keep},
            "tokens": {name: torch.cat([by_row[row][name] for row in range(table.size)]) for name in names},
        }

    def _restored(self, state: dict[str, Any]) -> Experience:
        table = RolloutTable(**_renamed(state["table"]))
        responses = table.response_length.tolist()
        tokens = _renamed(state["tokens"])
        prompts = tokens.pop("prompt").long().split(table.prompt_length.tolist())
        lengths = (table.prompt_length + table.response_length).tolist()
        routes = tokens.pop("routes").split(lengths) if "routes" in tokens else None
        by_row = {name: values.split(responses) for name, values in tokens.items()}
        samples = {
            row: Sample(
                row,
                int(table.group[row]),
                prompt,
                by_row["response"][row].long(),
                by_row["logprobs"][row],
                by_row["support"][row] if "support" in by_row else None,
                routes[row] if routes else None,
            )
            for row, prompt in enumerate(prompts)
        }
        batches = self.batcher.repack_mini_batches(samples, table)
        experience = Experience(table, batches, **state["columns"]).to(HOST)
        if self.batcher.layout.is_last_stage:
            nothing = {name: values[0][:0] for name, values in by_row.items() if name not in SAMPLED}
            for batch in experience.mini_batches:
                batch.micro_batches = [with_columns(micro, by_row, nothing) for micro in batch.micro_batches]
        return experience


def _renamed(columns: dict[str, Any]) -> dict[str, Any]:
    return {OLD_NAMES.get(name, name): values for name, values in columns.items()}


def _rollouts_of(micro: MicroBatch) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The row of each rollout, and the columns of its tokens."""
    for sample, parts in by_rollout(micro):
        own = {"prompt": sample.prompt.int(), "response": sample.response.int(), "logprobs": sample.logprobs}
        if sample.support is not None:
            own["support"] = sample.support
        if sample.routes is not None:
            own["routes"] = sample.routes
        yield sample.row, own | {name: values.clone() for name, values in parts.items() if name != "returns"}
