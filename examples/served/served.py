"""The quickstart with its generation on an SGLang server: set up, serve, train, stop.

    python examples/served/served.py [key=value ...]     (what `make quickstart-sglang` runs)

Overrides are those of `clipo train` and go to both sides. Ctrl-C saves a checkpoint and stops the server; the same
command goes on from it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from clipo_megatron.cli.main import main as clipo
from clipo_megatron.runtime.launch import dies_with_this_process
from clipo_megatron.runtime.stop_requests import SIGNALS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent / "quickstart"))

from arithmetic import write_problems  # noqa: E402
from smollm2 import fetch  # noqa: E402

GRACE_PERIOD_S = 30.0  # for the servers to end


def main() -> int:
    """Serve and train; returns the exit code of the training, or of the server if it ended first."""
    model, output = ROOT / "models" / "SmolLM2-135M-Instruct", ROOT / "runs" / "served"
    fetch(model)
    train, held_out = write_problems(output / "data", held_out=64, seed=0)
    arguments = [
        str(HERE / "served.yaml"),
        f"model.path={model}",
        f"data.train=[{{path: '{train}'}}]",
        f"data.eval=[{{path: '{held_out}'}}]",
        f"train.output={output}",
        *sys.argv[1:],
    ]
    if (wrong := clipo(["train", *arguments, "--check"])) != 0:  # before a server is started for nothing
        return wrong
    serving = start("serve", arguments)
    try:
        return train_while_served(serving, arguments)
    finally:
        serving.terminate()
        try:
            serving.wait(GRACE_PERIOD_S)
        except subprocess.TimeoutExpired:
            serving.kill()


def start(command: str, arguments: list[str]) -> subprocess.Popen[bytes]:
    """Start a `clipo` command that Ctrl-C does not reach: the server has to outlive the trainer's last step."""
    return subprocess.Popen(
        [sys.executable, "-m", "clipo_megatron.cli", command, *arguments],
        process_group=0,
        preexec_fn=dies_with_this_process(),
    )


def train_while_served(serving: subprocess.Popen[bytes], arguments: list[str]) -> int:
    """Train once a server is ready, pass signals on to the trainer, and return the exit code."""
    from clipo_megatron.rollout.servers.registry import Registry, Status
    from clipo_megatron.runtime.run_dir import SERVERS

    signals: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda number, _frame: signals.append(number))
    output = next(word.partition("=")[2] for word in reversed(arguments) if word.startswith("train.output="))
    registry = Registry(Path(output) / SERVERS)
    begun = time.time()
    while not any(each.status is Status.ready and each.updated_at > begun for each in registry.records()):
        if signals or serving.poll() is not None:  # setting up may take minutes; `clipo serve` reports it
            return 128 + signals[0] if signals else serving.returncode
        time.sleep(0.2)
    training, handed_on = start("train", arguments), 0
    while training.poll() is None:
        if len(signals) > handed_on:
            training.send_signal(signals[handed_on])
            handed_on += 1
        if serving.poll() is not None:
            print("The servers ended, and so does the training.", file=sys.stderr)
            training.terminate()
            training.wait()
            return serving.returncode or 1
        time.sleep(0.2)
    return training.returncode if training.returncode >= 0 else 128 - training.returncode


if __name__ == "__main__":
    sys.exit(main())
