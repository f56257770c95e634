"""What CLIPO adds to a step, measured by the tool that measures it on real models."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import TOOLS
from tiny_models import tiny_llama

BENCH = TOOLS / "bench_clipo_cost.py"


@pytest.mark.full
def test_one_percent_of_a_step_at_most(tmp_path: Path) -> None:
    """A quarter of the layers of SmolLM2-135M and a small vocabulary: the share is several times that model's."""
    model = tiny_llama(tmp_path, hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536, layers=8, vocab=4096)
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(BENCH),
        str(model),
        "--rounds",
        "2",
        "--dim",
        "512",
        "--threads",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    share = float(re.search(r"CLIPO, direct .* ([\d.]+)%", done.stdout).group(1))
    assert 0.01 < share <= 1.0, done.stdout
    parts = re.findall(r"^    (\w[\w, ]*\w) +([\d.]+) ms", done.stdout, re.MULTILINE)
    assert [name for name, _ in parts] == ["pooling", "head, loss, head step", "reward", "metrics"]
    assert all(float(milliseconds) > 0 for _, milliseconds in parts)
