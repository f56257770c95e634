"""Weights to servers through process groups that trainer ranks and servers share: each byte is sent once.

In the first copy of the model, the first TP rank of every pipeline stage, and of the ranks with the same experts, is a
sender. A sender is rank 0 of a group of its own, whose other members are the ranks of all servers. It broadcasts one
bucket while it gathers the next. The coordinator tells all servers, in one order (`send_order`), which bucket is next.
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
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipo_megatron.rollout.servers.server import BucketNames, LiveServer, ServerError, UpdateGroup
from clipo_megatron.runtime.platform import open_store, platform
from clipo_megatron.runtime.shared_group import SharedGroup, SharedGroupError
from clipo_megatron.sync.attempt import Attempt
from clipo_megatron.sync.checksums import Sums, sums_of_shard
from clipo_megatron.sync.consensus import share
from clipo_megatron.sync.served import AttemptPlan, ServedSync
from clipo_megatron.sync.shard import Shard, send_order
from clipo_megatron.weights.mapping import HFTensor


class BroadcastSync(ServedSync):
    """The transport `broadcast`, which the module describes. Groups are kept until a server joins, leaves or fails."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._order = send_order(self.export_plan)
        self._names = [_names(bucket.tensors, self.export_plan.dtype) for bucket in self._order]
        self._signal: _AttemptSignal | None = None
        self._group: SharedGroup | None = None  # this sender's group
        self._groups: dict[tuple[int, int], UpdateGroup] = {}  # the groups of all senders; coordinator only
        self._buffers: list[Tensor] = []  # the sender's two buffers, kept because new memory is slow at first use

    def close(self) -> None:
        """Leave the groups, which the servers notice. Idempotent."""
        super().close()
        self._leave()
        self._buffers.clear()

    def _transfer(self, plan: AttemptPlan, attempt: Attempt | None) -> Sums | None:
        self._open_signal(plan.number)
        if plan.regroup:
            self._join_groups(plan, attempt)
        if plan.changes:
            return self._transfer_changes(plan, attempt)
        sums: list[Sums | None] = [None]

        def send() -> None:
            if self.shard.takes_part:
                sums[0] = self._send(plan)
                if self.config.delta:
                    self._last_sent.remember(self.shard.chunks())

        async def receive(attempt: Attempt) -> None:
            senders = [bucket.sender for bucket in self._order]
            await self._receive(attempt, plan, list(zip(senders, self._names, strict=True)))

        self._run_phase(send, receive, attempt, reused=not plan.regroup)
        return sums[0]

    def _transfer_changes(self, plan: AttemptPlan, attempt: Attempt | None) -> Sums | None:
        """Find what has changed while the servers generate, then pause them and send it."""
        mine: list[tuple[BucketNames, Tensor]] = []

        def find() -> list[tuple[tuple[int, int], BucketNames]]:
            for changed in self._last_sent.changes(self.shard.chunks()) if self.shard.takes_part else ():
                if changed:
                    mine.append(_packed(changed))
            return [(self.shard.sender, names) for names, _ in mine]

        found = [each for part in self._run_phase(find, None, attempt) for each in part]
        sums: list[Sums | None] = [None]

        def send() -> None:
            if mine:
                self._send_all([flat for _, flat in mine], plan.number)
            if plan.verify and self.shard.takes_part:
                sums[0] = sums_of_shard(self.shard, self.export_plan, plan.tp_sizes, plan.kind)

        async def receive(attempt: Attempt) -> None:
            await self._receive(attempt, plan, sorted(found, key=lambda each: each[0]))

        self._run_phase(send, receive, attempt, reused=True)
        return sums[0]

    def _send_all(self, buckets: Sequence[Tensor], number: int) -> None:
        """Send buckets that are in memory; as in `_DoubleBuffer`, of a failure only the text is kept."""
        failure = ""
        if not self._signal.wait_for_start(self.deadlines.total_s):
            failure = f"attempt {number} was cancelled before the first bucket"
        for flat in buckets if not failure else ():
            try:
                self._group.wait(self._group.broadcast(flat, self._signal.stopped), self._signal.stopped)
            except SharedGroupError as error:
                failure = str(error)
                break
        if failure:
            self._leave()
            raise SharedGroupError(failure)

    def _unfit(self, target: LiveServer) -> str:
        """See `ServedSync`. The libraries that connect GPUs refuse to meet another release of themselves."""
        mine, theirs = platform().collectives_version, target.collectives
        if not mine or not theirs or mine == theirs:
            return super()._unfit(target)
        name = platform().backend.upper()
        return (
            f"its {name} is {theirs} and the trainer's is {mine}, and {name} connects equal releases only; install one "
            "torch for both, or set rollout.sync.transport=disk"
        )

    # --- groups --------------------------------------------------------------------------------------------------

    def _join_groups(self, plan: AttemptPlan, attempt: Attempt | None) -> None:
        """Form a new group of each sender with all servers; collective."""
        former, self._groups = self._groups, {}
        self._leave()

        def open_group() -> tuple[tuple[int, int], UpdateGroup] | None:
            if not self.shard.is_sender:
                return None
            name = f"clipo-{uuid.uuid4().hex[:8]}-{plan.number}-{'-'.join(map(str, self.shard.sender))}"
            host = _address_towards(self.config.host)
            world = 1 + plan.ranks
            self._group = SharedGroup(platform(), name, world=world, host=host, timeout_s=self.deadlines.call_s)
            return self.shard.sender, UpdateGroup(name, host, self._group.port, world, platform().backend)

        opened = self._run_phase(open_group, None, attempt)
        self._groups = dict(sorted(each for each in opened if each is not None))

        def join() -> None:
            if self._group is not None:
                self._group.join(self._signal.stopped)

        async def join_servers(attempt: Attempt) -> None:
            offsets = accumulate((target.state.tp for target in attempt.targets), initial=1)
            offset = dict(zip((target.url for target in attempt.targets), offsets, strict=False))

            async def join_all(target: LiveServer) -> None:
                for group in former.values():
                    with contextlib.suppress(ServerError):  # a restarted server has no such group
                        await target.server.leave_group(group.name, deadline_s=self.deadlines.notice_s)
                for group in self._groups.values():
                    await target.server.join_group(
                        group, rank_offset=offset[target.url], deadline_s=attempt.deadline(in_group=True)
                    )

            await attempt.each("join", join_all, grouped=True)

        self._run_phase(join, join_servers, attempt)

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    # --- buckets -------------------------------------------------------------------------------------------------

    def _send(self, plan: AttemptPlan) -> Sums | None:
        """Send this rank's buckets; ranks that are no senders help to gather them."""
        sums = Sums(self.shard.spec, plan.tp_sizes, plan.kind) if plan.verify and self.shard.is_sender else None
        buffers, self._buffers = self._buffers, []  # after a failure they may be in flight and are not reused
        wire = _DoubleBuffer(self._group, self._signal, self.shard, self.shard.largest(self.export_plan), buffers)
        started = False
        for bucket, flat in self.shard.own_buckets(self.export_plan, wire.next_buffer):
            if not wire.failure and not started:
                started = self._signal.wait_for_start(self.deadlines.total_s)
                if not started:
                    wire.failure = f"attempt {plan.number} was cancelled before the first bucket"
            if not wire.failure:
                wire.send(flat)
                if sums is not None:
                    sums.add(bucket, flat)
            elif not self.shard.gathers:
                break  # no other rank needs this one to gather the rest
        wire.finish()
        if wire.failure:
            self._leave()
            raise SharedGroupError(wire.failure)
        self._buffers = wire.buffers
        return sums

    async def _receive(
        self, attempt: Attempt, plan: AttemptPlan, buckets: Sequence[tuple[tuple[int, int], BucketNames]]
    ) -> None:
        """Coordinator only: let every server receive all buckets, each from its sender, in the same order."""
        self._state.sent = sum(names.nbytes for _, names in buckets)

        async def receive_all(target: LiveServer) -> None:
            for number, (sender, names) in enumerate(buckets, start=1):
                if attempt.failed:
                    return
                group, last = self._groups[sender].name, number == len(buckets)
                await target.server.receive_bucket(group, names, last=last, deadline_s=attempt.deadline(in_group=True))

        await self._pause(attempt, plan.changes)
        changes, version = plan.changes, plan.version
        await attempt.each(
            "begin", lambda each: each.server.begin_update(changes=changes, deadline_s=attempt.deadline())
        )
        self._signal.start()
        await attempt.each("buckets", receive_all, grouped=True)
        await attempt.each("end", lambda each: each.server.end_update(version, deadline_s=attempt.deadline()))

    # --- signals between the ranks -------------------------------------------------------------------------------

    def _open_signal(self, number: int) -> None:
        if self._signal is None:
            host = self.config.host
            store = open_store(host, world=1, timeout_s=self.deadlines.call_s) if self.shard.is_coordinator else None
            port = share(lambda: store.port)
            self._signal = _AttemptSignal(
                store or dist.TCPStore(host, port, timeout=timedelta(seconds=self.deadlines.call_s))
            )
        self._signal.number = number

    def _on_failure(self) -> None:
        if self._signal is not None:
            self._signal.stop()


