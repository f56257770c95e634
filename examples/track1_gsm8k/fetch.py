"""Fetch the public sets of Track I into data/: GSM8K to train on, and what the paper evaluates on.

python examples/track1_gsm8k/fetch.py [--data FOLDER] [--set NAME ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "public_sets"))

import rows
from fetching import PublicSet, main

SYMBOLIC = "apple/GSM-Symbolic"
SETS = (
    PublicSet("train_gsm8k", "conrl/gsm8k", "openai/gsm8k", rows.grade_school, ("main",), "train", size=7473),
    PublicSet("test_gsm8k", "conrl/gsm8k", "openai/gsm8k", rows.grade_school, ("main",), size=1319),
    PublicSet("test_gsm_symbolic", "conrl/gsm_symbolic", SYMBOLIC, rows.grade_school, ("main",), size=5000),
    PublicSet("test_gsm_p1", "conrl/gsm_p1", SYMBOLIC, rows.grade_school, ("p1",), size=5000),
    PublicSet("test_gsm_p2", "conrl/gsm_p2", SYMBOLIC, rows.grade_school, ("p2",), size=2500),
    PublicSet("test_theoremqa", "conrl/theoremqa", "TIGER-Lab/TheoremQA", rows.theorem),
    PublicSet("test_mmlu", "conrl/mmlu", "cais/mmlu", rows.options_of_four, ("all",), choice=True),
    PublicSet(
        "test_truthfulqa",
        "conrl/truthfulqa",
        "truthfulqa/truthful_qa",
        rows.truthful,
        ("multiple_choice",),
        "validation",
        choice=True,
        size=817,
    ),
    PublicSet(
        "test_commonsense_qa",
        "conrl/commonsense_qa",
        "tau/commonsense_qa",
        rows.labelled_options,
        split="validation",
        choice=True,
        size=1221,
    ),
)

if __name__ == "__main__":
    sys.exit(main(SETS, __doc__.partition("\n")[0]))
