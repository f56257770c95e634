"""`clipo plan`: what it says of the configured layout and of others, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from paths import ARCHITECTURES

from clipo_megatron.cli.main import main
from clipo_megatron.planning.timing import StepTime


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text((ARCHITECTURES / "qwen2.5-72b.json").read_text())
    file = folder / "run.yaml"
    file.write_text(
        f"name: big\nmodel: {{path: {folder / 'model'}}}\nrollout: {{engine: sglang, colocated: true}}\n"
        "layout: {tp: 8, pp: 8, sequence_parallel: true}\nserve: {tp: 8}\n"
    )
    return file


def test_the_configured_layout_is_judged(run_file, capsys):
    assert main(["plan", str(run_file)]) == 0
    said = capsys.readouterr().out
    assert "72.71 B parameters" in said and "64 GPUs: tp 8 x pp 8 x dp 1" in said and said.endswith("fits\n")
    assert main(["plan", str(run_file), "layout.pp=1"]) == 1
    assert "does not fit: stage 0 of the trainer needs" in capsys.readouterr().out.replace("\n", " ")


def test_layouts_that_cannot_be_told_apart_are_said(run_file, capsys):
    assert main(["plan", str(run_file), "--gpus", "256", "--hardware", "h200"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"the first \d+ differ by less than the 10% that this model of time can tell apart", said)
    assert main(["plan", str(run_file), "--gpus", "256", "--hardware", "h200", "--assume", "error=0"]) == 0
    assert "tell apart" not in capsys.readouterr().out


def test_layouts_to_choose_from(run_file, capsys):
    assert main(["plan", str(run_file), "--gpus", "64,128", "--hardware", "h200"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"64 GPUs: \d+ layouts fit", said) and re.search(r"128 GPUs: \d+ layouts fit", said)
    assert main(["plan", str(run_file), "--gpus", "8"]) == 1
    assert "8 GPUs: no layout fits" in capsys.readouterr().out
    assert main(["plan", str(run_file), "--gpus", "64", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["parameters"] == 72_706_203_648 and answer["layouts"]["64"][0]["fits"]


def test_with_steps_ahead_generation_runs_beside_training(run_file, capsys):
    apart = ["rollout.colocated=false", "rollout.servers=8", "serve.servers=1"]
    found = {}
    for ahead in (0, 1):
        main(["plan", str(run_file), *apart, f"rollout.ahead={ahead}", "--json"])
        found[ahead] = json.loads(capsys.readouterr().out)["configured"]
    seconds = found[1]["seconds"]
    train = seconds["score"] + seconds["update"]
    assert found[0]["seconds"]["total"] == pytest.approx(seconds["generate"] + train + seconds["sync"])
    assert seconds["total"] == pytest.approx(max(seconds["generate"], train) + seconds["sync"])
    assert found[1]["tokens_per_s_per_gpu"] > 1.1 * found[0]["tokens_per_s_per_gpu"]
    main(["plan", str(run_file), *apart, "rollout.ahead=1"])
    said = " ".join(capsys.readouterr().out.split())
    idle = f"{found[1]['trainer_idle']:.0%} of a step, servers are idle in {found[1]['server_idle']:.0%}"
    assert f"ranks wait for rollouts in {idle}; tokens are {found[1]['mean_age']:.1f} updates old in the mean" in said


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("train", [3.0, 10.0, 14.0])
def test_idle_shares_and_ages_are_those_of_servers_that_work_on_all_batches_alike(ahead, train):
    time = StepTime(generate=10.0, score=train / 3, update=train * 2 / 3, sync=1.0, sync_bytes=0, tokens=1, ahead=ahead)
    waited, idle, age, period = simulated(10.0, train, 1.0, ahead)
    assert time.total == pytest.approx(period, rel=1e-3)
    assert (time.trainer_idle, time.server_idle) == pytest.approx((waited / period, idle / period), abs=1e-3)
    assert time.mean_age == pytest.approx(age, abs=1e-3)


def simulated(generate: float, train: float, sync: float, ahead: int) -> tuple[float, float, float, float]:
    """Seconds that ranks wait and servers are idle, age of tokens, and seconds of a step, in the mean over many."""
    done: dict[int, list[tuple[int, float]]] = {}  # batch -> version and seconds of work

    def work(version: int, seconds: float, until: int | None = None) -> float:
        """Work on all batches in flight alike, until the batch `until` is complete; returns the seconds left."""
        while seconds > 1e-9:
            left = {batch: generate - sum(part for _, part in parts) for batch, parts in done.items()}
            left = {batch: each for batch, each in left.items() if each > 1e-9}
            if not left or (until is not None and until not in left):
                break
            share = min(min(left.values()), seconds / len(left))
            for batch in left:
                done[batch].append((version, share))
            seconds -= share * len(left)
        return seconds

    for batch in range(ahead):
        done[batch] = []
    found = []
    for step in range(400):
        done[step + ahead] = []
        waited = 1e9 - work(step, 1e9, until=step)
        age = sum((step - version) * part for version, part in done.pop(step)) / generate
        idle = work(step, train) + sync
        found.append((waited, idle, age, waited + train + sync))
    return tuple(sum(column) / 240 for column in zip(*found[160:], strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "h300"], "--hardware h300: the table has no such GPU. Choose one of a100, h100"),
        (["--assume", "luck=1"], "--assume luck=1: it takes name=number with a name of decode_bandwidth"),
        (
            ["--assume", "train_flops=0"],
            "--assume train_flops=0: it must be above 0 and at most 1. The default is 0.4.",
        ),
        (["--assume", "mean_response=1e400"], "--assume mean_response=1e400: it must be above 0 and at most 1"),
        (["--assume", "reserve_bytes=nan"], "--assume reserve_bytes=nan: it must be"),
        (["megatron.fp8=hybird"], "megatron.fp8 = hybird: one of e4m3, hybrid, or null was expected"),
        (["megatron.recompute_granularity=selective", "megatron.recompute_modules=3"], "a list of text, or null was"),
        (["layout.pp=7"], "tp 8 x pp 7 x ep 1: 80 layers cannot be divided into 7 equal parts"),
        (
            ["rollout.engine=local", "rollout.colocated=false"],
            "rollout.engine = local generates in the training processes",
        ),
    ],
)
def test_what_cannot_be_planned_is_named(arguments, message, run_file, capsys):
    assert main(["plan", str(run_file), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_servers_take_whole_nodes_where_a_share_leaves_no_layout(run_file, capsys):
    """A quarter of 1,000 GPUs leaves 750, which tensor parallelism of 4 or 8 does not divide; 31 nodes leave 752."""
    words = ["plan", str(run_file), "--gpus", "1000", "rollout.colocated=false", "--hardware", "h200", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)["layouts"]["1000"]
    assert 248 in {each["server_gpus"] for each in found} and all(each["gpus"] == 1000 for each in found)


def test_a_critic_that_is_not_here_is_looked_for_beside_the_configuration(run_file, capsys):
    settings = ["algorithm.name=ppo", "critic.path=models/critic", "layout.dp=4"]
    assert main(["plan", str(run_file), *settings]) == 2
    assert "critic.path = models/critic has no config.json" in " ".join(capsys.readouterr().err.split())
    (run_file.parent / "architectures").mkdir()
    (run_file.parent / "architectures" / "critic.json").write_text((ARCHITECTURES / "qwen2.5-72b.json").read_text())
    assert main(["plan", str(run_file), *settings]) == 0
    assert "critic" in capsys.readouterr().out
