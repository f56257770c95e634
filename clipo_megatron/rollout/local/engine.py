"""Rollouts inside the training process: a transformers decoder, decoded in batches by a loop of our own.

What makes it faster than `generate`: a prompt is prefilled once for its G samples, the prefix that the prompts of a
wave share (system prompt, template) is prefilled once for all of them, keys and values are written in place, and
finished rows leave the batch at once.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from clipo_megatron.flow import Prompt, Rollout, RolloutGroup
from clipo_megatron.rollout.engine import (
    Cancelled,
    EngineError,
    Generation,
    InFlight,
    Memory,
    Request,
    SamplingParams,
    never,
)
from clipo_megatron.rollout.local.decoding import DecodeBatch, NonFiniteLogits, prefill
from clipo_megatron.rollout.local.sampling import rollout_uniforms
from clipo_megatron.rollout.servers.response_checks import missing_samples, settled

# What some families do to the logits after the LM head; Llama and Qwen2 do none of it.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
_LISTED = 8  # names spelled out in a message before "and N more"


class _Line(NamedTuple):
    """Tokens that samples of one request go on from."""

    place: int  # of the request
    prompt: Prompt
    tokens: Tensor  # the prompt's, and what an interrupted rollout has
    samples: tuple[int, ...]
    limit: int  # new tokens at most
    begun: Rollout | None = None


class LocalEngine:
    """The `Engine` contract by transformers, on the device and in the process of its caller.

    Built from `config.json` and the tokenizer of a Hugging Face folder; no weights are read, they come through
    `load_weights`. Same weights, same (seed, step, prompt id, sample): same response, whatever the batch (up to
    floating-point ties, which bf16 makes likely).

    Args:
        model_dir: Hugging Face folder.
        dtype: of weights and activations; log-probs are float32 in any case.
        device: where weights, cache and logits live. Rollouts come back on the CPU.
        batch_size: sequences decoded at once, at least 1.

    Raises:
        EngineError: when the folder cannot be used.
    """

    def __init__(self, model_dir: str | Path, *, dtype: torch.dtype, device: torch.device | str, batch_size: int = 64):
        if batch_size < 1:
            raise EngineError(
                f"rollout.batch_size is {batch_size}, but at least one sequence is decoded: set it to >= 1."
            )
        self._batch_size = batch_size
        self._version = -1
        self._tokenizer, self._model = _build(Path(model_dir), dtype, torch.device(device))

    @property
    def version(self) -> int:
        """Of the weights in use; -1 before the first load, and after one that failed."""
        return self._version

    def health(self) -> None:
        """Return when the engine can serve.

        Raises:
            EngineError: closed, or without a complete set of weights.
        """
        if self._model is None:
            raise EngineError("The local engine is closed; construct a new one.")
        if self._version < 0:
            raise EngineError("The local engine has no complete set of weights; call load_weights first.")

    def pause(self, in_flight: InFlight = InFlight.abort) -> None:
        """Nothing to do: it generates only while its caller asks for the next group."""

    def resume(self) -> None:
        """Nothing to do."""

    def offload(self, *what: Memory) -> None:
        """Nothing to do: keys and values live as long as a generation, and weights stay."""

    def onload(self, *what: Memory) -> None:
        """Nothing to do."""

    def take_statistics(self) -> dict[str, float]:
        """There is nothing to tell: it neither retries nor waits."""
        return {}

    def close(self) -> None:
        """Free model and tokenizer. Idempotent."""
        self._model = self._tokenizer = None
        self._version = -1

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Copy weights in, one at a time, by Hugging Face name; any floating dtype, any device.

        A tied `lm_head.weight` may be absent; when it comes it has to equal the embedding.

        Raises:
            EngineError: names the model lacks, wrong shapes, names that came twice or never; all of them are listed.
                The engine then serves nothing until a load succeeds.
        """
        if self._model is None:
            raise EngineError("The local engine is closed; construct a new one.")
        self._version = -1
        problems = _copy_weights(self._model, tensors)
        if problems:
            raise EngineError(
                f"Weights of version {version} do not fit the model ({len(problems)} problems): "
                + "; ".join(problems)
                + ". Check that they were exported from the same architecture as the folder's config.json."
            )
        self._version = version

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        *,
        deadline_s: float,
        should_cancel: Callable[[], bool] = never,
    ) -> Generation:
        """One group a request, as each finishes.

        The deadline counts from this call, time between two yields included. Each token's forward looks at
        `should_cancel`.

        Raises:
            Abandoned: `should_cancel` said so.
            EngineError: on bad parameters or prompts (at once); when the deadline passes or a forward fails, naming
                the prompts without an answer.
        """
        self.health()
        params.check()
        self._check_prompts([request.prompt for request in requests], params)
        return Generation(self._generate(requests, params, time.monotonic() + deadline_s, deadline_s, should_cancel))

    def _generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        deadline: float,
        deadline_s: float,
        should_cancel: Callable[[], bool],
    ) -> Iterator[RolloutGroup]:
        unanswered = dict(enumerate(requests))

        def check() -> None:
            if should_cancel():
                raise Cancelled
            if time.monotonic() >= deadline:
                raise EngineError(
                    f"Generation passed its deadline of {deadline_s:g} s; {_missing(unanswered.values())}. "
                    "Raise rollout.deadline_s, or lower rollout.max_new_tokens or data.prompts_per_step."
                )

        done: list[dict[int, Rollout]] = [{} for _ in requests]
        lines = [line for place, request in enumerate(requests) for line in _lines(place, request, params)]
        settled_ones = (
            (place, rollout) for place, request in enumerate(requests) for rollout in _settled(request, params)
        )
        decoded = (found for wave in self._waves(lines) for found in self._decode(wave, params, check))
        try:
            for place, rollout in chain(settled_ones, decoded):
                done[place][rollout.sample] = rollout
                if len(done[place]) == params.samples:
                    request = unanswered.pop(place)
                    rollouts = [done[place][sample] for sample in sorted(done[place])]
                    yield RolloutGroup(request.position, request.prompt, rollouts)
        except NonFiniteLogits as error:
            raise EngineError(
                f"The weights of version {self._version} give log-probs that are not finite; "
                f"{_missing(unanswered.values())}. Look at the last updates' gradient norms."
            ) from error
        except (EngineError, Cancelled):
            raise
        except RuntimeError as error:
            raise EngineError(
                f"Decoding up to {self._batch_size} sequences at once failed; {_missing(unanswered.values())}. "
                f"If memory ran out, lower rollout.batch_size. The cause: {error}"
            ) from error

    def _waves(self, lines: list[_Line]) -> Iterator[list[_Line]]:
        """Lines of as many samples each, longest first, as many as the batch has room for; a line of more by itself."""
        by_samples: dict[int, list[_Line]] = defaultdict(list)
        for line in sorted(lines, key=lambda line: line.tokens.numel(), reverse=True):
            by_samples[len(line.samples)].append(line)
        for samples, alike in sorted(by_samples.items(), reverse=True):
            size = max(1, self._batch_size // samples)
            for start in range(0, len(alike), size):
                yield alike[start : start + size]

    def _decode(
        self, wave: list[_Line], params: SamplingParams, check: Callable[[], None]
    ) -> Iterator[tuple[int, Rollout]]:
        """Yield (place of the request, rollout) as each sample of the wave's lines finishes."""
        prefilled = prefill(self._model, [line.tokens for line in wave], check)
        for start in range(0, len(wave[0].samples), self._batch_size):
            rows = [(line, sample) for line in wave for sample in line.samples[start : start + self._batch_size]]
            limits = [line.limit for line, _ in rows]
            uniforms = None
            if params.temperature > 0:
                uniforms = np.stack(
                    [
                        rollout_uniforms(
                            max(limits), seed=params.seed, step=params.step, prompt_id=line.prompt.id, sample=sample
                        )
                        for line, sample in rows
                    ]
                )
            batch = DecodeBatch(self._model, prefilled, len(rows) // len(wave), params, limits, uniforms)
            while batch.live:
                check()
                for row, stopped in batch.step():
                    line, sample = rows[row]
                    # Clones, so that a short response does not keep the whole batch's tensors alive.
                    tokens = batch.tokens[row, : batch.length].clone().cpu()
                    logprobs = batch.logprobs[row, : batch.length].clone().cpu()
                    yield line.place, self._rollout(line, sample, tokens, logprobs, params, stopped=stopped)

    def _rollout(
        self, line: _Line, sample: int, tokens: Tensor, logprobs: Tensor, params: SamplingParams, *, stopped: bool
    ) -> Rollout:
        """What was drawn, behind what the rollout had."""
        versions, begun = torch.full((len(tokens),), self._version), line.begun
        if begun is not None:
            tokens, logprobs = torch.cat((begun.tokens, tokens)), torch.cat((begun.logprobs, logprobs))
            versions = torch.cat((begun.versions, versions))
        return Rollout(
            tokens=tokens,
            logprobs=logprobs,
            text=self._tokenizer.decode(tokens, skip_special_tokens=True),
            finish="stop" if stopped else params.cut(tokens.numel()),
            versions=versions,
            sample=sample,
            trained=0 if begun is None else begun.trained,
        )

    def _check_prompts(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        config = self._model.config
        for prompt in prompts:
            length = prompt.tokens.numel()
            if length == 0:
                raise EngineError(f"Prompt {prompt.id} has no tokens; give it a message.")
            if length + params.max_new_tokens > config.max_position_embeddings:
                raise EngineError(
                    f"Prompt {prompt.id} has {length} tokens; with {params.max_new_tokens} new ones it exceeds the "
                    f"model's {config.max_position_embeddings} positions. Lower max_new_tokens or max_prompt_tokens."
                )
            largest = int(prompt.tokens.max())
            if largest >= config.vocab_size or int(prompt.tokens.min()) < 0:
                raise EngineError(
                    f"Prompt {prompt.id} has a token outside the model's vocabulary of {config.vocab_size} "
                    f"(largest {largest}); tokenise it with the tokenizer of the same folder."
                )


def _build(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model (parameters allocated, not initialised) of a Hugging Face folder."""
    if not (folder / "config.json").is_file():
        raise EngineError(f"{folder} has no config.json; model.path must be a Hugging Face folder.")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise EngineError(f"The configuration or tokenizer in {folder} cannot be loaded: {error}") from error
    unsupported = [kind for kind in sorted(set(getattr(config, "layer_types", None) or ())) if kind != "full_attention"]
    unsupported += [f"{name} = {getattr(config, name)}" for name in _LOGIT_CHANGES if getattr(config, name, None)]
    if unsupported:
        raise EngineError(
            f"The model in {folder} has {', '.join(unsupported)}, which the local engine does not compute; "
            "use another engine for it."
        )
    with no_init_weights():  # faster, and leaves the global random state alone
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    return tokenizer, model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def _copy_weights(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Copy tensors into the model's parameters; what is wrong with them, one sentence part each."""
    parameters = dict(_named_parts(model))
    problems: list[str] = []
    arrived: set[str] = set()
    filled: set[int] = set()  # parameters, by identity: tied names share one
    for name, tensor in tensors:
        parameter = parameters.get(name)
        if parameter is None:
            problems.append(f"{name} {list(tensor.shape)} is unknown to the model")
        elif name in arrived:
            problems.append(f"{name} came twice")
        elif tensor.shape != parameter.shape:
            problems.append(f"{name} has shape {list(tensor.shape)}, the model needs {list(parameter.shape)}")
        elif id(parameter) not in filled:
            parameter.copy_(tensor)
            filled.add(id(parameter))
        elif not torch.equal(parameter, tensor.to(parameter)):
            problems.append(f"{name} differs from the weight it is tied to")
        if parameter is not None:
            arrived.add(name)
    came = {id(parameters[name]) for name in arrived}
    never = {id(parameter): name for name, parameter in reversed(parameters.items()) if id(parameter) not in came}
    return problems + [f"{name} never came" for name in reversed(never.values())]


def _named_parts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters as model folders name them: transformers stacks experts, in folders each has tensors of its own."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        place, _, last = name.rpartition(".")
        if not place.endswith(".experts"):
            yield name, parameter
            continue
        for number, expert in enumerate(parameter.detach()):
            parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
            for part, tensor in zip(parts, expert.chunk(len(parts)), strict=True):
                yield f"{place}.{number}.{part}.weight", tensor


def _settled(request: Request, params: SamplingParams) -> list[Rollout]:
    """Of the rollouts that a request comes with, those that need no more tokens."""
    return [done for rollout in request.begun if (done := settled(rollout, params)) is not None]


def _lines(place: int, request: Request, params: SamplingParams) -> Iterator[_Line]:
    """What is to be decoded for a request."""
    prompt = request.prompt
    if missing := missing_samples(request, params):
        yield _Line(place, prompt, prompt.tokens, tuple(missing), params.limit())
    for rollout in request.begun:
        if settled(rollout, params) is None:
            room = params.limit(rollout.trained) - rollout.tokens.numel()
            yield _Line(place, prompt, torch.cat((prompt.tokens, rollout.tokens)), (rollout.sample,), room, rollout)


def _missing(requests: Iterable[Request]) -> str:
    names = [request.prompt.id for request in requests]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"without an answer: {', '.join(names[:_LISTED])}{more}"
