"""Weights to servers through process groups that trainer ranks and servers share: each byte is sent once.

The first TP rank of every pipeline stage, and of those with the same experts (in the first copy), is rank 0 of a group
of its own, whose other members are the ranks of all servers. It gathers a bucket of its parameters, broadcasts it, and
gathers the next one meanwhile.
The coordinator tells the servers which bucket comes next, in one order for all of them (`send_order`).
"""

from __future__ import annotations

import contextlib
import socket
import time
import uuid
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipo_megatron.rollout.servers.server import BucketNames, ServerError, UpdateGroup
from clipo_megatron.runtime.platform import SharedGroup, SharedGroupError, open_store, platform
from clipo_megatron.sync.attempt import Attempt, SyncTarget
from clipo_megatron.sync.checksums import Sums
from clipo_megatron.sync.consensus import share
from clipo_megatron.sync.served import Order, ServedSync
from clipo_megatron.sync.shard import Shard, send_order
from clipo_megatron.weights.export import ExportPlan
from clipo_megatron.weights.mapping import HFTensor


class BroadcastSync(ServedSync):
    """Transport `broadcast`; see the module. Groups live on until a server comes, goes or fails."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._order = send_order(self.plan)
        self._names = [_names(bucket.tensors, self.plan.dtype) for bucket in self._order]
        self._bell: _Bell | None = None
        self._group: SharedGroup | None = None  # of this sender and all servers
        self._groups: dict[tuple[int, int], UpdateGroup] = {}  # of all senders; coordinator only
        self._memory: list[Tensor] = []  # of the sender's two buffers, kept: memory not yet touched is slow

    def close(self) -> None:
        """Leave the groups; the servers notice. Idempotent."""
        super().close()
        self._leave()
        self._memory.clear()

    def _transfer(self, order: Order, attempt: Attempt | None) -> Sums | None:
        self._hang_bell(order.number)
        if order.regroup:
            self._meet(order, attempt)
        sums: list[Sums | None] = [None]

        def send() -> None:
            if self.shard.takes_part:
                sums[0] = self._send(order)

        async def receive(attempt: Attempt) -> None:
            await self._receive(attempt, order.version)

        self._together(send, receive, attempt, reused=not order.regroup)
        return sums[0]

    # --- groups --------------------------------------------------------------------------------------------------

    def _meet(self, order: Order, attempt: Attempt | None) -> None:
        """New groups of each sender with all servers; collective."""
        former, self._groups = self._groups, {}
        self._leave()

        def open_group() -> tuple[tuple[int, int], UpdateGroup] | None:
            if not self.shard.is_sender:
                return None
            name = f"clipo-{uuid.uuid4().hex[:8]}-{order.number}-{'-'.join(map(str, self.shard.sender))}"
            host = _address_towards(self.config.host)
            world = 1 + order.ranks
            self._group = platform().share_group(name, world=world, host=host, timeout_s=self.limits.call_s)
            return self.shard.sender, UpdateGroup(name, host, self._group.port, world, platform().backend)

        opened = self._together(open_group, None, attempt)
        self._groups = dict(sorted(each for each in opened if each is not None))

        def join() -> None:
            if self._group is not None:
                self._group.join(self._bell.stopped)

        async def join_servers(attempt: Attempt) -> None:
            offsets = accumulate((member.state.tp for member in attempt.members), initial=1)
            offset = dict(zip((member.url for member in attempt.members), offsets, strict=False))

            async def join_all(member: SyncTarget) -> None:
                for group in former.values():
                    with contextlib.suppress(ServerError):  # it may be another life of the server
                        await member.server.leave_group(group.name, deadline_s=self.limits.settle_s)
                for group in self._groups.values():
                    await member.server.join_group(
                        group, rank_offset=offset[member.url], deadline_s=attempt.deadline(settling=True)
                    )

            await attempt.each("join", join_all, grouped=True)

        self._together(join, join_servers, attempt)

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    # --- an attempt ----------------------------------------------------------------------------------------------

    def _send(self, order: Order) -> Sums | None:
        """This stage's part; on ranks other than the sender, to help it gather."""
        sums = Sums(self.shard.spec, order.tp_sizes, order.kind) if order.verify and self.shard.is_sender else None
        memory, self._memory = self._memory, []  # what a failure leaves in flight is not used again
        lane = _Lane(self._group, self._bell, self.plan, self.shard, memory)
        going = False
        for bucket, flat in self.shard.own_buckets(self.plan, lane.buffer):
            if not lane.failure and not going:
                going = self._bell.wait_to_go(self.limits.total_s)
                if not going:
                    lane.failure = f"attempt {order.number} was given up before the first bucket"
            if not lane.failure:
                lane.send(flat)
                if sums is not None:
                    sums.add(bucket, flat)
            elif not self.shard.gathers:
                break  # nobody waits for this rank to gather the rest
        lane.finish()
        if lane.failure:
            self._leave()
            raise SharedGroupError(lane.failure)
        self._memory = lane.memory
        return sums

    async def _receive(self, attempt: Attempt, version: int) -> None:
        """The coordinator's side: every server takes the same buckets in the same order, one after the other."""

        async def take(member: SyncTarget) -> None:
            for place, (bucket, names) in enumerate(zip(self._order, self._names, strict=True), start=1):
                if attempt.failed:
                    return
                group, last = self._groups[bucket.sender].name, place == len(self._order)
                await member.server.receive_bucket(group, names, last=last, deadline_s=attempt.deadline(settling=True))

        await attempt.each("pause", lambda each: each.server.pause(self.in_flight, deadline_s=attempt.deadline()))
        await attempt.each("begin", lambda each: each.server.begin_update(deadline_s=attempt.deadline()))
        self._bell.go()
        await attempt.each("buckets", take, grouped=True)
        await attempt.each("end", lambda each: each.server.end_update(version, deadline_s=attempt.deadline()))

    # --- hearing of each other -----------------------------------------------------------------------------------

    def _hang_bell(self, number: int) -> None:
        if self._bell is None:
            host = self.config.host
            store = open_store(host, world=1, timeout_s=self.limits.call_s) if self.shard.is_coordinator else None
            port = share(lambda: store.port)
            self._bell = _Bell(store or dist.TCPStore(host, port, timeout=timedelta(seconds=self.limits.call_s)))
        self._bell.number = number

    def _on_failure(self) -> None:
        self._bell.stop()

    def _should_cancel(self) -> None:
        if self._bell is not None:
            self._bell.stop()


