"""Broken settings, YAML, overrides, command lines and environments; each function breaks one, and returns a command."""

from __future__ import annotations

import json
import os
import random
import resource
from pathlib import Path
from typing import Any

import yaml
from broken_things import Attempt
from broken_values import as_text, as_word, mutated, mutated_bytes, odd_value, replace_file

from clipo_megatron.config import reference

SERVED = "rollout.engine=sglang"
READERS = (
    ("train", "--check"),
    ("train", "--check"),
    ("train", "--check"),
    ("plan", SERVED),
    ("plan", SERVED, "--gpus", "8"),
    ("plan", SERVED, "--json"),
    ("submit", "--nodes", "1", "--dry-run"),
    ("scale", "--nodes", "1,2", "--dry-run"),
    ("serve", SERVED, "--check"),
    ("eval", "--output", "out.json"),
)
OPTIONS = {
    "train": ("--check",),
    "submit": (
        "--nodes", "--server-nodes", "--gpus-per-node", "--ranks-per-node", "--cpus-per-rank", "--mem", "--time",
        "--partition", "--account", "--sbatch", "--server-sbatch", "--setup", "--python", "--container", "--mount",
        "--container-runtime", "--stop-before", "--requeues", "--restarts", "--ranks-deadline", "--hardware", "--job",
        "--target",
    ),
    "scale": (
        "--nodes", "--server-nodes", "--kind", "--steps", "--skip", "--one-by-one", "--wait", "--collect",
        "--gpus-per-node", "--time", "--mem",
    ),
    "eval": ("--set", "--output"),
    "compare": ("--set", "--seed", "--resamples", "--json"),
    "report": ("-o", "--out", "--against"),
    "serve": ("--check",),
    "convert": (
        "--tp", "--pp", "--vpp", "--ep", "--etp", "--first-layers", "--last-layers", "--dtype", "--threads",
        "--max-shard-gb", "--master", "--hf", "--logits", "--tolerance", "--show", "--json", "--dry-run",
    ),
    "plan": ("--gpus", "--hardware", "--assume", "--json", "--dry-run", "--rank"),
    "settings": (),
    "methods": (),
    "doctor": (),
}  # fmt: skip
SOUND = {
    "train": ["train", "run.yaml", "--check"],
    "submit": ["submit", "run.yaml", "--nodes", "1", "--dry-run"],
    "scale": ["scale", "run.yaml", "--nodes", "1,2", "--dry-run"],
    "eval": ["eval", "run.yaml", "--output", "out.json"],
    "compare": ["compare", "run/eval/step_000000.json", "run/eval/step_000004.json"],
    "report": ["report", "run", "-o", "out.html"],
    "serve": ["serve", "run.yaml", SERVED, "--check"],
    "convert": ["convert", "verify", "model", "model"],
    "plan": ["plan", "run.yaml", SERVED],
    "settings": ["settings", "clipo"],
    "methods": ["methods", "dapo"],
    "doctor": ["doctor"],
}
PLAIN = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID",
    "SLURM_STEP_ID", "SLURM_JOB_NODELIST", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "XDG_CACHE_HOME", "HF_HOME", "COLUMNS",
    "LINES", "NO_COLOR", "TZ", "CUDA_VISIBLE_DEVICES", "CLIPO_JOB", "HTTP_PROXY", "GLOO_SOCKET_IFNAME",
    "TOKENIZERS_PARALLELISM",
)  # fmt: skip
WORDS = (
    "", "0", "-1", "1", "8", "1e3", "nan", "inf", "-inf", "1e400", "9" * 5000, "1,2", "1,,2", ",", "0,0", "x",
    "x" * 9000, "\0", "\udcff", "\x1b[2J", "a\nb", "run.yaml", "model", "run", "nowhere", "/dev/null", "/dev/zero",
    "/", ".", "..", "out", "out.json", "--", "-x", "--nope", "--help", "-h", "=", "a=", "=b", "a=b", "layout.tp=2",
    "train.steps=1e30", "train_flops=0", "train_flops=nan", "mean_response=1e400", "h100", "bf16", "train", "exam",
    "24:00:00", "@file", "%j", "$(touch canary)", "`touch canary`", "'; touch canary; '", "docker://x", "/a:/b", "é",
    "grpo", "clipo", "[" * 500,
)  # fmt: skip


def sound(dice: random.Random, folder: Path) -> Attempt:
    """Nothing is broken: what every command does here without it."""
    commands = list(SOUND.values())
    return Attempt(dice.choice(commands), writes=("out", "run/"))


