"""`clipo submit` as a site would use it: whole nodes, shares of nodes, types of GPUs, relative paths, containers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipo_megatron.cli import main as cli
from clipo_megatron.cli.main import parse
from clipo_megatron.cli.submit import hardware_of, resources_of
from clipo_megatron.config.load import load
from clipo_megatron.slurm import folder as folders
from clipo_megatron.slurm.container import checkout, environment_folders
from clipo_megatron.slurm.nodes import NodeFacts, fitted, gpus_of, node_facts
from clipo_megatron.slurm.resources import JobKind, Resources, SlurmError
from clipo_megatron.slurm.script import TEMPLATES
from clipo_megatron.slurm.submit import submit

SERVED = ("rollout.engine=sglang", "layout.distributed_timeout_s=2700")


def dry(config_file, *overrides, kind=JobKind.train, **resources):
    enough = ("data.prompts_per_step=16", *overrides)  # for every replica of these nodes
    return submit(config_file, enough, Resources(**{"nodes": 2, **resources}), kind=kind, anyway=True, dry_run=True)


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def setting(script: str, name: str) -> list[str]:
    """The values of a variable, as the shell reads them."""
    lines = script[: script.index("# What the scripts of a job share")]
    show = f'{lines}\nprintf "%s\\n" "${{{name}[@]}}"'
    done = subprocess.run(["bash", "-c", show], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def asked(config_file: Path, *words: str) -> Resources:
    """The resources that a command line asks for."""
    options = parse(["submit", str(config_file), "--nodes", "2", *words])
    return resources_of(options, options.nodes, options.server_nodes)


# ---------------------------------------------------------------- how much of a node


def test_by_default_a_job_gets_whole_nodes_and_all_their_memory(config_file):
    found = directives(dry(config_file, gpus_per_node=8, ranks_per_node=8, nodes=1).script)
    assert "--exclusive" in found and "--mem=0" in found
    assert not any(option.startswith("--cpus-per-task") for option in found)
    groups = directives(dry(config_file, *SERVED, server_nodes=1).script)
    assert groups.count("--exclusive") == groups.count("--mem=0") == 2, "trainers' nodes and servers'"


@pytest.mark.parametrize(
    ("resources", "present", "absent"),
    [
        ({"cpus_per_rank": 4}, ["--cpus-per-task=4", "--mem=0"], ["--exclusive"]),
        ({"memory": "200G"}, ["--exclusive", "--mem=200G"], ["--mem=0"]),
        ({"options": ("--mem-per-cpu=4G",)}, ["--exclusive", "--mem-per-cpu=4G"], ["--mem=0"]),
        ({"options": ("--exclusive=user",)}, ["--exclusive=user", "--mem=0"], ["--exclusive"]),
        ({"options": ("-c 6",)}, ["-c 6", "--mem=0"], ["--exclusive"]),
        ({"options": ("--oversubscribe",)}, ["--oversubscribe"], ["--exclusive"]),
    ],
)
def test_what_a_user_asks_of_slurm_is_not_chosen_again(config_file, resources, present, absent):
    found = directives(dry(config_file, **resources).script)
    assert set(present) <= set(found) and not set(absent) & set(found)


def divided(script: str, **environment: str) -> dict[str, int]:
    """How the job's script divides the cores that Slurm says it has."""
    functions = (TEMPLATES / "functions.sh").read_text()
    head = script[: script.index("# What the scripts of a job share")]
    show = f"{head}\n{functions}\ndivide_cores\necho $CPUS_PER_RANK $SERVER_CPUS"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(["bash", "-c", show], env=kept | environment, capture_output=True, text=True, check=True)
    ranks, servers = map(int, done.stdout.split())
    return {"rank": ranks, "servers": servers}