class _Bell:
    """By which senders hear the coordinator, and it them, in the middle of an attempt."""

    def __init__(self, store: dist.Store):
        self._store = store
        self.number = 0  # of the attempt

    def go(self) -> None:
        """Servers are ready to receive."""
        self._store.set(f"{self.number}/go", "")

    def stop(self) -> None:
        """The attempt has failed."""
        self._store.set(f"{self.number}/stop", "")

    def stopped(self) -> bool:
        return self._store.check([f"{self.number}/stop"])

    def wait_to_go(self, deadline_s: float) -> bool:
        """Whether to go; False: the attempt has failed."""
        end = time.monotonic() + deadline_s
        while not self._store.check([f"{self.number}/go"]):
            if self.stopped() or time.monotonic() > end:
                return False
            time.sleep(0.002)
        return True


class _Lane:
    """A sender's two buffers: one is on the wire while the other is filled. After a failure nothing is sent any more,
    but the buffers can still be filled: other ranks may have to gather to the end.

    A failure is kept as text. The error itself would hold, by its traceback, what was in flight, and that the group:
    its connections would stay open until Python next collects cycles, and servers at their other end would wait for it.
    """

    def __init__(self, group: SharedGroup | None, bell: _Bell, plan: ExportPlan, shard: Shard, memory: list[Tensor]):
        self.failure = ""
        self._group, self._bell = group, bell
        self._size = shard.largest(plan)
        self._dtype, self._shard = plan.dtype, shard
        self._buffers: deque[tuple[Tensor, dist.Work | None]] = deque((each, None) for each in memory)  # oldest first

    def buffer(self, numel: int) -> Tensor:
        """Memory for the next bucket."""
        if len(self._buffers) < 2:
            self._buffers.append((torch.empty(self._size, dtype=self._dtype, device=self._shard.device), None))
        else:
            flat, work = self._buffers.popleft()
            self._wait(work)
            self._buffers.append((flat, None))
        return self._buffers[-1][0]

    def send(self, flat: Tensor) -> None:
        """Start to send what was written to the newest buffer."""
        whole, _ = self._buffers.pop()
        self._buffers.append((whole, self._group.broadcast(flat)))

    def finish(self) -> None:
        """Return when everything has arrived, or cannot arrive any more."""
        for _, work in self._buffers:
            self._wait(work)

    @property
    def memory(self) -> list[Tensor]:
        """The buffers, once nothing is in flight."""
        return [flat for flat, _ in self._buffers]

    def _wait(self, work: dist.Work | None) -> None:
        if work is None or self.failure:
            return
        try:
            self._group.wait(work, self._bell.stopped)
        except SharedGroupError as error:
            self.failure = str(error)


def _names(tensors: Sequence[HFTensor], dtype: torch.dtype) -> BucketNames:
    name = str(dtype).removeprefix("torch.")
    return BucketNames(
        names=tuple(tensor.name for tensor in tensors),
        dtypes=(name,) * len(tensors),
        shapes=tuple(tuple(tensor.shape) for tensor in tensors),
    )


def _address_towards(host: str) -> str:
    """This machine's address as a machine at `host` sees it; `host` itself where that is this machine."""
    family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        return probe.getsockname()[0]
