"""Of reasoning-gym the part is imported that has the data set that is named."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from clipo_megatron.data.generators import factory_with
name = sys.argv[1]
factory = factory_with(name)
alone = len(factory.DATASETS)
entries = repr([entry for entry in factory.create_dataset(name, seed=3, size=3)]) if alone < 100 else ""
folders = sorted({each.split(".")[1] for each in sys.modules if each.startswith("reasoning_gym.")})
import reasoning_gym
assert reasoning_gym.factory is factory and reasoning_gym.__version__
assert len(factory.DATASETS) > 100, "the package is complete once something of its own is used"
assert not entries or entries == repr([entry for entry in reasoning_gym.create_dataset(name, seed=3, size=3)])
print(alone, *folders)
"""


def told(name: str) -> tuple[int, list[str]]:
    """The number of data sets that are known, and the folders imported, in a process that asks for this one."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    count, *folders = done.stdout.split()
    return int(count), folders


@pytest.mark.parametrize(
    ("name", "folder", "other"), [("gsm_symbolic", "arithmetic", "algebra"), ("simple_equations", "algebra", "logic")]
)
def test_a_data_set_comes_without_those_of_other_folders(name: str, folder: str, other: str) -> None:
    count, folders = told(name)
    assert count < 50 and folder in folders and other not in folders


@pytest.mark.parametrize("name", ["gdc", "composite", "figlet_font", "../gcd"])
def test_all_are_known_where_a_name_tells_no_folder(name: str) -> None:
    """A name that is wrong, a data set made of others, and one that stands in a file of another name."""
    assert told(name)[0] > 100
