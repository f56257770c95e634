"""docs/families.md shows how a family is added; here the page is followed to the letter, in a copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from clipo_megatron.weights.families import FAMILIES

PAGE = (ROOT / "docs" / "families.md").read_text().partition("## Adding a family")[2]


def block(language: str) -> str:
    """Return the page's only fenced block of a language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return found


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package with the page's file and line in it; returns the folder that holds it."""
    shutil.copytree(ROOT / "clipo_megatron", tmp_path / "clipo_megatron", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    families = tmp_path / "clipo_megatron" / "weights" / "families"
    (families / "seed_oss.py").write_text(block("python"))
    before, added = block("diff").splitlines()
    listed = (families / "__init__.py").read_text()
    assert listed.count(before[1:]) == 1 and added.startswith("+")
    (families / "__init__.py").write_text(listed.replace(before[1:], f"{before[1:]}\n{added[1:]}"))
    (tmp_path / "try_it.py").write_text(block("py"))
    return tmp_path


def run(*command: str, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_adds_a_family_that_converts_both_ways(package: Path) -> None:
    assert "seed_oss" not in FAMILIES, "the example is a family by now: take another one"
    run(sys.executable, "-m", "ruff", "check", ".", folder=package)
    run(sys.executable, "-m", "ruff", "format", "--check", ".", folder=package)
    shown = run(sys.executable, "-W", "ignore", "try_it.py", folder=package)
    assert "equal: 27 tensors, every tensor by its SHA-256, and the logits" in shown
