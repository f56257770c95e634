"""The script of a job, run without a cluster: how it reacts to signals, exit codes and missing nodes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess

import pytest
from progress import wait_until

from clipo_megatron.slurm.resources import Resources
from clipo_megatron.slurm.submit import submit

FAKES = {
    "scontrol": """#!/bin/bash
case "$*" in
  "show hostnames"*) echo n1; echo n2 ;;
  "--oneliner show node"*) echo "NodeName=${*: -1} NodeAddr=10.0.0.${*: -1:1} x" ;;
  requeue*) echo "requeue $2" >> "$FAKE/calls"; kill -TERM $PPID; (sleep 1; kill -KILL $PPID) >/dev/null 2>&1 & ;;
esac
""",
    "squeue": "#!/bin/sh\necho RUNNING\n",
    # the first step looks at the nodes, as each of them; later ones are the ranks, whose ends stand in a file
    "srun": """#!/bin/bash
if [[ " $* " == *" look "* ]]; then
    while [[ $1 != bash ]]; do shift; done
    for SLURMD_NODENAME in n1 n2; do
        export SLURMD_NODENAME place=$5
        [[ $SLURMD_NODENAME == "$MISSING" ]] && place=/nowhere
        "${@:1:4}" "$place" "${@:6}"
    done
    exit 0
fi
echo "ranks" >> "$FAKE/calls"
end=$(head -n 1 "$FAKE/ends"); sed -i 1d "$FAKE/ends"
trap 'save; exit 138' USR1
save() { mkdir -p "$OUT/checkpoints/step_000099"; }
case $end in
  wait) touch "$FAKE/waiting"; while :; do sleep 0.05; done ;;
  +*) mkdir -p "$OUT/checkpoints/step_$(date +%N)"; exit "${end#+}" ;;
  *) exit "$end" ;;
esac
""",
}


@pytest.fixture
def attempt(config_file, tmp_path, slurm):
    """Runs the script of a job with programs in the place of Slurm's; each rank step ends as the list says."""
    for name, text in FAKES.items():
        slurm(name, text)

    def start(*ends, restart=0, missing="", **resources):
        asked = Resources(**{"nodes": 2, **resources})
        job = submit(config_file, [f"train.output={tmp_path / 'run'}"], asked, dry_run=True)
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "logs").mkdir(exist_ok=True)
        script = job.script.replace("    sleep 2\n", "").replace("        sleep 1\n", "        sleep 0.05\n")
        (job.folder / "job.sbatch").write_text(script)
        (tmp_path / "ends").write_text("".join(f"{end}\n" for end in ends))
        environment = {
            **os.environ, "FAKE": str(tmp_path), "OUT": str(tmp_path / "run"), "SLURM_JOB_ID": "7", "MISSING": missing,
            "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_RESTART_COUNT": str(restart),
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", str(job.folder / "job.sbatch")], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def calls() -> list[str]:
        file = tmp_path / "calls"
        return file.read_text().splitlines() if file.exists() else []

    start.calls = calls
    start.waiting = tmp_path / "waiting"
    yield start


def end_of(process):
    try:
        output, _ = process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


@pytest.mark.parametrize(
    ("ends", "code", "steps"),
    [
        (["0"], 0, 1),
        (["1", "137", "0"], 0, 3),  # two failures, then well
        (["1", "1", "1", "1", "0"], 1, 4),  # the fourth in a row is one too many
        (["1", "1", "+1", "1", "1", "0"], 0, 6),  # a checkpoint between them counts anew
        (["2", "0"], 2, 1),  # a user's error is not tried again
        (["+2", "0"], 0, 2),  # unless there was progress
        (["130", "0"], 130, 1),  # SIGINT ends it for good
    ],
)
def test_failures_are_restarted_a_limited_number_of_times(attempt, ends, code, steps):
    found, output = end_of(attempt(*ends))
    assert (found, attempt.calls().count("ranks")) == (code, steps), output
    assert not any(call.startswith("requeue") for call in attempt.calls())


@pytest.mark.parametrize("end", ["138", "143"])
def test_ranks_that_were_asked_to_stop_requeue_the_job(attempt, end):
    code, output = end_of(attempt(end, "0"))
    assert attempt.calls() == ["ranks", "requeue 7"], output
    assert code == -signal.SIGKILL, "a script that ends by itself while its job is requeued can make it a failed one"


def test_the_number_of_requeues_is_limited(attempt):
    code, output = end_of(attempt("138", restart=5, requeues=5))
    assert (code, attempt.calls()) == (1, ["ranks"]), output
    assert "has been requeued 5 times, as often as it may; submit it again" in output


def test_the_signal_before_the_walltime_reaches_the_ranks(attempt):
    process = attempt("wait")
    wait_until(attempt.waiting.exists, "the ranks to wait")
    process.send_signal(signal.SIGUSR1)
    _, output = end_of(process)
    assert attempt.calls() == ["ranks", "requeue 7"], output
    assert "the newest checkpoint is step_000099" in output


def test_a_node_that_does_not_see_the_files_ends_the_job(attempt):
    code, output = end_of(attempt("0", missing="n2"))
    assert (code, attempt.calls()) == (2, []), output
    assert "these nodes cannot work for this job: n2. Put train.output" in output


def test_secrets_stay_out_of_the_recorded_environment(attempt, monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "GH_PAT", "PGPASS", "https_proxy", "SLURM_JWT", "OF_SOME_SITE"):
        monkeypatch.setenv(name, "hush\nhush, too")
    monkeypatch.setenv("NCCL_DEBUG", "heard\nin one line")
    end_of(attempt("0"))
    file = tmp_path / "run" / "jobs" / "001" / "environment.0.txt"
    recorded = file.read_text()
    assert "hush" not in recorded and "\nNCCL_DEBUG=$'heard\\nin one line'\n" in recorded
    assert file.stat().st_mode & 0o777 == 0o600
