"""An HTTP server that answers as SGLang or vLLM does, and lies as it is told: a little program without a model."""

from __future__ import annotations

import base64
import gzip
import json
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VOCABULARY, VERSION, TOKEN = 100, 3, 7
LENGTH = 4  # tokens of every honest sample
EXPERTS = 5  # of a layer
OTHERS = (8, 9)  # that could have been drawn with top-p or top-k
Change = Callable[[Any], Any]  # an honest answer -> what is sent: bytes, a `Reply`, or what becomes JSON


class Reply:
    """A lie below JSON: a status, headers, and parts of a body."""

    def __init__(self, parts: Any, status: int = 200, **headers: str):
        self.parts, self.status, self.headers = parts, status, headers


class LyingServer:
    """Answers honestly where `lies` has no change for the path.

    Attributes:
        url: its address.
        asked: how often each path was asked for.
        lies: path -> what is done to an honest answer.
    """

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}
        self.lies: dict[str, Change] = {}
        liar = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                sent = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
                liar.asked[path] = liar.asked.get(path, 0) + 1
                answer = HONEST[path](sent) if path in HONEST else {"success": True}
                if path in liar.lies:
                    answer = liar.lies[path](answer)
                self._send(answer if isinstance(answer, Reply) else Reply([_bytes(answer)]))

            do_POST = do_GET

            def _send(self, reply: Reply) -> None:
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name.replace("_", "-"), value)
                if isinstance(reply.parts, list):
                    self.send_header("Content-Length", str(sum(map(len, reply.parts))))
                else:
                    self.close_connection = True  # the body ends with the connection
                self.end_headers()
                for part in reply.parts:
                    self.wfile.write(part)

            def log_message(self, *_arguments: object) -> None:
                """Log nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # the client hangs up on a lie
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _bytes(answer: Any) -> bytes:
    return answer if isinstance(answer, bytes) else json.dumps(answer).encode()


def routes(rows: int, expert: int) -> str:
    """The same expert for each token, in both places of both layers."""
    return base64.b64encode(array("i", [expert] * (rows * 4)).tobytes()).decode()


def _sglang_sample(sent: dict[str, Any]) -> dict[str, Any]:
    meta = {
        "output_token_logprobs": [[-0.5, TOKEN, None] for _ in range(LENGTH)],
        "finish_reason": {"type": "length"},
        "weight_versions": [{"version": str(VERSION), "start": 0, "end": LENGTH}],
    }
    if sent.get("return_sampling_mask"):
        meta["output_token_sampling_mask"] = [[TOKEN, *OTHERS] for _ in range(LENGTH)]
        meta["output_token_sampling_logprobs"] = [-0.25] * LENGTH
    if sent.get("return_routed_experts"):
        inputs = sent["input_ids"][0] if isinstance(sent["rid"], list) else sent["input_ids"]
        rows = len(inputs) + LENGTH - 1 - sent["routed_experts_start_len"]
        meta["routed_experts"] = routes(rows, EXPERTS - 1)
    return {"text": "", "output_ids": [TOKEN] * LENGTH, "meta_info": meta}


def _generate(sent: dict[str, Any]) -> Any:
    return [_sglang_sample(sent) for _ in sent["rid"]] if isinstance(sent.get("rid"), list) else _sglang_sample(sent)


def _inference(sent: dict[str, Any]) -> Any:
    asked = sent["sampling_params"]
    odds = {TOKEN: -0.5, OTHERS[0]: -1.5, OTHERS[1]: -1.771}
    odds |= {token: -9999.0 for token in range(50, 47 + asked["logprobs"])}
    others = [{"token_id": token, "logprob": value, "rank": 1} for token, value in odds.items()]
    row = {"token_id": TOKEN, "logprob": -0.5, "rank": 1, "top_logprobs": others if asked["logprobs"] else []}
    choice = {
        "token_ids": [TOKEN] * LENGTH, "logprobs": {"content": [row] * LENGTH}, "finish_reason": "length",
        "stop_reason": None, "weight_versions": [{"version": str(VERSION), "start": 0, "end": LENGTH}],
    }  # fmt: skip
    return {"choices": [{"index": index, **json.loads(json.dumps(choice))} for index in range(asked["n"])]}


PARALLEL = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
HONEST: dict[str, Callable[[dict[str, Any]], Any]] = {
    "/model_info": lambda _sent: {"model_path": "m", "weight_version": str(VERSION)},
    "/server_info": lambda _sent: {
        "tp_size": 1, "version": "0.5", "random_seed": 1,
        "vllm_config": {
            "parallel_config": PARALLEL, "model_config": {"logprobs_mode": "processed_logprobs", "model": "m"},
            "scheduler_config": {"max_num_seqs": 8},
        },
    },
    "/weight_info": lambda _sent: {"weight_version": str(VERSION)},
    "/version": lambda _sent: {"version": "0.32"},
    "/metrics": lambda _sent: b"process_start_time_seconds 1.5\n",
    "/generate": _generate,
    "/inference/v1/generate": _inference,
    "/weights_checker": lambda _sent: {
        "success": True,
        "ranks": [{"parallelism_info": {"tp_rank": 0, "tp_size": 1}, "checksums": {"w": "12"}}],
    },
}  # fmt: skip


def endless(part: bytes, pause_s: float = 0.0) -> Callable[[Any], Reply]:
    """A body that does not end."""

    def parts() -> Iterator[bytes]:
        while True:
            yield part
            time.sleep(pause_s)

    return lambda _answer: Reply(parts())


def bomb(_answer: Any) -> Reply:
    """Ten thousand bytes that would become ten million."""
    return Reply([gzip.compress(b"[" + b" " * 10_000_000 + b"]")], Content_Encoding="gzip")


def at(*place: Any, becomes: Any = None, by: Change | None = None) -> Change:
    """Change one part of an answer, of its first sample if it has several: a value, or what `by` makes of it."""

    def changed(answer: Any) -> Any:
        part = answer[0] if isinstance(answer, list) else answer
        for name in place[:-1]:
            part = part[name]
        part[place[-1]] = by(part[place[-1]]) if by else becomes
        return answer

    return changed
