"""The new method of docs/extending.md, written to a file as it stands there: named by its file, and built in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from method_tables import table_of
from paths import ROOT

from clipo_megatron.algorithms import methods
from clipo_megatron.algorithms.build import build_algorithm
from clipo_megatron.algorithms.methods import registry
from clipo_megatron.checks.methods import method_problems
from clipo_megatron.cli.methods import listing
from clipo_megatron.config.schema import PluginConfig, RunConfig

PAGE = (ROOT / "docs" / "extending.md").read_text()
CODE, CONFIGURATION, LINE, ROW = (
    re.search(rf"^```{kind}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[1]
    for kind in ("python", "yaml", "text", "md")
)
CLASS = "LengthBonus"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The page's code in a file of the name that its configuration says."""
    plugin = yaml.safe_load(CONFIGURATION)["algorithm"]["plugins"][0]
    path, name = tmp_path / plugin["name"].partition(":")[0], plugin["name"].partition(":")[2]
    assert name == CLASS
    path.write_text(CODE)
    return path


@pytest.fixture(params=["named by its file", "built in"])
def name(request: pytest.FixtureRequest, file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What algorithm.plugins calls it. To build it in, its file is among the methods and its line in the table."""
    if request.param == "named by its file":
        return f"{file}:{CLASS}"
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(file.parent)])
    monkeypatch.delitem(sys.modules, f"{methods.__name__}.{file.stem}", raising=False)
    (line,) = yaml.safe_load("{" + LINE.strip().rstrip(",") + "}").items()
    monkeypatch.setitem(registry.PLUGINS, *line)
    return line[0]


def configured(name: str, **options: object) -> RunConfig:
    config = RunConfig()
    config.clipo.enabled = False
    config.algorithm.plugins = [PluginConfig(name, options)]
    return config


def test_the_code_keeps_the_house_s_style(file: Path) -> None:
    for command in (["check"], ["format", "--check"]):
        words = [
            sys.executable,
            "-m",
            "ruff",
            *command,
            "--no-cache",
            "--config",
            str(ROOT / "pyproject.toml"),
            str(file),
        ]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({}, None),
        ({"weight": 0.2, "floor": -1}, None),
        ({"weigth": 0.2}, "has no such option. Did you mean weight?"),
        ({"weight": -0.2}, "options.weight = -0.2: it must be at least 0"),
        ({"floor": "low"}, "a number was expected"),
    ],
)
def test_its_options_are_checked(name: str, options: dict[str, object], part: str | None) -> None:
    found = [str(problem) for problem in method_problems(configured(name, **options))]
    assert [part in each for each in found] == ([] if part is None else [True])


def test_it_takes_steps_and_goes_on_after_a_resumption(name: str) -> None:
    table, _ = table_of([[True, True, False]])
    table.response_length = torch.tensor([10, 20, 5])
    algorithm = build_algorithm(configured(name))
    first = algorithm.assign_advantages(table, [])
    assert first.reward.tolist() == [1.0, 1.0, 0.0], "there is nothing to compare with yet"
    algorithm.after_update(first, learned=True)
    resumed = build_algorithm(configured(name))
    resumed.load_state_dict(algorithm.state_dict())
    second = resumed.assign_advantages(table, [])
    torch.testing.assert_close(second.reward, torch.tensor([1.0, 0.93, 0.0]))
    assert second.advantage[0] > second.advantage[1] > second.advantage[2]


def test_a_method_that_is_built_in_is_listed(name: str) -> None:
    if name in registry.PLUGINS:
        shown = "\n".join(listing([name]))
        assert "reward for the shortest correct answers so far (arXiv 2505.11225)" in shown
        assert "# of the bonus, beside the grader's reward" in shown


def test_built_in_as_the_page_says_it_passes_style_and_the_tests_of_methods(file: Path, tmp_path: Path) -> None:
    """A copy of the project with the page's file, line and row in their places."""
    copy = tmp_path / "copy"
    for part in ("clipo_megatron", "docs", "tests/support", "tests/unit/algorithms"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    folder = copy / "clipo_megatron" / "algorithms" / "methods"
    shutil.copy(file, folder)
    insert(folder / "registry.py", after="PLUGINS = {\n", text=f"    {LINE.strip()}\n")
    table = "|---|---|---|---|---|\n"
    head, tail = (copy / "docs" / "methods.md").read_text().split("## Plug-ins")
    assert tail.count(table) == 1
    (copy / "docs" / "methods.md").write_text(f"{head}## Plug-ins{tail.replace(table, table + ROW)}")
    environment = os.environ | {"PYTHONPATH": str(copy)}
    tests = ["tests/unit/algorithms/test_methods_listing.py", "-k", "length_bonus or every_method"]
    for command in (
        ["ruff", "check"],
        ["ruff", "format", "--check"],
        ["pytest", "-q", "-p", "no:cacheprovider", "--noconftest", *tests],
    ):
        words = [sys.executable, "-m", *command, *(["clipo_megatron/algorithms"] if command[0] == "ruff" else [])]
        done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b[6-9] passed", done.stdout), "the tests of this method ran"


def insert(file: Path, *, after: str, text: str) -> None:
    content = file.read_text()
    assert content.count(after) == 1
    file.write_text(content.replace(after, after + text))
