"""`clipo submit` without a cluster: the files it writes, the jobs it refuses, and how scripts react to signals."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from model_folders import whole_folder
from paths import ROOT

from clipo_megatron.cli import main as cli
from clipo_megatron.config.errors import ConfigError
from clipo_megatron.config.load import load
from clipo_megatron.slurm import folder as folders
from clipo_megatron.slurm.resources import JobKind, Resources, SlurmError, shared_paths, walltime_s
from clipo_megatron.slurm.script import TEMPLATES, template_of
from clipo_megatron.slurm.submit import submit

PATIENT = "layout.distributed_timeout_s=2700"
SERVED = ("rollout.engine=sglang", PATIENT)
SBATCH = """\
#!/bin/sh
printf '%s\\n' "$@" > {seen}
echo {answer}
exit {code}
"""


def dry(config_file, *overrides, kind=JobKind.train, target=None, anyway=False, **resources):
    asked = Resources(**{"nodes": 2, **resources})
    return submit(config_file, overrides, asked, kind=kind, target=target, anyway=anyway, dry_run=True)


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def setting(script: str, name: str) -> str:
    """The value of a variable, as the shell reads it."""
    lines = script[: script.index("# What the scripts of a job share")]
    show = f'{lines}\nprintf "%s\\n" "${{{name}[@]}}"'
    return subprocess.run(["bash", "-c", show], capture_output=True, text=True, check=True).stdout.strip()


# ---------------------------------------------------------------- scripts


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ((), {}),
        (SERVED, {"server_nodes": 1}),
        ((), {"kind": JobKind.evaluation}),
        ((), {"kind": JobKind.to_megatron, "target": Path("somewhere")}),
    ],
    ids=["colocated", "disaggregated", "evaluation", "conversion"],
)
def test_every_template_becomes_a_script_that_the_shell_can_read(config_file, overrides, options):
    script = dry(config_file, *overrides, **options).script
    assert "#@" not in script
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert checked.stderr == ""
    # every directive before the first command, or sbatch would not read it
    lines = [line for line in script.splitlines() if line]
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in lines[first:])
    assert lines[0] == "#!/bin/bash"


def test_resources_become_options_of_sbatch(config_file):
    asked = {
        "nodes": 3, "ranks_per_node": 2, "cpus_per_rank": 5, "time": "1-00:00:00", "partition": "gpu",
        "account": "me", "options": ("--qos=high",), "stop_before_s": 600,
    }  # fmt: skip
    script = dry(config_file, "name=a b/c".replace("/", "-"), "data.prompts_per_step=12", **asked).script
    found = directives(script)
    for expected in (
        "--requeue", "--open-mode=append", "--job-name=a-b-c", "--nodes=3", "--ntasks-per-node=2", "--cpus-per-task=5",
        "--signal=B:USR1@600", "--time=1-00:00:00", "--partition=gpu", "--account=me", "--qos=high",
    ):  # fmt: skip
        assert expected in found
    assert (setting(script, "RANKS"), setting(script, "RANKS_PER_NODE")) == ("6", "2")


def test_trainer_and_servers_are_two_groups_of_one_job(config_file):
    job = dry(config_file, *SERVED, "layout.pp=2", nodes=2, server_nodes=3, time="60")
    found = directives(job.script)
    split = found.index("hetjob")
    assert "--nodes=2" in found[:split] and "--nodes=3" in found[split:]
    assert "--requeue" in found[:split] and "--requeue" in found[split:]
    assert "--time=60" in found[:split] and "--time=60" in found[split:]
    assert setting(job.script, "GROUPS_OF_NODES").splitlines()[1] == "--het-group=1 --nodes=3"
    assert setting(job.script, "ENGINE") == "sglang"
    assert 'export CLIPO_API_KEY=$(cat "$JOB/key")' in job.script


def test_a_container_gets_the_folders_that_the_configuration_names(config_file):
    script = dry(config_file, container="docker://image", mounts=("/data:/data",)).script
    image, mounts = setting(script, "CONTAINER").splitlines()
    assert image == "--container-image=docker://image"
    inside = mounts.removeprefix("--container-mounts=").split(",")
    assert f"{config_file.parent}:{config_file.parent}" in inside and "/data:/data" in inside
    assert setting(script, "CLIPO").splitlines()[-3:] == ["python3", "-m", "clipo_megatron.cli"]
    assert '"${CONTAINER[@]}"' in script


def test_setup_and_odd_names_reach_the_shell_whole(config_file, tmp_path):
    output = tmp_path / "it's a $(folder)"
    script = dry(config_file, f"train.output={json.dumps(str(output))}", setup="module load x\nexport Y=1").script
    assert setting(script, "OUTPUT") == str(output)
    assert setting(script, "JOB") == str(output / "jobs" / "001")
    assert "\nmodule load x\nexport Y=1\n" in script


@pytest.mark.parametrize(
    ("override", "resources"),
    [
        ("train.output='runs/a\\nscancel 1'", {}),
        ("name='a\\n#SBATCH --wrap=x'", {}),
        ("", {"partition": "x\nrm -r /"}),
        ("", {"account": "x\r#SBATCH --x"}),
    ],
)
def test_no_value_becomes_a_line_of_the_script(config_file, override, resources):
    overrides = [override.replace("'", '"')] if override else []
    with pytest.raises((ConfigError, SlurmError), match="control character"):
        dry(config_file, *overrides, **resources)


def test_conversions_take_their_layout_from_the_configuration(config_file, tmp_path):
    job = {"nodes": 2, "ranks_per_node": 4, "cpus_per_rank": 2, "kind": JobKind.to_megatron, "target": tmp_path / "out"}
    script = dry(config_file, "layout.tp=2", "layout.pp=2", **job).script
    found = directives(script)
    assert "--nodes=1" in found and "--ntasks-per-node=1" in found and "--cpus-per-task=8" in found
    arguments = setting(script, "CONVERSION").splitlines()
    assert arguments == [
        "to-megatron",
        str(config_file.parent / "model"),
        str(tmp_path / "out"),
        "--tp=2",
        "--pp=2",
        "--ep=1",
    ]
    with pytest.raises(SlurmError, match="--target FOLDER"):
        dry(config_file, kind=JobKind.to_megatron)
    with pytest.raises(SlurmError, match="no checkpoint to convert"):
        dry(config_file, f"train.output={tmp_path}", kind=JobKind.to_hf, target=tmp_path / "out")
    for step in (3, 12):
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    script = dry(config_file, f"train.output={tmp_path}", kind=JobKind.to_hf, target=tmp_path / "out").script
    assert setting(script, "CONVERSION").splitlines()[1] == str(tmp_path / "checkpoints" / "step_000012")


def test_every_template_is_used():
    used = {template_of(kind, Resources(nodes=1, server_nodes=servers)) for kind in JobKind for servers in (0, 1)}
    assert used | {"functions.sh"} == {path.name for path in TEMPLATES.iterdir()}


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "resources", "message"),
    [
        ((), {"nodes": 0}, r"--nodes 0: it must be at least 1"),
        ((), {"time": "5:00", "stop_before_s": 300}, r"--time 5:00 is 300 s, .* never do a step.*--stop-before"),
        ((), {"time": "soon"}, r"--time soon: it takes minutes, H:MM:SS"),
        ((), {"ranks_per_node": 3, "gpus_per_node": 2}, r"--ranks-per-node 3 on --gpus-per-node 2: each rank needs"),
        ((), {"mounts": ("/a:/a",)}, r"--mount /a:/a: .*--container"),
        ((), {"mounts": ("/a:b",), "container": "i"}, r"--mount /a:b: .*the whole path inside"),
        ((), {"options": ("--nodes=4",)}, r"--nodes=4: the job's script relies on another --nodes. Give --nodes"),
        ((), {"options": ("-N4",)}, r"relies on another -N"),
        ((), {"options": ("--array=1-4",)}, r"A run is one job"),
        ((), {"options": ("--no-requeue",)}, r"Give --requeues 0"),
        ((), {"options": ("qos",)}, r"--sbatch qos: it takes an option"),
        ((), {"server_nodes": 1}, r"--server-nodes is 1, and rollout.engine = local generates"),
        (SERVED, {"gpus_per_node": 1}, r"same GPUs at the same time.*--server-nodes"),
        ((*SERVED, "serve.tp=4"), {"gpus_per_node": 2, "server_nodes": 1}, r"serve.servers x serve.tp = 1 x 4"),
        (("layout.pp=2",), {"gpus_per_node": 1, "hardware": "abacus"}, r"hardware 'abacus' is not in the table"),
    ],
)  # fmt: skip
def test_impossible_jobs_are_refused_before_anything_is_queued(config_file, overrides, resources, message):
    hardware = {"hardware": resources.pop("hardware")} if "hardware" in resources else {}
    with pytest.raises((SlurmError, ValueError), match=message):
        submit(config_file, overrides, Resources(**{"nodes": 2, **resources}), dry_run=True, **hardware)


def test_the_number_of_ranks_must_suit_the_layout(config_file):
    with pytest.raises(ConfigError, match=r"3 ranks were started, which tp \* pp = 1 \* 2"):
        dry(config_file, "layout.pp=2", nodes=3)
    with pytest.raises(
        ConfigError, match=r"3 ranks were started, which tp \* cp \* pp = 1 \* 2 \* 1 = 2 does not divide"
    ):
        dry(config_file, "layout.cp=2", nodes=3)
    with pytest.raises(ConfigError, match=r"layout.dp = 4"):
        dry(config_file, "layout.dp=4", nodes=2)


def test_a_layout_that_does_not_fit_by_the_plan_is_refused_without_anyway(config_file, tmp_path):
    """A model of 70 B parameters, all zero and without bytes on the disk, on two GPUs."""
    facts = json.loads((config_file.parent / "model" / "config.json").read_text())
    facts |= {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    facts |= {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 128}
    folder = whole_folder(tmp_path / "large", facts)
    with pytest.raises(SlurmError, match=r"does not fit by the plan: stage 0 .* GB of .*--anyway"):
        dry(config_file, f"model.path={folder}", gpus_per_node=1)
    (remark,) = dry(config_file, f"model.path={folder}", gpus_per_node=1, anyway=True).remarks
    assert "is submitted anyway" in remark
    (remark,) = dry(config_file, gpus_per_node=1).remarks
    assert remark.startswith("fits: ") and "s per step" in remark


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-12", 129_600), ("1-00:30", 88_200), ("UNLIMITED", None)],
)
def test_time_limits_are_read_as_slurm_reads_them(text, seconds):
    assert walltime_s(text) == seconds


def test_no_folder_is_mounted_twice(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "file").touch()
    assert shared_paths(tmp_path / "a" / "b", tmp_path / "a" / "file", None) == [str(tmp_path / "a")]


# ---------------------------------------------------------------- the folder


def test_the_folder_of_a_job(config_file, tmp_path, slurm, monkeypatch, capsys):
    slurm("sbatch", SBATCH.format(seen=tmp_path / "seen", answer="4711", code=0))
    slurm("scontrol", "#!/bin/sh\necho JobId=4711 JobState=COMPLETED Reason=None\n")
    output, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    # the prompt is text, and would be the secret if the nodes read ${...} in it
    overrides = ["train.output=../run", *SERVED, "clipo.weight=0.3", "model.system_prompt='\\${oc.env:HOME}'"]
    assert cli.main(["submit", str(config_file), *overrides, "--nodes", "2", "--server-nodes", "3"]) == 0
    shown = capsys.readouterr().out
    folder = output / "jobs" / "001"
    assert "job 4711: 2 ranks on 2 nodes, and 3 nodes of servers" in shown and str(folder / "job.log") in shown
    assert (tmp_path / "seen").read_text().splitlines() == ["--parsable", str(folder / "job.sbatch")]
    facts = json.loads((folder / "submission.json").read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    assert facts["job"] == "4711" and facts["kind"] == "train" and facts["overrides"] == overrides
    assert facts["commit"].get("hash", "") == head.strip()
    assert facts["resources"] == json.loads(json.dumps(asdict(Resources(nodes=2, server_nodes=3))))
    assert "torch==" in (folder / "packages.txt").read_text()
    key = folder / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and len(key.read_text()) >= 40
    # what the nodes read is what was meant, from wherever they read it
    resolved = load(folder / "config.yaml")
    meant = load(config_file, overrides)
    assert (resolved.train.output, resolved.rollout.servers, resolved.clipo.weight) == (str(output), 3, 0.3)
    assert resolved == folders.resolve(meant, Resources(nodes=2, server_nodes=3))
    assert resolved.faults.grace_period_s == 120  # of the 240 that are left when the ranks are asked to end
    rollout = replace(resolved.rollout, servers=meant.rollout.servers)
    back = replace(resolved, train=meant.train, rollout=rollout, faults=meant.faults)
    assert back == meant
    # a finished job is no hindrance to the next
    assert cli.main(["submit", str(config_file), *overrides, "--nodes", "2", "--server-nodes", "3"]) == 0
    assert (output / "jobs" / "002" / "job.sbatch").is_file()


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING"])
def test_a_second_job_for_one_output_is_refused(config_file, tmp_path, slurm, state):
    slurm("sbatch", SBATCH.format(seen=tmp_path / "seen", answer="12", code=0))
    slurm("scontrol", f"#!/bin/sh\necho JobId=12 JobState={state}\n")
    overrides = [f"train.output={tmp_path / 'run'}"]
    submit(config_file, overrides, Resources(nodes=2))
    with pytest.raises(SlurmError, match=r"job 12 trains into .*scancel 12"):
        submit(config_file, overrides, Resources(nodes=2))
    assert not (tmp_path / "run" / "jobs" / "002").exists()


def test_a_refusal_by_sbatch_is_reported(config_file, tmp_path, slurm):
    slurm("sbatch", "#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n")
    with pytest.raises(SlurmError, match=r"sbatch refuses .*invalid partition specified: x.*--partition"):
        submit(config_file, [f"train.output={tmp_path / 'run'}"], Resources(nodes=2, partition="x"))


def test_without_slurm_only_a_dry_run_works(config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["submit", str(config_file), f"train.output={tmp_path / 'run'}", "--nodes", "2"]
    assert cli.main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("#!/bin/bash\n") and shown.endswith("memory was not checked against the plan\n")
    assert "# 2 ranks on 2 nodes; nothing was submitted\n" in shown
    assert cli.main(arguments) == 2
    assert "there is no sbatch here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_imports_no_torch():
    script = "import sys, clipo_megatron.cli.submit as c; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
