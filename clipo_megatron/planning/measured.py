"""Reads what `clipo prove` measured, in place of what a plan assumes."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from math import inf
from pathlib import Path
from typing import Any

from clipo_megatron.config.errors import shortened
from clipo_megatron.config.ranges import range_violation
from clipo_megatron.planning.errors import PlanError
from clipo_megatron.planning.hardware import HARDWARE, Assumptions, Hardware

# What a GPU's proof measures that a plan assumes: the assumption, and the rate that it is a share of; None: bytes.
_SHARES = {"update_flops_per_s": ("train_flops", "flops"), "reserve_bytes": ("reserve_bytes", None)}


def read_measured(path: str) -> tuple[Hardware, dict[str, float]]:
    """Read the file that `clipo prove` wrote: its GPU, and the assumptions that it replaces, by name.

    Raises:
        PlanError: the file cannot be read, is none of `clipo prove`, or is of no GPU of the plan's table.
    """
    try:
        proof = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise PlanError(f"--measured {path} cannot be read: {error}. Give the file that `clipo prove` wrote.") from None
    measured = proof.get("measured") if isinstance(proof, dict) else None
    if not isinstance(measured, dict) or "hardware" not in proof:
        raise PlanError(f"--measured {path} is no file of `clipo prove`. Give the one that it wrote.")
    hardware = HARDWARE.get(str(proof["hardware"]))
    if hardware is None:
        raise PlanError(
            f"--measured {path} was measured on {proof.get('gpu') or 'a machine without a GPU'}, and a plan is for one "
            f"of {', '.join(HARDWARE)}. Run `clipo prove` on one of these, or leave out --measured."
        )
    found = {}
    for name, (assumption, whole) in _SHARES.items():
        if name in measured:
            found[assumption] = _checked(path, assumption, measured[name], getattr(hardware, whole) if whole else 1.0)
    return hardware, found


def _checked(path: str, name: str, value: Any, whole: float) -> float:
    declared = next(each for each in fields(Assumptions) if each.name == name)
    share, reason = 0.0, "it is no number"
    if isinstance(value, int | float) and not isinstance(value, bool):
        share = value / whole if abs(value) < sys.float_info.max else inf
        reason = range_violation(declared, share)
    if reason is not None:
        raise PlanError(f"--measured {path}: its {name} is {shortened(str(value), 40)}: {reason}. Measure again.")
    return share
