"""Parts of the weight sync without a server: senders, checksums, which server is blamed, turns of colocated servers."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from ranks import RankPool
from safetensors.torch import load_file
from sync_steps import own_against_export
from tiny_models import tiny_llama, tiny_phi3, tiny_qwen2, tiny_qwen3, tiny_qwen3_moe

from clipo_megatron.rollout.engine import Memory
from clipo_megatron.rollout.servers.server import Fault, LiveServer, RankChecksums, ServerError, ServerState
from clipo_megatron.sync import checksums
from clipo_megatron.sync.attempt import Attempt, UpdateDeadlines, UpdateFailed
from clipo_megatron.sync.checksums import ChecksumError, ChecksumKind, Sums, compare, digest, tile_hash
from clipo_megatron.sync.colocation import Colocation, WrongTurn
from clipo_megatron.sync.shard import send_order
from clipo_megatron.weights.export import Bucket, plan_export
from clipo_megatron.weights.families import entries, model_spec
from clipo_megatron.weights.mapping import even_stages
from clipo_megatron.weights.parallel_division import ParallelDivision
from clipo_megatron.weights.spec import read_config


@pytest.mark.parametrize("tp, pp", [(1, 2), (2, 2), (2, 1)])
def test_each_tensor_is_sent_by_one_rank(tp, pp, ranks: RankPool, tmp_path: Path):
    folder = tiny_llama(tmp_path / "model", tied=True, vocab=263)
    results = ranks.run(own_against_export, tp * pp, str(folder), tp, pp)
    sent = sum((Counter(each) for each in results), Counter())
    assert sent == Counter(load_file(folder / "model.safetensors").keys()), "a tied output layer is not sent twice"
    assert [bool(each) for each in results] == [rank % tp == 0 for rank in range(tp * pp)]


@pytest.mark.parametrize("tp, pp, ep, world", [(1, 1, 2, 2), (1, 2, 2, 4), (2, 1, 2, 2), (1, 1, 2, 4)])
def test_each_expert_is_sent_by_one_rank_of_those_that_have_it(tp, pp, ep, world, ranks: RankPool, tmp_path: Path):
    folder = tiny_qwen3_moe(tmp_path / "model", dense_layers=(1,), vocab=263)
    results = ranks.run(own_against_export, world, str(folder), tp, pp, ep)
    sent = sum((Counter(each) for each in results), Counter())
    assert sent == Counter(load_file(folder / "model.safetensors").keys())
    width = world // pp
    assert [bool(each) for each in results] == [rank % width < ep for rank in range(world)]
    for rank, each in enumerate(results):
        others = {name for name in each if ".experts." not in name}
        assert bool(others) == (rank % width == 0), "what is no expert's leaves from the first rank"


def test_stages_alternate(tmp_path: Path):
    spec = model_spec(read_config(tiny_llama(tmp_path / "model")))
    plan = plan_export(spec, ParallelDivision(pp=2), dtype=torch.float32, bucket_bytes=32 * 1024)
    order = send_order(plan)
    assert sorted(map(id, order)) == sorted(map(id, plan.buckets))
    for owner in (0, 1):
        assert [each for each in order if each.owner == owner] == [each for each in plan.buckets if each.owner == owner]
    assert [each.owner for each in order[:4]] == [0, 1, 0, 1]


# --- checksums -------------------------------------------------------------------------------------------------------


def reference_tile_hash(data: bytes, seed: int = 0x243F6A88) -> str:
    """The same formula, one word at a time, with Python integers."""
    data += bytes(-len(data) % 4)
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
    if not words:
        return "0" * 16

    def mix(x: int) -> int:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ x >> shift) * factor % 2**32
        return x ^ x >> 16

    def turned(x: int, by: int) -> int:
        return (x << by | x >> (32 - by)) % 2**32

    seeds = (seed % 2**32, (seed * 0x9E3779B1 ^ 0xDEADBEEF) % 2**32)
    total = 0
    for start in range(0, len(words), 8192):
        sums = [0, 0]
        for i, word in enumerate(words[start : start + 8192], start):
            for half, (factor, by) in enumerate(((0x27D4EB2D, 15), (0x165667B1, 13))):
                salt = (i * factor + seeds[half]) % 2**32 ^ turned(i, by)
                sums[half] += mix(word ^ salt)
        high, low = (mix(each % 2**32 ^ 4 * len(words) % 2**32) for each in sums)
        total += high * 2**32 + low
    x = total % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> shift) * factor % 2**64
    return f"{x ^ x >> 31:016x}"


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4097, 16384, 20001])
def test_the_hash_of_gpus_is_the_formula(count, monkeypatch):
    monkeypatch.setattr(checksums, "_AT_ONCE", 8192)  # else these are all hashed at once
    tensor = torch.randn(count).to(torch.bfloat16)
    expected = reference_tile_hash(tensor.view(torch.uint8).numpy().tobytes())
    assert tile_hash([tensor]) == expected
    assert tile_hash([tensor[: count // 2], tensor[count // 2 :]]) == expected
    if count:
        other = tensor.clone()
        other.view(torch.uint8)[random.Random(0).randrange(2 * count)] ^= 1
        assert tile_hash([other]) != expected


def test_digest_of_parts_is_that_of_the_whole():
    tensor = torch.randn(300, 40)
    expected = hashlib.sha256(tensor[:, 10:20].contiguous().numpy().tobytes()).hexdigest()[:16]
    assert digest([tensor[:, 10:20]]) == expected == digest([tensor[:7, 10:20], tensor[7:, 10:20].contiguous()])


def sums_of(folder: Path, sizes: list[int], kind: ChecksumKind = "plain") -> tuple[Sums, dict[str, torch.Tensor]]:
    """The checksums of a folder's tensors in fp32, all in one bucket."""
    spec = model_spec(read_config(folder))
    weights = load_file(folder / "model.safetensors")
    bucket = Bucket(0, 0, tuple(each for each in entries(spec, even_stages(spec.num_layers, 1)[0]) if not each.copy))
    sums = Sums(spec, sizes, kind)
    sums.add(bucket, torch.cat([weights[tensor.name].flatten() for tensor in bucket.tensors]))
    return sums, weights


