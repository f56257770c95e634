"""A stop is a stop, whichever processes of a run it reaches: its step ends, its state is saved, nothing restarts."""

import contextlib
import os
import signal

from held_runs import Hold
from progress import wait_until
from random_stops import chosen, handles_signals
from small_runs import STEPS, SmallRun, assert_same_run

PP2 = "layout.pp=2"
CASES = (  # after which step, whom, what, and the exit code
    (1, "every process", (signal.SIGTERM, signal.SIGTERM), 143),
    (2, "rank 1", (signal.SIGUSR1,), 138),
    (4, "the first process", (signal.SIGHUP,), 129),
    (5, "both ranks", (signal.SIGINT, signal.SIGINT, signal.SIGINT), 130),
)


def send(run, whom, numbers):
    for number in numbers:
        for pid in chosen(run, whom):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def test_a_run_that_is_stopped_in_every_way_is_resumed_to_the_bit(small_config, undisturbed_pp2, tmp_path):
    output = tmp_path / "run"
    starting = SmallRun(small_config, output, PP2)
    wait_until(lambda: handles_signals(starting.process.pid), "its first lines")
    send(starting, "every process", (signal.SIGINT,) * 3)
    starting.wait(130)
    for step, whom, numbers, code in CASES:
        hold = Hold(tmp_path / f"hold{step}", after_step=step)
        run = SmallRun(small_config, output, PP2, hold=hold)
        run.wait_for_hold()
        send(run, whom, numbers)
        if whom != "rank 1":  # which may have said already that it was not asked, so that the next step is the last
            run.wait_for(lambda run=run: "ending after this step" in run.said, "the answer to the signal")
        hold.release()
        run.wait(code)
        done = max(int(path.name[5:]) for path in (output / "checkpoints").glob("step_*"))
        assert done == step or (whom, done) == ("rank 1", step + 1)
        assert f"after {done} of {STEPS} steps; the state is saved" in run.said, run.said
        assert run.said.count("clipo: stopped by") == 1 and "Starting the ranks again" not in run.said
    SmallRun(small_config, output, PP2).wait()
    assert_same_run(output, undisturbed_pp2)
