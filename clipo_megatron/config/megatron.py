"""The section `megatron`: which fields of Megatron's own configurations it may set, read from the installed release.

The classes are read as text, so that a configuration can be checked without torch and without running anything.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import util
from pathlib import Path
from typing import Any

# Class -> the file below megatron/core that defines it, and the class that it inherits fields from
_CLASSES = {
    "TransformerConfig": ("transformer/transformer_config.py", "ModelParallelConfig"),
    "ModelParallelConfig": ("model_parallel_config.py", None),
    "DistributedDataParallelConfig": ("distributed/distributed_data_parallel_config.py", None),
    "OptimizerConfig": ("optimizer/optimizer_config.py", None),
}
SECTIONS = ("TransformerConfig", "DistributedDataParallelConfig", "OptimizerConfig")
DTYPES = ("fp32", "bf16", "fp16", "fp8")  # how a torch.dtype is written


def _owners() -> dict[str, str]:
    owned = {
        "the model's config.json": """
            num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels activation_func
            normalization layernorm_epsilon layernorm_zero_centered_gamma gated_linear_unit add_bias_linear
            add_qkv_bias qk_layernorm qk_l2_norm window_size window_attn_skip_freq softmax_scale softmax_type
            rotary_interleaved multi_latent_attention no_rope_freq attention_output_gate
            experimental_attention_variant linear_attention_freq mtp_num_layers num_moe_experts moe_router_topk
            moe_ffn_hidden_size moe_layer_freq moe_router_pre_softmax moe_router_score_function
            moe_shared_expert_intermediate_size moe_latent_size apply_residual_connection_post_layernorm
            glu_linear_offset activation_func_clamp_value is_hybrid_model""",
        "layout.tp": "tensor_model_parallel_size",
        "layout.pp": """pipeline_model_parallel_size virtual_pipeline_model_parallel_size pipeline_model_parallel_layout
            account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split""",
        "layout.first_stage_layers": "num_layers_in_first_pipeline_stage",
        "layout.last_stage_layers": "num_layers_in_last_pipeline_stage",
        "layout.ep": "expert_model_parallel_size moe_extended_tp",
        "layout.etp": "expert_tensor_parallel_size",
        "layout.cp": """context_parallel_size hierarchical_context_parallel_sizes hybrid_context_parallel
            max_seqlen_per_dp_cp_rank cp_comm_type""",
        "layout.sequence_parallel": "sequence_parallel",
        "model.dtype": "bf16 fp16 params_dtype pipeline_dtype enable_autocast autocast_dtype fp32_residual_connection",
        "optimizer.learning_rate": "lr decoupled_lr",
        "optimizer.min_learning_rate": "min_lr decoupled_min_lr",
        "optimizer.weight_decay": "weight_decay decoupled_weight_decay",
        "optimizer.beta1": "adam_beta1",
        "optimizer.beta2": "adam_beta2",
        "optimizer.epsilon": "adam_eps",
        "optimizer.max_grad_norm": "clip_grad",
        "optimizer.overlap_grad_reduce": """overlap_grad_reduce align_param_gather
            overlap_param_gather_with_optimizer_step""",
        "the optimizer, which is AdamW in shards": """optimizer use_distributed_optimizer sgd_momentum loss_scale
            initial_loss_scale min_loss_scale loss_scale_window hysteresis""",
        "the losses, which are sums over the tokens of all ranks": """calculate_per_token_loss average_in_collective
            grad_reduce_in_fp32 gradient_reduce_div_fusion cross_entropy_loss_fusion cross_entropy_fusion_impl
            mtp_loss_scaling_factor moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff""",
        "on-policy training, whose log-probs must not be noisy": """hidden_dropout attention_dropout
            moe_input_jitter_eps moe_token_dropping moe_expert_capacity_factor moe_pad_expert_input_to_capacity
            moe_token_drop_policy moe_router_force_load_balancing moe_router_enable_expert_bias""",
        "the exchange of weights with folders and servers, in model.dtype": """fp8_param fp4_param fp8_param_gather
            reuse_grad_buf_for_mxfp8_param_ag keep_fp8_transpose_cache""",
        "checkpoints, which are written from shards over all replicas": """num_distributed_optimizer_instances
            use_megatron_fsdp use_custom_fsdp data_parallel_sharding_strategy outer_dp_sharding_strategy
            init_model_with_meta_device""",
        "checkpoints, which hold masters and moments in fp32 from the optimizer's own device": """
            use_precision_aware_optimizer store_param_remainders main_grads_dtype main_params_dtype exp_avg_dtype
            exp_avg_sq_dtype optimizer_cpu_offload optimizer_offload_fraction use_torch_optimizer_for_cpu_offload
            overlap_cpu_optimizer_d2h_h2d pin_cpu_grads pin_cpu_params""",
        "packed rows, each of which has another number of tokens": " ".join(
            (
                "variable_seq_lengths",
                "enable_cuda_graph",
                "external_cuda_graph",
                "cuda_graph_impl",
                "cuda_graph_scope",
                "tp_comm_overlap",
            )
        ),
        "the policy's own forward pass": """overlap_moe_expert_parallel_comm delay_wgrad_compute
            defer_embedding_wgrad_compute num_microbatches_with_partial_activation_checkpoints flash_decode
            use_inference_optimized_layers inference_fuse_tp_communication use_kitchen use_kitchen_attention""",
        "the layers in use": "moe_grouped_gemm moe_use_legacy_grouped_gemm moe_router_dtype",
        "loaded weights": "perform_initialization use_cpu_initialization init_method_std embedding_init_method_std",
    }  # fmt: skip
    return {name: owner for owner, names in owned.items() for name in names.split()}


# Field -> what decides it, so that the section must not
OWNED: Mapping[str, str] = _owners()


@dataclass(frozen=True, slots=True)
class MegatronField:
    """A field of one of Megatron's configurations."""

    name: str
    section: str  # the class
    annotation: str  # as the source has it

    @property
    def words(self) -> str:
        """What its values are: "true or false", "one of none, local, or null"; "" if a file cannot say them."""
        return _words(ast.parse(self.annotation, mode="eval").body)

    def takes(self, value: Any) -> bool:
        """Whether a value of a configuration file is of the field's type."""
        return _takes(ast.parse(self.annotation, mode="eval").body, value)


