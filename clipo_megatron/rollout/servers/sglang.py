"""The client of one SGLang server (0.5 releases), over its native HTTP interface."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from clipo_megatron.rollout.engine import InFlight, Memory
from clipo_megatron.rollout.servers.http import CHECKSUM_BYTES, CONTROL_BYTES, all_or_none
from clipo_megatron.rollout.servers.http_server import Call, HttpServer, rank_checksums, seconds_until
from clipo_megatron.rollout.servers.response_checks import (
    BadAnswer,
    Continuation,
    checked,
    checked_routes,
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

# Prompts of at least this many tokens are prefilled by a call of their own before their samples are asked for. Samples
# that arrive together would each prefill the prompt, because only finished prefills are in the prefix cache.
_PREFILL_ONCE = 64
_KEEP_TENSORS = "clipo_delta.keep_tensors"  # of serving/engine_extension, by the path in the server
# Names in an answer: the tokens that each was drawn among, and its log-prob among them.
_MASK, _MASK_LOGPROBS = "output_token_sampling_mask", "output_token_sampling_logprobs"
_EMPTY_CACHE_S = 15.0  # for the last requests to leave the server, which then can empty its prefix cache


class SGLangServer(HttpServer):
    """The `Server` protocol for SGLang.

    The samples of a request are one HTTP call with one id for each sample, because the ids that the server itself
    gives `n` samples cannot be aborted. With top-p or top-k the server is asked for its sampling masks, the tokens that
    each draw was among, and for log-probs renormalised over them. Greedy sampling has log-probs of temperature 1. If
    there are stop tokens, the server also stops at the model's own end-of-text token.

    Through a router (`routed`) each sample is a call of its own: sglang-router takes one id for each request.
    """

    _cache_is_empty = False  # whether the last bucket of the update emptied the prefix cache

    # --- state -------------------------------------------------------------------------------------------------

    async def state(self, *, deadline_s: float) -> ServerState:
        model = await self._get("model_info", deadline_s)
        info = await self._get("server_info", deadline_s)
        with self._http.reading("/server_info"):
            tp, pp = number_of("ranks", info["tp_size"]), number_of("ranks", info.get("pp_size", 1))
            path = model["model_path"]
            release, path = str(info["version"]), str(path)
            boot = str(info.get("random_seed", ""))  # drawn at each start, unless the command line sets it
        version = version_number(model.get("weight_version"))
        return ServerState(path, tp, None if version < 0 else version, boot, f"SGLang {release}", pp)

    async def health(self, *, deadline_s: float) -> None:
        """Return if the server can generate: it generates one token, or is already generating."""
        await self._http.get("/health_generate", deadline_s=deadline_s)

    # --- generation ----------------------------------------------------------------------------------------------

    async def _continue(self, call: Call) -> list[Continuation]:
        if self._routed and len(call.ids) > 1:
            answers = await all_or_none([self._continue(replace(call, ids=[each])) for each in call.ids])
            return [continuation for answer in answers for continuation in answer]
        if len(call.ids) > 1 and len(call.inputs) >= _PREFILL_ONCE:
            once = {"input_ids": call.inputs, "sampling_params": {"max_new_tokens": 0, "temperature": 0}}
            await self._http.post("/generate", once, deadline_s=call.seconds_left)

        def read(answer: Any) -> list[Continuation]:
            answers = answer if isinstance(answer, list) else [answer]
            if len(answers) != len(call.ids):
                raise BadAnswer(f"{len(answers)} samples instead of {len(call.ids)}")
            return [_continuation(each, call) for each in answers]

        return await self._http.post_and_read(
            "/generate", _generate_body(call), read, deadline_s=call.seconds_left, most_bytes=call.most_bytes
        )

    async def abort(self, ids: Sequence[str] | None = None, *, deadline_s: float) -> None:
        if ids is None:
            await self._http.post("/abort_request", {"abort_all": True}, deadline_s=deadline_s)
            return
        await all_or_none([self._http.post("/abort_request", {"rid": each}, deadline_s=deadline_s) for each in ids])

    async def pause(self, in_flight: InFlight, *, deadline_s: float) -> None:
        await self._http.post("/pause_generation", {"mode": in_flight.value}, deadline_s=deadline_s)

    async def resume(self, *, deadline_s: float) -> None:
        await self._http.post("/continue_generation", deadline_s=deadline_s)

    # --- memory --------------------------------------------------------------------------------------------------

    async def offload(self, what: Sequence[Memory], *, deadline_s: float) -> None:
        """See `Server.offload`; the server must have been started with --enable-memory-saver."""
        deadline = time.monotonic() + deadline_s
        state = await self.state(deadline_s=deadline_s)
        if missing := self._memory.to_offload(what, state.boot):
            await self._empty_cache(deadline)  # the server crashes if something is in flight
            body = {"tags": [each.value for each in missing]}
            await self._http.post("/release_memory_occupation", body, deadline_s=seconds_until(deadline))
            self._memory.offloaded(missing)

    async def onload(self, what: Sequence[Memory], *, deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        state = await self.state(deadline_s=deadline_s)
        if missing := self._memory.to_onload(what, state.boot):
            body = {"tags": [each.value for each in missing]}
            await self._http.post("/resume_memory_occupation", body, deadline_s=seconds_until(deadline))
            self._memory.onloaded(missing)

    # --- weights -------------------------------------------------------------------------------------------------

    async def join_group(self, group: UpdateGroup, *, rank_offset: int, deadline_s: float) -> None:
        body = {
            "master_address": group.host,
            "master_port": group.port,
            "rank_offset": rank_offset,
            "world_size": group.world,
            "group_name": group.name,
            "backend": group.backend,
        }
        await self._done("/init_weights_update_group", body, deadline_s)

    async def leave_group(self, name: str, *, deadline_s: float) -> None:
        await self._done("/destroy_weights_update_group", {"group_name": name}, deadline_s)

    async def keep_tensors(self, *, deadline_s: float) -> None:
        """See `Server.keep_tensors`; a function that the server calls by its path, with nothing to load, does so."""
        info = await self._get("server_info", deadline_s)
        with self._http.reading("/server_info"):
            tp, loaders = number_of("ranks", info["tp_size"]), list(info.get("custom_weight_loader") or ())
        if _KEEP_TENSORS not in loaders:
            raise self._http.fail(
                Fault.unsupported,
                f"it was not started with --custom-weight-loader {_KEEP_TENSORS}, as `clipo serve` starts it where "
                "rollout.sync.delta is set; else set that to false",
            )
        nothing = base64.b64encode(b"].").decode()  # an empty list, pickled
        body = {"serialized_named_tensors": [nothing] * tp, "load_format": _KEEP_TENSORS, "flush_cache": False}
        await self.begin_update(deadline_s=deadline_s)
        await self._done("/update_weights_from_tensor", body, deadline_s)
        await self._done_if_known("/end_weight_update", deadline_s)

    async def begin_update(self, *, changes: bool = False, deadline_s: float) -> None:
        """See `Server.begin_update`. After an update that was interrupted the server is ready for buckets already."""
        try:
            await self._done_if_known("/begin_weight_update", deadline_s)
        except ServerError as error:
            if "already open" not in str(error):
                raise

    async def receive_bucket(self, group: str, bucket: BucketNames, *, last: bool, deadline_s: float) -> None:
        body = {
            "names": bucket.names,
            "dtypes": bucket.dtypes,
            "shapes": bucket.shapes,
            "group_name": group,
            "load_format": "flattened_bucket",
        }
        await self._receive("/update_weights_from_distributed", body, last, deadline_s)

    async def receive_handles(self, handles: Sequence[bytes], *, last: bool, deadline_s: float) -> None:
        body = {
            "serialized_named_tensors": [base64.b64encode(each).decode() for each in handles],
            "load_format": "flattened_bucket",
        }
        await self._receive("/update_weights_from_tensor", body, last, deadline_s)

    async def _receive(self, path: str, body: dict[str, Any], last: bool, deadline_s: float) -> None:
        """Send a bucket. The last one asks the server to empty its prefix cache: a separate call would also collect
        garbage, which takes longer than the bucket. If the server was busy, the separate call follows all the same."""
        self._cache_is_empty = False
        try:
            await self._done(path, body | {"flush_cache": last}, deadline_s)
        except ServerError as error:
            if not last or "cache was not flushed" not in str(error):
                raise
        else:
            self._cache_is_empty = last

    async def end_update(self, version: int, *, deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        await self._done_if_known("/end_weight_update", deadline_s)
        await self._set_version(version, deadline)

    async def load_folder(self, folder: str, version: int, *, changes: bool = False, deadline_s: float) -> None:
        """See `Server.load_folder`; the folder needs a config.json too."""
        deadline = time.monotonic() + deadline_s
        self._cache_is_empty = False
        await self._done("/update_weights_from_disk", {"model_path": folder, "flush_cache": False}, deadline_s)
        await self._set_version(version, deadline)

    async def _set_version(self, version: int, deadline: float) -> None:
        if not self._cache_is_empty:
            await self._empty_cache(deadline)
        body = {"new_version": str(version), "abort_all_requests": False}
        await self._done("/update_weight_version", body, seconds_until(deadline))

    async def _empty_cache(self, deadline: float) -> None:
        """Empty the prefix cache; tries again while requests that were just cancelled leave the server."""
        tries_until = min(deadline, time.monotonic() + _EMPTY_CACHE_S)
        while True:
            try:
                await self._http.get_text("/flush_cache", deadline_s=seconds_until(deadline))  # not JSON
                return
            except ServerError as error:
                if error.status != 400 or time.monotonic() >= tries_until:
                    raise
            await asyncio.sleep(0.1)

    async def checksums(self, *, deadline_s: float) -> list[RankChecksums]:
        answer = await self._done("/weights_checker", {"action": "checksum"}, deadline_s, most_bytes=CHECKSUM_BYTES)
        with self._http.reading("/weights_checker"):
            found = [rank_checksums(_parallelism(rank), rank["checksums"]) for rank in answer["ranks"]]
            if not found or not all(rank.checksums for rank in found):
                raise BadAnswer("no checksums")
        return found

    # --- calls ---------------------------------------------------------------------------------------------------

    async def _get(self, name: str, deadline_s: float) -> dict[str, Any]:
        """GET `/name`, which older releases call `/get_name`."""
        try:
            answer = await self._http.get(f"/{name}", deadline_s=deadline_s)
        except ServerError as error:
            if error.status != 404:
                raise
            answer = await self._http.get(f"/get_{name}", deadline_s=deadline_s)
        if not isinstance(answer, dict):
            raise self._http.fail(Fault.garbage, f"/{name} answered no JSON object")
        return answer

    async def _done(
        self, path: str, body: dict[str, Any], deadline_s: float, *, most_bytes: int = CONTROL_BYTES
    ) -> dict[str, Any]:
        """POST a call whose answer says whether it succeeded."""
        answer = await self._http.post(path, body, deadline_s=deadline_s, most_bytes=most_bytes)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            reason = answer.get("message") if isinstance(answer, dict) else answer
            raise self._http.fail(Fault.status, f"{path} did not succeed: {str(reason)[:300]}")
        return answer

    async def _done_if_known(self, path: str, deadline_s: float) -> None:
        try:
            await self._done(path, {}, deadline_s)
        except ServerError as error:
            if error.status != 404:
                raise


def _parallelism(rank: dict[str, Any]) -> dict[str, Any]:
    """A rank's place in the server. It is a list if there is a draft model too; the target model comes first."""
    found = rank["parallelism_info"]
    return found[0] if isinstance(found, list) else found


