"""`compare` finds equal tensors equal, and names every kind of difference with its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama, tiny_qwen2, tiny_qwen3_moe
from torch import Tensor

from clipo_megatron.conversion import logits as through_transformers
from clipo_megatron.conversion.compare import DifferenceKind, TensorComparison, compare
from clipo_megatron.weights.errors import CoverageError, WeightsFolderError
from clipo_megatron.weights.formats.reader import SINGLE, HFReader

Q, K = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "qk")
NORM = "model.layers.2.post_attention_layernorm.weight"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


class InMemory:
    """Stands for a reader of tensors by name; reading `broken` fails."""

    def __init__(self, tensors: dict[str, Tensor], broken: tuple[str, ...] = ()):
        self.tensors, self.broken, self.reads = tensors, broken, 0

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.tensors))

    def get(self, name: str) -> Tensor:
        self.reads += 1
        if name in self.broken:
            raise WeightsFolderError(f"{name} lies beyond the end of its file")
        return self.tensors[name].clone()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tiny_llama(tmp_path_factory.mktemp("llama"), kv_heads=4, tied=False)
    return load_file(folder / SINGLE)


def against(
    weights: dict[str, Tensor], change: Callable[[dict[str, Tensor]], None], **options: object
) -> TensorComparison:
    changed = dict(weights)
    change(changed)
    return compare(InMemory(weights), InMemory(changed), **options)


def test_equal_folders(tmp_path: Path) -> None:
    one, other = tiny_qwen2(tmp_path / "a"), tiny_qwen2(tmp_path / "b")
    seen: list[tuple[int, int]] = []
    with HFReader(one) as a, HFReader(other) as b:
        found = compare(a, b, progress=lambda *counts: seen.append(counts))
        names = a.names()
    assert (found.equal, found.differences) == (len(names), ())
    assert found.a.tensors == found.b.tensors == len(names) > 40
    assert found.a.nbytes == sum(tensor.nbytes for tensor in load_file(one / SINGLE).values())
    assert found.b.dtypes == {"float32": len(names)}
    assert seen == [(i, len(names)) for i in range(1, len(names) + 1)]


def test_each_tensor_is_read_once(weights: dict[str, Tensor]) -> None:
    sides = InMemory(weights), InMemory(dict(weights))
    assert compare(*sides).equal == len(weights)
    assert [side.reads for side in sides] == [len(weights)] * 2


def test_one_bit(weights: dict[str, Tensor]) -> None:
    def flip(tensors: dict[str, Tensor]) -> None:
        tensors[Q] = tensors[Q].clone()
        tensors[Q].view(torch.int32)[3, 5] ^= 1

    (only,) = against(weights, flip).differences
    assert (only.name, only.kind) == (Q, DifferenceKind.VALUES)
    assert "1 of 4,096 values differ" in only.detail


def test_the_sign_of_zero(weights: dict[str, Tensor]) -> None:
    zero = torch.zeros(4)
    (only,) = compare(InMemory({"x": zero}), InMemory({"x": -zero})).differences
    assert "the values are equal and their bytes are not" in only.detail


def test_not_a_number(weights: dict[str, Tensor]) -> None:
    (only,) = compare(InMemory({"x": torch.ones(3)}), InMemory({"x": torch.tensor([1.0, torch.nan, 1.0])})).differences
    assert "1 of 3 values differ" in only.detail and "not finite" in only.detail


def test_a_swap_is_called_a_swap(weights: dict[str, Tensor]) -> None:
    def swap(tensors: dict[str, Tensor]) -> None:
        tensors[Q], tensors[K] = tensors[K], tensors[Q]

    found = against(weights, swap).differences
    assert [each.name for each in found] == [K, Q]
    assert found[0].detail.endswith(f"B's holds what A has as {Q}")
    assert found[1].detail.endswith(f"B's holds what A has as {K}")


def test_a_zeroed_norm(weights: dict[str, Tensor]) -> None:
    (only,) = against(weights, lambda tensors: tensors.update({NORM: torch.zeros(64)})).differences
    assert only.name == NORM and "64 of 64 values differ" in only.detail and "B's are all zero" in only.detail


def test_tensors_of_one_side(weights: dict[str, Tensor]) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.extra.weight"] = tensors.pop(NORM)

    found = against(weights, change).differences
    assert {each.name: each.kind for each in found} == {
        NORM: DifferenceKind.ONLY_A,
        "model.layers.0.extra.weight": DifferenceKind.ONLY_B,
    }
    assert found[0].detail == f"only B has it; B's holds what A has as {NORM}"


def test_shape_and_dtype(weights: dict[str, Tensor]) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[Q] = tensors[Q].view(32, 128)
        tensors[NORM] = tensors[NORM].bfloat16()

    found = {each.name: each for each in against(weights, change).differences}
    assert (found[Q].kind, found[NORM].kind) == (DifferenceKind.SHAPE, DifferenceKind.DTYPE)
    assert "[64, 64]" in found[Q].detail and "[32, 128]" in found[Q].detail
    assert found[NORM].detail == "A's dtype is float32, B's is bfloat16"


def test_after_a_cast(weights: dict[str, Tensor]) -> None:
    def cast(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items()}

    assert against(weights, cast).equal == 0
    found = against(weights, cast, cast=torch.bfloat16)
    assert found.equal == len(weights)
    assert (found.a.dtypes, found.b.dtypes) == ({"float32": len(weights)}, {"bfloat16": len(weights)})
    assert found.a.nbytes == 2 * found.b.nbytes > 0

    def cast_wrongly(tensors: dict[str, Tensor]) -> None:
        cast(tensors)
        tensors[Q] = tensors[Q].clone()
        tensors[Q].view(torch.int16)[0, 0] += 1  # the neighbouring number

    assert [each.name for each in against(weights, cast_wrongly, cast=torch.bfloat16).differences] == [Q]


def test_a_tensor_that_cannot_be_read(weights: dict[str, Tensor]) -> None:
    found = compare(InMemory(weights), InMemory(weights, broken=(NORM,)))
    (only,) = found.differences
    assert (only.name, only.kind, found.equal) == (NORM, DifferenceKind.DAMAGED, len(weights) - 1)
    assert "B's cannot be read" in only.detail and "beyond the end" in only.detail


def test_an_output_layer_that_is_the_embedding(weights: dict[str, Tensor]) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors[OUTPUT]

    spelt_out = weights | {OUTPUT: weights[EMBEDDING]}
    assert against(spelt_out, drop, tied=True).differences == ()
    assert [each.name for each in against(spelt_out, drop, tied=False).differences] == [OUTPUT]
    assert not torch.equal(weights[OUTPUT], weights[EMBEDDING])
    (only,) = against(weights, drop, tied=True).differences
    assert (only.name, only.kind) == (OUTPUT, DifferenceKind.VALUES)


def test_details_are_for_the_first_and_verdicts_for_all(weights: dict[str, Tensor]) -> None:
    def negate(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: -tensor for name, tensor in tensors.items()}

    found = against(weights, negate, details=3).differences
    assert len(found) == len(weights)
    assert ["values differ, by" in each.detail for each in found] == [True] * 3 + [False] * (len(weights) - 3)


def test_differences_come_in_the_order_of_the_layers(tmp_path: Path) -> None:
    tensors = {f"model.layers.{layer}.x": torch.ones(1) for layer in (10, 9, 1)}
    found = compare(InMemory(tensors), InMemory({})).differences
    assert [each.name for each in found] == [f"model.layers.{layer}.x" for layer in (1, 9, 10)]


@pytest.mark.parametrize("family", [tiny_llama, tiny_qwen2, tiny_qwen3_moe])
def test_logits_are_those_of_transformers(family: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = family(tmp_path)
    with HFReader(folder) as reader:
        ours = through_transformers.logits(reader, folder)
    prompts = through_transformers.fixed_prompts(ours.shape[-1], 2048)
    assert len(prompts.unique()) > 150
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(prompts).logits
    assert torch.equal(ours, theirs)


def test_logits_want_every_tensor(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    tensors = load_file(folder / SINGLE)
    tensors["model.layers.0.odd.weight"] = tensors.pop(NORM)
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    with HFReader(folder) as reader, pytest.raises(CoverageError) as caught:
        through_transformers.logits(reader, folder)
    assert caught.value.problems == [
        f"transformers finds no tensor {NORM}",
        "transformers does not know tensor model.layers.0.odd.weight",
    ]


def test_difference_of_logits() -> None:
    a = torch.tensor([[[1.0, -4.0]]])
    found = through_transformers.difference(a, a + torch.tensor([0.0, 0.5]))
    assert (found.largest, found.scale, found.relative, found.tokens) == (0.5, 4.0, 0.125, 1)
    assert through_transformers.difference(a, a).relative == 0.0
    assert through_transformers.difference(a, a * torch.nan).relative == float("inf")
