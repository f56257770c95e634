"""A run whose servers are killed, stopped, disconnected and made to answer wrongly loses and repeats nothing."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from chaos import Chaos, Fault, draw_faults, rollouts
from served import interpreter
from small_runs import SmallRun, metrics, steps_logged, write_config, write_model

# How often each server is killed and stopped at each moment. Once is 16 faults and a few minutes; every fault takes a
# step, and those that end a server one or two restarts.
ROUNDS = int(os.environ.get("CLIPO_CHAOS_ROUNDS", "1"))
STEPS = 30 + 30 * ROUNDS
FAULT_S = 900.0  # for a fault and its step to end
DEADLINES = (
    "rollout.deadline_s=400",
    "rollout.pool.request_deadline_s=45",
    "rollout.pool.attempts=8",
    "rollout.pool.join_deadline_s=200",
    "rollout.sync.deadline_s=40",
    "layout.distributed_timeout_s=900",
    "serve.health_timeout_s=10",
    "serve.max_restarts=8",
)


def test_a_run_outlives_its_servers(tmp_path: Path):
    seed = int(os.environ.get("CLIPO_CHAOS_SEED", random.randrange(10**6)))
    faults = draw_faults(seed, ROUNDS)
    print(f"CLIPO_CHAOS_SEED={seed}: {len(faults)} faults")
    assert len(faults) >= 10 + 6 * ROUNDS
    interpreter("sglang")
    config = write_config(tmp_path, write_model(tmp_path / "model", intermediate=128))
    output = tmp_path / "run"
    served = ("rollout.engine=sglang", f"train.output={output}", *DEADLINES)
    servers = SmallRun(config, tmp_path / "serve", "serve.servers=2", *served, command="serve")
    chaos, run = Chaos(output, seed), None
    try:
        servers.wait_for(chaos.ready, "both servers to be ready")
        chaos.stand_between()
        run = SmallRun(
            config,
            output,
            f"rollout.endpoints=[{','.join(chaos.urls)}]",
            "layout.pp=2",
            f"train.steps={STEPS}",
            "report.save_rollouts=4",
            "eval.every=0",
            "checkpoint.every=0",
            *served,
        )
        for fault in faults:
            servers.wait_for(chaos.ready, f"both servers to be ready for the fault: {fault}")
            started, steps = time.monotonic(), steps_logged(output)
            let_it_happen(chaos, fault, run)
            seconds, went = time.monotonic() - started, steps_logged(output) - steps
            print(f"{fault}: {seconds:.1f} s, {went} steps")
        chaos.open = True
        run.wait()
    finally:
        chaos.close()
        for each in (run, servers):
            if each is not None and each.process.poll() is None:
                each.kill()
    assert [fault for fault in chaos.struck if fault in faults] == faults
    everything_once(output)


def let_it_happen(chaos: Chaos, fault: Fault, run: SmallRun) -> None:
    """Arm a fault, let generation go, and hold it again when the fault has happened."""
    happening, deadline = chaos.arm(fault), time.monotonic() + FAULT_S
    next(happening, None)
    chaos.open = True
    for _ in happening:
        assert run.process.poll() is None, f"the run ended at the fault: {fault}\n{run.said}"
        assert time.monotonic() < deadline, f"the fault did not happen within {FAULT_S:.0f} s: {fault}\n{run.said}"
        time.sleep(0.01)
    chaos.open = False


def everything_once(output: Path) -> None:
    """Check that every step has every rollout of its prompts once, from the weights of that step."""
    assert [line["step"] for line in metrics(output)] == list(range(STEPS))
    groups = rollouts(output)
    assert [group["step"] for group in groups] == [step for step in range(STEPS) for _ in range(4)]
    for group in groups:
        assert [rollout["version"] for rollout in group["rollouts"]] == [group["step"]] * 8
    # The sampler's epochs, whole: no prompt was lost, and none was asked twice.
    names = [group["prompt_id"] for group in groups]
    for epoch in range(STEPS * 4 // 10):
        assert len(set(names[10 * epoch : 10 * epoch + 10])) == 10
    for line in metrics(output):
        assert line["policy/mult_prob_error"] <= 1.01
