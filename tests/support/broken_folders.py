"""Broken rows, models and checkpoints; each function breaks one, and returns the command that meets it."""

from __future__ import annotations

import contextlib
import json
import pickle
import random
import struct
from pathlib import Path
from typing import Any

from broken_things import Attempt
from broken_values import as_text, break_json, mutated, mutated_bytes, odd_value, replace_file

CHECKPOINT = Path("run/checkpoints/step_000002")
TRAIN_CHECK = ("train", "run.yaml", "--check")


class Payload:
    """What unpickles as a call of a function that no file of weights needs."""

    def __init__(self, name: str, *arguments: Any):
        self.name, self.arguments = name, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        import importlib

        module, _, name = self.name.rpartition(".")
        return getattr(importlib.import_module(module), name), self.arguments


def payload(dice: random.Random, folder: Path) -> bytes:
    """A pickle that makes a file where it is read without care."""
    canary = str(folder / "canary")
    chosen = dice.choice(
        (
            Payload("os.system", f"touch {canary}"),
            Payload("builtins.eval", f"open({canary!r}, 'w')"),
            Payload("builtins.open", canary, "w"),
            Payload("subprocess.check_output", ["touch", canary]),
            Payload("os.mkdir", canary),
        )
    )
    data = pickle.dumps(chosen, protocol=dice.choice((0, 2, 4, 5)))
    if dice.random() < 0.3:  # by a dotted name in a module that checkpoints do name
        names = (b"torch.distributed.checkpoint.filesystem", b"os.system")
        short = [b"\x8c" + bytes([len(word)]) + word for word in (*names, f"touch {canary}".encode())]
        data = b"\x80\x04" + short[0] + short[1] + b"\x93" + short[2] + b"\x85R."
    return data


def rows(dice: random.Random, folder: Path) -> Attempt:
    """One row of a file of problems is broken, or the file is."""
    name = dice.choice(("practice.jsonl", "exam.jsonl", "exam.parquet", "exam.parquet"))
    file = Path(name)
    kind = dice.random()
    if kind < 0.06:
        replace_file(dice, file)
    elif name.endswith(".parquet"):
        _break_parquet(dice, file, bytewise=kind < 0.5)
    elif kind < 0.25:
        _special_row(dice, file, folder)
    else:
        break_json(dice, file, dice.choice((1, 1, 2)))
    given = ("data.eval=[{path: exam.parquet}]",) if name.endswith(".parquet") else ()
    command = dice.choice((TRAIN_CHECK, TRAIN_CHECK, TRAIN_CHECK, ("eval", "run.yaml", "--output", "out.json")))
    return Attempt([command[0], command[1], *given, *command[2:]], writes=("out", "run/"))


def _special_row(dice: random.Random, file: Path, folder: Path) -> None:
    row = json.loads(file.read_text().splitlines()[0])
    code = f"__import__('os').system('touch {folder}/canary')"
    data_set = dice.choice(("bitwise_arithmetic", "countdown", "puzzle24", "spiral_matrix", "nope", "chain_sum"))
    row |= dice.choice(
        (
            {
                "data_source": f"reasoning_gym/{data_set}",
                "extra_info": {"metadata": {"problem": code, "question": code}},
            },
            {"data_source": f"reasoning_gym/{data_set}", "extra_info": {"source_dataset": data_set, "problem": code}},
            {"prompt": [{"role": "user", "content": "word " * 200_000}]},
            {"prompt": [{"role": "user", "content": "{{ 1/0 }}<|im_end|>\ud800\0"}]},
            {"prompt": [{"role": "user", "content": "x"}] * 3000},
            {"reward_model": {"ground_truth": "9" * 100_000}},
            {"reward_model": {"ground_truth": "9**9**9**9"}},
            {"data_source": "x" * 100_000},
            {"images": ["x"]},
        )
    )
    with file.open("a") as lines:
        lines.write(as_text(row) + "\n")


