"""Chat templates are rendered as transformers renders them, and one that does not end is ended."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from tiny_models import tiny_llama
from transformers import AutoTokenizer

from clipo_megatron.data import templates
from clipo_megatron.data.rendering import ChatRenderer
from clipo_megatron.data.sources import DataError
from clipo_megatron.data.stopping import unended_turn
from clipo_megatron.data.templates import TemplateLimitError, TemplateRefusal, render_template
from clipo_megatron.data.tokenizer import load_tokenizer

TURNS = [{"role": "user", "content": "What is \U0001f600?"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return AutoTokenizer.from_pretrained(tiny_llama(Path(tmp_path_factory.mktemp("model"))))


@pytest.fixture
def write(tokenizer, monkeypatch):
    """Gives the tokenizer another template."""
    monkeypatch.setattr(templates, "CPU_S", 1)
    monkeypatch.setattr(templates, "_REFUSED", {})

    def change(template: str):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return tokenizer

    return change


@pytest.mark.parametrize("open_turn", [False, True])
def test_texts_are_those_of_transformers(tokenizer, open_turn):
    conversations = [TURNS, [{"role": "system", "content": "Be brief."}, *TURNS]]
    expected = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=open_turn)
    assert render_template(tokenizer, conversations, open_turn=open_turn) == expected


@pytest.mark.parametrize("known", [True, False])
def test_no_code_of_a_tokenizer_is_run(tmp_path, monkeypatch, known):
    """What can be read without its code is read without it, and nobody is asked for leave."""
    folder = tiny_llama(tmp_path / "model")
    file = folder / "tokenizer_config.json"
    facts = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    file.write_text(json.dumps(facts | ({} if known else {"tokenizer_class": "Own"})))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: ...\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    if known:
        assert load_tokenizer(folder).chat_template
    else:
        with pytest.raises(DataError, match=r"is code that comes with the model .*and no code of a model is run"):
            load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
POWER = "{{ 10 ** (10 ** 9) }}"  # computed while the template is compiled


ENDLESS = r"the chat template does not end: it was stopped after 1 s"


def test_a_template_that_does_not_end_is_stopped(write):
    start = time.process_time()
    with pytest.raises(TemplateLimitError, match=ENDLESS):
        render_template(write(POWER), [TURNS])
    assert time.process_time() - start < 1.0, "the time is another process's"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'a' * 10 ** 10 }}", "it needs more than a gigabyte of memory"),
        (
            "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
            "memory",
        ),
        ("{{ 'a' * 5000000 }}", "it writes 5,000,000 characters"),
    ],
)
def test_a_template_that_fills_the_memory_is_refused(write, monkeypatch, template, reason):
    monkeypatch.setattr(templates, "CPU_S", 30)  # a busy machine takes long over a gigabyte
    with pytest.raises(TemplateLimitError, match=f"the chat template is refused: .*{reason}"):
        render_template(write(template), [TURNS])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", "does not parse: line 1"),
        ("{{ raise_exception('no system turn') }}", "refuses the turns: no system turn"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot render the turns: RecursionError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses the turns: .*unsafe"),
        ("{{ range(10 ** 9) }}", "cannot render the turns: OverflowError"),
    ],
)
def test_what_a_template_cannot_render_is_said_in_words(write, template, reason):
    with pytest.raises(TemplateRefusal, match=reason):
        render_template(write(template), [TURNS])


def test_an_endless_template_is_tried_once_by_whoever_renders(write):
    for use in (lambda it: ChatRenderer(it, "").render(TURNS), lambda it: unended_turn(it, ())):
        with pytest.raises(TemplateLimitError, match=ENDLESS):
            use(write("{% if messages|length > 1 or add_generation_prompt is defined %}" + LOOP + "{% endif %}x"))


def test_a_fork_leaves_the_process_of_its_parent_alone(tokenizer):
    """Where both wrote into the same pipes, each could read the other's texts."""
    conversation = [[{"role": "user", "content": "one"}]]
    text, running = render_template(tokenizer, conversation), templates._PROCESS._process.pid
    if (child := os.fork()) == 0:
        same = render_template(tokenizer, conversation) == text
        os._exit(0 if same and templates._PROCESS._process.pid != running else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert render_template(tokenizer, conversation) == text and templates._PROCESS._process.pid == running
