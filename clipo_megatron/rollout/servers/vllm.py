"""The client of one vLLM server, over its call for token ids and the calls of its development mode."""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from math import exp
from typing import Any

from clipo_megatron.rollout.engine import InFlight, Memory, SamplingParams
from clipo_megatron.rollout.servers.http import CHECKSUM_BYTES, all_or_none
from clipo_megatron.rollout.servers.http_server import Call, HttpServer, rank_checksums, seconds_until
from clipo_megatron.rollout.servers.response_checks import (
    BadAnswer,
    Continuation,
    checked,
    number_of,
    version_number,
    versions_of_spans,
)
from clipo_megatron.rollout.servers.server import (
    BucketNames,
    Fault,
    RankChecksums,
    ServerError,
    ServerState,
    UpdateGroup,
)

_START_TIME = re.compile(r"^process_start_time_seconds (\S{1,64})", re.MULTILINE)
# With "keep" a server takes the memory of the cache from its requests (vllm/v1/engine/core.py: `_finish_pause`), which
# compute it again when they go on: what SGLang calls retract.
_PAUSE_MODE = {InFlight.abort: "abort", InFlight.retract: "keep"}
_GENERATE = "/inference/v1/generate"  # unlike /v1/completions its answers name the version of each token
_EMPTY_CACHE_EVERY_S = 0.2
_CUT_OFF = -9000.0  # it writes -9999 as the log-prob of tokens that are not kept
_MISSING_MASS = 1e-3


