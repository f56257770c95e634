"""The commands in the examples' READMEs work as they are written: a shell expands them, and `clipo` parses them."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from paths import EXAMPLES

from clipo_megatron.checks.run import check
from clipo_megatron.cli import main as cli
from clipo_megatron.config.load import load
from clipo_megatron.config.schema import RunConfig

ROOT = EXAMPLES.parent
PAGES = sorted(EXAMPLES.rglob("README.md"))
# Shell functions in place of the commands, which print their arguments.
SPY = """
tell() { printf '%s\\x1f' "$@"; printf '\\x1e'; }
clipo() { tell clipo "$@"; }
python() { tell python "$@"; }
make() { tell make "$@"; }
"""
# The architecture of the quickstart's model.
SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}
BLOCK = re.compile(r"(?:^(?: {4}.*)?\n)+", re.MULTILINE)
COMMAND = re.compile(r"^(clipo|python|make) ", re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """The arguments of all commands in the page's indented blocks, as a shell expands them."""
    blocks = [re.sub(r"^ {4}", "", each, flags=re.MULTILINE) for each in BLOCK.findall(page)]
    script = "".join(each for each in blocks if COMMAND.search(each.replace(".venv/bin/", ""))).replace(
        ".venv/bin/", ""
    )
    printed = subprocess.run(
        ["bash", "-euc", SPY + script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [command.rstrip("\x1f").split("\x1f") for command in printed.split("\x1e") if command]


def understood(words: list[str], recipe: str) -> RunConfig | None:
    """The configuration that a `clipo` command means; overrides of a run's folder are those of its recipe."""
    options = cli.parse(words[1:])
    if not hasattr(options, "config"):
        return None
    given = options.config if options.config.endswith(".yaml") else recipe
    return loaded(given, tuple(options.overrides))


@cache
def loaded(file: str, overrides: tuple[str, ...]) -> RunConfig:
    """A configuration, read once."""
    return load(ROOT / file, overrides)


def trial(config: RunConfig, folder: Path) -> RunConfig:
    """The same with a model's folder that is there."""
    (folder / "config.json").write_text(json.dumps(SMALL))
    for name in ("model.safetensors", "chat_template.jinja"):
        (folder / name).touch()
    return replace(config, model=replace(config.model, path=str(folder)))


@pytest.mark.parametrize("page", PAGES, ids=[page.parent.name for page in PAGES])
def test_every_command_is_understood(page: Path, tmp_path: Path) -> None:
    found, recipe = commands(page.read_text()), ""
    assert found
    outputs = set()
    for program, *words in found:
        if program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        elif program == "python":
            assert (ROOT / words[0]).is_file(), words
        else:
            recipe = next((word for word in words if word.endswith(".yaml")), recipe)
            config = understood([program, *words], recipe)
            if "rollout.engine=local" in words:
                check(trial(config, tmp_path), ranks=1)
            if words[0] in ("train", "serve"):
                outputs.add(config.train.output)
            if words[0] == "eval" and words[1].startswith("runs/"):
                assert words[1] in outputs, f"nothing trains {words[1]}"


@pytest.mark.parametrize("track", ["track1_gsm8k", "track2_math"])
def test_what_a_track_compares_was_evaluated_on_the_sets_that_are_fetched(track: str) -> None:
    page = (EXAMPLES / track / "README.md").read_text()
    found = commands(page)
    evaluated = [words for words in found if words[:2] == ["clipo", "eval"]]
    written = [words[words.index("--output") + 1] for words in evaluated]
    (compared,) = [words[2:] for words in found if words[:2] == ["clipo", "compare"]]
    assert sorted(compared) == sorted(written)
    recipe = next(word for words in found for word in words if word.endswith(".yaml"))
    fetched = (EXAMPLES / track / "fetch.py").read_text()
    for words in evaluated:
        names = [Path(source.path).stem for source in understood(words, recipe).data.eval]
        assert len(names) > 5 and all(f'"{name}"' in fetched for name in names)


def test_commands_that_cannot_be_typed_would_be_found() -> None:
    with pytest.raises(SystemExit):
        understood(["clipo", "report", "runs/a", "--sideways"], "")
    with pytest.raises(subprocess.CalledProcessError):
        commands("\n    clipo eval runs/a 'data.eval=[\n")
    with pytest.raises(ValueError, match="no such setting"):
        understood(["clipo", "train", "examples/quickstart/quickstart.yaml", "clipo.wieght=1"], "")
