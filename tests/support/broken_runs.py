"""Broken runs, results, targets and answers of servers; each function breaks one, and returns what meets it."""

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path

from broken_folders import CHECKPOINT, break_header
from broken_things import Attempt
from broken_values import as_text, break_json, mutated, replace_file

PLACES = (
    "there", "there", "there", "there/", "there/x/out.json", "practice.jsonl/out", "/dev/full", "/dev/null",
    "/proc/out", "/sys/x", "x" * 300, "y/" * 3000, "\ud800", "a\nb", "~/out.json", "-", "out\x1b[31m", "run.yaml",
    "model", "run", ".", "/", "", "closed/out.json", "model/config.json", "run/metrics.jsonl",
)  # fmt: skip


def run(dice: random.Random, folder: Path) -> Attempt:
    """One file of a run's folder is broken."""
    place = Path("run")
    file = dice.choice(
        [place / name for name in ("metrics.jsonl", "segments.jsonl", "rollouts.jsonl", "trace.jsonl", "config.json")]
        + [place / "eval" / "step_000004.json", place / "states" / "step_000003.safetensors"]
    )
    kind = dice.random()
    if kind < 0.12:
        replace_file(dice, file)
    elif kind < 0.2 and file.suffix == ".jsonl":
        file.write_bytes(file.read_bytes()[: -dice.randrange(1, 40)])
    elif file.suffix == ".safetensors":
        break_header(dice, file)
    else:
        break_json(dice, file, dice.choice((1, 1, 3)))
    commands = (
        ("report", "run", "-o", "out.html"),
        ("report", "run", "-o", "out.html"),
        ("report", "run", "run", "-o", "out.html", "--against", "before"),
        ("eval", "run", "--output", "out.json"),
        ("scale", "run.yaml", "--collect"),
        ("train", "run.yaml", "train.steps=3", "eval.every=0", "data.eval=[]"),
    )
    chosen = dice.choice(commands)
    if chosen[0] == "scale":
        _write_points(dice)
    return Attempt(chosen, writes=("out", "run/"))


def _write_points(dice: random.Random) -> None:
    point = {"name": "nodes-1", "kinds": ["weak"], "nodes": 1, "server_nodes": 0, "ranks": 1, "gpus": 0, "steps": 4}
    point |= {"prompts": 4, "output": "run", "overrides": ["layout.dp=1"], "job": None}
    place = Path("run/scale")
    place.mkdir()
    (place / "points.json").write_text(as_text(mutated(dice, [point, {**point, "name": "weak-2", "nodes": 2}], 2)))


def results(dice: random.Random, folder: Path) -> Attempt:
    """One of two results that are compared is broken."""
    first, second = (Path(f"run/eval/step_00000{step}.json") for step in (0, 4))
    file = dice.choice((first, second))
    if dice.random() < 0.08:
        replace_file(dice, file)
    else:
        break_json(dice, file, dice.choice((1, 1, 1, 3)))
    if dice.random() < 0.2:  # both alike, so that the problems are the same
        other = second if file == first else first
        with contextlib.suppress(OSError):
            if file.is_file() and not file.is_symlink() and file.stat().st_size < 1 << 20:
                other.write_bytes(file.read_bytes())
    options = dice.choice(((), (), ("--json", "out.json"), ("--set", "exam"), ("--resamples", "100")))
    return Attempt(("compare", str(first), str(second), *options))


def targets(dice: random.Random, folder: Path) -> Attempt:
    """What a command is to write is something else already, or lies where nothing can be written."""
    place = Path("there")
    replace_file(dice, place)
    name = dice.choice(PLACES)
    if os.path.realpath(place) != os.path.abspath(place):
        name = "closed/out.json" if place.is_dir() else name  # a link to a folder of the user, who may name that
    Path("closed").mkdir()
    Path("closed").chmod(0o500)
    commands = (
        ("report", "run", "-o", name),
        ("compare", "run/eval/step_000000.json", "run/eval/step_000004.json", "--json", name),
        ("eval", "run", "--output", name),
        ("train", "run.yaml", f"train.output={json.dumps(name)}", "--check"),
        ("train", "run.yaml", f"train.output={json.dumps(name)}", "train.steps=1", "eval.every=0", "data.eval=[]"),
        ("eval", "run.yaml", f"train.output={json.dumps(name)}"),
        ("convert", "to-megatron", "model", name),
        ("convert", "to-hf", str(CHECKPOINT), name),
        ("submit", "run.yaml", f"train.output={json.dumps(name)}", "--nodes", "1", "--dry-run"),
        ("scale", "run.yaml", f"train.output={json.dumps(name)}", "--collect"),
    )
    chosen = dice.choice(commands)
    # A file that the user says to write, and the trace beside a page.
    named = (
        (os.path.normpath(name), f"{os.path.splitext(name)[0]}.trace.json")
        if os.path.isfile(os.path.normpath(name))
        else ()
    )
    own = ("there",) if not os.path.lexists(place) else ()
    own += ("run",) if name == "run" or chosen[:2] == ("eval", "run") else ()
    return Attempt(chosen, writes=("out", "x" * 300, "y/", "a\n", "~", "-", "there.", "there/", ".lock", *named, *own))


def answers(dice: random.Random, folder: Path) -> Attempt:
    """A field of a server's answer is not what was asked for."""
    import numpy as np

    from clipo_megatron.rollout.engine import SamplingParams
    from clipo_megatron.rollout.servers import response_checks

    count = dice.randrange(1, 6)
    sound = {
        "tokens": [dice.randrange(3, 259) for _ in range(count)],
        "logprobs": [-dice.random() for _ in range(count)],
        "finish": "length",
        "matched": None,
        "version": "3",
    }
    broken = mutated(dice, sound, dice.choice((1, 1, 2)))
    broken = broken if isinstance(broken, dict) else {}

    def call() -> None:
        number = response_checks.version_number(broken.get("version"))
        response_checks.checked(
            broken.get("tokens"), broken.get("logprobs"), np.full(count, number, dtype=np.int64),
            finish=broken.get("finish"), matched=broken.get("matched"), budget=count, vocabulary=259,
            params=SamplingParams(max_new_tokens=count, stop_ids=(1,)),
        )  # fmt: skip

    return Attempt(["(an answer)", ascii(broken)[:300]], call=call)
