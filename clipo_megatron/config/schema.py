"""Every setting of a run, with its type, default and meaning. This file is the reference; it imports no torch.

Durations are in seconds, lengths in tokens, memory in bytes unless a name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional


class DType(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class EngineKind(str, Enum):
    local = "local"  # transformers, inside the training processes
    sglang = "sglang"  # servers, started by `clipo serve` or by others
    vllm = "vllm"


class Transport(str, Enum):
    in_process = "in_process"  # local engine only
    broadcast = "broadcast"  # trainer ranks and servers share process groups
    ipc = "ipc"  # servers on the trainer's own GPUs open its memory
    disk = "disk"  # safetensors in a folder that servers and trainer share


class Unfinished(str, Enum):
    drop = "drop"  # aborted and forgotten
    resume = "resume"  # aborted; the next step goes on from their tokens
    keep_running = "keep_running"  # they go on while the policy trains, and after the update under the new weights


class CorrectionKind(str, Enum):
    none = "none"
    truncate = "truncate"  # weights above the cap count as the cap
    mask = "mask"  # weights outside [floor, cap] count as 0


class CorrectionLevel(str, Enum):
    token = "token"
    sequence = "sequence"  # product over a rollout's tokens
    geometric = "geometric"  # geometric mean over a rollout's tokens


class KLKind(str, Enum):
    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class KLPlace(str, Enum):
    loss = "loss"
    reward = "reward"


class Aggregation(str, Enum):
    token_mean = "token_mean"  # every response token of the mini-batch weighs the same
    sequence_mean = "sequence_mean"  # every rollout weighs the same, its tokens share the weight
    constant = "constant"  # token sum over a constant length (Dr.GRPO)


class HeadKind(str, Enum):
    linear = "linear"  # H -> d, no bias
    mlp = "mlp"  # H -> H -> d, ReLU


class ContrastiveLossName(str, Enum):
    infonce = "infonce"
    supcon_out = "supcon_out"
    supcon_in = "supcon_in"
    soft_nn = "soft_nn"


class Level(str, Enum):
    group = "group"
    batch = "batch"
    cross = "cross"


class Similarity(str, Enum):
    cosine = "cosine"
    neg_cosine = "neg_cosine"
    l2 = "l2"


class Anchors(str, Enum):
    correct = "correct"
    wrong = "wrong"
    both = "both"


class Debias(str, Enum):
    none = "none"
    mean = "mean"  # subtract the batch mean of the pooled states
    layer_norm = "layer_norm"  # normalise each pooled state to mean 0, variance 1


class GraderMode(str, Enum):
    auto = "auto"  # by data_source
    math = "math"
    reference = "reference"
    choice = "choice"
    number = "number"  # the last number of the response
    reasoning_gym = "reasoning_gym"


class WandbMode(str, Enum):
    disabled = "disabled"
    online = "online"
    offline = "offline"  # written to train.output/wandb, for `wandb sync`


class Perturbation(str, Enum):
    numbers = "numbers"  # drawn anew, and the answer with them
    names = "names"  # drawn anew; the answer stays
    clause = "clause"  # one sentence more that has no bearing on the answer


@dataclass
class ModelConfig:
    path: str = "???"  # Hugging Face folder: config.json, *.safetensors, tokenizer
    dtype: DType = DType.bf16  # of parameters and activations; the optimizer keeps fp32 masters
    recompute: bool = False  # recompute every layer in backward: less memory, one more forward
    system_prompt: Optional[str] = None  # None: the chat template's own; "": none at all


@dataclass
class LayoutConfig:
    """How ranks divide the model. Ranks = tp * pp * dp; experts divide the tp * dp ranks of a stage over ep and etp."""

    tp: int = 1  # tensor parallel; divides the attention heads
    pp: int = 1  # pipeline stages; divides the layers
    first_stage_layers: Optional[int] = None  # layers of the first stage; None: as many as the others
    last_stage_layers: Optional[int] = None  # layers of the last stage; None: as many as the others
    ep: int = 1  # expert parallel; divides the experts, over the tp * dp ranks of a stage
    etp: Optional[int] = None  # ranks that each expert is divided over; None: tp
    dp: Optional[int] = None  # data parallel; None: ranks / (tp * pp), or as few as can be if `clipo train` starts them
    sequence_parallel: bool = False  # shard the sequence between tensor-parallel regions; needs tp > 1
    max_tokens_per_microbatch: int = 8192  # packed tokens of one forward; a longer rollout gets its own
    share_prompts: Optional[bool] = None  # compute a group's prompt once; None: where the attention can
    distributed_timeout_s: float = 2700.0  # of every collective; ranks wait in one for others' rollouts and updates


@dataclass
class SourceConfig:
    """One source of prompts: a file in the verl row schema, or a reasoning-gym generator."""

    path: Optional[str] = None  # *.parquet or *.jsonl
    generator: Optional[str] = None  # name of a reasoning-gym data set
    options: dict[str, Any] = field(default_factory=dict)  # the generator's own options
    size: Optional[int] = None  # rows to take (files) or to generate
    seed: int = 0  # the generator's seed
    perturb: Optional[Perturbation] = None  # change each problem; generators gsm_symbolic and simple_equations
    name: Optional[str] = None  # shown in reports; default: the file's stem or the generator's name
    suffix: str = ""  # appended to the user's question


@dataclass
class DataConfig:
    train: list[SourceConfig] = field(default_factory=list)
    eval: list[SourceConfig] = field(default_factory=list)
    prompts_per_step: int = 16  # over all ranks
    shuffle: bool = True
    max_prompt_tokens: int = 512  # longer prompts are left out, and counted
    hold_out: bool = True  # leave out of training whatever is also an evaluation problem


@dataclass
class PoolConfig:
    """How each data-parallel head asks the servers."""

    concurrency: int = 64  # requests (of one prompt's samples) in flight a head, over all servers
    request_deadline_s: float = 900.0  # for one request to one server
    attempts: int = 4  # servers asked for one request before generation fails
    backoff_s: float = 0.5  # before the second attempt; doubles with each further one
    affinity_slack: int = 4  # requests a prompt's own server may be busier than the idlest and still get it
    join_deadline_s: float = 900.0  # to wait for a server when none is ready


@dataclass
class SyncConfig:
    """How new weights reach the engine."""

    transport: Optional[Transport] = None  # None: in_process (local), broadcast (sglang), disk (vllm)
    deadline_s: float = 300.0  # for one update of all servers; one that misses it is left out
    bucket_mb: int = 64  # of tensors sent together, in MiB; two such buckets are held
    verify_every: int = 1  # updates between two comparisons of checksums; 0: never
    folder: Optional[str] = None  # transport `disk`: shared by trainer and servers; None: train.output/weights
    host: str = "127.0.0.1"  # transport `broadcast`: address of the trainer that the servers reach


@dataclass
class RolloutConfig:
    engine: EngineKind = EngineKind.local
    endpoints: list[str] = field(default_factory=list)  # URLs of servers that others run; []: those of `clipo serve`
    servers: int = 1  # registered servers to wait for before the first step
    router: Optional[str] = None  # URL of a router in front of the servers: it gets the prompts, not the weights
    api_key_env: str = "CLIPO_API_KEY"  # environment variable with the servers' key; needed beyond this machine
    pool: PoolConfig = field(default_factory=PoolConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    colocated: bool = False  # servers and trainer share GPUs and take turns
    over_sampling: float = 1.0  # prompts asked for / prompts needed, on each rank that asks; the first to finish count
    unfinished: Unfinished = Unfinished.drop  # what becomes of the others
    max_refill_rounds: Optional[int] = (
        None  # times a step that groups all right or all wrong are replaced; None: method's
    )
    samples_per_prompt: int = 8  # G
    max_new_tokens: int = 1024
    window_tokens: Optional[int] = None  # tokens a step adds to a rollout at most; the rest follows in later steps
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    batch_size: int = 64  # local engine: sequences decoded at once
    dtype: Optional[DType] = None  # local engine: weights it computes in; None: model.dtype
    deadline_s: float = 1800.0  # for one step's rollouts, all rounds of them


@dataclass
class ServeConfig:
    """What `clipo serve` starts. Further options of the server itself go into the sections `sglang` and `vllm`."""

    servers: int = 1
    python: Optional[str] = None  # interpreter with the engine; None: this one, or an environment set up on demand
    host: str = "127.0.0.1"  # other addresses need the key of rollout.api_key_env
    port: int = 0  # of the first server, the next ones follow; 0: free ones
    tp: int = 1  # GPUs of one server
    dtype: Optional[DType] = None  # weights it computes in; None: model.dtype
    start_deadline_s: float = 900.0  # until a server answers
    health_timeout_s: float = 60.0  # without an answer, or stopped, after which it is killed and started again
    restarts: int = 5  # failed starts in a row before `clipo serve` gives up


@dataclass
class RewardConfig:
    mode: GraderMode = GraderMode.auto
    by_source: dict[str, GraderMode] = field(default_factory=dict)  # data_source -> mode, wins over `mode`
    workers: int = 1  # grader processes a rank
    deadline_s: float = 10.0  # for one answer
    correct_reward: float = 1.0
    wrong_reward: float = 0.0


@dataclass
class KLConfig:
    coefficient: float = 0.0  # 0: no such term, and no reference policy is kept for it
    kind: KLKind = KLKind.k3
    place: KLPlace = KLPlace.loss


@dataclass
class CorrectionConfig:
    """Importance weights for rollouts whose engine or version differs from the policy that scores them."""

    kind: CorrectionKind = CorrectionKind.none
    level: CorrectionLevel = CorrectionLevel.token
    cap: float = 2.0
    floor: float = 0.0  # kind `mask` only


@dataclass
class PluginConfig:
    """A stage added to the baseline: one of `clipo methods`, or a class of your own."""

    name: str = "???"  # or file.py:Class, package.module:Class
    options: dict[str, Any] = field(default_factory=dict)  # the method's own


@dataclass
class AlgorithmConfig:
    name: str = "grpo"  # a baseline of `clipo methods`, or a class of your own: file.py:Class, package.module:Class
    options: dict[str, Any] = field(default_factory=dict)  # the baseline's own
    plugins: list[PluginConfig] = field(default_factory=list)  # stages added to it, in order
    clip_low: Optional[float] = None  # None: the baseline's; 0.2 for most
    clip_high: Optional[float] = None  # None: the baseline's; 0.2 for most
    aggregation: Optional[Aggregation] = None  # None: the baseline's; token_mean for most
    constant_length: Optional[int] = None  # for `constant`; None: rollout.max_new_tokens
    entropy_coefficient: float = 0.0
    mini_batches: int = 1  # optimizer steps a pass over the batch
    epochs: int = 1  # passes over the batch
    kl: KLConfig = field(default_factory=KLConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)


@dataclass
class CriticConfig:
    """The value model of algorithms that need one, in the policy's layout. What is not here is as for the policy."""

    path: Optional[str] = (
        None  # Hugging Face folder or checkpoint that it starts from, without LM head; None: model.path
    )
    learning_rate: float = 1.0e-5
    clip: Optional[float] = 0.2  # how far a value may move from the scored one before its loss stops falling; None: any
    epochs: Optional[int] = None  # passes over the batch; None: algorithm.epochs
    warmup_steps: int = 0  # steps in which the critic learns and the policy waits


