"""Cross-checks of a configuration: everything that would only go wrong once models, data or ranks are there.

They read nothing heavier than the model's config.json, import no torch, and take milliseconds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from math import gcd
from pathlib import Path
from typing import Any

from clipo_megatron.algorithms.methods.registry import baseline, is_import_path
from clipo_megatron.checks.evaluation import evaluation_problems
from clipo_megatron.checks.methods import method_problems
from clipo_megatron.checks.model import model_problems
from clipo_megatron.checks.report import report_problems
from clipo_megatron.checks.rollout import rollout_problems
from clipo_megatron.checks.windows import window_problems
from clipo_megatron.config.errors import ConfigError, ConfigProblem
from clipo_megatron.config.schema import Anchors, LayoutConfig, Level, RunConfig, SourceConfig

SCHEDULES = ("constant", "linear", "cosine")
PERTURBABLE = ("gsm_symbolic", "simple_equations")  # generators whose problems have changed forms
DATA_SUFFIXES = (".parquet", ".jsonl")


def check(
    config: RunConfig, *, ranks: int | None = None, absent: bool = False, trains: bool = True
) -> list[ConfigProblem]:
    """Hold the whole configuration against itself, the model folder, the data files and the number of ranks.

    Args:
        config: the configuration.
        ranks: what a launcher started, None when there is none yet (then `requested_ranks` will be started).
        absent: whether model and data may be on other machines only.
        trains: whether it is to train; an evaluation needs neither training problems nor batches and methods that fit.

    Returns:
        What is not on this machine.

    Raises:
        ConfigError: all problems found, numbered, each with value, reason and remedy.
    """
    problems = [
        *_layout(config, ranks),
        *model_problems(config, data_parallel(config.layout, ranks), trains=trains),
        *_data(config, ("train", "eval") if trains else ("eval",)),
        *(_batch(config, ranks) if trains else ()),
        *_numbers(config),
        *rollout_problems(config),
        *evaluation_problems(config),
        *(_of_training(config) if trains else ()),
    ]
    elsewhere = [each for each in problems if each.absent and absent]
    if problems := [each for each in problems if each not in elsewhere]:
        raise ConfigError(problems)
    return elsewhere


def requested_ranks(layout: LayoutConfig) -> int:
    """Ranks that the layout needs when no launcher says otherwise: tp * pp * dp, with as small a dp as can be."""
    return layout.tp * layout.pp * (layout.dp or _fewest_replicas(layout))


def data_parallel(layout: LayoutConfig, ranks: int | None) -> int:
    """Model replicas: `layout.dp`, or what the ranks leave over after tp * pp; at least 1."""
    if layout.dp is not None:
        return layout.dp
    if ranks is None:
        return _fewest_replicas(layout)
    return max(1, ranks // max(1, layout.tp * layout.pp))


def _fewest_replicas(layout: LayoutConfig) -> int:
    """Experts are divided over the tp * dp ranks of a stage: with fewer replicas some would have no place."""
    experts = max(1, layout.ep * (layout.tp if layout.etp is None else layout.etp))
    return experts // gcd(experts, max(1, layout.tp))


def source_name(source: SourceConfig) -> str:
    """What reports call a source: its name, its file's stem, or its generator."""
    changed = f"_{source.perturb.value}" if source.perturb else ""
    return source.name or (Path(source.path).stem if source.path else f"{source.generator or ''}{changed}")


def _layout(config: RunConfig, ranks: int | None) -> Iterator[ConfigProblem]:
    layout = config.layout
    counts = ("tp", "pp", "dp", "ep", "etp", "first_stage_layers", "last_stage_layers", "max_tokens_per_microbatch")
    for name in counts:
        value = getattr(layout, name)
        if value is not None and value < 1:
            yield ConfigProblem(
                f"layout.{name}", "it counts things and must be at least 1", "Set it to 1 or more", value
            )
    if layout.sequence_parallel and layout.tp == 1:
        reason = "it shards the sequence over the tensor-parallel ranks, and layout.tp is 1"
        yield ConfigProblem("layout.sequence_parallel", reason, "Set it to false, or layout.tp to 2 or more", True)
    model = layout.tp * layout.pp
    if ranks is None or model < 1:
        return
    if layout.dp is None and ranks % model:
        yield ConfigProblem(
            "",
            f"{ranks} ranks were started, which tp * pp = {layout.tp} * {layout.pp} = {model} does not divide",
            f"Start {_multiples(ranks, model)} ranks, or change layout.tp or layout.pp",
            show_value=False,
        )
    elif layout.dp is not None and ranks != (needed := model * layout.dp):
        reason = f"tp * pp * dp = {layout.tp} * {layout.pp} * {layout.dp} = {needed}, but {ranks} ranks were started"
        remedy = f"Start {needed} ranks, or set layout.dp to null to use those there are"
        yield ConfigProblem("layout.dp", reason, remedy, layout.dp)


