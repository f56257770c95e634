"""Prompts in a file: equal to the bit to those of the tokenizer, exact rows, one file for all, and little memory."""

from __future__ import annotations

import json
import math
import time
import tracemalloc
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_folders import write_tokenizer

from clipo_megatron.config.schema import SourceConfig
from clipo_megatron.data.asked import asked_forms, opens_thinking
from clipo_megatron.data.preparing import PromptSettings, prompt_file, prompts_of, write_prompts
from clipo_megatron.data.prompt_table import PromptsById, PromptTable
from clipo_megatron.data.row_codec import decode, encode
from clipo_megatron.data.sources import Row, rows_of

SETTINGS = PromptSettings(None, 400)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def record(number: int, words: int = 6) -> dict[str, Any]:
    text = " ".join(f"word{number * word}" for word in range(words)) + " Put it into \\boxed{}. é\u2028"
    return {
        "data_source": "math",
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}],
        "reward_model": {"ground_truth": number},
        "extra_info": {"index": number, "list": [1, 2.5, None, True], "deep": {"a": "b"}},
    }


def written(folder: Path, count: int, name: str = "rows.jsonl") -> SourceConfig:
    (folder / name).write_text("".join(json.dumps(record(number)) + "\n" for number in range(count)))
    return SourceConfig(path=str(folder / name))


@pytest.mark.parametrize("system_prompt", [None, "Think.", ""])
def test_prompts_are_equal_to_the_tokenizers_own(tokenizer: Any, tmp_path: Path, system_prompt: str | None) -> None:
    """700 rows: more than are rendered together."""
    source = written(tmp_path, 700)
    table = prompts_of([source], tokenizer, PromptSettings(system_prompt, 400))
    assert len(table) == 700
    for row, prompt in zip(rows_of(source), table, strict=True):
        turns = [turn for turn in row.messages if system_prompt is None or turn["role"] != "system"]
        turns = [{"role": "system", "content": system_prompt}, *turns] if system_prompt else turns
        text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert prompt.tokens.dtype == torch.int64 and prompt.tokens.tolist() == ids
        assert (prompt.id, prompt.data_source, prompt.ground_truth) == (row.id, row.data_source, row.ground_truth)
        assert prompt.messages == tuple(turns) and prompt.extra == row.extra
        assert (prompt.forms, prompt.thinking) == (asked_forms(text), opens_thinking(text))


def test_a_table_is_a_sequence_and_chooses(tokenizer: Any, tmp_path: Path) -> None:
    table = prompts_of([written(tmp_path, 9)], tokenizer, SETTINGS)
    assert [prompt.id for prompt in table[2:4]] == ["rows/2", "rows/3"] and table[-1].id == "rows/8"
    with pytest.raises(IndexError, match="no number 9"):
        table[9]
    held_out = prompts_of([written(tmp_path, 4, "exam.jsonl")], tokenizer, SETTINGS)
    rest = table.without(held_out)
    assert [prompt.id for prompt in rest] == [f"rows/{number}" for number in range(4, 9)]
    assert list(rest.lengths()) == [prompt.tokens.numel() for prompt in rest]
    found = PromptsById(rest)
    assert found["rows/5"].id == "rows/5" and "rows/1" not in found and len(found) == 5
    assert table.data_sources == {"math": 9} and table.largest_in and table.too_long == 0


def test_a_file_of_prompts_is_made_once_for_the_same_content(tokenizer: Any, tmp_path: Path) -> None:
    source, folder = written(tmp_path, 5), tmp_path / "out" / "prompts"
    first = prompt_file([source], tokenizer, SETTINGS, folder)
    made = first.stat().st_mtime_ns
    assert prompt_file([source], tokenizer, SETTINGS, folder) == first and first.stat().st_mtime_ns == made
    assert [path.name for path in folder.iterdir()] == [first.name]
    others = {first}
    others.add(prompt_file([source], tokenizer, PromptSettings("Think.", 400), folder))
    others.add(prompt_file([source], tokenizer, PromptSettings(None, 401), folder))
    others.add(prompt_file([written(tmp_path, 6)], tokenizer, SETTINGS, folder))
    others.add(prompt_file([SourceConfig(path=source.path, suffix="!")], tokenizer, SETTINGS, folder))
    template, tokenizer.chat_template = tokenizer.chat_template, tokenizer.chat_template + " "
    others.add(prompt_file([source], tokenizer, SETTINGS, folder))
    tokenizer.chat_template = template
    assert len(others) == 6
    assert [prompt.id for prompt in PromptTable(first)] == [f"rows/{number}" for number in range(5)]


@pytest.mark.parametrize(
    "extra",
    [
        {"a": [1, -2.5, "text", None, True, {"b": []}], "big": 10**50, "tiny": 5e-324},
        {"tuple": (1, ("a",)), "set": {1, 2}, "bytes": b"\x00", 3: "a key that is a number"},
        {"surrogate": "\ud800", "controls": "\x00\u2028"},
        {"infinite": math.inf, "minus": -0.0},
    ],
)
def test_rows_come_back_exactly(extra: dict[Any, Any]) -> None:
    facts = [[{"role": "user", "content": "x"}], "math", "1"]
    *again, found = decode(encode(facts, extra))
    assert again == facts and repr(found) == repr(extra)


def test_what_no_file_keeps_is_read_from_the_source_again(tokenizer: Any, tmp_path: Path) -> None:
    assert decode(encode([], {"day": date(2020, 1, 1)}))[-1] is None
    row = Row("days/0", ({"role": "user", "content": "When?"},), "math", "1", {"day": date(2020, 1, 1)})
    with (tmp_path / "days").open("w+b") as file:
        write_prompts([row], tokenizer, SETTINGS, file)
        table = PromptTable(file, reread=lambda name: {f"{name}/0": row})
    assert table[0].extra == {"day": date(2020, 1, 1)}


def many(count: int) -> Iterator[Row]:
    for number in range(count):
        turn = {"role": "user", "content": f"{number}: " + "How many are there? " * 20}
        yield Row(f"many/{number}", (turn,), "math", "1", {"solution": "so " * 400})


def test_memory_holds_numbers_and_no_texts(tokenizer: Any, tmp_path: Path) -> None:
    """A row of 1.6 kB and 450 tokens takes its tokens at 4 bytes each, two digests, and places; no texts, no dicts."""

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            with (tmp_path / f"{count}").open("w+b") as file:
                write_prompts(many(count), tokenizer, PromptSettings(None, 2000), file)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(256)  # what is imported and cached at first
    assert (peak(1536) - peak(512)) / 1024 < 4 * 450 * 2


def test_all_the_rest_costs_no_more_than_the_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    """Reading, rendering, packing: a few times the byte-level tokenizer of these tests, which has no merges to make."""
    texts = [row.messages[0]["content"] for row in many(1024)]
    start = time.process_time()
    for place in range(0, 1024, 256):
        tokenizer(texts[place : place + 256], add_special_tokens=False)
    floor = time.process_time() - start
    start = time.process_time()
    with (tmp_path / "table").open("w+b") as file:
        write_prompts(many(1024), tokenizer, PromptSettings(None, 2000), file)
    assert time.process_time() - start < 5 * floor