def sha(*parts: torch.Tensor) -> str:
    return hashlib.sha256(torch.cat(parts).contiguous().numpy().tobytes()).hexdigest()[:16]


def test_what_ranks_of_a_server_hold(tmp_path: Path):
    sums, weights = sums_of(tiny_qwen2(tmp_path / "model", tied=False, vocab=263, kv_heads=2), [1, 2, 4])
    layer = "model.layers.1."
    q, k, v = (weights[f"{layer}self_attn.{x}_proj.bias"] for x in "qkv")
    gate, up = (weights[f"{layer}mlp.{x}_proj.weight"] for x in ("gate", "up"))
    down, head = weights[f"{layer}mlp.down_proj.weight"], weights["lm_head.weight"]
    assert sums.held[0, 1][f"{layer}self_attn.qkv_proj.bias"] == sha(q, k, v)
    assert sums.held[1, 2][f"{layer}self_attn.qkv_proj.bias"] == sha(q[32:], k[16:], v[16:])
    # four ranks and two KV heads: the ranks 2 and 3 both hold the second one
    assert sums.held[2, 4][f"{layer}self_attn.qkv_proj.bias"] == sha(q[32:48], k[16:], v[16:])
    assert sums.held[3, 4][f"{layer}self_attn.qkv_proj.bias"] == sha(q[48:], k[16:], v[16:])
    assert sums.held[1, 2][f"{layer}mlp.gate_up_proj.weight"] == sha(gate[56:], up[56:])
    assert sums.held[1, 2][f"{layer}mlp.down_proj.weight"] == sha(down[:, 56:])
    # 263 rows padded to 320
    assert sums.held[0, 1]["lm_head.weight"] == sha(head, torch.zeros(57, 64))
    assert sums.held[1, 2]["lm_head.weight"] == sha(head[160:], torch.zeros(57, 64))
    assert sums.held[3, 4]["lm_head.weight"] == sha(head[240:], torch.zeros(57, 64))
    assert (
        sums.held[0, 4]["model.norm.weight"]
        == sha(weights["model.norm.weight"])
        == sums.held[0, 1]["model.norm.weight"]
    )


def test_tensors_that_are_fused_already(tmp_path: Path):
    sums, weights = sums_of(tiny_phi3(tmp_path / "model", kv_heads=2), [1, 2], "sglang on a cpu")
    layer = "model.layers.1."
    qkv, gate_up = (weights[f"{layer}{name}.weight"] for name in ("self_attn.qkv_proj", "mlp.gate_up_proj"))
    (q, k, v), (gate, up), zeros = qkv.split([64, 32, 32]), gate_up.chunk(2), torch.zeros(16, 64)
    assert sums.held[0, 1][f"{layer}self_attn.qkv_proj.weight"] == sha(qkv)
    assert sums.held[1, 2][f"{layer}self_attn.qkv_proj.weight"] == sha(q[32:], k[16:], v[16:])
    assert sums.held[0, 1][f"{layer}mlp.gate_up_proj.weight"] == sha(gate, zeros, up, zeros)


def test_norms_of_queries_and_keys_are_the_same_on_every_rank(tmp_path: Path):
    sums, weights = sums_of(tiny_qwen3(tmp_path / "model"), [1, 2])
    for name in ("model.layers.3.self_attn.q_norm.weight", "model.layers.0.self_attn.k_norm.weight"):
        assert sums.held[0, 1][name] == sums.held[1, 2][name] == sha(weights[name])
    assert sums.held[0, 1].keys() - {"lm_head.weight"} == {
        name.replace("q_proj", "qkv_proj").replace("gate_proj", "gate_up_proj")
        for name in weights
        if not name.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight"))
    }


def test_all_but_the_experts_of_a_mixture_can_be_compared(tmp_path: Path):
    sums, weights = sums_of(tiny_qwen3_moe(tmp_path / "model", dense_layers=(1,)), [1])
    held = sums.held[0, 1]
    assert held["model.layers.0.mlp.gate.weight"] == sha(weights["model.layers.0.mlp.gate.weight"])
    assert [name for name in held if "gate_up" in name] == ["model.layers.1.mlp.gate_up_proj.weight"]
    assert not any("experts" in name for name in held)


