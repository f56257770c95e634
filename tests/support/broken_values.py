"""Mutations of sound things: of values and trees of JSON, of texts and bytes, and of files and what stands for them."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Written by `as_text` in place of these words, since json cannot write them from values.
_DEEP, _DIGITS = "@10,000 nested lists@", "@an integer of 5,000 digits@"
_STRINGS = (
    "", " ", "x", "0", "-1", "1e400", "nan", "null", "true", "???", "none", "a\nb", "\t", "x" * 5000, "\0", "a\0b",
    "\ud800", "\x1b[31mred", "\u202eabc", "\N{PILE OF POO}", "é", "../../etc/passwd", "/etc/passwd", "/dev/zero", "~",
    "$HOME", "${HOME}", "${train.seed}", "${nowhere.at_all}", "${oc.env:HOME}", "${", "{{ 1/0 }}", "%s%n", "; ls",
    "__import__('os').system('touch canary')", "!!python/object/apply:os.system ['touch canary']",
    "os.system", "bf16", "2026-01-01", "0x10", "1_000", "1:30", "file:///etc/passwd", "a/b", ".", "..", "-", "--check",
)  # fmt: skip
_BYTES = (b"\0", b"\xff", b"\x80", b"\t", b"\x1b[31m", b"\r", b"\xed\xa0\x80")
_NUMBERS = (
    0, -1, 1, 2, 3, 7, 0.5, -0.5, 1.5, 1e-320, 1e30, 1e300, 1.7e308, -1e308, math.nan, math.inf, -math.inf,
    2**31 - 1, 2**31, -(2**31), 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**21, 10**30, 100_000, 10**6,
)  # fmt: skip


def odd_value(dice: random.Random) -> Any:
    """Any value that a file can hold, most of them where they make no sense."""
    kind = dice.random()
    if kind < 0.35:
        return dice.choice(_NUMBERS)
    if kind < 0.65:
        return dice.choice(_STRINGS)
    if kind < 0.75:
        return dice.choice((None, True, False))
    if kind < 0.80:
        return dice.choice((_DEEP, _DIGITS))
    inner = [odd_value(dice) for _ in range(dice.randrange(3))]
    return inner if dice.random() < 0.5 else {dice.choice(_STRINGS[2:12]): each for each in inner}


def mutated(dice: random.Random, tree: Any, times: int = 1) -> Any:
    """A copy of a tree of lists and mappings in which some places hold something else."""
    holder = {"": copy.deepcopy(tree)}
    for _ in range(times):
        places = list(_places(holder))
        parent, key = dice.choice(places)
        _strike(dice, parent, key, [parent[key] for parent, key in places])
    return holder[""]


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a tree with each key or index in it."""
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])


def _strike(dice: random.Random, parent: Any, key: Any, others: list[Any]) -> None:
    kind, value = dice.random(), parent[key]
    if kind < 0.55:
        parent[key] = odd_value(dice)
    elif kind < 0.62 and key != "":
        del parent[key]
    elif kind < 0.69:
        parent[key] = [value] if dice.random() < 0.5 else {"x": value}
    elif kind < 0.76:
        parent[key] = str(value) if not isinstance(value, str) else (len(value) if dice.random() < 0.5 else [value])
    elif kind < 0.83:
        parent[key] = copy.deepcopy(dice.choice(others))
    elif kind < 0.90 and isinstance(value, int | float) and not isinstance(value, bool):
        parent[key] = dice.choice((-value, value + 1, value * 1000, value / 2, value * 10**9, float(value)))
    elif isinstance(value, dict):
        value[dice.choice(_STRINGS)] = odd_value(dice)
    elif isinstance(value, list):
        value[:] = dice.choice((value * 2, value[:-1], value[::-1], [*value, odd_value(dice)]))
    else:
        parent[key] = odd_value(dice)


def as_text(tree: Any) -> str:
    """A tree as JSON, with deep lists and long integers where `odd_value` names them."""
    text = json.dumps(tree)
    return text.replace(json.dumps(_DEEP), "[" * 10_000 + "]" * 10_000).replace(json.dumps(_DIGITS), "9" * 5000)


def as_word(value: Any) -> str:
    """A value as a word of a command line."""
    return value if isinstance(value, str) and value not in (_DEEP, _DIGITS) else as_text(value)


def mutated_bytes(dice: random.Random, data: bytes) -> bytes:
    """Bytes that were cut, swapped, overwritten, repeated or encoded differently."""
    at = dice.randrange(len(data) + 1)
    other = dice.randrange(len(data) + 1)
    begin, end = min(at, other), max(at, other)
    return dice.choice(
        (
            lambda: data[:at],
            lambda: data[at:],
            lambda: data[:-1],
            lambda: b"",
            lambda: bytes(len(data)),
            lambda: data[:begin] + bytes(end - begin) + data[end:],
            lambda: data[:begin] + data[end:],
            lambda: data[:end] + data[begin:end] + data[end:],
            lambda: data + data,
            lambda: data[:at] + dice.randbytes(dice.randrange(1, 9)) + data[at:],
            lambda: data[:at] + dice.choice(_BYTES) + data[at:],
            lambda: _flipped(dice, data),
            lambda: b"\xef\xbb\xbf" + data,
            lambda: data.decode("latin-1").encode(dice.choice(("utf-16", "utf-32", "utf-7"))),
            lambda: data.replace(b'"', b"'"),
            lambda: data.replace(b"\n", b"\r"),
            lambda: b"[" * 10_000 + data,
            lambda: dice.randbytes(dice.randrange(1, 4096)),
        )
    )()  # fmt: skip


def _flipped(dice: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.randrange(1, 9) if changed else 0):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def break_json(dice: random.Random, file: Path, times: int = 1) -> None:
    """Change values of a JSON file, or of one line of a file of JSON lines; or bytes of it, one time in four."""
    if dice.random() < 0.25:
        file.write_bytes(mutated_bytes(dice, file.read_bytes()))
        return
    if file.suffix != ".jsonl":
        file.write_text(as_text(mutated(dice, json.loads(file.read_text()), times)))
        return
    lines = file.read_text().splitlines()
    number = dice.randrange(len(lines))
    lines[number] = as_text(mutated(dice, json.loads(lines[number]), times))
    file.write_text("\n".join(lines) + "\n")


def replace_file(dice: random.Random, file: Path) -> None:
    """Put something else in the place of a file: nothing, a folder, a FIFO, a link, or a file that nobody may read."""
    choices: tuple[Callable[[], Any], ...] = (
        lambda: None,
        file.mkdir,
        lambda: os.mkfifo(file),
        lambda: file.symlink_to(file.name),
        lambda: file.symlink_to("nowhere"),
        lambda: file.symlink_to("/etc/passwd"),
        lambda: file.symlink_to("/dev/zero"),
        lambda: file.symlink_to("/dev/null"),
        lambda: file.symlink_to(".."),
        lambda: (file.write_bytes(b""), file.chmod(0)),
        lambda: (file.mkdir(), file.chmod(0)),
        lambda: (file.write_bytes(b""), os.truncate(file, 1 << 33)),
    )
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)
    dice.choice(choices)()