@dataclass
class ClipoConfig:
    """The contrastive head and its reward (arXiv 2603.10101)."""

    enabled: bool = True
    head: HeadKind = HeadKind.linear
    dim: int = 512
    loss: ContrastiveLossName = ContrastiveLossName.infonce
    level: Level = Level.group
    similarity: Similarity = Similarity.cosine
    temperature: float = 0.05
    anchors: Anchors = Anchors.correct
    weight: float = 0.2  # lambda
    floor: float = -0.5
    constant: float = 0.0
    calibrate: bool = False  # subtract the loss of perfect separation before scaling
    debias: Debias = Debias.none
    learning_rate: float = 1.0e-3
    weight_decay: float = 0.01
    warmup_steps: int = 0  # steps in which the head trains and gives no bonus
    warmup_policy: bool = True  # whether the policy trains (on the plain reward) during the warm-up
    frozen: bool = False  # keep the head at its random initialisation


@dataclass
class OptimizerConfig:
    learning_rate: float = 1.0e-6
    min_learning_rate: float = 0.0
    warmup_steps: int = 0
    schedule: str = "constant"  # constant | linear | cosine
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1.0e-8
    max_grad_norm: float = 1.0
    skips: int = 5  # updates in a row that may be skipped because loss or gradient is not finite, before the run ends
    overlap_grad_reduce: bool = False


