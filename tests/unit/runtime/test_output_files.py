"""Files that a user names with -o, --output and --json: written through links, and in place of nothing but files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clipo_megatron.runtime.durable_files import write_output


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "target").write_text("before")
    os.chmod(tmp_path / "target", 0o640)
    (tmp_path / "link").symlink_to("target")
    write_output(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "after"
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def nowhere(path: Path) -> None:
    path.symlink_to("not there")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a device or a pipe"),
        (device, "a device or a pipe"),
        (nowhere, "a link to nothing"),
        (os.mkdir, "a folder"),
    ],
)
def test_what_is_no_file_is_neither_replaced_nor_waited_for(tmp_path, make, kind):
    make(tmp_path / "out")
    with pytest.raises(OSError, match=f"it is {kind}, and nothing but a file is overwritten"):
        write_output(tmp_path / "out", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not (tmp_path / "out").is_file()


def test_a_users_file_beside_it_is_left_alone(tmp_path):
    (tmp_path / "out.tmp").write_text("mine")
    write_output(tmp_path / "out", "text")
    assert (tmp_path / "out.tmp").read_text() == "mine" and (tmp_path / "out").read_text() == "text"
