"""What an update of the servers reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SyncReport:
    """The outcome of an update, the same on every rank."""

    version: int
    seconds: float
    nbytes: int  # of all tensors, each counted once
    sent: int  # bytes of what was sent of them, each counted once
    servers: tuple[str, ...]  # URLs of the servers that have the new weights
    left_out: Mapping[str, str]  # URL of a server that failed -> the reason
    attempts: int
    # phase -> seconds, of the successful attempt; "pause": from when servers stopped generating until all went on
    phases: Mapping[str, float] = field(default_factory=dict)
    unverified: tuple[str, ...] = ()  # tensors of servers that could not be compared

    @property
    def metrics(self) -> dict[str, float]:
        """The values for the step's report."""
        return {
            "sync/seconds": self.seconds,
            "sync/bytes_per_second": self.nbytes / max(self.seconds, 1e-9),
            "sync/sent_bytes": float(self.sent),
            "sync/servers": float(len(self.servers)),
            "sync/left_out": float(len(self.left_out)),
            "sync/attempts": float(self.attempts),
            **{f"sync/{name}_s": seconds for name, seconds in self.phases.items()},
        }
