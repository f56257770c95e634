"""The memory of one GPU, part by part: of the trainer during a policy update, and of a server while it generates."""

from __future__ import annotations

from dataclasses import dataclass, replace

from clipo_megatron.algorithms.methods.registry import has_critic, needs_reference
from clipo_megatron.config.schema import DType, HeadKind, RunConfig
from clipo_megatron.planning.hardware import Assumptions, Hardware
from clipo_megatron.planning.parameters import (
    ParameterCount,
    active_count,
    stage_chunks,
    stage_counts,
    whole_count,
)
from clipo_megatron.policy.model.tiles import TILE_BYTES_ON_GPUS
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.sharding import VOCAB_MULTIPLE_ON_GPUS
from clipo_megatron.weights.spec import ModelSpec

LOGITS_COPIES = 3  # logits, their exponentials, and the gradient
BF16, FP32 = 2, 4  # bytes


@dataclass(frozen=True, slots=True)
class TrainerMemory:
    """Bytes on the GPU of one rank during a policy update."""

    weights: float
    gradients: float
    optimizer: float
    reference: float  # a second copy of the weights, for a KL to the start or a method that needs it
    critic: float  # weights, gradients and optimizer of a value model, for methods that train one
    activations: float  # of the policy or the critic, whichever has more
    logits: float
    head: float  # contrastive head
    reserve: float

    @property
    def parts(self) -> dict[str, float]:
        """The bytes of each part, by its name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def total(self) -> float:
        """The bytes of all parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class ServerMemory:
    """Bytes on one GPU of a server."""

    weights: float
    cache: float  # left for keys and values
    cache_per_token: float
    reserve: float

    def sequences(self, tokens: float) -> int:
        """Return how many sequences of `tokens` tokens the server can generate at a time."""
        return max(0, int(self.cache / (self.cache_per_token * tokens)))


def trainer_memory(
    config: RunConfig,
    spec: ModelSpec,
    division: ParallelDivision,
    dp: int,
    assume: Assumptions,
    *,
    critic: ModelSpec | None = None,
) -> list[TrainerMemory]:
    """Compute the memory of each pipeline stage; `critic` is the model that a critic starts from, None: the policy's.

    Weights, gradients and optimizer are those of Megatron's distributed optimizer: gradients are kept in fp32 on every
    rank, masters and both moments are divided over the data- and context-parallel ranks (arXiv 1910.02054, stage 1).
    """
    counts = stage_counts(spec, division, VOCAB_MULTIPLE_ON_GPUS)
    stages = [_stage_memory(config, spec, division, dp, assume, count, stage) for stage, count in enumerate(counts)]
    if not has_critic(config.algorithm):
        return stages
    critic = critic or spec
    counts = list(stage_counts(critic, division, VOCAB_MULTIPLE_ON_GPUS))
    counts[-1] = _without_lm_head(counts[-1], critic, division)
    values = [_stage_memory(config, critic, division, dp, assume, count, stage) for stage, count in enumerate(counts)]
    return [
        replace(
            policy,
            critic=value.weights + value.gradients + value.optimizer,
            activations=max(policy.activations, value.activations),
        )
        for policy, value in zip(stages, values, strict=True)
    ]


