"""The text of a response keeps every tag that graders read, and no control token."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clipo_megatron.data.response_text import response_decoder
from clipo_megatron.rewards import grade

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "[THINK]", "####", "<|START_THINKING|>"]
CONTROL = ["<|im_start|>", "<|im_end|>", "<pad>", "</s>", "<end_of_turn>", "<｜end▁of▁sentence｜>"]


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level tokenizer that declares tags and control tokens as special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([*TAGS, *CONTROL])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")


def decoded(tokenizer, text: str) -> str:
    return response_decoder(tokenizer)(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_special_tokens_that_are_tags_stay(tokenizer):
    text = "<|START_THINKING|><think> \\boxed{5}</think> So six [THINK] #### <answer>6</answer>"
    assert set(tokenizer(text)["input_ids"]) & set(tokenizer.all_special_ids + list(tokenizer.added_tokens_decoder))
    assert decoded(tokenizer, text) == text


@pytest.mark.parametrize("token", CONTROL)
def test_control_tokens_go(tokenizer, token):
    assert decoded(tokenizer, f"{token}42{token}") == "42"
    assert decoded(tokenizer, f"#### 42{token}") == "#### 42"


def test_a_box_inside_thinking_earns_nothing_though_the_tags_are_special_tokens(tokenizer):
    text = decoded(tokenizer, "<think> \\boxed{5}</think> So six</s>")
    assert grade(text, "5", data_source="math") == 0.0
    text = decoded(tokenizer, "<think> \\boxed{5}</think> So \\boxed{6}</s>")
    assert grade(text, "6", data_source="math") == 1.0


def test_text_is_decoded_as_before_where_no_tag_is_special(tokenizer):
    ids = tokenizer("a  b , c.\nd é 漢</s>")["input_ids"]
    assert response_decoder(tokenizer)(ids) == tokenizer.decode(ids, skip_special_tokens=True)
