"""Training steps on made-up rollouts, with the same calls as the trainer; a layout must not change their results.

The rollouts are random tokens with random verdicts, a function of the seed only, and distributed over the ranks as by
engines. Everything after generation is the real code: exchange, batching, scoring, hooks, advantages, update.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from critic_weights import critic_weights

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.algorithms.hook import HookContext
from clipo_megatron.checkpoint import CheckpointContents, CheckpointItem, Checkpoints
from clipo_megatron.config.model_folder import POLICY
from clipo_megatron.config.schema import CheckpointConfig, DType, LayoutConfig, RunConfig
from clipo_megatron.flow import Prompt, Rollout, RolloutGroup, ScoredGroup, Verdict
from clipo_megatron.policy import parallel
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.batch.exchange import build_table
from clipo_megatron.policy.batch.replay import ReplayCheckpointer
from clipo_megatron.policy.checkpoint.state import TrainableCheckpointer
from clipo_megatron.rewards.voting import answer_key
from clipo_megatron.rollout.engine import Routing
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.spec import read_config

STEPS = 3


def configuration(folder: Path | str, *, overlap: bool | None = None) -> RunConfig:
    """The configuration of a small run in fp32 whose updates move the weights by about 1%.

    The policy's Adam has an epsilon as large as the gradients. With a small one, the rounding noise of a gradient near
    zero would become a full step of either sign, and layouts could not be compared.
    """
    config = RunConfig()
    config.model.path, config.model.dtype = str(folder), DType.fp32
    config.layout.max_tokens_per_microbatch = 100
    config.rollout.samples_per_prompt = 4
    config.algorithm.mini_batches = 2
    config.clipo.dim = 16
    config.optimizer.learning_rate, config.optimizer.epsilon = 2e-3, 1e-4
    config.optimizer.overlap_grad_reduce = overlap
    return config


def scored_groups(
    step: int,
    *,
    vocab: int,
    groups: int = 6,
    samples: int = 4,
    top_k: int = 0,
    routing: Routing | None = None,
) -> list[ScoredGroup]:
    """Groups of rollouts of unequal length, some of one token and some ungraded.

    Group 0 is all correct, group 1 all wrong, and group 2 has one correct rollout. With `top_k` tokens are drawn among
    at most so many; with `routing` each goes to random experts.
    """
    generator = torch.Generator().manual_seed(1000 + step)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(0, vocab, (count,), generator=generator)

    result = []
    for position in range(groups):
        length = 1 if position == 3 else number(2, 20)
        extra = {"solution": "2 + 1 = 3", "rubrics": ["python", "answer is 3"]}
        prompt = Prompt(f"made up/{step}-{position}", (), tokens(length), "arithmetic", "3", extra)
        rollouts, verdicts = [], []
        for sample in range(samples):
            length = 1 if (position + sample) % 7 == 0 else number(2, 16)
            ids, logprobs = tokens(length), -torch.rand(length, generator=generator)
            versions = torch.full((length,), step)
            text = f"{'```python' if sample % 3 else 'so'} the answer is {int(ids.sum()) % 4}"
            rollouts.append(Rollout(ids, logprobs, text, "stop", versions, sample))
            if top_k:
                rollouts[-1].support = _support(ids, vocab, top_k - sample % 2, seed=10 * step + position)
            if routing:
                sizes = prompt.tokens.numel(), ids.numel()
                rollouts[-1].routes = _routes(*sizes, routing, group=10 * step + position, sample=sample)
            correct: bool | None = {0: True, 1: False, 2: sample == 1}.get(position, number(0, 2) == 1)
            if position % 3 == 2 and sample == position % samples:
                correct = None
            verdicts.append(Verdict(correct, 1.0 if correct else 0.0))
        result.append(ScoredGroup(RolloutGroup(position, prompt, rollouts), verdicts))
    return result


def routing_of(config: RunConfig) -> Routing | None:
    """The experts of a run's model, if it replays their routes."""
    if not config.model.replay_routing:
        return None
    spec = model_spec(read_config(Path(config.model.path)))
    return Routing(spec.num_layers, spec.experts.per_token, spec.experts.count)


