"""Prompts: chat templates, system prompts, and the limit on length."""

import pytest
import torch
from tokenized import tokenize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clipo_megatron.data.rendering import ChatRenderer
from clipo_megatron.data.sources import DataError, Row
from clipo_megatron.data.tokenizer import load_tokenizer

# Writes a default system prompt before the first turn, as SmolLM2 and Qwen2.5 do.
DEFAULT_SYSTEM = """\
{%- if messages[0].role != 'system' -%}<s>system
The default.</s>
{% endif -%}
{%- for turn in messages -%}<s>{{ turn.role }}
{{ turn.content }}</s>
{% endfor -%}
{%- if add_generation_prompt -%}<s>assistant
{% endif -%}"""

# Opens with a token of its own and always writes a system block, as Llama 3 does.
ALWAYS_SYSTEM = """\
{{- bos_token -}}
{%- set first = messages[0].content if messages[0].role == 'system' else '' -%}
[system] Date: today. {{ first }}
{%- for turn in messages if turn.role != 'system' -%}[{{ turn.role }}] {{ turn.content }}{%- endfor -%}
{%- if add_generation_prompt -%}[assistant] {%- endif -%}"""

# Insists on alternating turns and opens every user turn with the first token, as Llama 2 and Mistral do.
ALTERNATING = """\
{%- for turn in messages -%}
{%- if (turn.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('turns must alternate') }}{%- endif -%}
{%- if turn.role == 'user' -%}{{ bos_token }}[INST] {{ turn.content }} [/INST]
{%- else -%}{{ turn.content }}</s>{%- endif -%}
{%- endfor -%}"""

# Writes what it likes, differently at every length: cutting is not possible.
UNCUTTABLE = "{{ messages | length }}{% for turn in messages %}{{ turn.content }}{% endfor %}"


def tokenizer(template):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def row(question="Why?", *before, number=0):
    turns = (*before, {"role": "user", "content": question})
    return Row(id=f"demo/{number}", messages=turns, data_source="demo", ground_truth="x", extra={"index": number})


def rendered(template, system_prompt, *rows):
    made = tokenizer(template)
    found = tokenize(rows or [row()], made, system_prompt=system_prompt, max_prompt_tokens=10_000)
    return [made.decode(prompt.tokens) for prompt in found]


@pytest.mark.parametrize(
    ("system_prompt", "text"),
    [
        (None, "<s>system\nThe default.</s>\n<s>user\nWhy?</s>\n<s>assistant\n"),
        ("", "<s>user\nWhy?</s>\n<s>assistant\n"),
        ("Be brief.", "<s>system\nBe brief.</s>\n<s>user\nWhy?</s>\n<s>assistant\n"),
    ],
)
def test_default_system_prompt(system_prompt, text):
    assert rendered(DEFAULT_SYSTEM, system_prompt) == [text]


@pytest.mark.parametrize(
    ("system_prompt", "text"),
    [
        (None, "<s>[system] Date: today. [user] Why?[assistant]"),
        ("", "<s>[user] Why?[assistant]"),
        ("Hi", "<s>[system] Date: today. Hi[user] Why?[assistant]"),
    ],
)
def test_system_prompt_after_an_opening_token(system_prompt, text):
    assert rendered(ALWAYS_SYSTEM, system_prompt) == [text]


def test_alternating_turns():
    assert rendered(ALTERNATING, "") == rendered(ALTERNATING, None) == ["<s>[INST] Why? [/INST]"]
    with pytest.raises(DataError, match="demo/0: the chat template refuses the turns: turns must alternate"):
        rendered(ALTERNATING, "Hi")


def test_a_template_that_always_writes_a_system_prompt_is_refused():
    with pytest.raises(DataError, match=r"model.system_prompt = ''.*Write one out"):
        rendered(UNCUTTABLE, "")


def test_a_rows_own_system_turn():
    own = row("Why?", {"role": "system", "content": "Own."})
    assert rendered(DEFAULT_SYSTEM, None, own)[0].startswith("<s>system\nOwn.</s>")
    assert rendered(DEFAULT_SYSTEM, "Other.", own)[0].startswith("<s>system\nOther.</s>\n<s>user")
    assert rendered(DEFAULT_SYSTEM, "", own) == ["<s>user\nWhy?</s>\n<s>assistant\n"]


def test_earlier_turns_stay():
    turns = ({"role": "user", "content": "1"}, {"role": "assistant", "content": "2"})
    text = "<s>user\n1</s>\n<s>assistant\n2</s>\n<s>user\n3</s>\n<s>assistant\n"
    assert rendered(DEFAULT_SYSTEM, "", row("3", *turns)) == [text]


def test_prompt_carries_the_row():
    made = tokenizer(DEFAULT_SYSTEM)
    (prompt,) = tokenize([row(number=7)], made, system_prompt="Hi", max_prompt_tokens=100)
    assert (prompt.id, prompt.data_source, prompt.ground_truth, prompt.extra) == ("demo/7", "demo", "x", {"index": 7})
    assert prompt.tokens.dtype == torch.int64 and prompt.tokens.ndim == 1
    assert prompt.messages == ({"role": "system", "content": "Hi"}, {"role": "user", "content": "Why?"})
    ids = made.apply_chat_template([dict(turn) for turn in prompt.messages], add_generation_prompt=True)["input_ids"]
    assert prompt.tokens.tolist() == ids


def test_long_prompts_are_left_out_and_counted():
    made = tokenizer(DEFAULT_SYSTEM)
    rows = [row("x" * length, number=length) for length in (1, 2, 3, 4)]
    edge = len(tokenize(rows[1:2], made, system_prompt="", max_prompt_tokens=1000)[0].tokens)
    found = tokenize(rows, made, system_prompt="", max_prompt_tokens=edge)
    assert [prompt.id for prompt in found] == ["demo/1", "demo/2"] and found.too_long == 2
    with pytest.raises(DataError, match=f"leaves out all 4 prompts: the shortest has {edge - 1} tokens"):
        tokenize(rows, made, system_prompt="", max_prompt_tokens=3)


def test_tokenizer_of_a_folder(tmp_path):
    tokenizer(DEFAULT_SYSTEM).save_pretrained(tmp_path / "good")
    assert ChatRenderer(load_tokenizer(tmp_path / "good"), "").render(row().messages)[0].startswith("<s>user")
    tokenizer(None).save_pretrained(tmp_path / "bare")
    with pytest.raises(DataError, match="no chat template"):
        load_tokenizer(tmp_path / "bare")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(tmp_path / "empty")
