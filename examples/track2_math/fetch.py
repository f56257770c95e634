"""Fetch the public sets of Track II into data/: MATH to train on, and what the paper evaluates on.

python examples/track2_math/fetch.py [--data FOLDER] [--set NAME ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "public_sets"))

import rows
from fetching import PublicSet, main

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
PERTURB = "https://raw.githubusercontent.com/Kaffaljidhmah2/MATH-Perturb/main/math_perturb/math_perturb_{}.jsonl"
SETS = (
    PublicSet(
        "train_math75", "conrl/math75", "EleutherAI/hendrycks_math", rows.solved_problem, SUBJECTS, "train", size=7500
    ),
    PublicSet("test_math", "conrl/math", "HuggingFaceH4/MATH-500", rows.answered_problem, size=500),
    PublicSet("test_aime", "conrl/aime", "HuggingFaceH4/aime_2024", rows.answered_problem, split="train", size=30),
    PublicSet("test_aime25", "conrl/aime25", "math-ai/aime25", rows.answered_problem, size=30),
    PublicSet("test_amc", "conrl/amc", "math-ai/amc23", rows.answered_problem, size=40),
    PublicSet(
        "test_math_perturb_simple", "conrl/math_perturb", PERTURB.format("simple"), rows.answered_problem, size=279
    ),
    PublicSet("test_math_perturb_hard", "conrl/math_perturb", PERTURB.format("hard"), rows.answered_problem, size=279),
)

if __name__ == "__main__":
    sys.exit(main(SETS, __doc__.partition("\n")[0]))
