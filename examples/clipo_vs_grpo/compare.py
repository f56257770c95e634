"""Compare GRPO and CLIPO: the same policy and problems, several seeds, and a table of paired differences.

    python examples/clipo_vs_grpo/compare.py [--seeds 5] [--arms grpo infonce] [key=value ...]

Runs go to runs/clipo_vs_grpo/<arm>/seed<n>, as many at once as there are processors. Finished runs are not repeated, so
Ctrl-C costs only the runs in progress. Settings given as key=value hold for every arm. Runs with other settings are
refused, so give --home with them. The tables go to runs/clipo_vs_grpo/table.md, and `clipo report` draws the curves.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from findings import BASELINE, SETS, tables
from task import problems, write_rows

from clipo_megatron.config.errors import ConfigError, spell
from clipo_megatron.config.load import load
from clipo_megatron.config.schema import RunConfig
from clipo_megatron.evaluation.results import read_evaluations
from clipo_megatron.report.grouping import flat
from clipo_megatron.runtime.run_dir import EVALUATIONS
from clipo_megatron.runtime.run_dir import SETTINGS as CONFIG

HERE = Path(__file__).resolve().parent
SETTINGS = HERE / "comparison.yaml"
HOME = HERE.parent.parent / "runs" / "clipo_vs_grpo"
DEADLINE_S = 1200  # for one run

# Settings that each arm changes. "supcon_out" averages over all positives, the expectation of infonce's drawn positive.
ARMS: dict[str, list[str]] = {
    BASELINE: ["clipo.enabled=false"],
    "infonce": [],
    "supcon_out": ["clipo.loss=supcon_out"],
    "supcon_in": ["clipo.loss=supcon_in"],
    "soft_nn": ["clipo.loss=soft_nn"],
    "frozen": ["clipo.frozen=true"],
    "calibrated": ["clipo.calibrate=true"],
}


def prepare(home: Path) -> None:
    """Make the student and its problems unless they exist."""
    if not (home / "train.jsonl").exists():
        train = problems(2000, note_right=0.9, seed=2)
        known = {each.digits for each in train}
        for seed, (name, note_right) in enumerate(zip(SETS, (0.9, 0.0), strict=True), start=3):
            new = [each for each in problems(2000, note_right=note_right, seed=seed) if each.digits not in known]
            write_rows(home / f"{name}.jsonl", new[:250])
        write_rows(home / "train.jsonl", train)
    if not (home / "student" / "tokenizer_config.json").exists():
        from student import teach  # imports torch, which takes seconds

        teach(home / "student", problems(6000, note_right=0.5, seed=1), seed=0)


# ---------------------------------------------------------------- one run


def settings(arm: str, seed: int, home: Path, overrides: Sequence[str]) -> list[str]:
    """The overrides of `clipo train` for one run."""
    given = {
        "name": arm,
        "train.output": str(home / arm / f"seed{seed}"),
        "train.seed": seed,
        "model.path": str(home / "student"),
        "data.train": [{"path": str(home / "train.jsonl")}],
        "data.eval": [{"path": str(home / f"{name}.jsonl")} for name in SETS],
    }
    return [*(f"{key}={json.dumps(value)}" for key, value in given.items()), *ARMS[arm], *overrides]


def refuse_own_settings(arms: Sequence[str], overrides: Sequence[str]) -> None:
    """Raise a ConfigError if an override sets what the arms and seeds differ in."""
    own = {setting.partition("=")[0] for arm in arms for setting in settings(arm, 0, HOME, [])}
    for override in overrides:
        key = override.partition("=")[0].strip()
        if any(key == each or key.startswith((f"{each}.", f"{each}[")) for each in own):
            raise ConfigError(f"{override}: {key} is what the runs differ in, and set by compare.py. Leave it out.")


def refuse_other_settings(output: Path, arm: str, seed: int, overrides: Sequence[str]) -> None:
    """Raise a ConfigError if the run in `output` was made with other settings; one of fewer steps can be continued."""
    file = output / CONFIG
    if not file.exists():
        return
    try:
        made = flat(json.loads(file.read_text()))
        home = Path(made["train.output"]).parent.parent  # the run may have been moved
        continues = made["train.steps"] < _wanted(arm, home, tuple(overrides))["train.steps"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{file} is damaged. Remove {output} to repeat its run.") from None
    now = _wanted(arm, home, tuple(overrides)) | {"train.seed": seed, "train.output": str(home / arm / f"seed{seed}")}
    since = flat(asdict(RunConfig()))  # settings that did not exist yet had their defaults
    for key in sorted(made.keys() | now.keys()):
        value, other = made.get(key, since.get(key)), now.get(key)
        if value != other and not (key == "train.steps" and continues):
            raise ConfigError(
                f"{output} was made with {key} = {_whole(value)}, and now it would be {_whole(other)}. Choose another "
                "folder with --home, or remove that one."
            )


def _whole(value: Any) -> str:
    """A setting's value for a message; texts are not cut, since two paths may differ at their ends only."""
    return value if isinstance(value, str) and value else spell(value)


