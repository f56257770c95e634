"""Synthetic runs for reports: folders with every file that a run writes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from clipo_megatron.config.schema import RunConfig
from clipo_megatron.evaluation.results import Evaluation, ProblemResult, write_evaluation
from clipo_megatron.telemetry.metric_names import PHASES, phase_time
from clipo_megatron.telemetry.states import States, write_states

NASTY = "</script><script>throw Error('escaped?')</script> <img src=x onerror=alert(1)> \x1b[31m & \"quoted\" €"


def write_run(
    folder: Path,
    *,
    steps: int = 12,
    seed: int = 0,
    clipo: bool = True,
    evaluated: bool = False,
    name: str | None = None,
    **facts,
) -> Path:
    """Write the folder of a synthetic run; `facts` are settings of the optimizer."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed + 10 * clipo)
    config = RunConfig(name=name or f"{'clipo' if clipo else 'grpo'}-{seed}")
    config.model.path, config.train.seed, config.train.steps, config.clipo.enabled = "models/M", seed, 12, clipo
    config.train.output = str(folder)
    for key, value in facts.items():
        setattr(config.optimizer, key, value)
    (folder / "config.json").write_text(json.dumps(asdict(config), default=str))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(steps):
            line = {"step": step, "reward/accuracy": random.random(), "reward/mean": random.normal(), "my/own": 1.0}
            line |= {phase_time(phase): random.random() for phase in PHASES} | {"time/step_s": 6.0}
            line |= {"policy/grad_norm": None if step == 3 else random.random(), "speed/padding_share": 0.0}
            if clipo:
                line |= {"clipo/loss": random.random(), "clipo/bonus_mean": -random.random() / 5}
                line |= {"clipo/positive_cosine": 0.9, "clipo/negative_cosine": 0.5 + step / 100}
            file.write(json.dumps(line) + "\n")
    rollouts = [
        {"text": NASTY if n == 0 else f"Answer {n}", "correct": n < 2, "bonus": -0.1 * n, "reward": float(n < 2)}
        for n in range(4)
    ]
    ask = [{"role": "user", "content": "What?"}]
    lines = [
        {"step": s, "prompt_id": "set/0", "messages": ask, "ground_truth": "1", "rollouts": rollouts} for s in (0, 11)
    ]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    group, correct = np.repeat(np.arange(6), 4), np.tile([True, True, False, False], 6)
    for step in (0, steps - 1) if steps else ():
        pooled, z = (random.normal(size=(24, size)).astype(np.float32) for size in (32, 8))
        bonus = np.where(correct, -0.1, 0).astype(np.float32)
        names = [f"set/{n}" for n in range(6)]
        extra = {"embeddings": z, "bonus": bonus} if clipo else {}
        write_states(folder / "states", States(step, names, group, correct, np.ones(24, bool), pooled, **extra))
    for step in (0, 12) if evaluated else ():
        answers = {f"{source}/{n}": random.random() < 0.3 + step / 30 for source in ("easy", "hard") for n in range(20)}
        problems = {problem: ProblemResult(1, int(right), digest=problem) for problem, right in answers.items()}
        write_evaluation(folder / "eval", Evaluation(step, problems))
    spans = [["generate", 100.0, 101.5], ["update", 101.5, 104.25]]
    ranks = [{"spans": spans, "peak_memory": (3 + rank) * 2**30} for rank in range(2)]
    (folder / "trace.jsonl").write_text(json.dumps({"step": 0, "ranks": ranks}) + "\n")
    return folder


def evaluate(run: Path, step: int, solved: int, source: str = "set") -> None:
    """Write an evaluation in which the first `solved` of 20 problems are correct."""
    problems = {f"{source}/{n}": ProblemResult(1, int(n < solved), digest=str(n)) for n in range(20)}
    write_evaluation(run / "eval", Evaluation(step, problems))
