"""The only room that says "cuda", "nccl" and "gloo": a Platform with a CUDA and a CPU side.

Everything else asks `platform()` for a device, a backend or a clock. Megatron-core is written for CUDA alone;
`Platform.adapt` gives its modules a view of torch in which the calls they make mean something on a CPU.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

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

    def synchronize(self) -> None:
        """Wait for queued kernels, so that a clock read afterwards tells the truth."""
        if self.has_gpu:
            torch.cuda.synchronize()

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
