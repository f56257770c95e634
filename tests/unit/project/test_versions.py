"""Versions: pyproject.toml says what may do, constraints.txt with what the tests run, and this environment is that."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, version

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
OPTIONAL = [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


@pytest.mark.parametrize("each", [*NEEDED, *OPTIONAL], ids=str)
def test_a_package_has_a_range_and_a_tested_version_in_it(each: Requirement):
    assert each.name in PINS, "constraints.txt pins what pyproject.toml names"
    assert Version(PINS[each.name]) in each.specifier
    operators = {part.operator for part in each.specifier}
    assert operators <= {">=", "<", "!="} and ">=" in operators, "an exact pin is in the way of other packages"


def test_constraints_name_nothing_else():
    assert set(PINS) == {each.name for each in (*NEEDED, *OPTIONAL)}


@pytest.mark.parametrize("name", PINS)
def test_this_environment_has_the_tested_versions(name: str):
    try:
        assert Version(version(name)).public == PINS[name]
    except PackageNotFoundError:
        assert name in {each.name for each in OPTIONAL}, f"{name} is needed"


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("torch", ["2.7.1", "2.8.0"]),  # of engines and trainers in 2025
        ("transformers", ["4.57.1"]),
        ("numpy", ["1.26.4", "2.2.6"]),
        ("pyarrow", ["19.0.0"]),
        ("rich", ["13.9.4"]),
    ],
)
def test_versions_of_other_engines_and_trainers_are_in_range(name: str, others: list[str]):
    (needed,) = (each for each in NEEDED if each.name == name)
    assert all(needed.specifier.contains(other) for other in others)


def test_make_install_takes_the_tested_versions():
    shown = subprocess.run(
        ["make", "--dry-run", "install", "VENV=nowhere"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert f'"torch=={PINS["torch"]}"' in shown and "--constraint constraints.txt --editable" in shown
