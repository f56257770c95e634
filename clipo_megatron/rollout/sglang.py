"""Client of one SGLang server (0.5 releases), through its native HTTP interface."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
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

# A prompt of so many tokens is prefilled once before its samples are asked for. Samples that arrive together would
# each prefill it: the cache only knows what has finished.
_PREFILL_ONCE = 64
_EMPTY_CACHE_S = 15.0  # for the last requests to let go of the prefix cache


class SGLangServer:
    """The `Server` protocol for SGLang.

    The samples of a request are one HTTP call with an id a sample, because the ids that the server makes up for `n`
    samples cannot be aborted. Log-probs are those of the temperature-scaled policy before top-p and top-k; greedy ones
    those of temperature 1. With any stop tokens, the server ends a response at the model's own end-of-text token too.

    Args:
        url: of the server, or of a router that passes generation on.
        api_key_env: environment variable with its key.
        decode: token ids to text without special tokens; None: the engine's text, of the last piece.
        routed: whether the URL is that of a router, which gets a call a sample.
    """

    keeps_unfinished = True

    def __init__(self, url: str, *, api_key_env: str = "", decode: Decode | None = None, routed: bool = False):
        self._http = JsonClient(url, api_key_env)
        self._decode, self._routed = decode, routed
        self._memory = Released()

    @property
    def url(self) -> str:
        """Of the server."""
        return self._http.url

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

    async def generate(
        self, request: Request, params: SamplingParams, *, version: int, name: str, deadline_s: float
    ) -> list[Rollout]:
        """All rollouts of one request; see `Server.generate`."""
        deadline = time.monotonic() + deadline_s
        done = {rollout.sample: rollout for rollout in request.begun}
        calls = []
        fresh = missing_samples(request, params)
        prompt = request.prompt.tokens.tolist()
        if fresh:
            calls.append(self._fresh(prompt, fresh, params, version, name, deadline))
        for rollout in request.begun:
            if (finished := settled(rollout, params)) is not None:
                done[rollout.sample] = finished
            else:
                calls.append(self._continued(prompt, rollout, params, version, name, deadline))
        for rollouts in await together(calls):
            done |= {rollout.sample: rollout for rollout in rollouts}
        return [done[sample] for sample in sorted(done)]

    async def _fresh(
        self, prompt: list[int], samples: list[int], params: SamplingParams, version: int, name: str, deadline: float
    ) -> list[Rollout]:
        if self._routed and len(samples) > 1:  # sglang-router takes one id a request
            parts = (self._fresh(prompt, [sample], params, version, name, deadline) for sample in samples)
            return [rollout for part in await together(list(parts)) for rollout in part]
        if len(samples) > 1 and len(prompt) >= _PREFILL_ONCE:
            body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 0, "temperature": 0}}
            await self._http.post("/generate", body, deadline_s=deadline - time.monotonic())
        many = len(samples) > 1
        ids = [sample_id(name, sample) for sample in samples]
        body = _generate_body(
            [prompt] * len(samples) if many else prompt, ids if many else ids[0], params, params.max_new_tokens
        )
        pieces = await self._pieces(body, len(samples), params, params.max_new_tokens, version, deadline)
        found = (joined(None, piece, sample, self._decode) for piece, sample in zip(pieces, samples, strict=True))
        return [rollout for rollout in found if rollout is not None]

    async def _continued(
        self, prompt: list[int], begun: Rollout, params: SamplingParams, version: int, name: str, deadline: float
    ) -> list[Rollout]:
        budget = params.max_new_tokens - begun.tokens.numel()
        body = _generate_body(prompt + begun.tokens.tolist(), sample_id(name, begun.sample), params, budget)
        (piece,) = await self._pieces(body, 1, params, budget, version, deadline)
        try:
            return [joined(begun, piece, begun.sample, self._decode)]
        except BadAnswer as reason:
            raise self._http.fail(Fault.stale, f"/generate answered {reason}") from None

    async def _pieces(
        self, body: dict[str, Any], count: int, params: SamplingParams, budget: int, version: int, deadline: float
    ) -> list[Piece]:
        def read(answer: Any) -> list[Piece]:
            answers = answer if isinstance(answer, list) else [answer]
            if len(answers) != count:
                raise BadAnswer(f"{len(answers)} samples instead of {count}")
            return [_piece(each, params, budget) for each in answers]

        try:
            left = deadline - time.monotonic()
            pieces = await self._http.post_and_read("/generate", body, read, deadline_s=left)
        except BadAnswer as reason:
            raise self._http.fail(Fault.garbage, f"/generate answered {reason}") from None
        for piece in pieces:
            if piece.versions.size and (np.diff(piece.versions).min(initial=0) < 0 or piece.versions[0] < version):
                raise self._http.fail(
                    Fault.stale, f"/generate answered with weights of version {piece.versions.min()}, not {version}"
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

    async def release_memory(self, what: Sequence[Memory], *, deadline_s: float) -> None:
        """Give GPU memory back; needs a server started with --enable-memory-saver."""
        deadline = time.monotonic() + deadline_s
        state = await self.state(deadline_s=deadline_s)
        if missing := self._memory.to_release(what, state.boot):
            await self._empty_cache(deadline)  # it dies when something is in flight
            body = {"tags": [each.value for each in missing]}
            await self._http.post("/release_memory_occupation", body, deadline_s=deadline - time.monotonic())
            self._memory.released(missing)

    async def restore_memory(self, what: Sequence[Memory], *, deadline_s: float) -> None:
        """Take it again."""
        deadline = time.monotonic() + deadline_s
        state = await self.state(deadline_s=deadline_s)
        if missing := self._memory.to_restore(what, state.boot):
            body = {"tags": [each.value for each in missing]}
            await self._http.post("/resume_memory_occupation", body, deadline_s=deadline - time.monotonic())
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

    async def receive_bucket(self, group: str, bucket: BucketNames, *, deadline_s: float) -> None:
        """Take one flat bucket that the group's rank 0 broadcasts; returns when it is loaded."""
        body = {
            "names": bucket.names,
            "dtypes": bucket.dtypes,
            "shapes": bucket.shapes,
            "group_name": group,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        await self._done("/update_weights_from_distributed", body, deadline_s)

    async def receive_handles(self, handles: Sequence[bytes], *, deadline_s: float) -> None:
        """Take tensors from the memory of another process; one payload a rank of the server."""
        body = {
            "serialized_named_tensors": [base64.b64encode(each).decode() for each in handles],
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        await self._done("/update_weights_from_tensor", body, deadline_s)

    async def end_update(self, version: int, *, deadline_s: float) -> None:
        """After the last bucket: caches are empty, and answers carry the version."""
        deadline = time.monotonic() + deadline_s
        await self._done_if_known("/end_weight_update", deadline_s)
        await self._set_version(version, deadline)

    async def load_folder(self, folder: str, version: int, *, deadline_s: float) -> None:
        """Read all weights from safetensors; the folder has a config.json too."""
        deadline = time.monotonic() + deadline_s
        await self._done("/update_weights_from_disk", {"model_path": folder, "flush_cache": False}, deadline_s)
        await self._set_version(version, deadline)

    async def _set_version(self, version: int, deadline: float) -> None:
        """Empty the prefix cache, then give the weights their version."""
        await self._empty_cache(deadline)
        body = {"new_version": str(version), "abort_all_requests": False}
        await self._done("/update_weight_version", body, deadline - time.monotonic())

    async def _empty_cache(self, deadline: float) -> None:
        """Succeeds only while nothing is computed; requests whose client has just gone are waited for."""
        tries_until = min(deadline, time.monotonic() + _EMPTY_CACHE_S)
        while True:
            try:
                await self._http.get_text("/flush_cache", deadline_s=deadline - time.monotonic())  # in plain words
                return
            except ServerError as error:
                if error.status != 400 or time.monotonic() >= tries_until:
                    raise
            await asyncio.sleep(0.1)

    async def checksums(self, *, deadline_s: float) -> list[RankChecksums]:
        """Of the weights as they are in its memory, a rank each."""
        answer = await self._done("/weights_checker", {"action": "checksum"}, deadline_s)
        try:
            found = [
                RankChecksums(
                    int(_place(rank)["tp_rank"]),
                    int(_place(rank)["tp_size"]),
                    {str(name): str(value) for name, value in rank["checksums"].items()},
                )
                for rank in answer["ranks"]
            ]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            found = []
        if not found or not all(rank.checksums for rank in found):
            raise self._http.fail(Fault.garbage, "/weights_checker answered no checksums")
        return found

    async def close(self) -> None:
        """Close the client's connections; the server goes on."""
        await self._http.close()

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


def _generate_body(inputs: list[Any], ids: Any, params: SamplingParams, budget: int) -> dict[str, Any]:
    sampling: dict[str, Any] = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or -1,
        "min_p": 0.0,
        "max_new_tokens": budget,
        "stop_token_ids": list(params.stop_ids),
        "ignore_eos": not params.stop_ids,  # it would ignore stop_token_ids too
        "no_stop_trim": True,  # the text is that of all tokens; special ones are left out in any case
    }
    return {"rid": ids, "input_ids": inputs, "sampling_params": sampling, "return_logprob": True}


def _piece(answer: Any, params: SamplingParams, budget: int) -> Piece:
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
        budget=budget,
        stop_ids=params.stop_ids,
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