def _generate_body(call: Call) -> dict[str, Any]:
    params, alone = call.params, len(call.ids) == 1
    sampling: dict[str, Any] = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or -1,
        "min_p": 0.0,
        "max_new_tokens": call.budget,
        "stop_token_ids": list(params.stop_ids),
        "ignore_eos": not params.stop_ids,  # true would ignore stop_token_ids too
        "no_stop_trim": True,
    }
    return {
        "rid": call.ids[0] if alone else call.ids,
        "input_ids": call.inputs if alone else [call.inputs] * len(call.ids),
        "sampling_params": sampling,
        "return_logprob": True,
        **({"return_sampling_mask": True} if params.wants_support else {}),
        **({"return_routed_experts": True, "routed_experts_start_len": call.routed} if params.routing else {}),
    }


def _continuation(answer: Any, call: Call) -> Continuation:
    try:
        meta, tokens = answer["meta_info"], answer["output_ids"]
        rows, reason = meta["output_token_logprobs"], meta["finish_reason"]
        logprobs, ids = ([row[0] for row in rows], [row[1] for row in rows])
        finish, matched = reason["type"], reason.get("matched")
        support: list[list[int]] = []
        if call.params.wants_support and tokens:
            support, logprobs = meta.get(_MASK), meta.get(_MASK_LOGPROBS)
            if support is None:
                raise BadAnswer("no sampling mask, which this release of SGLang may not know; 0.5.23 does")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise BadAnswer("a sample without ids, log-probs or finish reason") from None
    if type(tokens) is not list or ids != tokens:
        raise BadAnswer("log-probs of other tokens than the ids it gave")
    found = checked(
        tokens,
        logprobs,
        _versions(meta, len(tokens)),
        finish=finish,
        matched=matched,
        budget=call.budget,
        vocabulary=call.vocabulary,
        params=call.params,
        support=support,
    )
    said = meta.get("routed_experts")
    # A call that was interrupted may lack them; the one that goes on asks for all.
    if call.params.routing and (said is not None or found.finish != "abort"):
        rows = len(call.inputs) + len(tokens) - 1 - call.routed
        found.routes = checked_routes(said, call.params.routing, rows)
    return found


def _versions(meta: dict[str, Any], count: int) -> np.ndarray:
    """The version of each token, [count] int64. Older releases name one version instead of spans of tokens."""
    spans = meta.get("weight_versions")
    if spans is None:
        return np.full(count, version_number(meta.get("weight_version")), dtype=np.int64)
    return versions_of_spans(spans, count)
