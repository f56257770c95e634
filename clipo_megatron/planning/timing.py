"""The seconds of a step, phase by phase, from data-sheet rates and the assumed shares of them.

They are for comparing layouts and for seeing which phase will dominate, not for predicting a run.
"""

from __future__ import annotations

from dataclasses import dataclass

from clipo_megatron.algorithms.hook import Replay
from clipo_megatron.algorithms.methods.registry import base_method, has_critic, methods, needs_reference
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.planning.activations import FP32
from clipo_megatron.planning.hardware import Assumptions, Hardware
from clipo_megatron.planning.memory import (
    BF16,
    attention_flops,
    flops_per_token,
    micro_batches,
    output_layer_flops,
    server_memory,
    static_option,
    step_tokens,
)
from clipo_megatron.planning.parameters import active_count, stage_chunks, stage_counts, whole_count
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of each phase of one step."""

    generate: float
    score: float
    update: float
    sync: float
    sync_bytes: float
    tokens: float  # prompt and response tokens that the step trains on
    ahead: int  # steps whose rollouts are generated while earlier ones train

    @property
    def train(self) -> float:
        """Seconds in which the policy trains, and does not wait."""
        return self.score + self.update

    @property
    def total(self) -> float:
        """From one update to the next. Phases follow each other; with `ahead` generation runs beside training, and the
        update of the servers, in which both wait, comes on top of the longer of them."""
        return (max(self.generate, self.train) if self.ahead else self.generate + self.train) + self.sync

    @property
    def trainer_idle(self) -> float:
        """Share of a step in which the ranks wait for rollouts."""
        return (max(0.0, self.generate - self.train) if self.ahead else self.generate) / self.total

    @property
    def server_idle(self) -> float:
        """Share of a step in which the servers generate nothing."""
        return (self.total - self.generate) / self.total

    @property
    def mean_age(self) -> float:
        """Updates between the weights that draw a token and the step that trains it, mean over a step's tokens.

        Where training takes longer, a batch is generated as soon as it is asked for, `ahead` steps early. Where
        generation takes longer, the servers work on all batches in flight alike: `ahead` of them while a step trains,
        and one more while it waits for its rollouts.
        """
        if not self.ahead or self.generate <= self.train:
            return float(self.ahead)
        return (self.ahead + self.train / self.generate) / 2


def step_time(
    config: RunConfig,
    spec: ModelSpec,
    division: ParallelDivision,
    dp: int,
    server_gpus: int,
    hardware: Hardware,
    assume: Assumptions,
    *,
    critic: ModelSpec | None = None,
    resident: float = 0.0,
) -> StepTime:
    """Compute the time of a step on `tp * cp * pp * dp` GPUs that train and `server_gpus` that generate.

    Counts the forward passes and updates that the methods declare, before any schedule ends. `critic` is the model that
    a critic starts from, None: the policy's; `resident` are the bytes that a colocated trainer keeps beside a server.
    """
    algorithm, chosen = config.algorithm, methods(config.algorithm)
    time = _PassTime(config, division, dp, hardware, assume)
    forward = time.forward(spec)
    score = forward * (1 + needs_reference(algorithm) + sum(len(method.prompt_variants) for method in chosen))
    update = time.epoch(spec) * algorithm.epochs * (1 + sum(issubclass(method, Replay) for method in chosen))
    if base_method(algorithm).default_aggregation is None:
        # all updates but the first need a forward pass for the scores
        update += forward * (algorithm.epochs - 1 / algorithm.mini_batches)
    if has_critic(algorithm):
        score += time.forward(critic or spec)
        update += time.epoch(critic or spec) * (config.critic.epochs or algorithm.epochs)
    sync_bytes = BF16 * whole_count(spec).total
    network = hardware.network_bytes_per_s * assume.network
    return StepTime(
        generate=generation_seconds(config, spec, server_gpus, hardware, assume, resident=resident),
        score=score,
        update=update,
        sync=sync_bytes / division.pp / network,  # the stages send at the same time
        sync_bytes=float(sync_bytes),
        tokens=sum(step_tokens(config, assume)),
        ahead=0 if config.rollout.colocated else config.rollout.ahead,  # colocated, nothing runs beside training
    )


@dataclass(frozen=True, slots=True)
class _PassTime:
    """Seconds of passes over a step's tokens through the pipeline of one replica."""

    config: RunConfig
    division: ParallelDivision
    dp: int
    hardware: Hardware
    assume: Assumptions

    def forward(self, spec: ModelSpec) -> float:
        """One forward pass."""
        return self._through(spec, passes=1, transfers=1, flushes=1)

    def epoch(self, spec: ModelSpec) -> float:
        """Forward and backward passes of all mini-batches, and their updates."""
        count = self.config.algorithm.mini_batches
        passes = 4 if self.config.model.recompute else 3
        computed = self._through(spec, passes=passes, transfers=2, flushes=count)
        # Gradients are reduced during the backward pass, all but those of its last micro-batch.
        backward = computed * 2 / passes / (count * self._micro_batches)
        reduction, gathering = _reduction_seconds(
            spec, self.division, self.dp * self.config.layout.cp, self.hardware, self.assume
        )
        return computed + count * (max(0.0, reduction - backward) + gathering)

    @property
    def _micro_batches(self) -> int:
        """Of an update."""
        return micro_batches(self.config, self.dp, self.assume)

    def _through(self, spec: ModelSpec, *, passes: int, transfers: int, flushes: int) -> float:
        """Seconds of `passes` times a forward pass, with transfers between stages for every micro-batch.

        The pipeline fills and empties `flushes` times: a micro-batch then passes all stages one after the other, and
        otherwise they follow each other at the pace of the slowest stage.
        """
        stages = stage_seconds(self.config, spec, self.division, self.dp, self.hardware, self.assume)
        count = self._micro_batches * self.config.algorithm.mini_batches
        rows = _row_seconds(self.config, spec, self.division, self.dp, self.hardware, self.assume)
        between = transfers * count * rows.transfer
        each = [passes * seconds + between for seconds in stages]
        each[0] += (transfers - 1) * count * rows.embedding
        slowest = max(each)
        return slowest + (sum(each) - slowest) * flushes / count


