"""What is said of the methods: by `clipo methods`, by the documentation, and in errors."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
from paths import ROOT

from clipo_megatron.algorithms.hook import Replay, Signal
from clipo_megatron.algorithms.methods.registry import (
    BASE_METHODS,
    PLUGINS,
    base_method_class,
    max_refill_rounds,
    plugin_class,
)
from clipo_megatron.checks.methods import method_problems
from clipo_megatron.cli import main as cli
from clipo_megatron.cli.methods import listing
from clipo_megatron.config.errors import spell
from clipo_megatron.config.load import load, typed_options
from clipo_megatron.config.ranges import range_of
from clipo_megatron.config.schema import PluginConfig, RunConfig

METHODS = {name: base_method_class(name) for name in BASE_METHODS} | {name: plugin_class(name) for name in PLUGINS}
PAGE = (ROOT / "docs" / "methods.md").read_text()
# Texts that YAML wants in quotes.
QUOTED = {"pattern", "hint"}
ROWS = re.findall(r"^\| `(\w+)` \| (.+?) \| (.*?) ?\| (.+?) \| (.+?) \|$", PAGE, re.MULTILINE)


def test_the_command_tells_of_every_method_and_option(capsys):
    assert cli.main(["methods"]) == 0
    shown = capsys.readouterr().out
    for name, method in METHODS.items():
        (line,) = re.findall(rf"^  {name} .*$", shown, re.MULTILINE)
        assert method.summary in line and method.source in line
    assert max(map(len, shown.splitlines())) <= 130


@pytest.mark.parametrize("name", METHODS)
def test_options_are_shown_with_default_and_meaning(name):
    shown = "\n".join(listing([name]))
    for option in fields(METHODS[name].options_class):
        assert re.search(rf"^    {option.name} .*; default {re.escape(spell(option.default))}$", shown, re.MULTILINE)
    others = [other for other in METHODS if other != name and re.search(rf"^  {other} ", shown, re.MULTILINE)]
    assert others == []


def test_meanings_are_the_comments_of_the_options():
    shown = "\n".join(listing(["dapo"]))
    assert "# Lc, tokens below Lmax at which it begins" in shown and "rollout.max_refill_rounds 9" in shown


def test_windows_are_said_of_the_methods_that_have_them():
    shown = {name: "rollout.window_tokens" in "\n".join(listing([name])) for name in METHODS}
    assert [name for name, said in shown.items() if said] == ["t_ppo"]
    assert "rollout.window_tokens" in next(needs for name, needs, *_ in ROWS if name == "t_ppo")


def test_an_unknown_method(capsys):
    assert cli.main(["methods", "dappo"]) == 2
    assert "there is no method 'dappo'. Did you mean dapo?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["clipo"], ["clipo", "grpo"]])
def test_clipo_is_told_to_be_no_method_of_the_tables(words, capsys):
    assert cli.main(["methods", *words]) == 0
    shown = capsys.readouterr().out
    assert "clipo.enabled" in shown and "`clipo settings clipo`" in shown
    assert re.findall(r"^  (\w+) ", shown, re.MULTILINE) == words[1:]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_its_paper_and_explains_its_options(name):
    method = METHODS[name]
    assert method.source in method.__doc__ and method.summary
    shown = "\n".join(listing([name]))
    assert len(re.findall(r"; default .*\n +# \w", shown)) == len(fields(method.options_class))


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_needs_is_shown(name):
    """As its class declares it; what every run has anyway is not told."""
    method = METHODS[name]
    needs = {signal.value for signal in Signal} & set(method.needs)
    (told,) = re.findall(r"^ +needs (.*)$", "\n".join(listing([name])), re.MULTILINE) or [""]
    assert ("values" in needs) == ("a second model" in told)
    assert ("reference_logprobs" in needs) == ("the policy that the run began with" in told)
    assert ("demonstrations" in needs) == ("worked solutions" in told)
    assert bool(method.prompt_variants) == ("more forward" in told)
    assert issubclass(method, Replay) == ("update on again" in told)


@pytest.mark.parametrize("table", [BASE_METHODS, PLUGINS], ids=["base methods", "plug-ins"])
def test_the_page_has_a_row_for_every_method(table):
    part = PAGE.split("## Plug-ins")[table is PLUGINS]
    assert sorted(re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE)) == sorted(table)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_rows_are_true(row):
    name, _, needs, source, _ = row
    assert source == METHODS[name].source
    signals = {signal.value for signal in Signal} & set(METHODS[name].needs)
    assert set(re.findall(r"`(\w+)`", needs)) == signals


@pytest.mark.parametrize("name", METHODS)
def test_a_file_that_writes_every_option_out_is_sound(name, tmp_path):
    """Defaults, as `clipo methods` spells them; with CLIPO and without."""
    options = {each.name: spell(each.default) for each in fields(METHODS[name].options_class)}
    lines = "".join(f"\n      {option}: {value}" for option, value in options.items() if option not in QUOTED)
    place = f"name: {name}\n  options:" if name in BASE_METHODS else f"plugins:\n  - name: {name}\n    options:"
    text = f"model: {{path: somewhere}}\nalgorithm:\n  {place}{lines or ' {}'}\n"
    for clipo in ("false", "true"):
        file = tmp_path / f"{clipo}.yaml"
        file.write_text(f"{text}clipo: {{enabled: {clipo}}}\n")
        parsed_as_written(file, name, options)


def parsed_as_written(file, name, options):
    config = load(file)
    assert list(method_problems(config)) == []
    given = config.algorithm.options if name in BASE_METHODS else config.algorithm.plugins[0].options
    assert set(given) == set(options) - QUOTED
    assert typed_options(METHODS[name].options_class, given) == METHODS[name].options_class()


@pytest.mark.parametrize(
    ("name", "option", "value", "words"),
    [
        ("dapo", "longest", 0, "algorithm.options.longest = 0: it must be at least 1"),
        ("riskpo", "alpha", 1.5, "it must be from 0.001 to 0.999"),
        ("riskpo", "alpha", 0.95, "it is the lower level, and beta is 0.9"),
        ("unlikeliness", "beta", -0.1, "algorithm.plugins[0].options.beta = -0.1: it must be from 0 to 1"),
        ("grace", "temperature", 0.0, "it must be at least 1e-06"),
        ("hapo", "weight", float("inf"), "it must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(name, option, value, words):
    config = RunConfig()
    if name in BASE_METHODS:
        config.algorithm.name, config.algorithm.options = name, {option: value}
    else:
        config.algorithm.plugins = [PluginConfig(name, {option: value})]
    assert words in str(next(method_problems(config)))


def test_ranges_are_of_numbers_and_hold_their_defaults():
    ranged = [option for method in METHODS.values() for option in fields(method.options_class) if range_of(option)]
    assert len(ranged) > 30
    for option in ranged:
        assert re.fullmatch(r"(int|float|Optional\[(int|float)\])", option.type), option
        assert option.default is None or option.default in range_of(option), option


def test_rounds_of_dynamic_sampling_are_the_methods_unless_given():
    config = RunConfig()
    assert max_refill_rounds(config) == 0
    config.algorithm.name = "dapo"
    assert max_refill_rounds(config) == 9
    config.rollout.max_refill_rounds = 0
    assert max_refill_rounds(config) == 0
    config.algorithm.name, config.rollout.max_refill_rounds = "grpo", None
    assert max_refill_rounds(config) == 0