def _routes(prompt: int, response: int, routing: Routing, *, group: int, sample: int) -> torch.Tensor:
    """Random experts for all tokens but the last, the same for the prompt in all samples: [P + R - 1, L, E]."""
    parts = []
    for count, seed in ((prompt, 1000 * group), (response - 1, 1000 * group + sample + 1)):
        generator = torch.Generator().manual_seed(seed)
        odds = torch.rand(count, routing.layers, routing.experts, generator=generator)
        parts.append(odds.topk(routing.per_token, dim=-1).indices)
    return torch.cat(parts).to(torch.int16)


def _support(ids: torch.Tensor, vocab: int, width: int, *, seed: int) -> torch.Tensor:
    """Between one and `width` different tokens for each of `ids` [R], which is among them at any place: [R, width]."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.full((ids.numel(), width), -1, dtype=torch.int32)
    for place, token in enumerate(ids.tolist()):
        count = int(torch.randint(1, width + 1, (), generator=generator))
        others = [each for each in torch.randperm(vocab, generator=generator)[:count].tolist() if each != token]
        kept = torch.tensor([token, *others[: count - 1]], dtype=torch.int32)
        found[place, : kept.numel()] = kept[torch.randperm(kept.numel(), generator=generator)]
    return found


def made_up_context(config: RunConfig, *, vocab: int = 263) -> HookContext:
    """The context of the algorithm's hooks for the prompts of `scored_groups`; the tokens of a text are its bytes."""

    def tokenize(text: str) -> torch.Tensor:
        return torch.tensor([byte % vocab for byte in text.encode()], dtype=torch.int64)

    groups = [each.group for step in range(STEPS) for each in scored_groups(step, vocab=vocab)]
    return HookContext(
        config,
        prompts={group.prompt.id: group.prompt for group in groups},
        encode=lambda messages: tokenize("\n".join(turn["content"] for turn in messages)),
        tokenize=tokenize,
        answer=lambda prompt, rollout: answer_key(rollout.text, data_source="arithmetic", mode="number") or "",
        mask_id=0,
        end_id=1,
    )


def train(
    config: RunConfig,
    layout_config: LayoutConfig,
    *,
    taking_turns: bool = False,
    steps: range = range(STEPS),
    folder: Path | None = None,
) -> dict[str, Any]:
    """Train some steps on this rank; collective.

    Args:
        config: the run's.
        layout_config: replaces its layout.
        taking_turns: whether the actor's memory is offloaded before each step.
        steps: their numbers; if 0 is not among them, training resumes from the newest checkpoint.
        folder: where checkpoints are; one is saved after the last step.

    Returns:
        Facts that are identical on every rank: metrics of each update, signals, rewards, advantages, and the final
        weights by Hugging Face name. On ranks of the last stage also "logprobs" and "pooled" of the last step by row of
        the table, and the contrastive head's weights, "head".
    """
    config.layout = layout_config
    layout = parallel.initialize(config.layout, seed=config.train.seed)
    algorithm = build_algorithm(config, made_up_context(config))
    actor = PolicyActor(config, layout, needs=algorithm.needs, total_steps=100)
    batcher = actor.batcher
    weights_before = _exported(actor)
    critic_before = critic_weights(actor) if actor.critic else None
    facts: dict[str, Any] = {"updates": [], "values": [], "scores": [], "signals": [], "reward": [], "advantage": []}
    pooled: dict[int, torch.Tensor] = {}
    if actor.contrastive is not None:
        _listen(actor.contrastive, pooled)
    checkpoints = _checkpoints(folder, actor, algorithm, layout) if folder else None
    if steps.start:
        checkpoints.load(checkpoints.latest())
    for step in steps:
        if taking_turns:
            actor.offload()
            facts["held"] = sum(buffer.grad_data.untyped_storage().size() for buffer in actor.trainable.model.buffers)
            if actor.critic:
                held = [
                    each
                    for buffer in actor.critic.trainable.model.buffers
                    for each in (buffer.grad_data, buffer.param_data)
                ]
                facts["critic_held"] = sum(each.untyped_storage().size() for each in held)
            actor.onload()
        everything = scored_groups(
            step, vocab=actor.spec.vocab_size, top_k=config.rollout.top_k, routing=routing_of(config)
        )
        scored = everything[layout.rank :: layout.world]
        table, samples = build_table(scored, step=step, observe=algorithm.observe)
        mini_batches = batcher.mini_batches_of(samples, table)
        micro_batches = [micro for batch in mini_batches for micro in batch.micro_batches]
        facts["scores"].append(actor.score(micro_batches, table, algorithm))
        experience = algorithm.assign_advantages(table, mini_batches)
        actor.batcher.assign_token_advantages(experience, algorithm)
        facts["values"].append(actor.update_critic(experience, algorithm))
        plan = algorithm.replay(experience)
        updates = [(each, batch) for each in plan for batch in each.mini_batches * config.algorithm.epochs]
        for place, (each, batch) in enumerate(updates):
            weighed = batcher.with_advantages(batch, each, algorithm)
            last = place == len(updates) - 1
            facts["updates"].append(actor.update(weighed, each, algorithm, first=not place, last=last))
        algorithm.after_update(experience, learned=bool(plan))
        facts["signals"].append(dict(table.signals))
        facts["reward"].append(experience.reward)
        facts["advantage"].append(experience.advantage)
    if checkpoints:
        checkpoints.save(steps.stop)
    facts["weights_before"], facts["weights"] = weights_before, _exported(actor)
    if actor.critic:
        facts["critic_before"], facts["critic"] = critic_before, critic_weights(actor)
    facts["packed"] = sum(micro.tokens.numel() for micro in micro_batches)
    if layout.is_last_stage:
        facts["logprobs"] = _by_row(micro_batches, "old_logprobs")
        facts["pooled"] = pooled
        if actor.contrastive is not None:
            facts["head"] = dict(actor.contrastive.head.state_dict())
    return facts