def _multiples(near: int, unit: int) -> str:
    below, above = near // unit * unit, (near // unit + 1) * unit
    return f"{below} or {above}" if below else str(above)


def _of_training(config: RunConfig) -> Iterator[ConfigProblem]:
    yield from window_problems(config)
    yield from method_problems(config)
    yield from report_problems(config)


def _data(config: RunConfig, parts: Sequence[str]) -> Iterator[ConfigProblem]:
    if "train" in parts and not config.data.train:
        remedy = "Add a source, such as `data.train=[{path: train.parquet}]`"
        yield ConfigProblem("data.train", "there is nothing to train on", remedy, show_value=False)
    for part in parts:
        sources: list[SourceConfig] = getattr(config.data, part)
        for index, source in enumerate(sources):
            yield from _source(source, f"data.{part}[{index}]")
        for name, count in Counter(map(source_name, sources)).items():
            if count > 1 and name:
                reason = f"{count} sources are called {name}, and prompt ids derive from the name"
                yield ConfigProblem(f"data.{part}", reason, "Give each its own `name`", show_value=False)


def _source(source: SourceConfig, key: str) -> Iterator[ConfigProblem]:
    if (source.path is None) == (source.generator is None):
        held = "neither a path nor a generator" if source.path is None else "both a path and a generator"
        remedy = "Give exactly one of `path` (a file) and `generator` (a reasoning-gym data set)"
        yield ConfigProblem(key, f"it has {held}", remedy, show_value=False)
    elif source.path is not None:
        path = Path(source.path)
        if path.suffix not in DATA_SUFFIXES:
            yield ConfigProblem(f"{key}.path", "this kind of file is not read", "Use *.parquet or *.jsonl", source.path)
        elif not path.is_file():
            reason = "there is no such file" + ("" if path.is_absolute() else f" below {Path.cwd()}")
            yield ConfigProblem(f"{key}.path", reason, "Correct the path", source.path, absent=True)
        if source.options:
            remedy = "Remove it, or name a generator"
            yield ConfigProblem(f"{key}.options", "only generators have options", remedy, show_value=False)
    elif source.size is None:
        reason = "a generator makes as many problems as asked for, and no number is given"
        yield ConfigProblem(f"{key}.size", reason, "Set it, for example to 1000", show_value=False)
    if source.perturb and source.generator not in PERTURBABLE:
        remedy = f"Set it to null, or the generator to {' or '.join(PERTURBABLE)}"
        yield ConfigProblem(f"{key}.perturb", "problems of this source have no changed forms", remedy, source.perturb)
    for option in ("size", "seed"):
        if option in source.options:
            reason = f"the source has its own setting, {key}.{option}"
            yield ConfigProblem(f"{key}.options.{option}", reason, "Move it there", source.options[option])
    if source.size is not None and source.size < 1:
        yield ConfigProblem(f"{key}.size", "it counts rows and must be at least 1", "Set it to 1 or more", source.size)


def _batch(config: RunConfig, ranks: int | None) -> Iterator[ConfigProblem]:
    prompts, mini, samples = (
        config.data.prompts_per_step,
        config.algorithm.mini_batches,
        config.rollout.samples_per_prompt,
    )
    key = "data.prompts_per_step"
    if prompts >= 1 and mini >= 1 and prompts % mini:
        near = f"{prompts // mini * mini or mini} or {(prompts // mini + 1) * mini}"
        near = str(mini) if prompts < mini else near
        reason = f"algorithm.mini_batches = {mini} does not divide it, and a group is never split"
        yield ConfigProblem(key, reason, f"Set it to {near}, or change algorithm.mini_batches", prompts)
    replicas = data_parallel(config.layout, ranks)
    if 1 <= prompts < replicas:
        reason = f"there are {replicas} model replicas, and each needs at least one prompt"
        yield ConfigProblem(key, reason, f"Set it to {replicas} or more, or use fewer ranks", prompts)
    elif mini >= 1 and samples >= 1 and mini <= prompts:
        yield from _mini_batches(config, replicas)
    if samples == 1 and (asking := _compares(config)):
        reason = f"{asking}, and a group of one has nothing to compare"
        yield ConfigProblem("rollout.samples_per_prompt", reason, "Set it to 2 or more; 8 or 16 are usual", samples)


