"""The prompt cascade is the attention of each segment to its context and itself, in values and in gradients.

The oracle is written out: scores of all tokens with all tokens in float64, a mask, a softmax, and autograd.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.gpt import gpt_layer_specs
from packaging.version import Version
from torch import Tensor

from clipo_megatron.flow import Segment
from clipo_megatron.policy.model import attention, attention_kernels, model
from clipo_megatron.policy.model.attention import PackedAttention, attention_of, plan_attention
from clipo_megatron.policy.model.attention_kernels import Sequences, add_gradients, attend
from clipo_megatron.policy.row_share import RowShare

CPU = torch.device("cpu")
HEADS, KV_HEADS, DIM = 6, 2, 16

# the length of each group's prompt, and of its responses
ROWS = {
    "one group": [(13, [7, 30, 1])],
    "several groups": [(13, [7, 30, 1]), (5, [22]), (40, [3, 9, 17, 64])],
    "prompts of one token": [(1, [1]), (1, [2, 1])],
    "64 responses": [(9, [1 + number % 5 for number in range(64)])],
    "longer than a block of masks": [(300, [3, 270])],
}


def segments_of(groups: list[tuple[int, list[int]]], *, shared: bool, padding: int = 0) -> list[Segment]:
    found, end, starts = [], 0, []
    for prompt, responses in groups:
        starts.append(end)
        pieces = [prompt] if shared else [prompt + response for response in responses]
        for length in pieces:
            found.append(Segment(end, length))
            end += length
    if shared:
        for start, (prompt, responses) in zip(starts, groups, strict=True):
            for length in responses:
                found.append(Segment(end, length, start, prompt))
                end += length
    return [*found, Segment(end, padding)] if padding else found


def draw(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(tokens, heads, DIM, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def oracle(query: Tensor, key: Tensor, value: Tensor, segments: list[Segment], window: int | None) -> Tensor:
    sees = torch.zeros(query.shape[0], query.shape[0], dtype=torch.bool)
    for each in segments:
        context = torch.arange(each.context_start, each.context_start + each.context_length)
        for place in range(each.length):
            keys = torch.cat([context, torch.arange(each.start, each.start + place + 1)])
            sees[each.start + place, keys if window is None else keys[-window:]] = True
    key, value = (each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / DIM**0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, -torch.inf).softmax(-1), value)


def cascade(rows: list[Tensor], segments: list[Segment], window: int | None) -> Tensor:
    return attention_of(*rows, plan_attention(segments, CPU, window), DIM**-0.5)


def compare(segments: list[Segment], window: int | None, dtype: torch.dtype, tolerance: float) -> None:
    rows = draw(sum(each.length for each in segments), dtype)
    grad = torch.randn_like(rows[0])
    exact = [each.double().requires_grad_() for each in rows]
    given = [each.requires_grad_() for each in rows]
    wanted, found = oracle(*exact, segments, window), cascade(given, segments, window)
    pairs = [(found, wanted)]
    pairs += zip(
        torch.autograd.grad(found, given, grad), torch.autograd.grad(wanted, exact, grad.double()), strict=True
    )
    for ours, theirs in pairs:
        assert (ours.double() - theirs).abs().max() <= tolerance * max(theirs.abs().max(), 0.01)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ROWS)
def test_it_is_the_attention_written_out(name, shared, dtype, tolerance):
    compare(segments_of(ROWS[name], shared=shared, padding=3), None, dtype, tolerance)


@pytest.mark.parametrize("window", [1, 9, 31, 500])
@pytest.mark.parametrize("name", ["several groups", "longer than a block of masks"])
def test_a_window_ends_within_the_prompt_or_the_response(name, window):
    compare(segments_of(ROWS[name], shared=True), window, torch.float64, 1e-12)
    compare(segments_of(ROWS[name], shared=False), window, torch.float64, 1e-12)


def test_bf16_is_as_near_to_the_truth_as_rounding_allows():
    compare(segments_of(ROWS["several groups"], shared=True), None, torch.bfloat16, 2e-2)


class Together(RowShare):
    """The share of one rank to which the test passes whole rows of keys, in place of the other ranks."""

    def gathered(self, part):
        return part

    def scattered(self, row):
        return row


@pytest.mark.parametrize("window", [None, 9, 40])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("shared", [True, False])
def test_ranks_compute_their_chunks_of_a_row(shared, size, window):
    """Outputs and gradients of queries are parts of the whole; those of keys and values add up to the whole."""
    groups = ROWS["several groups"]
    bare = sum(each.length for each in segments_of(groups, shared=shared))
    segments = segments_of(groups, shared=shared, padding=-bare % (2 * size) + 2 * size)
    rows = [each.requires_grad_() for each in draw(segments[-1].start + segments[-1].length, torch.float64)]
    grad = torch.randn_like(rows[0])
    wanted = oracle(*rows, segments, window)
    of_whole = torch.autograd.grad(wanted, rows, grad)
    totals = [torch.zeros_like(each) for each in rows[1:]]
    for rank in range(size):
        share = Together(rank, size)
        query, *others = [each.detach().requires_grad_() for each in (share.take(rows[0]), *rows[1:])]
        plan = plan_attention(segments, CPU, window, share)
        found = attention_of(query, *others, plan, DIM**-0.5)
        assert (found - share.take(wanted)).abs().max() < 1e-12
        found.backward(share.take(grad))
        assert (query.grad - share.take(of_whole[0])).abs().max() < 1e-12
        for total, part in zip(totals, others, strict=True):
            total += part.grad
    for total, theirs in zip(totals, of_whole[1:], strict=True):
        assert (total - theirs).abs().max() < 1e-12


def test_a_row_in_another_order_is_refused():
    with pytest.raises(ValueError, match="neighbours"):
        plan_attention([Segment(0, 2), Segment(2, 1, 0, 2), Segment(3, 2), Segment(5, 1, 3, 2)], CPU)
    with pytest.raises(ValueError, match="in the order of their readers"):
        plan_attention([Segment(0, 2), Segment(2, 3), Segment(5, 1, 2, 3), Segment(6, 1, 0, 2)], CPU)


def test_no_key_is_copied_and_masks_only_keep_short_sequences_apart(monkeypatch):
    """Without a window every call takes views of the row, whatever the lengths."""
    calls = []

    def watched(query, key, *rest, **options):
        calls.append((key.untyped_storage().data_ptr(), options["attn_mask"]))
        return attend_on_cpu(query, key, *rest, **options)

    attend_on_cpu = attention_kernels._forward_on_cpu
    monkeypatch.setattr(attention_kernels, "_forward_on_cpu", watched)
    segments = segments_of(ROWS["several groups"], shared=True)
    rows = draw(sum(each.length for each in segments), torch.float32)
    cascade(rows, segments, None)
    assert {place for place, _ in calls} == {rows[1].untyped_storage().data_ptr()}
    masks = [mask for _, mask in calls if mask is not None]
    assert len(masks) == 4 and all(max(mask.shape) <= 64 for mask in masks)
    assert len(calls) == 6, "short sequences share a call"


# ---------------------------------------------------------------- the calls of a GPU

OPTIONS = {"scale": 0.25, "window_size_left": None, "window_size_right": None}


def flash_forward(query, key, value, query_ends, key_ends, most_queries, most_keys, dropout, causal, debug, **options):
    """What torch's flash kernel computes for sequences of variable length, causal at the lower right."""
    assert (dropout, debug) == (0.0, False)
    output, sums = torch.zeros_like(query), torch.full((query.shape[1], query.shape[0]), -torch.inf, dtype=query.dtype)
    for (start, end), (first, last) in zip(pairwise(query_ends.tolist()), pairwise(key_ends.tolist()), strict=True):
        assert end - start <= most_queries and last - first <= most_keys
        scores = scores_of(query[start:end], key[first:last], causal, options)
        sums[:, start:end] = scores.logsumexp(-1)
        shared = value[first:last].repeat_interleave(HEADS // KV_HEADS, 1)
        output[start:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), shared)
    return output, sums, None, None, None


