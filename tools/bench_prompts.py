"""Measures what it costs to read, render, tokenize and keep the prompts of many rows.

    python tools/bench_prompts.py [--rows 60000] [--model models/SmolLM2-135M-Instruct] [--data FILE.parquet]

A process of one thread makes prompts of the rows as `clipo train --check` does. It prints its CPU time and that of the
process which renders the chat template for it, and its peak memory. The floor is the tokenizer alone, on the texts of a
sample of the rows; the ratio is what all the rest costs beside it.
Without --data the rows are questions of 60 to 90 words with numbers drawn at random.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "1"  # the tokenizer's threads

import psutil

from clipo_megatron.config.schema import SourceConfig
from clipo_megatron.data.preparing import PromptSettings, prompts_of, tokenized
from clipo_megatron.data.rendering import ChatRenderer
from clipo_megatron.data.sources import rows_of
from clipo_megatron.data.tokenizer import load_tokenizer, without_torch

TEXT = (
    "the a train leaves station with passengers and travels kilometres every hour until it reaches next city where "
    "people get off before another comes how many are there if each pays dollars for ticket then find total"
)
WORDS = TEXT.split()
SAMPLE = 2000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--data")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(options.data) if options.data else write_rows(Path(folder) / "rows.parquet", options.rows)
        source = SourceConfig(path=str(file))
        with without_torch():
            tokenizer = load_tokenizer(options.model)
            floor = tokenizing(source, tokenizer)
            start, rendered = time.process_time(), rendering_s()
            table = prompts_of([source], tokenizer, PromptSettings(None, 2048))
            spent, rendered = time.process_time() - start, rendering_s() - rendered
    rows, tokens = len(table) + table.too_long, int(table.lengths().sum())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"rows      {rows:,}, {tokens:,} tokens, {table.too_long} too long")
    print(f"CPU time  {spent:.1f} s of this thread, and {rendered:.1f} s of the process that renders")
    print(f"floor     {floor * rows:.1f} s, the tokenizer alone; ratio {(spent + rendered) / (floor * rows):.2f}")
    print(f"memory    {peak:.0f} MiB at most")
    return 0


def rendering_s() -> float:
    """CPU seconds so far of this process's children. The one that renders chat templates lives on for a while."""
    return sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children())


def tokenizing(source: SourceConfig, tokenizer: object) -> float:
    """CPU seconds that the tokenizer takes for one row, over a sample."""
    renderer = ChatRenderer(tokenizer, None)
    rows = list(islice(rows_of(source), SAMPLE))
    texts = [text for text, _ in renderer.render_all([row.messages for row in rows])]
    start = time.process_time()
    for place in range(0, len(texts), 256):
        tokenized(tokenizer, texts[place : place + 256])
    return (time.process_time() - start) / len(texts)


def write_rows(file: Path, count: int) -> Path:
    """Rows in the verl schema, in a parquet file that is written a part at a time."""
    import pyarrow
    import pyarrow.parquet

    draw, writer = random.Random(0), None
    for start in range(0, count, 4096):
        rows = [row(draw, number) for number in range(start, min(start + 4096, count))]
        part = pyarrow.Table.from_pylist(rows)
        writer = writer or pyarrow.parquet.ParquetWriter(file, part.schema)
        writer.write_table(part)
    writer.close()  # type: ignore[union-attr]
    return file


def row(draw: random.Random, number: int) -> dict[str, object]:
    words = [draw.choice(WORDS) if draw.random() < 0.85 else str(draw.randint(2, 9999)) for _ in range(75)]
    return {
        "data_source": "math",
        "prompt": [{"role": "user", "content": " ".join(words) + " Put the answer into \\boxed{}."}],
        "reward_model": {"ground_truth": str(number), "style": "rule"},
        "extra_info": {"index": number, "solution": json.dumps(words[:20])},
    }


if __name__ == "__main__":
    sys.exit(main())