def _mini_batches(config: RunConfig, replicas: int) -> Iterator[ConfigProblem]:
    """Whether every replica gets a rollout of every mini-batch."""
    prompts, mini = config.data.prompts_per_step, config.algorithm.mini_batches
    # With windows a prompt may have a single rollout that has not ended before.
    windows, samples = config.rollout.window_tokens is not None, config.rollout.samples_per_prompt
    each = 1 if windows else samples
    if prompts // mini * each < replicas:
        counted = f"{prompts // mini} prompts, each with as few as one rollout that goes on"
        counted = counted if windows else f"{prompts // mini} prompts with {samples} rollouts each"
        reason = f"a mini-batch has {counted}, and not all of the {replicas} model replicas would get one"
        remedy = f"Set it to {mini * -(-replicas // each)} or more, or lower algorithm.mini_batches"
        yield ConfigProblem("data.prompts_per_step", reason, remedy, prompts)


def _compares(config: RunConfig) -> str | None:
    """Who needs several rollouts of a prompt, as a clause; None: nobody, as far as can be said of one's own classes."""
    clipo, algorithm = config.clipo, config.algorithm
    if clipo.enabled and clipo.level is not Level.batch:
        return f"CLIPO with clipo.level = {clipo.level.value} compares the rollouts of a prompt"
    if is_import_path(algorithm.name) or baseline(algorithm).single:
        return None
    if baseline(algorithm).aggregation is None:
        return f"the loss of {algorithm.name} compares the rollouts of a prompt"
    return f"the advantages of {algorithm.name} are against the prompt's other rollouts"


def _numbers(config: RunConfig) -> Iterator[ConfigProblem]:
    """Ranges of single settings."""
    at_least = {
        1: (
            "data.prompts_per_step",
            "data.max_prompt_tokens",
            "rollout.samples_per_prompt",
            "rollout.max_new_tokens",
            "rollout.window_tokens",
            "rollout.batch_size",
            "rollout.servers",
            "rollout.pool.concurrency",
            "rollout.pool.attempts",
            "rollout.sync.bucket_mb",
            "serve.servers",
            "serve.tp",
            "reward.workers",
            "algorithm.constant_length",
            "algorithm.mini_batches",
            "algorithm.epochs",
            "critic.epochs",
            "clipo.dim",
            "train.steps",
            "checkpoint.keep",
            "checkpoint.failures",
            "eval.samples",
            "eval.max_new_tokens",
        ),
        0: (
            "rollout.top_k",
            "rollout.max_refill_rounds",
            "rollout.pool.backoff_s",
            "rollout.pool.affinity_slack",
            "rollout.sync.verify_every",
            "serve.restarts",
            "algorithm.clip_low",
            "algorithm.clip_high",
            "algorithm.entropy_coefficient",
            "algorithm.kl.coefficient",
            "clipo.weight",
            "clipo.weight_decay",
            "clipo.warmup_steps",
            "critic.warmup_steps",
            "optimizer.min_learning_rate",
            "optimizer.warmup_steps",
            "optimizer.weight_decay",
            "optimizer.skips",
            "train.seed",
            "checkpoint.every",
            "faults.restarts",
            "faults.grace_period_s",
            "checkpoint.keep_every",
            "checkpoint.keep_best",
            "eval.every",
            "eval.temperature",
            "eval.top_k",
            "eval.seed",
            "report.save_rollouts",
            "report.save_states",
            "report.states_every",
            "report.trace_every",
        ),
    }
    for least, names in at_least.items():
        for key in names:
            value = _value(config, key)
            if value is not None and not (value >= least and math.isfinite(value)):
                yield ConfigProblem(key, f"it must be at least {least}", f"Set it to {least} or more", value)
    for key in (
        "layout.distributed_timeout_s",
        "rollout.temperature",
        "rollout.deadline_s",
        "rollout.pool.request_deadline_s",
        "rollout.pool.join_deadline_s",
        "rollout.sync.deadline_s",
        "serve.start_deadline_s",
        "serve.health_timeout_s",
        "reward.deadline_s",
        "checkpoint.deadline_s",
        "faults.heartbeat_timeout_s",
        "faults.phase_timeout_s",
        "clipo.temperature",
        "clipo.learning_rate",
        "optimizer.learning_rate",
        "critic.learning_rate",
        "optimizer.epsilon",
        "optimizer.max_grad_norm",
        "report.mult_prob_error_alarm",
        "report.rollout_kl_alarm",
    ):
        value = _value(config, key)
        if not (value > 0 and math.isfinite(value)):
            yield ConfigProblem(key, "it must be a positive number", "Set it above 0", value)
    if not 0 < config.rollout.top_p <= 1:
        reason = "it is a share of the probability mass"
        yield ConfigProblem("rollout.top_p", reason, "Set it above 0 and at most to 1 (off)", config.rollout.top_p)
    for key in ("optimizer.beta1", "optimizer.beta2"):
        if not 0 <= _value(config, key) < 1:
            yield ConfigProblem(
                key, "a decay rate lies in [0, 1)", "Set it there; 0.9 and 0.999 are usual", _value(config, key)
            )
    yield from _choices(config)


