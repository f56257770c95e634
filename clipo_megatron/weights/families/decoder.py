"""The mapping rules of decoders like Llama; other families differ from them by a few rows."""

from __future__ import annotations

from clipo_megatron.weights.mapping import EMBEDDING, OUTPUT_LAYER, ChunkScope, Rule
from clipo_megatron.weights.sharding import QKV, GateUp, Replicated, RowParallel, Vocab
from clipo_megatron.weights.spec import ModelSpec

MEGATRON = "decoder.layers.{layer}."
HF = "model.layers.{layer}."


def decoder_rules(spec: ModelSpec) -> list[Rule]:
    """Make all rules of a decoder, with biases, q/k norms, experts and the output layer as the spec has them."""
    return [
        *embedding_rules(spec),
        *attention_rules(spec),
        *mlp_rules(spec),
        *(expert_rules(spec) if spec.experts else []),
        *output_rules(spec),
    ]


def embedding_rules(spec: ModelSpec) -> list[Rule]:
    table = {EMBEDDING: (spec.vocab_size, spec.hidden_size)}
    return [Rule("embedding.word_embeddings.weight", table, Vocab(), scope=ChunkScope.FIRST)]


def attention_rules(spec: ModelSpec) -> list[Rule]:
    """Make the rules of the input norm, the projections, and the biases and q/k norms if there are any."""
    hidden, query, kv = spec.hidden_size, spec.query_size, spec.kv_size
    attention, hf = MEGATRON + "self_attention.", HF + "self_attn."
    fused = {"q_proj": query, "k_proj": kv, "v_proj": kv}
    rules = [
        Rule(
            (MEGATRON + "input_layernorm.weight", attention + "linear_qkv.layer_norm_weight"),
            {HF + "input_layernorm.weight": (hidden,)},
            Replicated(),
        ),
        Rule(
            attention + "linear_qkv.weight",
            {f"{hf}{name}.weight": (rows, hidden) for name, rows in fused.items()},
            QKV(spec.num_kv_heads),
        ),
        Rule(attention + "linear_proj.weight", {hf + "o_proj.weight": (hidden, query)}, RowParallel()),
    ]
    if spec.qkv_bias:
        biases = {f"{hf}{name}.bias": (rows,) for name, rows in fused.items()}
        rules.append(Rule(attention + "linear_qkv.bias", biases, QKV(spec.num_kv_heads)))
    if spec.qk_norm:
        rules += [
            Rule(f"{attention}{x}_layernorm.weight", {f"{hf}{x}_norm.weight": (spec.head_dim,)}, Replicated())
            for x in ("q", "k")
        ]
    return rules


def mlp_rules(spec: ModelSpec) -> list[Rule]:
    """Make the rules of norm and gated MLP in layers without experts."""
    hidden, ffn = spec.hidden_size, spec.ffn_hidden_size

    def dense(layer: int) -> bool:
        return not spec.is_sparse(layer)

    return [
        Rule(
            (MEGATRON + "pre_mlp_layernorm.weight", MEGATRON + "mlp.linear_fc1.layer_norm_weight"),
            {HF + "post_attention_layernorm.weight": (hidden,)},
            Replicated(),
            layers=dense,
        ),
        Rule(
            MEGATRON + "mlp.linear_fc1.weight",
            {HF + "mlp.gate_proj.weight": (ffn, hidden), HF + "mlp.up_proj.weight": (ffn, hidden)},
            GateUp(),
            layers=dense,
        ),
        Rule(
            MEGATRON + "mlp.linear_fc2.weight",
            {HF + "mlp.down_proj.weight": (hidden, ffn)},
            RowParallel(),
            layers=dense,
        ),
    ]


def expert_rules(spec: ModelSpec) -> list[Rule]:
    """Make the rules of norm, router and gated MLPs in layers with experts.

    A checkpoint stacks the experts of a layer on a first axis.
    """
    hidden, count, ffn = spec.hidden_size, spec.experts.count, spec.experts.ffn_hidden_size
    here, key = MEGATRON + "mlp.experts.", MEGATRON + "mlp.experts.experts."
    expert = HF + "mlp.experts.{expert}."
    return [
        Rule(
            MEGATRON + "pre_mlp_layernorm.weight",
            {HF + "post_attention_layernorm.weight": (hidden,)},
            Replicated(),
            layers=spec.is_sparse,
        ),
        Rule(
            MEGATRON + "mlp.router.weight",
            {HF + "mlp.gate.weight": (count, hidden)},
            Replicated(),
            layers=spec.is_sparse,
        ),
        Rule(
            (here + "local_experts.{expert}.linear_fc1.weight", here + "linear_fc1.weight{expert}"),
            {expert + "gate_proj.weight": (ffn, hidden), expert + "up_proj.weight": (ffn, hidden)},
            GateUp(),
            key=key + "linear_fc1.weight",
            layers=spec.is_sparse,
            experts=count,
        ),
        Rule(
            (here + "local_experts.{expert}.linear_fc2.weight", here + "linear_fc2.weight{expert}"),
            {expert + "down_proj.weight": (hidden, ffn)},
            RowParallel(),
            key=key + "linear_fc2.weight",
            layers=spec.is_sparse,
            experts=count,
        ),
    ]


def output_rules(spec: ModelSpec) -> list[Rule]:
    """Make the rules of the final norm and the output layer, which is a copy of the embedding if they are tied."""
    name = EMBEDDING if spec.tied_embeddings else OUTPUT_LAYER
    table = {name: (spec.vocab_size, spec.hidden_size)}
    return [
        Rule(
            "decoder.final_layernorm.weight",
            {"model.norm.weight": (spec.hidden_size,)},
            Replicated(),
            scope=ChunkScope.LAST,
        ),
        Rule("output_layer.weight", table, Vocab(), scope=ChunkScope.LAST, copy=spec.tied_embeddings),
    ]