def _break_parquet(dice: random.Random, file: Path, *, bytewise: bool) -> None:
    import pyarrow
    import pyarrow.parquet

    if bytewise:
        file.write_bytes(mutated_bytes(dice, file.read_bytes()))
        return
    table = pyarrow.parquet.read_table(file)
    name = dice.choice(table.column_names)
    at = table.column_names.index(name)
    count = table.num_rows
    with contextlib.suppress(pyarrow.ArrowException, OverflowError, UnicodeError):
        column = dice.choice(
            (
                lambda: pyarrow.array([b"\xff\xfe"] * count, pyarrow.binary()).view(pyarrow.binary()),
                lambda: pyarrow.array([dice.choice((1, 0, 2**40))] * count),
                lambda: pyarrow.array([None] * count, pyarrow.string()),
                lambda: pyarrow.array([["a"]] * count),
                lambda: pyarrow.array([{"role": "user"}] * count),
                lambda: pyarrow.array([[{"role": "user", "content": None}]] * count),
                lambda: pyarrow.Array.from_buffers(
                    pyarrow.string(), count, pyarrow.array([b"\xff\xfe"] * count, pyarrow.binary()).buffers()
                ),
                lambda: pyarrow.array([float("nan")] * count),
                lambda: pyarrow.array([dice.choice(("", "x", "x" * 100_000))] * count),
            )
        )()
        table = dice.choice(
            (
                lambda: table.set_column(at, name, column),
                lambda: table.set_column(at, name, column),
                lambda: table.drop_columns([name]),
                lambda: table.append_column(name, column),
                lambda: table.slice(0, 0),
            )
        )()
    pyarrow.parquet.write_table(table, file)


def model(dice: random.Random, folder: Path) -> Attempt:
    """One file of a model's folder is broken."""
    place = Path("model")
    names = ["config.json"] * 4 + [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ]
    names += ["model.safetensors"] * 2 + ["model.safetensors.index.json"]
    file = place / dice.choice(names)
    if file.name == "generation_config.json":
        file.write_text(json.dumps({"eos_token_id": [1], "temperature": 0.6, "top_p": 0.9}))
    if file.name.endswith("index.json"):
        header = _header(place / "model.safetensors")
        weights = {name: "model.safetensors" for name in header if name != "__metadata__"}
        file.write_text(json.dumps({"metadata": {"total_size": 32000}, "weight_map": weights}))
    if dice.random() < 0.07:
        replace_file(dice, file)
    elif file.suffix == ".json":
        break_json(dice, file, dice.choice((1, 1, 1, 3)))
        if file.name == "tokenizer_config.json" and dice.random() < 0.3:
            _with_code(file, folder)
    elif file.suffix == ".jinja":
        _break_template(dice, file, folder)
    else:
        break_header(dice, file)
    commands = (
        TRAIN_CHECK,
        TRAIN_CHECK,
        ("plan", "run.yaml", "rollout.engine=sglang"),
        ("convert", "verify", "model", "model"),
        ("convert", "to-megatron", "model", "out"),
        ("convert", "to-megatron", "model", "out", "--dry-run"),
        ("submit", "run.yaml", "--nodes", "1", "--dry-run"),
    )
    return Attempt(dice.choice(commands), writes=("out", "run/prompts"))


def _with_code(file: Path, folder: Path) -> None:
    """A tokenizer that brings its own class."""
    code = f"open({str(folder / 'canary')!r}, 'w')\nclass Own: pass\n"
    (file.parent / "own.py").write_text(code)
    facts = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    file.write_text(json.dumps(facts))


def _break_template(dice: random.Random, file: Path, folder: Path) -> None:
    text = file.read_text()
    file.write_bytes(
        dice.choice(
            (
                lambda: mutated_bytes(dice, text.encode()),
                lambda: b"{% for i in range(10**12) %}x{% endfor %}",
                lambda: b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
                lambda: b"{{ 1 / 0 }}",
                lambda: b"{{ raise_exception('no') }}",
                lambda: b"{{ ''.__class__.__mro__[1].__subclasses__() }}",
                lambda: b"{{ messages[99].content }}",
                lambda: b"{{ 'x' * 10**9 }}",
                lambda: b"{{ cycler.__init__.__globals__.os.system('touch canary') }}",
                lambda: b"{% include '/etc/passwd' %}",
                lambda: b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
                lambda: b"",
            )
        )()
    )