def settings(dice: random.Random, folder: Path) -> Attempt:
    """A few settings of the file hold other values, by what it has or by what it could have."""
    tree = json.loads(Path("run.yaml").read_text())
    if dice.random() < 0.5:
        tree = mutated(dice, tree, dice.choice((1, 1, 1, 2, 4)))
    else:
        for _ in range(dice.choice((1, 1, 2, 3))):
            _set(tree, dice.choice(reference.settings()).key, odd_value(dice))
    Path("run.yaml").write_text(as_text(tree))
    return _read_by(dice, "run.yaml")


def _set(tree: Any, key: str, value: Any) -> None:
    *before, last = key.replace("[]", ".0").split(".")
    for part in before:
        tree = tree[0] if part == "0" else tree.setdefault(part, {})
        tree = [{}] if isinstance(tree, list) and not tree else tree
    tree = tree[0] if isinstance(tree, list) else tree
    tree[last] = value


def yaml_text(dice: random.Random, folder: Path) -> Attempt:
    """The text of the file is no YAML, or YAML that means something else than it seems to."""
    file = Path("run.yaml")
    text = yaml.safe_dump(json.loads(file.read_text()))
    bomb = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    forms: tuple[Any, ...] = (
        lambda: mutated_bytes(dice, text.encode()),
        lambda: mutated_bytes(dice, text.encode()),
        lambda: mutated_bytes(dice, text.encode()),
        lambda: text.replace("  ", "\t"),
        lambda: text + dice.choice(("train:\n  steps: 3\n", "name: x\nname: y\n", "? [a, b]\n: 1\n", "---\na: 1\n")),
        lambda: text + "&a\n- *a\n",
        lambda: f"a0: &a0 [x]\n{bomb}{text}",
        lambda: "model: &m\n  path: model\n  x: *m\n",
        lambda: f"x: &x {{y: *x}}\n{text}",
        lambda: text.replace("model\n", f"!!python/object/apply:os.system ['touch {folder}/canary']\n", 1),
        lambda: text.replace("model\n", "!!binary gA==\n", 1),
        lambda: text + f"x: {'[' * 10_000}{']' * 10_000}\n",
        lambda: text + "x: " + "{a: " * 3000 + "1" + "}" * 3000 + "\n",
        lambda: "".join(f"{' ' * n}a:\n" for n in range(3000)),
        lambda: text.encode(dice.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1"))),
        lambda: f"x: {'9' * 5000}\n{text}",
        lambda: "%YAML 9.9\n---\n" + text,
        lambda: text + "<<: *nowhere\n",
        lambda: text + "<<: 3\n",
        lambda: text.replace("name: before", dice.choice(("name: no", "name: 2026-13-45", "name: 1:99", "name: 0o9"))),
        lambda: dice.choice(("", "\n\n", "#\n", "null", "3", "- 1\n- 2\n", "x", "{}", "[]", "---\n---\n", "...\n")),
        lambda: text + "".join(f"key{n}: {n}\n" for n in range(3000)),
        lambda: text + f"name: {'x' * 200_000}\n",
        lambda: "x: '" + "y" * 20_000_000 + "'\n",
    )
    if dice.random() < 0.1:
        replace_file(dice, file)
    else:
        content = dice.choice(forms)()
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return _read_by(dice, "run.yaml")


def overrides(dice: random.Random, folder: Path) -> Attempt:
    """Overrides of the command line with broken keys, values or both."""
    given = []
    for _ in range(dice.choice((1, 1, 2, 3))):
        key = dice.choice(reference.settings()).key.replace("[]", dice.choice(("[0]", "[0]", "[7]", ".0", "", "[-1]")))
        if dice.random() < 0.2:
            odd = (f"{key}.x", key[:-1], key.upper(), key.rpartition(".")[0], f".{key}", f"{key}[0]", "x" * 3000, "é")
            key = dice.choice((*odd, key.replace(".", ".."), "a" + ".b" * 3000, f"data.train[{10**20}].path"))
        value = as_word(odd_value(dice)) if dice.random() < 0.8 else dice.choice(
            ("[", "{a", "'", "&a [*a]", "*b", "!!python/none", "a: b: c", "- x", "| x", "@", "%", "`", "{a: 1, a: 2}",
             "!!binary gA==", "? x", "[" * 5000, "${a:b}", "${env:HOME}", "2026-13-45", "{[1]: 2}", "{1: 2}", "1:99")
        )  # fmt: skip
        given.append(f"{key}={value}")
    return _read_by(dice, "run.yaml", *given)


def words(dice: random.Random, folder: Path) -> Attempt:
    """Command lines of every command with broken words and options."""
    command = dice.choice(list(SOUND))
    line = list(SOUND[command])
    if command == "convert":
        line[1:] = dice.choice(
            (line[1:], ["to-megatron", "model", "out"], ["to-hf", "run/checkpoints/step_000002", "out"])
        )
    for _ in range(dice.choice((1, 1, 2, 3))):
        kind = dice.random()
        if kind < 0.45 and OPTIONS[command]:
            option, word = dice.choice(OPTIONS[command]), dice.choice(WORDS)
            line += [f"{option}={word}"] if dice.random() < 0.3 else [option, word]
        elif kind < 0.65:
            line.insert(dice.randrange(1, len(line) + 1), dice.choice(WORDS))
        elif kind < 0.85:
            line[dice.randrange(len(line))] = dice.choice(WORDS)
        elif line:
            del line[dice.randrange(len(line))]
        line = line or [""]
    if line[0] in ("submit", "scale"):
        line.append("--dry-run")  # the machine may have a Slurm of its own
    if line[0] in ("train", "serve"):
        line.append("--check")
    return Attempt(line, writes=("out", "run/", *_files_named(line)))


def _files_named(line: list[str]) -> tuple[str, ...]:
    """Names that a command line has after an option whose value is a file to write, and those of a conversion."""
    found = [word for word in line[2:] if word[:1] != "-"] if line[:1] == ["convert"] else []
    for option, word in zip(line, [*line[1:], ""], strict=True):
        name, equals, value = option.partition("=")
        if name in ("-o", "--out", "--output", "--json") or name.startswith(("--o", "--j")):
            found.append(value if equals else word)
    names = [os.path.relpath(name) for name in found if name and "\0" not in name and len(name) < 4000]
    return tuple(map(_first_missing, (name for name in names if not os.path.lexists(name))))


def _first_missing(name: str) -> str:
    """The uppermost folder that has to be made for a file of this name, or the file itself."""
    above = os.path.dirname(name)
    return name if not above or os.path.lexists(above) else _first_missing(above)


def environment(dice: random.Random, folder: Path) -> Attempt:
    """Variables, limits and standard streams that a shell, a launcher or a site could leave broken."""
    odd = (
        "",
        "abc",
        "-1",
        "0",
        "1",
        "2",
        "99999999",
        "1e9",
        " 1",
        "\N{PILE OF POO}",
        "0x1",
        "9" * 400,
        "nope",
        "/nope",
    )
    names = {
        **dict.fromkeys(PLAIN, odd),
        "MASTER_PORT": (*odd, "1", "65536", "22"),
        "MASTER_ADDR": (*odd, "localhost", "nowhere.invalid", "256.1.1.1", "::", "a b"),
        "SLURM_STEP_NODELIST": (*odd, "a[1-", "a[9-1]", "[", "gpu[07-09,12]"),
        "LANG": (*odd, "C", "de_DE.UTF-8"),
        "LC_ALL": (*odd, "C", "POSIX"),
        "HOME": (*odd, None, "/dev/null"),
        "TMPDIR": (*odd, "/dev/null", "/proc"),
        "PATH": (*odd, None),
        "TERM": (*odd, None, "dumb"),
        "CLIPO_API_KEY": (*odd, "a\nb", "x" * 9000),
        "USER": (*odd, None),
        "PYTHONWARNINGS": ("nope", "x:y:z"),
    }
    given = {name: dice.choice(names[name]) for name in dice.sample(sorted(names), dice.choice((1, 1, 2, 3)))}
    closed = dice.choice(((), (), (), (), (0,), (1,), (2,), (1, 2), (0, 1, 2)))
    limits = dice.choice(
        ({}, {}, {}, {resource.RLIMIT_NOFILE: dice.choice((8, 16, 64))}, {resource.RLIMIT_FSIZE: 8192},
         {resource.RLIMIT_STACK: 1 << 16}, {resource.RLIMIT_CORE: 0})
    )  # fmt: skip
    command = dice.choice([*SOUND.values(), ["convert", "to-hf", "run/checkpoints/step_000002", "out"]])
    return Attempt(command, environment=given, closed=closed, limits=limits, writes=("out", "run/"))


def _read_by(dice: random.Random, file: str, *given: str) -> Attempt:
    command, *rest = dice.choice(READERS)
    return Attempt([command, file, *given, *rest], writes=("out", "run/") if command == "eval" else ("out",))
