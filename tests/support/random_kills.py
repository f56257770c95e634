"""Runs whose processes are killed at random moments, and started again until they are done.

What is killed is drawn from all processes of a run, supervisor, ranks and graders, or is all of them; when is drawn
too, and half of the kills wait for a checkpoint that is being written. By hand, 40 kills on two ranks:

    python tests/support/random_kills.py --kills 40 --seed 7 layout.pp=2

With `--served` the run asks two SGLang servers of `clipo serve`, which are killed too, and kills also wait for an
update of their weights. Such a run cannot be repeated to the bit: its ledger has to say that every prompt trained once.

    python tests/support/random_kills.py --served --kills 40 --a-run 40 --steps 200 rollout.ahead=1
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from progress import begin_session, wait_until
from served import interpreter
from small_runs import SmallRun, assert_same_run, metrics, write_config, write_model

from clipo_megatron.rollout.servers.registry import Registry, Status
from clipo_megatron.runtime.run_dir import CHECKPOINTS, LEDGER, SERVERS, WEIGHTS
from clipo_megatron.training.ledger import balance

PACE = (
    "checkpoint.every=2",
    "checkpoint.keep=3",
    "eval.every=4",
    "faults.max_restarts=4",
    "faults.heartbeat_timeout_s=20",
)
LONGEST_S = 2.0  # between the start of a run's work and a kill; a small run works for little longer
SERVED = (
    "rollout.engine=sglang",
    "rollout.sync.transport=disk",  # an update can be seen in its folder
    "rollout.servers=2",
    "rollout.pool.request_deadline_s=45",
    "rollout.pool.join_deadline_s=300",
    "rollout.deadline_s=700",
    "layout.distributed_timeout_s=1500",
    "eval.every=50",
)


@dataclass
class Kills:
    """Kills processes of one run at random moments until the run is done.

    Args:
        config: the configuration file, by `small_runs.write_config`.
        output: the run's output folder.
        overrides: settings of the run.
        seed: seed of everything drawn.
        servers: the run's servers, of which some are killed too.
    """

    config: Path
    output: Path
    overrides: tuple[str, ...]
    seed: int
    servers: SmallRun | None = None
    struck: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)

    def until_done(self, most: int) -> None:
        """Start the run, kill, start again; after `most` kills it is left alone."""
        while True:
            run = SmallRun(self.config, self.output, *self.overrides)
            try:
                while run.process.poll() is None and self.struck.total() < most:
                    if self._kill(run):
                        self._sound()
                if self.struck.total() >= most:
                    wait_until(lambda run=run: run.process.poll() is not None, "the end of the run", run.pids)
                    if run.process.returncode == 0:
                        return
                elif run.process.returncode == 0:
                    return
            finally:
                if run.process.poll() is None or run.pids():
                    run.kill()

    def _kill(self, run: SmallRun) -> bool:
        """Wait for a moment, and kill something; False if the run was over before."""
        # The first kill waits for a write, so a run cannot be over before all of them.
        name = "the write of a checkpoint"
        if self.struck:
            name = self.dice.choice(["any", name, *(["any", "an update of the servers"] if self.servers else [])])
        moment, which, patience = self.dice.uniform(0.0, LONGEST_S), self.dice.random(), time.monotonic() + 60.0
        while not self._works(run):
            if run.process.poll() is not None or time.monotonic() > patience:
                return False
            time.sleep(0.02)
        if name != "any":  # a hundredth of the moment into it
            until = time.monotonic() + 20.0
            while not self._is(name) and time.monotonic() < until:
                if run.process.poll() is not None:
                    return False
                time.sleep(0.001)
            time.sleep(moment / 100)
        else:
            time.sleep(moment)
        found = [each for each in ("the write of a checkpoint", "an update of the servers") if self._is(each)]
        pids = sorted(run.pids())
        if run.process.poll() is not None or not pids:
            return False
        kind, victims = self._victims(run, pids, which)
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.struck[f"{kind}, in {found[0]}" if found else kind] += 1
        time.sleep(0.2)
        return True

    def _victims(self, run: SmallRun, pids: list[int], which: float) -> tuple[str, list[int]]:
        """What a number from 0 to 1 says to kill: a server, everything of the run, or one process of it."""
        if self.servers is not None:
            records = Registry(self.output / SERVERS).records()
            ready = [each.pid for each in records if each.status is Status.ready]
            if which < 0.25 and ready:
                return "a server", [ready[int(which / 0.25 * len(ready))]]
            which = max(0.0, which - 0.25) / 0.75
        if which < 0.3:
            return "everything", pids
        victim = pids[int((which - 0.3) / 0.7 * len(pids))]
        return _kind(victim, run.process.pid), [victim]

    def _is(self, moment: str) -> bool:
        """Whether it is the moment of that name."""
        if moment == "an update of the servers":
            return len(list((self.output / WEIGHTS).glob("*/v*"))) > 1
        return any((self.output / CHECKPOINTS).glob(".step_*.partial"))

    def _works(self, run: SmallRun) -> bool:
        """Whether its ranks have begun: they print their first line before the first step."""
        return "small: model" in run.said.rpartition("Starting the ranks again")[2]

    def _sound(self) -> None:
        """Assert that no step is logged twice or left out, whatever was killed."""
        if (self.output / "metrics.jsonl").exists():
            text = (self.output / "metrics.jsonl").read_text()
            steps = [line.partition(",")[0] for line in text.splitlines()[: text.count("\n")]]
            assert steps == [f'{{"step": {number}' for number in range(len(steps))], steps


def _kind(pid: int, supervisor: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return "a process that was ending"
    if b"rewards.worker" in command:
        return "a grader"
    if pid == supervisor:
        return "the first process"
    found = [entry for entry in environment.split(b"\0") if entry.startswith(b"RANK=")]
    return f"rank {found[0].decode()[5:]}" if found else "another process"


def everything_once(output: Path, steps: int, prompts_per_step: int = 4) -> None:
    """Assert that each prompt of the sampler trained once, in order, and each step was done once."""
    assert [line["step"] for line in metrics(output)] == list(range(steps))
    found = balance(map(json.loads, (output / LEDGER).read_text().splitlines()))
    assert found.problems() == [] and not found.dropped
    assert sorted(found.trained) == list(range(steps * prompts_per_step))


@contextlib.contextmanager
def servers_of(config: Path, output: Path) -> Iterator[SmallRun]:
    """Two SGLang servers of `clipo serve` for the run in `output`."""
    interpreter("sglang")
    options = ("serve.servers=2", "serve.max_restarts=50", "serve.health_timeout_s=20", f"train.output={output}")
    servers = SmallRun(config, output.with_name("serve"), *SERVED, *options, command="serve")
    registry = Registry(output / SERVERS)
    try:
        servers.wait_for(
            lambda: [each.status for each in registry.records()] == [Status.ready] * 2, "both servers to be ready"
        )
        yield servers
    finally:
        if servers.process.poll() is None:
            servers.kill()


def killed_with_its_servers(folder: Path, kills: int, steps: int, seed: int, overrides: Sequence[str]) -> Counter[str]:
    """One run on two servers, with kills of both, until it is done; what was killed."""
    config = write_config(folder, write_model(folder / "model", intermediate=128))
    with servers_of(config, folder / "run") as servers:
        settings = (*PACE, *SERVED, f"train.steps={steps}", *overrides)
        run = Kills(config, folder / "run", settings, seed, servers)
        run.until_done(kills)
    everything_once(folder / "run", steps)
    return run.struck


def main() -> None:
    """Kill until so many kills have happened, over as many runs as that takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--a-run", type=int, default=10, help="kills of one run at most")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--served", action="store_true", help="on two servers, which are killed too; one run")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    begin_session()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.served:
            struck = killed_with_its_servers(folder, options.kills, options.steps, options.seed, options.overrides)
            print(f"{struck.total()} kills, every prompt trained once: {dict(struck)}")
            return
        config = write_config(folder, write_model(folder / "model"))
        overrides = (*PACE, f"train.steps={options.steps}", *options.overrides)
        undisturbed = folder / "undisturbed"
        SmallRun(config, undisturbed, *overrides).wait()
        struck: Counter[str] = Counter()
        while struck.total() < options.kills:
            kills = Kills(config, output := folder / "run", overrides, options.seed + struck.total())
            kills.until_done(min(options.a_run, options.kills - struck.total()))
            assert_same_run(output, undisturbed, options.steps)
            assert [line["step"] for line in metrics(output)] == list(range(options.steps))
            struck += kills.struck
            print(f"{struck.total()} kills so far, the run is the undisturbed one: {dict(kills.struck)}", flush=True)
            shutil.rmtree(output)
        print(f"{struck.total()} kills, nothing lost: {dict(struck)}")


if __name__ == "__main__":
    main()
