"""A run and its parts, put together from a configuration: what the trainer's page takes for granted."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clipo_megatron.algorithms.algorithm import Algorithm, build_algorithm
from clipo_megatron.algorithms.clipo.stage import Clipo
from clipo_megatron.algorithms.clipo.statistics import statistics
from clipo_megatron.checkpoint import Checkpoints, Owner
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.data.prompts import load_prompts, load_tokenizer
from clipo_megatron.data.sampler import PromptSampler
from clipo_megatron.device import platform
from clipo_megatron.evaluation import Evaluation, compare, evaluate, evaluation_params
from clipo_megatron.flow import Prompt, RolloutTable, StepReport
from clipo_megatron.policy import layout as layouts
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.exchange import from_last_stage
from clipo_megatron.policy.model import TORCH_DTYPE
from clipo_megatron.policy.state import load_policy, save_policy
from clipo_megatron.report.console import Progress, duration
from clipo_megatron.report.samples import SampleLog
from clipo_megatron.report.sinks import JsonLines, Sink, TensorBoard
from clipo_megatron.rewards.pool import GraderPool
from clipo_megatron.rollout.engine import Engine, SamplingParams
from clipo_megatron.rollout.local import LocalEngine
from clipo_megatron.sync.in_process import InProcessSync


class Run:
    """One rank's view of a run. Constructing it is collective: ranks meet, the policy is built and loaded."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.device = platform().device
        self.output = Path(config.train.output)
        self.started = time.time()
        self._stop = False
        self._seed(config.train.seed)
        if not dist.is_initialized():
            platform().init_process_group(
                int(os.environ["RANK"]),
                int(os.environ["WORLD_SIZE"]),
                timeout_s=config.layout.distributed_timeout_s,
            )
        self.layout = layouts.initialize(config.layout, seed=config.train.seed)
        self.is_main = self.layout.rank == 0
        self.progress = Progress(config.train.steps, enabled=self.is_main and config.report.console)

        tokenizer = load_tokenizer(config.model.path)
        self.train_prompts = self._prompts(config.data.train, tokenizer, "training")
        self.eval_prompts = self._prompts(config.data.eval, tokenizer, "evaluation") if config.data.eval else []
        self.sampler = PromptSampler(
            len(self.train_prompts), config.data.prompts_per_step, seed=config.train.seed, shuffle=config.data.shuffle
        )
        self.sampling = SamplingParams(
            samples=config.rollout.samples_per_prompt,
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            stop_ids=stop_ids(Path(config.model.path), tokenizer),
            seed=config.train.seed,
        )
        self.graders = GraderPool(config.reward)
        self.algorithm: Algorithm = build_algorithm(config)
        updates = config.train.steps * config.algorithm.epochs * config.algorithm.mini_batches
        self.actor = PolicyActor(config, self.layout, needs=self.algorithm.needs, total_steps=updates)
        self.engine: Engine = LocalEngine(
            config.model.path,
            dtype=TORCH_DTYPE[config.rollout.dtype or config.model.dtype],
            device=self.device,
            batch_size=config.rollout.batch_size,
        )
        self.sync = InProcessSync(self.actor, self.engine)
        self.evaluations: list[Evaluation] = []
        self.checkpoints = self._checkpoints()
        self.samples = SampleLog(self.output / "rollouts.jsonl", groups=config.report.save_rollouts * self.is_main)
        self._sinks: list[Sink] = []
        if self.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1, default=str))
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._request_stop)

    # --- life ----------------------------------------------------------------------------------------------------

    def restore(self) -> int:
        """Load the newest checkpoint if there is one, and give the engine the policy's weights.

        Returns:
            How many steps are done.
        """
        newest = self.checkpoints.latest() if self.config.checkpoint.resume else None
        step = self.checkpoints.load(newest) if newest else 0
        if newest:
            self.progress.say(f"resumed from {newest}, {step} steps done")
        self.sync.push(step)
        return step

    def before_training(self, step: int) -> None:
        """Open the logs; evaluate the policy as it comes."""
        config = self.config
        if self.is_main:
            self._sinks = [JsonLines(self.output / "metrics.jsonl", from_step=step)]
            if config.report.tensorboard:
                self._sinks.append(TensorBoard(self.output / "tensorboard"))
        self.samples.open(from_step=step)
        self.progress.say(
            f"{config.name}: {Path(config.model.path).name}, {len(self.train_prompts)} problems, "
            f"{config.data.prompts_per_step} prompts x {config.rollout.samples_per_prompt} samples a step, "
            f"{self.layout.world} ranks (tp {self.layout.tp} x pp {self.layout.pp} x dp {self.layout.dp})"
        )
        if step == 0 and config.eval.at_start:
            self.evaluate(0)

    def after_training(self, step: int) -> None:
        """Save, evaluate, and say where everything is."""
        finished = step >= self.config.train.steps
        if not self.checkpoints.has(step):
            self.checkpoints.save(step)
        if finished and (not self.evaluations or self.evaluations[-1].step != step):
            self.evaluate(step)
        for sink in self._sinks:
            sink.close()
        self.samples.close()
        self._closing_words(step, finished)

    def close(self) -> None:
        """Free engines, graders and groups. Idempotent."""
        self.graders.close()
        self.engine.close()
        layouts.shutdown()

    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop; collective, so that all leave at the same step."""
        flag = torch.tensor([float(self._stop)])
        dist.all_reduce(flag)
        if flag.item() and self.is_main:
            self.progress.say("stopping: saving a checkpoint first; the same command goes on from it")
        return bool(flag.item())

    def _request_stop(self, signum: int, _frame: Any) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        self.progress.say(f"{signal.Signals(signum).name}: ending after this step; once more to end at once")

    # --- parts the trainer asks for ------------------------------------------------------------------------------

    def share(self, count: int) -> list[int]:
        """Which of `count` prompts this rank answers: the local engine runs on every rank."""
        return list(range(self.layout.rank, count, self.layout.world))

    def policy_learns(self) -> bool:
        """False in the steps of a warm-up in which the contrastive head trains alone."""
        clipo = self.algorithm.stage(Clipo)
        return not (isinstance(clipo, Clipo) and clipo.warming_up and not self.config.clipo.warmup_policy)

    def contrastive_metrics(self, table: RolloutTable) -> dict[str, float]:
        """What the contrastive head did in this step; collective, {} without CLIPO."""
        clipo = self.algorithm.stage(Clipo)
        if not isinstance(clipo, Clipo) or clipo.last_bonus is None:
            return {}
        metrics = {}
        if self.actor.contrastive is not None:
            metrics = statistics(
                table.correct,
                table.group,
                table.signals["contrastive_loss"],
                table.signals["contrastive_valid"],
                clipo.last_bonus,
                floor=self.config.clipo.floor,
                embeddings=self.actor.contrastive.embeddings.cpu(),
            )
        return from_last_stage(metrics, self.layout)

    @staticmethod
    def is_due(every: int, step: int) -> bool:
        """Whether something that happens every `every` steps happens after step number `step`."""
        return every > 0 and step % every == 0

    def report(self, report: StepReport) -> None:
        """Hand a step's metrics to every sink."""
        for sink in self._sinks:
            sink.write(report)
        self.progress.step(report)
        drift = report.metrics.get("policy/mult_prob_error", 1.0)
        if drift > self.config.report.mult_prob_error_alarm:
            self.progress.say(
                f"warning: step {report.step}: engine and trainer disagree: mult_prob_error {drift:.3f} exceeds "
                f"report.mult_prob_error_alarm = {self.config.report.mult_prob_error_alarm}; weights or precision differ"
            )
        if report.metrics.get("policy/update_skipped"):
            self.progress.say(f"warning: step {report.step}: the gradient was not finite; the update was skipped")
        if ungraded := report.metrics.get("reward/ungraded"):
            self.progress.say(f"warning: step {report.step}: {ungraded:.1%} of the answers could not be graded")

    def evaluate(self, step: int) -> Evaluation | None:
        """Accuracy on the held-out problems with the engine's weights; collective."""
        if not self.eval_prompts:
            return None
        params = evaluation_params(self.config.eval, self.config.rollout, self.sampling.stop_ids, self.sampling.seed)
        result = evaluate(
            self.engine,
            self.graders,
            self.eval_prompts,
            self.share(len(self.eval_prompts)),
            params,
            step=step,
            deadline_s=self.config.rollout.deadline_s,
        )
        self.evaluations.append(result)
        self.progress.say(
            f"held-out accuracy after {step} steps: {result.accuracy:.1%} of {len(result.correct)} problems"
            f" ({result.truncated:.0%} cut at the length limit)"
        )
        if self.is_main:
            folder = self.output / "eval"
            folder.mkdir(parents=True, exist_ok=True)
            facts = {**dataclasses.asdict(result), "accuracy": result.accuracy, "by_source": result.by_source()}
            (folder / f"step_{step:06d}.json").write_text(json.dumps(facts, indent=1))
        return result

    # --- construction --------------------------------------------------------------------------------------------

    def _prompts(self, sources: Sequence[Any], tokenizer: Any, purpose: str) -> list[Prompt]:
        found = load_prompts(
            sources,
            tokenizer,
            system_prompt=self.config.model.system_prompt,
            max_prompt_tokens=self.config.data.max_prompt_tokens,
        )
        if found.too_long:
            self.progress.say(
                f"{found.too_long} {purpose} prompts are longer than data.max_prompt_tokens = "
                f"{self.config.data.max_prompt_tokens} and are left out"
            )
        return found.prompts

    def _checkpoints(self) -> Checkpoints:
        actor, layout = self.actor, self.layout
        owners = [
            Owner("sampler", self.sampler.state_dict, self.sampler.load_state_dict, writes=self.is_main),
            Owner("algorithm", self.algorithm.state_dict, self.algorithm.load_state_dict, writes=self.is_main),
            Owner("evaluations", self._evaluations_state, self._load_evaluations, writes=self.is_main),
            Owner("rng", self._rng_state, self._load_rng, per_rank=True),
        ]
        if actor.contrastive is not None:
            leads = layout.tp_rank == 0 and layout.dp_rank == 0
            owners.append(
                Owner("contrastive", actor.contrastive.state_dict, actor.contrastive.load_state_dict, writes=leads)
            )
        return Checkpoints(
            self.output / "checkpoints",
            owners,
            save_policy=lambda folder: save_policy(folder, actor.stage, actor.optimizer),
            load_policy=lambda folder: load_policy(folder, actor.stage, actor.optimizer),
            keep=self.config.checkpoint.keep,
            facts={
                "model": {
                    "family": actor.spec.family,
                    "hidden": actor.spec.hidden_size,
                    "layers": actor.spec.num_layers,
                },
                "layout": {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp},
            },
        )

    def _evaluations_state(self) -> dict[str, Any]:
        return {"evaluations": [dataclasses.asdict(each) for each in self.evaluations]}

    def _load_evaluations(self, state: dict[str, Any]) -> None:
        self.evaluations = [Evaluation(**each) for each in state["evaluations"]]

    def _rng_state(self) -> dict[str, Any]:
        version, numbers, gauss = random.getstate()
        return {"torch": platform().rng_state(), "python": [version, list(numbers), gauss]}

    def _load_rng(self, state: dict[str, Any]) -> None:
        platform().set_rng_state(state["torch"])
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))

    @staticmethod
    def _seed(seed: int) -> None:
        random.seed(seed)
        torch.manual_seed(seed)

    def _closing_words(self, step: int, finished: bool) -> None:
        took = duration(time.time() - self.started)
        self.progress.say(f"{'done' if finished else 'stopped'} after {step} steps, {took} in this session")
        if len(self.evaluations) > 1:
            paired = compare(self.evaluations[0], self.evaluations[-1])
            self.progress.table(
                "Held-out problems, the same before and after",
                ["problems", "before", "after", "gain", "newly right", "newly wrong", "p (McNemar)"],
                [
                    [
                        str(paired.problems),
                        f"{paired.before:.1%}",
                        f"{paired.after:.1%}",
                        f"{100 * (paired.after - paired.before):+.1f} points",
                        str(paired.gained),
                        str(paired.lost),
                        f"{paired.p_value:.2g}",
                    ]
                ],
            )
        self.progress.paths(
            {
                "metrics": self.output / "metrics.jsonl",
                "rollouts": self.output / "rollouts.jsonl",
                "evaluation": self.output / "eval",
                "checkpoints": self.output / "checkpoints",
            }
        )


def stop_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Token ids that end a response: the tokenizer's end of turn and those of generation_config.json."""
    ids = {tokenizer.eos_token_id} - {None}
    file = folder / "generation_config.json"
    if file.exists():
        declared = json.loads(file.read_text()).get("eos_token_id") or []
        ids |= set(declared if isinstance(declared, list) else [declared])
    return tuple(sorted(ids))
