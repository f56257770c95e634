"""Builds a run's method and shows it the training problems: before the run as a check, and by the run itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clipo_megatron.algorithms import late_torch as torch
from clipo_megatron.algorithms.algorithm import Algorithm
from clipo_megatron.algorithms.hook import HookContext
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.data.prompt_table import PromptsById
from clipo_megatron.data.rendering import ChatRenderer, Messages
from clipo_megatron.flow import Prompt, Rollout
from clipo_megatron.rewards.pool import asked_by
from clipo_megatron.rewards.voting import answer_key

if TYPE_CHECKING:
    from torch import Tensor


def build_method(config: RunConfig, tokenizer: Any, prompts: Sequence[Prompt], stop_ids: Sequence[int]) -> Algorithm:
    """Build the base method and the plug-ins, and let them look at the training problems; see `build_hook_context`.

    Raises:
        ConfigError: a hook cannot be found or built, or needs what nothing provides.
    """
    from clipo_megatron.algorithms.build import build_algorithm

    return build_algorithm(config, build_hook_context(config, tokenizer, prompts, stop_ids))


def build_hook_context(
    config: RunConfig, tokenizer: Any, prompts: Sequence[Prompt], stop_ids: Sequence[int] = ()
) -> HookContext:
    """Build what the hooks of a method may use of the run they belong to.

    Args:
        config: the configuration.
        tokenizer: the policy's.
        prompts: the training problems.
        stop_ids: tokens that end a response; the first stands for the end where the tokenizer itself names none.
    """
    renderer = ChatRenderer(tokenizer, config.model.system_prompt, config.model.template_options)

    def tokenize(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)

    def encode(messages: Messages) -> Tensor:
        return tokenize(renderer.render(messages)[0])

    def answer(prompt: Prompt, rollout: Rollout) -> str:
        mode = config.reward.by_source.get(prompt.data_source, config.reward.mode)
        asked = asked_by(prompt)
        return answer_key(rollout.text, data_source=prompt.data_source, mode=mode.value, asked=asked) or ""

    end = next((each for each in (tokenizer.eos_token_id, *stop_ids) if each is not None), None)
    mask = next((each for each in (tokenizer.mask_token_id, tokenizer.pad_token_id, end) if each is not None), 0)
    by_id = PromptsById(prompts)
    return HookContext(config, by_id, encode, tokenize, answer, mask_id=mask, end_id=mask if end is None else end)
