"""What this process computes on and communicates through: the only module that says "cuda", "nccl" and "gloo".

All other modules ask `platform()` for a device, a backend or a clock. Megatron-core is written for CUDA only;
`Platform.adapt` gives its modules a view of torch in which the calls that they make work on a CPU.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from clipo_megatron.runtime.ports import listen

# The environment variable with the GPUs that a process may use, by the numbers that the driver gives them.
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"

# Environment with which ranks on one machine meet on loopback, whatever the machine's name resolves to.
INTERFACE = "GLOO_SOCKET_IFNAME"  # the network interfaces that collectives on the CPU use
LOCAL_RENDEZVOUS_ENV = {INTERFACE: "lo", "NCCL_SOCKET_IFNAME": "lo"}


@dataclass(frozen=True)
class Platform:
    """The device of this process, and the backend of its collectives."""

    name: str  # "cuda" or "cpu"
    device: torch.device
    backend: str  # of torch.distributed: "nccl" or "gloo"

    @property
    def has_gpu(self) -> bool:
        """Whether this process has a GPU."""
        return self.name == "cuda"

    def init_process_group(
        self, rank: int, world_size: int, *, timeout_s: float, store: dist.Store | None = None
    ) -> None:
        """Join the default process group; collectives that take longer than `timeout_s` raise.

        On GPUs it has a CPU backend as well, so that small facts (lengths, verdicts) travel without the GPU.
        """
        backend = f"cuda:{self.backend},cpu:gloo" if self.has_gpu else self.backend
        dist.init_process_group(
            backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s), store=store,
            **({} if store is not None else {"init_method": "env://"}),
        )  # fmt: skip

    def host_group(self, *, timeout_s: float) -> dist.ProcessGroup:
        """Make a group of all ranks that communicates through host memory; collective.

        It is for one thread, whose collectives then need no common order with those of other threads.
        """
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def own_store(self, name: str) -> dist.Store | None:
        """Connect to the ranks' key-value store once more, for a thread; None where there is only one rank."""
        if dist.get_world_size() == 1:
            return None
        return dist.PrefixStore(name, dist.distributed_c10d._get_default_store().clone())

    def share_group(self, name: str, *, world: int, host: str, timeout_s: float) -> SharedGroup:
        """Open another process group as its rank 0; the others find it at `host` and the result's port.

        Args:
            name: the group's, the same for all members.
            world: number of members, including this one.
            host: address of this machine that the others can reach, and the only one that is listened on.
            timeout_s: limit of every wait: for the members to meet, and for each broadcast.
        """
        return SharedGroup(self, name, world=world, host=host, timeout_s=timeout_s)

    def synchronize(self) -> None:
        """Wait for queued kernels, so that a clock that is read afterwards includes them."""
        if self.has_gpu:
            torch.cuda.synchronize()

    def now(self) -> Any:
        """An event that happens when the GPU has done all that this thread has queued so far; for `copying`."""
        return torch.cuda.current_stream().record_event() if self.has_gpu else None

    @contextlib.contextmanager
    def copying(self, since: Any) -> Iterator[None]:
        """A context in which copies to host memory wait for what was queued before the event `since` (from `now`).

        Any thread may enter it. The copies run beside what was queued later, and are complete when it ends.
        """
        if not self.has_gpu:
            yield
            return
        stream = torch.cuda.Stream(self.device)
        stream.wait_event(since)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()

    def peak_memory(self) -> int:
        """The most bytes that tensors held on the GPU since the process started; on a CPU, its peak resident memory."""
        if self.has_gpu:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def rng_state(self) -> dict[str, torch.Tensor]:
        """The state of the default random number generators, for checkpoints."""
        state = {"cpu": torch.get_rng_state()}
        if self.has_gpu:
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def set_rng_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `rng_state` returned."""
        torch.set_rng_state(state["cpu"])
        if self.has_gpu and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])

    def adapt(self, package: str) -> None:
        """Make the loaded modules of `package`, a library for CUDA only, run on a CPU. Does nothing on a GPU.

        Each module's global `torch` becomes a view of torch whose `torch.cuda` stands for the CPU and whose factory
        functions take `device="cuda"` for the CPU. torch itself, and other libraries' use of it, stay as they are.
        """
        if self.has_gpu:
            return
        view = _torch_without_cuda()
        for name, module in list(sys.modules.items()):
            if (name == package or name.startswith(package + ".")) and getattr(module, "torch", None) is torch:
                module.torch = view

    @contextlib.contextmanager
    def cuda_tensor_names(self) -> Iterator[None]:
        """A context in which `.type()` and `.cuda()` of CPU tensors act as on a GPU; Megatron's optimizers use both."""
        if self.has_gpu:
            yield
            return
        original_type, original_cuda = torch.Tensor.type, torch.Tensor.cuda

        def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            answer = original_type(self, *args, **kwargs)
            if not args and not kwargs and isinstance(answer, str):
                return answer.replace("torch.", "torch.cuda.", 1)
            return answer

        torch.Tensor.type, torch.Tensor.cuda = type_, lambda self, *_, **__: self  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.Tensor.type, torch.Tensor.cuda = original_type, original_cuda  # type: ignore[method-assign]


