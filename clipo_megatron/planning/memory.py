"""The memory of one GPU, part by part: of the trainer during a policy update, and of a server while it generates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from clipo_megatron.algorithms.methods.registry import has_critic, needs_reference
from clipo_megatron.config.schema import DType, EngineKind, HeadKind, RunConfig
from clipo_megatron.planning.activations import FP32, WIDTH, Kernels, layer_shape, stage_activations
from clipo_megatron.planning.hardware import Assumptions, Hardware
from clipo_megatron.planning.parameters import ParameterCount, active_count, stage_counts, whole_count
from clipo_megatron.policy.model.tiles import TILE_BYTES_ON_GPUS
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.sharding import VOCAB_MULTIPLE_ON_GPUS
from clipo_megatron.weights.spec import ModelSpec

LOGITS_COPIES = 3  # logits, their exponentials, and the gradient
BF16 = 2  # bytes


@dataclass(frozen=True, slots=True)
class TrainerMemory:
    """Bytes on the GPU of one rank during a policy update."""

    weights: float
    gradients: float
    optimizer: float
    reference: float  # a second copy of the weights, for a KL to the start or a method that needs it
    critic: float  # weights, gradients and optimizer of a value model, for methods that train one
    activations: float  # of the policy or the critic, whichever has more
    gathered: float  # keys and values of one layer from all context-parallel ranks, and their gradients
    logits: float
    head: float  # contrastive head
    reserve: float
    others: float  # what a colocated server keeps while it has given back its weights and cache
    critic_state: float = 0.0  # of the critic's bytes those that are not gradients

    @property
    def parts(self) -> dict[str, float]:
        """The bytes of each part, by its name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "critic_state"}

    @property
    def total(self) -> float:
        """The bytes of all parts together."""
        return sum(self.parts.values())

    @property
    def of_rows(self) -> float:
        """The bytes that grow with the tokens of a row, which context-parallel ranks divide."""
        return self.activations + self.logits

    @property
    def resident(self) -> float:
        """The bytes that stay while servers generate on the same GPU: the rest is freed or moved to host memory.

        Weights stay because they are exported to the servers, and so does what the process itself needs.
        """
        return self.weights + self.head + self.reserve