def _stage_memory(
    config: RunConfig,
    spec: ModelSpec,
    division: ParallelDivision,
    dp: int,
    assume: Assumptions,
    count: ParameterCount,
    stage: int,
) -> TrainerMemory:
    """Compute the memory of one stage without a critic."""
    bf16 = config.model.dtype is DType.bf16
    width = BF16 if bf16 else FP32
    last = stage == division.pp - 1
    cp = config.layout.cp
    expert_dp = max(1, dp * cp * division.tp // (division.ep * division.expert_tp))
    state = 3 * FP32 if bf16 else 2 * FP32  # fp32 parameters are their own masters
    tokens = config.layout.max_tokens_per_microbatch // cp  # of a micro-batch on one rank
    in_flight = min(division.pp - stage, micro_batches(config, dp, assume))
    head = 4 * FP32 * head_count(config, spec) if last else 0  # weights, gradients and both moments
    return TrainerMemory(
        weights=width * count.total,
        gradients=FP32 * count.total,
        optimizer=state * (count.dense / (dp * cp) + count.expert / expert_dp),
        reference=width * count.total if needs_reference(config.algorithm) else 0.0,
        critic=0.0,
        activations=_activations(config, spec, division, stage, tokens * width, in_flight),
        logits=LOGITS_COPIES * TILE_BYTES_ON_GPUS + 2 * tokens * spec.hidden_size * FP32 if last else 0.0,
        head=head,
        reserve=assume.reserve_bytes,
    )


def _without_lm_head(count: ParameterCount, spec: ModelSpec, division: ParallelDivision) -> ParameterCount:
    """Count a last stage that has a value head in place of the LM head."""
    if spec.tied_embeddings and division.pp == 1:  # the head is the embedding
        return count
    unit = division.tp * VOCAB_MULTIPLE_ON_GPUS
    rows = -(-spec.vocab_size // unit) * VOCAB_MULTIPLE_ON_GPUS
    return ParameterCount(count.dense - rows * spec.hidden_size, count.expert)


def head_count(config: RunConfig, spec: ModelSpec) -> int:
    """Count the parameters of the contrastive head, which the last stage holds; 0 without one."""
    if not config.clipo.enabled:
        return 0
    inner = spec.hidden_size if config.clipo.head is HeadKind.mlp else 0
    return spec.hidden_size * (inner + config.clipo.dim)


def _activations(
    config: RunConfig, spec: ModelSpec, division: ParallelDivision, stage: int, values: int, in_flight: int
) -> float:
    """Compute the bytes that one rank of a stage keeps for the backward pass of `in_flight` micro-batches.

    Each layer keeps inputs and outputs of both norms, q, k and v, the attention's output, and the MLP's inner tensors
    (gate and up, and their product); attention keeps no scores. After arXiv 2205.05198, for gated MLPs and
    grouped-query attention. With recomputation each layer keeps its input, and one layer of one micro-batch at a time
    keeps everything else. `values` is the number of bytes of one value for every token of a micro-batch.
    """
    layers = [
        layer
        for chunk in stage_chunks(spec.num_layers, division)[stage]
        for layer in range(chunk.offset, chunk.offset + chunk.layers)
    ]
    shared = division.tp if config.layout.sequence_parallel else 1  # ranks that divide what TP alone would not
    entry = spec.hidden_size / shared
    attention = 4 * entry + (2 * spec.query_size + 2 * spec.kv_size) / division.tp
    dense = 3 * spec.ffn_hidden_size / division.tp

    def whole(layer: int) -> float:
        if not spec.is_sparse(layer):
            return attention + dense
        experts = spec.experts
        # Every rank keeps a copy of its own tokens for each expert that they are sent to.
        tokens = experts.per_token / shared
        return attention + tokens * (2 * spec.hidden_size + 3 * experts.ffn_hidden_size / division.expert_tp)

    if config.model.recompute:
        return values * (in_flight * entry * len(layers) + max(map(whole, layers), default=0.0))
    return values * in_flight * sum(map(whole, layers))


def server_memory(spec: ModelSpec, tp: int, hardware: Hardware, assume: Assumptions) -> ServerMemory:
    """Compute the memory of a server on `tp` GPUs, in bf16."""
    weights = BF16 * whole_count(spec).total / tp
    kv_heads = max(1.0, spec.num_kv_heads / tp)  # with more GPUs than KV heads they are held more than once
    per_token = 2 * spec.num_layers * kv_heads * spec.head_dim * BF16
    left = hardware.memory_bytes * assume.server_memory - weights - assume.reserve_bytes
    return ServerMemory(weights, max(0.0, left), per_token, assume.reserve_bytes)


def step_tokens(config: RunConfig, assume: Assumptions) -> tuple[float, float]:
    """Return the expected prompt and response tokens of a step; each sample of a group counts its prompt."""
    rollouts = config.data.prompts_per_step * config.rollout.samples_per_prompt
    return (
        rollouts * assume.mean_prompt * config.data.max_prompt_tokens,
        rollouts * assume.mean_response * config.rollout.max_new_tokens,
    )


def micro_batches(config: RunConfig, dp: int, assume: Assumptions) -> int:
    """Return the number of micro-batches of one replica in one optimizer step."""
    tokens = sum(step_tokens(config, assume)) / max(1, config.algorithm.mini_batches)
    return max(1, -(-int(tokens) // (dp * config.layout.max_tokens_per_microbatch)))


def flops_per_token(spec: ModelSpec, context: float) -> float:
    """Return the FLOPs of the forward pass of one token that attends to `context` others on average."""
    seen = context if spec.sliding_window is None else min(context, spec.sliding_window)
    return 2.0 * active_count(spec) + 4.0 * spec.num_layers * spec.query_size * seen


def output_layer_flops(spec: ModelSpec) -> float:
    """Return the share of `flops_per_token` that the output layer takes, which the last pipeline stage computes."""
    return 2.0 * spec.vocab_size * spec.hidden_size
