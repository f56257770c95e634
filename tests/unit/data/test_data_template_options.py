"""model.template_options: what a chat template reads beside the turns reaches it, and nothing else is taken."""

import pytest
from tiny_models import tiny_llama
from tokenized import tokenize
from transformers import AutoTokenizer

from clipo_megatron.checks.method import build_hook_context
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.load import load
from clipo_megatron.data.rendering import ChatRenderer
from clipo_megatron.data.sources import DataError, Row
from clipo_megatron.data.splits import ProblemSets

# As Qwen3's: thinking is on unless enable_thinking is false.
THINKING = """\
{%- for turn in messages %}<|im_start|>{{ turn.role }}
{{ turn.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think></think>
{% endif %}{% endif %}
{%- if reasoning_effort is defined %}Effort: {{ reasoning_effort }}{% endif %}
{%- if depth is defined %}{{ "x" * depth }}{% endif %}"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_llama(tmp_path_factory.mktemp("options") / "model", layers=1)
    (folder / "chat_template.jinja").write_text(THINKING)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model):
    return AutoTokenizer.from_pretrained(model)


def rendered(tokenizer, **options):
    return ChatRenderer(tokenizer, None, options).render([{"role": "user", "content": "Why?"}])[0]


def test_options_reach_the_template(tokenizer):
    assert "<think>" not in rendered(tokenizer) and "<think>" not in rendered(tokenizer, enable_thinking=True)
    assert rendered(tokenizer, enable_thinking=False).endswith("<think></think>\n")
    assert rendered(tokenizer, reasoning_effort="high").endswith("Effort: high")
    row = Row("a/0", ({"role": "user", "content": "Why?"},), "a", "x", {})
    plain, without = (
        tokenize([row], tokenizer, system_prompt=None, max_prompt_tokens=99, template_options=options)[0]
        for options in ({}, {"enable_thinking": False})
    )
    assert tokenizer.decode(without.tokens) == tokenizer.decode(plain.tokens) + "<think></think>\n"


def test_tools_are_handed_on_to_a_template_that_reads_them(tokenizer):
    with pytest.raises(DataError, match="does not read it"):
        rendered(tokenizer, tools=[])
    template = tokenizer.chat_template
    tokenizer.chat_template = "{% for each in tools or [] %}{{ each.name }} {% endfor %}" + template
    try:
        assert rendered(tokenizer, tools=[{"name": "search"}]).startswith("search <|im_start|>")
    finally:
        tokenizer.chat_template = template


def test_every_rendering_of_a_run_has_them(model, tokenizer, tmp_path):
    from small_runs import write_config

    config = load(write_config(tmp_path, model), ["model.template_options={enable_thinking: false}"])
    sets = ProblemSets(config, tokenizer, print)
    held_out = sets.held_out()
    train = sets.training(held_out)
    ids = [build_hook_context(config, tokenizer, train).encode([{"role": "user", "content": "Why?"}])]
    texts = [tokenizer.decode(each) for each in [*ids, *(prompt.tokens for prompt in (*train, *held_out))]]
    assert len(texts) == 17 and all(text.endswith("<think></think>\n") for text in texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_thinkin": False}, "enable_thinkin = False: .* does not read it. Did you mean enable_thinking"),
        ({"colour": 1}, "does not read it; it reads depth, enable_thinking, reasoning_effort"),
        ({"messages": []}, "given to the template by every rendering"),
        ({"add_generation_prompt": False}, "given to the template by every rendering"),
        ({"tokenize": True}, "given to the template by every rendering"),
        ({"bos_token": "x"}, "given to the template by every rendering"),
        ({"enable_thinking": "false"}, "'false': the chat template asks for true or false here"),
        ({"enable_thinking": 0}, "0: the chat template asks for true or false here"),
    ],
)
def test_wrong_options_are_refused_in_words(tokenizer, options, message):
    with pytest.raises(DataError, match=message):
        rendered(tokenizer, **options)


def test_a_value_that_breaks_the_template_is_named(tokenizer):
    with pytest.raises(DataError, match=r"cannot render the turns with model.template_options = .*depth: \[1\]"):
        rendered(tokenizer, depth=[1])


def test_options_are_a_mapping(model, tmp_path):
    from small_runs import write_config

    file = write_config(tmp_path, model)
    with pytest.raises(ConfigError, match=r"model.template_options = .*a mapping was expected"):
        load(file, ["model.template_options=[enable_thinking]"])
    assert load(file, ["model.template_options.enable_thinking=false"]).model.template_options == {
        "enable_thinking": False
    }
