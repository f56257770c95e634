"""GRPO and CLIPO side by side: the same policy, the same problems, several seeds, and what each learned.

    python examples/clipo_vs_grpo/compare.py [--seeds 5] [--arms grpo infonce] [key=value ...]

Runs go to runs/clipo_vs_grpo/<arm>/seed<n>, as many at once as there are processors; those that are there already are
not repeated, so Ctrl-C costs the runs in progress only. The table goes to runs/clipo_vs_grpo/table.md, and
`clipo report runs/clipo_vs_grpo/*/seed*` draws the curves.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from student import teach
from task import is_sound, problems, write_rows

from clipo_megatron.config.load import load
from clipo_megatron.evaluation.estimators import interval
from clipo_megatron.evaluation.results import read_evaluations

HERE = Path(__file__).resolve().parent
SETTINGS = HERE / "comparison.yaml"
HOME = HERE.parent.parent / "runs" / "clipo_vs_grpo"
DEADLINE_S = 1200  # of one run

# What each arm changes. "supcon_out" is the mean over all positives: the expectation of infonce's drawn one.
ARMS: dict[str, list[str]] = {
    "grpo": ["clipo.enabled=false"],
    "infonce": [],
    "supcon_out": ["clipo.loss=supcon_out"],
    "supcon_in": ["clipo.loss=supcon_in"],
    "soft_nn": ["clipo.loss=soft_nn"],
    "frozen": ["clipo.frozen=true"],
    "calibrated": ["clipo.calibrate=true"],
}
BASELINE = "grpo"
SETS = ("usual", "perturbed")


def prepare(home: Path) -> None:
    """The student and its problems, once."""
    if not (home / "train.jsonl").exists():
        train = problems(2000, note_right=0.9, seed=2)
        known = {each.digits for each in train}
        for seed, (name, note_right) in enumerate(zip(SETS, (0.9, 0.0), strict=True), start=3):
            new = [each for each in problems(2000, note_right=note_right, seed=seed) if each.digits not in known]
            write_rows(home / f"{name}.jsonl", new[:250])
        write_rows(home / "train.jsonl", train)
    if not (home / "student" / "tokenizer_config.json").exists():
        teach(home / "student", problems(6000, note_right=0.5, seed=1), seed=0)


def is_done(output: Path, steps: int) -> bool:
    """Whether a run has been evaluated after its last step."""
    return any(each.step == steps for each in read_evaluations(output / "eval"))


def train(arm: str, seed: int, home: Path, overrides: list[str]) -> None:
    """One run, in processes of its own.

    Raises:
        RuntimeError: it failed, or did not end in time; its output is in the run's folder.
    """
    output = home / arm / f"seed{seed}"
    output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "clipo_megatron.cli", "train", str(SETTINGS)]
    command += [f"name={arm}", f"train.output={output}", f"train.seed={seed}", f"model.path={home / 'student'}"]
    command += [f"data.train=[{{path: '{home / 'train.jsonl'}'}}]"]
    command += [f"data.eval=[{', '.join(f'''{{path: '{home / name}.jsonl'}}''' for name in SETS)}]"]
    command += [*ARMS[arm], *overrides]
    log = output / "output.txt"
    with log.open("w") as out:
        ended = subprocess.run(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=DEADLINE_S,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if ended.returncode:
        raise RuntimeError(f"{arm}, seed {seed} ended with {ended.returncode}; its last words are in {log}")


def accuracy(output: Path, name: str) -> tuple[float, float]:
    """Accuracy on a set before the first step and after the last."""
    found = read_evaluations(output / "eval")
    return found[0].by_source()[name], found[-1].by_source()[name]


def preference(home: Path, arm: str, seeds: list[int]) -> tuple[float, float] | None:
    """How much more a bonus of sound than of unfaithful correct responses to one prompt: mean and standard error.

    Over the groups that runs write down and that have paid both kinds; None where fewer than two have.
    """
    gaps = []
    for seed in seeds:
        for line in (home / arm / f"seed{seed}" / "rollouts.jsonl").read_text().splitlines():
            paid = [each for each in json.loads(line)["rollouts"] if each["correct"] and each.get("bonus")]
            sound = [each["bonus"] for each in paid if is_sound(each["text"])]
            other = [each["bonus"] for each in paid if not is_sound(each["text"])]
            if sound and other:
                gaps.append(statistics.fmean(sound) - statistics.fmean(other))
    return (statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))) if len(gaps) > 1 else None


def table(home: Path, arms: list[str], seeds: list[int]) -> str:
    """Accuracies after training, and how far each arm is from the baseline with the same seed, in points."""
    heads = [f"{name}: accuracy | {name}: against {BASELINE}" for name in SETS]
    lines = [f"| arm | {' | '.join(heads)} | bonus, sound - unfaithful |", "|---|" + "---:|---:|" * len(SETS) + "---:|"]
    before = [
        f"{statistics.fmean(accuracy(home / arms[0] / f'seed{s}', name)[0] for s in seeds):.1%} | " for name in SETS
    ]
    lines.append(f"| before training | {' | '.join(before)} | |")
    for arm in arms:
        cells = []
        for name in SETS:
            after = {seed: accuracy(home / arm / f"seed{seed}", name)[1] for seed in seeds}
            cell = f"{statistics.fmean(after.values()):.1%}"
            against = ""
            if arm != BASELINE and BASELINE in arms:
                base = {seed: accuracy(home / BASELINE / f"seed{seed}", name)[1] for seed in seeds}
                mean, half = interval([100 * (after[seed] - base[seed]) for seed in seeds])
                against = f"{mean:+.1f} ± {half:.1f}"
            cells.append(f"{cell} | {against}")
        found = preference(home, arm, seeds)
        cells.append(f"{found[0]:+.4f} (± {found[1]:.4f})" if found else "")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Train what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="default: all")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="default: as many as processors")
    parser.add_argument("--home", type=Path, default=HOME, help="folder of all runs (default: runs/clipo_vs_grpo)")
    options, overrides = parser.parse_known_args()
    if strange := [each for each in overrides if "=" not in each or each.startswith("-")]:
        parser.error(f"{strange[0]} is neither an option nor an override such as train.steps=20")
    steps = load(SETTINGS, overrides).train.steps

    home = options.home.resolve()
    prepare(home)
    seeds = list(range(options.seeds))
    # Seed by seed: a comparison that is stopped early has whole pairs.
    wanted = [(arm, seed) for seed in seeds for arm in options.arms if not is_done(home / arm / f"seed{seed}", steps)]
    start = time.monotonic()
    with ThreadPoolExecutor(options.at_once) as pool:
        futures = {pool.submit(train, arm, seed, home, overrides): (arm, seed) for arm, seed in wanted}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                spent = time.monotonic() - start
                left = spent / done * (len(wanted) - done)
                arm, seed = futures[future]
                print(f"{done}/{len(wanted)}  {arm}, seed {seed}   {spent:.0f} s, about {left:.0f} s left", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    words = table(home, options.arms, seeds)
    (home / "table.md").write_text(words + "\n")
    print(f"\n{words}\n")
    print(f"±: 95% interval of the paired differences over {len(seeds)} seeds, in points; (±): standard error")
    return 0


if __name__ == "__main__":
    sys.exit(main())
