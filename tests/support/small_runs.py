"""Runs of `clipo train` small enough for tests: a tiny model, a task it sometimes solves, and processes to kill.

A random model answers no question, and a run without correct answers has no advantages, no bonuses and no gradients: it
would resume equally well with half its state lost. So this model is made to end its turn early, and the correct answer
to every problem is the response that it then gives most often, a single byte that is no character.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import warm
from held_runs import Hold
from progress import STALL_S, marked, wait_until
from safetensors.torch import load_file, save_file
from tiny_models import EOS, tiny_llama

FAVOURITE = "�"
STEPS, EVERY = 6, 3


def write_model(folder: Path, **options: Any) -> Path:
    """A tiny Llama that ends its turn early."""
    tiny_llama(folder, **options)
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    embedding *= 0.3
    embedding[EOS] *= 20.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_problems(file: Path, questions: list[str]) -> Path:
    """Rows in the verl schema, all with the same answer."""
    rows = [
        {
            "data_source": "reasoning_gym/chain_sum",
            "prompt": [{"role": "user", "content": question}],
            "reward_model": {"ground_truth": FAVOURITE, "style": "rule"},
        }
        for question in questions
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_config(folder: Path, model: Path) -> Path:
    """A run that has every kind of state: momenta, a schedule, a warm-up, a reference policy, several epochs of data.

    The problems are 12 to train on, of which 2 are held out, and 8 to be judged by, of which 2 repeat others.
    """
    train = write_problems(folder / "practice.jsonl", [f"Question {n}?" for n in range(12)])
    held_out = write_problems(folder / "exam.jsonl", [f"Question {n}?" for n in (10, 11, 12, 13, 14, 15, 12, 15)])
    config = {
        "name": "small",
        "model": {"path": str(model), "dtype": "fp32"},
        "layout": {"max_tokens_per_microbatch": 400, "distributed_timeout_s": 600},
        "data": {
            "train": [{"path": str(train)}],
            "eval": [{"path": str(held_out)}],
            "prompts_per_step": 4,
            "max_prompt_tokens": 100,
        },
        "rollout": {"samples_per_prompt": 8, "max_new_tokens": 5, "deadline_s": 60},
        "reward": {"deadline_s": 30},  # a busy machine must not make a verdict differ between two runs
        "algorithm": {"mini_batches": 2, "kl": {"coefficient": 0.01}},
        "clipo": {"warmup_steps": 2, "dim": 32, "head": "mlp"},
        "optimizer": {"learning_rate": 1.0e-3, "warmup_steps": 3, "schedule": "cosine"},
        "train": {"steps": STEPS},
        "checkpoint": {"every": EVERY},
        "eval": {"every": EVERY},
    }
    file = folder / "small.yaml"
    file.write_text(json.dumps(config))
    return file


class SmallRun:
    """One `clipo train`, or another command, and everything it starts, known by a mark in their environment.

    What it prints goes to a file in `logs`, or beside the output. Its processes are forks of one that has imported the
    trainer (see `warm`); a `cold` run is started as a user starts it, and cannot be held.
    """

    def __init__(
        self,
        config: Path,
        output: Path,
        *overrides: str,
        command: str = "train",
        logs: Path | None = None,
        cold: bool = False,
        hold: Hold | None = None,
    ):
        self.output, self.mark = output, uuid.uuid4().hex
        self.log = (logs or output.parent) / f"{output.name}.{self.mark[:6]}.log"
        environment = {
            **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
            "CLIPO_TEST_RUN": self.mark,
            **warm.ONE_THREAD,
            **(hold.environment if hold else {}),
        }
        self._hold = hold
        words = [command, str(config), f"train.output={output}", *overrides]
        self.log.touch()
        if not cold:
            self.process = warm.Command(words, env=environment, log=self.log)
            return
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *warm.MODULE, *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """What it printed so far."""
        return self.log.read_text()

    def pids(self) -> list[int]:
        """Its living processes: supervisor, ranks, graders, checkpoint writers."""
        found = []
        for pid in marked(self.mark):
            with contextlib.suppress(OSError):
                name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
                # torch's keeper of shared memory stays as long as a server has some of it open.
                if rest.split()[0] != "Z" and name != "torch_shm_manag":
                    found.append(pid)
        return found

    def kill(self, known: Sequence[int] = ()) -> None:
        """Send SIGKILL to every process: first to those already `known`, since finding the others takes a while."""
        for pids in (known, self.pids):
            for pid in pids() if callable(pids) else pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()
        wait_until(lambda: not self.pids(), "the killed processes to be gone")

    def wait(self, code: int = 0) -> SmallRun:
        """Wait for its end, with this exit code; nothing of it stays alive."""
        self._poll(lambda: self.process.poll() is not None, "the end of the run")
        assert self.process.returncode == code, self.said
        wait_until(lambda: not self.pids(), "its processes to be gone")
        return self

    def wait_for(self, condition: Callable[[], bool], what: str, stall_s: float = STALL_S) -> None:
        """Poll quickly for something that happens while it runs."""

        def reached() -> bool:
            if condition():
                return True
            assert self.process.poll() is None, f"it ended before {what}:\n{self.said}"
            return False

        self._poll(reached, what, stall_s)

    def wait_for_hold(self) -> None:
        """Wait until it stands still where it is to be held."""
        self.wait_for(self._hold.reached, "the moment at which the run is held")

    def _poll(self, condition: Callable[[], bool], what: str, stall_s: float = STALL_S) -> None:
        try:
            wait_until(condition, what, self.pids, stall_s=stall_s, story=lambda: self.said)
        except BaseException:
            self.kill()
            raise


@contextlib.contextmanager
def once(place: Path) -> Iterator[bool]:
    """Tell the first process of a session that asks to make `place`; others wait until it is made."""
    done = place.with_name(f"{place.name}.done")
    with place.with_name(f"{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not done.exists()
        done.touch()


def undisturbed_run(config: Path, name: str, *overrides: str, cold: bool = False) -> Path:
    """The output folder, beside `config`, of a run that nothing happens to; a session runs it once by its name."""
    output = config.with_name(name)
    with once(output) as missing:
        if missing:
            SmallRun(config, output, *overrides, cold=cold).wait()
    return output


def steps_logged(output: Path) -> int:
    file = output / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def metrics(output: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what clocks say."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if not name.startswith(("time/", "speed/"))} for line in lines]


def checkpoint_state(output: Path, step: int) -> dict[str, Any]:
    """Everything a checkpoint holds, as tensors and values by name."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    folder = output / "checkpoints" / f"step_{step:06d}"
    models = [name for name in ("policy", "critic") if (folder / name).is_dir()]
    with warnings.catch_warnings(action="ignore"):  # it warns that there is no process group
        states = {name: _load_state_dict_from_keys(storage_reader=FileSystemReader(folder / name)) for name in models}
    flat: dict[str, Any] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                collect(f"{name}.{key}", item)
        elif isinstance(value, torch.Tensor):
            flat[name] = value

    for name, state in states.items():
        collect(name, state)
    for file in sorted(folder.glob("*.safetensors")):
        flat |= {f"{file.name}/{name}": tensor for name, tensor in load_file(file).items()}
    for file in sorted(folder.glob("*.json")):
        if file.name != "manifest.json":
            flat[file.name] = json.loads(file.read_text())
    return flat


