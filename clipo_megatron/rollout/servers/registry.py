"""The servers of a run, one file each in a folder that `clipo serve` writes and the pool reads. Imports no torch."""

from __future__ import annotations

import json
import os
import time
import uuid
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import get_type_hints


class Status(str, Enum):
    """The state of a server, as its supervisor sees it."""

    starting = "starting"
    ready = "ready"
    failed = "failed"  # about to be started again, or given up
    stopped = "stopped"


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """One server, as its supervisor has registered it."""

    name: str  # names the file; letters, digits, "-", "_" and "."
    url: str
    engine: str  # "sglang" or "vllm"
    tp: int
    host: str
    pid: int
    boot: str  # changes with each start
    status: Status
    updated_at: float = field(default_factory=time.time)  # seconds since the epoch
    gpus: str = ""  # the UUIDs of its ranks' GPUs, in order, with commas between them; "": it has none
    collectives: str = ""  # release of the library that connects its GPUs


class Registry:
    """The records in one folder. Readers and writers need no lock, because each file is replaced as a whole."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def write(self, record: ServerRecord) -> None:
        """Add a record, or replace the one of that name.

        Raises:
            ValueError: the name cannot be that of a file.
        """
        path = self._path(record.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f".{record.name}.{os.getpid()}.{uuid.uuid4().hex}"
        try:
            draft.write_text(json.dumps(asdict(record) | {"status": record.status.value}, indent=1) + "\n")
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    def records(self) -> list[ServerRecord]:
        """All records, ordered by name. Files that are damaged or hold something else are ignored."""
        try:
            paths = sorted(self.folder.glob("[!.]*.json"))
        except OSError:
            return []
        return [record for path in paths if (record := _read(path)) is not None]

    def remove(self, name: str) -> None:
        """Remove a record if it exists."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        if not name or name[0] == "." or not all(char.isalnum() or char in "-_." for char in name):
            raise ValueError(f"{name!r} cannot name a server: use letters, digits, '-', '_' and '.', no '.' in front.")
        return self.folder / f"{name}.json"


def _read(path: Path) -> ServerRecord | None:
    try:
        found = json.loads(path.read_text())
        found = {"gpus": "", "collectives": ""} | found  # which older records do not name
        values = {each.name: found[each.name] for each in fields(ServerRecord)}
        values["status"] = Status(values["status"])
        values["updated_at"] = float(values["updated_at"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    hints = get_type_hints(ServerRecord)
    if values["name"] != path.stem or any(type(values[name]) is not kind for name, kind in hints.items()):
        return None
    return ServerRecord(**values)
