"""Fixtures of the tests of job submission: a configuration to submit, and programs in the place of Slurm's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from small_runs import write_config, write_model


@pytest.fixture(scope="session")
def config_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("submitted")
    return write_config(folder, write_model(folder / "model"))


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Puts programs in the place of Slurm's: call it with a name and the text of a script."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")

    def program(name: str, text: str) -> None:
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    return program