@cache
def _wanted(arm: str, home: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """The settings of an arm's first run as its config.json would hold them, by dotted key."""
    config = load(SETTINGS, settings(arm, 0, home, overrides))
    return flat(json.loads(json.dumps(asdict(config), default=str)))


def is_done(output: Path, steps: int) -> bool:
    """Whether a run has been evaluated after its last step."""
    return any(each.step == steps for each in read_evaluations(output / EVALUATIONS))


def train(arm: str, seed: int, home: Path, overrides: Sequence[str]) -> None:
    """Train one run in a subprocess.

    Raises:
        RuntimeError: the run failed, or did not end in time.
    """
    output = home / arm / f"seed{seed}"
    output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "clipo_megatron.cli", "train", str(SETTINGS)]
    log = output / "output.txt"
    try:
        with log.open("w") as out:
            code = subprocess.run(
                [*command, *settings(arm, seed, home, overrides)],
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=DEADLINE_S,
                check=False,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            ).returncode
    except subprocess.TimeoutExpired:
        raise RuntimeError(
            f"{arm}, seed {seed} did not end within {DEADLINE_S} s. Its output is in {log}. Run fewer at once with "
            "--at-once."
        ) from None
    if code or not is_done(output, load(SETTINGS, overrides).train.steps):
        printed = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise RuntimeError(
            f"{arm}, seed {seed} ended with {code}: {printed[-1].strip() if printed else 'no output'}. All of "
            f"its output is in {log}."
        )


# ---------------------------------------------------------------- all runs


def train_missing(
    home: Path, arms: Sequence[str], seeds: Iterable[int], overrides: Sequence[str], *, at_once: int
) -> None:
    """Train the runs that are missing.

    Raises:
        ConfigError: settings are wrong, or an existing run was made with other settings.
        RuntimeError: a run failed. Runs in progress are waited for, and no other is started.
    """
    refuse_own_settings(arms, overrides)
    steps = load(SETTINGS, overrides).train.steps
    # Seed by seed, so that a comparison that is stopped early has complete pairs.
    wanted = [(arm, seed) for seed in seeds for arm in arms]
    for arm, seed in wanted:
        refuse_other_settings(home / arm / f"seed{seed}", arm, seed, overrides)
    missing = [(arm, seed) for arm, seed in wanted if not is_done(home / arm / f"seed{seed}", steps)]
    if not missing:
        return
    prepare(home)
    start = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        futures = {pool.submit(train, arm, seed, home, overrides): (arm, seed) for arm, seed in missing}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                spent = time.monotonic() - start
                left = spent / done * (len(missing) - done)
                arm, seed = futures[future]
                print(f"{done}/{len(missing)}  {arm}, seed {seed}   {spent:.0f} s, about {left:.0f} s left", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, then print the tables.

    Returns:
        0: all runs are there; 1: a run failed; 2: an argument or setting is wrong; 130: Ctrl-C.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), metavar="ARM", help=f"of {', '.join(ARMS)}; all")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="runs of each arm (default: %(default)s)")
    parser.add_argument(
        "--at-once", type=int, default=os.cpu_count() or 1, metavar="N", help="default: as many as CPUs"
    )
    parser.add_argument("--home", type=Path, default=HOME, help="folder of all runs (default: runs/clipo_vs_grpo)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run, as for `clipo train`")
    options = parser.parse_intermixed_args(arguments)
    # Overrides right after --arms were parsed as arms.
    overrides = [*options.overrides, *(each for each in options.arms if "=" in each)]
    arms = list(dict.fromkeys(each for each in options.arms if "=" not in each)) or list(ARMS)
    if strange := [each for each in arms if each not in ARMS]:
        parser.error(f"there is no arm {strange[0]}; there are {', '.join(ARMS)}")
    for name, value in (("--seeds", options.seeds), ("--at-once", options.at_once)):
        if value < 1:
            parser.error(f"{name} {value}: it must be at least 1")
    home, seeds = options.home.resolve(), range(options.seeds)
    try:
        train_missing(home, arms, seeds, overrides, at_once=options.at_once)
        text = tables(home, arms, seeds)
        (home / "table.md").write_text(text + "\n")
    except (ConfigError, RuntimeError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:
        print(f"compare.py: the runs' folder cannot be used: {error}. Choose another with --home.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("compare.py: stopped. The same command trains what is missing.", file=sys.stderr)
        return 130
    over = f"half the 95% interval over {len(seeds)} seeds" if len(seeds) > 1 else "one seed has no interval"
    print(f"\n{text}\n\n±: {over}; accuracies in points.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