def flash_backward(grad, query, key, value, output, sums, query_ends, key_ends, *rest, **options):
    """What its backward computes from an output and a log-sum-exp, whatever they are of."""
    causal, found = rest[3], [torch.zeros_like(each) for each in (query, key, value)]
    for (start, end), (first, last) in zip(pairwise(query_ends.tolist()), pairwise(key_ends.tolist()), strict=True):
        rows, keys = slice(start, end), slice(first, last)
        wide = [each[keys].repeat_interleave(HEADS // KV_HEADS, 1) for each in (key, value)]
        shares = (scores_of(query[rows], key[keys], causal, options) - sums[:, rows, None]).exp()
        delta = (grad[rows] * output[rows]).sum(-1).T[..., None]
        part = shares * (torch.einsum("qhd,khd->hqk", grad[rows], wide[1]) - delta) * options["scale"]
        found[0][rows] += torch.einsum("hqk,khd->qhd", part, wide[0])
        for total, each in (
            (found[1], torch.einsum("hqk,qhd->khd", part, query[rows])),
            (found[2], torch.einsum("hqk,qhd->khd", shares, grad[rows])),
        ):
            total[keys] += each.unflatten(1, (KV_HEADS, -1)).sum(2)
    return tuple(found)


def scores_of(query: Tensor, key: Tensor, causal: bool, options: dict) -> Tensor:
    wide = key.repeat_interleave(HEADS // KV_HEADS, 1)
    scores = torch.einsum("qhd,khd->hqk", query, wide) * options["scale"]
    before, rows = key.shape[0] - query.shape[0], torch.arange(query.shape[0])[:, None]
    keys, left = torch.arange(key.shape[0]), options["window_size_left"]
    hidden = torch.zeros(query.shape[0], key.shape[0], dtype=torch.bool)
    if causal:
        hidden |= keys > rows + before
    if left is not None:
        hidden |= keys < rows + before - left
    return scores.masked_fill(hidden, -torch.inf)


@pytest.mark.parametrize("window", [None, 9])
def test_the_calls_of_a_gpu_compute_the_same(window, monkeypatch):
    """Stand-ins have the semantics of a GPU's kernels: causal at the lower right, gradients by what is given."""
    monkeypatch.setattr(attention_kernels, "_forward_on_gpu", flash_forward)
    monkeypatch.setattr(attention_kernels, "_backward_on_gpu", flash_backward)
    monkeypatch.setattr(attention_kernels, "_has_flash", lambda rows: True)
    compare(segments_of(ROWS["several groups"], shared=True, padding=2), window, torch.float64, 1e-12)


@pytest.mark.parametrize("window", [None, 9, 40])
@pytest.mark.parametrize("name", ["several groups", "longer than a block of masks"])
def test_what_no_kernel_takes_is_written_out(name, window, monkeypatch):
    """A GPU in fp32 computes this way; here the same code runs on a CPU."""
    monkeypatch.setattr(attention_kernels, "_forward_on_cpu", attention_kernels._forward_written_out)
    monkeypatch.setattr(attention_kernels, "_backward_on_cpu", attention_kernels._backward_written_out)
    compare(segments_of(ROWS[name], shared=True, padding=2), window, torch.float64, 1e-12)


def test_kernels_are_asked_to_repeat_themselves_only_where_it_is_wanted(monkeypatch):
    """Torch's flash kernels, of both versions, read the process's wish for determinism when they are called."""
    asked = []

    def watched(*args, **options):
        asked.append(torch.are_deterministic_algorithms_enabled())
        assert not torch.is_deterministic_algorithms_warn_only_enabled(), "a flash kernel only warns then"
        return flash_backward(*args, **options)

    monkeypatch.setattr(attention_kernels, "_backward_on_gpu", watched)
    monkeypatch.setattr(attention_kernels, "_has_flash", lambda rows: True)
    sequences = Sequences.of([3], [3], CPU, causal=True)
    query, key, value = draw(3, torch.float64)
    output, sums, *_ = flash_forward(query, key, value, *sequences.offsets, 3, 3, 0.0, True, False, **OPTIONS)
    for wanted in (True, False):
        totals = tuple(torch.zeros_like(each) for each in (query, key, value))
        add_gradients(totals, query, query, key, value, output, sums, sequences, 0.25, repeatable=wanted)
    assert asked == [True, False] and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("wanted", [True, False])
def test_every_call_hears_megatrons_mode_and_adds_up_gradients_of_keys_in_fp32(wanted, monkeypatch):
    """In bf16 the sum over a prompt's many responses would lose what each of them adds."""
    asked, sums = [], []

    def attend_and_note(*args, repeatable, **options):
        asked.append(repeatable)
        return attend(*args, repeatable=repeatable, **options)

    def add_and_note(totals, *args, repeatable):
        asked.append(repeatable)
        sums.append({each.dtype for each in totals[1:]})
        add_gradients(totals, *args, repeatable=repeatable)

    monkeypatch.setattr(attention, "attend", attend_and_note)
    monkeypatch.setattr(attention, "add_gradients", add_and_note)
    segments = segments_of(ROWS["one group"], shared=True)
    rows = [each.unsqueeze(1).requires_grad_() for each in draw(51, torch.bfloat16)]
    layer = PackedAttention(SimpleNamespace(deterministic_mode=wanted), layer_number=1)
    layer(*rows, packed_seq_params=plan_attention(segments, CPU)).sum().backward()
    assert asked == [wanted] * 4 and sums == [{torch.float32}] * 2


@pytest.mark.parametrize("window", [None, 5])
def test_the_kernels_of_a_gpu_take_these_arguments(window, monkeypatch):
    """On the meta device torch checks a call by the kernels' own schema and shapes, and computes nothing."""
    meta = torch.device("meta")
    sequences = Sequences.of([3, 4], [5, 4], meta, causal=True, window=window)
    query, key, value = (
        torch.empty(tokens, heads, 64, device=meta, dtype=torch.bfloat16)
        for tokens, heads in ((7, HEADS), (9, KV_HEADS), (9, KV_HEADS))
    )
    monkeypatch.setattr(attention_kernels, "_newest_flash", lambda device: True)
    output, sums = attend(query, key, value, sequences, 0.125)
    assert output.shape == query.shape and sums.shape == (HEADS, 7)
    totals = (torch.empty_like(query), *(torch.empty_like(each, dtype=torch.float32) for each in (key, value)))
    add_gradients(totals, output, query, key, value, output, sums, sequences, 0.125)


# The schemas of torch 2.7 to 2.11, to which 2.12 added options.
SCHEMAS = {
    "_flash_attention_forward": "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, "
    "Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, "
    "bool return_debug_mask, *, float? scale=None, SymInt? window_size_left=None, SymInt? window_size_right=None, "
    "Tensor? seqused_k=None, Tensor? alibi_slopes=None) -> (Tensor output, Tensor softmax_logsumexp, "
    "Tensor rng_state, Tensor unused, Tensor debug_attn_mask)",
    "_flash_attention_backward": "aten::_flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, "
    "Tensor value, Tensor out, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, "
    "float dropout_p, bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None, "
    "SymInt? window_size_left=None, SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_kernels_are_called_with_what_each_torch_has(name):
    older, here = torch._C.parse_schema(SCHEMAS[name]), getattr(torch.ops.aten, name).default._schema
    assert here.is_backward_compatible_with(older)
    options = {each.name for each in older.arguments if each.kwarg_only}
    assert attention_kernels._options(Sequences.of([1], [1], CPU, causal=True), 1.0).keys() <= options


@pytest.mark.parametrize("installed", [True, False])
def test_version_3_is_used_where_it_is_installed_and_the_gpu_is_a_hopper(installed, monkeypatch):
    active, capability = [], [9, 0]
    monkeypatch.setattr(attention_kernels, "find_spec", lambda name: installed and name == "flash_attn_interface")
    module = SimpleNamespace(get_device_capability=lambda device: tuple(capability))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", active.append)
    assert attention_kernels._newest_flash.__wrapped__(CPU) and active == ["FA3"] * installed
    capability[0] = 8
    assert attention_kernels._newest_flash.__wrapped__(CPU) and active == ["FA3"] * installed


@pytest.mark.parametrize("sparse", [False, True])
def test_transformer_engines_layers_take_our_attention(sparse, monkeypatch):
    """Its linear layers and norms stay, by megatron-core's own specification, in which they are mocks without it."""
    provider = pytest.importorskip("megatron.core.extensions.transformer_engine_spec_provider").TESpecProvider
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", provider, raising=False)
    monkeypatch.setattr("megatron.core.utils._te_version", Version("2.11.0"))
    monkeypatch.setattr(model, "transformer_engine_usable", lambda: True)
    layer = model._layer_spec(SimpleNamespace(qk_norm=True, experts=SimpleNamespace(count=4)), sparse).submodules
    parts = layer.self_attention.submodules
    assert parts.core_attention is PackedAttention
    assert parts.linear_qkv is provider().column_parallel_layer_norm_linear()
    assert parts.linear_proj is provider().row_parallel_linear()