@dataclass(frozen=True, slots=True)
class _RowTime:
    """Seconds that a micro-batch costs whatever its tokens compute."""

    transfer: float  # from one pipeline stage to the next
    embedding: float  # of the backward pass of the embedding, whose gradient is as large as itself


def _row_seconds(
    config: RunConfig, spec: ModelSpec, division: ParallelDivision, dp: int, hardware: Hardware, assume: Assumptions
) -> _RowTime:
    rows = spec.vocab_size / division.tp * spec.hidden_size
    # It is filled with zeros, added to and read in bf16, and added to a buffer in fp32.
    embedding = rows * (3 * BF16 + 2 * FP32) / hardware.memory_bytes_per_s
    if division.pp == 1:
        return _RowTime(0.0, embedding)
    # Neighbouring stages are tp * cp * dp ranks apart.
    cp = config.layout.cp
    in_node = division.tp * cp * division.pp * dp <= hardware.gpus_per_node
    rate = hardware.node_bytes_per_s if in_node else hardware.network_bytes_per_s * assume.network
    shared = cp * (division.tp if config.layout.sequence_parallel else 1)
    state = BF16 * spec.hidden_size * config.layout.max_tokens_per_microbatch / shared
    return _RowTime(state / rate + assume.transfer_s, embedding)


def stage_seconds(
    config: RunConfig, spec: ModelSpec, division: ParallelDivision, dp: int, hardware: Hardware, assume: Assumptions
) -> list[float]:
    """Return, for each pipeline stage, the seconds in which it computes a step's tokens of one replica.

    Layers count alike, and the last stage has the output layer beside its own.
    """
    tokens = sum(step_tokens(config, assume)) / dp
    length = assume.mean_prompt * config.data.max_prompt_tokens + assume.mean_response * config.rollout.max_new_tokens
    cp = config.layout.cp
    ranks, rate = cp * division.tp, hardware.flops * assume.train_flops
    head, attention = output_layer_flops(spec), attention_flops(spec, length / 2)
    products = flops_per_token(spec, length / 2) - head - attention  # of the layers, with their weights
    layer = (products / (fp8_rate(config, hardware, assume) or rate) + attention / rate) / spec.num_layers
    exchange = _exchange_seconds(spec, division, tokens / cp, hardware, assume) * division.pp / spec.num_layers
    exchange += _gathering_seconds(spec, division, cp, tokens, hardware, assume)  # both of a layer
    seconds = []
    for rank, chunks in enumerate(stage_chunks(spec.num_layers, division)):
        layers = sum(chunk.layers for chunk in chunks)
        each = layers * layer + (head / rate if rank == division.pp - 1 else 0.0)
        seconds.append(tokens * each / ranks + layers * exchange)
    return seconds


