"""Every setting of a run with its type, range, default and meaning, one file per subject. Imports no torch.

Durations are in seconds, lengths in tokens, memory in bytes unless a name says otherwise. The comment of a field stands
behind it or above it; `clipo settings` shows it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from clipo_megatron.config.schema.algorithm import (
    Aggregation,
    AlgorithmConfig,
    CorrectionConfig,
    CorrectionKind,
    CorrectionLevel,
    CriticConfig,
    KLConfig,
    KLKind,
    KLPlace,
    PluginConfig,
)
from clipo_megatron.config.schema.clipo import (
    Anchors,
    BonusForm,
    BonusPlace,
    ClipoConfig,
    ContrastiveLossName,
    Debias,
    HeadKind,
    Level,
    Similarity,
)
from clipo_megatron.config.schema.data import (
    DataConfig,
    GraderMode,
    GraderSandbox,
    Perturbation,
    RewardConfig,
    SourceConfig,
)
from clipo_megatron.config.schema.model import DType, LayoutConfig, ModelConfig
from clipo_megatron.config.schema.report import ReportConfig, WandbConfig, WandbMode
from clipo_megatron.config.schema.rollout import (
    MOST_TOP_K,
    EngineKind,
    PoolConfig,
    RolloutConfig,
    ServeConfig,
    SyncConfig,
    Transport,
    Unfinished,
)
from clipo_megatron.config.schema.training import (
    CheckpointConfig,
    EvalConfig,
    FaultsConfig,
    LearningRateSchedule,
    OptimizerConfig,
    TrainConfig,
)

__all__ = [
    "MOST_TOP_K", "Aggregation", "AlgorithmConfig", "Anchors", "BonusForm", "BonusPlace", "CheckpointConfig",
    "ClipoConfig", "ContrastiveLossName", "CorrectionConfig", "CorrectionKind", "CorrectionLevel", "CriticConfig",
    "DType", "DataConfig", "Debias", "EngineKind", "EvalConfig", "FaultsConfig", "GraderMode", "GraderSandbox",
    "HeadKind", "KLConfig", "KLKind", "KLPlace", "LayoutConfig", "LearningRateSchedule", "Level", "ModelConfig",
    "OptimizerConfig", "Perturbation", "PluginConfig", "PoolConfig", "ReportConfig", "RewardConfig", "RolloutConfig",
    "RunConfig", "ServeConfig", "Similarity", "SourceConfig", "SyncConfig", "TrainConfig", "Transport", "Unfinished",
    "WandbConfig", "WandbMode",
]  # fmt: skip


@dataclass
class RunConfig:
    name: str = "run"  # of the run, and by default of its folder; not given: that of its file, "mine" for mine.yaml
    model: ModelConfig = field(default_factory=ModelConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    sglang: dict[str, Any] = field(
        default_factory=dict
    )  # any option of an SGLang server, such as mem_fraction_static: 0.8
    vllm: dict[str, Any] = field(
        default_factory=dict
    )  # any option of a vLLM server, such as gpu_memory_utilization: 0.8
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
    # any field of Megatron's TransformerConfig, DistributedDataParallelConfig and OptimizerConfig that nothing else
    # decides, such as recompute_granularity: selective
    megatron: dict[str, Any] = field(default_factory=dict)