def test_the_mlp_is_padded_on_a_cpu(tmp_path: Path):
    sums, weights = sums_of(tiny_llama(tmp_path / "model"), [1, 2], "sglang on a cpu")
    gate, up, down = (weights[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up", "down"))
    zeros = torch.zeros(16, 64)
    # 112 inner features become 128
    assert sums.held[0, 1]["model.layers.0.mlp.gate_up_proj.weight"] == sha(gate, zeros, up, zeros)
    assert sums.held[1, 2]["model.layers.0.mlp.gate_up_proj.weight"] == sha(gate[64:], zeros, up[64:], zeros)
    padded = torch.cat((down, torch.zeros(64, 16)), dim=1)
    assert sums.held[0, 1]["model.layers.0.mlp.down_proj.weight"] == sha(padded)
    assert sums.held[1, 2]["model.layers.0.mlp.down_proj.weight"] == sha(padded[:, 64:])


def test_comparison(tmp_path: Path):
    sums, _ = sums_of(tiny_llama(tmp_path / "model", tied=True), [2])
    ranks = [RankChecksums(rank, 2, dict(sums.held[rank, 2])) for rank in range(2)]
    assert compare("http://a", ranks, sums) == []
    for rank in ranks:
        del rank.checksums["lm_head.weight"]  # a tied one need not be there
    assert compare("http://a", ranks, sums) == []
    ranks[1].checksums["model.some_cache"] = "0" * 16
    for rank in ranks:
        del rank.checksums["model.norm.weight"]
    unverified = compare("http://a", ranks, sums)
    assert (
        len(unverified) == 2
        and "model.some_cache of http://a" in unverified[0]
        and "model.norm.weight" in unverified[1]
    )
    name = "model.layers.0.mlp.down_proj.weight"
    mine, ranks[1].checksums[name] = ranks[1].checksums[name], "f" * 16
    with pytest.raises(ChecksumError, match=f"http://a, rank 1 of 2: {name} has checksum f*, the trainer's has {mine}"):
        compare("http://a", ranks, sums)


# --- blame -----------------------------------------------------------------------------------------------------------


class Named:
    def __init__(self, url: str):
        self.url = url


@pytest.mark.parametrize(
    "faults, blamed",
    [
        ({"a": (Fault.status, 0.0), "b": (Fault.refused, 0.05)}, {"b"}),  # the silent one, though it came later
        ({"a": (Fault.status, 0.0), "b": (Fault.status, 0.05)}, {"a"}),  # nobody is silent: the first
        ({"a": (Fault.deadline, 0.0), "b": (Fault.garbage, 0.05)}, {"a", "b"}),
        ({"a": (Fault.status, 0.0)}, {"a"}),
    ],
)
def test_who_is_to_blame_in_a_group(faults, blamed):
    servers = [LiveServer(Named(url), ServerState("m", 1, 0, "", "x")) for url in ("a", "b", "c")]
    heard = []
    attempt = Attempt(servers, UpdateDeadlines(10.0), lambda: heard.append(attempt.failed))

    async def call(target: LiveServer) -> str:
        if target.url in faults:
            fault, after = faults[target.url]
            await asyncio.sleep(after)
            raise ServerError(target.url, fault, "planted")
        return "fine"

    with pytest.raises(UpdateFailed) as raised:
        asyncio.run(attempt.each("buckets", call, grouped=True))
    assert set(raised.value.blamed) == blamed and heard == [True] * len(faults)
    assert raised.value.answers == {url: "fine" for url in ("a", "b", "c") if url not in faults}
    with pytest.raises(UpdateFailed) as raised:
        asyncio.run(attempt.each("pause", call))
    assert set(raised.value.blamed) == set(faults)


# --- colocated servers -----------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self):
        self.calls: list[tuple] = []

    def offload(self, *what: Memory) -> None:
        self.calls.append(("offload", *what))

    def onload(self, *what: Memory) -> None:
        self.calls.append(("onload", *what))


def test_turns_of_colocated_servers():
    engine = Recorder()
    turns = Colocation(engine)
    for _ in range(2):
        turns.before_training()
        turns.before_update()
        turns.after_update()
    assert engine.calls == 2 * [
        ("offload", Memory.kv_cache, Memory.weights), ("onload", Memory.weights), ("onload", Memory.kv_cache),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "before, wrong",
    [
        ("", "before_update"),
        ("", "after_update"),
        ("before_training", "before_training"),
        ("before_training", "after_update"),
        ("before_training before_update", "before_update"),
        ("before_training before_update", "before_training"),
    ],
)
def test_wrong_turns_are_refused(before, wrong):
    engine = Recorder()
    turns = Colocation(engine)
    for step in before.split():
        getattr(turns, step)()
    done = list(engine.calls)
    with pytest.raises(WrongTurn, match=wrong):
        getattr(turns, wrong)()
    assert engine.calls == done