class VLLMServer(HttpServer):
    """The `Server` protocol for vLLM (0.32), started with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out.

    Weights arrive through a folder, or, on a server of `clipo serve`, in buckets, which calls of the extension that it
    loads receive. Which log-probs the engine reports depends on how it was started:

    - `--logprobs-mode processed_logprobs`: of the temperature-scaled policy, renormalised over the tokens that top-p
      and top-k keep. It is then asked for as many of the likeliest tokens as may be kept, of which those that are not
      have no probability; `--max-logprobs` bounds how many it names;
    - `raw_logprobs`, the default: of temperature 1, so the temperature must be 1, and top-p and top-k off.

    Greedy sampling has log-probs of temperature 1 in both modes. Other parameters are refused.
    """

    def __init__(self, url: str, **kwargs: Any):
        super().__init__(url, **kwargs)
        self._logprobs_mode: str | None = None  # None: the server was not asked yet
        self._most_samples = 1  # of one call: as many as the server computes at once
        self._keeps_tensors = False  # whether the extension was told to, since when it loads folders too
        self._in_buckets = False  # whether the update under way comes in buckets

    # --- state ---------------------------------------------------------------------------------------------------

    async def state(self, *, deadline_s: float) -> ServerState:
        deadline = time.monotonic() + deadline_s
        version = await self._version(deadline)
        info = await self._http.get("/server_info", deadline_s=seconds_until(deadline), config_format="json")
        release = await self._http.get("/version", deadline_s=seconds_until(deadline))
        metrics = await self._http.get_text("/metrics", deadline_s=seconds_until(deadline))
        with self._http.reading("/server_info or /version"):
            config = info["vllm_config"]
            parallel, model = config["parallel_config"], config["model_config"]
            tp = number_of("ranks", parallel["tensor_parallel_size"])
            pp = number_of("ranks", parallel["pipeline_parallel_size"])
            self._logprobs_mode, path = str(model["logprobs_mode"]), str(model["model"])
            self._most_samples = number_of("requests at once", config["scheduler_config"]["max_num_seqs"])
            engine = f"vLLM {release['version']}"
        started = _START_TIME.search(metrics)
        return ServerState(path, tp, None if version < 0 else version, started[1] if started else "", engine, pp)

    async def health(self, *, deadline_s: float) -> None:
        await self._http.get("/health", deadline_s=deadline_s)

    async def _version(self, deadline: float) -> int:
        answer = await self._http.get("/weight_info", deadline_s=seconds_until(deadline))
        return version_number(answer.get("weight_version") if isinstance(answer, dict) else None)

    # --- generation ----------------------------------------------------------------------------------------------

    async def _continue(self, call: Call) -> list[Continuation]:
        if len(call.ids) > self._most_samples:
            starts = range(0, len(call.ids), self._most_samples)
            parts = [replace(call, ids=call.ids[start : start + self._most_samples]) for start in starts]
            answers = await all_or_none([self._continue(part) for part in parts])
            return [continuation for answer in answers for continuation in answer]

        def read(answer: Any) -> list[Continuation]:
            try:
                choices = sorted(answer["choices"], key=lambda choice: choice["index"])
                if [choice["index"] for choice in choices] != list(range(len(call.ids))):
                    raise BadAnswer(f"{len(choices)} samples instead of {len(call.ids)}")
                return [_continuation(choice, call) for choice in choices]
            except (KeyError, TypeError, AttributeError):
                raise BadAnswer("samples without ids, log-probs, versions or finish reason") from None

        try:
            return await self._http.post_and_read(
                _GENERATE, _generate_body(call), read, deadline_s=call.seconds_left, most_bytes=call.most_bytes
            )
        except ServerError as error:
            if error.status != 400 or "greater than max allowed" not in str(error):
                raise
            wanted = call.params.most_support
            message = f"it does not name the {wanted} tokens that top_k may keep; start it with --max-logprobs {wanted}"
            raise self._http.fail(Fault.unsupported, message) from error

    async def _check_params(self, params: SamplingParams, deadline_s: float) -> None:
        """Raise ServerError for parameters under which the engine's log-probs would not be the policy's."""
        if self._logprobs_mode is None:
            await self.state(deadline_s=deadline_s)
        if params.temperature == 0 or not params.exact_logprobs:
            return
        if self._logprobs_mode != "processed_logprobs" and (params.temperature != 1 or params.wants_support):
            raise self._http.fail(
                Fault.unsupported,
                f"with --logprobs-mode {self._logprobs_mode} its log-probs are those of temperature 1 and all "
                f"tokens, not of temperature {params.temperature:g}, top_p {params.top_p:g} and top_k {params.top_k}; "
                "start it with --logprobs-mode processed_logprobs",
            )

    async def abort(self, ids: Sequence[str] | None = None, *, deadline_s: float) -> None:
        """See `Server.abort`. A call has the id of its first sample, which ends all samples of the call."""
        named = [] if ids is None else [f"generate-tokens-{each}" for each in ids]  # the server adds the prefix
        if ids is None or named:
            await self._http.post("/abort_requests", {"request_ids": named}, deadline_s=deadline_s)

    async def pause(self, in_flight: InFlight, *, deadline_s: float) -> None:
        await self._http.post("/pause", deadline_s=deadline_s, mode=_PAUSE_MODE[in_flight])

    async def resume(self, *, deadline_s: float) -> None:
        await self._http.post("/resume", deadline_s=deadline_s)

    # --- memory --------------------------------------------------------------------------------------------------

    async def offload(self, what: Sequence[Memory], *, deadline_s: float) -> None:
        """See `Server.offload`; needs --enable-sleep-mode. Offloading the weights offloads the cache too."""
        deadline = time.monotonic() + deadline_s
        boot = (await self.state(deadline_s=deadline_s)).boot
        missing = self._memory.to_offload(what, boot)
        if Memory.weights in missing:
            await self._http.post("/sleep", deadline_s=seconds_until(deadline), level="2")
            self._memory.offloaded(tuple(Memory))
        elif missing:
            await self._http.post("/release_kv_cache_memory", deadline_s=seconds_until(deadline))
            self._memory.offloaded(missing)

    async def onload(self, what: Sequence[Memory], *, deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        boot = (await self.state(deadline_s=deadline_s)).boot
        for each in self._memory.to_onload(what, boot):
            await self._http.post("/wake_up", deadline_s=seconds_until(deadline), tags=each.value)
            self._memory.onloaded([each])

    # --- weights -------------------------------------------------------------------------------------------------

    async def join_group(self, group: UpdateGroup, *, rank_offset: int, deadline_s: float) -> None:
        place = {"host": group.host, "port": group.port, "rank_offset": rank_offset, "world": group.world}
        await self._extension("join_trainer", deadline_s, name=group.name, timeout_s=deadline_s, **place)

    async def leave_group(self, name: str, *, deadline_s: float) -> None:
        await self._extension("leave_trainer", deadline_s, name=name)

    async def keep_tensors(self, *, deadline_s: float) -> None:
        await self._extension("keep_tensors", deadline_s)
        self._keeps_tensors = True

    async def begin_update(self, *, changes: bool = False, deadline_s: float) -> None:
        await self._extension("begin_buckets", deadline_s, changes=changes)
        self._in_buckets = True

    async def receive_bucket(self, group: str, bucket: BucketNames, *, last: bool, deadline_s: float) -> None:
        what = {"names": bucket.names, "dtypes": bucket.dtypes, "shapes": bucket.shapes}
        await self._extension("receive_bucket", deadline_s, group=group, **what)

    async def receive_handles(self, handles: Sequence[bytes], *, last: bool, deadline_s: float) -> None:
        encoded = [base64.b64encode(each).decode() for each in handles]
        await self._extension("open_bucket", deadline_s, handles=encoded)

    async def _extension(self, method: str, deadline_s: float, **arguments: Any) -> None:
        """Call a method of the workers' extension."""
        try:
            await self._http.post("/collective_rpc", {"method": method, "kwargs": arguments}, deadline_s=deadline_s)
        except ServerError as error:
            if error.fault is not Fault.status:
                raise
            raise self._http.fail(
                Fault.status,
                f"{method} failed ({error}); it takes buckets of weights only as `clipo serve` starts it, with the "
                "extension for them: else set rollout.sync.transport=disk",
            ) from error

    async def load_folder(self, folder: str, version: int, *, changes: bool = False, deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        if self._keeps_tensors:
            await self._extension("load_folder", seconds_until(deadline), folder=folder, changes=changes)
            await self.end_update(version, deadline_s=seconds_until(deadline))
            return
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        await self._http.post("/collective_rpc", body, deadline_s=seconds_until(deadline))
        try:
            await self._http.post(
                "/collective_rpc", {"method": "repack_output_layer"}, deadline_s=seconds_until(deadline)
            )
        except ServerError as error:
            if error.fault is not Fault.status:  # a status means that the extension is missing; only CPUs need it
                raise
        await self.end_update(version, deadline_s=seconds_until(deadline))

    async def end_update(self, version: int, *, deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        if self._in_buckets:
            await self._extension("end_buckets", seconds_until(deadline))
            self._in_buckets = False
        while True:  # requests that have just ended may still hold blocks
            answer = await self._http.post("/reset_prefix_cache", deadline_s=seconds_until(deadline))
            if not isinstance(answer, dict) or answer.get("success", True):
                break
            if not seconds_until(deadline):
                raise self._http.fail(Fault.deadline, f"requests held its prefix cache for {deadline_s:g} s")
            await asyncio.sleep(_EMPTY_CACHE_EVERY_S)
        body = {"new_version": str(version)}
        await self._http.post("/update_weight_version", body, deadline_s=seconds_until(deadline))

    async def checksums(self, *, deadline_s: float) -> list[RankChecksums]:
        """See `Server.checksums`; needs the worker extension that `clipo serve` loads."""
        try:
            answer = await self._http.post(
                "/collective_rpc", {"method": "weight_checksums"}, deadline_s=deadline_s, most_bytes=CHECKSUM_BYTES
            )
        except ServerError as error:
            if error.fault is not Fault.status:
                raise
            raise self._lacks("checksums; start it with `clipo serve`, which loads the extension for them") from error
        with self._http.reading("weight_checksums"):
            found = [rank_checksums(rank, rank["checksums"]) for rank in answer["results"]]
            if not found or not all(rank.checksums for rank in found):
                raise BadAnswer("no checksums")
        return found


def _generate_body(call: Call) -> dict[str, Any]:
    params = call.params
    sampling = {
        "n": len(call.ids),
        "max_tokens": call.budget,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "stop_token_ids": list(params.stop_ids),
        "ignore_eos": True,
        # Of the drawn token alone, or of as many as may have been kept.
        "logprobs": min(params.most_support, call.vocabulary or params.most_support) if params.wants_support else 0,
        "detokenize": False,
    }
    return {"request_id": call.ids[0], "token_ids": call.inputs, "sampling_params": sampling}


def _continuation(choice: dict[str, Any], call: Call) -> Continuation:
    tokens, rows = choice["token_ids"], choice["logprobs"]["content"]
    if [row["token_id"] for row in rows] != tokens:
        raise BadAnswer("log-probs of other tokens than the ids it gave")
    return checked(
        tokens,
        [row["logprob"] for row in rows],
        versions_of_spans(choice["weight_versions"], len(tokens)),
        finish=choice["finish_reason"],
        matched=choice.get("stop_reason"),
        budget=call.budget,
        vocabulary=call.vocabulary,
        params=call.params,
        support=[_support(row["top_logprobs"]) for row in rows] if call.params.wants_support else None,
    )


def _support(likeliest: list[dict[str, Any]]) -> list[int]:
    """The tokens that one was drawn among: of the likeliest ones, which were asked for, those with a probability."""
    kept = {each["token_id"]: each["logprob"] for each in likeliest if each["logprob"] > _CUT_OFF}
    mass = sum(map(exp, kept.values()))
    if abs(1 - mass) > _MISSING_MASS:
        raise BadAnswer(
            f"{len(kept)} tokens to draw one from, which have {mass:.4f} of the probability: more were kept, because "
            "several are as likely as the last that top_k admits"
        )
    return list(kept)
