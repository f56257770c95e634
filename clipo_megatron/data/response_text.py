"""The text of a response, as graders read it: without control tokens, and with every tag.

Some tokenizers declare <think>, </think> or <answer> as special tokens, so that decoding "without special tokens" drops
the very tags that say where an answer is. Here only control tokens are dropped: those that begin, end or fill a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from clipo_megatron.data.asked import ANSWER_TAGS, THINKING

# <|im_end|>, <｜end▁of▁sentence｜>, </s>, <end_of_turn>, [PAD], [INST]
CONTROL_TOKENS = re.compile(
    r"<[|｜][^<>|｜\n]{1,60}[|｜]>|</?s>|\[(?:EOS|BOS|PAD|UNK|CLS|SEP|MASK)\]|\[/?INST\]"
    r"|<(?:eos|bos|pad|unk|mask|sep|cls|eod|eot|eom)>"
    r"|<(?:(?:start|begin|end)_of_\w{1,30}|(?:extra_id_|unused|reserved)\w{0,20})>"
)
_ROLES = tuple(f"{role}_token_id" for role in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"))
_TAGS = {f"<{slash}{name}>" for name in ANSWER_TAGS for slash in ("", "/")}


def response_decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """A function that turns the token ids of a response into its text; every engine uses it."""
    control = control_ids(tokenizer)

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode([token for token in map(int, ids) if token not in control], skip_special_tokens=False)

    return decode


def control_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of the tokens that begin, end or fill a text: the tokenizer's own, and special ones spelt like them."""
    added = tokenizer.get_added_vocab()
    tags = {token for tag, token in added.items() if tag in _TAGS or THINKING.fullmatch(tag)}
    named = {found for role in _ROLES if isinstance(found := getattr(tokenizer, role, None), int)}
    spelt = {
        token
        for token, written in getattr(tokenizer, "added_tokens_decoder", {}).items()
        if getattr(written, "special", False) and CONTROL_TOKENS.fullmatch(str(written))
    }
    return frozenset((named | spelt) - tags)
