"""`clipo prove` as a driver: a process for each check, a line for one that crashes, one table, file and exit code."""

from __future__ import annotations

import json
import sys

import pytest

from clipo_megatron.cli import main as cli
from clipo_megatron.cli import prove
from clipo_megatron.training.proving.checks import CHECKS

# In place of the interpreter: writes what a check would, and fails for one of them.
CHILD = """#!{python}
import json, os, sys
from pathlib import Path
name, folder = (sys.argv[sys.argv.index(word) + 1] for word in ("--one", "--folder"))
(Path({seen!r}) / name).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
if name == {broken!r}:
    sys.exit("RuntimeError: no kernel image is available")
line = {{"what": name, "measured": "1", "limit": "<= 2", "holds": name != {refused!r}, "note": "[all] of it"}}
(Path(folder) / f"{{name}}.json").write_text(json.dumps({{"lines": [line], "measured": {{name: 1.0}}}}))
"""


@pytest.fixture
def proved(tmp_path, monkeypatch, capsys):
    """A function that runs the command with stand-ins for the checks; returns exit code, output and proof."""

    def run(*words, broken="", refused=""):
        (seen := tmp_path / "seen").mkdir(exist_ok=True)
        child = tmp_path / "child"
        child.write_text(CHILD.format(python=sys.executable, seen=str(seen), broken=broken, refused=refused))
        child.chmod(0o755)
        monkeypatch.setattr(prove.sys, "executable", str(child))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        file = tmp_path / "proof.json"
        code = cli.main(["prove", "--json", str(file), *words])
        return code, capsys.readouterr().out, json.loads(file.read_text())

    return run


def test_all_checks_run_each_once_and_the_reference_without_a_gpu(proved, tmp_path):
    code, shown, proof = proved()
    assert (code, proof["holds"]) == (0, True)
    assert list(proof["checks"]) == [check.name for check in CHECKS]
    assert proof["measured"] == {check.name: 1.0 for check in CHECKS}
    assert "every limit holds" in shown and "[all] of it" in " ".join(shown.split())
    devices = {each.name: each.read_text() for each in (tmp_path / "seen").iterdir()}
    assert {name for name, visible in devices.items() if visible == ""} == {"reference"}


def test_a_check_that_crashes_is_a_line_that_fails_and_the_others_go_on(proved):
    code, shown, proof = proved(broken="drift")
    assert (code, proof["holds"]) == (1, False)
    [line] = proof["checks"]["drift"]["lines"]
    assert line["measured"] == "ended with exit code 1" and "no kernel image is available" in line["note"]
    assert proof["checks"]["release"]["lines"][0]["holds"] and f"1 of {len(CHECKS)} limits DO NOT HOLD" in shown


def test_a_check_that_does_not_end_is_ended(proved, monkeypatch, tmp_path):
    monkeypatch.setattr(prove, "_LEAST_PATIENCE_S", 0.0)
    monkeypatch.setattr(prove, "_PATIENCE", 0.0)
    _, _, proof = proved("--only", "drift")
    assert proof["checks"]["drift"]["lines"][0]["measured"] == "did not end within 0 s"


def test_a_limit_that_does_not_hold_makes_the_exit_code_1(proved):
    assert proved(refused="attention")[0] == 1


def test_some_checks_alone(proved, capsys):
    assert list(proved("--only", "agreement,updates")[2]["checks"]) == ["reference", "agreement", "updates"]
    with pytest.raises(SystemExit):
        proved("--only", "speed")
    assert "speed is no check. Choose from versions" in capsys.readouterr().err


def test_findings_that_cannot_be_written_are_refused_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(prove, "_run_alone", lambda *_, **__: pytest.fail("it measured"))
    for place, reason in ((tmp_path / "absent" / "proof.json", "is no folder"), (tmp_path, "it is a folder")):
        assert cli.main(["prove", "--json", str(place)]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert reason in said and "--json" in said and "Traceback" not in said