class _AttemptSignal:
    """Lets the coordinator start the senders, and any rank stop all others, during an attempt."""

    def __init__(self, store: dist.Store):
        self._store = store
        self.number = 0  # of the attempt

    def start(self) -> None:
        """Tell the senders that the servers are ready to receive."""
        self._store.set(f"{self.number}/start", "")

    def stop(self) -> None:
        """Tell all ranks that the attempt has failed."""
        self._store.set(f"{self.number}/stop", "")

    def stopped(self) -> bool:
        return self._store.check([f"{self.number}/stop"])

    def wait_for_start(self, deadline_s: float) -> bool:
        """Wait until the servers are ready; False if the attempt failed instead or the deadline passed."""
        end = time.monotonic() + deadline_s
        while not self._store.check([f"{self.number}/start"]):
            if self.stopped() or time.monotonic() > end:
                return False
            time.sleep(0.002)
        return True


class _DoubleBuffer:
    """A sender's two buffers: one is on the wire while the other is filled.

    After a failure nothing more is sent, but the buffers can still be filled, because other ranks may have to gather to
    the end. The failure is kept as text: the error's traceback would keep the group alive and its connections open, and
    the servers would wait for it.
    """

    def __init__(
        self, group: SharedGroup | None, signal: _AttemptSignal, shard: Shard, numel: int, buffers: list[Tensor]
    ):
        self.failure = ""
        self._group, self._signal, self._shard, self._numel = group, signal, shard, numel
        self._slots: deque[tuple[Tensor, dist.Work | None]] = deque((each, None) for each in buffers)  # oldest first

    def next_buffer(self, numel: int) -> Tensor:
        """Return memory for the next bucket, once what it held before was sent."""
        if len(self._slots) < 2:
            self._slots.append((torch.empty(self._numel, dtype=self._shard.dtype, device=self._shard.device), None))
        else:
            flat, work = self._slots.popleft()
            self._wait(work)
            self._slots.append((flat, None))
        return self._slots[-1][0]

    def send(self, flat: Tensor) -> None:
        """Start to send what was written to the newest buffer, or note that the servers did not come to receive it."""
        whole, work = self._slots.pop()
        try:
            work = self._group.broadcast(flat, self._signal.stopped)
        except SharedGroupError as error:
            self.failure = str(error)
        self._slots.append((whole, work))

    def finish(self) -> None:
        """Wait until everything was sent, or the group has failed."""
        for _, work in self._slots:
            self._wait(work)

    @property
    def buffers(self) -> list[Tensor]:
        """Both buffers, for reuse once nothing is in flight."""
        return [flat for flat, _ in self._slots]

    def _wait(self, work: dist.Work | None) -> None:
        if work is None or self.failure:
            return
        try:
            self._group.wait(work, self._signal.stopped)
        except SharedGroupError as error:
            self.failure = str(error)


def _names(tensors: Sequence[HFTensor], dtype: torch.dtype) -> BucketNames:
    name = str(dtype).removeprefix("torch.")
    return BucketNames(
        names=tuple(tensor.name for tensor in tensors),
        dtypes=(name,) * len(tensors),
        shapes=tuple(tuple(tensor.shape) for tensor in tensors),
        nbytes=sum(prod(tensor.shape) for tensor in tensors) * dtype.itemsize,
    )


def _packed(tensors: Sequence[tuple[str, Tensor]]) -> tuple[BucketNames, Tensor]:
    """A bucket of tensors of several dtypes, and its bytes; the widest come first, so that each is aligned."""
    tensors = sorted(tensors, key=lambda each: -each[1].element_size())
    names = BucketNames(
        names=tuple(name for name, _ in tensors),
        dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors),
        shapes=tuple(tuple(tensor.shape) for _, tensor in tensors),
        nbytes=sum(tensor.nbytes for _, tensor in tensors),
    )
    return names, torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in tensors])


def _address_towards(host: str) -> str:
    """This machine's address as seen from `host`; `host` itself if that is this machine."""
    family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        return probe.getsockname()[0]
