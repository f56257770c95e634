"""What every command on ranks needs: process group, layout, heartbeat, stop signal, tokenizer, held-out problems."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from clipo_megatron.config.model_folder import hf_folder
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.data.splits import ProblemSets
from clipo_megatron.data.stopping import stop_ids
from clipo_megatron.data.tokenizer import load_tokenizer
from clipo_megatron.flow import Prompt
from clipo_megatron.policy import parallel
from clipo_megatron.rewards.row_checks import check_answers
from clipo_megatron.runtime.heartbeat import Heartbeat
from clipo_megatron.runtime.platform import platform
from clipo_megatron.runtime.rendezvous import meet
from clipo_megatron.runtime.run_dir import PROMPTS, lock_output
from clipo_megatron.telemetry.reporter import Reporter
from clipo_megatron.training.stop_signal import GRACE_PERIOD_S, StoppedEarly, StopSignal


class Session:
    """One rank of a command, connected with the others. Constructing it is collective.

    If that fails the process is expected to end, so nothing is closed: a rank that left the process group early could
    fail the other ranks before the user reads why.

    Args:
        config: the configuration of the run, already checked.
        locks_output: whether no other run may write to the output folder meanwhile.
        judges_golds: whether gold answers are judged here; for training that was done before its ranks met.

    Raises:
        StoppedEarly: a signal asked a rank to end while the ranks started.
    """

    def __init__(self, config: RunConfig, *, locks_output: bool = True, judges_golds: bool = False):
        self.config = config
        self.output = Path(config.train.output)
        random.seed(config.train.seed)
        torch.manual_seed(config.train.seed)
        if not dist.is_initialized():
            meet(config.layout.distributed_timeout_s)
        grace_period_s = GRACE_PERIOD_S if config.faults.grace_period_s is None else config.faults.grace_period_s
        announce = dist.get_rank() == 0 and config.report.console
        self.stop = StopSignal(announce=announce, grace_period_s=grace_period_s)
        self.heartbeat = Heartbeat(
            dist.get_rank(),
            dist.get_world_size(),
            platform().own_store("heartbeat"),
            heartbeat_timeout_s=config.faults.heartbeat_timeout_s,
            phase_timeout_s=config.faults.phase_timeout_s,
            remedy="faults.heartbeat_timeout_s sets the limit; the same command resumes from the newest checkpoint",
            stop=self.stop,
        )
        self.heartbeat.start()
        self._end_if_asked()
        self.layout = parallel.initialize(config.layout, seed=config.train.seed)
        self.is_main = self.layout.rank == 0
        self._lock = lock_output(self.output) if self.is_main and locks_output else None
        self.reporter = Reporter(config, is_main=self.is_main)

        model_files = hf_folder(config.model.path)
        self.tokenizer = load_tokenizer(model_files)
        self.stop_ids = stop_ids(model_files, self.tokenizer, config.rollout.stop_tokens)
        self.problems = ProblemSets(
            config, self.tokenizer, self.reporter.say, self._folder_of_prompts(), once=_made_by_rank_zero
        )
        self.held_out = self.problems.held_out()
        self.eval_prompts: Sequence[Prompt] = self.held_out or []
        if judges_golds and self.is_main and self.held_out is not None:
            check_answers(config, self.held_out.rows())
        self._end_if_asked()  # what follows takes long: a model is built and loaded

    def _end_if_asked(self) -> None:
        if self.stop.on_any_rank():
            self.heartbeat.stop()
            raise StoppedEarly(self.stop.signum)

    def _folder_of_prompts(self) -> Path | None:
        """Where the prompts of all ranks are kept; None, on all ranks, where rank 0 may not write; collective."""
        found = [self.output / PROMPTS if os.access(self.output, os.W_OK) else None]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def close(self) -> None:
        """Leave the process group, and unlock the output folder; calling it again does nothing."""
        self.heartbeat.stop()
        parallel.shutdown()
        if self._lock is not None:
            self._lock.close()


def _made_by_rank_zero(make: Callable[[], Path]) -> Path:
    """The file that `make` makes on rank 0; ranks with another disk do not see it and make their own; collective."""
    found = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0] if found[0] is not None and found[0].is_file() else make()