def train_part(config: RunConfig, layout_config: LayoutConfig, steps: range, folder: Path) -> dict[str, Any]:
    """Train some steps of a run whose checkpoints are in `folder`."""
    return train(config, layout_config, steps=steps, folder=folder)


def merged(results: Sequence[dict[str, Any]], name: str) -> dict[int, torch.Tensor]:
    """Join what the ranks know of `name`, by row; asserts that ranks with the same row agree to the bit."""
    rows: dict[int, torch.Tensor] = {}
    for each in results:
        for row, value in each.get(name, {}).items():
            assert row not in rows or torch.equal(rows[row], value), f"two ranks disagree on {name} of row {row}"
            rows[row] = value
    return dict(sorted(rows.items()))


def _checkpoints(folder: Path, actor: PolicyActor, algorithm: Algorithm, layout: parallel.Layout) -> Checkpoints:
    """The checkpoints of the state that these steps have."""
    checkpointer, replays = TrainableCheckpointer(actor.trainable), ReplayCheckpointer(algorithm, actor.batcher)
    main, head = layout.rank == 0, actor.contrastive
    items = [
        CheckpointItem("algorithm", algorithm, writes=main),
        CheckpointItem("replay", replays, writes=main, gathers=True),
    ]
    if head is not None:
        leads = layout.tp_rank == 0 and layout.dp_rank == 0
        items.append(CheckpointItem("contrastive", head, writes=leads))
    return Checkpoints(
        folder, CheckpointContents(items, {POLICY: checkpointer}), CheckpointConfig(keep=0, asynchronous=False)
    )


def _exported(actor: PolicyActor) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in actor.export()}


def _by_row(micro_batches: Sequence[Any], name: str) -> dict[int, torch.Tensor]:
    return {
        int(row): getattr(micro, name)[micro.rollout == index]
        for micro in micro_batches
        for index, row in enumerate(micro.rows)
    }


def _listen(contrastive: Any, heard: dict[int, torch.Tensor]) -> None:
    """Record in `heard`, by row, the mean response states that the contrastive head was last called with."""
    step = contrastive.step

    def note(pooled: torch.Tensor, rows: torch.Tensor, table: Any) -> Any:
        heard.clear()
        heard.update(zip(rows.tolist(), pooled.clone(), strict=True))
        return step(pooled, rows, table)

    contrastive.step = note
