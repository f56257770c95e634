"""A run whose rollouts are begun steps ahead of their training trains the same prompts after a kill."""

import json

from held_runs import Hold
from small_runs import EVERY, STEPS, SmallRun, checkpoint_state, metrics

from clipo_megatron.training.ledger import balance


def test_a_killed_run_keeps_what_it_had_begun(small_config, tmp_path):
    """Tokens of prompts that have not trained are in the checkpoint, and every prompt trains once in the end."""
    output, words = tmp_path / "run", ("layout.pp=2", "rollout.ahead=1")
    hold = Hold(tmp_path / "hold", after_step=EVERY + 1)
    run = SmallRun(small_config, output, *words, hold=hold)
    run.wait_for_hold()
    run.wait_for((output / "checkpoints" / f"step_{EVERY:06d}").exists, f"the checkpoint of step {EVERY}")
    run.kill()
    state = checkpoint_state(output, EVERY)
    tokens = [value for name, value in state.items() if name.startswith("rollouts") and name.endswith("tokens")]
    assert sum(each.numel() for each in tokens) > 0

    SmallRun(small_config, output, *words).wait()
    lines = metrics(output)
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert any(line["rollout/version_lag"] > 0 for line in lines[EVERY:])
    ledger = balance(map(json.loads, (output / "prompts.jsonl").read_text().splitlines()))
    assert ledger.problems() == [] and not ledger.dropped
    assert sorted(ledger.trained) == list(range(4 * STEPS))
