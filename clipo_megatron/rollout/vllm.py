"""Client of one vLLM server, through its OpenAI completions with token ids and the calls of its development mode."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np

from clipo_megatron.flow import Rollout
from clipo_megatron.rollout.answers import (
    BadAnswer,
    Decode,
    Piece,
    checked,
    joined,
    missing_samples,
    settled,
    version_number,
)
from clipo_megatron.rollout.engine import InFlight, Memory, Request, SamplingParams
from clipo_megatron.rollout.http import JsonClient, together
from clipo_megatron.rollout.released import Released
from clipo_megatron.rollout.server import (
    BucketNames,
    Fault,
    RankChecksums,
    ServerError,
    ServerState,
    UpdateGroup,
    sample_id,
)

_START_TIME = re.compile(r"^process_start_time_seconds (\S+)", re.MULTILINE)
_PAUSE_MODE = {InFlight.abort: "abort", InFlight.retract: "keep"}
_EMPTY_CACHE_S = 0.2  # between two attempts to empty the prefix cache


class VLLMServer:
    """The `Server` protocol for vLLM (0.32), started with VLLM_SERVER_DEV_MODE=1.

    Weights come through a folder. Log-probs are asked of the engine as it was started: `--logprobs-mode
    processed_logprobs` gives those of the temperature-scaled policy. They are renormalised over what top-p and top-k
    left, so those have to be off unless the temperature is 1 under the default mode, `raw_logprobs`; greedy ones are
    those of temperature 1 in both modes. What does not fit is refused.

    Args:
        url: of the server.
        api_key_env: environment variable with its key.
        decode: token ids to text without special tokens; None: the engine's text, of the last piece.
        routed: whether the URL is that of a router; makes no difference.
    """

    keeps_unfinished = True

    def __init__(self, url: str, *, api_key_env: str = "", decode: Decode | None = None, routed: bool = False):
        self._http = JsonClient(url, api_key_env)
        self._decode = decode
        self._model = ""  # as it calls the model
        self._logprobs_mode: str | None = None
        self._memory = Released()

    @property
    def url(self) -> str:
        """Of the server."""
        return self._http.url

    # --- what it is ----------------------------------------------------------------------------------------------

    async def state(self, *, deadline_s: float) -> ServerState:
        """What it is; also says that it answers."""
        deadline = time.monotonic() + deadline_s
        version = await self._version(deadline)
        info = await self._http.get("/server_info", deadline_s=_left(deadline), config_format="json")
        models = await self._http.get("/v1/models", deadline_s=_left(deadline))
        release = await self._http.get("/version", deadline_s=_left(deadline))
        metrics = await self._http.get_text("/metrics", deadline_s=_left(deadline))
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
        answer = await self._http.get("/weight_info", deadline_s=_left(deadline))
        return version_number(answer.get("weight_version") if isinstance(answer, dict) else None)

    # --- generation ----------------------------------------------------------------------------------------------

    async def generate(
        self, request: Request, params: SamplingParams, *, version: int, name: str, deadline_s: float
    ) -> list[Rollout]:
        """All rollouts of one request; see `Server.generate`."""
        deadline = time.monotonic() + deadline_s
        if not self._model:
            await self.state(deadline_s=_left(deadline))
        self._check_logprobs(params)
        done = {rollout.sample: rollout for rollout in request.begun}
        calls: list[Coroutine[Any, Any, list[Rollout]]] = []
        prompt = request.prompt.tokens.tolist()
        if fresh := missing_samples(request, params):
            calls.append(self._call(prompt, [(sample, None) for sample in fresh], params, version, name, deadline))
        for rollout in request.begun:
            if (finished := settled(rollout, params)) is not None:
                done[rollout.sample] = finished
            else:
                begun = prompt + rollout.tokens.tolist()
                calls.append(self._call(begun, [(rollout.sample, rollout)], params, version, name, deadline))
        for rollouts in await together(calls):
            done |= {rollout.sample: rollout for rollout in rollouts}
        return [done[sample] for sample in sorted(done)]

    async def _call(
        self,
        inputs: list[int],
        samples: Sequence[tuple[int, Rollout | None]],
        params: SamplingParams,
        version: int,
        name: str,
        deadline: float,
    ) -> list[Rollout]:
        first, begun = samples[0]
        budget = params.max_new_tokens - (0 if begun is None else begun.tokens.numel())
        body = _completions_body(self._model, inputs, len(samples), params, budget)
        # Its answer has no version. Weights change only when nothing runs, and a restarted server has lost its
        # version: what holds before and after held in between.
        body["request_id"] = sample_id(name, first)
        before = await self._version(deadline)

        def read(answer: Any) -> list[Piece]:
            try:
                choices = sorted(answer["choices"], key=lambda choice: choice["index"])
                if [choice["index"] for choice in choices] != list(range(len(samples))):
                    raise BadAnswer(f"{len(choices)} samples instead of {len(samples)}")
                return [_piece(choice, params, budget, before) for choice in choices]
            except (KeyError, TypeError):
                raise BadAnswer("samples without ids, log-probs or finish reason") from None

        try:
            left = _left(deadline)
            pieces = await self._http.post_and_read("/v1/completions", body, read, deadline_s=left)
            after = await self._version(deadline)
            if before != after or after < version:
                raise self._http.fail(Fault.stale, f"it answered with weights of version {after}, not {version}")
            found = [
                joined(begun, piece, sample, self._decode)
                for piece, (sample, begun) in zip(pieces, samples, strict=True)
            ]
        except BadAnswer as reason:
            raise self._http.fail(Fault.garbage, f"/v1/completions answered {reason}") from None
        return [rollout for rollout in found if rollout is not None]

    def _check_logprobs(self, params: SamplingParams) -> None:
        """Refuse parameters under which the engine's log-probs would not be the policy's."""
        if params.temperature == 0:
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

    async def release_memory(self, what: Sequence[Memory], *, deadline_s: float) -> None:
        """Give GPU memory back; needs a server started with --enable-sleep-mode. Weights take the cache with them."""
        deadline = time.monotonic() + deadline_s
        boot = (await self.state(deadline_s=deadline_s)).boot
        missing = self._memory.to_release(what, boot)
        if Memory.weights in missing:
            await self._http.post("/sleep", deadline_s=_left(deadline), level="2")
            self._memory.released(tuple(Memory))
        elif missing:
            await self._http.post("/release_kv_cache_memory", deadline_s=_left(deadline))
            self._memory.released(missing)

    async def restore_memory(self, what: Sequence[Memory], *, deadline_s: float) -> None:
        """Take it again; it generates once it has all."""
        deadline = time.monotonic() + deadline_s
        boot = (await self.state(deadline_s=deadline_s)).boot
        for each in self._memory.to_restore(what, boot):
            await self._http.post("/wake_up", deadline_s=_left(deadline), tags=each.value)
            self._memory.restored([each])

    # --- weights -------------------------------------------------------------------------------------------------

    async def load_folder(self, folder: str, version: int, *, deadline_s: float) -> None:
        """Read all weights from safetensors."""
        deadline = time.monotonic() + deadline_s
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        await self._http.post("/collective_rpc", body, deadline_s=_left(deadline))
        try:
            await self._http.post("/collective_rpc", {"method": "repack_output_layer"}, deadline_s=_left(deadline))
        except ServerError as error:
            if error.fault is not Fault.status:  # without the extension; only a server on a CPU needs it
                raise
        await self.end_update(version, deadline_s=_left(deadline))

    async def end_update(self, version: int, *, deadline_s: float) -> None:
        """Caches are empty, and the server knows its version."""
        deadline = time.monotonic() + deadline_s
        while True:  # blocks of requests that have just ended may still be held
            answer = await self._http.post("/reset_prefix_cache", deadline_s=_left(deadline))
            if not isinstance(answer, dict) or answer.get("success", True):
                break
            await asyncio.sleep(_EMPTY_CACHE_S)
        body = {"new_version": str(version)}
        await self._http.post("/update_weight_version", body, deadline_s=_left(deadline))

    async def checksums(self, *, deadline_s: float) -> list[RankChecksums]:
        """Of the weights as they are in its memory, by the worker extension that `clipo serve` loads into it."""
        try:
            answer = await self._http.post("/collective_rpc", {"method": "weight_checksums"}, deadline_s=deadline_s)
        except ServerError as error:
            if error.fault is not Fault.status:
                raise
            raise self._lacks("checksums; start it with `clipo serve`, which loads the extension for them") from error
        try:
            found = [
                RankChecksums(
                    int(rank["tp_rank"]),
                    int(rank["tp_size"]),
                    {str(name): str(value) for name, value in rank["checksums"].items()},
                )
                for rank in answer["results"]
            ]
        except (KeyError, TypeError, AttributeError, ValueError):
            raise self._http.fail(Fault.garbage, "weight_checksums answered no checksums") from None
        return found

    async def join_group(self, group: UpdateGroup, *, rank_offset: int, deadline_s: float) -> None:
        """Not of this engine."""
        raise self._lacks("process groups for weights; set rollout.sync.transport=disk")

    async def leave_group(self, name: str, *, deadline_s: float) -> None:
        """Not of this engine."""
        raise self._lacks("process groups for weights; set rollout.sync.transport=disk")

    async def begin_update(self, *, deadline_s: float) -> None:
        """Nothing to do before a folder is read."""

    async def receive_bucket(self, group: str, bucket: BucketNames, *, deadline_s: float) -> None:
        """Not of this engine."""
        raise self._lacks("buckets of weights; set rollout.sync.transport=disk")

    async def receive_handles(self, handles: Sequence[bytes], *, deadline_s: float) -> None:
        """Not of this engine."""
        raise self._lacks("handles of weights; set rollout.sync.transport=disk")

    async def close(self) -> None:
        """Close the client's connections; the server goes on."""
        await self._http.close()

    def _lacks(self, what: str) -> ServerError:
        return self._http.fail(Fault.unsupported, f"vLLM is not asked for {what}")


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _completions_body(model: str, inputs: list[int], count: int, params: SamplingParams, budget: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": inputs,
        "n": count,
        "max_tokens": budget,
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


def _piece(choice: dict[str, Any], params: SamplingParams, budget: int, version: int) -> Piece:
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
        budget=budget,
        stop_ids=params.stop_ids,
    )
