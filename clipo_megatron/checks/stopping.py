"""Checks that a response can end: by a token that the run stops at, where the chat template ends a turn."""

from __future__ import annotations

from typing import Any

from clipo_megatron.config.errors import ConfigError, ConfigProblem
from clipo_megatron.config.model_folder import hf_folder
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.data.stopping import stop_ids, unended_turn


def check_stopping(config: RunConfig, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that the run stops at, and refuse it where nothing ends a turn; `tokenizer` is the policy's.

    Raises:
        ConfigError: every response that ends its turn as the template writes it would go on to the length limit; the
            message names the tokens that could end it.
        DataError: a file or setting names an end that is no token.
    """
    tokens = config.rollout.stop_tokens
    ids = stop_ids(hf_folder(config.model.path), tokenizer, tokens)
    if tokens is not None:
        return ids  # it says which tokens end a turn, or that none needs to
    found = unended_turn(tokenizer, ids, config.model.template_options)
    if found is None:
        return ids
    reason = f"nothing ends a turn, so responses would go on to rollout.max_new_tokens: {found.reason}. Candidates: "
    if found.candidates:
        reason += ", ".join(found.candidates)
        remedy = f"Name the right one, such as rollout.stop_tokens=['{found.candidates[0]}']"
    else:
        reason += "none is known"
        remedy = "Add such a token to the tokenizer, and name it there"
    remedy += ", or set it to [] if the model ends its responses in another way"
    raise ConfigError([ConfigProblem("rollout.stop_tokens", reason, remedy, tokens)])
