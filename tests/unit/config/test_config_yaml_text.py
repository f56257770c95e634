"""YAML that is no configuration is refused in one sentence: what it does to a parser, and what it could run."""

import os

import pytest

from clipo_megatron.config.errors import ConfigError, ConfigProblem, for_terminal, spell
from clipo_megatron.config.load import load
from clipo_megatron.config.yaml_text import sections_of, value_of

SOUND = "model: {path: m}\n"
BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{SOUND}x: {'9' * 5000}\n", "a number of thousands of digits"),
        (f"{SOUND}x: {'[' * 10_000}{']' * 10_000}\n", "nesting depth"),
        (f"{SOUND}x: {'[' * 40}{']' * 40}\n", "nested too deeply"),
        ("".join(f"{' ' * n}a:\n" for n in range(500)), "nested too deeply"),
        (f"{SOUND}{BOMB}", "not valid YAML"),
        (f"{SOUND}x: &x {{y: *x}}\n", "not valid YAML"),
        ("model: !!python/object/apply:os.system ['touch canary']\n", "not valid YAML"),
        (f"{SOUND}model: {{path: n}}\n", "found duplicate key"),
        ("model:\n\tpath: m\n", "cannot start any token"),
        ("x" * (1 << 20) + "y", "more than 1 MiB"),
    ],
    ids=lambda value: value if len(value) < 40 else "",
)
def test_what_is_no_configuration_is_refused_in_a_sentence(text, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=reason) as refusal:
        load("run.yaml")
    assert "run.yaml" in str(refusal.value) and len(str(refusal.value)) < 500
    assert not (tmp_path / "canary").exists()


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="a device or a pipe"):
        load(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="name too long"):
        load(tmp_path / ("x" * 300))


def test_a_mark_of_the_byte_order_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbf" + SOUND.encode())
    assert sections_of(tmp_path / "run.yaml") == {"model": {"path": "m"}}


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 5000, "[" * 40 + "]" * 40, "&a [*a]", "!!python/none"])
def test_an_override_is_refused_as_a_file_is(text):
    with pytest.raises(ValueError) as refusal:
        value_of(text)
    assert type(refusal.value) is ValueError and len(str(refusal.value)) < 250


def test_a_key_of_a_thousand_parts_is_no_setting(tmp_path):
    (tmp_path / "run.yaml").write_text(SOUND)
    with pytest.raises(ConfigError, match="no key of a setting"):
        load(tmp_path / "run.yaml", ["a" + ".b" * 3000 + "=1"])


def test_hundreds_of_problems_are_counted_and_twenty_shown():
    message = str(ConfigError([ConfigProblem(f"key{n}", "wrong", "Correct it") for n in range(300)]))
    assert "300 configuration problems" in message and "and 280 more" in message and "key19" in message
    assert "key20" not in message


def test_a_message_has_nothing_that_a_terminal_obeys():
    said = for_terminal("\x1b[31mred\x07\u202e, é €\nRemedy.")
    assert said == "\\x1b[31mred\\x07\\u202e, é €\nRemedy."
    long = for_terminal(f"key = {'x' * 10_000}: too long. Shorten it.")
    assert len(long) < 2000 and long.startswith("key = x") and long.endswith("too long. Shorten it.")


def test_a_value_that_cannot_be_spelled_has_a_name():
    assert spell(10**5000) == "int too large to be shown"
