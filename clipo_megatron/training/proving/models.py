"""Random models and rollouts, the same on every device, which need no file of anybody's."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.config.schema import DType, RunConfig
from clipo_megatron.flow import MicroBatch, Sample
from clipo_megatron.policy.actor import PolicyActor
from clipo_megatron.policy.batch.packing import pack
from clipo_megatron.policy.model.model import TORCH_DTYPE, PolicyStage, transformer_config
from clipo_megatron.policy.parallel import Layout
from clipo_megatron.policy.trainable import Trainable
from clipo_megatron.runtime.platform import platform
from clipo_megatron.weights.export import plan_export
from clipo_megatron.weights.families import model_spec
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.spec import ModelSpec

SCALE = 0.05  # standard deviation of random weights
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,  # GPUs pad it to a multiple of 64
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
# What tells the families apart: biases, norms of queries and keys, a window that is shorter than a rollout, experts.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_TINY},
    "qwen2": {"model_type": "qwen2", **_TINY, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_TINY, "head_dim": 16},
    "mistral": {"model_type": "mistral", **_TINY, "sliding_window": 9},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_TINY,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
}
_QWEN = {"model_type": "qwen2", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
# The sizes of Qwen2.5 1.5B, whole and with a quarter of its layers, and 7B, and of models for machines without a GPU.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {**_QWEN, **_TINY, "hidden_size": 128, "intermediate_size": 352, "vocab_size": 1024},
    "small": {
        **_QWEN,
        **_TINY,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "vocab_size": 8192,
        "max_position_embeddings": 4096,
    },
    "1.5B": {
        **_QWEN,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "0.6B": {},
    "7B": {
        **_QWEN,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
SIZES["0.6B"] = SIZES["1.5B"] | {"num_hidden_layers": 7}


def configuration(path: str | Path = "", *, dtype: DType = DType.fp32, max_tokens: int = 8192) -> RunConfig:
    """The configuration of a run on one rank, with a learning rate at which weights move in a few updates."""
    config = RunConfig()
    config.model.path, config.model.dtype = str(path), dtype
    config.layout.max_tokens_per_microbatch = max_tokens
    config.data.max_prompt_tokens = config.rollout.max_new_tokens = max(1, max_tokens // 2)  # a row holds the longest
    config.optimizer.learning_rate = 1e-4
    # Elements without a gradient to speak of would follow its rounding otherwise.
    config.optimizer.epsilon = 1e-6
    config.clipo.dim = 32
    return config


def random_tensor(name: str, shape: Sequence[int]) -> Tensor:
    """A weight that depends on its name and shape alone: norms near 1, all others near 0."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    drawn = torch.randn(tuple(shape), generator=generator) * SCALE
    return drawn + 1 if name.endswith("norm.weight") else drawn


def write_folder(folder: Path, config: dict[str, Any]) -> Path:
    """Write config.json and random weights of a model, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    plan = plan_export(model_spec(config), ParallelDivision(), dtype=torch.float32)
    save_file({each.name: random_tensor(each.name, each.shape) for each in plan.tensors}, folder / "model.safetensors")
    return folder


def actor_of(config: RunConfig, layout: Layout) -> tuple[PolicyActor, Algorithm]:
    """The policy in training of a configuration, on this one rank, with its algorithm."""
    algorithm = build_algorithm(config)
    return PolicyActor(config, layout, needs=algorithm.needs, total_steps=1000), algorithm


def trainable_of(config: RunConfig, spec: ModelSpec, layout: Layout) -> Trainable:
    """A model with random weights in training on this one rank, without a folder to read them from."""
    dtype = TORCH_DTYPE[config.model.dtype]
    with platform().cuda_tensor_names():
        stage = PolicyStage(spec, transformer_config(spec, config.model, layout, config.megatron), layout)
        stage.to(device=platform().device, dtype=dtype)
    generator = torch.Generator(platform().device).manual_seed(0)
    for name, parameter in stage.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(std=0.02, generator=generator)
    return Trainable("policy", stage, layout, config.optimizer, total_steps=1000, megatron=config.megatron)


def packed_rows(vocabulary: int, *, rows: int, tokens: int, longest: int, seed: int = 0) -> Iterator[MicroBatch]:
    """Micro-batches of random rollouts of `longest` tokens, a tenth of it prompt, that fill `tokens` tokens each."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rows):
        samples = []
        for place in range(max(1, tokens // longest)):
            drawn = torch.randint(0, vocabulary, (longest,), generator=generator)
            asked, answer = drawn[: longest // 10], drawn[longest // 10 :]
            samples.append(Sample(place, place, asked, answer, torch.zeros(answer.numel())))
        micro = pack(samples, device=platform().device)
        yield replace(micro, weights=torch.full((micro.targets.numel(),), 1e-4, device=platform().device))


def updated(trainable: Trainable, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
    """Take one optimizer step on the log-probs of the targets; returns the metrics."""

    def loss(micro: MicroBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, _ = trainable.stage.logprobs(hidden, micro, temperature=1.0)
        total = -(micro.weights * logprobs).sum()
        return total, {"policy/loss": total.detach()}

    return trainable.update(micro_batches, loss)