def open_store(host: str, *, world: int, timeout_s: float) -> dist.TCPStore:
    """Open a key-value store for `world` clients, which listens on a free port of `host` and on no other address."""
    with listen(host) as listener:
        return dist.TCPStore(
            host, listener.getsockname()[1], world, is_master=True, timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False, master_listen_fd=listener.detach(),
        )  # fmt: skip


class SharedGroupError(RuntimeError):
    """Members of a shared group did not meet, or a broadcast to them failed; the group cannot be used any more."""


class SharedGroup:
    """Rank 0's end of a process group whose other members are processes of another program, such as an engine's.

    It does not depend on the default group: it has its own rendezvous, and `close` never waits for other members.
    Members may run another release of torch; only the way in which torch derives the keys of the rendezvous from the
    group's name has to agree, and it has not changed since 2.6.
    """

    def __init__(self, platform: Platform, name: str, *, world: int, host: str, timeout_s: float):
        self.name, self.world, self.host = name, world, host
        self._platform, self._timeout_s = platform, timeout_s
        self._store: dist.TCPStore | None = open_store(host, world=world, timeout_s=timeout_s)
        self.port: int = self._store.port
        self._group: Any = None
        self._works: list[dist.Work] = []

    def join(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Wait until all members have joined.

        Raises:
            SharedGroupError: they did not all join in time, or `stop` returned true.
        """
        met: list[Any] = []
        failure: list[str] = []  # as text, because the exception would keep the store alive

        def meet(store: dist.Store) -> None:
            try:
                met.append(self._connect(store))
            except BaseException as error:
                failure.append(str(error))

        # In its own thread, because it cannot be interrupted; it ends with its timeout.
        thread = threading.Thread(target=meet, args=(self._store,), name=f"join {self.name}", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.05)
            if thread.is_alive() and stop():
                raise SharedGroupError(f"group {self.name}: cancelled before its {self.world} members had met")
        if failure:
            raise SharedGroupError(f"group {self.name}: its {self.world} members did not meet: {failure[0]}")
        self._group = met[0]

    def broadcast(self, tensor: torch.Tensor) -> dist.Work:
        """Start to send a contiguous tensor to all members, as bytes; it must not change until `wait` returns."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = timedelta(seconds=self._timeout_s)
        work = self._group.broadcast([tensor.view(torch.uint8)], options)
        self._works.append(work)
        return work

    def wait(self, work: dist.Work, stop: Callable[[], bool] = lambda: False) -> None:
        """Return when a broadcast is done; on a GPU, kernels that are queued afterwards wait for it as well.

        Raises:
            SharedGroupError: it failed, it took longer than the group's timeout, or `stop` returned true.
        """
        start = time.monotonic()
        try:
            while not self._done(work):
                if stop():
                    raise SharedGroupError(f"group {self.name}: cancelled in the middle of a broadcast")
                if time.monotonic() - start > self._timeout_s + 5.0:  # its own timeout comes first
                    raise SharedGroupError(f"group {self.name}: a broadcast did not end in {self._timeout_s:.0f} s")
            work.wait()
        except SharedGroupError:
            raise
        except Exception as error:
            raise SharedGroupError(f"group {self.name}: a broadcast failed: {str(error).splitlines()[0]}") from error
        self._works.remove(work)

    def close(self) -> None:
        """Leave the group at once, even in the middle of a broadcast. Idempotent."""
        group, works, store = self._group, self._works, self._store
        self._group, self._works, self._store = None, [], None
        if group is None:
            return
        if self._platform.has_gpu:
            group.abort()
            return
        # gloo cannot interrupt a broadcast, and the group can only be freed after it: a thread waits for that.
        threading.Thread(target=_outlive, args=([group, store], works), name=f"leave {self.name}", daemon=True).start()

    def _connect(self, store: dist.Store) -> Any:
        kind = "cuda" if self._platform.has_gpu else "cpu"
        # The prefixes that `init_process_group` derives from a group's name, which the other members use.
        for prefix in (self.name, f"{self.name}/", f"{kind}/"):
            store = dist.PrefixStore(prefix, store)
        timeout = timedelta(seconds=self._timeout_s)
        if self._platform.has_gpu:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout, options.group_name = timeout, self.name
            return dist.ProcessGroupNCCL(store, 0, self.world, options)
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timeout
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self.host)]
        return dist.ProcessGroupGloo(store, 0, self.world, options)

    def _done(self, work: dist.Work) -> bool:
        if self._platform.has_gpu:
            if not work.is_completed():
                time.sleep(0.001)
            return work.is_completed()
        with contextlib.suppress(RuntimeError):  # it is not done, or it failed: the caller's `work.wait` tells
            work.wait(timedelta(milliseconds=100))
        return work.is_completed()


