"""Every dense family in the policy: logits equal to those of transformers in every layout, and an exact export.

Packed rows, with prompts apart and shared; sliding windows shorter than prompts, responses and both.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from policy_steps import configuration, train
from ranks import RankPool
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA3, tiny_llama, tiny_mistral, tiny_phi3, tiny_qwen2, tiny_qwen3
from torch import Tensor

from clipo_megatron.algorithms.hook import Signal
from clipo_megatron.config.schema import LayoutConfig, RunConfig
from clipo_megatron.flow import Sample
from clipo_megatron.policy import parallel
from clipo_megatron.policy.batch.packing import pack
from clipo_megatron.weights.formats.reader import SINGLE

VOCAB = 263  # odd: padded under tensor parallelism
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}


def rescaled(parameters: dict[str, Any], generation: int, folder: Path, **options: Any) -> Path:
    """A Llama with scaled rotary positions, as transformers 4 or 5 (`generation`) writes them in config.json."""
    tiny_llama(folder, **options)
    if generation == 5:
        return changed(folder, rope_parameters=parameters)
    scaling = dict(parameters)
    theta = scaling.pop("rope_theta")
    return changed(folder, rope_parameters=None, rope_theta=theta, rope_scaling=scaling)


def changed(folder: Path, **fields: Any) -> Path:
    file = folder / "config.json"
    config = {name: value for name, value in (json.loads(file.read_text()) | fields).items() if value is not None}
    file.write_text(json.dumps(config))
    return folder


FAMILIES: dict[str, Callable[..., Path]] = {
    "qwen2": partial(tiny_qwen2, tied=True),
    "qwen3": partial(tiny_qwen3, tied=False),
    "mistral": partial(tiny_mistral, tied=True, window=5),
    "mistral without a window": partial(tiny_mistral, tied=False, window=None),
    "phi3": partial(tiny_phi3, tied=False, window=7),
    "phi3 with one key head": partial(tiny_phi3, tied=True, kv_heads=1, window=None),
    "llama, linear rope": partial(rescaled, LINEAR, 5, tied=False, head_dim=24),
    "llama, linear rope of transformers 4": partial(rescaled, LINEAR, 4, tied=True),
    "llama, llama3 rope of transformers 4": partial(rescaled, LLAMA3, 4, tied=True),
}
LAYOUTS = {
    "one rank": (1, LayoutConfig()),
    "TP2 with sequence parallelism": (2, LayoutConfig(tp=2, sequence_parallel=True)),
    "PP2": (2, LayoutConfig(pp=2)),
    "TP4, more than key heads": (4, LayoutConfig(tp=4)),
    "CP2": (2, LayoutConfig(cp=2)),
}


def random_samples() -> list[Sample]:
    """Three groups of three: prompts of 1, 9 and 17 tokens; responses of 1 to 14."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for group, prompt_length in enumerate((1, 9, 17)):
        prompt = torch.randint(0, VOCAB, (prompt_length,), generator=generator)
        for length in (1 + group, 5, 14):
            response = torch.randint(0, VOCAB, (length,), generator=generator)
            result.append(Sample(len(result), group, prompt, response, torch.zeros(length)))
    return result


def stage_logits(folder: Path, layout_config: LayoutConfig) -> dict[str, Any]:
    """Run packed rows through the policy on a rank, and export it.

    "logits" has two tensors [tokens that predict or end a response, vocabulary] on the last stage: with prompts apart
    and with shared prompts.
    """
    from clipo_megatron.policy.actor import PolicyActor

    config = configuration(folder)
    config.layout = layout_config
    layout = parallel.initialize(config.layout, seed=0)
    actor = PolicyActor(config, layout, needs=frozenset({Signal.pooled_states}), total_steps=1)
    exported = {name: tensor.clone() for name, tensor in actor.export()}
    found = []
    for share in (False, True):
        micro = pack(random_samples(), share_prompts=share, multiple=layout.row_multiple)
        with torch.no_grad():
            hidden = whole_pipeline(actor, layout, micro)
        if hidden is not None:
            ends = micro.states[torch.bincount(micro.rollout).cumsum(0) - 1]
            found.append(full_logits(actor, layout, hidden[torch.cat([micro.predict, ends])]))
    return {"logits": found, "exported": exported}


def whole_pipeline(actor: Any, layout: parallel.Layout, micro: Any) -> Tensor | None:
    """Run one micro-batch through all stages; returns hidden states [T, H] on the last stage, None on others."""
    stage = actor.stage
    if layout.pp_rank > 0:
        width = actor.spec.hidden_size
        received = torch.empty(
            micro.tokens.numel() // layout.cp // (layout.tp if layout.sequence_parallel else 1), 1, width
        )
        dist.recv(received, group=layout.pp_group, group_src=layout.pp_rank - 1)
        stage.set_input_tensor(received)
    hidden = stage(micro)
    if layout.is_last_stage:
        return layout.share.gathered(hidden)
    dist.send(hidden.contiguous(), group=layout.pp_group, group_dst=layout.pp_rank + 1)
    return None


def full_logits(actor: Any, layout: parallel.Layout, hidden: Tensor) -> Tensor:
    stage = actor.stage
    tied = actor.spec.tied_embeddings
    mine = hidden @ (stage.shared_embedding_or_output_weight() if tied else stage.output_layer.weight).t()
    parts = [torch.empty_like(mine) for _ in range(layout.tp)]
    dist.all_gather(parts, mine.contiguous(), group=layout.tp_group)
    return torch.cat(parts, dim=-1)[:, :VOCAB]


