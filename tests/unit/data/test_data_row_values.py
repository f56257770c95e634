"""Rows that cannot be used: one sentence names file, row and field, and takes no minute."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tiny_models import tiny_llama
from transformers import AutoTokenizer

from clipo_megatron.config.schema import SourceConfig
from clipo_megatron.data.preparing import PromptSettings, prompts_of
from clipo_megatron.data.sources import DataError, read

ROW = {
    "data_source": "set",
    "prompt": [{"role": "user", "content": "What is 2 + 2?"}],
    "reward_model": {"ground_truth": "4"},
    "extra_info": {"split": "train"},
}


def jsonl(folder: Path, line: str) -> SourceConfig:
    """A file whose second row is `line`."""
    (folder / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n{line}\n", encoding="utf-8", errors="surrogatepass")
    return SourceConfig(path=str(folder / "rows.jsonl"))


def row(**changes: object) -> str:
    return json.dumps(ROW | changes)


def asking(text: str, **how: bool) -> str:
    return json.dumps(ROW | {"prompt": [{"role": "user", "content": text}]}, **how)


HALF = r"it has half of a character, \\ud83d at place 4"
REFUSED = [
    (row(extra_info={"deep": 0}).replace("0", "[" * 10_000 + "]" * 10_000), "not valid JSON: maximum recursion depth"),
    (row(extra_info={"deep": 0}).replace("0", "[" * 100 + "]" * 100), r"field extra_info.deep(\[0\])+: lists and map"),
    (row(extra_info={"n": 0}).replace("0", "9" * 5000), "not valid JSON: Exceeds the limit"),
    (row(reward_model={"ground_truth": 1e400}), "field reward_model.ground_truth: .*inf"),
    (asking("half\ud83d"), rf"field prompt\[0\]\.content: {HALF}"),
    (asking("half\ud83d", ensure_ascii=False), "not valid JSON: 'utf-8' codec"),
    (row(extra_info={"note": "half\ud83d"}), f"field extra_info.note: {HALF}"),
    (row(data_source="a\0b"), "field data_source: it has a NUL character"),
    (asking("a\0b"), r"field prompt\[0\]\.content: it has a NUL character"),
    (asking("word " * 4_000_000), r"field prompt\[0\]\.content: it has 20,000,000 characters, and at most 4,000,000"),
    (row(images=["a.png"]), "field images: the question comes with images"),
    (row(prompt="x" * 10_000), r"field prompt: a list of turns .* was expected, not text 'x+\.\.\."),
]


@pytest.mark.parametrize(("line", "reason"), REFUSED, ids=range(len(REFUSED)))
def test_a_row_that_cannot_be_used_is_named(tmp_path, line, reason):
    start = time.process_time()
    with pytest.raises(DataError, match=rf"rows\.jsonl, row 1 \(line 2\).*{reason}") as refusal:
        read(jsonl(tmp_path, line))
    assert len(str(refusal.value)) < 700 and "\n" not in str(refusal.value)
    assert time.process_time() - start < 5.0


def test_whole_characters_and_a_byte_order_mark_are_read(tmp_path):
    file = Path(jsonl(tmp_path, asking("whole \U0001f600")).path)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read(SourceConfig(path=str(file)))[1].messages[0]["content"] == "whole \U0001f600"


def test_bytes_of_a_parquet_column_that_are_no_text_are_named(tmp_path):
    rows = [ROW | {"data_source": name} for name in ("one", "two", "six")]
    table = pyarrow.Table.from_pylist(rows)
    broken = pyarrow.StringArray.from_buffers(
        3,
        pyarrow.py_buffer(memoryview(bytearray(b"\0\0\0\0\3\0\0\0\6\0\0\0\t\0\0\0"))),
        pyarrow.py_buffer(b"onet\xffosix"),
    )
    pyarrow.parquet.write_table(table.set_column(0, "data_source", broken), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet, row 1, field data_source: its bytes are no UTF-8 .*at byte 1"):
        read(SourceConfig(path=str(tmp_path / "rows.parquet")))


def test_a_prompt_of_far_too_many_characters_is_left_out_without_reading_all_its_tokens(tmp_path):
    given, tokenizer = [], AutoTokenizer.from_pretrained(tiny_llama(tmp_path / "model"))

    class Counted:
        """A tokenizer that notes how many characters it is given."""

        def __getattr__(self, name):
            return None if name == "backend_tokenizer" else getattr(tokenizer, name)

        def __call__(self, texts, **options):
            given.extend(map(len, texts))
            return tokenizer(texts, **options)

    source = jsonl(tmp_path, asking("word " * 700_000))
    found = prompts_of([source], Counted(), PromptSettings(None, 100))
    assert [prompt.id for prompt in found] == ["rows/0"] and found.too_long == 1
    assert max(given) == 200_000
