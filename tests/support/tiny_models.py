"""Tiny random folders of every family in the Hugging Face layout, made on the spot: no network, no cache.

Every parameter, norms and biases included, is away from its default, so that a mapping that drops, transposes or swaps
one changes the logits. The tokenizer is byte-level (ids 3 .. 258 are the bytes), its chat template ChatML with BOS and
EOS as the turn marks, as SmolLM2 has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

BOS, EOS, PAD = 0, 1, 2
TOKENIZER_SIZE = 259
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
DEFAULT_SYSTEM_PROMPT = "You are a tiny test model."

_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + DEFAULT_SYSTEM_PROMPT + "<|im_end|>\n' }}{% endif %}"
)
_TURNS = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# Llama 3's rope, with numbers that bend every frequency of a short text.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 8,
    "rope_theta": 500.0,
}
_MILLION = {"rope_type": "default", "rope_theta": 1_000_000.0}


def tiny_llama(path: str | Path, *, head_dim: int = 16, **options: Any) -> Path:
    """Write a Llama folder (config, fp32 safetensors, tokenizer) to `path` and return it; `options`: of `_decoder`.

    `vocab` is the model's; the tokenizer always has 259 ids, the three special ones first.
    `default_system`: the chat template puts `DEFAULT_SYSTEM_PROMPT` before a conversation without a system turn.
    """
    return _decoder(Path(path), LlamaConfig, {"rms_norm_eps": 1e-5}, head_dim=head_dim, **options)


def tiny_qwen2(
    path: str | Path,
    *,
    hidden: int = 64,
    heads: int = 4,
    head_dim: int = 16,
    default_system: bool = True,
    **options: Any,
) -> Path:
    """As `tiny_llama`, with Qwen2's biases on query, key and value, its rope base and its default system prompt.

    Qwen2 has no head size of its own in its configuration: hidden must be heads * head_dim.
    """
    if hidden != heads * head_dim:
        raise ValueError(f"Qwen2 needs hidden == heads * head_dim, got {hidden} != {heads} * {head_dim}")
    fields = {"rms_norm_eps": 1e-6, "rope_parameters": dict(_MILLION), "use_sliding_window": False}
    sizes = {"hidden": hidden, "heads": heads, "default_system": default_system}
    return _decoder(Path(path), Qwen2Config, fields, **sizes, **options)


def tiny_qwen3_moe(
    path: str | Path,
    *,
    tied: bool = False,
    head_dim: int = 24,
    experts: int = 8,
    per_token: int = 2,
    expert_intermediate: int = 40,
    renormalised: bool = True,
    dense_layers: tuple[int, ...] = (),
    **options: Any,
) -> Path:
    """As `tiny_llama`, with Qwen3's q/k norms, and in all but the `dense_layers` experts with a tensor each."""
    fields = {
        "num_experts": experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": expert_intermediate,
        "norm_topk_prob": renormalised,
        "mlp_only_layers": list(dense_layers),
        "decoder_sparse_step": 1,
        "rms_norm_eps": 1e-6,
        "rope_parameters": dict(_MILLION),
    }
    return _decoder(Path(path), Qwen3MoeConfig, fields, tied=tied, head_dim=head_dim, **options)


def tiny_qwen3(path: str | Path, *, head_dim: int = 24, **options: Any) -> Path:
    """As `tiny_llama`, with norms on each head's query and key."""
    return _decoder(Path(path), Qwen3Config, {"rms_norm_eps": 1e-6}, head_dim=head_dim, **options)


def tiny_mistral(path: str | Path, *, head_dim: int = 24, window: int | None = 5, **options: Any) -> Path:
    """As `tiny_llama`, with a sliding window shorter than most sequences of the tests; None: no window."""
    return _decoder(Path(path), MistralConfig, {"sliding_window": window}, head_dim=head_dim, **options)


def tiny_phi3(path: str | Path, *, window: int | None = 7, **options: Any) -> Path:
    """As `tiny_mistral`, with fused tensors, and no head size of its own in its configuration."""
    return _decoder(Path(path), Phi3Config, {"sliding_window": window}, **options)


def _decoder(
    path: Path,
    family: type[PreTrainedConfig],
    fields: dict[str, Any],
    *,
    tied: bool = True,
    vocab: int = TOKENIZER_SIZE,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    layers: int = 4,
    intermediate: int = 112,
    seed: int = 0,
    default_system: bool = False,
    **more: Any,
) -> Path:
    config = family(
        vocab_size=vocab,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        tie_word_embeddings=tied,
        max_position_embeddings=2048,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **fields,
        **more,
    )
    return _write(path, config, seed, default_system)


def tiny_weights(path: str | Path, *, seed: int) -> dict[str, torch.Tensor]:
    """Other random weights for the folder at `path`: Hugging Face name -> fp32 tensor, as safetensors holds them."""
    return _random_weights(AutoConfig.from_pretrained(path), seed)


def _write(path: Path, config: PreTrainedConfig, seed: int, default_system: bool) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    config.architectures = [ARCHITECTURES[config.model_type]]
    config.dtype = torch.float32
    config.save_pretrained(path)
    save_file(_random_weights(config, seed), path / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(default_system).save_pretrained(path)
    return path


def _random_weights(config: PreTrainedConfig, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = {}
    for name, parameter in model.named_parameters():  # a tied lm_head is not listed twice
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            weights[name] = 1.0 + 0.2 * noise
        elif name.endswith("bias"):
            weights[name] = 0.3 * noise
        else:
            # Logits of about unit scale or a little more: neither uniform nor one-hot.
            weights[name] = 1.5 * noise / math.sqrt(parameter.shape[-1])
    return dict(_as_released(weights))


def _as_released(weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Split experts, which transformers 5 stacks in memory, into the tensors of released files."""
    for name, tensor in weights.items():
        place, _, last = name.rpartition(".")
        if not place.endswith(".experts"):
            yield name, tensor
            continue
        for number, expert in enumerate(tensor):
            if last == "gate_up_proj":
                gate, up = expert.chunk(2)
                yield f"{place}.{number}.gate_proj.weight", gate.contiguous()
                yield f"{place}.{number}.up_proj.weight", up.contiguous()
            else:
                yield f"{place}.{number}.{last}.weight", expert.contiguous()


def _tokenizer(default_system: bool) -> PreTrainedTokenizerFast:
    special = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[BOS],
        eos_token=special[EOS],
        pad_token=special[PAD],
        unk_token=special[PAD],  # else loaders of some model types add one of their own, id 259
        chat_template=(_DEFAULT_SYSTEM if default_system else "") + _TURNS,
        clean_up_tokenization_spaces=False,
    )
