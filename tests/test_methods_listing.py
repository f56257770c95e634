"""What is said of the methods: by `clipo methods`, by the documentation, and in errors."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from clipo_megatron import cli
from clipo_megatron.algorithms.base import Signal
from clipo_megatron.algorithms.build import _class_of
from clipo_megatron.config.errors import spell
from clipo_megatron.config.method_listing import listing
from clipo_megatron.config.methods import BASELINES, PLUGINS, refill_rounds
from clipo_megatron.config.schema import RunConfig

pytestmark = pytest.mark.timeout(60)

METHODS = {**BASELINES, **PLUGINS}
PAGE = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
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
    for option in fields(METHODS[name].options) if METHODS[name].options else ():
        assert re.search(rf"^    {option.name} .*; default {re.escape(spell(option.default))}$", shown, re.MULTILINE)
    others = [other for other in METHODS if other != name and re.search(rf"^  {other} ", shown, re.MULTILINE)]
    assert others == []


def test_meanings_are_the_comments_of_the_options():
    shown = "\n".join(listing(["dapo"]))
    assert "# Lc, tokens below Lmax at which it begins" in shown and "rollout.refill_rounds 9" in shown


def test_an_unknown_method(capsys):
    assert cli.main(["methods", "dappo"]) == 2
    assert "there is no method 'dappo'. Did you mean dapo?" in capsys.readouterr().err


@pytest.mark.parametrize("table", [BASELINES, PLUGINS], ids=["baselines", "plug-ins"])
def test_the_page_has_a_row_for_every_method(table):
    part = PAGE.split("## Plug-ins")[table is PLUGINS]
    assert sorted(re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE)) == sorted(table)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_rows_are_true(row):
    name, _, needs, source, _ = row
    assert source == METHODS[name].source
    signals = {signal.value for signal in Signal} & set(_class_of(METHODS[name].stage).needs)
    assert set(re.findall(r"`(\w+)`", needs)) == signals


def test_rounds_of_dynamic_sampling_are_the_methods_unless_given():
    config = RunConfig()
    assert refill_rounds(config) == 0
    config.algorithm.name = "dapo"
    assert refill_rounds(config) == 9
    config.rollout.refill_rounds = 0
    assert refill_rounds(config) == 0
    config.algorithm.name, config.rollout.refill_rounds = "mine.py:Mine", None
    assert refill_rounds(config) == 0
