"""Weights & Biases: its absence is named before anything is built, and its own library gets what metrics.jsonl gets."""

import json
import re
import struct
import sys
from importlib import util

import pytest
from progress import wait_until

from clipo_megatron.checks.report import report_problems
from clipo_megatron.config import packages
from clipo_megatron.config.schema import RunConfig, WandbMode
from clipo_megatron.flow import StepReport
from clipo_megatron.telemetry.sinks import MissingPackageError
from clipo_megatron.telemetry.wandb import Wandb

installed = pytest.mark.skipif(
    util.find_spec("wandb") is None, reason="wandb is not installed: pip install -e '.[wandb]'"
)


def config(mode=WandbMode.offline, **settings):
    made = RunConfig(name="mine")
    made.report.wandb.mode = mode
    for name, value in settings.items():
        setattr(made.report.wandb, name, value)
    return made


def test_a_missing_package_is_found_before_anything_is_built(monkeypatch):
    monkeypatch.setattr(packages.util, "find_spec", lambda name: None)
    (problem,) = report_problems(config())
    assert str(problem) == (
        "report.wandb.mode = offline: the package wandb is not installed. pip install wandb, or set it to disabled: "
        "metrics.jsonl has the same numbers."
    )
    made = RunConfig()
    made.report.tensorboard = True
    (problem,) = report_problems(made)
    assert "report.tensorboard = true: the package tensorboard is not installed. pip install tensorboard" in str(
        problem
    )
    assert list(report_problems(RunConfig())) == []


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import not_here\n", r"wandb is installed, and not_here, which it needs, is not. pip install not_here"),
        ("import json.nothing\n", r"wandb is installed, and json.nothing, which it needs, is not"),
        ("from json import nothing\n", r"wandb is installed and cannot be imported \(ImportError: cannot import name"),
        ("raise RuntimeError('too new')\n", r"cannot be imported \(RuntimeError: too new\).*--force-reinstall wandb"),
    ],
)  # fmt: skip
def test_a_package_that_is_there_and_broken_is_not_called_missing(monkeypatch, tmp_path, source, reason):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(source)
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    (problem,) = report_problems(config())
    assert re.search(reason, str(problem)) and "not installed" not in str(problem)
    with pytest.raises(MissingPackageError, match=reason.partition(". pip")[0]):
        Wandb(config(), tmp_path / "runs", from_step=0)


def test_projects_have_names(monkeypatch):
    monkeypatch.setattr(packages.util, "find_spec", lambda name: object())
    assert list(report_problems(config())) == []
    for name in ("", "a/b", "what?"):
        (problem,) = report_problems(config(project=name))
        assert problem.key == "report.wandb.project"


def test_the_sink_names_the_missing_package_too(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackageError, match=r"report\.wandb\.mode is offline, but .* pip install wandb"):
        Wandb(config(), tmp_path / "wandb", from_step=0)


@installed
def test_a_resumed_run_continues_its_run_of_the_service(tmp_path):
    """Read back from the library's own files: every step's metrics under its number, and one id for both sessions."""
    made = config(project="p", group="g")
    for start in (0, 2):
        sink = Wandb(made, tmp_path / "wandb", from_step=start)
        for step in (start, start + 1):
            sink.write(StepReport(step, {"reward/mean": step / 4, "policy/grad_norm": float("inf")}))
        sink.close()
        sink.close()
    sessions = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(sessions) == 2 and len({file.name for file in sessions}) == 1
    assert json.loads((tmp_path / "wandb" / "run.json").read_text())["id"] in sessions[0].name

    def written() -> bool:
        return all(any(record.HasField("exit") for record in read_records(file)) for file in sessions)

    wait_until(written, "the library's own process to write the files")
    records = [record for file in sessions for record in read_records(file)]
    runs = [record.run for record in records if record.HasField("run")]
    assert {(run.project, run.run_group, run.display_name) for run in runs} == {("p", "g", "mine")}
    logged = [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(line["_step"], line["reward/mean"]) for line in logged] == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]
    assert all("policy/grad_norm" not in line for line in logged)


def read_records(file):
    """The library's records: protobuf messages in LevelDB's log format, blocks of 32 KiB with pieces of records."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""