@cache
def fields() -> dict[str, MegatronField] | None:
    """The fields of all sections of the installed release, by name; None where there is none.

    Some names are in two sections and mean the same in both.
    """
    folder = _folder()
    if folder is None:
        return None
    return {each.name: each for section in reversed(SECTIONS) for each in _fields_of(folder, section)}


def _folder() -> Path | None:
    """The folder megatron/core of the installed release, found without importing it; None where there is none."""
    found = util.find_spec("megatron")  # a namespace, which runs no code
    places = [Path(each) / "core" for each in (found.submodule_search_locations or ())] if found else []
    return next((each for each in places if (each / _CLASSES["TransformerConfig"][0]).is_file()), None)


def _fields_of(folder: Path, section: str) -> list[MegatronField]:
    file, parent = _CLASSES[section]
    inherited = _fields_of(folder, parent) if parent else []
    (body,) = (
        node.body
        for node in ast.parse((folder / file).read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == section
    )
    own = [
        MegatronField(node.target.id, section, ast.unparse(node.annotation))
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_"
    ]
    return inherited + own


def _alternatives(node: ast.expr) -> list[ast.expr]:
    """The types that an annotation allows: [X, None] for Optional[X]."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _alternatives(node.left) + _alternatives(node.right)
    if isinstance(node, ast.Subscript) and _name(node.value) in ("Optional", "Union"):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        none = [ast.Constant(None)] if _name(node.value) == "Optional" else []
        return [each for part in inner for each in _alternatives(part)] + none
    return [node]


def _name(node: ast.expr) -> str:
    """The last part of a name: "dtype" for torch.dtype."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


_PLAIN: dict[str, tuple[type, str]] = {
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "str": (str, "text"),
}


def _takes(annotation: ast.expr, value: Any) -> bool:
    return any(_takes_one(each, value) for each in _alternatives(annotation))


def _takes_one(node: ast.expr, value: Any) -> bool:
    if isinstance(node, ast.Constant):
        return value is None and node.value is None
    if isinstance(node, ast.Subscript):
        kind, inner = _name(node.value), node.slice
        if kind == "Literal":
            return value in [each.value for each in (inner.elts if isinstance(inner, ast.Tuple) else [inner])]
        if kind in ("list", "List"):
            return isinstance(value, list) and all(_takes(inner, each) for each in value)
        if kind in ("tuple", "Tuple"):
            kinds = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return isinstance(value, list) and len(value) == len(kinds) and all(map(_takes, kinds, value))
        return False
    name = _name(node)
    if name in _PLAIN:
        if isinstance(value, bool):
            return name == "bool"
        return isinstance(value, _PLAIN[name][0]) or (name == "float" and isinstance(value, int))
    if name == "dtype":
        return value in DTYPES
    return name.endswith(("Backend", "Scope")) and isinstance(value, str)  # an enum, by the name of its member


def _words(annotation: ast.expr) -> str:
    found = list(dict.fromkeys(filter(None, map(_words_of_one, _alternatives(annotation)))))
    return "" if found in ([], ["null"]) else ", or ".join(found)


def _words_of_one(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return "null"
    if isinstance(node, ast.Subscript):
        kind, inner = _name(node.value), node.slice
        parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        if kind == "Literal":
            return "one of " + ", ".join(str(each.value) for each in parts)
        words = " and ".join(filter(None, map(_words, parts)))
        return f"a list of {words}" if kind in ("list", "List", "tuple", "Tuple") and words else ""
    name = _name(node)
    if name == "dtype":
        return "one of " + ", ".join(DTYPES)
    return _PLAIN[name][1] if name in _PLAIN else "a name" if name.endswith(("Backend", "Scope")) else ""
