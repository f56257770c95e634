"""The facts of a model's architecture, read from config.json, in Megatron's terms but without Megatron."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipo_megatron.config.model_folder import ModelFileError, read_object
from clipo_megatron.weights.errors import UnsupportedModel, WeightsFolderError
from clipo_megatron.weights.rope import LinearRope, Llama3Rope, read_rope

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts in place of the MLP, in every layer except `dense_layers`."""

    count: int  # experts of a layer
    per_token: int  # experts that a token is sent to
    ffn_hidden_size: int  # inner features of one expert
    renormalised: bool  # whether the chosen experts' probabilities are scaled to sum to 1
    dense_layers: frozenset[int] = frozenset()  # indices of the layers with a plain MLP


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A pre-norm decoder with RMSNorm, rotary positions, grouped-query attention and SiLU-gated MLPs."""

    family: str  # model_type of config.json
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # num_heads * head_dim need not be hidden_size
    vocab_size: int  # rows of the embedding, unpadded
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | LinearRope | None
    max_positions: int
    tied_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None  # tokens that a token attends to, itself included; None: all before it
    experts: Experts | None = None

    def is_sparse(self, layer: int) -> bool:
        """Tell whether a layer has experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    def architecture(self) -> dict[str, Any]:
        """Return everything that decides the shapes of the weights or what they mean, as plain JSON values.

        Checkpoints store it to recognise their model. The length of the context is not part of it.
        """
        experts = self.experts
        return {
            "family": self.family,
            "hidden": self.hidden_size,
            "layers": self.num_layers,
            "vocabulary": self.vocab_size,
            "ffn": self.ffn_hidden_size,
            "heads": self.num_heads,
            "key-value heads": self.num_kv_heads,
            "head size": self.head_dim,
            "tied embeddings": self.tied_embeddings,
            "qkv bias": self.qkv_bias,
            "qk norm": self.qk_norm,
            "norm epsilon": self.rms_norm_eps,
            "rope theta": self.rope_theta,
            "rope scaling": repr(self.rope_scaling) if self.rope_scaling else None,
            "sliding window": self.sliding_window,
            "experts": experts.count if experts else 0,
            "experts per token": experts.per_token if experts else 0,
            "expert ffn": experts.ffn_hidden_size if experts else 0,
            "renormalised": experts.renormalised if experts else False,
            "dense layers": sorted(experts.dense_layers) if experts else [],
        }

    @property
    def query_size(self) -> int:
        """Number of rows of q_proj."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Number of rows of k_proj, and of v_proj."""
        return self.num_kv_heads * self.head_dim


def inverse_frequencies(spec: ModelSpec) -> Tensor:
    """Compute the angular frequency of each rotary pair in radians per token, [head_dim / 2] float32.

    megatron-core fixes llama3's low and high factors and original length at 1, 4 and 8192. Overwriting the `inv_freq`
    of its rotary embedding with this is right for all values. Source: the scaling of Llama 3.1, which is also
    `rope_type="llama3"` in transformers.
    """
    import torch  # here, so that reading a config.json does not need torch

    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32, device="cpu") / spec.head_dim
    frequencies = 1.0 / (spec.rope_theta**exponents)
    match spec.rope_scaling:
        case None:
            return frequencies
        case LinearRope(factor):
            return frequencies / factor
        case Llama3Rope(factor, low, high, original):
            turns = original * frequencies / (2 * math.pi)  # within the original context
            keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
            return (1 - keep) * frequencies / factor + keep * frequencies


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read config.json of a Hugging Face folder.

    Raises:
        WeightsFolderError: there is none, or it is not a JSON object.
    """
    return read_config_file(Path(folder) / "config.json")


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a config.json that may have another name; raises what `read_config` does."""
    try:
        return read_object(path)
    except FileNotFoundError:
        raise WeightsFolderError(f"{path} does not exist: the path must be a Hugging Face folder") from None
    except ModelFileError as error:
        raise WeightsFolderError(str(error)) from error


