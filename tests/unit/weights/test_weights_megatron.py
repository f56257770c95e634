"""The mapping against megatron-core itself: names and shapes on every rank, and the logits of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_model import VOCAB, megatron_model
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA3, tiny_llama, tiny_qwen2
from torch import Tensor
from transformers import AutoModelForCausalLM

from clipo_megatron.weights.coverage import match
from clipo_megatron.weights.families import entries, model_spec
from clipo_megatron.weights.formats.reader import SINGLE, HFReader
from clipo_megatron.weights.load import load_into
from clipo_megatron.weights.mapping import Coordinates, even_stages
from clipo_megatron.weights.spec import read_config


@pytest.fixture(autouse=True)
def stay_on_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)  # Megatron moves a tied output layer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2), (1, 4)])
@pytest.mark.parametrize("family", [tiny_llama, tiny_qwen2])
def test_names_and_shapes_on_every_rank(
    family: Callable[..., Path], tp: int, pp: int, tied: bool, tmp_path: Path
) -> None:
    sizes = {"head_dim": 24} if family is tiny_llama else {}
    spec = model_spec(read_config(family(tmp_path, tied=tied, vocab=VOCAB, **sizes)))
    for rank in range(tp * pp):
        bound = entries(spec, even_stages(spec.num_layers, pp)[rank // tp])
        with megatron_model(spec, tp, pp, rank) as built:
            parameters = dict(built.named_parameters())
            assert len(match(parameters, bound, Coordinates(tp=tp))) == len(parameters)


def logits(folder: Path, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Compute Megatron's logits and those of transformers, [B, T, VOCAB] float32."""
    spec = model_spec(read_config(folder))
    with megatron_model(spec, 1, 1, 0) as built, HFReader(folder) as reader, torch.no_grad():
        stage = even_stages(spec.num_layers, 1)[0]
        load_into(built.named_parameters(), entries(spec, stage), reader, Coordinates())
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        later = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        ours = built.eval()(tokens, positions, later[None, None])
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits
    return ours[..., :VOCAB], theirs


def error(folder: Path, tokens: Tensor) -> float:
    """Return the largest difference relative to the largest logit; fp32 itself is 2e-5 from fp64 at logits of 7."""
    ours, theirs = logits(folder, tokens)
    return float((ours - theirs).abs().max() / theirs.abs().max())


TOKENS = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_llama(tied: bool, tmp_path: Path) -> None:
    assert error(tiny_llama(tmp_path, tied=tied, vocab=VOCAB, head_dim=24), TOKENS) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_qwen2(tied: bool, tmp_path: Path) -> None:
    assert error(tiny_qwen2(tmp_path, tied=tied, vocab=VOCAB), TOKENS) < 1e-5


@pytest.mark.parametrize("generation", [4, 5])
def test_logits_with_scaled_rope(generation: int, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, vocab=VOCAB)
    if generation == 5:
        change_config(folder, rope_parameters=LLAMA3)
    else:
        scaling = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
        change_config(folder, rope_parameters=None, rope_scaling=scaling, rope_theta=500.0)
    assert error(folder, TOKENS) < 1e-5


def swap(first: str, second: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        prefix = "model.layers.1."
        a, b = prefix + first, prefix + second
        tensors[a], tensors[b] = tensors[b], tensors[a]

    return change


def replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    name = "model.layers.1." + name
    return lambda tensors: tensors.update({name: change(tensors[name])})


MUTATIONS: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "q and k swapped": swap("self_attn.q_proj.weight", "self_attn.k_proj.weight"),
    "k and v swapped": swap("self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "gate and up swapped": swap("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "norms swapped": swap("input_layernorm.weight", "post_attention_layernorm.weight"),
    "norm zeroed": replace("input_layernorm.weight", torch.zeros_like),
    "heads reversed": replace("self_attn.o_proj.weight", lambda weight: weight.flip(1)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_logits_notice(mutation: str, tmp_path: Path) -> None:
    """The comparison above notices faults: with a mutated folder Megatron is far from transformers."""
    sizes = {"heads": 4, "kv_heads": 4, "vocab": VOCAB, "seed": 3}
    true, wrong = tiny_llama(tmp_path / "true", **sizes), tiny_llama(tmp_path / "wrong", **sizes)
    tensors = load_file(wrong / SINGLE)
    MUTATIONS[mutation](tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, wrong / SINGLE, {"format": "pt"})
    ours, theirs = logits(wrong, TOKENS)[0], logits(true, TOKENS)[1]
    assert float((ours - theirs).abs().max()) > 1e-2


def test_the_logits_notice_a_wrong_theta(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, vocab=VOCAB)
    theirs = logits(folder, TOKENS)[1]
    change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 20000.0})
    assert float((logits(folder, TOKENS)[0] - theirs).abs().max()) > 1e-2