def _outlive(holders: list[Any], works: list[dist.Work]) -> None:
    """Free a group once none of its broadcasts is in flight."""
    for work in works:
        with contextlib.suppress(RuntimeError):
            work.wait()
    works.clear()
    holders.clear()


def are_device_names(text: str) -> bool:
    """Whether a value of `VISIBLE_DEVICES` names GPUs, or hides all. What else it may say hides them without a word."""
    hides_all = text in ("", "-1", "NoDevFiles")  # the last as Slurm spells it
    return hides_all or all(re.fullmatch(r"\d{1,4}|(GPU|MIG)-[\w/-]+", name.strip()) for name in text.split(","))


@cache
def platform() -> Platform:
    """The platform of this process: the GPU of its LOCAL_RANK if there is one, otherwise the CPU."""
    if torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        torch.cuda.set_device(index)
        return Platform("cuda", torch.device("cuda", index), "nccl")
    return Platform("cpu", torch.device("cpu"), "gloo")


class _CudaOnCpu(types.ModuleType):
    """Stands for `torch.cuda` on a machine without GPUs: synchronous, without state, with one device named "cpu"."""

    class Stream:
        """A stream on which everything is done already."""

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def wait_stream(self, *_: Any) -> None: ...

        def synchronize(self) -> None: ...

        def record_event(self, *_: Any) -> _CudaOnCpu.Stream:
            """An event that has happened already."""
            return self

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize(*_: Any) -> None: ...

    @staticmethod
    def empty_cache() -> None: ...

    @classmethod
    def current_stream(cls, *_: Any) -> Any:
        return cls.Stream()

    default_stream = current_stream

    @staticmethod
    def stream(*_: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    @staticmethod
    def get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    def __getattr__(self, name: str) -> Any:
        if name == "random":
            return self  # torch.cuda.random.get_rng_state is torch.cuda.get_rng_state
        if name == "default_generators":
            return [torch.default_generator]
        return getattr(torch.cuda, name)


@cache
def _torch_without_cuda() -> types.ModuleType:
    """A module like torch, with another `cuda`, and with factories that take `device="cuda"` for the CPU."""

    class TorchOnCpu(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    def on_cpu(factory: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cuda":
                kwargs["device"] = "cpu"
            return factory(*args, **kwargs)

        return call

    view = TorchOnCpu("torch")
    view.cuda = _CudaOnCpu("torch.cuda")  # type: ignore[attr-defined]
    for name in ("zeros", "ones", "empty", "full", "tensor", "arange"):
        setattr(view, name, on_cpu(getattr(torch, name)))
    return view