def fp8_rate(config: RunConfig, hardware: Hardware, assume: Assumptions) -> float | None:
    """Return the FLOP/s of products in FP8, in which the products with the layers' weights are; None: they are in bf16.

    Attention and the output layer stay in bf16 whatever `megatron.fp8` says. What `megatron.fp4` gains is not known.
    """
    if config.megatron.get("fp8") is None or hardware.fp8_flops is None:
        return None
    return hardware.fp8_flops * assume.fp8_flops


def _exchange_seconds(
    spec: ModelSpec, division: ParallelDivision, tokens: float, hardware: Hardware, assume: Assumptions
) -> float:
    """Return the seconds of communication of tensor and expert parallelism in one forward pass of a replica.

    Nothing is assumed to be hidden behind computation. A layer gathers and scatters its tokens' states twice over the
    TP ranks; experts send each token's state to `per_token` places and back.
    """
    state = BF16 * spec.hidden_size
    layers = spec.num_layers / division.pp
    shared = 4 * state * (division.tp - 1) / division.tp * tokens * layers / hardware.node_bytes_per_s
    if spec.experts is None or division.ep == 1:
        return shared
    in_node = division.ep * division.expert_tp <= hardware.gpus_per_node
    rate = hardware.node_bytes_per_s if in_node else hardware.network_bytes_per_s * assume.network
    sparse = layers * (1 - len(spec.experts.dense_layers) / spec.num_layers)
    sent = 2 * spec.experts.per_token * state * (division.ep - 1) / division.ep * tokens / division.tp
    return shared + sent * sparse / rate


def _gathering_seconds(
    spec: ModelSpec, division: ParallelDivision, cp: int, tokens: float, hardware: Hardware, assume: Assumptions
) -> float:
    """Return the seconds in which one layer's keys and values are gathered over the context-parallel ranks."""
    in_node = division.tp * cp <= hardware.gpus_per_node
    rate = hardware.node_bytes_per_s if in_node else hardware.network_bytes_per_s * assume.network
    return 2 * BF16 * spec.kv_size / division.tp * tokens * (cp - 1) / cp / rate


def _reduction_seconds(
    spec: ModelSpec, division: ParallelDivision, copies: int, hardware: Hardware, assume: Assumptions
) -> tuple[float, float]:
    """Return the seconds that one update takes to reduce gradients in fp32 over the model's copies, those of data
    and context parallelism, and to gather the new weights."""
    largest = max(count.total for count in stage_counts(spec, division))
    in_node = division.tp * division.pp * copies <= hardware.gpus_per_node
    rate = hardware.node_bytes_per_s if in_node else hardware.network_bytes_per_s * assume.network
    sent = largest * (copies - 1) / copies / rate
    return FP32 * sent, BF16 * sent


def generation_seconds(
    config: RunConfig,
    spec: ModelSpec,
    gpus: int,
    hardware: Hardware,
    assume: Assumptions,
    *,
    resident: float = 0.0,
) -> float:
    """Return the seconds until the last rollout of a step is done; infinite if a server cannot hold one sequence.

    One token of every sequence in flight costs one pass over the weights and the cache, or its FLOPs if they take
    longer. No step is shorter than its longest response, generated nearly alone.
    """
    tp = config.serve.tp
    servers = gpus // tp
    if not servers:
        return float("inf")
    prompt, response = step_tokens(config, assume)
    rollouts = config.data.prompts_per_step * config.rollout.samples_per_prompt
    length = (prompt + response) / rollouts
    memory = server_memory(spec, tp, hardware, assume, resident=resident, static=static_option(config)[1])
    at_once = min(memory.sequences(length), -(-rollouts // servers))
    if not at_once:
        return float("inf")

    def pass_seconds(sequences: float) -> float:
        moved = memory.weights * _share_of_weights_read(spec, sequences) + sequences * length * memory.cache_per_token
        flops = sequences * flops_per_token(spec, length) / tp
        return max(
            moved / (hardware.memory_bytes_per_s * assume.decode_bandwidth),
            flops / (hardware.flops * assume.prefill_flops),
        )

    prefill = prompt * flops_per_token(spec, length / 2) / (servers * tp * hardware.flops * assume.prefill_flops)
    rate = servers * at_once / pass_seconds(at_once)
    return prefill + max(response / rate, config.rollout.max_new_tokens * pass_seconds(1))


def _share_of_weights_read(spec: ModelSpec, sequences: float) -> float:
    """Return the share of the weights that a pass reads: of the experts only those that some token is sent to."""
    if spec.experts is None:
        return 1.0
    whole = whole_count(spec)
    idle = (1 - spec.experts.per_token / spec.experts.count) ** sequences
    return max(active_count(spec) / whole.total, 1 - idle * whole.expert / whole.total)
