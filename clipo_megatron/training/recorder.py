"""Records texts, hidden states and traces of some steps, to be looked at later."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from clipo_megatron.config.schema import RunConfig
from clipo_megatron.flow import RolloutTable, ScoredGroup
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.parallel import Layout
from clipo_megatron.runtime.platform import platform
from clipo_megatron.runtime.run_dir import LEDGER, ROLLOUTS, STATES, TRACE
from clipo_megatron.telemetry.console import Stopwatch
from clipo_megatron.telemetry.samples import SampleLog
from clipo_megatron.telemetry.sinks import append, keep_before, writing
from clipo_megatron.telemetry.states import States, StateWriter, chosen, forget_states
from clipo_megatron.training.ledger import Ledger

GROUPS_WITH_STATES = 8  # groups whose texts are recorded in a step whose states are


class Recorder:
    """Records what the report settings ask for; every rank has one. It does not change what the run computes.

    Hidden states are summed over the data-parallel ranks of the last stage, and the first of them writes them in a
    thread. Rank 0 writes texts and traces.
    """

    def __init__(self, config: RunConfig, layout: Layout, actor: PolicyActor):
        self.report, self.steps = config.report, config.train.steps
        self.layout, self.actor = layout, actor
        self.output = Path(config.train.output)
        self.samples = SampleLog(self.output / ROLLOUTS, groups=self.report.save_rollouts)
        self.ledger = Ledger(self.output / LEDGER)
        self._states = StateWriter(self.output / STATES)
        self._trace: TextIO | None = None
        actor.wants_states = self.wants_states

    def wants_states(self, step: int) -> bool:
        """Whether the step's hidden states are recorded: in the first, the last, and multiples of states_every."""
        every = self.report.states_every
        return self.report.save_states > 0 and (step in (0, self.steps - 1) or (every > 0 and step % every == 0))

    def wants_trace(self, step: int) -> bool:
        """Whether the phases of every rank in this step are recorded."""
        every = self.report.trace_every
        return every > 0 and (step % every == 0 or step == self.steps - 1)

    def open(self, step: int) -> None:
        """Open the files for the steps from `step` on; what an earlier attempt recorded of these is dropped."""
        if self.layout.rank != 0:
            return
        forget_states(self.output / STATES, from_step=step)
        self.ledger.open(from_step=step)
        if self.report.save_rollouts:
            self.samples.open(from_step=step)
        if self.report.trace_every:
            keep_before(self.output / TRACE, step)
            with writing(self.output / TRACE):
                self._trace = (self.output / TRACE).open("a", buffering=1)

    def step(
        self,
        scored: Sequence[ScoredGroup],
        table: RolloutTable,
        reward: Tensor,
        advantage: Tensor,
        bonus: Tensor | None,
        watch: Stopwatch,
    ) -> None:
        """Record what is due of the step just done; collective.

        Args:
            scored: this rank's groups.
            table: the step's table, B rows.
            reward: [B] float32.
            advantage: [B] float32.
            bonus: [B] float32, the contrastive part of the reward; None without one.
            watch: this rank's stopwatch of the step.
        """
        if self.wants_states(table.step):
            rows = torch.from_numpy(chosen(table.group.numpy(), self.report.save_states))
            self._record_states(table, rows, bonus)
            kept = int(table.group[rows[-1]])
            among = [each for each in scored if each.group.position <= kept]
            self.samples.write(among, table, reward, advantage, bonus, groups=GROUPS_WITH_STATES)
        else:
            self.samples.write(scored, table, reward, advantage, bonus)
        if self.wants_trace(table.step):
            self._record_trace(table.step, watch)

    def close(self) -> None:
        """Wait until everything is written. Idempotent."""
        self._states.close()
        self.samples.close()
        self.ledger.close()
        if self._trace is not None:
            self._trace.close()
            self._trace = None

    def _record_states(self, table: RolloutTable, rows: Tensor, bonus: Tensor | None) -> None:
        layout, actor = self.layout, self.actor
        if not layout.is_last_stage:
            return
        pooled = torch.zeros(len(rows), actor.spec.hidden_size, dtype=torch.float32, device=platform().device)
        if actor.pooled is not None:
            states, own = actor.pooled
            among = own < len(rows)  # the chosen rows are the table's first
            pooled[own[among].to(pooled.device)] = states[among.to(states.device)].float()
        if layout.dp > 1:
            dist.all_reduce(pooled, group=layout.dp_group)
        if not layout.leads_its_stage:
            return
        head = actor.contrastive
        self._states.write(
            States(
                step=table.step,
                prompt_ids=list(table.prompt_ids[: int(table.group[rows[-1]]) + 1]),
                group=table.group[rows].numpy(),
                correct=table.correct[rows].numpy(),
                graded=table.graded[rows].numpy(),
                pooled=pooled.cpu().numpy(),
                embeddings=None if head is None else head.embeddings[rows.to(head.embeddings.device)].cpu().numpy(),
                bonus=None if bonus is None else bonus[rows].float().cpu().numpy(),
            )
        )

    def _record_trace(self, step: int, watch: Stopwatch) -> None:
        mine = {"spans": watch.spans, "peak_memory": platform().peak_memory()}
        ranks: list[dict] = [{}] * self.layout.world
        dist.all_gather_object(ranks, mine)
        if self._trace is not None:
            append(self._trace, json.dumps({"step": step, "ranks": ranks}) + "\n")