@pytest.mark.parametrize(
    ("resources", "environment", "rank", "servers"),
    [
        ({"ranks_per_node": 8}, {"SLURM_JOB_CPUS_PER_NODE": "96(x2)"}, 12, 96),
        ({"ranks_per_node": 8}, {"SLURM_JOB_CPUS_PER_NODE": "96,64(x3)"}, 8, 64),
        ({"ranks_per_node": 8, "cpus_per_rank": 4}, {"SLURM_JOB_CPUS_PER_NODE": "96(x2)"}, 4, 96),
        ({"ranks_per_node": 8}, {"SLURM_JOB_CPUS_PER_NODE": "4(x2)"}, 1, 4),
        (
            {"ranks_per_node": 4, "server_nodes": 1},
            {"SLURM_JOB_CPUS_PER_NODE_HET_GROUP_0": "64(x2)", "SLURM_JOB_CPUS_PER_NODE_HET_GROUP_1": "128"},
            16,
            128,
        ),
    ],
)
def test_cores_go_to_the_ranks_and_to_the_servers(config_file, resources, environment, rank, servers):
    script = dry(config_file, *SERVED, "data.prompts_per_step=16", "layout.tp=1", **resources).script
    assert divided(script, **environment) == {"rank": rank, "servers": servers}


@pytest.mark.parametrize(
    ("sinfo", "partition", "facts"),
    [
        ("96|1000000|gpu:h100:8(S:0-1)|gpu*", "", NodeFacts(96, 1_000_000, 8)),
        ("96+|1000000+|gpu:8,nvme:2|gpu*", "", NodeFacts(96, 1_000_000, 8)),
        ("64|256000|gpu:a100:4,gpu:v100:2|a", "a", NodeFacts(64, 256_000, 6)),
        ("64|256000|(null)|cpu*\n96|512000|gpu:4|gpu", "", NodeFacts(64, 256_000, 0)),
        ("64|256000|gpu:4|all\n96|128000|gpu:8|all\n8|1000|(null)|all", "all", NodeFacts(64, 128_000, 4)),
        ("", "", None),
        ("sinfo: no such partition", "x", None),
    ],
)
def test_what_nodes_have_is_read_from_slurm(slurm, sinfo, partition, facts):
    slurm("sinfo", f"#!/bin/sh\ncat <<'END'\n{sinfo}\nEND\n")
    assert node_facts(partition, "") == facts


def test_of_several_types_of_gpu_those_asked_for_count(slurm):
    slurm("sinfo", "#!/bin/sh\necho '64|256000|gpu:A100:4,gpu:v100:2|a'\necho '32|64000|gpu:v100:8|a'\n")
    assert node_facts("a", "a100") == NodeFacts(64, 256_000, 4)
    slurm("sinfo", "#!/bin/sh\nexit 1\n")
    assert node_facts("a", "a100") is None


def test_some_of_a_nodes_gpus_come_with_their_share_of_the_node(config_file, slurm):
    """Two of eight GPUs: a quarter of the cores and of the memory, and the node is shared."""
    slurm("sinfo", "#!/bin/sh\necho '96|1000000|gpu:h100:8|gpu*'\n")
    found = directives(dry(config_file, gpus_per_node=2, nodes=1).script)
    assert "--cpus-per-task=12" in found and "--mem=250000M" in found and "--exclusive" not in found
    found = directives(dry(config_file, gpus_per_node=8, nodes=1).script)
    assert "--exclusive" in found and "--mem=0" in found
    asked_for = Resources(nodes=1, gpus_per_node=2, cpus_per_rank=3, memory="50G")
    assert fitted(asked_for, NodeFacts(96, 1_000_000, 8)) == asked_for


# ---------------------------------------------------------------- options as Slurm spells them


@pytest.mark.parametrize(
    ("text", "gpus", "kind"),
    [("8", 8, ""), ("h100:8", 8, "h100"), ("gpu:a100:4", 4, "a100"), ("0", 0, ""), ("a100_80gb:2", 2, "a100_80gb")],
)
def test_gpus_may_have_a_type(config_file, text, gpus, kind):
    assert gpus_of(text) == (gpus, kind)
    resources = asked(config_file, "--gpus-per-node", text)
    assert (resources.gpus_per_node, resources.gpu_type) == (gpus, kind)
    if gpus:
        found = directives(dry(config_file, gpus_per_node=gpus, gpu_type=kind, nodes=1).script)
        assert f"--gpus-per-node={f'{kind}:' if kind else ''}{gpus}" in found


