"""Client of one SGLang server (0.5 releases), through its native HTTP interface."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from clipo_megatron.rollout.engine import InFlight, Memory
from clipo_megatron.rollout.servers.http import together
from clipo_megatron.rollout.servers.http_server import Call, HttpServer, left, rank_checksums
from clipo_megatron.rollout.servers.response_checks import BadAnswer, Continuation, checked, version_number
from clipo_megatron.rollout.servers.server import (
    BucketNames,
    Fault,
    RankChecksums,
    ServerError,
    ServerState,
    UpdateGroup,
)

# A prompt of so many tokens is prefilled once before its samples are asked for. Samples that arrive together would
# each prefill it: the cache only knows what has finished.
_PREFILL_ONCE = 64
_EMPTY_CACHE_S = 15.0  # for the last requests to let go of the prefix cache


class SGLangServer(HttpServer):
    """The `Server` protocol for SGLang.

    The samples of a request are one HTTP call with an id a sample, because the ids that the server makes up for `n`
    samples cannot be aborted. Log-probs are those of the temperature-scaled policy before top-p and top-k; greedy ones
    those of temperature 1. With any stop tokens, the server ends a response at the model's own end-of-text token too.

    A router (`routed`) gets a call a sample: sglang-router takes one id a request.
    """

    _cache_is_empty = False  # since the last bucket of an update
    # --- what it is ----------------------------------------------------------------------------------------------

    async def state(self, *, deadline_s: float) -> ServerState:
        """What it is; also says that it answers."""
        model = await self._get("model_info", deadline_s)
        info = await self._get("server_info", deadline_s)
        try:
            tp, path = int(info["tp_size"]) * int(info.get("pp_size", 1)), str(model["model_path"])
            release = str(info["version"])
            boot = str(info.get("random_seed", ""))  # drawn at each start, unless it was given one
        except (KeyError, TypeError, ValueError):
            raise self._http.fail(Fault.garbage, "/server_info lacks tp_size, version or model_path") from None
        version = version_number(model.get("weight_version"))
        return ServerState(path, tp, None if version < 0 else version, boot, f"SGLang {release}")

    async def health(self, *, deadline_s: float) -> None:
        """Return when it can generate: it generates one token, or is already generating."""
        await self._http.get("/health_generate", deadline_s=deadline_s)

    # --- generation ----------------------------------------------------------------------------------------------

    async def _pieces(self, call: Call) -> list[Continuation]:
        if self._routed and len(call.ids) > 1:
            parts = await together([self._pieces(replace(call, ids=[each])) for each in call.ids])
            return [piece for part in parts for piece in part]
        if len(call.ids) > 1 and len(call.inputs) >= _PREFILL_ONCE:
            once = {"input_ids": call.inputs, "sampling_params": {"max_new_tokens": 0, "temperature": 0}}
            await self._http.post("/generate", once, deadline_s=call.left_s)

        def read(answer: Any) -> list[Continuation]:
            answers = answer if isinstance(answer, list) else [answer]
            if len(answers) != len(call.ids):
                raise BadAnswer(f"{len(answers)} samples instead of {len(call.ids)}")
            return [_piece(each, call) for each in answers]

        try:
            pieces = await self._http.post_and_read("/generate", _generate_body(call), read, deadline_s=call.left_s)
        except BadAnswer as reason:
            raise self._http.fail(Fault.garbage, f"/generate answered {reason}") from None
        for piece in pieces:
            if piece.versions.size and (np.diff(piece.versions).min(initial=0) < 0 or piece.versions[0] < call.version):
                least = piece.versions.min()
                raise self._http.fail(
                    Fault.stale, f"/generate answered with weights of version {least}, not {call.version}"
                )
        return pieces

    async def abort(self, ids: Sequence[str] | None = None, *, deadline_s: float) -> None:
        """End the generation of the given ids, or all of it; ids that it does not know are no error."""
        if ids is None:
            await self._http.post("/abort_request", {"abort_all": True}, deadline_s=deadline_s)
            return
        await together([self._http.post("/abort_request", {"rid": each}, deadline_s=deadline_s) for each in ids])

    async def pause(self, in_flight: InFlight, *, deadline_s: float) -> None:
        """Generate nothing until `resume`; with `abort` it returns when nothing is in flight."""
        await self._http.post("/pause_generation", {"mode": in_flight.value}, deadline_s=deadline_s)

    async def resume(self, *, deadline_s: float) -> None:
        """Go on."""
        await self._http.post("/continue_generation", deadline_s=deadline_s)

    # --- memory --------------------------------------------------------------------------------------------------

    async def offload(self, what: Sequence[Memory], *, deadline_s: float) -> None:
        """Give GPU memory back; needs a server started with --enable-memory-saver."""
        deadline = time.monotonic() + deadline_s
        state = await self.state(deadline_s=deadline_s)
        if missing := self._memory.to_release(what, state.boot):
            await self._empty_cache(deadline)  # it dies when something is in flight
            body = {"tags": [each.value for each in missing]}
            await self._http.post("/release_memory_occupation", body, deadline_s=left(deadline))
            self._memory.released(missing)

    async def onload(self, what: Sequence[Memory], *, deadline_s: float) -> None:
        """Take it again."""
        deadline = time.monotonic() + deadline_s
        state = await self.state(deadline_s=deadline_s)
        if missing := self._memory.to_restore(what, state.boot):
            body = {"tags": [each.value for each in missing]}
            await self._http.post("/resume_memory_occupation", body, deadline_s=left(deadline))
            self._memory.restored(missing)

    # --- weights -------------------------------------------------------------------------------------------------

    async def join_group(self, group: UpdateGroup, *, rank_offset: int, deadline_s: float) -> None:
        """Become ranks of a group; returns when all members have met."""
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
        """Forget the group."""
        await self._done("/destroy_weights_update_group", {"group_name": name}, deadline_s)

    async def begin_update(self, *, deadline_s: float) -> None:
        """Before the first bucket. Does nothing on a release that has no such call.

        An update that broke off has left the server in the middle of one, where it takes buckets already.
        """
        try:
            await self._done_if_known("/begin_weight_update", deadline_s)
        except ServerError as error:
            if "already open" not in str(error):
                raise

    async def receive_bucket(self, group: str, bucket: BucketNames, *, last: bool, deadline_s: float) -> None:
        """Take one flat bucket that the group's rank 0 broadcasts; returns when it is loaded."""
        body = {
            "names": bucket.names,
            "dtypes": bucket.dtypes,
            "shapes": bucket.shapes,
            "group_name": group,
            "load_format": "flattened_bucket",
        }
        await self._receive("/update_weights_from_distributed", body, last, deadline_s)

    async def receive_handles(self, handles: Sequence[bytes], *, last: bool, deadline_s: float) -> None:
        """Take tensors from the memory of another process; one payload a rank of the server."""
        body = {
            "serialized_named_tensors": [base64.b64encode(each).decode() for each in handles],
            "load_format": "flattened_bucket",
        }
        await self._receive("/update_weights_from_tensor", body, last, deadline_s)

    async def _receive(self, path: str, body: dict[str, Any], last: bool, deadline_s: float) -> None:
        """With the last bucket the prefix cache is emptied: a call of its own would also collect garbage, which takes
        longer than the bucket. The call follows all the same where something was still being computed."""
        self._cache_is_empty = False
        try:
            await self._done(path, body | {"flush_cache": last}, deadline_s)
        except ServerError as error:
            if not last or "cache was not flushed" not in str(error):
                raise
        else:
            self._cache_is_empty = last

    async def end_update(self, version: int, *, deadline_s: float) -> None:
        """After the last bucket: caches are empty, and answers carry the version."""
        deadline = time.monotonic() + deadline_s
        await self._done_if_known("/end_weight_update", deadline_s)
        await self._set_version(version, deadline)

    async def load_folder(self, folder: str, version: int, *, deadline_s: float) -> None:
        """Read all weights from safetensors; the folder has a config.json too."""
        deadline = time.monotonic() + deadline_s
        self._cache_is_empty = False
        await self._done("/update_weights_from_disk", {"model_path": folder, "flush_cache": False}, deadline_s)
        await self._set_version(version, deadline)

    async def _set_version(self, version: int, deadline: float) -> None:
        """Empty the prefix cache, then give the weights their version."""
        if not self._cache_is_empty:
            await self._empty_cache(deadline)
        body = {"new_version": str(version), "abort_all_requests": False}
        await self._done("/update_weight_version", body, left(deadline))

    async def _empty_cache(self, deadline: float) -> None:
        """Succeeds only while nothing is computed; requests whose client has just gone are waited for."""
        tries_until = min(deadline, time.monotonic() + _EMPTY_CACHE_S)
        while True:
            try:
                await self._http.get_text("/flush_cache", deadline_s=left(deadline))  # in plain words
                return
            except ServerError as error:
                if error.status != 400 or time.monotonic() >= tries_until:
                    raise
            await asyncio.sleep(0.1)

    async def checksums(self, *, deadline_s: float) -> list[RankChecksums]:
        """Of the weights as they are in its memory, a rank each."""
        answer = await self._done("/weights_checker", {"action": "checksum"}, deadline_s)
        try:
            found = [rank_checksums(_place(rank), rank["checksums"]) for rank in answer["ranks"]]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            found = []
        if not found or not all(rank.checksums for rank in found):
            raise self._http.fail(Fault.garbage, "/weights_checker answered no checksums")
        return found

    # --- calls ---------------------------------------------------------------------------------------------------

    async def _get(self, name: str, deadline_s: float) -> dict[str, Any]:
        """`/name`, or `/get_name` as older releases have it."""
        try:
            answer = await self._http.get(f"/{name}", deadline_s=deadline_s)
        except ServerError as error:
            if error.status != 404:
                raise
            answer = await self._http.get(f"/get_{name}", deadline_s=deadline_s)
        if not isinstance(answer, dict):
            raise self._http.fail(Fault.garbage, f"/{name} answered no JSON object")
        return answer

    async def _done(self, path: str, body: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """A call whose answer says whether it succeeded."""
        answer = await self._http.post(path, body, deadline_s=deadline_s)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            words = answer.get("message") if isinstance(answer, dict) else answer
            raise self._http.fail(Fault.status, f"{path} did not succeed: {str(words)[:300]}")
        return answer

    async def _done_if_known(self, path: str, deadline_s: float) -> None:
        try:
            await self._done(path, {}, deadline_s)
        except ServerError as error:
            if error.status != 404:
                raise


def _place(rank: dict[str, Any]) -> dict[str, Any]:
    """Where a rank stands; a list where it holds a draft model too, the target model first."""
    place = rank["parallelism_info"]
    return place[0] if isinstance(place, list) else place


def _generate_body(call: Call) -> dict[str, Any]:
    params, alone = call.params, len(call.ids) == 1
    sampling: dict[str, Any] = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or -1,
        "min_p": 0.0,
        "max_new_tokens": call.budget,
        "stop_token_ids": list(params.stop_ids),
        "ignore_eos": not params.stop_ids,  # it would ignore stop_token_ids too
        "no_stop_trim": True,  # the text is that of all tokens; special ones are left out in any case
    }
    return {
        "rid": call.ids[0] if alone else call.ids,
        "input_ids": call.inputs if alone else [call.inputs] * len(call.ids),
        "sampling_params": sampling,
        "return_logprob": True,
    }


