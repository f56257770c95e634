"""`clipo serve` with real servers: they start, fail, restart, keep their key secret, and end."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from progress import end_of, wait_until
from safetensors.torch import load_file
from served import interpreter
from tiny_models import tiny_llama

from clipo_megatron.config.schema import DType, EngineKind
from clipo_megatron.rollout.servers.registry import Registry, ServerRecord, Status
from clipo_megatron.serving.probes import Probe

KEY = "s3cret-key-of-the-tests"
UNRESPONSIVE_S = 20.0
OF_NOTHING = hashlib.sha256().hexdigest()[:16]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    # vLLM has no attention for smaller heads on a CPU
    return tiny_llama(tmp_path_factory.mktemp("model"), hidden=128, heads=4, kv_heads=2, head_dim=32)


class Serving:
    """One `clipo serve` of one server."""

    def __init__(self, folder: Path, model: Path, engine: str, *overrides: str):
        interpreter(engine)
        file = folder / "run.yaml"
        run = {
            "model": {"path": str(model), "dtype": "fp32"},
            "rollout": {"engine": engine, "sync": {"deadline_s": 60}},
            "serve": {"health_timeout_s": UNRESPONSIVE_S, "startup_timeout_s": 3600},
            "train": {"output": str(folder / "out")},
        }
        file.write_text(json.dumps(run))
        self.engine, self.said = engine, folder / "said.log"
        self.registry = Registry(folder / "out" / "servers")
        with self.said.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "clipo_megatron.cli", "serve", str(file), *overrides],
                env={**os.environ, "CLIPO_API_KEY": KEY},
                stdout=said,
                stderr=said,
            )

    @property
    def log(self) -> str:
        (file,) = (self.said.parent / "out" / "logs").iterdir()
        return file.read_text(errors="replace")

    def record(self) -> ServerRecord | None:
        found = self.registry.records()
        return found[0] if found else None

    def ready(self, besides: str = "") -> ServerRecord:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.said.read_text()
            record = self.record()
            return record is not None and record.status is Status.ready and record.boot != besides

        wait_until(is_ready, "a ready server")
        return self.record()

    def post(self, path: str, body: dict, key: str | None = KEY) -> tuple[int, dict]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(self.record().url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            return error.code, {}
        return answer.status, json.loads(text) if text.startswith(b"{") else {}

    def probe(self) -> Probe:
        return Probe(self.record().url, EngineKind(self.engine), KEY)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if (record := self.record()) is not None:
            wait_until(lambda: group(record.pid) == [], "its processes to die with it")


def group(leader: int) -> list[int]:
    """The live processes of a process group."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            state, _parent, number = (place / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        found += [int(place.name)] if int(number) == leader and state not in "ZX" else []
    return found


def command_lines(pids: list[int]) -> str:
    return "\n".join(Path(f"/proc/{pid}/cmdline").read_text(errors="replace") for pid in pids)


@pytest.mark.full
def test_an_sglang_server_through_its_life(tmp_path, model):
    serving = Serving(tmp_path, model, "sglang")
    try:
        first = serving.ready()
        request = {"input_ids": [5, 6, 7], "sampling_params": {"temperature": 0, "max_new_tokens": 4}}

        # the key is asked for, and stands nowhere
        assert serving.post("/generate", request, key=None)[0] == serving.post("/generate", request, key="x")[0] == 401
        status, answer = serving.post("/generate", request)
        assert status == 200 and len(answer["output_ids"]) == 4
        members = group(first.pid)
        assert len(members) >= 3 and KEY not in command_lines(members) and "sglang" in command_lines(members)
        assert KEY not in serving.log and KEY not in serving.said.read_text()

        # paused, it generates nothing, and its engine answers all the same: it is no case for the supervisor
        assert serving.post("/pause_generation", {"mode": "retract"})[0] == 200
        assert serving.probe().answers(10) and serving.probe().engine_answers(20)
        time.sleep(1.3 * UNRESPONSIVE_S)
        assert serving.record() == first and group(first.pid)
        assert serving.post("/continue_generation", {})[0] == 200
        assert serving.post("/generate", request)[1]["output_ids"] == answer["output_ids"]

        # its scheduler is killed: the rest of it follows, and it comes back under the same URL
        (scheduler,) = (pid for pid in members if "scheduler" in command_lines([pid]))
        os.kill(scheduler, signal.SIGKILL)
        second = serving.ready(besides=first.boot)
        assert second.url == first.url and group(first.pid) == []
        assert serving.post("/generate", request)[1]["output_ids"] == answer["output_ids"]

        # all of it is stopped: after a while it is killed and comes back
        os.killpg(second.pid, signal.SIGSTOP)
        third = serving.ready(besides=second.boot)
        assert third.url == first.url and group(second.pid) == []

        serving.process.send_signal(signal.SIGINT)
        assert end_of(serving.process) == 130
        assert group(third.pid) == [] and serving.record().status is Status.stopped
        assert KEY not in serving.log and "<redacted>" in serving.log, "SGLang prints its settings"
    finally:
        serving.close()


@pytest.mark.full
def test_a_vllm_server_with_checksums(tmp_path, model):
    serving = Serving(tmp_path, model, "vllm")
    try:
        record = serving.ready()
        assert serving.post("/v1/completions", {"prompt": [5, 6], "max_tokens": 3}, key=None)[0] == 401
        status, answer = serving.post("/v1/completions", {"prompt": [5, 6], "max_tokens": 3, "model": str(model)})
        assert status == 200 and answer["usage"]["completion_tokens"] <= 3
        assert serving.probe().engine_answers(20)
        members = group(record.pid)
        assert KEY not in command_lines(members) + serving.log

        status, answer = serving.post("/collective_rpc", {"method": "weight_checksums"})
        (rank,) = answer["results"]
        assert status == 200 and (rank["tp_rank"], rank["tp_size"]) == (0, 1)
        held = {name: value for name, value in rank["checksums"].items() if value != OF_NOTHING}
        assert held == expected_checksums(model, held)
        assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(held) and len(rank["checksums"]) > len(held)
    finally:
        serving.close()  # SIGKILL to the supervisor: nothing of the server may stay


def expected_checksums(model: Path, names) -> dict[str, str]:
    """What vLLM should hold: query, key and value in one tensor, gate and up in another."""
    weights = load_file(model / "model.safetensors")
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    found = {}
    for name in names:
        key, parts = next(((key, parts) for key, parts in fused.items() if f".{key}." in name), ("", ("",)))
        tensor = torch.cat([weights[name.replace(key, part) if key else name] for part in parts])
        if "embed" in name:  # its rows are padded to a multiple of 64
            tensor = torch.cat([tensor, tensor.new_zeros(-tensor.shape[0] % 64, tensor.shape[1])])
        found[name] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]
    return found


@pytest.mark.full
def test_an_option_that_the_engine_does_not_know(tmp_path, model):
    serving = Serving(tmp_path, model, "sglang", "sglang.no_such_option=1")
    try:
        assert end_of(serving.process) == 2
        assert "its options are wrong" in serving.said.read_text()
        assert "unrecognized arguments: --no-such-option 1" in serving.said.read_text()
        assert serving.record().status is Status.failed
    finally:
        serving.close()


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_shared_servers_start_once(servers, tiny_model, engine):
    server = servers.shared(engine, tiny_model, DType.fp32)
    assert server.alive and server is servers.shared(engine, tiny_model, DType.fp32)
