"""What training and `clipo eval` share: ranks, the policy, the engine with its weights, and the held-out problems."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from clipo_megatron.config.model_folder import hf_folder
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.data.prompts import load_tokenizer
from clipo_megatron.data.splits import held_out_problems
from clipo_megatron.evaluation.asking import evaluate, evaluation_params
from clipo_megatron.evaluation.results import Evaluation
from clipo_megatron.policy import parallel
from clipo_megatron.policy.policy import Policy
from clipo_megatron.rewards.pool import GraderPool
from clipo_megatron.rollout.engine import Engine
from clipo_megatron.runtime.heartbeat import Heartbeat
from clipo_megatron.runtime.platform import platform
from clipo_megatron.runtime.rendezvous import meet
from clipo_megatron.runtime.run_dir import claim
from clipo_megatron.telemetry.reporter import Reporter
from clipo_megatron.training.engine_factory import WeightSync, build_engine, build_sync, rollout_ranks
from clipo_megatron.training.stop_signal import GRACE_PERIOD_S, StopRequest

P = TypeVar("P", bound=Policy)


class Session:
    """One rank's view of what is at work on a configuration. Constructing it is collective: ranks meet.

    Nothing can be answered before `equip`.

    Args:
        config: checked.
        claims: whether it holds the output folder for itself; one that only reads there need not.
    """

    def __init__(self, config: RunConfig, *, claims: bool = True):
        self.config = config
        self.device = platform().device
        self.output = Path(config.train.output)
        self._seed(config.train.seed)
        if not dist.is_initialized():
            platform().init_process_group(
                int(os.environ["RANK"]),
                int(os.environ["WORLD_SIZE"]),
                timeout_s=config.layout.distributed_timeout_s,
                store=meet(),
            )
        patience_s = GRACE_PERIOD_S if config.faults.grace_period_s is None else config.faults.grace_period_s
        self.stop = StopRequest(announce=dist.get_rank() == 0 and config.report.console, patience_s=patience_s)
        self.heartbeat = Heartbeat(
            dist.get_rank(),
            dist.get_world_size(),
            platform().own_store("heartbeat"),
            heartbeat_timeout_s=config.faults.heartbeat_timeout_s,
            phase_timeout_s=config.faults.phase_timeout_s,
            stop=self.stop,
        )
        self.heartbeat.start()
        self.layout = parallel.initialize(config.layout, seed=config.train.seed)
        self.is_main = self.layout.rank == 0
        self._open = ExitStack()  # what is to be closed, in the order of opening
        if self.is_main and claims and (lock := claim(self.output)):
            self._open.callback(lock.close)
        self._open.callback(parallel.shutdown)
        self.reporter = Reporter(config, is_main=self.is_main)

        model_files = hf_folder(config.model.path)
        self.tokenizer = load_tokenizer(model_files)
        self.stop_ids = stop_ids(model_files, self.tokenizer)
        self.eval_prompts = held_out_problems(config, self.tokenizer, self.reporter.say)
        self.rollout_ranks = rollout_ranks(config, self.layout)

    def equip(self, policy: Callable[[], P]) -> P:
        """Make engine, graders, `policy` and the way of its weights to the engine; collective.

        The policy comes after the engine, whose servers may have to give it room on their GPUs.
        """
        self.engine: Engine | None = build_engine(self.config, self.layout, self.tokenizer, self.reporter.say)
        if self.engine is not None:
            self._open.callback(self.engine.close)
        self.graders = GraderPool(self.config.reward)
        self._open.callback(self.graders.close)
        made = policy()
        self.sync: WeightSync = build_sync(self.config, made, self.engine)
        self._open.callback(self.sync.close)
        self.version = -1  # of the weights that the engine has
        return made

    def close(self) -> None:
        """Free engines, graders and groups. Idempotent."""
        self.heartbeat.leave()
        self.stop.leave()
        self._open.close()

    def measure(self, step: int) -> Evaluation:
        """The held-out problems with the engine's weights; collective.

        Raises:
            Abandoned: on every rank: it was asked to end, and answers took too long.
        """
        self.heartbeat.phase("evaluate")
        config = self.config
        seed = config.train.seed if config.eval.seed is None else config.eval.seed
        params = evaluation_params(config.eval, config.rollout, self.stop_ids, seed)
        result = evaluate(
            self.engine,
            self.graders,
            self.eval_prompts,
            self._share(len(self.eval_prompts)),
            params,
            step=step,
            ks=config.eval.ks,
            deadline_s=config.rollout.deadline_s,
            resync=self.resync,
            should_cancel=self.stop.should_cancel,
        )
        return replace(result, model=config.model.path)

    def update_weights(self, version: int) -> dict[str, float]:
        """Give the engine the policy's weights, as `version`; collective. Returns what that was like, as metrics."""
        self.version = version
        report = self.sync.update_weights(version)
        return report.metrics if report else {}

    def resync(self) -> None:
        """Give engines that came back the current weights; collective."""
        self.update_weights(self.version)

    def _share(self, count: int) -> list[int]:
        """Which of `count` prompts this rank answers."""
        rank = self.layout.rank
        return (
            list(range(self.rollout_ranks.index(rank), count, len(self.rollout_ranks)))
            if rank in self.rollout_ranks
            else []
        )

    @staticmethod
    def _seed(seed: int) -> None:
        random.seed(seed)
        torch.manual_seed(seed)


def stop_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Token ids that end a response: the tokenizer's end of turn and those of generation_config.json."""
    ids = {tokenizer.eos_token_id} - {None}
    file = folder / "generation_config.json"
    if file.exists():
        declared = json.loads(file.read_text()).get("eos_token_id") or []
        ids |= set(declared if isinstance(declared, list) else [declared])
    return tuple(sorted(ids))
