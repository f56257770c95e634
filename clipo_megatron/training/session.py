"""What every command on ranks needs: process group, layout, heartbeat, stop signal, tokenizer, held-out problems."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clipo_megatron.config.model_folder import hf_folder
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.data.prompts import load_tokenizer
from clipo_megatron.data.splits import held_out_problems
from clipo_megatron.policy import parallel
from clipo_megatron.rewards.row_checks import check_answers
from clipo_megatron.runtime.heartbeat import Heartbeat
from clipo_megatron.runtime.platform import platform
from clipo_megatron.runtime.rendezvous import rendezvous
from clipo_megatron.runtime.run_dir import lock_output
from clipo_megatron.telemetry.reporter import Reporter
from clipo_megatron.training.stop_signal import GRACE_PERIOD_S, StopSignal


class Session:
    """One rank of a command, connected with the others. Constructing it is collective.

    If that fails the process is expected to end, so nothing is closed: a rank that left the process group early could
    fail the other ranks before the user reads why.

    Args:
        config: the configuration of the run, already checked.
        locks_output: whether no other run may write to the output folder meanwhile.
    """

    def __init__(self, config: RunConfig, *, locks_output: bool = True):
        self.config = config
        self.output = Path(config.train.output)
        random.seed(config.train.seed)
        torch.manual_seed(config.train.seed)
        if not dist.is_initialized():
            platform().init_process_group(
                int(os.environ["RANK"]),
                int(os.environ["WORLD_SIZE"]),
                timeout_s=config.layout.distributed_timeout_s,
                store=rendezvous(),
            )
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
        self.layout = parallel.initialize(config.layout, seed=config.train.seed)
        self.is_main = self.layout.rank == 0
        self._lock = lock_output(self.output) if self.is_main and locks_output else None
        self.reporter = Reporter(config, is_main=self.is_main)

        model_files = hf_folder(config.model.path)
        self.tokenizer = load_tokenizer(model_files)
        self.stop_ids = stop_ids(model_files, self.tokenizer)
        self.data_sources: set[str] = set()  # of all rows read
        self.eval_prompts = held_out_problems(config, self.tokenizer, self.reporter.say, self.data_sources)
        check_answers(config, self.eval_prompts)

    def close(self) -> None:
        """Leave the process group, and unlock the output folder; calling it again does nothing."""
        self.heartbeat.stop()
        self.stop.uninstall()
        parallel.shutdown()
        if self._lock is not None:
            self._lock.close()


def stop_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Token ids that end a response: the tokenizer's end of turn and those of generation_config.json."""
    ids = {tokenizer.eos_token_id} - {None}
    file = folder / "generation_config.json"
    if file.exists():
        declared = json.loads(file.read_text()).get("eos_token_id") or []
        ids |= set(declared if isinstance(declared, list) else [declared])
    return tuple(sorted(ids))
