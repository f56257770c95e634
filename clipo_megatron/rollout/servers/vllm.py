"""Client of one vLLM server, through its OpenAI completions with token ids and the calls of its development mode."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from clipo_megatron.rollout.engine import InFlight, Memory, SamplingParams
from clipo_megatron.rollout.servers.http_server import Call, HttpServer, left, rank_checksums
from clipo_megatron.rollout.servers.response_checks import BadAnswer, Continuation, checked, version_number
from clipo_megatron.rollout.servers.server import Fault, RankChecksums, ServerError, ServerState

_START_TIME = re.compile(r"^process_start_time_seconds (\S+)", re.MULTILINE)
_PAUSE_MODE = {InFlight.abort: "abort", InFlight.retract: "keep"}
_EMPTY_CACHE_S = 0.2  # between two attempts to empty the prefix cache


class VLLMServer(HttpServer):
    """The `Server` protocol for vLLM (0.32), started with VLLM_SERVER_DEV_MODE=1.

    Weights come through a folder. Log-probs are asked of the engine as it was started: `--logprobs-mode
    processed_logprobs` gives those of the temperature-scaled policy. They are renormalised over what top-p and top-k
    left, so those have to be off unless the temperature is 1 under the default mode, `raw_logprobs`; greedy ones are
    those of temperature 1 in both modes. What does not fit is refused.
    """

    def __init__(self, url: str, **kwargs: Any):
        super().__init__(url, **kwargs)
        self._model = ""  # as it calls the model
        self._logprobs_mode: str | None = None

    # --- what it is ----------------------------------------------------------------------------------------------

    async def state(self, *, deadline_s: float) -> ServerState:
        """What it is; also says that it answers."""
        deadline = time.monotonic() + deadline_s
        version = await self._version(deadline)
        info = await self._http.get("/server_info", deadline_s=left(deadline), config_format="json")
        models = await self._http.get("/v1/models", deadline_s=left(deadline))
        release = await self._http.get("/version", deadline_s=left(deadline))
        metrics = await self._http.get_text("/metrics", deadline_s=left(deadline))
        try:
            parallel = info["vllm_config"]["parallel_config"]
            tp = int(parallel["tensor_parallel_size"]) * int(parallel["pipeline_parallel_size"])
            self._logprobs_mode = str(info["vllm_config"]["model_config"]["logprobs_mode"])
            path = str(info["vllm_config"]["model_config"]["model"])
            self._model = str(models["data"][0]["id"])
            engine = f"vLLM {release['version']}"
        except (KeyError, IndexError, TypeError, ValueError):
            raise self._http.fail(Fault.garbage, "/server_info or /v1/models lacks what describes it") from None
        started = _START_TIME.search(metrics)
        return ServerState(path, tp, None if version < 0 else version, started[1] if started else "", engine)

    async def health(self, *, deadline_s: float) -> None:
        """Return when its engine runs."""
        await self._http.get("/health", deadline_s=deadline_s)

    async def _version(self, deadline: float) -> int:
        answer = await self._http.get("/weight_info", deadline_s=left(deadline))
        return version_number(answer.get("weight_version") if isinstance(answer, dict) else None)

    # --- generation ----------------------------------------------------------------------------------------------

    async def _pieces(self, call: Call) -> list[Continuation]:
        # Its answer has no version. Weights change only when nothing runs, and a restarted server has lost its
        # version: what holds before and after held in between.
        before = await self._version(call.end)

        def read(answer: Any) -> list[Continuation]:
            try:
                choices = sorted(answer["choices"], key=lambda choice: choice["index"])
                if [choice["index"] for choice in choices] != list(range(len(call.ids))):
                    raise BadAnswer(f"{len(choices)} samples instead of {len(call.ids)}")
                return [_piece(choice, call, before) for choice in choices]
            except (KeyError, TypeError):
                raise BadAnswer("samples without ids, log-probs or finish reason") from None

        body = _completions_body(self._model, call)
        try:
            pieces = await self._http.post_and_read("/v1/completions", body, read, deadline_s=call.left_s)
        except BadAnswer as reason:
            raise self._http.fail(Fault.garbage, f"/v1/completions answered {reason}") from None
        after = await self._version(call.end)
        if before != after or after < call.version:
            raise self._http.fail(Fault.stale, f"it answered with weights of version {after}, not {call.version}")
        return pieces

    async def _accept(self, params: SamplingParams, deadline_s: float) -> None:
        """Refuse parameters under which the engine's log-probs would not be the policy's."""
        if not self._model:
            await self.state(deadline_s=deadline_s)
        if params.temperature == 0 or not params.exact_logprobs:
            return
        truncated = params.top_p < 1 or params.top_k > 0
        processed = self._logprobs_mode == "processed_logprobs"
        if processed and truncated:
            raise self._http.fail(
                Fault.unsupported,
                "under --logprobs-mode processed_logprobs its log-probs are renormalised over what top_p and top_k "
                "left; set rollout.top_p=1 and rollout.top_k=0, or use the engine sglang",
            )
        if not processed and params.temperature != 1:
            raise self._http.fail(
                Fault.unsupported,
                f"with --logprobs-mode {self._logprobs_mode} its log-probs are those of temperature 1, not "
                f"{params.temperature}; start it with --logprobs-mode processed_logprobs",
            )

    async def abort(self, ids: Sequence[str] | None = None, *, deadline_s: float) -> None:
        """End the generation of the given ids, or all of it; the id of a request's first sample ends all of them."""
        # An id has a prefix and the place among the prompts of a call added to it.
        named = [] if ids is None else [f"cmpl-{each}-0" for each in ids]
        if ids is None or named:
            await self._http.post("/abort_requests", {"request_ids": named}, deadline_s=deadline_s)

    async def pause(self, in_flight: InFlight, *, deadline_s: float) -> None:
        """Generate nothing until `resume`."""
        await self._http.post("/pause", deadline_s=deadline_s, mode=_PAUSE_MODE[in_flight])

    async def resume(self, *, deadline_s: float) -> None:
        """Go on."""
        await self._http.post("/resume", deadline_s=deadline_s)

    # --- memory --------------------------------------------------------------------------------------------------

    async def offload(self, what: Sequence[Memory], *, deadline_s: float) -> None:
        """Give GPU memory back; needs a server started with --enable-sleep-mode. Weights take the cache with them."""
        deadline = time.monotonic() + deadline_s
        boot = (await self.state(deadline_s=deadline_s)).boot
        missing = self._memory.to_release(what, boot)
        if Memory.weights in missing:
            await self._http.post("/sleep", deadline_s=left(deadline), level="2")
            self._memory.released(tuple(Memory))
        elif missing:
            await self._http.post("/release_kv_cache_memory", deadline_s=left(deadline))
            self._memory.released(missing)

    async def onload(self, what: Sequence[Memory], *, deadline_s: float) -> None:
        """Take it again; it generates once it has all."""
        deadline = time.monotonic() + deadline_s
        boot = (await self.state(deadline_s=deadline_s)).boot
        for each in self._memory.to_restore(what, boot):
            await self._http.post("/wake_up", deadline_s=left(deadline), tags=each.value)
            self._memory.restored([each])

    # --- weights -------------------------------------------------------------------------------------------------

    async def load_folder(self, folder: str, version: int, *, deadline_s: float) -> None:
        """Read all weights from safetensors."""
        deadline = time.monotonic() + deadline_s
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        await self._http.post("/collective_rpc", body, deadline_s=left(deadline))
        try:
            await self._http.post("/collective_rpc", {"method": "repack_output_layer"}, deadline_s=left(deadline))
        except ServerError as error:
            if error.fault is not Fault.status:  # without the extension; only a server on a CPU needs it
                raise
        await self.end_update(version, deadline_s=left(deadline))

    async def end_update(self, version: int, *, deadline_s: float) -> None:
        """Caches are empty, and the server knows its version."""
        deadline = time.monotonic() + deadline_s
        while True:  # blocks of requests that have just ended may still be held
            answer = await self._http.post("/reset_prefix_cache", deadline_s=left(deadline))
            if not isinstance(answer, dict) or answer.get("success", True):
                break
            await asyncio.sleep(_EMPTY_CACHE_S)
        body = {"new_version": str(version)}
        await self._http.post("/update_weight_version", body, deadline_s=left(deadline))

    async def checksums(self, *, deadline_s: float) -> list[RankChecksums]:
        """Of the weights as they are in its memory, by the worker extension that `clipo serve` loads into it."""
        try:
            answer = await self._http.post("/collective_rpc", {"method": "weight_checksums"}, deadline_s=deadline_s)
        except ServerError as error:
            if error.fault is not Fault.status:
                raise
            raise self._lacks("checksums; start it with `clipo serve`, which loads the extension for them") from error
        try:
            found = [rank_checksums(rank, rank["checksums"]) for rank in answer["results"]]
        except (KeyError, TypeError, AttributeError, ValueError):
            raise self._http.fail(Fault.garbage, "weight_checksums answered no checksums") from None
        return found


def _completions_body(model: str, call: Call) -> dict[str, Any]:
    params = call.params
    return {
        "model": model,
        "request_id": call.ids[0],
        "prompt": call.inputs,
        "n": len(call.ids),
        "max_tokens": call.budget,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        # The server's own defaults come from the model's generation_config.json.
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(params.stop_ids),
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": True,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def _piece(choice: dict[str, Any], call: Call, version: int) -> Continuation:
    tokens, logprobs = choice["token_ids"], choice["logprobs"]
    if logprobs is None and not tokens:
        logprobs = {"token_logprobs": [], "tokens": []}
    if logprobs["tokens"] != [f"token_id:{token}" for token in tokens]:
        raise BadAnswer("log-probs of other tokens than the ids it gave")
    return checked(
        tokens,
        logprobs["token_logprobs"],
        np.full(len(tokens), version, dtype=np.int64),
        choice["text"],
        finish=choice["finish_reason"],
        matched=choice.get("stop_reason"),
        budget=call.budget,
        stop_ids=call.params.stop_ids,
    )
