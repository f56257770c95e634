"""An engine's environment is whole or not there: made once, by one process, again after an interruption. With a tiny
package of this test's own in place of an engine, and without a network."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from progress import wait_until

from clipo_megatron.serving import environment
from clipo_megatron.serving.environment import COMPLETE, RECIPES, Recipe, ensure, interpreter
from clipo_megatron.serving.errors import ServingError

PACKAGES = ("tiny-base", "tiny-engine")


def write_wheel(folder: Path, name: str) -> None:
    """Write a package of one module, which contains its own name."""
    module = name.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    files = {
        f"{module}.py": f"NAME = {name!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in files) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(folder / f"{module}-1.0-py3-none-any.whl", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Recipe:
    for name in PACKAGES:
        write_wheel(tmp_path, name)
    monkeypatch.setenv("CLIPO_ENVIRONMENTS", str(tmp_path / "environments"))
    monkeypatch.setenv("CLIPO_PIP_OPTIONS", f"--no-index --find-links {tmp_path}")
    pins = tmp_path / "pins.txt"
    pins.write_text("# a comment\n" + "".join(f"{name}==1.0  # and another\n" for name in PACKAGES))
    return Recipe("tiny", pins, "import tiny_base, tiny_engine", minutes=0.1, gigabytes=0.1)


def in_another_process(recipe: Recipe) -> subprocess.Popen:
    """Run `ensure` in another process."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom clipo_megatron.serving.environment import Recipe, ensure\n"
        "print(ensure(Recipe('tiny', Path(sys.argv[1]), sys.argv[2], 0.1, 0.1)))"
    )
    command = [sys.executable, "-c", script, str(recipe.requirements), recipe.proof]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def processes_in(folder: Path) -> list[int]:
    """The processes whose program or arguments name a folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            found += [int(place.name)] if str(folder).encode() in (place / "cmdline").read_bytes() else []
        except OSError:
            continue
    return found


def test_it_is_made_once(recipe):
    said: list[str] = []
    python = ensure(recipe, say=said.append)
    assert python == recipe.python and recipe.is_ready
    assert said[0].startswith("Setting up tiny in ") and "0 minutes and 0.1 GB" in said[0]
    told = subprocess.run(
        [python, "-c", "import tiny_engine, sys; print(tiny_engine.NAME, sys.prefix)"], capture_output=True, text=True
    )
    assert told.stdout.split() == ["tiny-engine", str(recipe.folder)]
    assert json.loads((recipe.folder / COMPLETE).read_text())["pins"] == [f"{name}==1.0" for name in PACKAGES]
    again: list[str] = []
    before = os.times().children_user
    assert ensure(recipe, say=again.append) == python
    assert again == [] and os.times().children_user == before, "nothing was started"


def test_another_recipe_has_another_folder(recipe):
    before = recipe.folder
    assert replace(recipe, proof="pass").folder != before
    pins = recipe.requirements
    same = pins.with_name("same.txt")
    same.write_text("# other words\n\n" + "".join(f"{name}==1.0\n" for name in PACKAGES))
    assert replace(recipe, requirements=same).folder == before
    same.write_text("tiny-base==1.0\ntiny-engine==1.1\n")
    assert replace(recipe, requirements=same).folder != before


@pytest.mark.full
def test_an_interrupted_build_starts_over(recipe):
    slow = replace(
        recipe, proof=f"import os, time\nif os.path.exists({str(recipe.requirements)!r} + '.wait'): time.sleep(200)"
    )
    gate = Path(f"{recipe.requirements}.wait")
    gate.touch()
    builder = in_another_process(slow)
    wait_until(lambda: any("time.sleep" in _words(pid) for pid in processes_in(slow.python)), "the last step")
    leftover = slow.folder / "leftover"
    leftover.touch()
    os.kill(builder.pid, signal.SIGKILL)
    builder.communicate()
    wait_until(lambda: not processes_in(slow.python), "what it had started to be gone")
    assert not slow.is_ready and leftover.exists()
    gate.unlink()
    assert ensure(slow, say=lambda _line: None).exists()
    assert slow.is_ready and not leftover.exists()


def _words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.full
def test_two_at_once_make_one(recipe):
    slow = replace(recipe, proof="import time, tiny_engine; time.sleep(2)")
    both = [in_another_process(slow) for _ in range(2)]
    told = [process.communicate() for process in both]
    assert [out.strip() for out, _ in told] == [str(slow.python)] * 2
    errors = sorted(error.splitlines()[0].split()[0] for _, error in told)
    assert errors == ["Setting", "Waiting"]


@pytest.mark.full
def test_a_package_that_is_not_there(recipe):
    recipe.requirements.write_text("tiny-base==1.0\nno-such-package==1.0\n")
    broken = replace(recipe)
    with pytest.raises(
        ServingError, match=r"(?s)installing 1 more packages failed.*CLIPO_PIP_OPTIONS.*no-such-package"
    ):
        ensure(broken, say=lambda _line: None)
    assert not broken.folder.exists()


@pytest.mark.full
def test_packages_that_do_not_work_together(recipe):
    broken = replace(recipe, proof="import tiny_engine, tiny_missing")
    with pytest.raises(ServingError, match=r"(?s)trying it failed with exit code 1.*tiny_missing"):
        ensure(broken, say=lambda _line: None)
    assert not broken.folder.exists()


def test_a_deadline_leaves_nothing_running(recipe):
    endless = replace(recipe, proof="import time; time.sleep(200)")
    began = time.monotonic()
    with pytest.raises(ServingError, match="did not end in time"):
        ensure(endless, say=lambda _line: None, deadline_s=4.0)
    assert time.monotonic() - began < 150
    assert not processes_in(endless.python) and not endless.folder.exists()


def test_the_choice_of_the_interpreter(recipe, monkeypatch):
    made: list[Recipe] = []
    monkeypatch.setitem(environment.RECIPES, "tiny", recipe)
    monkeypatch.setattr(environment, "ensure", lambda recipe, say: made.append(recipe) or recipe.python)
    assert interpreter("tiny", "sh", gpus=0).name == "sh"
    with pytest.raises(ServingError, match=r"serve\.python = no/such/python is no program"):
        interpreter("tiny", "no/such/python", gpus=0)
    assert interpreter("json", None, gpus=8) == Path(sys.executable), "this one, when it has the engine"
    with pytest.raises(ServingError, match="Install it as its documentation says"):
        interpreter("tiny", None, gpus=8)
    assert made == []
    assert interpreter("tiny", None, gpus=0, say=lambda _line: None) == recipe.python and made == [recipe]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_package_has_one_version(name):
    pins = RECIPES[name].pins
    assert len(pins) > 50 and pins[0].startswith("torch==")
    assert all(pin.count("==") == 1 and "+" not in pin for pin in pins)
    packages = [pin.partition("==")[0].lower().replace("_", "-") for pin in pins]
    assert len(set(packages)) == len(packages)
    assert any(package in packages for package in (name, f"{name}-cpu"))


def test_the_command_knows_its_engines(capsys):
    assert environment.main(["no-engine"]) == 2
    assert "Choose from sglang, vllm" in capsys.readouterr().err
