"""The only room that says "cuda", "nccl" and "gloo": a Platform with a CUDA and a CPU side.

Everything else asks `platform()` for a device, a backend or a clock. Megatron-core is written for CUDA alone;
`Platform.adapt` gives its modules a view of torch in which the calls they make mean something on a CPU.
"""

from __future__ import annotations

import contextlib
import os
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

# Names the GPUs that a process may use, by the numbers that the driver gives them.
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"

# Ranks on one machine meet on loopback, whatever its name resolves to.
LOCAL_RENDEZVOUS_ENV = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


@dataclass(frozen=True)
class Platform:
    """What this process computes on and talks through."""

    name: str  # "cuda" or "cpu"
    device: torch.device
    backend: str  # of torch.distributed

    @property
    def has_gpu(self) -> bool:
        """Whether kernels for GPUs can run."""
        return self.name == "cuda"

    def init_process_group(
        self, rank: int, world_size: int, *, timeout_s: float, store: dist.Store | None = None
    ) -> None:
        """Join the world; collectives that take longer than `timeout_s` raise.

        A GPU world also gets a CPU backend, so that small facts (lengths, verdicts) travel without the GPU.
        """
        backend = f"cuda:{self.backend},cpu:gloo" if self.has_gpu else self.backend
        dist.init_process_group(
            backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s), store=store,
            **({} if store is not None else {"init_method": "env://"}),
        )  # fmt: skip

    def host_group(self, *, timeout_s: float) -> dist.ProcessGroup:
        """A group of all ranks that talks through host memory, apart from every other; collective.

        For a thread: its collectives need not be in the order of other threads'.
        """
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def own_store(self, name: str) -> dist.Store | None:
        """The ranks' key-value store on a connection of its own, for a thread; None where there is one rank."""
        if dist.get_world_size() == 1:
            return None
        return dist.PrefixStore(name, dist.distributed_c10d._get_default_store().clone())

    def share_group(self, name: str, *, world: int, host: str, timeout_s: float) -> SharedGroup:
        """Open a process group beside the default one, as its rank 0; the others find it at host and the result's port.

        Args:
            name: of the group, the same for all members.
            world: number of members, this one included.
            host: address of this machine that the others reach; nothing listens on any other.
            timeout_s: for every wait of the group: to meet, and for each broadcast.
        """
        return SharedGroup(self, name, world=world, host=host, timeout_s=timeout_s)

    def synchronize(self) -> None:
        """Wait for queued kernels, so that a clock read afterwards tells the truth."""
        if self.has_gpu:
            torch.cuda.synchronize()

    def now(self) -> Any:
        """What this thread has queued so far, for `copying`."""
        return torch.cuda.current_stream().record_event() if self.has_gpu else None

    @contextlib.contextmanager
    def copying(self, since: Any) -> Iterator[None]:
        """Within, in any thread, copies to host memory hold what was queued until `since = now()`, and run beside what
        was queued later; at the end they are done."""
        if not self.has_gpu:
            yield
            return
        stream = torch.cuda.Stream(self.device)
        stream.wait_event(since)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()

    def peak_memory(self) -> int:
        """Bytes: the most that tensors held on the GPU, or this process in main memory; since its start."""
        if self.has_gpu:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def rng_state(self) -> dict[str, torch.Tensor]:
        """State of the default generators, for checkpoints."""
        state = {"cpu": torch.get_rng_state()}
        if self.has_gpu:
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def set_rng_state(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `rng_state`."""
        torch.set_rng_state(state["cpu"])
        if self.has_gpu and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])

    def adapt(self, package: str) -> None:
        """Make the loaded modules of `package` (a CUDA-only library) run here. Does nothing where CUDA is present.

        Each module's global `torch` becomes a view of torch whose `torch.cuda` answers for the CPU and whose factory
        functions put `device="cuda"` on the CPU. torch itself, and every other library's view of it, stay as they are.
        """
        if self.has_gpu:
            return
        view = _torch_without_cuda()
        for name, module in list(sys.modules.items()):
            if (name == package or name.startswith(package + ".")) and getattr(module, "torch", None) is torch:
                module.torch = view

    @contextlib.contextmanager
    def cuda_tensor_names(self) -> Iterator[None]:
        """Within, CPU tensors answer `.type()` and `.cuda()` as CUDA ones do: Megatron's optimizers ask for both."""
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
    """A key-value store of this process for `world` clients, at a free port of `host` and of no other address."""
    with listen(host) as listener:
        return dist.TCPStore(
            host, listener.getsockname()[1], world, is_master=True, timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False, master_listen_fd=listener.detach(),
        )  # fmt: skip


class SharedGroupError(RuntimeError):
    """Members of a shared group did not meet, or a broadcast to them broke off; the group is of no further use."""


class SharedGroup:
    """Rank 0's end of a process group whose other members are processes of another program, such as an engine's.

    It owes nothing to the default group: it has a rendezvous of its own, and `close` never waits, whatever became of
    the others. Members in another release of torch may join; what has to agree is how torch derives the keys of the
    rendezvous from the group's name, and that is the same from 2.6 on.
    """

    def __init__(self, platform: Platform, name: str, *, world: int, host: str, timeout_s: float):
        self.name, self.world, self.host = name, world, host
        self._platform, self._timeout_s = platform, timeout_s
        self._store: dist.TCPStore | None = open_store(host, world=world, timeout_s=timeout_s)
        self.port: int = self._store.port
        self._group: Any = None
        self._works: list[dist.Work] = []

    def join(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Meet the others.

        Raises:
            SharedGroupError: they did not all come in time, or `stop` said that nobody waits for this any more.
        """
        met: list[Any] = []
        failure: list[str] = []  # as text: the error itself would hold what it failed with

        def meet(store: dist.Store) -> None:
            try:
                met.append(self._connect(store))
            except BaseException as error:
                failure.append(str(error))

        # In a thread of its own, because there is no way to interrupt it: it ends with its timeout.
        thread = threading.Thread(target=meet, args=(self._store,), name=f"join {self.name}", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.05)
            if thread.is_alive() and stop():
                raise SharedGroupError(f"group {self.name}: given up before its {self.world} members had met")
        if failure:
            raise SharedGroupError(f"group {self.name}: its {self.world} members did not meet: {failure[0]}")
        self._group = met[0]

    def broadcast(self, tensor: torch.Tensor) -> dist.Work:
        """Start to send a contiguous tensor to all members, as bytes; it must stay as it is until `wait` returns."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = timedelta(seconds=self._timeout_s)
        work = self._group.broadcast([tensor.view(torch.uint8)], options)
        self._works.append(work)
        return work

    def wait(self, work: dist.Work, stop: Callable[[], bool] = lambda: False) -> None:
        """Return when a broadcast is done; on a GPU the kernels that follow wait for it as well.

        Raises:
            SharedGroupError: it broke off, it took longer than the group's timeout, or `stop` said to give up.
        """
        start = time.monotonic()
        try:
            while not self._done(work):
                if stop():
                    raise SharedGroupError(f"group {self.name}: given up in the middle of a broadcast")
                if time.monotonic() - start > self._timeout_s + 5.0:  # its own timeout comes first
                    raise SharedGroupError(f"group {self.name}: no end of a broadcast in {self._timeout_s:.0f} s")
            work.wait()
        except SharedGroupError:
            raise
        except Exception as error:
            raise SharedGroupError(f"group {self.name}: a broadcast broke off: {str(error).splitlines()[0]}") from error
        self._works.remove(work)

    def close(self) -> None:
        """Leave at once, also in the middle of a broadcast. Idempotent."""
        group, works, store = self._group, self._works, self._store
        self._group, self._works, self._store = None, [], None
        if group is None:
            return
        if self._platform.has_gpu:
            group.abort()
            return
        # gloo cannot interrupt what is in flight, and its group can only be freed afterwards: others wait for that.
        threading.Thread(target=_outlive, args=([group, store], works), name=f"leave {self.name}", daemon=True).start()

    def _connect(self, store: dist.Store) -> Any:
        kind = "cuda" if self._platform.has_gpu else "cpu"
        # What torch's own way to a group from an address makes of its name.
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
        with contextlib.suppress(RuntimeError):  # not yet, or it broke off: the caller's wait says which
            work.wait(timedelta(milliseconds=100))
        return work.is_completed()


def _outlive(holders: list[Any], works: list[dist.Work]) -> None:
    """Drop a group once nothing of it is in flight."""
    for work in works:
        with contextlib.suppress(RuntimeError):
            work.wait()
    works.clear()
    holders.clear()


@cache
def platform() -> Platform:
    """The platform of this process: its GPU (chosen by LOCAL_RANK) where there is one, else the CPU."""
    if torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        torch.cuda.set_device(index)
        return Platform("cuda", torch.device("cuda", index), "nccl")
    return Platform("cpu", torch.device("cpu"), "gloo")


class _CudaOnCpu(types.ModuleType):
    """Stands for `torch.cuda` on a machine without it: synchronous, stateless, one device named "cpu"."""

    class Stream:
        """A stream that everything is already done on."""

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def wait_stream(self, *_: Any) -> None: ...

        def synchronize(self) -> None: ...

        def record_event(self, *_: Any) -> _CudaOnCpu.Stream:
            """An event that has happened."""
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
    """A module that is torch but for its `cuda` and the factories that are given `device="cuda"`."""

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
