"""Lists this machine's GPUs with nvidia-smi, so that `clipo serve` need not import torch."""

from __future__ import annotations

import shutil
import subprocess

_DEADLINE_S = 20


def gpus() -> tuple[list[str], str]:
    """The name, memory and driver of each GPU, and the reason if there are none."""
    if not shutil.which("nvidia-smi"):
        return [], "no NVIDIA driver"
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S)
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi did not answer within {_DEADLINE_S} s"
    if answer.returncode:
        return [], f"nvidia-smi fails: {(answer.stdout + answer.stderr).strip()[:100]}"
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()], "the driver sees none"
