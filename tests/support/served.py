"""Real servers for tests, started like those of `clipo serve`: shared ones, and ones that a test may harm.

`make test` sets up the engines' environments before pytest starts. Without them the tests fail, or are skipped with
CLIPO_TESTS_WITHOUT_ENGINES=1.
"""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
from progress import wait_until

from clipo_megatron.config.schema import (
    DataConfig,
    DType,
    EngineKind,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    ServeConfig,
    SyncConfig,
)
from clipo_megatron.runtime.ports import free_port
from clipo_megatron.serving.commands import ServerSlot, server_command, url
from clipo_megatron.serving.environment import RECIPES
from clipo_megatron.serving.probes import Probe
from clipo_megatron.serving.process import ServerProcess

WITHOUT = "CLIPO_TESTS_WITHOUT_ENGINES"
MAX_SHARED = 3  # servers kept for later tests; one of SmolLM2 takes 2 to 3 GB
# Of the models that SGLang knows, servers of tests import these; importing all of them takes a fifth of a start.
SGLANG_MODELS = {"llama", "qwen2", "qwen3", "qwen3_moe"}


def interpreter(engine: str) -> Path:
    """The Python of the engine's environment."""
    recipe = RECIPES[engine]
    if not recipe.is_ready:
        if os.environ.get(WITHOUT) == "1":
            pytest.skip(f"{engine} has no environment here, and {WITHOUT}=1 allows that")
        pytest.fail(f"{recipe.folder} is not there: `make engines` sets it up; {WITHOUT}=1 skips what needs it")
    if engine == "sglang":
        known = {path.stem for path in recipe.folder.glob("lib/python*/site-packages/sglang/srt/models/*.py")}
        os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(sorted(known - SGLANG_MODELS - {"registry"}))
    return recipe.python


class Served:
    """One server of an engine, on loopback.

    Args:
        engine: "sglang" or "vllm".
        model: the model's folder.
        dtype: dtype of the weights.
        options: the engine's options, as in the configuration section of its name.
        key: the API key that clients must send.
        delta: whether it is started for `rollout.sync.delta`.
    """

    def __init__(
        self,
        engine: str,
        model: str | Path,
        dtype: DType = DType.bf16,
        options: dict[str, Any] | None = None,
        key: str | None = None,
        delta: bool = False,
    ):
        self.engine, self.model, self.dtype, self.key = engine, Path(model), dtype, key
        self.folder = Path(tempfile.mkdtemp(prefix=f"served-{engine}-"))
        self.port, self.process = free_port(), None
        self.url = url("127.0.0.1", self.port)
        self.probe = Probe(self.url, EngineKind(engine), key)
        self.config = RunConfig(
            model=ModelConfig(path=str(model)),
            data=DataConfig(max_prompt_tokens=512),
            rollout=RolloutConfig(engine=EngineKind(engine), max_new_tokens=1024, sync=SyncConfig(delta=delta)),
            serve=ServeConfig(dtype=dtype),
            **{engine: options or {}},
        )

    @property
    def log(self) -> str:
        """The output so far."""
        file = self.folder / "server.log"
        return file.read_text(errors="replace") if file.exists() else ""

    @property
    def alive(self) -> bool:
        """Whether its leader runs and answers."""
        return self.process is not None and self.process.exit_code() is None and self.probe.answers(5.0)

    def begin(self) -> Served:
        """Start it, on the same port each time, without waiting until it is ready."""
        assert self.process is None or self.process.exit_code() is not None, "it is running"
        python = interpreter(self.engine)
        command = server_command(
            self.config, ServerSlot(0, self.port), python=python, key=self.key, scratch=self.folder
        )
        self.process = ServerProcess(command, self.folder / "server.log", secrets=[self.key] if self.key else [])
        return self

    def wait(self) -> Served:
        """Wait until it generates."""

        def generates() -> bool:
            assert self.process.exit_code() is None, f"the server ended:\n{self.process.tail()}"
            return self.probe.generates(10.0)

        wait_until(generates, "the server to generate", self.process.members, story=self.process.tail)
        return self

    def start(self) -> Served:
        """Start it and wait until it generates."""
        try:
            return self.begin().wait()
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """Send SIGKILL to all its processes and wait until they are gone."""
        if self.process is not None:
            self.process.kill()

    def suspend(self) -> None:
        """Send SIGSTOP to all its processes."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Send SIGCONT to all its processes."""
        os.killpg(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        self.kill()


class Servers:
    """The servers of a test session."""

    def __init__(self):
        self._shared: dict[tuple, Served] = {}
        self._own: list[Served] = []

    def shared(
        self,
        engine: str,
        model: str | Path,
        dtype: DType = DType.bf16,
        options: dict[str, Any] | None = None,
        delta: bool = False,
    ) -> Served:
        """The session's server of that kind, started at the first call. A test may change only its weights, and loads
        the weights that it relies on.

        The other shared servers stand still until they are asked for: an SGLang server whose generation is paused takes
        a whole core.
        """
        key = (engine, str(model), dtype, repr(sorted((options or {}).items())), delta)
        found = self._shared.pop(key, None)
        for other in self._shared.values():
            other.suspend()
        if found is not None:
            found.resume()
        if found is not None and not found.alive:
            found.stop()
            found = None
        while len(self._shared) >= MAX_SHARED:
            self._shared.pop(next(iter(self._shared))).stop()
        self._shared[key] = (
            found or Served(engine, model, dtype, options, delta=delta).start()
        )  # the last used comes last
        return self._shared[key]

    def own(self, *args: Any, **kwargs: Any) -> Served:
        """A server of the caller's own, not started yet; it is killed at the end of the session if it still runs."""
        self._own = [each for each in self._own if each.process is None or each.process.members()]
        self._own.append(Served(*args, **kwargs))
        return self._own[-1]

    def close(self) -> None:
        """Kill all servers."""
        for each in (*self._shared.values(), *self._own):
            each.stop()
        self._shared.clear()
        self._own.clear()