@pytest.mark.parametrize("text", ["many", "h100", "h100:", "8:h100", "a:b:c:8", "-1"])
def test_other_spellings_of_gpus_are_refused_by_value(text, config_file, capsys):
    assert cli.main(["submit", str(config_file), "--nodes", "1", f"--gpus-per-node={text}", "--dry-run"]) == 2
    assert (
        f"--gpus-per-node {text}: it takes a number, or a type and a number such as h100:8" in capsys.readouterr().err
    )


def test_the_plan_assumes_the_gpus_that_are_asked_for(config_file):
    def hardware(*words: str) -> str:
        return hardware_of(parse(["submit", str(config_file), "--nodes", "1", *words]))

    assert hardware("--gpus-per-node", "H200:8") == "h200" and hardware("--gpus-per-node", "a100_80gb:4") == "a100"
    assert hardware("--gpus-per-node", "8") == "h100" and hardware("--gpus-per-node", "v100:8") == "h100"
    assert hardware("--gpus-per-node", "h100:8", "--hardware", "b200") == "b200"


def test_each_group_of_nodes_has_its_partition(config_file):
    resources = {"server_nodes": 1, "partition": "train", "server_partition": "infer", "server_options": ("--qos=low",)}
    found = directives(dry(config_file, *SERVED, **resources).script)
    split = found.index("hetjob")
    assert "--partition=train" in found[:split] and "--partition=infer" in found[split:]
    assert "--partition=infer" not in found[:split] and "--partition=train" not in found[split:]
    assert "--qos=low" in found[split:] and "--qos=low" not in found[:split]
    same = directives(dry(config_file, *SERVED, server_nodes=1, partition="one").script)
    assert same.count("--partition=one") == 2
    with pytest.raises(SlurmError, match=r"--server-partition is for the nodes that only generate.*--server-nodes"):
        dry(config_file, server_partition="infer")


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["layout.dp=null", "--qos", "high"], "--sbatch=--qos=high"),
        (["--qos=high", "layout.dp=null"], "--sbatch=--qos=high"),
        (["--qos", "high", "layout.dp=null"], "--sbatch=--qos=high"),
        (["--exclusive"], "--sbatch=--exclusive"),
        (["-q", "high"], "--sbatch=-qhigh"),
        (["--constraint", "ib", "--exclude", "n1"], "--sbatch=--constraint=ib"),
        (["--reservation", "mine", "--dry-run"], "--sbatch=--reservation=mine"),
    ],
)
@pytest.mark.parametrize("command", ["submit", "scale"])
def test_an_option_of_sbatch_is_shown_as_it_is_handed_on(config_file, command, words, remedy, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, str(config_file), "--nodes", "2", *words])
    said = capsys.readouterr().err
    assert f"is no option of `clipo {command}`" in said and said.rstrip().endswith(remedy), said


# ---------------------------------------------------------------- paths