def _choices(config: RunConfig) -> Iterator[ConfigProblem]:
    """Settings that make sense only together with others."""
    optimizer, clipo, reward = config.optimizer, config.clipo, config.reward
    if optimizer.schedule not in SCHEDULES:
        reason = "there is no such schedule"
        yield ConfigProblem("optimizer.schedule", reason, f"Choose one of {', '.join(SCHEDULES)}", optimizer.schedule)
    if optimizer.min_learning_rate > optimizer.learning_rate:
        reason = f"it lies above optimizer.learning_rate = {optimizer.learning_rate}"
        yield ConfigProblem("optimizer.min_learning_rate", reason, "Lower it", optimizer.min_learning_rate)
    if clipo.enabled and clipo.floor > 0:
        reason = "the bonus would never be below it, so every valid rollout would get a reward for nothing"
        yield ConfigProblem("clipo.floor", reason, "Set it to 0 or less; the paper uses -0.5", clipo.floor)
    if clipo.enabled and 0 < config.train.steps <= clipo.warmup_steps:
        reason = f"the run has train.steps = {config.train.steps}, so the head would never give a bonus"
        yield ConfigProblem("clipo.warmup_steps", reason, "Lower it", clipo.warmup_steps)
    if clipo.enabled and clipo.anchors is Anchors.wrong and clipo.weight:
        reason = "a bonus goes to correct anchors alone, so none would ever be paid"
        remedy = "Set it to correct or both, or clipo.weight to 0 to train the head without a bonus"
        yield ConfigProblem("clipo.anchors", reason, remedy, clipo.anchors)
    if config.checkpoint.keep_best and not (config.data.eval and config.eval.every):
        reason = "checkpoints are compared by held-out accuracy, and none is measured during training"
        remedy = "Give data.eval problems and set eval.every, or set it to 0"
        yield ConfigProblem("checkpoint.keep_best", reason, remedy, config.checkpoint.keep_best)
    if not reward.correct_reward > reward.wrong_reward:
        reason = f"a right answer must earn more than a wrong one (reward.wrong_reward = {reward.wrong_reward})"
        yield ConfigProblem("reward.correct_reward", reason, "Raise it", reward.correct_reward)
    for key in ("clipo.floor", "clipo.constant", "reward.correct_reward", "reward.wrong_reward"):
        if not math.isfinite(_value(config, key)):
            yield ConfigProblem(key, "it must be a finite number", "Change it", _value(config, key))
    if not config.name or "/" in config.name:
        yield ConfigProblem("name", "it becomes a folder's name", "Use a name without a slash", config.name)


def _value(config: RunConfig, key: str) -> Any:
    place: Any = config
    for part in key.split("."):
        place = getattr(place, part)
    return place