@dataclass
class TrainConfig:
    steps: int = 100
    seed: int = 0
    output: str = "runs/${name}"  # metrics, checkpoints, samples


@dataclass
class CheckpointConfig:
    every: int = 50  # steps; 0: only at the end
    at_end: bool = True  # after the last step too; false: for runs that are only measured
    keep: int = 2  # newest complete ones that stay
    keep_every: int = 0  # steps; those of its multiples stay for good; 0: none do for that
    keep_best: int = 0  # so many with the best held-out accuracy stay too, of those that were evaluated
    asynchronous: bool = True  # copied to host memory, and written while training goes on; false: training waits
    deadline_s: float = 1800.0  # to write one
    failures: int = 3  # saves in a row that fail before the run ends; until then they are warnings
    resume: bool = True  # from the newest complete checkpoint in train.output


@dataclass
class FaultsConfig:
    """What becomes of ranks that die or stand still. Saves and updates that fail: `checkpoint`, `optimizer`."""

    heartbeat_timeout_s: float = 60.0  # without a sign of life of a rank, after which it is named and all ranks end
    phase_timeout_s: float = (
        900.0  # in one phase of a step, after which every rank prints its stacks; it does not end for that
    )
    grace_period_s: Optional[float] = (
        None  # after a signal, for rollouts; then the step is given up; None: 60, or see submit
    )
    restarts: int = 2  # in a row without a new checkpoint: starts of this machine's ranks after one has died or frozen