def test_a_relative_python_is_that_of_the_submitting_folder(config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    python = str(tmp_path / ".venv" / "bin" / "python")
    for written in (".venv/bin/python", "./.venv/bin/python", "../" + tmp_path.name + "/.venv/bin/python"):
        script = dry(config_file, python=written).script
        assert setting(script, "CLIPO")[0] == python, "the link is kept: it is what makes an environment"
        assert python in setting(script, "MUST_SEE")
    with pytest.raises(SlurmError, match=r"--python venv/bin/python: there is no such file below"):
        dry(config_file, python="venv/bin/python")


def test_a_bare_name_of_a_program_is_looked_up_here_or_left_to_the_nodes(config_file, monkeypatch, tmp_path, slurm):
    slurm("special-python", "#!/bin/sh\n")
    script = dry(config_file, python="special-python").script
    assert setting(script, "CLIPO")[0] == str(tmp_path / "bin" / "special-python")
    script = dry(config_file, python="python-of-a-module", setup="module load python").script
    assert setting(script, "CLIPO")[0] == "python-of-a-module"
    assert "python-of-a-module" not in setting(script, "MUST_SEE"), "it is no file, and the nodes' PATH has it"


def test_relative_paths_of_every_setting_are_those_of_the_submitting_folder(config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("class Own: pass\n")
    (tmp_path / "model").symlink_to(config_file.parent / "model")
    overrides = [
        "model.path=model",
        "critic.path=model",
        "train.output=out",
        "rollout.sync.folder=weights",
        "serve.python=envs/engine/bin/python",
        "algorithm.plugins=[{name: mine.py:Own, options: {score: mine.py:judge, other: no.py:thing}}]",
    ]
    config = folders.resolve(load(config_file, overrides), Resources(nodes=1))
    assert config.model.path == config.critic.path == str(tmp_path / "model")
    assert config.train.output == str(tmp_path / "out") and config.rollout.sync.folder == str(tmp_path / "weights")
    assert config.serve.python == str(tmp_path / "envs/engine/bin/python")
    (plugin,) = config.algorithm.plugins
    assert plugin.name == f"{tmp_path}/mine.py:Own"
    assert plugin.options == {"score": f"{tmp_path}/mine.py:judge", "other": "no.py:thing"}


def test_a_model_that_is_not_there_is_named_as_the_user_wrote_it(config_file, tmp_path, monkeypatch, slurm):
    monkeypatch.chdir(tmp_path)
    slurm("sbatch", "#!/bin/sh\necho 1\n")
    with pytest.raises(ValueError, match="Some/Model-7B") as refusal:
        submit(config_file, ["model.path=Some/Model-7B", "train.output=out"], Resources(nodes=1))
    assert f"{tmp_path}/Some/Model-7B" not in str(refusal.value)


# ---------------------------------------------------------------- containers


def test_a_container_sees_checkout_environment_model_data_and_output(config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = tmp_path / "image.sqsh"
    image.touch()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "method.py").write_text("from clipo_megatron.algorithms.methods.grpo import GRPO\n")
    overrides = [f"train.output={tmp_path / 'out'}", "algorithm.name=own/method.py:GRPO"]
    script = dry(config_file, *overrides, container="image.sqsh", mounts=("data:/data",)).script
    found, mounts = setting(script, "CONTAINER")
    assert found == f"--container-image={image}", "a name without a slash would be one of a registry"
    places = mounts.removeprefix("--container-mounts=").split(",")
    inside = [place.partition(":")[2] for place in places]
    needed = [checkout(), config_file.parent / "model", config_file.parent, tmp_path / "out" / "jobs", tmp_path / "own"]
    needed += environment_folders(sys.executable)
    for path in needed:
        assert any(Path(path).is_relative_to(place) for place in inside), path
    assert f"{tmp_path}/data:/data" in places
    command = setting(script, "CLIPO")
    assert command[-3:] == ["python3", "-m", "clipo_megatron.cli"] and str(checkout()) in command
    assert str(config_file.parent / "model") in setting(script, "MUST_SEE"), "nodes are checked in a container too"
    assert int(setting(script, "NODES_DEADLINE")[0]) >= 600, "images are unpacked the first time"


def test_the_python_of_a_container_may_be_an_environment_of_the_host(config_file, tmp_path):
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "base" / "bin").mkdir(parents=True)
    (tmp_path / "base" / "bin" / "python3").touch()
    python = tmp_path / "venv" / "bin" / "python"
    python.symlink_to(tmp_path / "base" / "bin" / "python3")
    script = dry(config_file, container="docker://images/one", python=str(python)).script
    mounts = setting(script, "CONTAINER")[1]
    assert f"{tmp_path}/venv:{tmp_path}/venv" in mounts and f"{tmp_path}/base:{tmp_path}/base" in mounts
    assert setting(script, "CLIPO")[-3:] == [str(python), "-m", "clipo_megatron.cli"]


def test_the_checkout_comes_before_what_the_image_has(tmp_path, config_file):
    """The command of a container, with a shell in the place of its Python."""
    script = dry(config_file, container="docker://images/one").script
    words = setting(script, "CLIPO")[:-3]
    run = subprocess.run(
        [*words, "sh", "-c", "echo $PYTHONPATH"],
        env=os.environ | {"PYTHONPATH": "/image"},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == f"{checkout()}:/image"


def test_apptainer_runs_the_steps_where_the_image_is_its_own(config_file, tmp_path):
    image = tmp_path / "image.sif"
    image.touch()
    words = setting(dry(config_file, container=str(image), gpus_per_node=1, nodes=1).script, "CONTAINER")
    assert words[:3] == ["apptainer", "exec", "--nv"] and words[-1] == str(image)
    assert words[3].startswith("--bind=") and f"{checkout()}:{checkout()}" in words[3]
    words = setting(dry(config_file, container="docker://x", container_runtime="singularity").script, "CONTAINER")
    assert words[:2] == ["singularity", "exec"] and "--nv" not in words and words[-1] == "docker://x"


def test_an_image_that_is_not_there_is_refused(config_file):
    with pytest.raises(SlurmError, match=r"--container images/gone\.sqsh: there is no such image below"):
        dry(config_file, container="images/gone.sqsh")


def test_nodes_are_checked_within_the_container(config_file, tmp_path, slurm):
    """The script with programs in the place of Slurm's and Apptainer's: what the container lacks ends the job."""
    image = tmp_path / "image.sif"
    image.touch()
    slurm("scontrol", "#!/bin/sh\ncase \"$*\" in 'show hostnames'*) echo n1 ;; *) echo NodeAddr=10.0.0.1 ;; esac\n")
    slurm("srun", '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nSLURMD_NODENAME=n1 "$@"\n')
    slurm(
        "apptainer",
        '#!/bin/bash\necho "$1 $2" >> "$CALLS"\n[[ $BROKEN ]] && { echo no such image; exit 1; }\nshift 3\nexec "$@"\n',
    )
    slurm("python3", f'#!/bin/bash\n[[ $LACKS && $* == *--version ]] && {{ echo "No module named $LACKS"; exit 1; }}\n'
                     f'[[ $* == *--version ]] && exec {sys.executable} "$@"\nexit 0\n')  # fmt: skip
    job = dry(config_file, f"train.output={tmp_path / 'run'}", nodes=1, container=str(image))
    job.folder.mkdir(parents=True)

    def outcome(**environment: str) -> tuple[int, str]:
        environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "CALLS": str(tmp_path / "calls")}
        done = subprocess.run(["bash", "-c", job.script], env=os.environ | environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    code, said = outcome()
    assert code == 0 and "done" in said, said
    assert len((tmp_path / "calls").read_text().splitlines()) == 2, "the look at the node, and the ranks"
    code, said = outcome(LACKS="megatron")
    assert code == 2 and "n1 cannot run" in said and "No module named megatron" in said
    code, said = outcome(BROKEN="yes")
    assert code == 2 and "no such image" in said and "these nodes cannot work for this job: n1" in said


def test_the_folder_of_a_job_says_what_was_asked(config_file, tmp_path, slurm):
    slurm("sbatch", "#!/bin/sh\necho 5\n")
    slurm("scontrol", "#!/bin/sh\necho JobState=COMPLETED\n")
    job = submit(config_file, [f"train.output={tmp_path / 'run'}"], Resources(nodes=2, gpu_type=""))
    facts = json.loads((job.folder / "submission.json").read_text())["resources"]
    assert facts["cpus_per_rank"] is None and facts["memory"] == ""
