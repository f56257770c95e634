"""The quickstart's task: sums and differences of one-digit numbers, some held out, as rows that `clipo train` reads."""

from __future__ import annotations

import json
import random
from pathlib import Path


def write_problems(folder: Path, *, held_out: int, seed: int) -> tuple[Path, Path]:
    """Write all 200 problems, split at random into train.jsonl and held_out.jsonl; returns the two paths."""
    problems = [
        (f"What is {a} {sign} {b}? Answer with only the number.", str(a + b if sign == "+" else a - b))
        for a in range(10)
        for b in range(10)
        for sign in "+-"
    ]
    random.Random(seed).shuffle(problems)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, part in zip(paths, (problems[held_out:], problems[:held_out]), strict=True):
        path.write_text("".join(json.dumps(_row(i, *problem, path.stem)) + "\n" for i, problem in enumerate(part)))
    return paths


def _row(index: int, question: str, answer: str, split: str) -> dict:
    return {
        "data_source": "arithmetic/one_digit",
        "prompt": [{"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": index, "split": split},
    }