def _piece(answer: Any, call: Call) -> Continuation:
    try:
        meta, tokens = answer["meta_info"], answer["output_ids"]
        rows, reason = meta["output_token_logprobs"], meta["finish_reason"]
        logprobs, ids = ([row[0] for row in rows], [row[1] for row in rows])
        finish, matched = reason["type"], reason.get("matched")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise BadAnswer("a sample without ids, log-probs or finish reason") from None
    if ids != tokens:
        raise BadAnswer("log-probs of other tokens than the ids it gave")
    return checked(
        tokens,
        logprobs,
        _versions(meta, len(tokens)),
        answer.get("text"),
        finish=finish,
        matched=matched,
        budget=call.budget,
        stop_ids=call.params.stop_ids,
    )


def _versions(meta: dict[str, Any], count: int) -> np.ndarray:
    """[count] int64, out of spans; releases without spans name one version for all."""
    spans = meta.get("weight_versions")
    if spans is None:
        return np.full(count, version_number(meta.get("weight_version")), dtype=np.int64)
    versions, filled = np.empty(count, dtype=np.int64), 0
    try:
        for span in spans:
            start, end = span["start"], span["end"]
            if start != filled or not start <= end <= count:
                break
            versions[start:end] = version_number(span["version"])
            filled = end
    except (KeyError, TypeError):
        raise BadAnswer("spans of versions that are none") from None
    if filled != count:
        raise BadAnswer(f"spans of versions for {filled} of {count} tokens")
    return versions