_SCALES = "it multiplies activations by a factor that the policy does not have"
_CAPS = "it caps scores or logits, which the policy does not"
_ELSEWHERE = "the policy's attention is causal and reaches over the whole sequence, or over sliding_window"
# Fields with which decoders change their mathematics, each with the values that change nothing and the reason why
# others are refused: a model that sets one would be computed differently from what its author meant.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention_multiplier": ((), _SCALES),
    "embedding_multiplier": ((1,), _SCALES),
    "residual_multiplier": ((1,), _SCALES),
    "logits_scaling": ((1,), _SCALES),
    "logit_scale": ((1,), _SCALES),
    "scale_emb": ((1,), _SCALES),
    "scale_depth": ((), _SCALES),
    "attn_logit_softcapping": ((), _CAPS),
    "final_logit_softcapping": ((), _CAPS),
    "query_pre_attn_scalar": ((), "scores are divided by the root of the head size here, and by nothing else"),
    "clip_qkv": ((), "it clips query, key and value, which the policy does not"),
    "alibi": ((False,), "positions are rotary here"),
    "rope_interleaved": ((False,), "rotary pairs are the two halves of a head here, not neighbours"),
    "use_mrope": ((False,), "positions have one axis here, those of text"),
    "no_rope_layers": (([],), "all layers rotate alike here"),
    "attention_chunk_size": ((), _ELSEWHERE),
    "is_causal": ((True,), _ELSEWHERE),
    "use_bidirectional_attention": ((False,), _ELSEWHERE),
    "attention_sink_bias": ((False,), "attention has no sinks here"),
}
_QK_NORM = ("use_qk_norm", "qk_layernorm")  # what some configurations say of norms on each head's query and key


def decoder_spec(
    config: Mapping[str, Any], *, qkv_bias: bool = False, qk_norm: bool = False, windowed: bool = False
) -> ModelSpec:
    """Read the fields that decoders like Llama share; `Family.defaults` has filled in those that are left out.

    Args:
        config: the contents of config.json.
        qkv_bias: whether q, k and v have biases.
        qk_norm: whether each head's query and key are normalised.
        windowed: whether every layer has the sliding_window of config.json.

    Raises:
        UnsupportedModel: Megatron would compute a field differently, or a field is missing.
    """
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise UnsupportedModel("hidden_act", activation, "only the SiLU-gated MLP is implemented")
    if quantization := config.get("quantization_config"):
        raise UnsupportedModel("quantization_config", quantization, "the policy trains unquantised weights")
    for field, (neutral, reason) in NEUTRAL.items():
        value = config.get(field)
        everywhere = isinstance(value, list) and all(value)  # no_rope_layers names the layers that do rotate with 1
        if value is not None and value not in neutral and not everywhere:
            raise UnsupportedModel(field, value, reason)
    _check_qk_norm(config, qk_norm)
    sliding_window = config.get("sliding_window") if windowed else None
    _check_window(config, sliding_window)
    heads, hidden = positive_number(config, "num_attention_heads"), positive_number(config, "hidden_size")
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise UnsupportedModel("num_key_value_heads", kv_heads, f"it must divide num_attention_heads={heads}")
    theta, scaling = read_rope(config)
    return ModelSpec(
        family=str(config.get("model_type")),
        num_layers=positive_number(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=positive_number(config, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocab_size=positive_number(config, "vocab_size"),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=int(config.get("max_position_embeddings", 2048)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        sliding_window=sliding_window,
    )


def _check_qk_norm(config: Mapping[str, Any], qk_norm: bool) -> None:
    """Check that a configuration which mentions norms on query and key means what its family has."""
    kind = config.get("model_type")
    for field in _QK_NORM:
        if (value := config.get(field)) is not None and bool(value) != qk_norm:
            reason = (
                f"{kind} models always normalise each head's query and key, in transformers as here"
                if qk_norm
                else f"{kind} models have no norms on query and key, neither in transformers nor here"
            )
            raise UnsupportedModel(field, value, reason)


def _check_window(config: Mapping[str, Any], window: int | None) -> None:
    """Check that all layers have the same window."""
    if window is not None and (not isinstance(window, int) or window < 1):
        raise UnsupportedModel("sliding_window", window, "a positive number of tokens is needed, or null")
    expected = "full_attention" if window is None else "sliding_attention"
    for kind in config.get("layer_types") or ():
        if kind != expected:
            raise UnsupportedModel("layer_types", kind, f"every layer here has {expected}")


def positive_number(config: Mapping[str, Any], field: str) -> int:
    """Read a field of config.json that must be a whole number of 1 or more."""
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(field, value, "a positive whole number is needed")
    return value
