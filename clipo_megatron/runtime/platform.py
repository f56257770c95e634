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
import types
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from clipo_megatron.runtime.ports import listen

# The environment variable with the GPUs that a process may use, by the numbers that the driver gives them.
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"

# A program that prints what `Platform.collectives_version` is in another environment.
COLLECTIVES_VERSION = "import torch; print('.'.join(map(str, torch.cuda.nccl.version())))"

# Environment with which ranks on one machine meet on loopback, whatever the machine's name resolves to.
INTERFACE = "GLOO_SOCKET_IFNAME"  # the network interfaces that collectives on the CPU use
DEVICE_INTERFACE = "NCCL_SOCKET_IFNAME"  # those that collectives between GPUs use
LOCAL_RENDEZVOUS_ENV = {INTERFACE: "lo", DEVICE_INTERFACE: "lo"}


# The watchdog of a group that this program times itself may act after this time at the earliest.
_LEAST_WATCHDOG_S = 3600.0


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

    @property
    def device_uuid(self) -> str:
        """The UUID of this process's GPU, which it has in every process; "" on a CPU."""
        return str(torch.cuda.get_device_properties(self.device).uuid) if self.has_gpu else ""

    @property
    def collectives_version(self) -> str:
        """The release of the library that connects GPUs, such as "2.29.7"; "" on a CPU."""
        return ".".join(map(str, torch.cuda.nccl.version())) if self.has_gpu else ""

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

    @contextlib.contextmanager
    def device_groups(self) -> Iterator[None]:
        """A context in which new process groups communicate through the device alone.

        On GPUs they would else have the default group's second backend as well, whose ranks all connect with each
        other: with hundreds of ranks in a dozen groups that is more connections than a process may have open files.
        """
        original = dist.new_group
        if self.has_gpu and dist.get_backend() != "fake":
            dist.new_group = lambda *args, **options: original(
                *args, **options | {"backend": options.get("backend") or self.backend}
            )
        try:
            yield
        finally:
            dist.new_group = original

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

    def unbound_group(self, store: dist.Store, name: str, *, world: int, host: str, timeout_s: float) -> Any:
        """A process group of `world` members, as its rank 0, that does not belong to the default group.

        On a CPU the members connect now, within `timeout_s`, through the interface with the address `host`. On a GPU
        they do in the first collective, which then blocks. There `timeout_s` is the caller's to keep, because the
        library's own answer to a late or broken collective is to end the process.

        Args:
            store: the group's, and the members' only meeting place.
            name: the group's, the same for all members.
            world: number of members, including this one.
            host: an address of this machine.
            timeout_s: limit of every wait.
        """
        kind = "cuda" if self.has_gpu else "cpu"
        # The prefixes that `init_process_group` derives from a group's name, which the other members use.
        for prefix in (name, f"{name}/", f"{kind}/"):
            store = dist.PrefixStore(prefix, store)
        if self.has_gpu:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timedelta(seconds=max(_LEAST_WATCHDOG_S, 10 * timeout_s))
            options.group_name = name
            with _environment("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"):  # the constructor reads it
                return dist.ProcessGroupNCCL(store, 0, world, options)
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        return dist.ProcessGroupGloo(store, 0, world, options)

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        """A context for another thread, in which it queues its kernels behind those of this one."""
        if not self.has_gpu:
            return contextlib.nullcontext()
        return torch.cuda.stream(torch.cuda.current_stream())

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

    def release_cached_memory(self) -> None:
        """Hand memory that no tensor uses back to the GPU, where other processes can allocate it."""
        if self.has_gpu:
            torch.cuda.ipc_collect()  # what other processes have opened, and closed again
            torch.cuda.empty_cache()

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


def all_gather(output: torch.Tensor, tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Gather a flat tensor [n] of every rank of a group into one [ranks * n]; collective."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the latter's name before 2.12
    gather(output, tensor, group=group)


def open_store(host: str, *, world: int, timeout_s: float) -> dist.TCPStore:
    """Open a key-value store for `world` clients, which listens on a free port of `host` and on no other address."""
    with listen(host) as listener:
        return dist.TCPStore(
            host, listener.getsockname()[1], world, is_master=True, timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False, master_listen_fd=listener.detach(),
        )  # fmt: skip


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """A context in which a variable of the environment has a value, unless the user has set it."""
    ours = name not in os.environ
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if ours:
            del os.environ[name]


def are_device_names(text: str) -> bool:
    """Whether a value of `VISIBLE_DEVICES` names GPUs, or hides all. What else it may say hides them without a word."""
    hides_all = text in ("", "-1", "NoDevFiles")  # the last as Slurm spells it
    return hides_all or all(re.fullmatch(r"\d{1,4}|(GPU|MIG)-[\w/-]+", name.strip()) for name in text.split(","))


@cache
def platform() -> Platform:
    """The platform of this process: the GPU of its LOCAL_RANK if there is one, otherwise the CPU."""
    # One queue to each GPU starts kernels in the order in which they were called: communication of tensor parallelism
    # then begins before the product that it runs beside. The driver reads it when it is first used.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
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
