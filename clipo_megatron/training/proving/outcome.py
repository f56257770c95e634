"""A line of the table of `clipo prove`, and what a check returns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from clipo_megatron.config.schema import RunConfig
from clipo_megatron.policy.parallel import Layout
from clipo_megatron.runtime.platform import platform
from clipo_megatron.weights.spec import ModelSpec


class ProofScale(str, Enum):
    """How large the models are."""

    quick = "quick"  # a slice that takes a CPU seconds
    cpu = "cpu"
    gpu = "gpu"


@dataclass(frozen=True, slots=True)
class Line:
    """One measurement against its limit. `holds` is None where nothing was compared; `note` says why, or adds facts."""

    what: str
    measured: str
    limit: str = ""
    holds: bool | None = None
    note: str = ""


@dataclass(slots=True)
class Outcome:
    """What a check found: lines of the table, and numbers that `clipo plan --measured` reads."""

    lines: list[Line] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)

    def at_most(self, what: str, value: float, limit: float, *, unit: str = "", note: str = "") -> None:
        """Add a line that holds if `value` is not above `limit`; a NaN does not."""
        self.lines.append(Line(what, shown(value, unit), f"<= {shown(limit, unit)}", value <= limit, note))

    def at_least(self, what: str, value: float, limit: float, *, unit: str = "", note: str = "") -> None:
        """Add a line that holds if `value` is not below `limit`; a NaN does not."""
        self.lines.append(Line(what, shown(value, unit), f">= {shown(limit, unit)}", value >= limit, note))

    def check(self, what: str, measured: str, limit: str, holds: bool, *, note: str = "") -> None:
        """Add a line about something that is no number."""
        self.lines.append(Line(what, measured, limit, holds, note))

    def tell(self, what: str, measured: str, note: str = "") -> None:
        """Add a line without a limit."""
        self.lines.append(Line(what, measured, note=note))

    def skip(self, what: str, why: str) -> None:
        """Add a line that was not measured."""
        self.lines.append(Line(what, "skipped", note=why))

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"lines": [asdict(line) for line in self.lines], "measured": self.measured}


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a plan says of a model in training on one rank."""

    memory: Mapping[str, float]  # bytes of each part, by its name in the plan
    update_flops_per_token: float  # forward and backward
    peak_flops: float | None  # FLOP/s of this GPU's data sheet; None where there is none


@dataclass(frozen=True, slots=True)
class Task:
    """What a check is to do.

    Attributes:
        scale: how large its models are.
        layout: of this process, which is the only rank.
        folder: an empty folder for its files, and for those that one check leaves to the next.
        predict: what a plan says of a model, on one rank that keeps `context` tokens before a token on average.
    """

    scale: ProofScale
    layout: Layout
    folder: Path
    predict: Callable[[RunConfig, ModelSpec, float], Prediction]

    def pick(self, quick: Any, cpu: Any, gpu: Any) -> Any:
        """The value for this scale."""
        return {ProofScale.quick: quick, ProofScale.cpu: cpu, ProofScale.gpu: gpu}[self.scale]


def shown(value: float, unit: str = "") -> str:
    """A number as the table has it; the unit "%" takes a share, "B" bytes."""
    if unit == "%":
        return f"{100 * value:.1f}%"
    if unit == "B":
        for power, name in ((3, "GiB"), (2, "MiB")):
            if abs(value) >= 1024**power:
                return f"{value / 1024**power:.2f} {name}"
        return f"{value:.0f} B"
    number = f"{value:.3g}" if abs(value) < 1e-3 or abs(value) >= 1e5 else f"{value:.6g}"
    return f"{number} {unit}".strip()


def seconds_once(work: Callable[[], Any]) -> float:
    """The seconds of some work on this device."""
    platform().synchronize()
    start = time.perf_counter()
    work()
    platform().synchronize()
    return time.perf_counter() - start


def seconds_of(work: Callable[[], Any], *, repeats: int = 3) -> float:
    """The median seconds of some work on this device, the first call left out."""
    return statistics.median([seconds_once(work) for _ in range(repeats + 1)][1:])
