"""Runs that wait at a moment which a test names, so that tests need not catch a run whose steps take half a second.

The run imports this module (`warm.IMPORT`) and stands still at that moment, with all its threads but one working, until
the test lets it go on; it does not stand still a second time.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import warm

if TYPE_CHECKING:
    from clipo_megatron.flow import StepReport

MARK, STEP, FOLDER = "CLIPO_TEST_HOLD", "CLIPO_TEST_HOLD_STEP", "CLIPO_TEST_HOLD_FOLDER"


class Hold:
    """Where a run is to wait: once the metrics of `after_step` steps are written, or once it has made a folder."""

    def __init__(self, mark: Path, *, after_step: int | None = None, at_folder: str | None = None):
        self._mark = mark
        moment = {STEP: str(after_step)} if at_folder is None else {FOLDER: at_folder}
        self.environment = {warm.IMPORT: __name__, MARK: str(mark), **moment}

    def reached(self) -> bool:
        return self._mark.exists()

    def release(self) -> None:
        _over(self._mark).touch()


def _over(mark: Path) -> Path:
    return mark.with_suffix(".over")


def _wait() -> None:
    mark = Path(os.environ[MARK])
    while not _over(mark).exists():
        mark.touch()
        time.sleep(0.005)


def _hold_after_step(steps: int) -> None:
    from clipo_megatron.telemetry.sinks import JsonLines

    write = JsonLines.write

    def held(self: JsonLines, report: StepReport) -> None:
        write(self, report)
        if report.step + 1 == steps:
            _wait()

    JsonLines.write = held


def _hold_at_folder(name: str) -> None:
    mkdir = os.mkdir

    def held(path: str | Path, *rest: Any, **options: Any) -> None:
        mkdir(path, *rest, **options)
        if Path(path).name == name:
            _wait()

    os.mkdir = held


if STEP in os.environ:
    _hold_after_step(int(os.environ[STEP]))
if FOLDER in os.environ:
    _hold_at_folder(os.environ[FOLDER])
