"""The registry: records are complete or absent, and other files are ignored."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading

import pytest

from clipo_megatron.rollout.servers.registry import Registry, ServerRecord, Status

RECORD = ServerRecord("server-0", "http://127.0.0.1:30000", "sglang", 2, "node1", 4242, "a" * 32, Status.ready, 1000.5)


@pytest.fixture
def registry(tmp_path) -> Registry:
    return Registry(tmp_path / "servers")


def test_records_are_read_as_written(registry):
    other = dataclasses.replace(RECORD, name="server-1", status=Status.starting)
    registry.write(other)
    registry.write(RECORD)
    assert registry.records() == [RECORD, other]
    registry.write(dataclasses.replace(RECORD, boot="b" * 32))
    assert [record.boot for record in registry.records()] == ["b" * 32, "a" * 32]
    registry.remove("server-0")
    registry.remove("server-0")
    assert registry.records() == [other]
    assert sorted(path.name for path in registry.folder.iterdir()) == ["server-1.json"]


def test_an_absent_folder_has_no_records(registry):
    assert registry.records() == []
    registry.remove("server-0")


DAMAGED = {
    "empty": "",
    "cut": json.dumps(dataclasses.asdict(RECORD))[:60],
    "a list": "[1, 2]",
    "a field less": json.dumps({k: v for k, v in dataclasses.asdict(RECORD).items() if k != "boot"}),
    "a wrong type": json.dumps(dataclasses.asdict(RECORD) | {"tp": "2"}),
    "a truth value": json.dumps(dataclasses.asdict(RECORD) | {"tp": True}),
    "an unknown status": json.dumps(dataclasses.asdict(RECORD) | {"status": "happy"}),
    "no time": json.dumps(dataclasses.asdict(RECORD) | {"updated_at": "yesterday"}),
    "another name": json.dumps(dataclasses.asdict(RECORD) | {"name": "server-9"}),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_damaged_and_foreign_files_are_ignored(registry, text):
    registry.write(dataclasses.replace(RECORD, name="server-1"))
    (registry.folder / "server-0.json").write_text(text)
    (registry.folder / "notes.txt").write_text("hello")
    (registry.folder / "binary.json").write_bytes(b"\xff\xfe\x00")
    (registry.folder / "folder.json").mkdir()
    (registry.folder / "server-2.json").symlink_to(registry.folder / "nowhere")
    assert [record.name for record in registry.records()] == ["server-1"]


def test_unknown_fields_of_a_record_are_ignored(registry):
    registry.folder.mkdir()
    found = dataclasses.asdict(RECORD) | {"colour": "blue"}
    (registry.folder / "server-0.json").write_text(json.dumps(found))
    assert registry.records() == [RECORD]


@pytest.mark.parametrize("name", ["", ".hidden", "../up", "a/b", "a b"])
def test_names_that_are_no_file_names_are_refused(registry, name):
    with pytest.raises(ValueError, match="cannot name a server"):
        registry.write(dataclasses.replace(RECORD, name=name))
    with pytest.raises(ValueError, match="cannot name a server"):
        registry.remove(name)


def test_a_reader_never_sees_half_a_record(registry):
    registry.write(RECORD)
    done = threading.Event()

    def write() -> None:
        for number in range(300):
            registry.write(dataclasses.replace(RECORD, url="http://" + "x" * (number * 37 % 5000), pid=number))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not done.is_set():
        assert [record.name for record in registry.records()] == ["server-0"]
        reads += 1
    writer.join()
    assert reads > 10


def test_reading_it_takes_no_torch():
    code = (
        "import sys; import clipo_megatron.rollout.servers.registry; assert not {'torch', 'aiohttp'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