@dataclass
class EvalConfig:
    every: int = 0  # steps; 0: only before and after
    at_start: bool = True
    samples: int = 1
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    ks: list[int] = field(default_factory=list)  # of pass@k and maj@k; []: 1, 2, 4 .. eval.samples
    max_new_tokens: Optional[int] = None  # None: rollout.max_new_tokens
    seed: Optional[int] = None  # of the draws; None: train.seed


@dataclass
class WandbConfig:
    """Weights & Biases; needs the package wandb."""

    mode: WandbMode = WandbMode.disabled
    project: str = "clipo-megatron"
    run: Optional[str] = None  # what the run is called there; None: name
    entity: Optional[str] = None  # user or team; None: that of the account
    group: Optional[str] = None  # under which runs that differ in the seed stand together


@dataclass
class ReportConfig:
    console: bool = True
    tensorboard: bool = False
    wandb: WandbConfig = field(default_factory=WandbConfig)
    save_rollouts: int = 1  # groups of each step written to rollouts.jsonl
    save_states: int = (
        256  # rollouts of a recorded step whose pooled states and embeddings are kept, for `clipo report`
    )
    states_every: int = 0  # steps between two recorded ones; the first and the last always are
    trace_every: int = 10  # steps between two of which is kept when each rank did what; 0: none
    mult_prob_error_alarm: float = 1.05  # of mean(exp(|log-prob of trainer - of engine|)), fresh rollouts
    rollout_kl_alarm: float = 0.05  # of the engine-trainer KL, nats a token, fresh rollouts
    alarm_stops: bool = False  # an alarm ends the run before the step's checkpoint, rather than to warn


@dataclass
class RunConfig:
    name: str = "run"
    model: ModelConfig = field(default_factory=ModelConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    sglang: dict[str, Any] = field(default_factory=dict)  # any option of its server: mem_fraction_static: 0.8
    vllm: dict[str, Any] = field(default_factory=dict)  # any option of its server: gpu_memory_utilization: 0.8
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    clipo: ClipoConfig = field(default_factory=ClipoConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
