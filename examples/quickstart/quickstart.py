"""A first run of CLIPO: fetch a small model, make a task, train on two Megatron ranks, compare before and after.

    python examples/quickstart/quickstart.py [key=value ...]     (what `make quickstart` runs)

Overrides are those of `clipo train`. Ctrl-C saves a checkpoint; the same command continues from it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from arithmetic import write_problems
from smollm2 import fetch

from clipo_megatron.cli.main import main as clipo

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def main() -> int:
    model, data = ROOT / "models" / "SmolLM2-135M-Instruct", ROOT / "runs" / "quickstart" / "data"
    fetch(model)
    train, held_out = write_problems(data, held_out=64, seed=0)
    return clipo(
        [
            "train",
            str(HERE / "quickstart.yaml"),
            f"model.path={model}",
            f"data.train=[{{path: '{train}'}}]",
            f"data.eval=[{{path: '{held_out}'}}]",
            f"train.output={ROOT / 'runs' / 'quickstart'}",
            *sys.argv[1:],
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
