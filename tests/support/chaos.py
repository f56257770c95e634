"""Planted faults of a run's servers, one in each step, each at a chosen moment.

The trainer reaches each server through a proxy, which sees from the calls what the server is doing. The proxy holds
generation until the step's fault is armed, so that no step passes while a server restarts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from faulty_proxy import GENERATION, FaultyProxy

from clipo_megatron.rollout.servers.registry import Registry, ServerRecord, Status
from clipo_megatron.runtime.run_dir import SERVERS

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
# The calls during which a signal hits a server.
MOMENTS = {
    "generates": ("/generate",),
    "is updated": (
        "/pause_generation",
        "/begin_weight_update",
        "/update_weights_from_distributed",
        "/end_weight_update",
    ),
}
ANSWERS = ("garbage", "no json", "half", "stale", "error 500", "other ids", "one sample less")


@dataclass(frozen=True)
class Fault:
    """One fault of one server."""

    what: str  # kill | stop | refuse | slow | stall, or a key of faulty_proxy.LIES
    when: str  # generates | is updated | starts
    server: int
    wait_s: float = 0.0  # delay after the moment has come

    def __str__(self) -> str:
        return f"{self.what} server {self.server} while it {self.when} (+{self.wait_s:.2f} s)"


def draw_faults(seed: int, rounds: int) -> list[Fault]:
    """Every kind of fault at least once, signals `rounds` times; the seed decides their order and servers."""
    dice = random.Random(seed)
    kinds = [(what, when) for what in SIGNALS for when in ("generates", "is updated", "starts")] * rounds
    kinds += [("refuse", "generates")] * 2 + [("slow", "generates"), ("stall", "generates")]
    kinds += [(what, "generates") for what in dice.sample(ANSWERS, 6)]
    dice.shuffle(kinds)
    return [
        Fault(what, when, dice.randrange(2), dice.uniform(0, 4 if when == "starts" else 0.05)) for what, when in kinds
    ]


class Gate(FaultyProxy):
    """A proxy that holds generation until the step may start, and fires a signal at the fault's moment."""

    def __init__(self, target: str, chaos: Chaos, number: int):
        self.chaos, self.number = chaos, number
        self.armed: Fault | None = None
        super().__init__(target, delay_s=3.0)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.path in GENERATION:
            while not self.chaos.open:
                await asyncio.sleep(0.02)
        fault = self.armed
        if fault is not None and request.path in MOMENTS.get(fault.when, ()) and self.chaos.dice.random() < 0.6:
            self.armed = None
            asyncio.get_running_loop().call_later(fault.wait_s, self.chaos.strike, fault)
        return await super()._handle(request)


class Chaos:
    """Two gates before two servers of `clipo serve`, and the faults of both."""

    def __init__(self, output: Path, seed: int):
        self.registry = Registry(output / SERVERS)
        self.dice = random.Random(seed + 1)
        self.open = False
        self.struck: list[Fault] = []
        self._dying: dict[int, str] = {}  # server -> the boot that was hit
        self.gates: list[Gate] = []

    def stand_between(self) -> None:
        """Put a gate before each server; servers keep their addresses when they restart."""
        self.gates = [Gate(self.record(number).url, self, number) for number in range(2)]

    @property
    def urls(self) -> list[str]:
        """The URLs under which the trainer reaches the servers."""
        return [gate.url for gate in self.gates]

    def record(self, server: int) -> ServerRecord:
        """The record that `clipo serve` wrote of a server."""
        return sorted(self.registry.records(), key=lambda record: record.url)[server]

    def ready(self) -> bool:
        """Whether both servers are ready, and restarted since they were hit."""
        records = sorted(self.registry.records(), key=lambda record: record.url)
        return len(records) == 2 and all(
            record.status is Status.ready and record.boot != self._dying.get(number)
            for number, record in enumerate(records)
        )

    def strike(self, fault: Fault) -> None:
        """Send the signal to all processes of the server."""
        record = self.record(fault.server)
        self._dying[fault.server] = record.boot
        with contextlib.suppress(ProcessLookupError):
            os.killpg(record.pid, SIGNALS[fault.what])
        self.struck.append(fault)

    def arm(self, fault: Fault) -> Iterator[None]:
        """Arm a fault for the current step; yields until it has happened."""
        gate = self.gates[fault.server]
        if fault.what not in SIGNALS:
            yield from self._disturb(fault, gate)
            return
        first = Fault(fault.what, "generates", fault.server) if fault.when == "starts" else fault
        struck = len(self.struck)
        gate.armed = first
        while len(self.struck) == struck:
            yield
        if fault.when == "starts":
            boot = self.record(fault.server).boot
            while (record := self.record(fault.server)).boot == boot or record.status is not Status.starting:
                yield
            strike_at = time.monotonic() + fault.wait_s
            while time.monotonic() < strike_at:
                yield
            self.strike(fault)

    def _disturb(self, fault: Fault, gate: Gate) -> Iterator[None]:
        if fault.what == "refuse":
            gate.down()
            until = time.monotonic() + 2.0
            while time.monotonic() < until:
                yield
            gate.up()
            self.struck.append(fault)
            return
        name = {"slow": "delay"}.get(fault.what, fault.what)
        before = gate.happened[name]
        gate.plan([name])
        while gate.happened[name] == before:
            yield
        self.struck.append(fault)

    def close(self) -> None:
        """Stop listening."""
        for gate in self.gates:
            gate.close()


def rollouts(output: Path) -> list[dict]:
    """The lines of rollouts.jsonl."""
    return [json.loads(line) for line in (output / "rollouts.jsonl").read_text().splitlines()]
