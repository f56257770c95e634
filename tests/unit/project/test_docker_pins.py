"""docker/pins.py: what an image has stays as it is, or the build fails."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from paths import ROOT


def pins(action: str, file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "docker/pins.py", action, str(file)], capture_output=True, text=True)


def test_a_package_that_was_changed_is_named(tmp_path):
    file = tmp_path / "image.txt"
    assert pins("write", file).returncode == 0
    lines = file.read_text().splitlines()
    assert f"torch=={version('torch')}" in lines and f"numpy=={version('numpy')}" in lines
    assert not any(line.startswith("rich==") for line in lines), "what computes nothing may change"
    assert pins("check", file).returncode == 0
    file.write_text(file.read_text().replace(f"torch=={version('torch')}", "torch==1.0"))
    done = pins("check", file)
    assert done.returncode == 1 and f"torch 1.0 became {version('torch')}" in done.stderr