@dataclass(frozen=True, slots=True)
class ServerMemory:
    """Bytes on one GPU of a server."""

    weights: float
    cache: float  # left for keys and values
    cache_per_token: float
    reserve: float
    trainer: float = 0.0  # what a colocated trainer keeps meanwhile

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
    kernels: Kernels | None = None,
) -> list[TrainerMemory]:
    """Compute the memory of each pipeline stage; `critic` is the model that a critic starts from, None: the policy's.

    `kernels` None: layers are computed as on GPUs.

    Weights, gradients and optimizer are those of Megatron's distributed optimizer: gradients are kept in fp32 on every
    rank, masters and both moments are divided over the data- and context-parallel ranks (arXiv 1910.02054, stage 1).
    """
    counts = stage_counts(spec, division, VOCAB_MULTIPLE_ON_GPUS)
    kernels = kernels or Kernels.on_gpus(config.megatron)

    def stages_of(model: ModelSpec, counts: Iterable[ParameterCount]) -> list[TrainerMemory]:
        return [
            _stage_memory(config, model, division, dp, assume, count, stage, kernels)
            for stage, count in enumerate(counts)
        ]

    stages = stages_of(spec, counts)
    if not has_critic(config.algorithm):
        return stages
    critic = critic or spec
    counts = list(stage_counts(critic, division, VOCAB_MULTIPLE_ON_GPUS))
    counts[-1] = _without_lm_head(counts[-1], critic, division)
    values = stages_of(critic, counts)
    return [
        replace(
            policy,
            critic=value.weights + value.gradients + value.optimizer,
            critic_state=value.weights + value.optimizer,
            activations=max(policy.activations, value.activations),
            gathered=max(policy.gathered, value.gathered),
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
    kernels: Kernels,
) -> TrainerMemory:
    """Compute the memory of one stage without a critic."""
    bf16 = config.model.dtype is DType.bf16
    width = BF16 if bf16 else FP32
    last = stage == division.pp - 1
    cp = config.layout.cp
    expert_dp = max(1, dp * cp * division.tp // (division.ep * division.expert_tp))
    state = 3 * FP32 if bf16 else 2 * FP32  # fp32 parameters are their own masters
    tokens = -(-row_tokens(config) // cp)  # of a micro-batch on one rank
    in_flight = min(division.pp - stage, micro_batches(config, dp, assume))
    head = 4 * FP32 * head_count(config, spec) if last else 0  # weights, gradients and both moments
    logits = LOGITS_COPIES * TILE_BYTES_ON_GPUS + head_bytes(config, spec, division, tokens, kernels)
    return TrainerMemory(
        weights=width * count.total,
        gradients=FP32 * count.total,
        optimizer=state * (count.dense / (dp * cp) + count.expert / expert_dp),
        reference=width * count.total if needs_reference(config.algorithm) else 0.0,
        critic=0.0,
        activations=stage_activations(
            config, spec, division, stage, tokens=tokens, in_flight=in_flight, kernels=kernels
        ),
        gathered=gathered_bytes(config, spec, division),
        logits=logits if last else 0.0,
        head=head,
        reserve=assume.reserve_bytes,
        others=assume.reserve_bytes if config.rollout.colocated else 0.0,
    )


def gathered_bytes(config: RunConfig, spec: ModelSpec, division: ParallelDivision) -> float:
    """Compute the bytes of whole rows of keys and values that a context-parallel rank takes at most, one layer at a
    time; 0 without context parallelism.

    In the backward pass keys and values are gathered again, the gradients of both are added up in fp32, and the first
    of them to be scattered is brought into the order of the ranks: a copy of it, and of half of it turned around.
    """
    if config.layout.cp == 1:
        return 0.0
    width = WIDTH[config.model.dtype]
    each = row_tokens(config) * max(1.0, spec.num_kv_heads / division.tp) * spec.head_dim
    return each * (2 * width + (2 + 1 + 0.5) * FP32)


def _without_lm_head(count: ParameterCount, spec: ModelSpec, division: ParallelDivision) -> ParameterCount:
    """Count a last stage that has a value head in place of the LM head."""
    if spec.tied_embeddings and division.pp == 1:  # the head is the embedding
        return count
    unit = division.tp * VOCAB_MULTIPLE_ON_GPUS
    rows = -(-spec.vocab_size // unit) * VOCAB_MULTIPLE_ON_GPUS
    return ParameterCount(count.dense - rows * spec.hidden_size, count.expert)


def head_bytes(
    config: RunConfig, spec: ModelSpec, division: ParallelDivision, tokens: int, kernels: Kernels | None = None
) -> float:
    """Compute the bytes that the last stage takes for log-probs beside tiles of logits, if every token is a target.

    In the backward pass there are gradients of the states, in fp32 and twice in the model's dtype.
    """
    shape = layer_shape(config, spec, division, kernels)
    return tokens * (shape.width * (shape.kept_of_head() + 2 * spec.hidden_size) + FP32 * spec.hidden_size)


def head_count(config: RunConfig, spec: ModelSpec) -> int:
    """Count the parameters of the contrastive head, which the last stage holds; 0 without one."""
    if not config.clipo.enabled:
        return 0
    inner = spec.hidden_size if config.clipo.head is HeadKind.mlp else 0
    return spec.hidden_size * (inner + config.clipo.dim)


def longest_rollout(config: RunConfig) -> int:
    """Return the tokens of the longest prompt with the longest response."""
    return config.data.max_prompt_tokens + config.rollout.max_new_tokens


def row_tokens(config: RunConfig) -> int:
    """Return the tokens of the longest row of a micro-batch: a rollout that is longer than the limit has its own."""
    return max(config.layout.max_tokens_per_microbatch, longest_rollout(config))


# Of each engine the option with the share of a GPU that a server takes for weights and cache
_STATIC_OPTIONS = {
    EngineKind.sglang: ("sglang", "mem_fraction_static"),
    EngineKind.vllm: ("vllm", "gpu_memory_utilization"),
}


def static_option(config: RunConfig) -> tuple[str, float | None]:
    """Return the option with the share of a GPU that a server takes for weights and cache, and the share, if given."""
    section, option = _STATIC_OPTIONS.get(config.rollout.engine, ("sglang", "mem_fraction_static"))
    value = getattr(config, section).get(option)
    return f"{section}.{option}", float(value) if isinstance(value, int | float) else None


def server_memory(
    spec: ModelSpec,
    tp: int,
    hardware: Hardware,
    assume: Assumptions,
    *,
    resident: float = 0.0,
    static: float | None = None,
) -> ServerMemory:
    """Compute the memory of a server on `tp` GPUs, in bf16.

    A trainer keeps `resident` bytes of each GPU meanwhile. Weights and cache take at most the share `static` if given.
    """
    weights = BF16 * whole_count(spec).total / tp
    kv_heads = max(1.0, spec.num_kv_heads / tp)  # with more GPUs than KV heads they are held more than once
    per_token = 2 * spec.num_layers * kv_heads * spec.head_dim * BF16
    usable = hardware.memory_bytes * min(assume.server_memory, assume.memory)
    if resident:
        usable = min(usable, hardware.memory_bytes * assume.memory - resident)
    left = min(usable - assume.reserve_bytes, hardware.memory_bytes * (static or 1.0)) - weights
    return ServerMemory(weights, max(0.0, left), per_token, assume.reserve_bytes, resident)


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
    return 2.0 * active_count(spec) + attention_flops(spec, context)


def attention_flops(spec: ModelSpec, context: float) -> float:
    """Return the share of `flops_per_token` that scores and their products with values take."""
    seen = context if spec.sliding_window is None else min(context, spec.sliding_window)
    return 4.0 * spec.num_layers * spec.query_size * seen


def output_layer_flops(spec: ModelSpec) -> float:
    """Return the share of `flops_per_token` that the output layer takes, which the last pipeline stage computes."""
    return 2.0 * spec.vocab_size * spec.hidden_size
