"""Versions: pyproject.toml says what may do, constraints/ with what the tests run; this environment is of one set."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Their tested versions are those of their environments for CPUs.
ENGINES = {"sglang", "vllm"}
NEEDED = [Requirement(line) for line in (*PROJECT["dependencies"], *EXTRAS["train"])]
OPTIONAL = [Requirement(line) for name, lines in EXTRAS.items() if name not in {"train", *ENGINES} for line in lines]
# the least and the greatest Python of each set
SETS = {"megatron-0.16": ("3.11", "3.13"), "megatron-0.19": ("3.12", "3.13")}


def pins(path: str) -> dict[str, str]:
    """The versions that a file of constraints pins, and those of the file that it includes."""
    text = (ROOT / path).read_text()
    included = re.findall(r"^-c (\S+)$", text, re.MULTILINE)
    own = dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))
    return {name: pin for each in included for name, pin in pins(f"constraints/{each}").items()} | own


PINS = {name: pins(f"constraints/{name}.txt") for name in SETS}
HERE = next((name for name, each in PINS.items() if each["megatron-core"] == version("megatron-core")), "megatron-0.16")


def applies(each: Requirement, python: str) -> bool:
    """Whether a requirement is one of a Python of this version."""
    return each.marker is None or each.marker.evaluate({"python_version": python})


def test_every_file_of_constraints_is_a_set_or_shared_by_sets():
    assert {path.stem for path in (ROOT / "constraints").iterdir()} == {*SETS, "shared"}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("each", [*NEEDED, *OPTIONAL], ids=str)
def test_a_package_has_a_range_and_a_tested_version_in_it(each: Requirement, name: str):
    assert each.name in PINS[name], "constraints/ pins what pyproject.toml names"
    if any(applies(each, python) for python in SETS[name]):
        assert all(Version(PINS[name][each.name]) in each.specifier for python in SETS[name] if applies(each, python))
    operators = {part.operator for part in each.specifier}
    assert operators <= {">=", "<", "!="} and ">=" in operators, "an exact pin is in the way of other packages"


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_a_server_has_a_range_and_a_tested_version_in_it(engine: str):
    (each,) = map(Requirement, EXTRAS[engine])
    tested = (ROOT / f"clipo_megatron/serving/requirements/{engine}.txt").read_text()
    assert re.search(rf"^{engine}(-cpu)?==(\S+)$", tested, re.MULTILINE)[2] in each.specifier


@pytest.mark.parametrize("name", SETS)
def test_constraints_name_nothing_else(name: str):
    assert set(PINS[name]) == {each.name for each in (*NEEDED, *OPTIONAL)}


@pytest.mark.parametrize("name", PINS[HERE])
def test_this_environment_has_the_tested_versions(name: str):
    try:
        assert Version(version(name)).public == PINS[HERE][name]
    except PackageNotFoundError:
        assert name in {each.name for each in OPTIONAL}, f"{name} is needed"


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("torch", ["2.11.0", "2.14.1"]),  # of engines and trainers in 2026
        ("transformers", ["5.0.0", "5.17.0"]),
        ("numpy", ["1.26.4", "2.2.6"]),
        ("pyarrow", ["19.0.0"]),
        ("rich", ["13.9.4"]),
    ],
)
def test_versions_of_other_engines_and_trainers_are_in_range(name: str, others: list[str]):
    (needed,) = (each for each in NEEDED if each.name == name)
    assert all(needed.specifier.contains(other) for other in others)


@pytest.mark.parametrize(
    ("python", "release", "is_in_range"),
    [("3.11", "0.16.1", True), ("3.11", "0.17.1", False), ("3.12", "0.16.1", True), ("3.13", "0.19.2", True)],
)
def test_each_python_has_its_releases_of_megatron(python: str, release: str, is_in_range: bool):
    (own,) = (each for each in NEEDED if each.name == "megatron-core" and applies(each, python))
    assert (release in own.specifier) == is_in_range


@pytest.mark.parametrize("words", [[], ["SET=megatron-0.19"]], ids=" ".join)
def test_make_install_takes_the_tested_versions(words: list[str]):
    shown = subprocess.run(
        ["make", "--dry-run", "install", "VENV=nowhere", *words], cwd=ROOT, capture_output=True, text=True
    ).stdout
    name = words[0].partition("=")[2] if words else "megatron-0.16"
    assert f'"torch=={PINS[name]["torch"]}"' in shown
    assert f'--constraint constraints/{name}.txt --editable ".[train,dev]"' in shown


# Modules of the packages that only the extra `train` brings.
OF_TRAINING = ["megatron", "transformers", "safetensors", "reasoning_gym", "pyarrow", "gguf", "aiohttp", "orjson"]
WITHOUT_THEM = f"""
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OF_TRAINING}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def without_training(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in an interpreter that finds none of the packages of training."""
    return subprocess.run([sys.executable, "-c", WITHOUT_THEM + script], capture_output=True, text=True)


def test_the_algorithm_and_the_graders_work_without_the_packages_of_training():
    done = without_training(
        "import torch\ntorch.manual_seed(0)\n"
        "from clipo_megatron.algorithms.clipo import ContrastiveHead, contrastive_loss, contrastive_reward\n"
        "from clipo_megatron.rewards import GraderPool, grade\n"
        "assert (grade(r'\\boxed{1/2}', '0.5'), grade(r'\\boxed{2}', '0.5')) == (1.0, 0.0)\n"
        "correct, group = torch.tensor([True, True, False]), torch.zeros(3, dtype=torch.int64)\n"
        "loss, valid = contrastive_loss(ContrastiveHead(hidden_size=8)(torch.randn(3, 8)), correct, group)\n"
        "assert valid.tolist() == [True, True, False] and loss[valid].gt(0).all()\n"
        "assert contrastive_reward(loss.detach(), valid & correct).shape == (3,)\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_command_says_which_packages_it_misses():
    config = ROOT / "examples/quickstart/quickstart.yaml"
    done = without_training(
        "from clipo_megatron.cli.main import main\n"
        f"sys.exit(main(['plan', {str(config)!r}, 'rollout.engine=sglang', '--dry-run']))"
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("clipo: the package ") and "pip install 'clipo-megatron[train]'" in done.stderr
    assert "Traceback" not in done.stderr