def assert_same_state(mine: dict[str, Any], other: dict[str, Any]) -> None:
    """Assert that two results of `checkpoint_state` are equal to the bit."""
    assert mine.keys() == other.keys()
    differing = [
        name
        for name, value in mine.items()
        if not (torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name])
    ]
    assert differing == []


def halfway(undisturbed: Path, output: Path) -> Path:
    """A copy of a run as it was after half of its steps."""
    shutil.copytree(undisturbed, output)
    shutil.rmtree(output / "checkpoints" / f"step_{STEPS:06d}")
    return output


def assert_nearly_same_metrics(output: Path, undisturbed: Path, names: Sequence[str]) -> None:
    """The same metrics, and these to 1e-5 in every step that has them, as on another layout."""
    far = {}
    for mine, theirs in zip(metrics(output), metrics(undisturbed), strict=True):
        assert mine.keys() == theirs.keys()
        far |= {(mine["step"], name): abs(mine[name] - theirs[name]) for name in names if name in mine}
    assert {key: distance for key, distance in far.items() if not distance < 1e-5} == {}


def assert_same_run(output: Path, undisturbed: Path, step: int = STEPS) -> None:
    """Equal metrics, evaluations and state at the end, to the bit."""
    assert metrics(output) == metrics(undisturbed)
    for file in sorted((undisturbed / "eval").iterdir()):
        assert json.loads((output / "eval" / file.name).read_text()) == json.loads(file.read_text())
    assert_same_state(checkpoint_state(output, step), checkpoint_state(undisturbed, step))
