"""The sections `model` and `layout`: which model is trained, and how ranks divide it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from math import gcd
from typing import Any, Optional

from clipo_megatron.config.ranges import within


class DType(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"


@dataclass
class ModelConfig:
    path: str = "???"  # Hugging Face folder (config.json, *.safetensors, tokenizer) or a checkpoint of `clipo convert`
    dtype: DType = DType.bf16  # dtype of parameters and activations; the optimizer keeps fp32 master weights
    recompute: bool = False  # recompute every layer in the backward pass: less memory, one more forward
    replay_routing: bool = False  # experts: each token goes to those that the engine sent it to; needs sglang
    system_prompt: Optional[str] = None  # null: that of the chat template; "": none
    # what the chat template reads beside the turns, such as enable_thinking: false
    template_options: dict[str, Any] = field(default_factory=dict)


@dataclass
class LayoutConfig:
    """How ranks divide the model. Ranks = tp * cp * pp * dp; experts divide the tp * cp * dp ranks of a stage."""

    tp: int = within(1, 1)  # tensor-parallel ranks; divides the attention heads
    pp: int = within(1, 1)  # pipeline stages; divides the layers
    cp: int = within(1, 1)  # context-parallel ranks, which divide the tokens of each packed row: for long sequences
    first_stage_layers: Optional[int] = within(None, 1)  # layers of the first pipeline stage; null: as the others
    last_stage_layers: Optional[int] = within(None, 1)  # layers of the last pipeline stage; null: as the others
    ep: int = within(1, 1)  # expert-parallel ranks; divides the experts, over the tp * cp * dp ranks of a stage
    etp: Optional[int] = within(None, 1)  # tensor-parallel ranks of each expert; null: tp
    # data-parallel replicas; null: ranks / (tp * cp * pp), or as few as possible where `clipo train` starts the ranks
    dp: Optional[int] = within(None, 1)
    sequence_parallel: bool = False  # shard activations along the sequence outside tensor-parallel layers; needs tp > 1
    max_tokens_per_microbatch: int = within(8192, 1)  # packed tokens of one forward; a longer rollout gets its own
    share_prompts: Optional[bool] = None  # compute a group's prompt once; null: where its rollouts begin alike
    distributed_timeout_s: float = within(2700.0, above=0)  # limit of a collective; ranks wait in one for slower ranks

    @property
    def replica_ranks(self) -> int:
        """Ranks of one data-parallel replica."""
        return self.tp * self.cp * self.pp

    @property
    def requested_ranks(self) -> int:
        """Ranks that the layout needs where no launcher has started any, with as small a dp as can be."""
        return self.replica_ranks * (self.dp or self._fewest_replicas)

    def replicas(self, ranks: int | None) -> int:
        """Data-parallel replicas: `dp`, or what the started ranks leave over after tp * cp * pp; at least 1."""
        if self.dp is not None:
            return self.dp
        return self._fewest_replicas if ranks is None else max(1, ranks // max(1, self.replica_ranks))

    @property
    def _fewest_replicas(self) -> int:
        """Experts are divided over the tp * cp * dp ranks of a stage: with fewer replicas some would have no place."""
        experts = max(1, self.ep * (self.tp if self.etp is None else self.etp))
        return experts // gcd(experts, max(1, self.tp * self.cp))
