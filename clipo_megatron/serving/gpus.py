"""Lists this machine's GPUs with nvidia-smi, so that `clipo serve` need not import torch."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

_DEADLINE_S = 20


def gpus() -> tuple[list[str], str]:
    """The name, memory and driver of each GPU, and the reason if there are none."""
    return _query("name,memory.total,driver_version")


def free_share(devices: Sequence[str]) -> float:
    """The share of memory that is free on the fullest of these GPUs; 1 if nobody can tell."""
    lines, _ = _query("index,uuid,memory.free,memory.total", units=False)
    shares = [
        float(free) / float(total)
        for index, uuid, free, total in (line.split(", ") for line in lines)
        if any(each == index or uuid.startswith(each) for each in devices)
    ]
    return min(shares, default=1.0)


def uuids_of(devices: Sequence[str]) -> list[str]:
    """The UUIDs, as torch spells them, of GPUs given by the driver's numbers or by names; [] if one is unknown."""
    lines, _ = _query("index,uuid")
    found = dict(line.split(", ") for line in lines)
    known = [
        found.get(each) or next((uuid for uuid in found.values() if uuid.startswith(each)), "") for each in devices
    ]
    return [each.removeprefix("GPU-") for each in known] if all(known) else []


def _query(columns: str, *, units: bool = True) -> tuple[list[str], str]:
    """A line of these columns for each GPU, and the reason if there are none."""
    if not shutil.which("nvidia-smi"):
        return [], "no NVIDIA driver"
    command = ["nvidia-smi", f"--query-gpu={columns}", f"--format=csv,noheader{'' if units else ',nounits'}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S)
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi did not answer within {_DEADLINE_S} s"
    if answer.returncode:
        return [], f"nvidia-smi fails: {(answer.stdout + answer.stderr).strip()[:100]}"
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()], "the driver sees none"
