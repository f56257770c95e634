"""Settings that have new names. An old name is read for one release, and a line on stderr says the new one."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from typing import Any

from clipo_megatron.config.errors import ConfigProblem

# Old name -> new name, in the same section.
RENAMED = {
    "rollout.refill_rounds": "rollout.max_refill_rounds",
    "serve.start_deadline_s": "serve.startup_timeout_s",
    "serve.unresponsive_s": "serve.health_timeout_s",
    "serve.restarts": "serve.max_restarts",
    "optimizer.skips": "optimizer.max_skipped_updates",
    "checkpoint.failures": "checkpoint.max_failed_saves",
    "faults.frozen_s": "faults.heartbeat_timeout_s",
    "faults.stuck_s": "faults.phase_timeout_s",
    "faults.stop_s": "faults.grace_period_s",
    "faults.restarts": "faults.max_restarts",
}


def given_twice(keys: Iterable[str]) -> list[ConfigProblem]:
    """One problem for each setting among the dotted keys that is given by its old and its new name."""
    known = set(keys)
    return [
        ConfigProblem(old, f"it is now called {new}, which is given too", "Remove the old name", show_value=False)
        for old, new in RENAMED.items()
        if {old, new} <= known
    ]


def rename(content: dict[str, Any]) -> set[str]:
    """Move values from old names to new ones, in place, over what stands there; returns the old names that were used.

    References to settings, as `${faults.stop_s}`, are renamed too.
    """
    used = set()
    for old, new in RENAMED.items():
        section, _, name = old.partition(".")
        place = content.get(section)
        if isinstance(place, dict) and name in place:
            place[new.partition(".")[2]] = place.pop(name)
            used.add(old)
    _rename_references(content, used)
    return used


def keys_of(content: dict[str, Any]) -> list[str]:
    """The dotted keys of settings that stand directly in a section."""
    return [f"{section}.{name}" for section, place in content.items() if isinstance(place, dict) for name in place]


def announce(used: Iterable[str]) -> None:
    """Say the new name of each old one, on rank 0."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        for old in sorted(used):
            print(f"clipo: {old} is now called {RENAMED[old]}; the next release will not know {old}", file=sys.stderr)


def _rename_references(place: dict[Any, Any] | list[Any], used: set[str]) -> None:
    for key, value in list(place.items() if isinstance(place, dict) else enumerate(place)):
        if isinstance(value, dict | list):
            _rename_references(value, used)
        elif isinstance(value, str):
            for old in re.findall(r"\$\{([\w.]+)\}", value):
                if old in RENAMED:
                    place[key] = place[key].replace(f"${{{old}}}", f"${{{RENAMED[old]}}}")
                    used.add(old)
