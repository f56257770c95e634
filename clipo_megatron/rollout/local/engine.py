"""The local engine: a transformers decoder inside the training process, with a decoding loop of our own.

It is faster than transformers' `generate`: a prompt is prefilled once for its G samples, a prefix that the prompts of a
wave share (system prompt, template) is prefilled once for all of them, keys and values are written in place, and
finished rows leave the batch at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from clipo_megatron.data.response_text import response_decoder
from clipo_megatron.rollout.engine import (
    EngineError,
    Generation,
    InFlight,
    Memory,
    Request,
    SamplingParams,
    check_prompts,
    never,
)
from clipo_megatron.rollout.local.background import LocalGeneration
from clipo_megatron.rollout.local.supported import configuration, unusable
from clipo_megatron.rollout.local.workload import LoadedModel

try:
    from transformers.initialization import no_init_weights
except ImportError:  # transformers 4
    from transformers.modeling_utils import no_init_weights


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
        tokenizer, model = _build(Path(model_dir), dtype, torch.device(device))
        self._loaded: LoadedModel | None = LoadedModel(model, response_decoder(tokenizer), batch_size)
        self._generation: LocalGeneration | None = None  # the newest

    @property
    def version(self) -> int:
        """The version of the weights in use; -1 before the first load, and after a failed one."""
        return -1 if self._loaded is None else self._loaded.version

    @property
    def _model(self) -> nn.Module | None:
        return None if self._loaded is None else self._loaded.model

    def health(self) -> None:
        """Raise EngineError if the engine is closed or has no complete set of weights."""
        if self._loaded is None:
            raise EngineError("The local engine is closed; construct a new one.")
        if self._loaded.version < 0:
            raise EngineError("The local engine has no complete set of weights; call load_weights first.")

    def pause(self, in_flight: InFlight = InFlight.abort) -> None:
        """Let a detached generation wait, and keep what it has; any other runs only while its caller waits for it."""
        self._set_paused(True)

    def resume(self) -> None:
        """Let a detached generation go on."""
        self._set_paused(False)

    def _set_paused(self, paused: bool) -> None:
        if self._loaded is not None:
            with self._no_thread_decodes():
                self._loaded.paused = paused

    def offload(self, *what: Memory) -> None:
        """Does nothing: the cache lives only as long as a generation, and weights stay."""

    def onload(self, *what: Memory) -> None:
        """Does nothing."""

    def take_statistics(self) -> dict[str, float]:
        """Returns no counters: this engine neither retries nor waits."""
        return {}

    def close(self) -> None:
        """End a detached generation, and free model and tokenizer. Idempotent."""
        if self._generation is not None:
            self._generation.close()
        self._generation = self._loaded = None

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Copy weights of any floating dtype and device into the model, by Hugging Face name.

        A tied `lm_head.weight` may be absent; if present it has to equal the embedding. The rollouts of a detached
        generation wait meanwhile, and go on under the new weights, with keys and values computed again.

        Raises:
            EngineError: lists all unknown, duplicate and missing names and all wrong shapes. The engine cannot generate
                until a load succeeds.
        """
        if self._loaded is None:
            raise EngineError("The local engine is closed; construct a new one.")
        with self._no_thread_decodes():
            self._loaded.version = -1
            problems = _copy_weights(self._loaded.model, tensors)
            if problems:
                raise EngineError(
                    f"Weights of version {version} do not fit the model ({len(problems)} problems): "
                    + "; ".join(problems)
                    + ". Check that they were exported from the same architecture as the folder's config.json."
                )
            self._loaded.version = version

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        *,
        deadline_s: float,
        should_cancel: Callable[[], bool] = never,
    ) -> Generation:
        """See `Engine.generate`; groups of a detached generation are yielded too.

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
        before, self._generation = self._generation, None
        if before is not None and not before.detached:
            before.close()
        detached = before if before is not None and before.in_background else None
        generation = LocalGeneration(self._loaded, detached, deadline_s=deadline_s, should_cancel=should_cancel)
        self._generation = generation
        generation.add(requests, params)
        return generation

    @contextmanager
    def _no_thread_decodes(self) -> Iterator[None]:
        """Wait for the forward under way of a detached generation, and let none begin."""
        with nullcontext() if self._generation is None else self._generation.held():
            yield

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