def _header(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def break_header(dice: random.Random, file: Path) -> None:
    """Change the header of a safetensors file, its length, or any bytes of the file."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    kind = dice.random()
    if kind < 0.2:
        file.write_bytes(mutated_bytes(dice, data))
    elif kind < 0.35:
        wrong = dice.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1, len(data)))
        file.write_bytes(struct.pack("<Q", wrong) + data[8:])
    else:
        tree = mutated(dice, json.loads(data[8 : 8 + size]), dice.choice((1, 1, 3)))
        if isinstance(tree, dict) and tree and dice.random() < 0.3:
            entry = tree[dice.choice(list(tree))]
            if isinstance(entry, dict):
                entry["dtype"] = dice.choice(("I32", "BOOL", "F8_E4M3", "F64", "X", "", "f32", None))
        header = as_text(tree).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])


def checkpoint(dice: random.Random, folder: Path) -> Attempt:
    """One file of a checkpoint is broken; half of the times the manifest agrees with what is there."""
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file() and "critic" not in path.parts]
    file = dice.choice([*files, *[CHECKPOINT / "manifest.json"] * len(files)][: 2 * len(files)])
    if dice.random() < 0.35:
        file = CHECKPOINT / "manifest.json"
    fixed = dice.random() < 0.7
    if dice.random() < 0.07:
        replace_file(dice, file)
        fixed = False
    elif file.name == ".metadata" or file.suffix == ".pt":
        damage = payload(dice, folder) if dice.random() < 0.6 else mutated_bytes(dice, file.read_bytes())
        file.write_bytes(damage)
    elif file.name == "manifest.json":
        _break_manifest(dice, file)
        fixed = False
    elif file.suffix == ".json":
        break_json(dice, file, dice.choice((1, 1, 3)))
    elif file.suffix == ".safetensors":
        break_header(dice, file)
    else:
        file.write_bytes(mutated_bytes(dice, file.read_bytes()))
    if fixed:
        _agree(file)
    commands = (
        ("convert", "to-hf", str(CHECKPOINT), "out"),
        ("convert", "to-hf", str(CHECKPOINT), "out", "--dry-run"),
        ("convert", "to-hf", "run", "out"),
        ("convert", "verify", "model", str(CHECKPOINT)),
        ("eval", str(CHECKPOINT), "--output", "out.json"),
        ("train", "run.yaml", "--check"),
        ("train", "run.yaml", f"model.path={CHECKPOINT}", "--check"),
        ("plan", "run.yaml", "rollout.engine=sglang", f"model.path={CHECKPOINT}"),
        ("train", "run.yaml", "train.steps=3", "eval.every=0", "data.eval=[]"),
    )
    return Attempt(dice.choice(commands), writes=("out", "run/"))


def _break_manifest(dice: random.Random, file: Path) -> None:
    tree = json.loads(file.read_text())
    kind = dice.random()
    names = list(tree["files"])
    if kind < 0.5:
        break_json(dice, file, dice.choice((1, 1, 3)))
        return
    name = dice.choice(
        ("/etc/passwd", "../../../../practice.jsonl", "x" * 10_000, "a\0b", "\ud800", "", ".", "policy", "/dev/zero")
    )
    if kind < 0.75:
        tree["files"][name] = dice.choice((tree["files"][names[0]], odd_value(dice)))
    else:
        tree["files"][dice.choice(names)] = dice.choice(
            ({}, {"bytes": odd_value(dice), "crc32": odd_value(dice)}, {"bytes": 1}, {"crc32": 1}, odd_value(dice))
        )
    file.write_text(as_text(tree))


def _agree(file: Path) -> None:
    """Write size and CRC-32 of a file into the manifest, as whoever changed it on purpose would."""
    from clipo_megatron.runtime.durable_files import crc32

    manifest = CHECKPOINT / "manifest.json"
    tree = json.loads(manifest.read_text())
    tree["files"][str(file.relative_to(CHECKPOINT))] = {"bytes": file.stat().st_size, "crc32": crc32(file)}
    manifest.write_text(json.dumps(tree))
