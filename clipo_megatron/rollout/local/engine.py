"""The local engine: a transformers decoder inside the training process, with a decoding loop of our own.

It is faster than transformers' `generate`: a prompt is prefilled once for its G samples, a prefix that the prompts of a
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
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from clipo_megatron.data.response_text import response_decoder
from clipo_megatron.flow import Prompt, Rollout, RolloutGroup
from clipo_megatron.rollout.continuation import append_tokens, if_finished, missing_samples
from clipo_megatron.rollout.engine import (
    Cancelled,
    EngineError,
    Generation,
    InFlight,
    Memory,
    Request,
    SamplingParams,
    check_prompts,
    name_prompts,
    never,
)
from clipo_megatron.rollout.local.decoding import DecodeBatch, NonFiniteLogits, prefill
from clipo_megatron.rollout.local.sampling import rollout_uniforms
from clipo_megatron.rollout.local.supported import configuration, unusable

try:
    from transformers.initialization import no_init_weights
except ImportError:  # transformers 4
    from transformers.modeling_utils import no_init_weights


class _Line(NamedTuple):
    """Tokens that one or more samples of a request continue."""

    index: int  # of the request in its call
    prompt: Prompt
    tokens: Tensor  # [P] int64: the prompt's tokens, and those of a partial rollout
    samples: tuple[int, ...]
    limit: int  # new tokens of each sample, at most
    begun: Rollout | None = None


class LocalEngine:
    """Implements the `Engine` contract with transformers, in the process and on the device of its caller.

    It is built from `config.json` and the tokenizer of a Hugging Face folder; weights come only through `load_weights`.
    The same weights and the same (seed, step, prompt id, occurrence, sample) give the same response in any batch,
    except for floating-point ties, which bf16 makes likely.

    Args:
        model_dir: Hugging Face folder.
        dtype: dtype of weights and activations; log-probs are always float32.
        device: where weights, cache and logits live. Rollouts are returned on the CPU.
        batch_size: how many sequences are decoded at once, at least 1.

    Raises:
        EngineError: the folder cannot be used.
    """

    def __init__(self, model_dir: str | Path, *, dtype: torch.dtype, device: torch.device | str, batch_size: int = 64):
        if batch_size < 1:
            raise EngineError(
                f"rollout.batch_size is {batch_size}, but at least one sequence is decoded: set it to >= 1."
            )
        self._batch_size = batch_size
        self._version = -1
        self._tokenizer, self._model = _build(Path(model_dir), dtype, torch.device(device))
        self._decode_text = response_decoder(self._tokenizer)

    @property
    def version(self) -> int:
        """The version of the weights in use; -1 before the first load, and after a failed one."""
        return self._version

    def health(self) -> None:
        """Raise EngineError if the engine is closed or has no complete set of weights."""
        if self._model is None:
            raise EngineError("The local engine is closed; construct a new one.")
        if self._version < 0:
            raise EngineError("The local engine has no complete set of weights; call load_weights first.")

    def pause(self, in_flight: InFlight = InFlight.abort) -> None:
        """Does nothing: the engine generates only while its caller asks for the next group."""

    def resume(self) -> None:
        """Does nothing, as `pause` does."""

    def offload(self, *what: Memory) -> None:
        """Does nothing: the cache lives only as long as a generation, and weights stay."""

    def onload(self, *what: Memory) -> None:
        """Does nothing."""

    def take_statistics(self) -> dict[str, float]:
        """Returns no counters: this engine neither retries nor waits."""
        return {}

    def close(self) -> None:
        """Free model and tokenizer. Idempotent."""
        self._model = self._tokenizer = self._decode_text = None
        self._version = -1

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Copy weights of any floating dtype and device into the model, by Hugging Face name.

        A tied `lm_head.weight` may be absent; if present it has to equal the embedding.

        Raises:
            EngineError: lists all unknown, duplicate and missing names and all wrong shapes. The engine cannot generate
                until a load succeeds.
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
        """See `Engine.generate`.

        The deadline counts from this call and includes the caller's time between two groups. `should_cancel` is asked
        before the forward of each token.

        Raises:
            Cancelled: `should_cancel` returned True.
            EngineError: at once for parameters or prompts that do not fit the model; later when the deadline passes or
                a forward fails, with the prompts that have no answer.
        """
        self.health()
        params.check()
        check_prompts(requests, self._model.config.vocab_size)
        self._check_lengths(requests, params)
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

        def missing() -> str:
            return f"without an answer: {name_prompts(unanswered.values())}"

        def check() -> None:
            if should_cancel():
                raise Cancelled
            if time.monotonic() >= deadline:
                raise EngineError(
                    f"Generation passed its deadline of {deadline_s:g} s; {missing()}. "
                    "Raise rollout.deadline_s, or lower rollout.max_new_tokens or data.prompts_per_step."
                )

        done: list[dict[int, Rollout]] = [{} for _ in requests]
        lines = [line for index, request in enumerate(requests) for line in _lines(index, request, params)]
        finished = (
            (index, rollout)
            for index, request in enumerate(requests)
            for begun in request.begun
            if (rollout := if_finished(begun, params)) is not None
        )
        decoded = (found for wave in self._waves(lines) for found in self._decode(wave, params, check))
        try:
            for index, rollout in chain(finished, decoded):
                done[index][rollout.sample] = rollout
                if len(done[index]) == params.samples:
                    request = unanswered.pop(index)
                    rollouts = [done[index][sample] for sample in sorted(done[index])]
                    yield RolloutGroup(request.position, request.prompt, rollouts)
        except NonFiniteLogits as error:
            raise EngineError(
                f"The weights of version {self._version} give log-probs that are not finite; "
                f"{missing()}. Look at the last updates' gradient norms."
            ) from error
        except (EngineError, Cancelled):
            raise
        except RuntimeError as error:
            raise EngineError(
                f"Decoding up to {self._batch_size} sequences at once failed; {missing()}. "
                f"If memory ran out, lower rollout.batch_size. The cause: {error}"
            ) from error

    def _waves(self, lines: list[_Line]) -> Iterator[list[_Line]]:
        """Group lines with the same number of samples, longest first, into waves that fill the batch.

        A line with more samples than the batch has rows is a wave by itself.
        """
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
        """Yield (index of the request, rollout) as each sample of the wave's lines finishes."""
        prefilled = prefill(self._model, [line.tokens for line in wave], check)
        for start in range(0, len(wave[0].samples), self._batch_size):
            rows = [(line, sample) for line in wave for sample in line.samples[start : start + self._batch_size]]
            limits = [line.limit for line, _ in rows]
            uniforms = None
            if params.temperature > 0:
                uniforms = np.stack(
                    [
                        rollout_uniforms(
                            max(limits),
                            seed=params.seed,
                            step=params.step,
                            prompt_id=line.prompt.id,
                            sample=sample,
                            occurrence=line.prompt.occurrence,
                        )
                        for line, sample in rows
                    ]
                )
            batch = DecodeBatch(self._model, prefilled, len(rows) // len(wave), params, limits, uniforms)
            while batch.live:
                check()
                for row, stopped in batch.step():
                    line, sample = rows[row]
                    rollout = append_tokens(
                        line.begun,
                        # Clones, so that a short response does not keep the whole batch's tensors alive.
                        batch.tokens[row, : batch.length].clone().cpu(),
                        batch.logprobs[row, : batch.length].clone().cpu(),
                        torch.full((batch.length,), self._version),
                        sample=sample,
                        finish="stop" if stopped else "length",
                        params=params,
                        decode=self._decode_text,
                    )
                    yield line.index, rollout

    def _check_lengths(self, requests: Sequence[Request], params: SamplingParams) -> None:
        positions = self._model.config.max_position_embeddings
        for prompt in (request.prompt for request in requests):
            if prompt.tokens.numel() + params.max_new_tokens > positions:
                raise EngineError(
                    f"Prompt {prompt.id} has {prompt.tokens.numel()} tokens; with {params.max_new_tokens} new ones it "
                    f"exceeds the model's {positions} positions. Lower max_new_tokens or max_prompt_tokens."
                )


def _build(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer of a Hugging Face folder, and its model with parameters allocated but not initialised."""
    if reason := unusable(folder):
        raise EngineError(reason)
    try:
        config = configuration(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise EngineError(f"The configuration or tokenizer in {folder} cannot be loaded: {error}") from error
    with no_init_weights():  # faster, and leaves the global random state alone
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
        )
    model.tie_weights()
    return tokenizer, model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def _copy_weights(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Copy tensors into the model's parameters; returns what does not fit, a part of a sentence each."""
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
    """Parameters under the names of model folders, where each expert has its own tensors; transformers stacks them."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module, _, last = name.rpartition(".")
        if not module.endswith(".experts"):
            yield name, parameter
            continue
        for number, expert in enumerate(parameter.detach()):
            parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
            for part, tensor in zip(parts, expert.chunk(len(parts)), strict=True):
                yield f"{module}.{number}.{part}.weight", tensor


def _lines(index: int, request: Request, params: SamplingParams) -> Iterator[_Line]:
    """The tokens from which a request's unfinished samples are decoded."""
    prompt = request.prompt
    if missing := missing_samples(request, params):
        yield _Line(index, prompt, prompt.tokens, tuple(missing), params.token_limit())
    for begun in request.begun:
        if if_finished(begun, params) is None:
            limit = params.token_limit(begun.trained) - begun.tokens.numel()
            yield _Line(index, prompt, torch.cat((prompt.tokens, begun.tokens)), (begun.sample,), limit, begun)