def expected_logits(folder: Path) -> Tensor:
    """The logits of transformers, one sequence at a time, in the order of `stage_logits`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    predict, ends = [], []
    for sample in random_samples():
        with torch.no_grad():
            logits = model(torch.cat([sample.prompt, sample.response])[None]).logits[0]
        predict.append(logits[sample.prompt.numel() - 1 : -1])
        ends.append(logits[-1:])
    return torch.cat([*predict, *ends])


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference relative to the largest logit.

    An absolute one would be too strict: at logits of 7, transformers in fp32 is 2e-5 away from itself in fp64.
    """
    return float((ours - theirs).abs().max() / theirs.abs().max())


# Rotary positions are computed on every rank alike, so scaled ones are in `make test` on one rank and on most ranks.
IN_SHORT = {"one rank", "TP4, more than key heads"}


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param(
            family, layout, marks=pytest.mark.full if "rope" in family and layout not in IN_SHORT else (),
            id=f"{family}, {layout}",
        )
        for family in FAMILIES
        for layout in LAYOUTS
    ],
)  # fmt: skip
def test_logits_are_those_of_transformers_and_export_gives_the_bits(
    family: str, layout: str, ranks: RankPool, tmp_path: Path
) -> None:
    folder = FAMILIES[family](tmp_path, vocab=VOCAB)
    theirs, source = expected_logits(folder), load_file(folder / SINGLE)
    results = ranks.run(stage_logits, LAYOUTS[layout][0], folder, LAYOUTS[layout][1])
    answers = [result["logits"] for result in results if result["logits"]]
    assert len(answers) == len(results) // LAYOUTS[layout][1].pp
    for apart, shared in answers:
        assert distance(apart, theirs) < 1e-5
        assert distance(shared, theirs) < 1e-5
    for result in results:
        assert result["exported"].keys() == source.keys()
        assert [name for name, tensor in source.items() if not torch.equal(tensor, result["exported"][name])] == []


@pytest.mark.parametrize("family", [tiny_qwen2, tiny_qwen3, tiny_mistral, tiny_phi3])
def test_configurations_of_transformers_4(family: Callable[..., Path], ranks: RankPool, tmp_path: Path) -> None:
    folder = family(tmp_path, vocab=VOCAB)
    plain = expected_logits(folder)
    changed(folder, rope_parameters=None, rope_theta=500.0, dtype=None, torch_dtype="float32")
    theirs = expected_logits(folder)
    assert distance(plain, theirs) > 1e-3
    for logits in ranks.run(stage_logits, 1, folder, LayoutConfig())[0]["logits"]:
        assert distance(logits, theirs) < 1e-5


# --- the comparison is sharp -------------------------------------------------------------------------------------


def swapped(name: str, folder: Path) -> None:
    """Swap two parts of a fused tensor: its first rows, and as many rows after them."""
    tensors = load_file(folder / SINGLE)
    rows = 64 if "qkv" in name else 112  # four heads of 16; the inner size
    fused = tensors[name]
    tensors[name] = torch.cat([fused[rows : 2 * rows], fused[:rows], fused[2 * rows :]])
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def zeroed(name: str, folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, folder / SINGLE, {"format": "pt"})


LAYER = "model.layers.1."
MUTATIONS: dict[str, Callable[[Path], object]] = {
    "q and k swapped": partial(swapped, LAYER + "self_attn.qkv_proj.weight"),
    "gate and up swapped": partial(swapped, LAYER + "mlp.gate_up_proj.weight"),
    "norm zeroed": partial(zeroed, LAYER + "input_layernorm.weight"),
    "another theta": lambda folder: changed(folder, rope_parameters={"rope_type": "default", "rope_theta": 2e4}),
    "a window longer by one": lambda folder: changed(folder, sliding_window=8),
    "a window shorter by one": lambda folder: changed(folder, sliding_window=6),
    "no window": lambda folder: changed(folder, sliding_window=None),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_logits_notice(mutation: str, ranks: RankPool, tmp_path: Path) -> None:
    """The policy of a changed folder is far from transformers with the original, with prompts apart and shared."""
    folder = tiny_phi3(tmp_path, tied=False, kv_heads=4, vocab=VOCAB)
    theirs = expected_logits(folder)
    MUTATIONS[mutation](folder)
    apart, shared = ranks.run(stage_logits, 1, folder, LayoutConfig())[0]["logits"]
    assert distance(apart, theirs) > 1e-3
    assert distance(shared, theirs) > 1e-3


# --- training ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen3_on_one_rank(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, Any]]:
    config = configuration(tiny_qwen3(tmp_path_factory.mktemp("model"), tied=False, vocab=VOCAB))
    return config, ranks.run(train, 1, config, LayoutConfig())[0]


@pytest.mark.parametrize("layout", ["TP2 with sequence parallelism", "TP4, more than key heads"])
def test_norms_of_queries_and_keys_learn_the_same_in_every_layout(
    layout: str, qwen3_on_one_rank: tuple[RunConfig, dict[str, Any]], ranks: RankPool
) -> None:
    """Each rank has only some of the heads, so the gradients of these norms have to be summed over ranks."""
    config, alone = qwen3_on_one_rank
    results = ranks.run(train, LAYOUTS[layout][0], config, LAYOUTS[layout][1])
    norms = [name for name in alone["weights"] if "q_norm" in name or "k_norm" in name]
    assert len(norms) == 8
    for name, expected in alone["weights"].items():
        moved = float((expected - alone["weights_before"][name]).abs().max())
        assert moved > 1e-4, name
        for result in results:
            assert float((result["weights"][name] - expected).abs().max()) < 1e-3 * moved, name
